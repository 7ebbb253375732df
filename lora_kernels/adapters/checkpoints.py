"""Models with packed layers as transformers' checkpoints: written for bitsandbytes to load, and read without it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import FORMATS
from ..modules.lora import LoRALinear
from ..modules.quantized import QuantizedLinear
from .files import replacing

_INDEX, _SINGLE, _GENERATION = "model.safetensors.index.json", "model.safetensors", "generation_config.json"
_FOUR_BITS, _EIGHT_BITS = ("nf4", "fp4"), "int8"


def save_pretrained(model: Any, directory: str | Path) -> None:
    """``model.save_pretrained(directory)`` for a transformers model whose layers ``lk.quantize_`` has packed.

    The files have the names and the bytes of bitsandbytes, and the config says so: transformers loads them where
    bitsandbytes is installed, ``lk.load_pretrained`` anywhere. Files in the directory are replaced, all or none.

    Args:
        model: a transformers model with ``QuantizedLinear`` layers of one format: "nf4", "fp4" or "int8".
        directory: made if it is not there.

    Raises:
        TypeError: not a transformers model.
        ValueError: an adapter, no packed layer, several formats, or one that bitsandbytes does not know.
    """
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise TypeError(f"save_pretrained: expected a transformers model, got {type(model).__name__}")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("save_pretrained: the model has adapters; save those with lk.save_adapter, or merge them")
    kinds = {layer.quantized_weight().format for layer in layers.values()}
    if len(kinds) != 1 or not kinds <= {*_FOUR_BITS, _EIGHT_BITS}:
        known = ", ".join((*_FOUR_BITS, _EIGHT_BITS))
        found = ", ".join(sorted(kinds)) or "none"
        raise ValueError(f"save_pretrained: the packed layers must be of one of {known}, got {found}")
    before = getattr(model.config, "quantization_config", None)
    model.config.quantization_config = _config(model, layers, kinds.pop())
    try:
        with replacing(Path(directory)) as staged:
            model.save_pretrained(staged)
    finally:
        if before is None:
            del model.config.quantization_config
        else:
            model.config.quantization_config = before


def _config(model: nn.Module, layers: dict[str, QuantizedLinear], kind: str) -> dict[str, Any]:
    """What transformers' ``BitsAndBytesConfig`` writes."""
    weight = next(iter(layers.values())).quantized_weight()
    plain = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in layers]
    config: dict[str, Any] = {
        "quant_method": "bitsandbytes", "load_in_4bit": kind in _FOUR_BITS, "load_in_8bit": kind == _EIGHT_BITS,
        "llm_int8_skip_modules": plain,
    }  # fmt: skip
    if kind in _FOUR_BITS:
        config |= {
            "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": len(weight.parts) == 6,
            "bnb_4bit_compute_dtype": str(weight.decoded_dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
        }  # fmt: skip
    return config


def load_pretrained(directory: str | Path, *, dtype: torch.dtype = torch.float32, auto_class: Any = None) -> Any:
    """A transformers model from a checkpoint whose linear layers bitsandbytes or ``lk.save_pretrained`` has packed;
    bitsandbytes is not needed.

    Args:
        directory: of the checkpoint, safetensors.
        dtype: of what is not packed, and what packed layers multiply in.
        auto_class: which of transformers' auto classes makes the model; None for ``AutoModelForCausalLM``.

    Returns:
        The model in eval mode, on the CPU, with ``QuantizedLinear`` for every packed layer.

    Raises:
        ValueError: the files are damaged, hold no packed layer, or do not hold this model's weights.
    """
    import transformers

    directory = Path(directory)
    entries = dict(_entries(directory))
    config = transformers.AutoConfig.from_pretrained(directory)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = (auto_class or transformers.AutoModelForCausalLM).from_config(config, dtype=dtype)
    packed = _take_packed(model, entries, dtype)
    if not packed:
        raise ValueError(f"load_pretrained: {directory} holds no packed layer; use transformers to load it")
    missing, unexpected = model.load_state_dict(entries, strict=False)
    model.tie_weights()
    own = {id(tensor) for name, tensor in model.state_dict(keep_vars=True).items() if name in entries}
    absent = [
        name for name in missing
        if name.rpartition(".")[0] not in packed and id(model.get_parameter(name)) not in own
    ]  # fmt: skip
    if absent or unexpected:
        what = ", ".join([*absent, *unexpected][:4])
        raise ValueError(f"load_pretrained: {directory} does not hold this model's weights: {what}")
    if (directory / _GENERATION).is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    return model.eval()


def _take_packed(model: nn.Module, entries: dict[str, Tensor], dtype: torch.dtype) -> set[str]:
    """Packs the layers of which ``entries`` has packed weights, and takes those out. Their names."""
    packed = set()
    modules = dict(model.named_modules())
    for name, layer in modules.items():
        if not isinstance(layer, nn.Linear):
            continue
        beginnings = tuple(f"{name}.{entry}" for fmt in FORMATS.values() for entry in fmt.entries)
        own = {key[len(name) + 1 :]: value for key, value in entries.items() if key.startswith(beginnings)}
        found = (fmt.unpack(own, dtype) for fmt in FORMATS.values())
        weight = next((weight for weight in found if weight is not None), None)
        if weight is None:
            continue
        if weight.shape != (layer.out_features, layer.in_features):
            raise ValueError(
                f"load_pretrained: {name} is {weight.shape} in the files, {tuple(layer.weight.shape)} here"
            )
        swapped: Any = layer.requires_grad_(False)
        swapped.__class__ = QuantizedLinear
        swapped.keep(weight)
        for key in own:
            del entries[f"{name}.{key}"]
        packed.add(name)
    return packed


def _entries(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of all the files of a checkpoint."""
    from safetensors import SafetensorError, safe_open  # only who has files needs the package

    names = [_SINGLE]
    try:
        if (directory / _INDEX).is_file():
            names = sorted(set(json.loads((directory / _INDEX).read_text())["weight_map"].values()))
        for name in names:
            with safe_open(directory / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  it is no mapping
                    yield key, file.get_tensor(key)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"load_pretrained: {directory} cannot be read: {error}") from error
