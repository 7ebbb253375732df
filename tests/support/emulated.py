"""Runs the emulated CUDA kernels on tensors and compares them with float64 and with torch's separate calls."""

from __future__ import annotations

import emulator
import torch
from numerics import assert_as_accurate

from lora_kernels import philox

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}
SEED = -987654321012345
SCALING = 1.7


def matrices(m, n, k, rank, name, *, bias=False, float_adapters=False):
    """(x, weight, lora_A, lora_B, bias) with entries of the order of 1 in every product; ``name`` may be a dtype."""
    dtype = DTYPES.get(name, name)
    adapter = torch.float32 if float_adapters else dtype
    x = torch.randn(m, k).to(dtype)
    weight = (torch.randn(n, k) / k**0.5).to(dtype)
    lora_A = (torch.randn(rank, k) / k**0.5).to(adapter)
    lora_B = (torch.randn(n, rank) / rank**0.5).to(adapter)  # the branch must not drown the base product
    return x, weight, lora_A, lora_B, torch.randn(n).to(dtype) if bias else None


def operand(t):
    """As a factor of the unfused code's products: float32 is rounded to tf32, to nearest and ties away from zero."""
    return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) if t.dtype == torch.float32 else t


def mask(x, p):
    """(keep or None, scale) of dropout with SEED."""
    keep = philox.keep_mask(torch.tensor([SEED]), *x.shape, p) if p > 0 else None
    return keep, philox.keep_scale(p)


def _dropped(x, keep, scale):
    return x if keep is None else torch.where(keep, x * scale, torch.zeros((), dtype=x.dtype))


def steered(sms=1, **options):
    """The emulator's module, with that many SMs and options for what is launched next."""
    native = emulator.load_lora_linear()
    native.set_sms(sms)
    native.set_options({"resident_blocks": 3, **options})
    native.launches()  # what is asked next are those to come
    return native


def _seed(p):
    return torch.tensor([SEED]) if p > 0 else None


# ---------------------------------------------------------------------------------------------------- forward


def run_forward(*args, **options):
    """(y, s, schedule, the emulator's reports); ``schedule`` is asked for, the one that was taken is told."""
    y, s, launches = _run_forward(*args, **options)
    return y, s, _taken(launches), [launch["report"] for launch in launches]


def _taken(launches):
    return "cublas" if launches[-1]["schedule"] == "expand" else launches[-1]["schedule"]


def _run_forward(x, weight, lora_A, lora_B, bias, *, p=0.0, schedule="one launch", **options):
    """(y, s, the launches)."""
    native = steered(**options)
    y, s = torch.ops.lora_kernels_emulated.lora_linear(x, weight, lora_A, lora_B, bias, _seed(p), SCALING, p, schedule)
    return y, s, native.launches()


def unfused_forward(x, weight, lora_A, lora_B, bias, keep, scale):
    """(y, s) by separate torch calls, in the dtype of x; float32 as on a GPU where torch may take tf32."""
    s = operand(_dropped(x, keep, scale)) @ operand(lora_A.to(x.dtype)).t()
    base = torch.nn.functional.linear(operand(x), operand(weight), bias)
    return base + (operand(s) @ operand(lora_B.to(x.dtype)).t()) * SCALING, s


def rounded_forward(x, weight, lora_A, lora_B, bias, keep, scale, s, dtype):
    """(y, s) from the factors that tensor cores take in tf32, in ``dtype``; y from the kernel's own ``s``.

    In float64 this is what the kernel computes but for the rounding of its sums, in float32 what torch makes of that.
    Against the product of unrounded factors, our draw of the roundings would be compared with torch's: lost bits of a
    factor hide in that, and of a few elements the worse draw may be ours.
    """
    x, weight, lora_A, lora_B, s = (operand(t).to(dtype) for t in (x, weight, lora_A, lora_B, s))
    base = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(dtype))
    return base + s @ lora_B.t() * SCALING, _dropped(x, keep, 1.0) @ lora_A.t() * scale


def expected_forward(args, keep, scale, s, from_own_s=True):
    """((torch's, exact, terms) of y, the same of s), for ``assert_as_accurate``; ``s`` is the kernel's.

    ``from_own_s``: in tf32, y is compared with what follows from that.
    """
    exact_y, exact_s = unfused_forward(*(None if t is None else t.double() for t in args), keep, scale)
    torch_y, torch_s = unfused_forward(*args, keep, scale)
    y_terms = s_terms = None
    if s.dtype == torch.float32:
        rounded_y, torch_s = rounded_forward(*args, keep, scale, s, torch.float32)
        rounded_exact_y, exact_s = rounded_forward(*args, keep, scale, s, torch.float64)
        magnitudes = (None if t is None else t.abs() for t in args)
        y_terms, s_terms = rounded_forward(*magnitudes, keep, scale, s.abs(), torch.float64)
        if from_own_s:
            torch_y, exact_y = rounded_y, rounded_exact_y
    return (torch_y, exact_y, y_terms), (torch_s, exact_s, s_terms)


