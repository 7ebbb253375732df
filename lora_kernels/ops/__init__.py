"""The ops, one file each. Importing this package registers them with torch."""

from . import dropout_mask, frozen_linear, lora_embedding, lora_linear, prefix_kv, prompt_embedding

__all__ = ["dropout_mask", "frozen_linear", "lora_embedding", "lora_linear", "prefix_kv", "prompt_embedding"]
