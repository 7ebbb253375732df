"""lora_kernels: fused kernels for parameter-efficient tuning (LoRA, prompt tuning, P-tuning, prefix tuning)."""

from ._native import build_info
from ._version import __version__
from .adapters import load_adapter, save_adapter
from .adapters.checkpoints import load_pretrained, save_pretrained
from .adapters.inject import inject
from .adapters.merging import merge_adapter, unmerge_adapter
from .adapters.quantizing import quantize_
from .dispatch import BACKENDS, Choice, backends, reset_stats, stats, use_backend
from .formats import FORMATS, QuantizedWeight
from .frozen_linears import FrozenLinear
from .functional.cross_entropy import linear_cross_entropy
from .functional.dora import dora_linear
from .functional.embedding import lora_embedding
from .functional.gated import gated_activation
from .functional.grouped import grouped_lora_linear
from .functional.lora import dropout_mask, frozen_linear, lora_linear
from .functional.merging import merge_, unmerge_
from .functional.mlp import Projection, lora_mlp
from .functional.multi import multi_lora_linear
from .functional.pack import lora_pack
from .functional.prefix import prefix_kv
from .functional.prompt import PromptEmbeddingOutput, prompt_embedding
from .functional.why import why
from .integrations.experts import register as register_experts
from .integrations.peft.patching import is_fused, patch, patch_peft, unpatch, unpatch_peft
from .integrations.routing import route_adapters
from .modules.embedding import LoRAEmbedding
from .modules.lora import LoRALinear
from .modules.multi import MultiLoRALinear
from .modules.prefix import PrefixEncoder
from .modules.prompt import PromptEmbedding, PromptEncoder
from .modules.quantized import QuantizedLinear
from .ops.gated_activation import GatedActivationFunction
from .ops.grouped_lora_linear import GroupedLoRALinearFunction
from .ops.linear_cross_entropy import LinearCrossEntropyFunction
from .ops.lora_embedding import LoRAEmbeddingFunction
from .ops.lora_linear import LoRALinearFunction
from .ops.lora_mlp import LoRAMLPFunction
from .ops.lora_pack import LoRAPackFunction
from .ops.multi_lora_linear import MultiLoRALinearFunction
from .ops.prefix_kv import PrefixKVFunction
from .ops.prompt_embedding import PromptEmbeddingFunction
from .reasons import Reason
from .report import Report
from .verification import Verification, verify

__all__ = [
    "BACKENDS",
    "FORMATS",
    "Choice",
    "FrozenLinear",
    "GatedActivationFunction",
    "GroupedLoRALinearFunction",
    "LinearCrossEntropyFunction",
    "LoRAEmbedding",
    "LoRAEmbeddingFunction",
    "LoRALinear",
    "LoRALinearFunction",
    "LoRAMLPFunction",
    "LoRAPackFunction",
    "MultiLoRALinear",
    "MultiLoRALinearFunction",
    "PrefixEncoder",
    "PrefixKVFunction",
    "Projection",
    "PromptEmbedding",
    "PromptEmbeddingFunction",
    "PromptEmbeddingOutput",
    "PromptEncoder",
    "QuantizedLinear",
    "QuantizedWeight",
    "Reason",
    "Report",
    "Verification",
    "__version__",
    "backends",
    "build_info",
    "dora_linear",
    "dropout_mask",
    "frozen_linear",
    "gated_activation",
    "grouped_lora_linear",
    "inject",
    "is_fused",
    "linear_cross_entropy",
    "load_adapter",
    "load_pretrained",
    "lora_embedding",
    "lora_linear",
    "lora_mlp",
    "lora_pack",
    "merge_",
    "merge_adapter",
    "multi_lora_linear",
    "patch",
    "patch_peft",
    "prefix_kv",
    "prompt_embedding",
    "quantize_",
    "register_experts",
    "reset_stats",
    "route_adapters",
    "save_adapter",
    "save_pretrained",
    "stats",
    "unmerge_",
    "unmerge_adapter",
    "unpatch",
    "unpatch_peft",
    "use_backend",
    "verify",
    "why",
]
