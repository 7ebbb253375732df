"""One LoRA layer: frozen linear, stock PEFT, PEFT compiled, addmm, fused, and the peers that are installed.

"frozen_linear" is the frozen layer as lora_kernels computes it: it shows what of a gain is due to another product.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_kernels as lk

from .. import dispatch
from ..support import cpu
from ..verification.launches import is_refusal, served_by
from . import peers
from .cases import BASELINE, OURS, Case, WrongResult
from .measure import Step

SIZES = ((576, 576), (1536, 576), (2048, 2048), (4096, 4096))
"""out_features, in_features: SmolLM2-135M's projections, and those of models with 1 and 7 billion parameters."""
TOKENS = (512, 2048)
RANK, SCALING, CHECKED_ROWS = 16, 2.0, 256
OWN = "LoRALinear"
SWEPT_RANKS, SWEPT_TOKENS = (1, 8, 16, 32, 64, 128, 256), (1, 4, 16, 64, 256, 1024)


def peft_layer(base: nn.Linear, rank: int, dropout: float, adapter_dtype: torch.dtype) -> nn.Module:
    """PEFT's layer around ``base``, fp32 or of base's dtype; every call gives the same adapter, B not zero."""
    import peft

    config = peft.LoraConfig(
        r=rank, lora_alpha=SCALING * rank, lora_dropout=dropout, target_modules=["0"], init_lora_weights=True
    )
    model = peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=adapter_dtype == torch.float32)
    (layer,) = (m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in weights(layer):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return layer


def weights(layer: Any) -> tuple[Tensor, Tensor]:
    """(lora_A, lora_B) of the only adapter of a PEFT layer."""
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def check(layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, float]:
    """Errors of a fused layer against float64, as shares of what is allowed: twice unfused code's error plus 4 ulp.

    Dropout is off, because two implementations draw different masks.

    Raises:
        WrongResult: an output or gradient is further from float64 than that.
    """
    A, B = weights(layer)
    base: Any = layer.base_layer
    weight: Tensor = base.weight

    def unfused(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, A, B)]
        xs, a, b = leaves
        y = F.linear(xs, weight.to(dtype)) + SCALING * F.linear(F.linear(xs, a), b)
        return [y, *torch.autograd.grad(y, leaves, grad.to(dtype))]

    exact, plain = unfused(torch.float64), unfused(x.dtype)
    layer.eval()
    y = layer(x)
    fused = [y, *torch.autograd.grad(y, [x, A, B], grad)]
    layer.train()
    shares = {}
    for name, e, p, f in zip(("y", "x", "lora_A", "lora_B"), exact, plain, fused, strict=True):
        allowed = 2 * (p - e).abs().max() + 4 * torch.finfo(x.dtype).eps * e.abs().max()
        wrong = (f - e).abs().max()
        if not wrong <= allowed:
            raise WrongResult(f"the fused layer is wrong: {name} is off by {wrong:.3g}, allowed are {allowed:.3g}")
        shares[name] = (wrong / allowed).item()
    return shares


def check_peer(name: str, peer: peers.Linear, layer: Any, x: Tensor, grad: Tensor) -> None:
    """A peer's output and gradients are PEFT's, within a hundredth of the largest element, or its eight ulp."""
    eps = torch.finfo(x.dtype).eps
    leaves = [x, *weights(layer)]
    layer.eval()
    y = layer(x)
    expected = [y, *torch.autograd.grad(y, leaves, grad)]
    layer.train()
    y = peer(x[None], layer.base_layer.weight, *weights(layer), SCALING)[0]
    for result, reference in zip([y, *torch.autograd.grad(y, leaves, grad)], expected, strict=True):
        if not (result - reference).abs().max() <= max(1e-2, 8 * eps) * reference.abs().max():
            raise WrongResult(f"{name} does not compute what PEFT does")


