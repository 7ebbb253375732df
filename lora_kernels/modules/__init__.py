"""``nn.Module``s over the ops."""

from ..frozen_linears import FrozenLinear
from .embedding import LoRAEmbedding
from .lora import LoRALinear
from .multi import MultiLoRALinear
from .prefix import PrefixEncoder
from .prompt import PromptEmbedding, PromptEncoder
from .quantized import QuantizedLinear

__all__ = [
    "FrozenLinear",
    "LoRAEmbedding",
    "LoRALinear",
    "MultiLoRALinear",
    "PrefixEncoder",
    "PromptEmbedding",
    "PromptEncoder",
    "QuantizedLinear",
]
