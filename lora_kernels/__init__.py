"""lora_kernels: fused kernels for parameter-efficient tuning (LoRA, prompt tuning, P-tuning, prefix tuning)."""

from ._native import build_info
from ._version import __version__
from .dispatch import BACKENDS, Choice, backends, reset_stats, stats, use_backend
from .functional import dropout_mask, frozen_linear, lora_linear, merge_, unmerge_, why
from .ops.lora_linear import LoRALinearFunction
from .reasons import Reason

__all__ = [
    "BACKENDS",
    "Choice",
    "LoRALinearFunction",
    "Reason",
    "__version__",
    "backends",
    "build_info",
    "dropout_mask",
    "frozen_linear",
    "lora_linear",
    "merge_",
    "reset_stats",
    "stats",
    "unmerge_",
    "use_backend",
    "why",
]
