"""A Llama-type block and a whole small Llama: training step and decoding. Weights are random: no download is needed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import lora_kernels as lk

from . import peers
from .cases import BASELINE, OURS, Case, WrongResult
from .measure import Step

RANK, ALPHA, BATCH, SEQ, NEW_TOKENS = 16, 32, 4, 128, 8
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OURS_AND_FROZEN = f"{OURS}, frozen too"
MAX_ERROR = 1e-3
"""Of a result, relative to its largest element; the models are deep, and their products are made by other libraries."""


def smollm2_config(layers: int = 30, vocabulary: int = 49152) -> Any:
    """The sizes of SmolLM2-135M."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip


def variants(base: nn.Module, dropout: float, *, fp32_adapters: bool = True) -> dict[str, nn.Module]:
    """Frozen, PEFT, addmm (without dropout, adapters of the base's dtype) and fused models, sharing frozen weights.

    One more is fused with ``frozen_linears=True``, where that swaps a layer beside the LoRA layers (the head).
    """
    import peft

    def with_adapter() -> nn.Module:
        shared: dict[int, Any] = {id(t): t for t in [*base.parameters(), *base.buffers()]}
        model = copy.deepcopy(base, shared)
        torch.manual_seed(0)
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=TARGETS)
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=fp32_adapters).train()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.copy_(0.02 * torch.randn(p.shape, generator=generator))
        return model

    base.requires_grad_(False).train()
    models = {"frozen": base, BASELINE: with_adapter(), OURS: with_adapter()}
    report = lk.patch(models[OURS])
    if report.kept:
        raise WrongResult(f"not every layer is fused:\n{report}")
    with_frozen = with_adapter()
    if len(lk.patch(with_frozen, frozen_linears=True).fused) > len(report.fused):
        models[OURS_AND_FROZEN] = with_frozen
    if dropout == 0.0 and (not fp32_adapters or next(base.parameters()).dtype == torch.float32):
        models["addmm"] = with_adapter()
        use_addmm(models["addmm"])
    return models


def use_addmm(model: nn.Module) -> None:
    """Gives every LoRA layer of a PEFT model a forward of ``peers.AddmmLoRA``."""
    import peft

    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            weights = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
            scaling = layer.scaling["default"]
            layer.forward = lambda x, w=weights, s=scaling: peers.AddmmLoRA.apply(x, *w, s)  # type: ignore[method-assign]


def check(models: dict[str, nn.Module], forward: Callable[[nn.Module], Tensor], grad: Tensor) -> None:
    """Outputs and gradients of every adapter parameter are PEFT's; without dropout, whose masks differ.

    Raises:
        WrongResult: they are not.
    """
    reference: list[Tensor] = []
    for name in (BASELINE, *(models.keys() - {BASELINE, "frozen"})):
        model = models[name].eval()
        y = forward(model)
        results = [y, *torch.autograd.grad(y, [p for p in model.parameters() if p.requires_grad], grad)]
        model.train()
        reference = reference or results
        for value, expected in zip(results, reference, strict=True):
            if not (value - expected).abs().max() <= MAX_ERROR * expected.abs().max():
                raise WrongResult(f"{name} does not compute what PEFT does")


def block_cases(device: torch.device, compile_too: bool = True) -> Iterator[Case]:
    """Attention and MLP of one block of SmolLM2-135M, forward and backward."""
    from transformers import LlamaModel

    for dropout in (0.0, 0.1):
        torch.manual_seed(0)
        models = variants(LlamaModel(smollm2_config(layers=1, vocabulary=16)).to(device), dropout)
        x = torch.randn(BATCH, SEQ, 576, device=device, requires_grad=True)
        grad = torch.randn(BATCH, SEQ, 576, device=device)

        def forward(model: nn.Module, x: Tensor = x) -> Tensor:
            return model(inputs_embeds=x, use_cache=False).last_hidden_state

        calls: dict[str, Callable[[], Tensor]] = {name: partial(forward, model) for name, model in models.items()}
        if compile_too:
            for name in (BASELINE, OURS):
                compiled = torch.compile(forward, dynamic=False)
                calls[f"{name} compiled"] = partial(compiled, models[name])
        check(models, forward, grad)
        leaves = [x, *[p for model in models.values() for p in model.parameters() if p.requires_grad]]

        def step(call: Callable[[], Tensor], grad: Tensor = grad, leaves: list[Tensor] = leaves) -> None:
            call().backward(grad)
            for leaf in leaves:
                leaf.grad = None

        constants = [t for model in models.values() for t in [*model.parameters(), *model.buffers()]]
        yield Case(
            "block", f"Llama block of 576, {BATCH}x{SEQ} tokens, r={RANK}, float32, dropout {dropout:g}",
            "forward+backward", {name: partial(step, call) for name, call in calls.items()},
            forwards={name: calls[name] for name in models}, constants=constants,
        )  # fmt: skip


def model_cases(device: torch.device) -> Iterator[Case]:
    """A Llama of SmolLM2-135M's sizes: AdamW steps, and greedy decoding."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    base = LlamaForCausalLM(smollm2_config()).to(device)
    embeddings = base.get_input_embeddings()
    tokens = torch.randint(0, base.config.vocab_size, (BATCH, SEQ), device=device)
    for dropout in (0.0, 0.1):
        models = variants(base, dropout)
        # Backward must run through all layers of the frozen model, too.
        handle = embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
        try:
            forwards = {
                name: lambda m=model: m(input_ids=tokens, labels=tokens, use_cache=False).loss
                for name, model in models.items()
            }
            check(
                models,
                lambda m: m(input_ids=tokens, labels=tokens, use_cache=False).loss,
                torch.ones((), device=device),
            )
            constants = [t for model in models.values() for t in [*model.parameters(), *model.buffers()]]
            steps = {name: training_step(models[name], forward) for name, forward in forwards.items()}
            title = f"Llama of 135M, {BATCH}x{SEQ} tokens, r={RANK}, float32, dropout {dropout:g}"
            yield Case("model", title, "step with AdamW", steps, forwards, constants)
        finally:
            handle.remove()
    yield _decode_case(base, tokens[:1, :8])


def training_step(model: nn.Module, forward: Callable[[], Tensor]) -> Step:
    """Forward, backward and AdamW."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    # A rate of zero: however many steps are timed, all models keep computing the same.
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0) if parameters else None

    def step() -> None:
        forward().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def _decode_case(base: nn.Module, prompt: Tensor) -> Case:
    models = {name: model.eval() for name, model in variants(base, 0.0).items()}

    def generate(model: Any) -> Tensor:
        options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        return model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)

    for name in models.keys() - {"frozen"}:
        if not torch.equal(generate(models[name]), generate(models[BASELINE])):
            raise WrongResult(f"{name} generates other tokens than PEFT")
    steps = {name: lambda m=model: generate(m) for name, model in models.items()}
    return Case("model", f"Llama of 135M, batch 1, {NEW_TOKENS} new tokens, r={RANK}, float32", "generate", steps)
