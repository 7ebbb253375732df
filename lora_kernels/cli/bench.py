"""``lora-kernels bench``: one layer, forward and backward: frozen linear, stock PEFT, fused."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_kernels as lk

from . import _arguments as arguments
from ._console import CliError, error, mebibytes, table
from ._measure import MAX_NULL, NOISE, Ratio, interleave, repeats_for, saved_bytes, synchronizer
from ._models import DTYPES, pick_device, require

_SAMPLE_S = 0.05  # a shorter sample would measure the clock's and the scheduler's noise
_GRADIENTS = ("x", "lora_A", "lora_B")


class WrongResult(RuntimeError):
    """The fused layer does not compute what it should."""


def add_parser(commands: Any) -> None:
    """Add the subcommand to the main parser."""
    parser = commands.add_parser(
        "bench",
        help="time one layer: frozen linear, stock PEFT, fused",
        description="Time forward and backward of one LoRA layer against stock PEFT and the frozen linear layer "
        "below both, interleaved in one run. Results are checked against float64 before the clock starts. The null "
        "row is PEFT against itself: what it shows is the noise of the machine.",
    )

    def add(flag: str, **kwargs: Any) -> None:
        kwargs["help"] += " (default: %(default)s)"
        parser.add_argument(flag, **kwargs)

    size = arguments.integer(1)
    add("--m", type=size, default=512, metavar="M", help="tokens")
    add("--n", type=size, default=1536, metavar="N", help="out_features")
    add("--k", type=size, default=576, metavar="K", help="in_features")
    add("--rank", type=size, default=16, metavar="R", help="rank of the update")
    add("--dtype", choices=sorted(DTYPES), default="fp32", help="dtype of x and the frozen weight; the adapter is fp32")
    add("--dropout", type=arguments.probability, default=0.0, metavar="P", help="dropout on the LoRA branch")
    add("--pairs", type=arguments.integer(3), default=15, metavar="N", help="interleaved rounds")
    add("--device", default="auto", help="cpu, cuda, ...; auto is the GPU where there is one")
    parser.add_argument("--threads", type=size, metavar="N", help="CPU threads (default: torch's own choice)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Carry out the command."""
    require("peft", "bench, which compares with stock PEFT,")
    if options.threads:
        torch.set_num_threads(options.threads)
    device, dtype = pick_device(options.device), DTYPES[options.dtype]
    torch.manual_seed(0)
    base = nn.Linear(options.k, options.n, bias=False, device=device, dtype=dtype).requires_grad_(False)
    x = torch.randn(options.m, options.k, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(options.m, options.n, device=device, dtype=dtype)
    peft, again = _peft_layer(base, options), _peft_layer(base, options)
    fused = _peft_layer(base, options)
    report = lk.patch(fused)
    if not report.fused:
        raise CliError(f"this layer is not fused: {report.kept}")

    try:
        errors = check(fused, x, grad)
    except WrongResult as problem:
        error(str(problem))
        return 1
    steps = {name: _step(layer, x, grad) for name, layer in
             (("frozen", base), ("peft", peft), ("fused", fused), ("peft again", again))}  # fmt: skip
    sync = synchronizer(device)
    times = interleave(steps, options.pairs, repeats=repeats_for(steps["peft"], _SAMPLE_S, sync), warmup=2, sync=sync)
    result = {
        **{key: getattr(options, key) for key in ("m", "n", "k", "rank", "dtype", "dropout", "pairs")},
        "device": str(device),
        "threads": torch.get_num_threads(),
        "why": lk.why("lora_linear", x, base.weight, *_weights(fused))._asdict(),
        "errors": errors,
        "seconds": {name: times.median(name) for name in steps},
        "fused / peft": times.ratio("fused", "peft")._asdict(),
        "fused / frozen": times.ratio("fused", "frozen")._asdict(),
        "peft / frozen": times.ratio("peft", "frozen")._asdict(),
        "null (peft / peft)": times.ratio("peft again", "peft")._asdict(),
        "saved_bytes": {
            name: saved_bytes(lambda layer=layer: layer(x), layer.parameters())
            for name, layer in (("frozen", base), ("peft", peft), ("fused", fused))
        },
    }
    print(json.dumps(result, indent=2) if options.json else _render(result))
    return 0


def _peft_layer(base: nn.Linear, options: argparse.Namespace) -> nn.Module:
    """Stock PEFT around ``base``; every call gives the same adapter, with a B that is not zero."""
    import peft

    holder = nn.Sequential()
    holder.add_module("layer", base)
    config = peft.LoraConfig(
        r=options.rank, lora_alpha=2 * options.rank, lora_dropout=options.dropout, target_modules=["layer"]
    )
    model = peft.get_peft_model(holder, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return model


def _weights(model: nn.Module) -> tuple[Tensor, Tensor]:
    """(lora_A, lora_B) of the only adapter."""
    found = dict(model.named_parameters())
    (A,) = [p for name, p in found.items() if "lora_A" in name]
    (B,) = [p for name, p in found.items() if "lora_B" in name]
    return A, B


def _step(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    """One forward and backward; gradients are dropped, so that every call allocates them as a training step does."""
    leaves = [x, *[p for p in layer.parameters() if p.requires_grad]]

    def step() -> None:
        layer(x).backward(grad)
        for leaf in leaves:
            leaf.grad = None

    return step


def check(model: nn.Module, x: Tensor, grad: Tensor) -> dict[str, float]:
    """Errors of the fused layer against float64, relative to those of unfused torch code in the same dtype.

    Dropout is off, because two implementations draw different masks.

    Raises:
        WrongResult: an output or gradient is more than twice as far from float64 as unfused code, plus 4 ulp.
    """
    A, B = _weights(model)
    (layer,) = [m for m in model.modules() if hasattr(m, "base_layer")]
    weight, scaling = layer.base_layer.weight, 2.0

    def unfused(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, A, B)]
        xs, a, b = leaves
        y = F.linear(xs, weight.to(dtype)) + scaling * F.linear(F.linear(xs, a), b)
        return [y, *torch.autograd.grad(y, leaves, grad.to(dtype))]

    exact, plain = unfused(torch.float64), unfused(x.dtype)
    model.eval()
    y = model(x)
    fused = [y, *torch.autograd.grad(y, [x, A, B], grad)]
    model.train()
    ratios = {}
    for name, e, p, f in zip(("y", *_GRADIENTS), exact, plain, fused, strict=True):
        allowed = 2 * (p - e).abs().max() + 4 * torch.finfo(x.dtype).eps * e.abs().max()
        wrong = (f - e).abs().max()
        if not wrong <= allowed:
            raise WrongResult(f"the fused layer is wrong: {name} is off by {wrong:.3g}, allowed are {allowed:.3g}")
        ratios[name] = (wrong / allowed).item()
    return ratios


def _render(result: dict[str, Any]) -> str:
    seconds, saved = result["seconds"], result["saved_bytes"]

    def against(base: str, name: str) -> str:
        if name == base:
            return "1"
        key = "null (peft / peft)" if name == "peft again" else f"{name} / {base}"
        return str(Ratio(**result[key])) if key in result else ""

    rows = [
        (
            name.replace("peft again", "null: peft again"),
            f"{1e3 * seconds[name]:.2f}",
            against("peft", name),
            "" if name == "peft again" else against("frozen", name),
            mebibytes(saved[name]) if name in saved else "",
        )
        for name in seconds
    ]
    why = result["why"]
    worst = max(result["errors"].values())
    quiet = abs(result["null (peft / peft)"]["median"] - 1) <= MAX_NULL
    return (
        "m={m} n={n} k={k} rank={rank} {dtype} dropout={dropout} on {device}, {threads} threads, "
        "{pairs} interleaved rounds\n".format(**result)
        + f"fused runs on {why['backend']} ({why['schedule']}): {why['reason']}\n"
        + f"checked against float64: largest error is {100 * worst:.0f} % of what is allowed\n\n"
        + table(("forward + backward", "ms", "/ peft [quartiles]", "/ frozen [quartiles]", "saved"), rows, right=(1, 4))
        + ("" if quiet else "\n" + NOISE)
    )
