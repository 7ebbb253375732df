"""The layers that replace PEFT's own. Importing this module imports PEFT."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners.lora import LoraModel
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Embedding, Linear, MultiheadAttention, ParamWrapper
from peft.tuners.lora.torchao import TorchaoLoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ... import dispatch, operands
from ...class_swaps import in_place_of, our_class
from ...formats import QuantizedWeight
from ...functional.dora import dora_embedding, dora_linear_of_layer
from ...functional.embedding import lora_embedding
from ...functional.lora import lora_linear_of_layer
from ...functional.tensor_parallel import lora_linear_of_shards
from ...modules.base import is_given
from ...modules.quantized import QuantizedLinear, set_compute_type
from ...reasons import Reason
from ...report import FUSED, FUSED_COLUMNS, FUSED_GATHERED, FUSED_POOL, FUSED_ROWS
from . import conv, experts, mixed_batch, packed_merging, packs, several_adapters, sharded_merging

original_create_new_module: Any = LoraModel._create_new_module
"""What ``LoraModel`` had when ``patch_peft`` was called last."""


class FusedForward(nn.Module):
    """What replaces PEFT's linear layers, beside their own class: a forward of one op where that computes the same.

    Where it does not (``operands/``), PEFT's own forward serves the whole call and ``lk.stats()`` counts the reason.
    Nothing but ``forward`` differs: parameters, merging, adapter switching and hooks are PEFT's.
    """

    is_routed = False
    """Set by ``route_adapters``."""

    def _replicate_for_data_parallel(self) -> Any:
        replica: Any = super()._replicate_for_data_parallel()
        packs.detach([replica])  # its siblings would be the original's
        return replica

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found: Any
        reason: Any = None
        mixes = False  # some rows use another adapter than others
        is_more = is_given(self, args or kwargs)
        pack = None if is_more else packs.of_layer(self)
        if pack is not None:
            found = packs.call(*pack, self, x)
            if type(found) is not Reason:
                return found
            _count("lora_pack", found)
        set_compute_type(self.__dict__["_modules"]["base_layer"], x)
        if is_more:
            reason = Reason.DISABLED if self._disable_adapters else mixed_batch.extra_arguments(args, kwargs)
            mixes = reason is None and (
                kwargs.get("adapter_names") is not None or mixed_batch.acts_on_some_tokens(self)
            )
        if reason is None and not mixes:
            found = operands.operands(self)
            if found is Reason.DTENSOR and not torch.compiler.is_compiling():
                found = operands.sharded_operands(self)
            if found is Reason.ADAPTER_HOOKS and operands.gather_parts(self):
                found = operands.operands(self)
            if type(found) is tuple:
                weight, lora_A, lora_B, bias, scaling, dropout_p, training, magnitude = found
                reason = operands.call_reason(x, weight, lora_A, lora_B)
                if reason is None and magnitude is None:
                    return lora_linear_of_layer(x, weight, lora_A, lora_B, bias, scaling, dropout_p, training)
                if reason is None:
                    return dora_linear_of_layer(
                        x, weight, lora_A, lora_B, magnitude, bias, scaling, dropout_p, training
                    )
            elif type(found) is Reason:
                mixes = found is Reason.VARIANT and mixed_batch.acts_on_some_tokens(self)
                reason = None if mixes else found
            elif type(found) is operands.Shards:
                reason = operands.call_reason(x, *found[:3])
                if reason is None:
                    return lora_linear_of_shards(x, *found)
            else:
                reason = several_adapters.call_reason(x, found)
                if reason is None:
                    return several_adapters.forward(x, found)
        if mixes:
            found = mixed_batch.mixed(self, x, kwargs)
            if type(found) is not Reason:
                return mixed_batch.forward(self, x, found)
            reason = found
            names = kwargs.get("adapter_names")
            if type(names) is mixed_batch.Routed and reason is not Reason.ADAPTER_NAMES:
                _count("multi_lora_linear", reason)
                return mixed_batch.one_by_one(self, x, names)
        _count("lora_linear", reason)
        return super().forward(x, *args, **kwargs)


@in_place_of(Linear)
class FusedLinear(FusedForward, Linear):
    """PEFT's ``lora.Linear``, over a plain base layer or a quantised one."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        base = _packed_base(self)
        if base is not None:
            return packed_merging.merge(self, base, adapter_names)
        if safe_merge and sharded_merging.is_on_shards(self):
            sharded_merging.check_finite(self, adapter_names)
            safe_merge = False
        return super().merge(safe_merge, adapter_names)

    def unmerge(self) -> None:
        base = _packed_base(self)
        if base is not None:
            return packed_merging.unmerge(self, base)
        return super().unmerge()

    def get_delta_weight(self, adapter: str) -> Tensor:
        with sharded_merging.spread_factors(self, adapter):
            return super().get_delta_weight(adapter)


