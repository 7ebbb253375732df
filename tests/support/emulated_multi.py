"""Runs the emulated CUDA kernels of ``multi_lora_linear`` and compares every adapter's rows with float64 and torch's
calls.
"""

from __future__ import annotations

from typing import NamedTuple

import emulator
import torch
from emulated import (
    ALL,
    DTYPES,
    SCALING,
    SEED,
    assert_gradients,
    expected_backward,
    expected_forward,
    mask,
    operand,
    unfused_forward,
)  # fmt: skip
from numerics import assert_as_accurate
from torch import Tensor

FACTORS = (1.0, 0.5, -1.0, 2.0, 4.0)
"""Of adapters: powers of two, so that a factor of the result is one of lora_B."""


class Problem(NamedTuple):
    """Arguments of the op. What pools hold beyond an adapter's ranks is NaN."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    adapter_ids: Tensor
    ranks: Tensor | None
    scalings: Tensor | None
    bias: Tensor | None

    def rank_of(self, slot: int) -> int:
        return self.lora_A.shape[1] if self.ranks is None else int(self.ranks[slot])

    def rows(self, slot: int) -> Tensor:
        """Of x; of -1, those without an adapter."""
        return (self.adapter_ids == slot).nonzero().flatten()


def problem(ids, ranks, n, k, name, *, most=None, bias=False, float_adapters=False, scalings=True, wide=True):
    """``ranks`` are of the adapters; None: all ranks of the pools, ``most``, of which there are as many as ids have."""
    dtype, count = DTYPES[name], max(*ids, 0) + 1 if ranks is None else len(ranks)
    most, integer = most or max(ranks), torch.int64 if wide else torch.int32
    adapter = torch.float32 if float_adapters else dtype
    lora_A = (torch.randn(count, most, k) / k**0.5).to(adapter)
    lora_B = (torch.randn(count, n, most) / most**0.5).to(adapter)
    for slot, rank in enumerate(ranks or ()):
        lora_A[slot, rank:], lora_B[slot, :, rank:] = torch.nan, torch.nan
    return Problem(
        torch.randn(len(ids), k).to(dtype), (torch.randn(n, k) / k**0.5).to(dtype), lora_A, lora_B,
        torch.tensor(ids, dtype=integer), None if ranks is None else torch.tensor(ranks, dtype=integer),
        torch.tensor([FACTORS[i % 5] for i in range(count)]) if scalings else None,
        torch.randn(n).to(dtype) if bias else None,
    )  # fmt: skip


def steered(sms=1, **options):
    """The emulator's module, with that many SMs and options for what is launched next."""
    native = emulator.load_multi_lora_linear()
    native.set_sms(sms)
    native.set_options({"resident_blocks": 3, **options})
    native.launches()
    return native


def _seed(p):
    return torch.tensor([SEED]) if p > 0 else None


def run_forward(args, *, p=0.0, schedule="auto", **options):
    """(y, s, the launches)."""
    native = steered(**options)
    y, s = torch.ops.lora_kernels_emulated_multi.multi_lora_linear(*args, _seed(p), SCALING, p, schedule)
    return y, s, native.launches()


def run_backward(grad_y, s, args, *, p=0.0, needs=ALL, schedule="auto", **options):
    """([dX, dA, dB], dY B, the launches)."""
    native = steered(**options)
    op = torch.ops.lora_kernels_emulated_multi.multi_lora_linear_backward
    grads = op(grad_y, args.x, s, *args[1:7], _seed(p), SCALING, p, *needs, schedule)
    grad_s = torch.zeros_like(s)
    if len(s) and (needs[0] or needs[1]):
        grad_s = torch.frombuffer(bytearray(native.s()), dtype=s.dtype).view(s.shape)
    return list(grads), grad_s, native.launches()


def names(launches):
    """Of what was launched; every launch found its counters zero."""
    assert all(launch["counters_were_zero"] for launch in launches)
    return [launch["name"] for launch in launches]


def _adapters(args):
    """(number, rank, rows, factor, the adapter with the factor in lora_B) of those that have rows and ranks."""
    for slot in range(len(args.lora_A)):
        rows, rank = args.rows(slot), args.rank_of(slot)
        if len(rows) and rank:
            factor = 1.0 if args.scalings is None else float(args.scalings[slot])
            yield slot, rank, rows, factor, (args.lora_A[slot, :rank], args.lora_B[slot, :, :rank] * factor)


