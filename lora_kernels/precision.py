"""How torch is told to multiply."""

from __future__ import annotations

import torch


def float32_products(dtype: torch.dtype) -> str | None:
    """How products of float32 are formed on a GPU: "tf32" or "ieee"; None for other dtypes."""
    if dtype != torch.float32:
        return None
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
