"""Fused layers in PEFT models: ``patch`` one model in place, or ``patch_peft`` for every model made afterwards."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from ... import class_swaps
from ...formats.int8 import exact_in_eval
from ...frozen_linears import FrozenLinear
from ...modules.embedding import LoRAEmbedding
from ...modules.lora import LoRALinear
from ...modules.multi import MultiLoRALinear
from ...modules.quantized import frozen_originals
from ...plain import may_take_fast_path, passed_by
from ...reasons import Reason
from ...report import PREFIX, PROMPT, PROMPT_FIXED, PROMPT_MODULE, Report
from .. import loss as losses
from ..siblings import siblings
from .frozen import patch_frozen


def patch(
    model: nn.Module, frozen_linears: bool = False, left_padding: str = "peft", int8_eval: str = "peft", *,
    packs: bool | Mapping[str, Any] = False, loss: bool = False,
) -> Report:  # fmt: skip
    """Swaps the LoRA layers and the prompts of a PEFT model for fused ones, in place; ``unpatch`` restores them.

    Only the class of a layer changes, so parameters, ``state_dict``, hooks, optimizers, merging and adapter
    switching stay as they are. What a fused layer cannot compute exactly runs PEFT's own code, and is counted
    in ``lk.stats()``. Layers that ``model.add_adapter`` or ``model.load_adapter`` of this ``PeftModel``
    create later are fused too. Patching again is allowed and reports the present state.

    Prompts of prompt tuning, P-tuning, multitask prompt tuning and prefix tuning are put in front of the text by one
    op, where and as PEFT does it, in forward and in ``generate``; for these the class of the ``PeftModel`` itself
    changes, but not its ``__name__``. The attention mask keeps its dtype, which PEFT makes float32.

    Args:
        model: a PEFT model, or any module that contains PEFT layers.
        frozen_linears: also swap frozen ``nn.Linear`` layers (``lk.FrozenLinear``), whose product torch makes slowly:
            bfloat16 or float16 on a CPU without instructions for it, and fp32 where another library was measured to be
            faster on this CPU; and layers whose weight is quantised, which are multiplied from the packed bytes. Works
            without PEFT.
        left_padding: where a prompt goes in a batch that is padded on the left. "peft": [prompt, pads, text], with
            positions that count the pads, as PEFT does. "fixed": [pads, prompt, text], with positions that do not, so
            that a text's logits do not depend on its pads; a call that cannot be served so raises. Prefixes are not
            affected.
        int8_eval: what layers of bitsandbytes' 8-bit ``Linear8bitLt`` do in eval mode, and on CUDA in training, too.
            "peft": they round activations to eight bits, by bitsandbytes' own code. "exact": they do not.
        packs: also serve layers together: those of one module that read the same tensor (q, k and v; gate and up) by
            one ``lora_pack``, and a gated MLP whose three layers have LoRA by one ``lora_mlp``, which keeps less for
            backward. Which layers these are is found by what they do: one forward of a few tokens shows who reads what,
            and an MLP's own code is run once with stand-ins for its layers. That forward is given the ``dummy_inputs``
            of a model of transformers; for other models, ``packs`` is a dict of keyword arguments of their forward.
            Dropout then draws one seed per pack, not one per layer. Layers that are called outside of their module's
            forward go one by one. False takes earlier packs apart.
        loss: also have a causal language model of transformers form its loss without logits, by
            ``linear_cross_entropy``, where its forward is a backbone, a head and ``ForCausalLMLoss``: that is tried on
            eight tokens first, loss and gradient. Works without PEFT. Such a call returns ``logits=None``;
            ``model(..., output_logits=True)`` has them made, by the model's own forward. So has every call without
            gradients, as an evaluation is, but with ``output_logits=False``.

    Returns:
        What was swapped, and what was left alone and why. ``print`` it.

    Raises:
        ValueError: there is no PEFT layer or prompt in ``model`` and ``frozen_linears`` and ``loss`` are False, or
            left_padding is neither "peft" nor "fixed", or it is "fixed" and a prompt cannot be fused, or int8_eval is
            neither "peft" nor "exact", or the model cannot be called as ``packs`` needs it, or ``loss`` is True and
            there is no language model. Nothing is swapped then.
    """
    if left_padding not in ("peft", "fixed"):
        raise ValueError(f'patch: left_padding must be "peft" or "fixed", got {left_padding!r}')
    if int8_eval not in ("peft", "exact"):
        raise ValueError(f'patch: int8_eval must be "peft" or "exact", got {int8_eval!r}')
    peft_layers = dict(tuner_layers(model))
    prompts = dict(prompt_models(model))
    if not peft_layers and not prompts and not frozen_linears and not loss:
        raise ValueError(
            f"patch: {type(model).__name__} holds no PEFT layer; make it a PEFT model first, use lk.inject, "
            "or pass frozen_linears=True or loss=True"
        )
    if loss:
        losses.check_model(model)
    if left_padding == "fixed":
        _check_all_fusable(prompts)
    groups = siblings(model, peft_layers, None if packs is True else packs) if packs and peft_layers else None
    exact_in_eval(model, int8_eval == "exact")
    if peft_layers:
        _packing().take_apart(model)
    report, not_called = Report(), _passed_by(model, peft_layers.values())
    for name, layer in peft_layers.items():
        is_fused, by_what_or_why_not = _fuse(layer)
        if layer in not_called:
            is_fused, by_what_or_why_not = False, Reason.PARENT_READS
        (report.fused if is_fused else report.kept).append((name, by_what_or_why_not))
    for encoder in filter(may_take_fast_path, model.modules() if peft_layers else ()):
        for part in encoder.modules():  # hooks would change which path it takes
            _fused_layers().stop_counting(part)
    for tuner in _tuner_models(model):
        tuner.__dict__["_create_new_module"] = _fused_layers().create_in_patched_model
    for name, peft_model in prompts.items():
        _patch_prompts(name, peft_model, left_padding == "fixed", report)
    if groups is not None:
        _packing().pack(model, peft_layers, groups, report)
    if frozen_linears:
        patch_frozen(model, peft_layers, report)
    losses.patch(model, loss, report)
    return report


def unpatch(model: nn.Module) -> None:
    """Restores the classes that ``patch`` or ``patch_peft`` changed in ``model``; without any, does nothing. Raises
    nothing.
    """
    exact_in_eval(model, False)
    for module in model.modules():
        class_swaps.give_back(module, {FrozenLinear: nn.Linear, **frozen_originals(), **losses.originals()})
        losses.forget(module)
    if not _peft_imported():
        return
    _packing().take_apart(model)
    fused = _fused_layers()
    originals = {ours: theirs for theirs, ours in fused.SWAPS.items()}
    for module in model.modules():
        class_swaps.give_back(module, originals)
        fused.stop_counting(module)
        if module.__dict__.get("_create_new_module") is fused.create_in_patched_model:
            del module.__dict__["_create_new_module"]
    for _, peft_model in prompt_models(model):
        _fused_prompts().unfuse(peft_model)


def patch_peft() -> None:
    """Makes PEFT itself create fused layers and prompts, in every model made or loaded from now on.

    Existing models are not touched; use ``patch`` for them.

    Raises:
        ImportError: PEFT is not installed.
    """
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise ImportError("patch_peft needs PEFT; install it with: pip install lora_kernels[peft]") from error
    fused, lora_model = _fused_layers(), _lora_model()
    if lora_model._create_new_module is not fused.create_in_patched_peft:
        fused.original_create_new_module = lora_model._create_new_module
        lora_model._create_new_module = staticmethod(fused.create_in_patched_peft)
    prompt = _fused_prompts()
    if prompt.PeftModel._setup_prompt_encoder is not prompt.setup_in_patched_peft:
        prompt.original_setup_prompt_encoder = prompt.PeftModel._setup_prompt_encoder
        prompt.PeftModel._setup_prompt_encoder = prompt.setup_in_patched_peft


def unpatch_peft() -> None:
    """Undoes ``patch_peft``. Models made in between keep their fused layers; use ``unpatch`` for them."""
    if not _peft_imported():
        return
    fused, lora_model = _fused_layers(), _lora_model()
    if lora_model._create_new_module is fused.create_in_patched_peft:
        lora_model._create_new_module = staticmethod(fused.original_create_new_module)
    prompt = _fused_prompts()
    if prompt.PeftModel._setup_prompt_encoder is prompt.setup_in_patched_peft:
        prompt.PeftModel._setup_prompt_encoder = prompt.original_setup_prompt_encoder


def is_fused(module: nn.Module) -> bool:
    """Whether the forward of this module itself is one of lora_kernels: swapped in by ``patch`` or ``patch_peft``, or a
    ``LoRALinear``, ``MultiLoRALinear`` or ``LoRAEmbedding``.

    A swapped layer keeps its class's name in ``repr``, so this and the report of ``patch`` tell. A call that such a
    layer cannot serve runs the original forward; ``lk.stats()`` counts those, ``lk.verify`` names them. Raises nothing.
    """
    return class_swaps.swapped_in(module) is not None or isinstance(
        module, (LoRALinear, MultiLoRALinear, LoRAEmbedding)
    )


# --------------------------------------------------------------------------------------------------- details


def _peft_imported() -> bool:
    """A model can only hold PEFT layers if somebody imported PEFT: no need to import it to find out."""
    return sys.modules.get("peft") is not None


def _fused_layers() -> Any:
    from . import linear

    return linear


def _packing() -> Any:
    from . import packing

    return packing


def _fused_prompts() -> Any:
    from . import prompt_models

    return prompt_models


def _adapter_reason(model: nn.Module, adapter: str) -> Reason | None:
    from .prompts import adapter_reason

    return adapter_reason(model, adapter)


def _lora_model() -> type[Any]:
    from peft.tuners.lora import LoraModel

    return LoraModel


def tuner_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """PEFT's layers in ``model``, of any method, with their names."""
    if not _peft_imported():
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def _passed_by(model: nn.Module, peft_layers: Collection[Any]) -> set[nn.Module]:
    """The PEFT layers whose parent may read their base weight, and so pass the adapter by; in PEFT it does, too."""
    if not peft_layers:
        return set()
    wrapped = {layer.get_base_layer() for layer in peft_layers}  # PEFT merges an attention's adapters for the call
    heads = {base.out_proj for base in wrapped if isinstance(base, nn.MultiheadAttention)}
    return passed_by(model) - heads


