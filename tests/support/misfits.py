"""Operands that do not fit, for ops called past the package's own checks: nothing is to be read beyond an end."""

from __future__ import annotations

import torch

M, N, K, RANK = 70, 24, 40, 8


def _operands(m, dtype):
    """The ops' tensors by name."""
    return {
        "x": torch.randn(m, K).to(dtype), "weight": torch.randn(N, K).to(dtype), "lora_A": torch.randn(RANK, K),
        "lora_B": torch.randn(N, RANK), "bias": torch.randn(N).to(dtype), "seed": torch.tensor([3]),
        "grad_y": torch.randn(m, N).to(dtype), "s": torch.randn(m, RANK).to(dtype),
    }  # fmt: skip


FORWARD = {
    "x": torch.randn(M, K + 8), "weight": torch.randn(N, K - 8), "lora_A": torch.randn(RANK, K - 8),
    "lora_B": torch.randn(N - 8, RANK), "bias": torch.randn(N - 8), "seed": torch.tensor([3], dtype=torch.int32),
}  # fmt: skip
"""What replaces one operand."""
BACKWARD = FORWARD | {"grad_y": torch.randn(M, N - 8), "s": torch.randn(M, RANK - 1)}
del BACKWARD["bias"]


def elsewhere(arguments, tensor):
    """``arguments`` on the meta device, but for this one of their tensors."""
    return [t.to("meta") if isinstance(t, torch.Tensor) and t is not tensor else t for t in arguments]


def message(name):
    """What the op says, as a pattern: a weight is compared with x."""
    return rf"\b{'x' if name == 'weight' else name} must be"


def lora_linear(name, m, dtype, *, drops=True):
    """Arguments of ``lora_linear`` of which ``name`` does not fit."""
    given = _operands(m, dtype)
    if not drops:
        given["seed"] = None
    given[name] = _misfit(FORWARD[name], m, given[name])
    tensors = [given[key] for key in ("x", "weight", "lora_A", "lora_B", "bias", "seed")]
    return *tensors, 2.0, 0.1 if drops else 0.0


def lora_linear_backward(name, m, dtype):
    """Arguments of its backward of which ``name`` does not fit."""
    given = _operands(m, dtype)
    given[name] = _misfit(BACKWARD[name], m, given[name])
    tensors = [given[key] for key in ("grad_y", "x", "s", "weight", "lora_A", "lora_B", "seed")]
    return *tensors, 2.0, 0.1, True, True, True


def _misfit(t, m, fitting):
    """``t`` with m rows where it has rows, in the dtype of what it replaces unless the dtype is what is wrong."""
    t = t[:m] if t.shape[0] == M else t
    return t.to(fitting.dtype) if t.is_floating_point() else t
