"""A fused layer beside the layer that it replaced."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import dispatch, formats, philox
from ..formats import QuantizedWeight
from ..formats.int8 import exact_in_eval
from ..functional.checks import draw_seed
from ..functional.lora import dropout_mask
from ..integrations.peft import patching as integration
from ..integrations.peft.packs import first_layer, without_pack
from ..modules.embedding import LoRAEmbedding
from ..modules.lora import LoRALinear
from ..operands import is_experts, projections
from ..plain import is_dtensor
from .results import DIFFERS, KEPT, OK, SEED, SHARDS, UNCOUNTED, Check, Results, badness, max_error

_EMBEDDINGS = (nn.Embedding, LoRAEmbedding)


def check_layer(layer: nn.Module, rows: int) -> Check:
    """The worst result of a fused layer, or why its original serves it."""
    if any(is_dtensor(parameter) for parameter in layer.parameters()):
        return Check("", "", KEPT, detail=SHARDS)
    ours = _alone(layer)
    exact_in_eval(ours, True)  # which is how the layer trains; what bitsandbytes rounds in eval mode is not ours
    _fill_zeros(ours)
    first = first_layer(ours)  # of an MLP, whose x it takes
    base = _base_of(ours.get_submodule(first))
    packed = formats.from_module(base)
    dtype = packed.decoded_dtype if isinstance(packed, QuantizedWeight) else _weight_of(base).dtype
    original: Any = copy.deepcopy(ours)
    if isinstance(packed, QuantizedWeight):  # which no product in float64 can take
        _decode(original, packed)
    original = _as_original(original)
    inputs = _inputs(_base_of(original.get_submodule(first)), rows)
    plain, exact = copy.deepcopy(original).to(dtype), original.double()
    worst = Check("", "", OK)
    p = _dropout_p(ours)
    for drops in (False, True) if p > 0.0 else (False,):
        for module in (ours, plain, exact):
            module.train(drops)
        torch.manual_seed(SEED)
        with dispatch.own_stats():
            results = _run(ours, inputs, dtype)
            stats = dispatch.stats()
        if not stats["served"]:
            return Check("", "", KEPT, detail=next((reason for _, reason in stats["fallback"]), UNCOUNTED))
        if drops:
            for module in (plain, exact):
                _drop_with(module, _mask(inputs[0], p), philox.keep_scale(p))
        op = next(iter(stats["served"]))[0].removesuffix("_backward")
        doubles = tuple(t.double() if t.is_floating_point() else t for t in inputs)
        bound, reference = _run(plain, inputs, dtype), _run(exact, doubles, dtype)
        worst = max(worst, _compare(op, results, bound, reference, " under dropout" if drops else ""), key=badness)
    return worst


def _alone(layer: nn.Module) -> nn.Module:
    """A copy without hooks, which may count, record, or be others'."""
    twin = copy.deepcopy(layer, without_pack(layer))
    for module in twin.modules():
        for hooks in (
            module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks,
        ):  # fmt: skip
            hooks.clear()
    return twin


def _as_original(layer: nn.Module) -> nn.Module:
    """``layer``, with the forward that ours replaces."""
    if isinstance(layer, (LoRALinear, LoRAEmbedding)):
        layer.__class__ = _UnfusedLinear if isinstance(layer, LoRALinear) else _UnfusedEmbedding
    else:
        integration.unpatch(layer)
    if is_experts(_base_of(layer)):
        _base_of(layer).config._experts_implementation = "eager"  # the one that multiplies float64
    return layer


class _UnfusedLinear(LoRALinear):
    dropout: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        dropped = x if self.dropout is None else self.dropout(x)
        return y if self.merged else y + self.scaling * F.linear(F.linear(dropped, self.lora_A), self.lora_B)


class _UnfusedEmbedding(LoRAEmbedding):
    def forward(self, input: Tensor) -> Tensor:
        y = F.embedding(input, self.weight, self.padding_idx)
        a = F.embedding(input, self.lora_A.t(), self.padding_idx)
        return y if self.merged else y + self.scaling * F.linear(a, self.lora_B)


class _Masked(nn.Module):
    """Stands in for the dropout of one of PEFT's layers."""

    def __init__(self, mask: Tensor, scale: float) -> None:
        super().__init__()
        self._factor = mask * scale

    def forward(self, x: Tensor) -> Tensor:
        return x * self._factor.to(x.dtype)


def _decode(layer: Any, weight: QuantizedWeight) -> None:
    """Gives ``layer`` a plain base: itself, or PEFT's."""
    base = layer
    if not isinstance(layer, LoRALinear):
        base = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        base.bias, layer.base_layer = _base_of(layer).bias, base
    bias = base.bias
    base.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
    base.bias = None if bias is None else nn.Parameter(bias.detach().to(weight.decoded_dtype), requires_grad=False)