def why_not_swapped(layer: nn.Module) -> Reason | None:
    """Why the class of one of PEFT's layers is not swapped; None if it can be, or is."""
    return _fused_layers().why_not_swapped(layer)


def prompt_reason(model: Any) -> Reason | None:
    """Why the active prompt of a PEFT model is PEFT's own to put in; None if it is ours."""
    if class_swaps.swapped_in(model) is None:
        return Reason.LAYER_TYPE
    return _adapter_reason(model, model.active_adapter)


@contextmanager
def original_prompts(model: Any) -> Iterator[None]:
    """A patched model with prompts has PEFT's class inside."""
    fixed = model._left_padding_fixed
    _fused_prompts().unfuse(model)
    try:
        yield
    finally:
        _fused_prompts().fuse(model)
        model._left_padding_fixed = fixed


def _tuner_models(model: nn.Module) -> Iterator[nn.Module]:
    if _peft_imported():
        exact = _lora_model()
        yield from (module for module in model.modules() if type(module) is exact)


def prompt_models(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The PEFT models in ``model`` that have a prompt, with their names."""
    if _peft_imported():
        from peft import PeftModel

        for name, module in model.named_modules():
            if isinstance(module, PeftModel) and PROMPT_MODULE in module._modules:
                yield name, module


def _check_all_fusable(prompts: Mapping[str, Any]) -> None:
    """Raises if PEFT, whose layout is not wanted, would put in one of the prompts; prefixes have no such layout."""
    for name, model in prompts.items():
        for adapter in model.prompt_encoder:
            reason = _fused_prompts().model_reason(model) or _adapter_reason(model, adapter)
            if reason is not None and model.peft_config[adapter].peft_type != "PREFIX_TUNING":
                row = _prompt_name(name, adapter)
                raise ValueError(f'patch: left_padding="fixed" needs every prompt fused, {row} cannot be: {reason}')


def _prompt_name(model: str, adapter: str) -> str:
    return ".".join(filter(None, (model, PROMPT_MODULE, adapter)))


def _patch_prompts(name: str, model: Any, left_padding_fixed: bool, report: Report) -> None:
    """Swaps the class of a model with prompts; a row for each of them."""
    prompt = _fused_prompts()
    of_model = prompt.fuse(model)
    if of_model is None:
        model._left_padding_fixed = left_padding_fixed
    for adapter in model.prompt_encoder:
        reason = of_model or _adapter_reason(model, adapter)
        row = _prompt_name(name, adapter)
        if reason is not None:
            report.kept.append((row, reason))
        elif model.peft_config[adapter].peft_type == "PREFIX_TUNING":
            report.fused.append((row, PREFIX))
        else:
            report.fused.append((row, PROMPT_FIXED if left_padding_fixed else PROMPT))


def _fuse(layer: nn.Module) -> tuple[bool, str]:
    """Swaps the class of a PEFT layer where it can. Whether its next call is fused, and the op that serves it or why
    not.
    """
    layers = _fused_layers()
    layers.swap(layer)
    reason = layers.why_not_swapped(layer)
    if reason is not None:
        return False, f"{reason}: {type(layer).__name__}" if reason is Reason.LAYER_TYPE else reason
    reason, by_what = layers.next_call(layer)
    return (True, by_what) if reason is None else (False, reason)
