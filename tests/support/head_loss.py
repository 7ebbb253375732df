"""Problems of ``linear_cross_entropy``, and what torch makes of them with all logits in memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from numerics import assert_as_accurate, max_error

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
OPERANDS = ("x", "weight", "lora_A", "lora_B", "bias")


def make_problem(lead=(37,), columns=61, depth=24, rank=4, bias=True, ignored=0.2, dtype=FP64, adapter_dtype=None):
    """Operands, in ``dtype`` but that they fit into bfloat16, and labels; rank 0: no adapter."""
    t = {
        "x": torch.randn(*lead, depth),
        "weight": torch.randn(columns, depth) / depth**0.5,
        "lora_A": torch.randn(rank, depth) / depth**0.5 if rank else None,
        "lora_B": torch.randn(columns, rank) if rank else None,
        "bias": torch.randn(columns) if bias else None,
    }
    rounded = {name: None if v is None else v.to(BF16).to(dtype) for name, v in t.items()}
    for name in ("lora_A", "lora_B"):
        if rounded[name] is not None:
            rounded[name] = rounded[name].to(adapter_dtype or dtype)
    labels = torch.randint(0, columns, lead)
    labels[torch.rand(lead) < ignored] = -100
    return {**rounded, "labels": labels}


def leaves_of(problem, dtype, adapter_dtype=None):
    """The operands as leaves that require grad, in these dtypes."""
    dtypes = [adapter_dtype or dtype if name.startswith("lora") else dtype for name in OPERANDS]
    return [
        None if problem[name] is None else problem[name].detach().to(d).requires_grad_()
        for name, d in zip(OPERANDS, dtypes)
    ]


def in_memory(
    x, weight, labels, lora_A=None, lora_B=None, bias=None, *, scaling=1.0, softcap=None, logit_scale=None, shift=False,
    **rest,
):  # fmt: skip
    """What ``linear_cross_entropy`` is equivalent to: the adapter is cast to x's dtype, the logits to float32."""
    logits = F.linear(x, weight, bias)
    if lora_A is not None:
        logits = logits + scaling * F.linear(F.linear(x, lora_A.to(x.dtype)), lora_B.to(x.dtype))
    logits = logits if x.dtype == FP64 else logits.float()
    if logit_scale is not None:
        logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if shift:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), **rest)
    return losses.view(labels.shape) if rest.get("reduction") == "none" else losses


def loss_and_gradients(function, problem, dtype, adapter_dtype=None, grad=None, **how):
    """[loss, dx, dweight, dA, dB, dbias], those that there are; ``grad`` is the gradient of the loss."""
    x, weight, lora_A, lora_B, bias = leaves = leaves_of(problem, dtype, adapter_dtype)
    loss = function(x, weight, problem["labels"], lora_A, lora_B, bias, **how)
    grad = torch.ones_like(loss) if grad is None else grad.to(loss.dtype)
    return [loss, *torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None], grad)]


def reversed_sums(problem, grad, how):
    """What ``loss_and_gradients`` of all logits in memory gives in float64 with rows and depth the other way round:
    nothing is more exact, and how far two orders of its sums lie apart is what torch's own rounding is.
    """
    turns = {"x": (0, -1), "weight": (-1,), "lora_A": (-1,), "labels": (0,)}
    turned = {name: v.flip(turns[name]) if name in turns and v is not None else v for name, v in problem.items()}
    if grad is not None and grad.dim() > 0:
        grad = grad.flip(0)
    loss, *gradients = loss_and_gradients(in_memory, turned, FP64, None, grad, **how)
    names = [name for name in OPERANDS if problem[name] is not None]
    return [loss, *(g.flip(turns[name]) if name in turns else g for name, g in zip(names, gradients, strict=True))]


def assert_all_as_accurate(function, problem, dtype, adapter_dtype=None, grad=None, **how):
    """``function``'s loss and gradients, against those of all logits in memory, in ``dtype`` and in float64.

    A sum of losses may come out nearer than its terms: its bound is made of theirs.
    """
    ours = loss_and_gradients(function, problem, dtype, adapter_dtype, grad, **how)
    if dtype == FP64:
        unfused = reversed_sums(problem, grad, how)
    else:
        unfused = loss_and_gradients(in_memory, problem, dtype, None, grad, **how)
    exact = loss_and_gradients(in_memory, problem, FP64, None, grad, **how)
    each = {**how, "reduction": "none"}
    unfused_rows, exact_rows = (in_memory_rows(problem, d, each) for d in (dtype, FP64))
    loss, *ours = ours
    assert loss.dtype == (FP64 if dtype == FP64 else FP32)
    assert loss.shape == exact[0].shape
    allowed = 2 * max_error(unfused_rows, exact_rows) + 4 * torch.finfo(loss.dtype).eps * exact_rows.abs().max().item()
    allowed *= len(exact_rows) if how.get("reduction") == "sum" else 1
    error = max_error(loss, exact[0])
    assert error <= allowed, f"loss: error {error:.3e}, allowed {allowed:.3e}"
    names = [name for name in OPERANDS if problem[name] is not None]
    for name, a, b, c in zip(names, ours, unfused[1:], exact[1:], strict=True):
        assert a.dtype == (adapter_dtype or dtype if name.startswith("lora") else dtype), name
        assert_as_accurate(a, b, c, name)


def in_memory_rows(problem, dtype, how):
    x, weight, lora_A, lora_B, bias = leaves_of(problem, dtype)
    with torch.no_grad():
        losses = in_memory(x, weight, problem["labels"], lora_A, lora_B, bias, **how)
    return losses.flatten()