def make_case(
    device: torch.device, m: int, n: int, k: int, *, rank: int = RANK, dropout: float = 0.0, what: str,
    dtype: torch.dtype = torch.float32, adapter_dtype: torch.dtype | None = None, compiled: bool = False,
    autocast: bool = False, alternatives: Sequence[str] = (), level: str = "layer",
) -> Case:  # fmt: skip
    """One layer. ``what`` is "forward" (with gradients), "forward+backward", or "decode" (without).

    ``autocast``: to bfloat16. Its cache of casts is off, because a graph would keep what was cast for another.
    ``alternatives``: backends and schedules that the fused layer is timed with, too, where they serve it.
    """
    torch.manual_seed(0)
    adapter_dtype = adapter_dtype or dtype
    base = nn.Linear(k, n, bias=False, device=device, dtype=dtype).requires_grad_(False)
    x = torch.randn(m, k, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(m, n, device=device, dtype=dtype)
    stock, fused = (peft_layer(base, rank, dropout, adapter_dtype) for _ in range(2))
    report = lk.patch(fused)
    if not report.fused:
        raise WrongResult(f"this layer is not fused: {report.kept}")
    rows = m if device.type == "cuda" else min(m, CHECKED_ROWS)  # a GPU's schedule depends on their number
    few = x.detach()[:rows].clone().requires_grad_()
    check(fused, few, grad[:rows])

    calls: dict[str, Callable[[], Tensor]] = {
        "frozen": lambda: base(x), BASELINE: lambda: stock(x), OURS: lambda: fused(x),
        "frozen_linear": lambda: lk.frozen_linear(x, base.weight),
    }  # fmt: skip
    if what == "decode":  # PEFT's class, patched, looks up on every call what may have changed; this layer is its own
        own = lk.LoRALinear.from_peft(stock)
        check_peer(OWN, lambda x, *_: own(x), stock, few, grad[:rows])
        calls[OWN] = lambda: own(x)
    if compiled:
        compiled_layer = torch.compile(stock, dynamic=False)
        calls[f"{BASELINE} compiled"] = lambda: compiled_layer(x)
    if dropout == 0.0 and adapter_dtype == dtype:
        others = {"addmm": peers.AddmmLoRA.apply, **peers.installed(device)}
        for name, peer in others.items():
            check_peer(name, peer, stock, few, grad[:rows])

            def call(peer: peers.Linear = peer) -> Tensor:
                return peer(x[None], base.weight, *weights(stock), SCALING)[0]

            calls[name] = call
    leaves = [x, *weights(stock), *weights(fused)]
    steps = {name: step_of(call, what, grad, leaves) for name, call in calls.items()}
    for backend in alternatives:
        if _is_served(backend, fused, few, grad[:rows]):
            steps[f"{OURS}, {backend}"] = _by(backend, steps[OURS])

    seed = torch.zeros(1, dtype=torch.int64) if dropout else None
    args: tuple[Any, ...] = (x, base.weight, *weights(fused), None, seed, SCALING, dropout)
    spec: Any = dispatch.specs()
    flops, traffic = spec["lora_linear"].flops(*args), spec["lora_linear"].bytes(*args)
    if what == "forward+backward":
        s = x.new_empty(m, rank)
        args = (grad, x, s, base.weight, *weights(fused), seed, SCALING, dropout, True, True, True)
        flops += spec["lora_linear_backward"].flops(*args)
        traffic += spec["lora_linear_backward"].bytes(*args)
    fp32_adapters = adapter_dtype != dtype
    kind = str(dtype).removeprefix("torch.") + ", fp32 adapters" * fp32_adapters
    kind += ", autocast" if autocast else ""

    def within() -> contextlib.AbstractContextManager:
        if autocast:
            return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
        return torch.no_grad() if what == "decode" else contextlib.nullcontext()

    return Case(
        level, f"{k} -> {n}, {m} token{'s' * (m > 1)}, r={rank}, {kind}, dropout {dropout:g}", what, steps,
        forwards={} if what == "decode" else {name: calls[name] for name in ("frozen", BASELINE, OURS)},
        constants=[base.weight, *weights(stock), *weights(fused)], flops=flops, bytes=traffic,
        shape={"m": m, "n": n, "k": k, "rank": rank, "dropout": dropout, "fp32_adapters": fp32_adapters},
        within=within, schedules=_schedules(what, grad, x, base.weight, *weights(fused), dropout),
    )  # fmt: skip


def _is_served(backend: str, layer: nn.Module, x: Tensor, grad: Tensor) -> bool:
    """Whether this backend and schedule serve the layer; what they compute is checked."""
    try:
        with served_by(backend):
            check(layer, x, grad)
    except RuntimeError as error:
        if not is_refusal(error):
            raise
        return False
    return True


def _by(backend: str, step: Step) -> Step:
    def on_backend() -> None:
        with served_by(backend):
            step()

    return on_backend


def _schedules(
    what: str, grad: Tensor, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, dropout: float
) -> Callable[[], dict[str, str]]:
    """What dispatch says of the fused layer's op, and of its backward where that is timed, when it is asked."""
    drops = dropout > 0.0
    seed = torch.zeros(1, dtype=torch.int64, device=x.device)
    s = x.detach().new_empty(x.shape[0], lora_A.shape[0])
    args = (grad, x, s, weight, lora_A, lora_B, seed if drops else None, SCALING, dropout, True, True, True)
    options: dict[str, Any] = {"dropout_p": dropout, "training": drops, "seed": seed}

    def ask() -> dict[str, str]:
        choices = {"forward": lk.why("lora_linear", x, weight, lora_A, lora_B, **options)}
        if what == "forward+backward":
            choices["backward"] = dispatch.choose(dispatch.specs()["lora_linear_backward"], args)
        return {name: f"{c.backend}, {c.schedule}: {c.reason}" for name, c in choices.items()}

    return ask


def step_of(call: Callable[[], Tensor], what: str, grad: Tensor, leaves: list[Tensor]) -> Step:
    """Gradients are dropped, so that every call allocates them as a training step does."""

    def train() -> None:
        call().backward(grad)
        for leaf in leaves:
            leaf.grad = None

    return train if what == "forward+backward" else call


def layer_cases(device: torch.device, compile_peft: bool = True) -> Iterator[Case]:
    """Training shapes in fp32 with and without dropout, and 16-bit ones with and without the CPU's instructions."""
    for what in ("forward", "forward+backward"):
        for dropout in (0.0, 0.1):
            for n, k in SIZES:
                for m in TOKENS:
                    compiled = compile_peft and (n, k, m) == (1536, 576, 512)
                    yield make_case(device, m, n, k, dropout=dropout, what=what, compiled=compiled)
        yield from _low_precision_cases(device, what)
        if device.type == "cpu" and cpu.has_native_matmul(torch.bfloat16):
            with without_onednn():
                for case in _low_precision_cases(device, what, (torch.bfloat16,)):
                    yield replace(case, name=f"{case.name}, oneDNN off")


def _low_precision_cases(
    device: torch.device, what: str, dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
) -> Iterator[Case]:
    for dtype in dtypes:
        for adapters in (dtype, torch.float32):
            yield make_case(device, 512, 576, 576, what=what, dtype=dtype, adapter_dtype=adapters)


@contextlib.contextmanager
def without_onednn() -> Iterator[None]:
    """torch then multiplies in 16 bits as it does on CPUs without instructions for it."""
    mkldnn: Any = torch.backends.mkldnn
    enabled, mkldnn.enabled = mkldnn.enabled, False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = enabled


def decode_cases(device: torch.device) -> Iterator[Case]:
    """One token without gradients; on a CPU the small layers also beside another thread, as a server has."""
    for n, k in SIZES:
        yield make_case(device, 1, n, k, what="decode", level="decode")
    if device.type == "cpu":
        for n, k in SIZES[:2]:
            case = make_case(device, 1, n, k, what="decode", level="decode")
            yield replace(case, name=f"{case.name}, beside another thread", within=_decoding_beside_another_thread)


@contextlib.contextmanager
def _decoding_beside_another_thread() -> Iterator[None]:
    with torch.no_grad(), another_team():
        yield


@contextlib.contextmanager
def another_team() -> Iterator[None]:
    """A second thread that has computed by torch and now waits, with a team of OpenMP of its own.

    libgomp then has the threads of every team sleep soon after a region, and a region takes as long as waking them.
    """
    leave, ready = threading.Event(), threading.Event()

    def compute_once() -> None:
        torch.ones(1 << 20).add_(1)  # more than torch leaves to one thread
        ready.set()
        leave.wait()

    thread = threading.Thread(target=compute_once)
    thread.start()
    ready.wait()
    try:
        yield
    finally:
        leave.set()
        thread.join()


def sweep_cases(device: torch.device) -> Iterator[Case]:
    """One layer over ranks, and over tokens."""
    for rank in SWEPT_RANKS:
        yield make_case(device, 512, 1536, 576, rank=rank, what="forward+backward", level="ranks")
    for m in SWEPT_TOKENS:
        yield make_case(device, m, 1536, 576, what="forward+backward", level="tokens")
