"""Eight adapters over the linear layers of SmolLM2, one per sample: PEFT's ``adapter_names``, one adapter for all, and
fused. In training PEFT, too, has one adapter for all samples, for it serves no other batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import lora_kernels as lk

from .cases import BASELINE, OURS, Case, WrongResult
from .layers import RANK, SCALING

SIZES = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
"""out_features, in_features of the linear layers of a block."""
BLOCKS, SAMPLES = 4, 8
NAMES = [f"adapter{sample}" for sample in range(SAMPLES)]
ONE = "fused, one adapter"


def adapters_cases(device: torch.device) -> Iterator[Case]:
    """A token and a text of each sample, and a training step."""
    for tokens, what in ((1, "decode"), (16, "decode"), (128, "decode"), (128, "forward+backward")):
        yield make_case(device, tokens, what=what)


def make_case(device: torch.device, tokens: int, *, what: str, blocks: int = BLOCKS) -> Case:
    """All linear layers of some blocks, called one after the other; fp32."""
    torch.manual_seed(0)
    stock = _make_model(blocks).to(device)
    fused = copy.deepcopy(stock)
    report = lk.patch(fused)
    if report.kept:
        raise WrongResult(f"these layers are not fused: {report.kept}")
    trains = what == "forward+backward"
    single = copy.deepcopy(fused)
    if trains:
        fused.base_model.set_adapter(NAMES)
    inputs = {k: torch.randn(SAMPLES, tokens, k, device=device, requires_grad=trains) for _, k in SIZES}
    grads = {n: torch.randn(SAMPLES, tokens, n, device=device) for n, _ in SIZES}
    _check(stock, fused, inputs)

    def step(model: nn.Module, routed: bool) -> Callable[[], Any]:
        layers = _layers(model)
        names = {"adapter_names": NAMES} if routed else {}
        leaves = [*inputs.values(), *(p for p in model.parameters() if p.requires_grad)]

        def decode() -> None:
            for layer in layers:
                layer(inputs[layer.in_features], **names)

        def train() -> None:
            for layer in layers:
                layer(inputs[layer.in_features], **names).backward(grads[layer.out_features])
            for leaf in leaves:
                leaf.grad = None

        return train if trains else decode

    return Case(
        "adapters", f"{SAMPLES} samples of {tokens} token{'s' * (tokens > 1)}, {SAMPLES} adapters, r={RANK}, float32",
        what,
        {BASELINE: step(stock, routed=not trains), ONE: step(single, routed=False), OURS: step(fused, routed=True)},
        shape={"samples": SAMPLES, "tokens": tokens, "rank": RANK},
        within=torch.enable_grad if trains else torch.no_grad,
    )  # fmt: skip


def _make_model(blocks: int) -> Any:
    """The layers in a row, with PEFT's adapters; no B is zero."""
    import peft

    linears = [nn.Linear(k, n, bias=False) for _ in range(blocks) for n, k in SIZES]
    config = peft.LoraConfig(
        r=RANK, lora_alpha=SCALING * RANK, target_modules=[str(i) for i in range(len(linears))], init_lora_weights=False
    )
    model = peft.get_peft_model(nn.Sequential(*linears), config, adapter_name=NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, config)
    return model.eval()


def _layers(model: nn.Module) -> list[Any]:
    import peft

    return [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]


def _check(stock: nn.Module, fused: nn.Module, inputs: dict[int, Tensor]) -> None:
    """One layer of each size gives what PEFT's gives, within a thousandth of the largest element."""
    for theirs, ours in zip(_layers(stock)[: len(SIZES)], _layers(fused)):
        x = inputs[theirs.in_features].detach()
        with torch.no_grad():
            expected, found = theirs(x, adapter_names=NAMES), ours(x, adapter_names=NAMES)
        if not (found - expected).abs().max() <= 1e-3 * expected.abs().max():
            raise WrongResult(f"the fused layer {ours.in_features} -> {ours.out_features} does not compute PEFT's")
