"""Adapters on disk, in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from .config import CONFIG_FILE, WEIGHTS_FILE
from .loading import load_adapter
from .saving import save_adapter

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "load_adapter", "save_adapter"]
