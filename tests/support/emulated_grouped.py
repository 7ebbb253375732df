"""Runs the emulated CUDA kernels of ``grouped_lora_linear`` and compares every group with float64 and torch's calls."""

from __future__ import annotations

import emulator
import torch
from emulated import ALL, DTYPES, SCALING, SEED, assert_gradients, expected_backward, expected_forward, mask
from numerics import assert_as_accurate

from lora_kernels.ops.grouped_lora_linear import groups, of_group


def problem(rows, n, k, rank, name, *, behind=0, shared=False, in_columns=False, bias=None, float_adapters=False):
    """(x, weight, lora_A, lora_B, offsets, bias); ``bias`` is None, "one" or "each"."""
    dtype, count = DTYPES[name], len(rows)
    adapter = torch.float32 if float_adapters else dtype
    lead = () if shared else (count,)
    x = torch.randn(sum(rows) + behind, k).to(dtype)
    weight = (torch.randn(*lead, n, k) / k**0.5).to(dtype)
    if in_columns:
        weight = weight.mT.contiguous().mT
    lora_A = (torch.randn(count, rank, k) / k**0.5).to(adapter)
    lora_B = (torch.randn(count, n, rank) / rank**0.5).to(adapter)
    one = None if bias is None else torch.randn(*(() if bias == "one" else (count,)), n).to(dtype)
    return x, weight, lora_A, lora_B, torch.tensor(rows).cumsum(0).int(), one


def steered(sms=1, capability=90, **options):
    """The emulator's module, with that many SMs and options for what is launched next."""
    native = emulator.load_grouped_lora_linear()
    native.set_sms(sms)
    native.set_capability(capability)
    native.set_options({"resident_blocks": 3, **options})
    native.launches()
    return native


def _seed(p):
    return torch.tensor([SEED]) if p > 0 else None


def run_forward(args, *, p=0.0, schedule="one launch", **options):
    """(y, s, the launches)."""
    native = steered(**options)
    op = torch.ops.lora_kernels_emulated_grouped.grouped_lora_linear
    return *op(*args, _seed(p), SCALING, p, schedule), native.launches()


def _parts(results):
    """(torch's, exact, terms) of each group -> of all rows."""
    return [None if part[0] is None else torch.cat(part) for part in zip(*results, strict=True)]


def check_forward(args, *, p=0.0, **options):
    """Runs and compares each group by itself; rows of nobody are zero. Returns what ``run_forward`` does."""
    x, weight, lora_A, lora_B, offsets, bias = args
    y, s, launches = run_forward(args, p=p, **options)
    keep, scale = mask(x, p)
    expected = []
    for g, rows in groups(offsets):
        one = x[rows], of_group(weight, g, 2), lora_A[g], lora_B[g], of_group(bias, g, 1)
        # torch's product of bfloat16 by AMX reads beside strided rows, where there may be NaN.
        one = tuple(None if t is None else t.contiguous() for t in one)
        expected.append(expected_forward(one, None if keep is None else keep[rows], scale, s[rows]))
    behind = slice(int(offsets[-1]), None)
    for ours, name, of_groups in zip((y, s), "ys", zip(*expected, strict=True) if expected else ((), ())):
        assert not ours[behind].any()
        if expected:
            unfused, exact, terms = _parts(of_groups)
            assert_as_accurate(ours[: behind.start], unfused, exact, name, terms)
    return y, s, launches


def saved_s(args, p=0.0):
    """s as a forward has left it; NaN in rows of nobody, which nobody may read."""
    x, _, lora_A, _, offsets, _ = args
    keep, scale = mask(x, p)
    kept = x.double() if keep is None else torch.where(keep, x.double() * scale, 0.0)
    s = torch.full((len(x), lora_A.shape[1]), float("nan"), dtype=torch.float64)
    for g, rows in groups(offsets):
        s[rows] = kept[rows] @ lora_A[g].double().t()
    return s.to(x.dtype)


def run_backward(grad_y, s, args, *, p=0.0, needs=ALL, schedule="one launch", **options):
    """([dX, dA, dB], dY B, the launches)."""
    x, weight, lora_A, lora_B, offsets, _ = args
    native = steered(**options)
    op = torch.ops.lora_kernels_emulated_grouped.grouped_lora_linear_backward
    grads = op(grad_y, x, s, weight, lora_A, lora_B, offsets, _seed(p), SCALING, p, *needs, schedule)
    grad_s = torch.zeros(len(x), lora_A.shape[1], dtype=x.dtype)
    if len(x) and (needs[0] or needs[1]):
        grad_s = torch.frombuffer(bytearray(native.s()), dtype=x.dtype).view(len(x), -1)[:, : lora_A.shape[1]]
    return list(grads), grad_s, native.launches()


def check_backward(args, *, p=0.0, needs=ALL, **options):
    """Runs and compares each group by itself; what has no rows is zero. Returns ([dX, dA, dB], the launches)."""
    x, weight, lora_A, lora_B, offsets, _ = args
    behind = slice(int(offsets[-1]), None)
    grad_y, s = torch.randn(len(x), weight.shape[-2]).to(x.dtype), saved_s(args, p)
    grad_y[behind] = float("nan")
    grads, grad_s, launches = run_backward(grad_y, s, args, p=p, needs=needs, **options)
    keep, scale = mask(x, p)
    empty = set(range(len(offsets)))
    for g, rows in groups(offsets):
        empty.discard(g)
        one = grad_y[rows], x[rows], s[rows], of_group(weight, g, 2), lora_A[g], lora_B[g]
        expected = expected_backward(one, None if keep is None else keep[rows], scale, grad_s[rows])
        ours = [part if not need else part[of] for part, need, of in zip(grads, needs, (rows, g, g))]
        assert_gradients(ours, grad_s[rows], expected, needs)
    for part, need, zero in zip(grads, needs, (behind, sorted(empty), sorted(empty))):
        assert not need or not part[zero].any()
    return grads, launches
