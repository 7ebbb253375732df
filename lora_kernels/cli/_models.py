"""Loading base models and tokenizers, and telling the user in one line when that fails."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ._console import CliError, one_line

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
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA answers with an AssertionError
        raise CliError(f"--device {name}: {first_sentence(error)}") from None
    return device


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model directory or hub name."""
    transformers = _transformers(name)
    if not Path(name).is_dir():
        print(f"{name} is not a directory here; looking for it on the Hugging Face hub", flush=True)
    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise CliError(f"cannot load a tokenizer from {name!r}: {first_sentence(error)}") from None


def load_model(name: str, dtype: torch.dtype | str, device: torch.device) -> nn.Module:
    """A causal language model from a directory or hub name, ready for inference; dtype "auto" keeps the stored one."""
    transformers = _transformers(name)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, SafetensorError) as error:
        raise CliError(f"cannot load the model {name!r}: {first_sentence(error)}") from None
    return model.to(device)


def linear_names(model: nn.Module) -> list[str]:
    """Last name components of the model's linear layers: what ``--targets`` may list."""
    return sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)})


def first_sentence(error: BaseException) -> str:
    """The first line of an error message, which is what fits a terminal."""
    lines = str(error).strip().splitlines()
    return one_line(lines[0]) if lines else type(error).__name__


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
