"""PEFT: which layers, prompts and calls are served, and by what. Nothing here imports PEFT before it is needed."""

from .patching import is_fused, patch, patch_peft, unpatch, unpatch_peft

__all__ = ["is_fused", "patch", "patch_peft", "unpatch", "unpatch_peft"]
