"""``nn.Module``s over the ops."""

from ..frozen_linears import FrozenLinear
from .embedding import LoRAEmbedding
from .lora import LoRALinear
from .prefix import PrefixEncoder
from .prompt import PromptEmbedding, PromptEncoder

__all__ = ["FrozenLinear", "LoRAEmbedding", "LoRALinear", "PrefixEncoder", "PromptEmbedding", "PromptEncoder"]
