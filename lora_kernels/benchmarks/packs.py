"""LoRA layers of one x, as a model's q, k and v or gate and up are: PEFT's, fused one by one, and in one op."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import lora_kernels as lk

from .cases import BASELINE, OURS, Case, WrongResult
from .layers import RANK, SCALING

APART = "fused, one by one"
PACKS = (("q, k, v", 576, (576, 192, 192)), ("gate, up", 576, (1536, 1536)))
"""Of a block of SmolLM2-135M: in_features, and out_features of each."""


def pack_cases(device: torch.device) -> Iterator[Case]:
    """A training step of 512 tokens, and decoding of one."""
    for tokens, what in ((512, "forward+backward"), (1, "decode")):
        for name, k, ns in PACKS:
            yield make_case(device, name, k, ns, tokens, what=what)


def make_case(device: torch.device, name: str, k: int, ns: tuple[int, ...], tokens: int, *, what: str) -> Case:
    """Layers of k in_features and ``ns`` out_features; fp32, without dropout."""
    torch.manual_seed(0)
    stock = _make_layers(k, ns).to(device)
    fused = copy.deepcopy(stock)
    report = lk.patch(fused)
    if report.kept:
        raise WrongResult(f"these layers are not fused: {report.kept}")
    trains = what == "forward+backward"
    x = torch.randn(1, tokens, k, device=device, requires_grad=trains)
    grads = [torch.randn(1, tokens, n, device=device) for n in ns]
    layers = _layers(fused)
    weights = [layer.base_layer.weight for layer in layers]
    lora_As = [layer.lora_A["default"].weight for layer in layers]
    lora_Bs = [layer.lora_B["default"].weight for layer in layers]
    calls: dict[str, Callable[[], Any]] = {
        BASELINE: _each(_layers(stock), x),
        APART: _each(layers, x),
        OURS: lambda: lk.lora_pack(x, weights, lora_As, lora_Bs, scalings=SCALING),
    }
    leaves = [x, *(p for model in (stock, fused) for p in model.parameters() if p.requires_grad)]
    _check(calls, x, grads)

    def step(call: Callable[[], Any]) -> Callable[[], Any]:
        def train() -> None:
            torch.autograd.backward(call(), grads)
            for leaf in leaves:
                leaf.grad = None

        return train if trains else call

    return Case(
        "pack", f"{name}: {tokens} token{'s' * (tokens > 1)}, {k} -> {', '.join(map(str, ns))}, r={RANK}, float32",
        what, {call: step(function) for call, function in calls.items()},
        shape={"m": tokens, "n": sum(ns), "k": k, "rank": RANK},
        within=torch.enable_grad if trains else torch.no_grad,
    )  # fmt: skip


def _make_layers(k: int, ns: tuple[int, ...]) -> Any:
    """PEFT's layers side by side; no B is zero."""
    import peft

    linears = [nn.Linear(k, n, bias=False) for n in ns]
    config = peft.LoraConfig(
        r=RANK, lora_alpha=SCALING * RANK, target_modules=[str(i) for i in range(len(ns))], init_lora_weights=False
    )
    return peft.get_peft_model(nn.Sequential(*linears), config).eval()


def _layers(model: nn.Module) -> list[Any]:
    import peft

    return [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]


def _each(layers: list[Any], x: Tensor) -> Callable[[], list[Tensor]]:
    return lambda: [layer(x) for layer in layers]


def _check(calls: dict[str, Callable[[], Any]], x: Tensor, grads: list[Tensor]) -> None:
    """Every result and the gradient of x are PEFT's, within a thousandth of the largest element."""
    found = {}
    for name, call in calls.items():
        ys = call()
        found[name] = [*ys, *(torch.autograd.grad(ys, x, grads) if x.requires_grad else ())]
    for name, results in found.items():
        for ours, theirs in zip(results, found[BASELINE], strict=True):
            if not (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max():
                raise WrongResult(f"{name}: not what PEFT computes")