def check_forward(args, *, p=0.0, **options):
    """Runs and compares; s is zero where no adapter writes. Returns what ``run_forward`` does."""
    y, s, launches = run_forward(args, p=p, **options)
    keep, scale = mask(args.x, p)
    covered, of_y, of_s = [], [], []
    left = s.clone()
    for _, rank, rows, _, factors in _adapters(args):
        one = args.x[rows], args.weight, *factors, args.bias
        kept, own_s = None if keep is None else keep[rows], s[rows, :rank]
        expected = expected_forward(one, kept, scale, own_s)
        if names(launches) == ["decode"] and s.dtype == torch.float32:  # the branch is not rounded to tf32
            exact = unfused_forward(*(None if t is None else t.double() for t in one), kept, scale)
            expected = [(*both, None) for both in zip(unfused_forward(*one, kept, scale), exact)]
        of_y.append((y[rows], *expected[0]))
        of_s.append((own_s.flatten(), *(None if t is None else t.flatten() for t in expected[1])))
        covered.append(rows)
        left[rows, :rank] = 0
    assert not left.any()
    none = torch.ones(len(y), dtype=torch.bool)
    none[torch.cat([torch.zeros(0, dtype=torch.int64), *covered])] = False
    assert_base(y[none], args.x[none], args.weight.t(), args.bias)
    for parts, name in ((of_y, "y"), (of_s, "s")):
        if parts:
            ours, unfused, exact, terms = (None if part[0] is None else torch.cat(part) for part in zip(*parts))
            assert_as_accurate(ours, unfused, exact, name, terms)
    return y, s, launches


def assert_base(ours, rows, matrix, bias=None):
    """Rows to which no adapter adds anything."""
    add = 0 if bias is None else bias
    exact = rows.double() @ matrix.double() + (0 if bias is None else bias.double())
    assert_as_accurate(ours, operand(rows) @ operand(matrix) + add, exact, "rows without an adapter")


def saved_s(args, p=0.0):
    """s as a forward has left it; NaN in rows without an adapter, which nobody may read."""
    keep, scale = mask(args.x, p)
    kept = args.x.double() if keep is None else torch.where(keep, args.x.double() * scale, 0.0)
    s = torch.zeros(len(args.x), args.lora_A.shape[1], dtype=torch.float64)
    s[args.adapter_ids < 0] = torch.nan
    for slot, rank, rows, *_ in _adapters(args):
        s[rows, :rank] = kept[rows] @ args.lora_A[slot, :rank].double().t()
    return s.to(args.x.dtype)


def check_backward(args, *, p=0.0, needs=ALL, grad_y=None, **options):
    """Runs and compares each adapter by itself. Returns ([dX, dA, dB], the launches)."""
    x, weight = args[:2]
    s = saved_s(args, p)
    grad_y = torch.randn(len(x), len(weight)).to(x.dtype) if grad_y is None else grad_y
    grads, grad_s, launches = run_backward(grad_y, s, args, p=p, needs=needs, **options)
    keep, scale = mask(x, p)
    none = torch.ones(len(x), dtype=torch.bool)
    left = [None if not need else grad.clone() for grad, need in zip(grads, needs)]
    for slot, rank, rows, factor, factors in _adapters(args):
        one = grad_y[rows], x[rows], s[rows, :rank], weight, *factors
        own_grad_s = grad_s[rows, :rank] * factor
        expected = expected_backward(one, None if keep is None else keep[rows], scale, own_grad_s)
        expected[2] = [None if t is None else t * factor for t in expected[2]]
        ours = [
            grads[0][rows] if needs[0] else grads[0], grads[1][slot, :rank] if needs[1] else grads[1],
            grads[2][slot, :, :rank] if needs[2] else grads[2],
        ]  # fmt: skip
        assert_gradients(ours, own_grad_s, expected, needs)
        none[rows] = False
        if needs[1]:
            left[1][slot, :rank] = 0
        if needs[2]:
            left[2][slot, :, :rank] = 0
    assert not needs[1] or not left[1].any()
    assert not needs[2] or not left[2].any()
    if needs[0]:
        assert_base(grads[0][none], grad_y[none], weight)
    return grads, launches
