"""Merging the adapters of a whole model, which unlike a single layer knows where weights are shared."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..modules.embedding import LoRAEmbedding
from ..modules.lora import LoRALinear


def merge_adapter(
    model: nn.Module, *, keep_base: bool = False, untie: bool = False, unload: bool = False
) -> dict[str, float]:
    """Adds the adapter of every ``LoRALinear`` and ``LoRAEmbedding`` in ``model`` to its weight; all or none.

    Args:
        model: a model with such layers.
        keep_base: as ``LoRALinear.merge``; ``unmerge_adapter`` then restores bitwise.
        untie: give a layer whose weight another module holds too (a tied embedding) a weight of its own. By
            default such a model is refused, because merging would change the other module.
        unload: also turn the layers back into plain ones, without their adapters. Cannot be undone.

    Returns:
        For each layer with a quantised weight, which merging quantises again, what that has cost: the norm of the
        difference between the new weight and the exact sum, in norms of the update.

    Raises:
        RuntimeError: a layer is already merged.
        ValueError: no such layer; a tied weight; a merged weight that would not be finite, or that is not the layer's
            own parameter; keep_base together with unload.
    """
    layers = _lora_layers("merge_adapter", model)
    if keep_base and unload:
        raise ValueError("merge_adapter: keep_base has no use with unload, which forgets the adapter")
    for name, layer in layers.items():
        if layer.merged:
            raise RuntimeError(f"merge_adapter: {name} is already merged; call unmerge_adapter first")
        layer.check_mergeable(f"merge_adapter: {name}")
        if not layer.merges_finite():
            raise ValueError(f"merge_adapter: the merged weight of {name} would not be finite; nothing was merged")
    tied = _tied(model, layers)
    if tied and not untie:
        pairs = ", ".join(f"{name} with {other}" for name, other in tied.items())
        raise ValueError(f"merge_adapter: tied weights: {pairs}; pass untie=True to give them their own")
    for name in tied:
        _untie(model, layers[name])
    lost: dict[str, float] = {}
    for name, layer in layers.items():
        cost: Any = layer.merge(keep_base)
        if cost is not None:
            lost[name] = cost
        if unload:
            layer.discard_adapter()
    return lost


def unmerge_adapter(model: nn.Module) -> None:
    """Calls ``unmerge`` on every ``LoRALinear`` and ``LoRAEmbedding`` of ``model``. Weights that were untied stay so.

    Raises:
        RuntimeError: a layer is not merged, or is packed and was merged without ``keep_base``; nothing is changed then.
        ValueError: no such layer, or a weight that is not the layer's own parameter; nothing is changed then.
    """
    layers = _lora_layers("unmerge_adapter", model)
    for name, layer in layers.items():
        if not layer.merged:
            raise RuntimeError(f"unmerge_adapter: {name} is not merged")
        layer.check_unmergeable(f"unmerge_adapter: {name}")
        layer.check_mergeable(f"unmerge_adapter: {name}")
    for layer in layers.values():
        layer.unmerge()


def _lora_layers(op: str, model: nn.Module) -> dict[str, LoRALinear | LoRAEmbedding]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (LoRALinear, LoRAEmbedding))}
    if not layers:
        raise ValueError(f"{op}: the model has no LoRALinear layer; a pool (MultiLoRALinear) is never merged")
    return layers


def _tied(model: nn.Module, layers: dict[str, LoRALinear | LoRAEmbedding]) -> dict[str, str]:
    """``{layer: parameter}`` for layers whose weight shares memory with a parameter elsewhere."""
    owners: dict[object, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(_memory(parameter), []).append(name)
    tied = {}
    for name, layer in layers.items():
        others = [o for o in owners[_memory(layer.weight)] if o != (f"{name}.weight" if name else "weight")]
        if others:
            tied[name] = others[0]
    return tied


def _memory(parameter: nn.Parameter) -> object:
    if parameter.is_meta or type(parameter.data) is not Tensor:  # a subclass of others' may have no memory of its own
        return id(parameter)
    return parameter.device, parameter.untyped_storage().data_ptr()


def _untie(model: Any, layer: LoRALinear | LoRAEmbedding) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    config: Any = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    if layer is model.get_output_embeddings() or layer is model.get_input_embeddings():
        config.tie_word_embeddings = False  # transformers would tie them again when it saves or loads
