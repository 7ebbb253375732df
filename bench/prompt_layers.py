"""What a prompt or a prefix costs beside its model, forward and backward: PEFT, patched, and PEFT again.

    python bench/prompt_layers.py
    python bench/prompt_layers.py --hidden 576 --rows 100 --methods prefix

The model below PEFT returns its embeddings, so that only what PEFT and lora_kernels do is timed, their Python included:
embedding the tokens, making the prompt, putting it in front, mask and labels. For prefixes it is ``get_prompt``, which
returns the cache, and the gradients that come back are parts of longer tensors, as concatenation with a text's keys and
values leaves them. Before the clock starts, embeddings, keys, values and gradients must equal PEFT's.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LlamaConfig, PreTrainedModel

import lora_kernels as lk
from lora_kernels.cli._arguments import integer
from lora_kernels.cli._console import table
from lora_kernels.cli._measure import MAX_NULL, NOISE, interleave, repeats_for

BATCH, TOKENS, VOCABULARY, SAMPLE_S = 8, 512, 49152, 0.1
SHAPES = {576: (30, 9, 3), 2048: (16, 32, 8)}
"""Hidden size to layers, heads, heads of keys and values: SmolLM2-135M and Llama-3.2-1B."""
METHODS = ("prompt", "mlp", "lstm", "multitask", "prefix", "projected prefix")


class Embeddings(PreTrainedModel, GenerationMixin):
    """A causal language model without the model."""

    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)

    def forward(self, inputs_embeds: Tensor | None = None, **kwargs: Any) -> Tensor:
        """The input."""
        return inputs_embeds

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """PEFT asks for it to be there."""
        raise NotImplementedError


def make_model(method: str, hidden: int, rows: int) -> peft.PeftModel:
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
    return peft.get_peft_model(Embeddings(config), prompt)


def make_step(model: peft.PeftModel, method: str, hidden: int, rows: int) -> Callable[[], list[Tensor]]:
    """Forward and backward; returns the outputs, leaves the gradients in the parameters."""
    generator = torch.Generator().manual_seed(0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if "prefix" in method:
        layers, _, heads = SHAPES[hidden]
        grads = torch.randn(2 * layers, BATCH, heads, rows + 8, 64, generator=generator)[:, :, :, :rows].unbind(0)

        def outputs() -> list[Tensor]:
            cache = model.get_prompt(BATCH)
            return [t for layer in cache.layers for t in (layer.keys, layer.values)]

    else:
        ids = torch.randint(VOCABULARY, (BATCH, TOKENS), generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        if method == "multitask":
            inputs["task_ids"] = torch.arange(BATCH) % 4
        grads = (torch.randn(BATCH, rows + TOKENS, hidden, generator=generator),)

        def outputs() -> list[Tensor]:
            return [model(**inputs)]

    def step() -> list[Tensor]:
        for parameter in parameters:
            parameter.grad = None
        made = outputs()
        torch.autograd.backward(made, grads)
        return made

    return step


def check(stock: peft.PeftModel, patched: peft.PeftModel, steps: dict[str, Callable[[], list[Tensor]]]) -> None:
    """Outputs and gradients are PEFT's, and no call fell back."""
    lk.reset_stats()
    for ours, expected in zip(steps["fused"](), steps["PEFT"](), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert lk.stats()["fallback"] == {}, lk.stats()
    assert lk.stats()["served"], "nothing was fused"
    for (name, p), q in zip(patched.named_parameters(), stock.parameters(), strict=True):
        if p.requires_grad:
            bound = 1e-4 * q.grad.abs().max().item()
            torch.testing.assert_close(
                p.grad, q.grad, rtol=1e-4, atol=bound, msg=lambda text, name=name: f"{name}: {text}"
            )


def main() -> int:
    """Print a row per problem; 1 if the machine was too noisy for one of them."""
    parser = argparse.ArgumentParser(description="Time prompts and prefixes: stock PEFT against lora_kernels.")
    parser.add_argument("--hidden", type=int, nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rows", type=integer(1), nargs="+", default=[20, 100], help="virtual tokens")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=integer(3), default=11, help="interleaved rounds (default: %(default)s)")
    options = parser.parse_args()
    lines, noisy = [], False
    for hidden in options.hidden:
        for rows in options.rows:
            for method in options.methods:
                torch.manual_seed(0)
                stock = make_model(method, hidden, rows)
                patched = copy.copy(stock)  # the same parameters
                lk.patch(patched)
                steps = {
                    "PEFT": make_step(stock, method, hidden, rows),
                    "fused": make_step(patched, method, hidden, rows),
                }
                steps["null"] = steps["PEFT"]
                check(stock, patched, steps)
                repeats = repeats_for(steps["fused"], SAMPLE_S)
                timings = interleave(steps, options.rounds, repeats=repeats)
                null = timings.ratio("null", "PEFT")
                speedup = timings.ratio("PEFT", "fused")
                quotable = abs(null.median - 1) <= MAX_NULL
                noisy |= not quotable
                milliseconds = [f"{timings.median(name) * 1e3:.2f}" for name in ("PEFT", "fused")]
                lines.append(
                    [method, str(hidden), str(rows), *milliseconds, str(speedup), str(null), "" if quotable else "?"]
                )
                print(" ".join(lines[-1]), file=sys.stderr, flush=True)
    print(f"B={BATCH}, T={TOKENS}, fp32, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(table(["method", "H", "P", "PEFT ms", "fused ms", "PEFT / fused", "null", ""], lines))
    if noisy:
        print(NOISE)
    return int(noisy)


if __name__ == "__main__":
    sys.exit(main())