def check_forward(args, *, p=0.0, **options):
    """Runs and compares; returns what ``run_forward`` does."""
    y, s, launches = _run_forward(*args, p=p, **options)
    # Split, these round the s of each part of the depth; only then they have counters.
    is_split = launches[0]["schedule"] in ("decode", "dual") and launches[0]["counters"] != 0
    of_y, of_s = expected_forward(args, *mask(args[0], p), s, not is_split)
    for ours, (unfused, exact, terms), name in ((s, of_s, "s"), (y, of_y, "y")):
        assert_as_accurate(ours, unfused, exact, name, terms)
    return y, s, _taken(launches), [launch["report"] for launch in launches]


# --------------------------------------------------------------------------------------------------- backward

ALL = (True, True, True)


def grad_y_of(x, weight):
    return torch.randn(x.shape[0], weight.shape[0]).to(x.dtype)


def saved_s(x, lora_A, p=0.0):
    """s as a forward has left it."""
    return (_dropped(x.double(), *mask(x, p)) @ lora_A.double().t()).to(x.dtype)


def run_backward(grad_y, x, s, weight, lora_A, lora_B, **options):
    """([dX, dA, dB], reports of the launches); a gradient that is not needed is empty."""
    grads, _, reports = _run_backward(grad_y, x, s, weight, lora_A, lora_B, **options)
    return grads, reports


def _run_backward(grad_y, x, s, weight, lora_A, lora_B, *, p=0.0, needs=ALL, schedule="one launch", **options):
    """The same with the first launch's dY B in between."""
    native = steered(**options)
    operands = (grad_y, x, s, weight, lora_A, lora_B)
    grads = torch.ops.lora_kernels_emulated.lora_linear_backward(*operands, _seed(p), SCALING, p, *needs, schedule)
    grad_s = torch.frombuffer(bytearray(native.grad_s()), dtype=x.dtype).view(s.shape)
    return list(grads), grad_s, [launch["report"] for launch in native.launches()]


def unfused_backward(grad_y, x, s, weight, lora_A, lora_B, keep, scale):
    """[dX, dA, dB] by separate torch calls, in the dtype of x; float32 as on a GPU where torch may take tf32."""
    gy = operand(grad_y)
    grad_s = gy @ operand(lora_B.to(x.dtype)) * SCALING
    grad_x = gy @ operand(weight) + _dropped(operand(grad_s) @ operand(lora_A.to(x.dtype)), keep, scale)
    return [grad_x, operand(grad_s).t() @ operand(_dropped(x, keep, scale)), gy.t() @ operand(s) * SCALING]


def rounded_backward(grad_y, x, s, weight, lora_A, lora_B, keep, scale, grad_s, dtype):
    """[dX, dA, dB, dY B] as ``rounded_forward``; dX and dA from the kernel's own ``grad_s`` = dY B."""
    grad_y, x, s, weight, lora_A, lora_B, grad_s = (
        operand(t).to(dtype) for t in (grad_y, x, s, weight, lora_A, lora_B, grad_s)
    )
    grad_x = grad_y @ weight + _dropped(grad_s @ lora_A, keep, scale) * SCALING
    grad_A = grad_s.t() @ _dropped(x, keep, 1.0) * (SCALING * scale)
    return [grad_x, grad_A, grad_y.t() @ s * SCALING, grad_y @ lora_B]


def expected_backward(args, keep, scale, grad_s):
    """(torch's, exact, terms) of dX, dA, dB and, in tf32, dY B, of which ``grad_s`` is the kernel's."""
    if grad_s.dtype != torch.float32:
        exact = unfused_backward(*(t.double() for t in args), keep, scale)
        return [(*both, None) for both in zip(unfused_backward(*args, keep, scale), exact, strict=True)]
    both = (rounded_backward(*args, keep, scale, grad_s, dtype) for dtype in (torch.float32, torch.float64))
    magnitudes = (t.abs() for t in args)
    terms = rounded_backward(*magnitudes, keep, scale, grad_s.abs(), torch.float64)
    return list(zip(*both, terms, strict=True))


def check_backward(args, *, p=0.0, needs=ALL, **options):
    """Runs and compares; ``args`` are (grad_y, x, s, weight, lora_A, lora_B)."""
    grads, grad_s, reports = _run_backward(*args, p=p, needs=needs, **options)
    assert_gradients(grads, grad_s, expected_backward(args, *mask(args[1], p), grad_s), needs)
    return grads, reports


def assert_gradients(grads, grad_s, expected, needs):
    """dX, dA and dB, and what they were made of, are as accurate as torch's, or absent."""
    if len(expected) > len(grads) and (needs[0] or needs[1]):
        assert_as_accurate(grad_s, *expected[3][:2], "dY B", expected[3][2])
    for ours, (unfused, exact, terms), need, name in zip(grads, expected, needs, ("dX", "dA", "dB")):
        if need:
            assert_as_accurate(ours, unfused, exact, name, terms)
        else:
            assert ours.numel() == 0