def _packed_base(layer: Any) -> QuantizedLinear | None:
    base = layer.get_base_layer()
    return base if isinstance(base, QuantizedLinear) else None


@in_place_of(Embedding)
class FusedEmbedding(Embedding):
    """PEFT's ``lora.Embedding``, as ``FusedLinear`` is its ``lora.Linear``."""

    is_routed = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if is_given(self, args or kwargs):
            reason: Any = _extra_arguments(self, args, kwargs) or Reason.ADAPTER_NAMES
        else:
            found: Any = operands.embedding_operands(self)
            reason = found if type(found) is Reason else operands.ids_reason(x)
            if reason is None:
                weight, lora_A, lora_B, scaling, padding_idx, magnitude = found
                if magnitude is None:
                    return lora_embedding(x, weight, lora_A, lora_B, scaling=scaling, padding_idx=padding_idx)
                return dora_embedding(x, weight, lora_A, lora_B, magnitude, scaling=scaling, padding_idx=padding_idx)
        _count("lora_embedding", reason)
        return super().forward(x, *args, **kwargs)


class FusedConv(nn.Module):
    """What replaces PEFT's convolutions, beside their own class, as ``FusedLinear`` its ``lora.Linear``."""

    is_routed = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if is_given(self, args or kwargs):
            reason: Any = _extra_arguments(self, args, kwargs) or Reason.ADAPTER_NAMES
        else:
            found: Any = conv.adapters(self)
            reason = found if type(found) is Reason else conv.call_reason(x, found)
            if reason is None:
                return conv.forward(self, x, found)
        _count("lora_conv", reason)
        return super().forward(x, *args, **kwargs)


@in_place_of(Conv1d)
class FusedConv1d(FusedConv, Conv1d):
    pass


@in_place_of(Conv2d)
class FusedConv2d(FusedConv, Conv2d):
    pass


@in_place_of(Conv3d)
class FusedConv3d(FusedConv, Conv3d):
    pass


@in_place_of(ParamWrapper)
class FusedParamWrapper(ParamWrapper):
    """PEFT's ``target_parameters``: experts of a mixture, and the weight of a linear layer."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = experts.call(self, x, args, kwargs)
        if type(result) is not Reason:
            return result
        _count("lora_linear" if experts.is_of_linear(self) else "grouped_lora_linear", result)
        return super().forward(x, *args, **kwargs)


SWAPS: dict[type, type] = {
    Linear: FusedLinear, Embedding: FusedEmbedding, Conv1d: FusedConv1d, Conv2d: FusedConv2d, Conv3d: FusedConv3d,
    ParamWrapper: FusedParamWrapper,
}  # fmt: skip
"""PEFT's layers and what replaces them."""


@in_place_of(TorchaoLoraLinear)
class FusedTorchaoLinear(FusedForward, TorchaoLoraLinear):
    """PEFT's layer over a weight of torchao's."""


@in_place_of(GPTQLoraLinear)
class FusedGPTQLinear(FusedForward, GPTQLoraLinear):
    """PEFT's layer over GPTQModel's, in GPTQ's format: nothing decoded is kept for backward."""


@in_place_of(AwqLoraLinear)
class FusedAwqLinear(FusedForward, AwqLoraLinear):
    """The same in AWQ's format."""


SWAPS |= {
    TorchaoLoraLinear: FusedTorchaoLinear, GPTQLoraLinear: FusedGPTQLinear, AwqLoraLinear: FusedAwqLinear,
}  # fmt: skip
if is_bnb_available():
    from peft.tuners.lora.bnb import Linear8bitLt

    @in_place_of(Linear8bitLt)
    class FusedLinear8bitLt(FusedForward, Linear8bitLt):
        """PEFT's ``lora.bnb.Linear8bitLt`` where bitsandbytes does not round the activations: in training on a CPU."""

    SWAPS[Linear8bitLt] = FusedLinear8bitLt
if is_bnb_4bit_available():
    from peft.tuners.lora.bnb import Linear4bit

    @in_place_of(Linear4bit)
    class FusedLinear4bit(FusedForward, Linear4bit):
        """PEFT's ``lora.bnb.Linear4bit``: forward and gradients from the packed weight."""

    SWAPS[Linear4bit] = FusedLinear4bit


