"""LoRA in any torch model without PEFT, with PEFT's rules for choosing layers."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from .. import formats
from ..formats.int8 import exact_in_eval
from ..modules.base import check_adapter_dtype, check_count, check_hyperparameters, check_plain_linear, empty_adapter
from ..modules.lora import LoRALinear
from ..modules.multi import MultiLoRALinear, empty_pools
from ..modules.quantized import quantized_lora, why_no_packed_base
from ..plain import is_parametrized, passed_by, why_no_base
from ..reasons import Reason
from ..report import FUSED, FUSED_POOL, Report
from .wrappers import check_may_grow, unwrapped, wrapper_kinds

ALL_LINEAR = "all-linear"


def inject(
    model: nn.Module,
    target_modules: str | Collection[str],
    *,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
    exclude_modules: str | Collection[str] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
    adapter_dtype: torch.dtype | None = None,
    adapters: int | None = None,
) -> Report:
    """Turns the chosen linear layers of ``model`` into ``LoRALinear``, in place, and freezes the rest. They are
    ``nn.Linear``, or keep a quantised weight in a format of ``lora_kernels.formats``. With ``adapters`` they become
    ``MultiLoRALinear``, whose samples each use one of so many adapters (``lk.route_adapters``).

    Choosing follows PEFT's ``LoraConfig``. Parameters, names and hooks of the layers stay; only ``lora_A``
    and ``lora_B`` are added. Nothing is changed if an error is raised. A pattern that chooses nothing while others do
    gives a ``UserWarning``.

    Args:
        model: any module. Wrappers around and inside it (``torch.compile``, activation checkpointing) do not count in
            names.
        target_modules: names, matched as a whole or at the end after a dot ("q_proj" chooses
            "layers.0.attn.q_proj"); a string, matched as a regular expression against the whole name; or
            "all-linear", every linear layer except the output embedding.
        r, alpha, dropout, use_rslora, adapter_dtype: as in ``LoRALinear``.
        rank_pattern, alpha_pattern: exceptions from r and alpha; keys are regular expressions for the end of
            a name, the first that fits counts.
        exclude_modules: layers to leave out, written like target_modules.
        layers_to_transform: indices of the layers to choose from; not with a string target_modules.
        layers_pattern: name of the list those indices count in ("layers"); by default the first numbered part
            of a name.
        adapters: how many adapters each layer gets; None for one, as ``LoRALinear`` has it. Weights must be plain.

    Returns:
        The layers that were changed, and, for "all-linear", those left alone and why.

    Raises:
        TypeError, ValueError: bad numbers; nothing matches; the model already has adapters, or is wrapped in DDP, FSDP
            or DeepSpeed, which would not train parameters that are added later; a chosen module is no plain
            ``nn.Linear`` and not packed, its weight or bias is not a floating-point parameter of its own (pruned,
            parametrized), its forward was replaced, it has several names, or torch's own parent of it
            (``nn.MultiheadAttention``, ``nn.TransformerEncoderLayer`` in eval mode) multiplies by its weight without
            calling it.
    """
    check_adapter_dtype("inject", adapter_dtype)
    if adapters is not None:
        check_count("inject", "adapters", adapters)
    targets = Targets(
        target_modules, r, alpha, dict(rank_pattern or {}), dict(alpha_pattern or {}),
        exclude_modules, layers_to_transform, layers_pattern,
    )  # fmt: skip
    check_may_grow("inject", wrapper_kinds(model))
    with unwrapped(model) as bare:
        plan, kept = targets.plan("inject", bare, dropout)
        unmatched = list(targets.unmatched(bare, plan))
    for text in unmatched:
        warnings.warn(f"inject: {text}", UserWarning, stacklevel=2)
    if adapters is not None:
        _check_plain_weights(plan)
    # What may fail, which is to allocate, comes before the first change.
    parameters = {
        name: empty_adapter(layer.weight, rank, layer.in_features, layer.out_features, adapter_dtype)
        if adapters is None
        else empty_pools(layer, adapters, rank, adapter_dtype)
        for name, (layer, rank, _) in plan.items()
    }
    model.requires_grad_(False)
    layer: Any  # of two classes, one after the other
    for name, (layer, rank, scale) in plan.items():
        # The class is swapped, as in patch: other references to the layer and its hooks stay valid.
        is_packed = formats.from_module(layer) is not None
        layer.__class__ = (
            quantized_lora(type(layer)) if is_packed else LoRALinear if adapters is None else MultiLoRALinear
        )
        exact_in_eval(layer, is_packed)
        layer._adopt(layer.weight, layer.bias, parameters[name], rank, scale, dropout, use_rslora)
    return Report([(name, FUSED if adapters is None else FUSED_POOL) for name in plan], kept)


def _check_plain_weights(plan: Mapping[str, tuple[nn.Linear, int, float]]) -> None:
    packed = next((name for name, (layer, *_) in plan.items() if formats.from_module(layer) is not None), None)
    if packed is not None:
        raise ValueError(f"inject: adapters needs plain weights, that of {packed} is quantised")


@dataclass(frozen=True)
class Targets:
    """Which layers get an adapter, and of which rank and alpha: the choosing half of PEFT's ``LoraConfig``."""

    target_modules: str | Collection[str]
    r: int
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    exclude_modules: str | Collection[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    argument: ClassVar[str] = "target_modules"
    """What messages call it: the name that the caller knows."""

    def plan(
        self, op: str, model: nn.Module, dropout: float
    ) -> tuple[dict[str, tuple[nn.Linear, int, float]], list[tuple[str, str]]]:
        """``{name: (layer, rank, alpha)}`` and the (name, reason) pairs of layers that "all-linear" cannot
        serve.

        Raises as ``inject``; ``op`` begins the message.
        """
        check_hyperparameters(op, self.r, self.alpha, dropout)
        self._check_arguments(op)
        _check_no_adapters(op, model)
        modules = _named_modules(model)
        names_of: dict[nn.Module, list[str]] = {}
        for name, module in modules.items():
            names_of.setdefault(module, []).append(name)
        chosen = [name for name in self._candidates(model, modules) if not _listed(self.exclude_modules, name)]
        not_called = passed_by(model)
        plan: dict[str, tuple[nn.Linear, int, float]] = {}
        kept: list[tuple[str, str]] = []
        for name in chosen:
            layer: Any = modules[name]
            reason = _unserved(layer, layer in not_called, len(names_of[layer]) > 1)
            if reason is not None and self._all_linear:
                kept.append((name, reason))
                continue
            if isinstance(reason, Reason) and reason != Reason.FAN_IN_FAN_OUT:
                raise ValueError(f"{op}: {', '.join(names_of[layer])}: {reason}")
            if formats.from_module(layer) is None:
                check_plain_linear(f"{op}: {name}", layer)
            rank: Any = first_match(self.rank_pattern, name, self.r)
            alpha = first_match(self.alpha_pattern, name, self.alpha)
            check_hyperparameters(f"{op}: {name}", rank, alpha, dropout)
            plan[name] = (layer, rank, alpha)
        if not plan:
            raise ValueError(f"{op}: {self._nothing_matches(modules)}")
        return plan, kept

    def unmatched(self, model: nn.Module, chosen: Collection[str]) -> Iterator[str]:
        """What to say of each name or pattern that had no part in choosing these layers."""
        modules = _named_modules(model)
        if not isinstance(self.target_modules, str):
            for entry in self.target_modules:
                if not any(_listed([entry], name) for name in modules):
                    yield f"{self.argument}: {entry!r} matches no module"
        # That "all-linear" leaves the output embedding out anyway makes it no mistake to exclude it.
        linears = [name for name, module in modules.items() if _is_linear(module)]
        candidates = linears if self._all_linear else self._candidates(model, modules)
        excluded = self.exclude_modules or ()
        names: str | list[str]
        for names in [excluded] if isinstance(excluded, str) else [[name] for name in excluded]:
            if not any(_listed(names, name) for name in candidates):
                shown = names if isinstance(names, str) else names[0]
                yield f"exclude_modules: {shown!r} excludes no module"
        for field_name in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, field_name):
                if not any(_fits(pattern, name) for name in chosen):
                    yield f"{field_name}: {pattern!r} matches none of the chosen modules"

    @property
    def _all_linear(self) -> bool:
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def _check_arguments(self, op: str) -> None:
        expressions = [("rank_pattern", key) for key in self.rank_pattern]
        expressions += [("alpha_pattern", key) for key in self.alpha_pattern]
        for name, value in ((self.argument, self.target_modules), ("exclude_modules", self.exclude_modules)):
            if isinstance(value, str):
                expressions.append((name, value))
            elif value is None and name == "exclude_modules":
                continue
            elif not isinstance(value, Collection) or not all(isinstance(item, str) for item in value):
                raise TypeError(f"{op}: {name} must be a string or a list of names, got {value!r}")
        for name, expression in expressions:
            try:
                re.compile(expression)
            except re.error as error:
                raise ValueError(f"{op}: {name}: {expression!r} is no regular expression: {error}") from None
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(f"{op}: layers_to_transform needs {self.argument} as a list of names")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"{op}: layers_pattern needs layers_to_transform")

    def _candidates(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
        if self._all_linear:
            head = _output_embedding(model)
            return [name for name, module in modules.items() if _is_linear(module) and module is not head]
        return [name for name in modules if _listed(self.target_modules, name) and self._in_layers(name)]

    def _in_layers(self, name: str) -> bool:
        indices = self.layers_to_transform
        if indices is None or indices == [] or name in self.target_modules:  # a whole name stands for itself
            return True
        if not self.layers_pattern:
            match = re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", name)
        else:
            patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
            matches = (re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", name) for pattern in patterns)
            match = next((m for m in matches if m), None)
        if match is None:
            return False
        index = int(match["index"])
        return index == indices if isinstance(indices, int) else index in indices

    def _nothing_matches(self, modules: Mapping[str, nn.Module]) -> str:
        linears = (name for name, module in modules.items() if _is_linear(module))
        leaves = dict.fromkeys(name.rpartition(".")[2] for name in linears)
        known = ", ".join(list(leaves)[:12]) + (", ..." if len(leaves) > 12 else "") if leaves else "none"
        wanted = self.target_modules if isinstance(self.target_modules, str) else sorted(self.target_modules)
        text = f"{self.argument} {wanted!r} match no linear layer; names of linear layers here: {known}"
        return text if self.exclude_modules is None else text + f" (exclude_modules {self.exclude_modules!r})"


def _listed(names: str | Collection[str] | None, name: str) -> bool:
    """PEFT's rule for target_modules and exclude_modules."""
    if not names:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return name in names or any(name.endswith(f".{end}") for end in names)


def first_match(patterns: Mapping[str, float], name: str, default: float) -> float:
    """PEFT's rule for rank_pattern and alpha_pattern."""
    return next((value for pattern, value in patterns.items() if _fits(pattern, name)), default)


def _fits(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All but the model itself, under each of their names."""
    return {name: module for name, module in model.named_modules(remove_duplicate=False) if name}


def _is_linear(module: nn.Module) -> bool:
    # Conv1D is transformers' linear with a transposed weight; importing it to ask would import transformers.
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _unserved(module: nn.Module, not_called: bool, shared: bool) -> str | None:
    """Why this layer cannot become a ``LoRALinear``."""
    if type(module).__name__ == "Conv1D":
        return Reason.FAN_IN_FAN_OUT
    if not_called:
        return Reason.PARENT_READS
    if shared:  # an adapter on one would act under all of its names; PEFT puts one on the first only
        return Reason.SHARED
    packed = formats.from_module(module)
    if packed is not None:
        return why_no_packed_base(module, packed)
    try:
        check_plain_linear("", module)
    except TypeError:
        return Reason.PARAMETRIZED if is_parametrized(module) else f"{Reason.LAYER_TYPE}: {type(module).__name__}"
    return why_no_base(module)


def _output_embedding(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)  # transformers' models
    return get() if get is not None else getattr(model, "lm_head", None)


def _check_no_adapters(op: str, model: nn.Module) -> None:
    # A model can only hold what somebody has imported. Attributes say less: PEFT leaves peft_config behind.
    peft_model = getattr(sys.modules.get("peft"), "PeftModel", ())
    peft_layer = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", LoRALinear)
    for name, module in model.named_modules():
        if isinstance(module, peft_model):
            raise ValueError(f"{op}: {name or 'the model'} is a PEFT model; use lk.patch for it")
        if isinstance(module, (LoRALinear, MultiLoRALinear, peft_layer)):
            raise ValueError(f"{op}: the model already has an adapter, on {name or 'itself'}")
