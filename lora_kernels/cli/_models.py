"""Loading base models and tokenizers, and telling the user in one line when that fails."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..text import first_sentence
from ._console import CliError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def require(package: str, purpose: str) -> ModuleType:
    """Import ``package`` or say what needs it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise CliError(f"{purpose} needs the package {package}: pip install {package}") from None


def pick_device(name: str) -> torch.device:
    """The device called ``name``; "auto" is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:  # AssertionError: torch was built without CUDA
        raise CliError(f"--device {name}: {first_sentence(error)}") from None
    if device.type == "meta":
        raise CliError(f"--device {name}: it has no memory, so nothing can be computed there")
    return device


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model directory or hub name."""
    transformers = _transformers(name)
    if not Path(name).is_dir():
        print(f"{name} is not a directory here; looking for it on the Hugging Face hub", flush=True)
    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # as many kinds as there are ways in which a file can be wrong
        raise CliError(f"cannot load a tokenizer from {name!r}: {_what_happened(error)}") from None


def load_model(
    name: str, dtype: torch.dtype | str, device: torch.device, *, allow_missing: bool = False,
    in_4_bits: str | None = None,
) -> nn.Module:  # fmt: skip
    """A causal language model from a directory or hub name, ready for inference; dtype "auto" keeps the stored one.

    ``in_4_bits``: bitsandbytes packs the linear layers so ("nf4" or "fp4", double quantised), and they multiply in
    ``dtype``.

    Weights that the model has and the files lack, that the files have and the model lacks, or of another shape, are an
    error: transformers would draw or drop them. With ``allow_missing`` they are only listed.
    """
    transformers = _transformers(name)
    options: dict[str, Any] = {}
    if in_4_bits is not None:
        require("bitsandbytes", "a model that bitsandbytes packs")
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=in_4_bits, bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )  # fmt: skip
        options["device_map"] = {"": device}
    try:
        # Other shapes are to be reported by name, as the rest: transformers' own error has none.
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except Exception as error:  # as many kinds as there are ways in which a config or a file can be wrong
        raise CliError(f"cannot load the model {name!r}: {_what_happened(error)}") from None
    problems = _misfits(found)
    if problems and not allow_missing:
        raise CliError(f"{name} does not hold this model's weights: {problems} (--allow-missing goes on all the same)")
    if problems:
        print(f"note: {name} does not hold this model's weights: {problems}", flush=True)
    return model if getattr(model, "is_quantized", False) else model.to(device)


def _misfits(found: Mapping[str, Any]) -> str:
    """What transformers reports after loading, in a few words; empty if every weight found its place."""
    shapes = [f"{key} is {list(stored)} instead of {list(ours)}" for key, stored, ours in found["mismatched_keys"]]
    parts = []
    for what, names in (
        ("missing", found["missing_keys"]), ("of another shape", shapes), ("unexpected", found["unexpected_keys"]),
    ):  # fmt: skip
        listed = sorted(names)
        if listed:
            more = f" and {len(listed) - 2} more" if len(listed) > 2 else ""
            parts.append(f"{len(listed)} {what} ({', '.join(listed[:2])}{more})")
    return "; ".join(parts)


def linear_names(model: nn.Module) -> list[str]:
    """Last name components of the model's linear layers: what ``--targets`` may list."""
    return sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)})


def _what_happened(error: Exception) -> str:
    """The error's message, with its kind where the message alone says little ("'zzz'")."""
    text = first_sentence(error)
    return text if isinstance(error, (OSError, ValueError, RuntimeError)) else f"{type(error).__name__}: {text}"


def _transformers(name: str) -> ModuleType:
    """The transformers package, set to be quiet; refuses a ``name`` that can only be a mistyped path."""
    path = Path(name)
    hub_name = _HUB_NAME.fullmatch(name) and not path.exists() and not ("/" in name and path.parent.is_dir())
    if not path.is_dir() and not hub_name:
        raise CliError(f"{name} is not a model directory")
    transformers = require("transformers", "loading a model")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if hub_name:
        import huggingface_hub

        huggingface_hub.utils.logging.set_verbosity_error()  # it logs every retry
    return transformers
