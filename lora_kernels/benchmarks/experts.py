"""The experts of one layer of a mixture, both projections adapted: PEFT's ``target_parameters``, the experts alone, and
fused. All of them by transformers' ``grouped_mm``, or in its place.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_kernels as lk

from .cases import BASELINE, OURS, Case, WrongResult
from .layers import RANK, SCALING, step_of

SIZES = ((32, 256, 128, 4), (64, 512, 256, 8), (128, 512, 256, 8))
"""experts, features, features of an expert, experts per token."""
TOKENS = 512
FROZEN, LOOP = "frozen", "loop over experts"


def experts_cases(device: torch.device) -> Iterator[Case]:
    """Training steps in fp32, and in bf16 for one of the sizes."""
    for sizes in SIZES:
        yield make_case(device, *sizes)
    yield make_case(device, *SIZES[0], dtype=torch.bfloat16)


def make_case(
    device: torch.device, experts: int, hidden: int, intermediate: int, top_k: int, *, tokens: int = TOKENS,
    rank: int = RANK, dtype: torch.dtype = torch.float32,
) -> Case:  # fmt: skip
    """Forward and backward of experts as Qwen3-MoE has them; every token has a random choice of them."""
    torch.manual_seed(0)
    base = _make_experts(experts, hidden, intermediate).to(device, dtype)
    stock, fused = (_adapted(copy.deepcopy(base), rank, dtype) for _ in range(2))
    report = lk.patch(fused)
    if not report.fused:
        raise WrongResult(f"these experts are not fused: {report.kept}")
    x = torch.randn(tokens, hidden, device=device, dtype=dtype, requires_grad=True)
    ids = torch.rand(tokens, experts, device=device).topk(top_k).indices
    weights = torch.rand(tokens, top_k, device=device, dtype=dtype).softmax(-1)
    grad = torch.randn(tokens, hidden, device=device, dtype=dtype)
    _check(stock, fused, x, ids, weights, grad)

    calls = {
        FROZEN: lambda: base(x, ids, weights), BASELINE: lambda: stock(x, ids, weights),
        OURS: lambda: fused(x, ids, weights), LOOP: lambda: _looped(base, _factors(fused), x, ids, weights),
    }  # fmt: skip
    adapters = [p for m in (stock, fused) for p in m.parameters() if p.requires_grad]
    steps = {name: step_of(call, "forward+backward", grad, [x, *adapters]) for name, call in calls.items()}
    return Case(
        "experts", f"{experts} experts of {hidden}x{intermediate}, top {top_k}, {tokens} tokens, "
        f"{str(dtype).removeprefix('torch.')}",
        "forward+backward", steps, forwards={name: calls[name] for name in (FROZEN, BASELINE, OURS)},
        constants=[*base.parameters(), *stock.parameters(), *fused.parameters()],
        shape={"experts": experts, "hidden": hidden, "intermediate": intermediate, "top_k": top_k, "m": tokens,
               "rank": rank},
        schedules=lambda: {"gate_up": "{}, {}: {}".format(*_why(base, _factors(fused), x, ids))},
    )  # fmt: skip


def _make_experts(experts: int, hidden: int, intermediate: int) -> nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(num_experts=experts, hidden_size=hidden, moe_intermediate_size=intermediate)
    config._experts_implementation = "grouped_mm"
    module = Qwen3MoeExperts(config).requires_grad_(False)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return module


def _adapted(experts: nn.Module, rank: int, dtype: torch.dtype) -> nn.Module:
    """PEFT's wrappers around the experts; every call gives the same adapter, B not zero."""
    import peft

    config = peft.LoraConfig(
        r=rank, lora_alpha=SCALING * rank, target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(nn.ModuleDict({"experts": experts}), config, autocast_adapter_dtype=False)
    layer: Any = model.base_model.model["experts"]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if parameter.requires_grad:
                fan_in = parameter.shape[1] if "lora_A" in name else rank
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
    return layer


Factors = dict[str, tuple[Tensor, Tensor]]


def _factors(wrapper: Any) -> Factors:
    """lora_A [experts, rank, in] and lora_B [experts, out, rank] of each projection."""
    found: Factors = {}
    while hasattr(wrapper, "parameter_name"):
        A, B = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
        experts = wrapper.num_experts
        found[wrapper.parameter_name] = A.view(experts, -1, A.shape[1]), B.view(len(B), -1, experts).permute(2, 0, 1)
        wrapper = wrapper.base_layer
    return found


def _looped(base: Any, factors: Factors, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The split form, expert by expert, in plain torch code."""
    y = torch.zeros_like(x)
    for expert in range(base.num_experts):
        tokens, places = torch.where(ids == expert)
        if len(tokens) == 0:
            continue
        h = _split(base.gate_up_proj, *factors["gate_up_proj"], expert, x[tokens])
        gate, up = h.chunk(2, dim=-1)
        h = _split(base.down_proj, *factors["down_proj"], expert, base.act_fn(gate) * up)
        y = y.index_add(0, tokens, h * weights[tokens, places, None])
    return y


def _split(weight: Tensor, lora_A: Tensor, lora_B: Tensor, expert: int, x: Tensor) -> Tensor:
    return F.linear(x, weight[expert]) + SCALING * F.linear(F.linear(x, lora_A[expert]), lora_B[expert])


def _why(base: Any, factors: Factors, x: Tensor, ids: Tensor) -> Any:
    rows = x.detach().repeat_interleave(ids.shape[1], 0)
    offsets = ids.flatten().bincount(minlength=base.num_experts).cumsum(0).int()
    return lk.why("grouped_lora_linear", rows, base.gate_up_proj, *factors["gate_up_proj"], offsets)


def _check(stock: Any, fused: Any, x: Tensor, ids: Tensor, weights: Tensor, grad: Tensor) -> None:
    """Outputs and gradients against the loop in float64: at most four times PEFT's error, which sums in other ways."""

    def results(layer: Any) -> list[Tensor]:
        y = layer(x, ids, weights)
        adapters = [p for p in layer.parameters() if p.requires_grad]
        return [y, *torch.autograd.grad(y, [x, *adapters], grad)]

    exact_layer = copy.deepcopy(stock).double()
    base = exact_layer.base_layer.base_layer
    exact_x = x.detach().double().requires_grad_()
    y = _looped(base, _factors(exact_layer), exact_x, ids, weights.double())
    adapters = [p for p in exact_layer.parameters() if p.requires_grad]
    exact = [y, *torch.autograd.grad(y, [exact_x, *adapters], grad.double())]
    for place, (e, p, f) in enumerate(zip(exact, results(stock), results(fused), strict=True)):
        allowed = 4 * (p - e).abs().max() + 4 * torch.finfo(x.dtype).eps * e.abs().max()
        if not (f - e).abs().max() <= allowed:
            wrong = (f - e).abs().max()
            raise WrongResult(f"the fused experts are wrong: result {place} is off by {wrong:.3g} of {allowed:.3g}")