def _base_of(layer: Any) -> Any:
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


@torch.no_grad()
def _fill_zeros(layer: nn.Module) -> None:
    """Gives adapters that are still zero something to compute."""
    for name, parameter in layer.named_parameters():
        if "lora_" in name and "magnitude" not in name and not parameter.any():
            parameter.normal_(std=0.1)


def _dropout_p(layer: Any) -> float:
    """Of the one adapter of a linear layer, else 0."""
    if isinstance(layer, LoRALinear):
        return layer.dropout_p
    active = [name for name in getattr(layer, "active_adapters", ()) if name in layer.lora_dropout]
    if len(active) != 1 or active[0] not in layer.lora_A or layer.lora_variant or not _is_linear(_base_of(layer)):
        return 0.0
    return float(getattr(layer.lora_dropout[active[0]], "p", 0.0))


def _is_linear(base: nn.Module) -> bool:
    return not isinstance(base, (*_EMBEDDINGS, nn.modules.conv._ConvNd))


def _drop_with(original: Any, mask: Tensor, scale: float) -> None:
    if isinstance(original, _UnfusedLinear):
        original.__dict__["dropout"] = _Masked(mask, scale)
    else:
        (name,) = (name for name in original.active_adapters if name in original.lora_dropout)
        original.lora_dropout[name] = _Masked(mask, scale)


def _mask(x: Tensor, p: float) -> Tensor:
    """What a layer that has just been called, first after ``SEED``, drops of [rows, features]."""
    torch.manual_seed(SEED)
    seed = draw_seed(x.device)
    rows, features = x.shape
    return dropout_mask(rows, features, p, seed)


def _weight_of(base: Any) -> Tensor:
    return getattr(base, projections(base)[0] if is_experts(base) else "weight")


def _inputs(base: Any, rows: int) -> tuple[Tensor, ...]:
    """[rows, in_features], ids [rows], or [rows, channels, ...] of the least size that fills the kernel; for experts
    [rows, features] with the choices of a router.
    """
    weight = _weight_of(base)
    generator = torch.Generator().manual_seed(SEED)
    if isinstance(base, _EMBEDDINGS):
        return (torch.randint(weight.shape[0], (rows,), generator=generator).to(weight.device),)
    if is_experts(base):
        x = torch.randn((rows, weight.shape[1 if base.is_transposed else 2]), generator=generator)
        shares, expert_ids = torch.rand((rows, base.num_experts), generator=generator).topk(min(2, base.num_experts))
        return x.to(weight), expert_ids.to(weight.device), shares.to(weight)
    shape: tuple[int, ...] = (rows, weight.shape[0 if type(base).__name__ == "Conv1D" else 1])
    if isinstance(base, nn.modules.conv._ConvNd):
        spatial = (dilation * (size - 1) + 3 for size, dilation in zip(base.kernel_size, base.dilation))
        shape = (rows, base.in_channels, *spatial)
    return (torch.randn(shape, generator=generator).to(weight.device, weight.dtype),)


def _run(layer: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> Results:
    """y and the gradients of one call; the gradient of y is representable in ``dtype``."""
    x, *rest = (t.detach().clone() for t in inputs)
    wanted: dict[str, Tensor] = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    if x.is_floating_point():
        wanted["dx"] = x.requires_grad_()
    y = layer(x, *rest)
    results = {"y": y.detach()}
    if not y.requires_grad:
        return results
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(SEED)).to(y.device, dtype).to(y.dtype)
    gradients = torch.autograd.grad(y, list(wanted.values()), grad_y, allow_unused=True)
    return results | {name: g for name, g in zip(wanted, gradients) if g is not None}


def _compare(op: str, ours: Results, plain: Results, exact: Results, where: str) -> Check:
    """The result that is worst."""
    missing = exact.keys() ^ ours.keys()
    if missing:
        return Check("", op, DIFFERS, math.inf, 0.0, f"{sorted(missing)[0]}: only one has it{where}")
    worst = Check("", op, OK)
    for name, reference in exact.items():
        if reference.numel() == 0:
            continue
        ulp = torch.finfo(plain[name].dtype).eps * reference.abs().max().item()
        allowed = 2 * max_error(plain[name], reference) + 4 * ulp
        error = max_error(ours[name].to(plain[name].dtype), reference)
        verdict = OK if error <= allowed else DIFFERS  # not where error is NaN
        worst = max(worst, Check("", op, verdict, error, allowed, name + where), key=badness)
    return worst
