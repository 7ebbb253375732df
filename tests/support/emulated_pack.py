"""Runs the emulated CUDA kernels of ``lora_pack`` and compares every member with float64 and torch's calls."""

from __future__ import annotations

import emulator
import torch
from emulated import DTYPES, SCALING, SEED, assert_gradients, expected_backward, expected_forward
from numerics import assert_as_accurate

from lora_kernels import philox
from lora_kernels.ops.lora_pack import parts_of


def problem(m, k, ns, ranks, name, *, bias=False, float_adapters=False):
    """(x, weights, lora_As, lora_Bs, biases); every other member has a bias, if any has."""
    dtype = DTYPES[name]
    adapter = torch.float32 if float_adapters else dtype
    x = torch.randn(m, k).to(dtype)
    weights = [(torch.randn(n, k) / k**0.5).to(dtype) for n in ns]
    lora_As = [(torch.randn(r, k) / k**0.5).to(adapter) for r in ranks]
    lora_Bs = [(torch.randn(n, r) / max(r, 1) ** 0.5).to(adapter) for n, r in zip(ns, ranks)]
    biases = [torch.randn(n if i % 2 == 0 else 0).to(dtype) for i, n in enumerate(ns)] if bias else []
    return x, weights, lora_As, lora_Bs, biases


def steered(sms=1, **options):
    """The emulator's module, with that many SMs and options for what is launched next."""
    native = emulator.load_lora_pack()
    native.set_sms(sms)
    native.set_options({"resident_blocks": 3, **options})
    native.launches()
    native.tile_rows()
    return native


def numbers(args, p):
    """(seed, scalings, dropout_p)."""
    count = len(args[1])
    return torch.tensor([SEED]) if p > 0 else None, [SCALING] * count, [p] * count


def mask_of(x, member, p):
    """(keep or None, scale) of a member."""
    seed = philox.member_seed(torch.tensor([SEED]), member)
    return philox.keep_mask(seed, *x.shape, p) if p > 0 else None, philox.keep_scale(p)


def run_forward(args, *, p=0.0, **options):
    """(ys, each s, the launches)."""
    native = steered(**options)
    ys, s = torch.ops.lora_kernels_emulated_pack.lora_pack(*args, *numbers(args, p), "one launch")
    return ys, parts_of(s, args[0], args[2]), native.launches()


def check_forward(args, *, p=0.0, **options):
    """Runs and compares each member by itself. Returns what ``run_forward`` does."""
    x, weights, lora_As, lora_Bs, biases = args
    ys, ss, launches = run_forward(args, p=p, **options)
    for i, (y, s) in enumerate(zip(ys, ss, strict=True)):
        bias = biases[i] if biases and biases[i].numel() else None
        one = x, weights[i], lora_As[i], lora_Bs[i], bias
        expected = expected_forward(one, *mask_of(x, i, p), s)
        for ours, (unfused, exact, terms), name in zip((y, s), expected, "ys"):
            assert_as_accurate(ours, unfused, exact, f"{name} of member {i}", terms)
    return ys, ss, launches


def saved_s(args, p=0.0):
    """Each s as a forward has left it."""
    x, _, lora_As, *_ = args
    parts = []
    for i, lora_A in enumerate(lora_As):
        keep, scale = mask_of(x, i, p)
        kept = x.double() if keep is None else torch.where(keep, x.double() * scale, 0.0)
        parts.append((kept @ lora_A.double().t()).to(x.dtype))
    return parts


def run_backward(grad_ys, ss, args, *, p=0.0, need_x=True, need_A=None, need_B=None, **options):
    """((dX, each dA, each dB), each dY B, the launches)."""
    x, weights, lora_As, lora_Bs, _ = args
    every = [True] * len(weights)
    native = steered(**options)
    flat = torch.cat([s.flatten() for s in ss])
    needs = need_x, every if need_A is None else need_A, every if need_B is None else need_B
    op = torch.ops.lora_kernels_emulated_pack.lora_pack_backward
    grads = op(grad_ys, x, flat, weights, lora_As, lora_Bs, *numbers(args, p), *needs, "one launch")
    launches = native.launches()
    if not launches or launches[0]["schedule"] != "pack":
        return grads, None, launches
    held = bytearray(native.s())  # nothing of members without adapters
    grad_s = torch.frombuffer(held, dtype=x.dtype) if held else flat
    return grads, parts_of(grad_s, x, lora_As), launches


def check_backward(args, *, p=0.0, **options):
    """Runs and compares: each dA and dB, and dX with the sum of members'. Returns (the gradients, the launches)."""
    x, weights, lora_As, lora_Bs, _ = args
    grad_ys, ss = [torch.randn(len(x), len(w)).to(x.dtype) for w in weights], saved_s(args, p)
    grads, grad_ss, launches = run_backward(grad_ys, ss, args, p=p, **options)
    of_x = []
    for i, (grad_A, grad_B) in enumerate(zip(*grads[1:], strict=True)):
        one = grad_ys[i], x, ss[i], weights[i], lora_As[i], lora_Bs[i]
        expected = expected_backward(one, *mask_of(x, i, p), grad_ss[i])
        of_x.append(expected[0])
        nothing = (x[:0], None, None), *expected[1:]
        assert_gradients([x[:0], grad_A, grad_B], grad_ss[i], nothing, (False, True, True))
    unfused, exact, terms = (None if part[0] is None else sum(part) for part in zip(*of_x, strict=True))
    assert_as_accurate(grads[0], unfused, exact, "dX", terms)
    return grads, launches
