"""What a prompt or a prefix costs beside its model, forward and backward: PEFT and patched.

The model below PEFT returns its embeddings, so that only what PEFT and lora_kernels do is timed, their Python included:
embedding the tokens, making the prompt, putting it in front, mask and labels. For prefixes it is ``get_prompt``, which
returns the cache, and the gradients that come back are parts of longer tensors, as concatenation with a text's keys and
values leaves them. Before the clock starts, embeddings, keys, values and gradients must equal PEFT's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LlamaConfig, PreTrainedModel

import lora_kernels as lk

from .cases import BASELINE, OURS, Case, WrongResult

BATCH, TOKENS, VOCABULARY = 8, 512, 49152
SHAPES = {576: (30, 9, 3), 2048: (16, 32, 8)}
"""Hidden size to layers, heads, heads of keys and values: SmolLM2-135M and Llama-3.2-1B."""
ENCODER = "PEFT's encoder alone"
"""What P-tuning would take if everything around PEFT's network cost nothing."""
METHODS = ("prompt", "mlp", "lstm", "multitask", "prefix", "projected prefix")


class Embeddings(PreTrainedModel, GenerationMixin):
    """A causal language model without the model."""

    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)

    def forward(self, inputs_embeds: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """The input."""
        return inputs_embeds

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """PEFT asks for it to be there."""
        raise NotImplementedError


def make_model(method: str, hidden: int, rows: int, device: torch.device) -> peft.PeftModel:
    """A stock PEFT model."""
    layers, heads, kv_heads = SHAPES[hidden]
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=hidden,
    )  # fmt: skip
    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": rows}
    encoder = {"encoder_hidden_size": hidden}
    prompt: peft.PeftConfig
    if method == "prompt":
        prompt = peft.PromptTuningConfig(**common)
    elif method == "multitask":
        prompt = peft.MultitaskPromptTuningConfig(**common, num_tasks=4)
    elif method in ("mlp", "lstm"):
        prompt = peft.PromptEncoderConfig(**common, **encoder, encoder_reparameterization_type=method.upper())
    else:
        prompt = peft.PrefixTuningConfig(**common, **encoder, prefix_projection=method != "prefix")
    return peft.get_peft_model(Embeddings(config), prompt).to(device)


def make_step(model: peft.PeftModel, method: str, hidden: int, rows: int) -> Callable[[], list[Tensor]]:
    """Forward and backward; returns the outputs, leaves the gradients in the parameters."""
    generator, device = torch.Generator().manual_seed(0), next(model.parameters()).device
    parameters = [p for p in model.parameters() if p.requires_grad]
    if "prefix" in method:
        layers, _, heads = SHAPES[hidden]
        longer = torch.randn(2 * layers, BATCH, heads, rows + 8, 64, generator=generator).to(device)
        grads = longer[:, :, :, :rows].unbind(0)

        def outputs() -> list[Tensor]:
            cache = model.get_prompt(BATCH)
            return [t for layer in cache.layers for t in (layer.keys, layer.values)]

    else:
        ids = torch.randint(VOCABULARY, (BATCH, TOKENS), generator=generator).to(device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        if method == "multitask":
            inputs["task_ids"] = torch.arange(BATCH, device=device) % 4
        grads = (torch.randn(BATCH, rows + TOKENS, hidden, generator=generator).to(device),)

        def outputs() -> list[Tensor]:
            return [model(**inputs)]

    def step() -> list[Tensor]:
        for parameter in parameters:
            parameter.grad = None
        made = outputs()
        torch.autograd.backward(made, grads)
        return made

    return step


def make_encoder_step(model: peft.PeftModel, hidden: int, rows: int) -> Callable[[], None]:
    """Forward and backward of the network that makes the prompt."""
    encoder = model.prompt_encoder["default"]
    parameters = list(encoder.parameters())
    tokens = torch.arange(rows, device=parameters[0].device).unsqueeze(0)
    grad = torch.randn(1, rows, hidden, generator=torch.Generator().manual_seed(0)).to(tokens.device)

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        encoder(tokens).backward(grad)

    return step


def check(stock: peft.PeftModel, patched: peft.PeftModel, steps: dict[str, Callable[[], Any]]) -> None:
    """Outputs and gradients are PEFT's, and no call fell back.

    Gradients that have come through a ReLU are compared by their norm: where a unit's argument is zero but for
    rounding, it passes a gradient in one and none in the other (one of 409,600 does, in the widest LSTM encoder).

    Raises:
        WrongResult: something differs, or was not fused.
    """
    lk.reset_stats()
    results = {name: steps[name]() for name in (BASELINE, OURS)}
    counts = lk.stats()
    if counts["fallback"] or not counts["served"]:
        raise WrongResult(f"not everything was fused: {counts}")
    pairs = [("output", *pair) for pair in zip(results[OURS], results[BASELINE], strict=True)]
    for (name, ours), theirs in zip(patched.named_parameters(), stock.parameters(), strict=True):
        if ours.requires_grad:
            pairs.append((name, ours.grad, theirs.grad))
    through_relu = any(isinstance(module, nn.ReLU) for module in stock.modules())
    for name, value, reference in pairs:
        wrong = value - reference
        if through_relu and name != "output":
            right = wrong.norm() <= 1e-2 * reference.norm()
        else:
            right = wrong.abs().max() <= 1e-4 * reference.abs().max()
        if not right:
            raise WrongResult(f"{name} is not what PEFT computes")


def prompt_cases(
    methods: Sequence[str] = METHODS, hidden_sizes: Sequence[int] = tuple(SHAPES), rows: Sequence[int] = (20, 100),
    device: torch.device | None = None,
) -> Iterator[Case]:  # fmt: skip
    """Every method at every size, on the CPU unless another ``device`` is named."""
    device = device or torch.device("cpu")
    for hidden in hidden_sizes:
        for count in rows:
            for method in methods:
                torch.manual_seed(0)
                stock, patched = (make_model(method, hidden, count, device) for _ in range(2))
                for ours, theirs in zip(patched.parameters(), stock.parameters(), strict=True):
                    ours.data = theirs.data  # the same memory: neither is in the cache when the other is not
                lk.patch(patched)
                steps: dict[str, Callable[[], Any]] = {
                    BASELINE: make_step(stock, method, hidden, count),
                    OURS: make_step(patched, method, hidden, count),
                }
                check(stock, patched, steps)
                if method in ("mlp", "lstm"):
                    steps[ENCODER] = make_encoder_step(stock, hidden, count)
                name = f"{method}, H={hidden}, P={count}, B={BATCH}, T={TOKENS}, float32"
                yield Case("prompt", name, "forward+backward", steps)
