"""lora_kernels: fused kernels for parameter-efficient tuning (LoRA, prompt tuning, P-tuning, prefix tuning)."""

from ._native import build_info
from ._version import __version__
from .adapters import load_adapter, save_adapter
from .dispatch import BACKENDS, Choice, backends, reset_stats, stats, use_backend
from .functional import dora_linear, dropout_mask, frozen_linear, lora_embedding, lora_linear, merge_, unmerge_, why
from .inject import inject
from .integrations.peft import is_fused, patch, patch_peft, unpatch, unpatch_peft
from .merging import merge_adapter, unmerge_adapter
from .modules import FrozenLinear, LoRAEmbedding, LoRALinear
from .ops.lora_embedding import LoRAEmbeddingFunction
from .ops.lora_linear import LoRALinearFunction
from .ops.prefix_kv import PrefixKVFunction
from .ops.prompt_embedding import PromptEmbeddingFunction
from .prefix_functional import prefix_kv
from .prefix_modules import PrefixEncoder
from .prompt_functional import PromptEmbeddingOutput, prompt_embedding
from .prompt_modules import PromptEmbedding, PromptEncoder
from .reasons import Reason
from .report import Report
from .verification import Verification, verify

__all__ = [
    "BACKENDS",
    "Choice",
    "FrozenLinear",
    "LoRAEmbedding",
    "LoRAEmbeddingFunction",
    "LoRALinear",
    "LoRALinearFunction",
    "PrefixEncoder",
    "PrefixKVFunction",
    "PromptEmbedding",
    "PromptEmbeddingFunction",
    "PromptEmbeddingOutput",
    "PromptEncoder",
    "Reason",
    "Report",
    "Verification",
    "__version__",
    "backends",
    "build_info",
    "dora_linear",
    "dropout_mask",
    "frozen_linear",
    "inject",
    "is_fused",
    "load_adapter",
    "lora_embedding",
    "lora_linear",
    "merge_",
    "merge_adapter",
    "patch",
    "patch_peft",
    "prefix_kv",
    "prompt_embedding",
    "reset_stats",
    "save_adapter",
    "stats",
    "unmerge_",
    "unmerge_adapter",
    "unpatch",
    "unpatch_peft",
    "use_backend",
    "verify",
    "why",
]
