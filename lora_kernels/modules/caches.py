"""Keys and values as caches of transformers. Importing this module imports transformers."""

from __future__ import annotations

from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

from ..functional.prefix import KeysAndValues


def dynamic_cache(pairs: KeysAndValues) -> DynamicCache:
    """A cache that starts with these keys and values themselves: the first update is the first copy."""
    cache = DynamicCache()
    for keys, values in pairs:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def encoder_decoder_cache(pairs: KeysAndValues) -> EncoderDecoderCache:
    """A cache whose self-attention starts with these, and whose cross-attention is empty."""
    cache = EncoderDecoderCache(dynamic_cache(pairs), DynamicCache())
    cache.is_updated = dict.fromkeys(range(len(pairs)), False)
    return cache