def _extra_arguments(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reason | None:
    """Why a call with more than x is PEFT's own; None for ``adapter_names``."""
    if layer._disable_adapters:
        return Reason.DISABLED
    only_names = not args and len(kwargs) == 1 and kwargs.get("adapter_names") is not None
    return None if only_names else Reason.EXTRA_ARGUMENTS


def _count(op: str, reason: Reason) -> None:
    if not torch.compiler.is_compiling():  # a counter in traced code would recompile on every call
        dispatch.count_fallback(op, reason)


def create_in_patched_peft(*args: Any, **kwargs: Any) -> nn.Module:
    """Stands in for ``LoraModel._create_new_module`` on the class."""
    return swap(original_create_new_module(*args, **kwargs))


def create_in_patched_model(*args: Any, **kwargs: Any) -> nn.Module:
    """Stands in for ``LoraModel._create_new_module`` on one instance."""
    return swap(LoraModel._create_new_module(*args, **kwargs))


def swap(module: nn.Module) -> nn.Module:
    """``module``, of our class if it is of one that we replace; otherwise its calls are counted as fallbacks.

    What is no layer of PEFT's comes back as it is.
    """
    if not isinstance(module, BaseTunerLayer) or our_class(module, SWAPS.values()) is not None:
        return module
    if why_not_swapped(module) is None:
        module.__class__ = SWAPS[type(module)]
    elif type(module) is MultiheadAttention:
        pass  # a hook would keep torch's encoder from its fast path, which passes PEFT's adapters by
    elif _count_not_swapped not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_count_not_swapped)
    return module


def why_not_swapped(layer: nn.Module) -> Reason | None:
    """Why the class of one of PEFT's layers is not swapped; None if it can be, or is."""
    if our_class(layer, SWAPS.values()) is not None:
        return None
    if type(layer) not in SWAPS:
        return Reason.LAYER_TYPE
    if type(layer) is ParamWrapper and experts.why_not_swapped(layer) is not None:
        return Reason.TARGET_PARAMETERS
    # What the instance calls is bound to the old class: swapping would change nothing.
    return Reason.INSTANCE_FORWARD if "forward" in layer.__dict__ else None


def next_call(layer: Any) -> tuple[Reason | None, str]:
    """Why the next plain call of a swapped layer, on an input of the base's dtype, is PEFT's own, None if it is not;
    what serves it otherwise.
    """
    found: Any
    if isinstance(layer, FusedEmbedding):
        found = operands.embedding_operands(layer)
        if type(found) is Reason:
            return found, ""
        return None, "lora_embedding" if found[-1] is None else "dora_embedding"
    if isinstance(layer, FusedParamWrapper) and not experts.is_of_linear(layer):
        found = experts.experts_operands(layer)
        return (found, "") if type(found) is Reason else (None, "grouped_lora_linear")
    is_conv = isinstance(layer, FusedConv)
    found = conv.adapters(layer) if is_conv else operands.operands(layer)
    if found is Reason.DTENSOR and isinstance(layer, FusedForward):
        found = operands.sharded_operands(layer)
    if found is Reason.VARIANT and isinstance(layer, FusedForward) and mixed_batch.acts_on_some_tokens(layer):
        return None, FUSED_POOL
    if found is Reason.ADAPTER_HOOKS and isinstance(layer, FusedForward) and operands.has_gathered_parts(layer):
        return None, FUSED_GATHERED
    if type(found) is Reason:
        return found, ""
    if is_conv:
        usual_input = layer.get_base_layer().weight.new_empty(0)
        return conv.call_reason(usual_input, found), "lora_conv"
    if isinstance(found, operands.Shards):
        usual_input = found.weight.new_empty(0)
        return operands.call_reason(usual_input, *found[:3]), FUSED_ROWS if found.by_rows else FUSED_COLUMNS
    weight, lora_A, lora_B, *_, magnitude = found if type(found) is tuple else found.first
    usual_dtype, of_weight = weight.dtype, ""
    if isinstance(weight, QuantizedWeight):
        of_weight = f", {weight.format}, {weight.bits_per_weight:.2f} bits"
        if not getattr(layer.get_base_layer(), "compute_type_is_set", True):
            weight = replace(weight, dtype=lora_A.dtype)  # the first call will say
        if weight.device.type == "cpu":
            usual_dtype = lora_A.dtype
    usual_input = torch.empty(0, dtype=usual_dtype, device=weight.device)
    if type(found) is not tuple:
        return several_adapters.call_reason(usual_input, found), FUSED + of_weight
    reason = operands.call_reason(usual_input, weight, lora_A, lora_B)
    return reason, (FUSED if magnitude is None else "dora_linear") + of_weight


def _count_not_swapped(layer: nn.Module, args: tuple[Any, ...]) -> None:
    """A forward pre-hook of layers that stay PEFT's."""
    is_conv = isinstance(layer, (Conv1d, Conv2d, Conv3d))
    op = "lora_conv" if is_conv else "lora_embedding" if isinstance(layer, Embedding) else "lora_linear"
    reason: Any = why_not_swapped(layer)
    _count(op, reason)


def stop_counting(module: nn.Module) -> None:
    """Takes away what ``swap`` hooked to a layer that it did not swap."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is _count_not_swapped:
            del module._forward_pre_hooks[key]
