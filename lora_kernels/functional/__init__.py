"""The ops as functions: arguments are checked here, then dispatched (``ops/eager.py``)."""

from .cross_entropy import linear_cross_entropy
from .dora import dora_embedding, dora_linear
from .embedding import lora_embedding
from .gated import gated_activation
from .grouped import grouped_lora_linear
from .lora import dropout_mask, frozen_linear, lora_linear
from .merging import merge_, unmerge_
from .mlp import Projection, lora_mlp
from .multi import multi_lora_linear
from .multi_branch import RowOrder, multi_lora_branch_, multi_lora_expand_, multi_lora_shrink, row_order
from .pack import lora_pack
from .prefix import prefix_kv
from .prompt import PromptEmbeddingOutput, prompt_embedding
from .why import why

__all__ = [
    "Projection",
    "PromptEmbeddingOutput",
    "RowOrder",
    "dora_embedding",
    "dora_linear",
    "dropout_mask",
    "frozen_linear",
    "gated_activation",
    "grouped_lora_linear",
    "linear_cross_entropy",
    "lora_embedding",
    "lora_linear",
    "lora_mlp",
    "lora_pack",
    "merge_",
    "multi_lora_branch_",
    "multi_lora_expand_",
    "multi_lora_linear",
    "multi_lora_shrink",
    "prefix_kv",
    "prompt_embedding",
    "row_order",
    "unmerge_",
    "why",
]
