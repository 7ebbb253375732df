"""Four adapters of SmolLM2 on four texts: trained in one batch, each as if alone, and served in one batch.

    python examples/many_adapters.py      # after `make demo`, which makes the model; about a minute

Every sample of a batch uses an adapter of its own (``lk.route_adapters``). Beside the mixed training, each adapter is
trained alone, on its own samples; the losses and the trained adapters must agree. Then each adapter continues a prompt,
all in one batch, which must give what each gives alone. Every claim printed here is asserted; the exit status is 1 if
one does not hold.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from pathlib import Path

import peft
import smollm2
import torch
import transformers
from demo import Claims, Stages, relative
from torch import Tensor, nn

import lora_kernels as lk
from lora_kernels.benchmarks.measure import MAX_NULL, NOISE, Timings, interleave
from lora_kernels.cli._arguments import integer
from lora_kernels.cli._console import counters, progress
from lora_kernels.cli._training import pack_tokens
from lora_kernels.text import table

TEXTS = {
    "rhyme": "The rain came down on stone and sand, and night went softly through the land; ",
    "recipe": "Take two eggs, a cup of flour and some milk; stir them well and bake for an hour. ",
    "log": "ERROR 42 at node 7: the disk is full; retry in 5 s. INFO 43 at node 7: retried. ",
    "law": "The party of the first part shall, without delay, inform the party of the second part. ",
}
RANK, ALPHA, LR, SEQ, STEPS, ROUNDS, SEED = 8, 16, 2e-3, 64, 12, 5, 0
TARGETS = "all-linear"
EPS = 1e-4
"""AdamW's: with its default an element whose gradient is zero but for rounding moves by whole steps, and rounding is
not the same for one sample and for four.
"""
MAX_LOSS_DIFFERENCE, MAX_ADAPTER_DIFFERENCE = 2e-3, 1e-3


def make_model(folder: Path) -> nn.Module:
    """SmolLM2 with an adapter per text, fused. The same values every time."""
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    torch.manual_seed(SEED)
    first, *others = TEXTS
    model = peft.get_peft_model(base, config, adapter_name=first)
    for name in others:
        model.add_adapter(name, copy.deepcopy(config))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    print(f"  {str(lk.patch(model)).splitlines()[0]}")
    return model


def losses_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """The next-token loss of each sample."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


def parameters_of(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if f".{adapter}." in name}


def train(model: nn.Module, batches: list[Tensor], adapters: list[str]) -> list[list[float]]:
    """Sample i of every batch trains adapter i; returns its losses, step by step."""
    model.train()
    parameters = [p for name in adapters for p in parameters_of(model, name).values()]
    optimizer = torch.optim.AdamW(parameters, lr=LR, eps=EPS, weight_decay=0.0)
    curves: list[list[float]] = [[] for _ in adapters]
    with progress(len(batches), "  step") as display:
        for done, tokens in enumerate(batches, 1):
            with lk.route_adapters(model, adapters):
                losses = losses_of(model, tokens)
                losses.sum().backward()  # the gradient of each adapter is that of its own sample
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            for curve, loss in zip(curves, losses.tolist()):
                curve.append(loss)
            display.update(done, "  ".join(f"{name} {curve[-1]:.3f}" for name, curve in zip(adapters, curves)))
    return curves


@torch.no_grad()
def serve(model: nn.Module, tokenizer, adapters: list[str], prompt: str) -> list[str]:
    """What each adapter continues the prompt with, greedily, all in one batch."""
    model.eval()
    inputs = tokenizer([prompt] * len(adapters), return_tensors="pt")
    with lk.route_adapters(model, adapters):
        ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return [" ".join(tokenizer.decode(row, skip_special_tokens=True).split()) for row in ids]


def time_steps(model: nn.Module, tokens: Tensor, rounds: int) -> Timings:
    """A training step of the batch: an adapter per sample, and all samples by one."""
    names = list(TEXTS)
    model.train()

    def step(adapters: list[str]) -> None:
        with lk.route_adapters(model, adapters):
            losses_of(model, tokens).sum().backward()
        model.zero_grad(set_to_none=True)

    model.base_model.set_adapter(names[0])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)  # set_adapter has frozen the others

    def one() -> None:
        losses_of(model, tokens).sum().backward()
        model.zero_grad(set_to_none=True)

    return interleave({"one adapter": one, "an adapter per sample": lambda: step(names), "null": one}, rounds)


def main() -> int:
    """Run the example and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=smollm2.DEFAULT_CACHE, help="default: %(default)s")
    parser.add_argument("--steps", type=integer(1), default=STEPS, help="default: %(default)s")
    parser.add_argument("--rounds", type=integer(2), default=ROUNDS, help="default: %(default)s")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT and transformers about each other
    claims, stage, names = Claims(), Stages(), list(TEXTS)

    stage("model, four adapters, four texts")
    folder = smollm2.model_dir(options.cache)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    blocks = []
    for text in TEXTS.values():
        ids = tokenizer(text * (SEQ * options.steps // 8), add_special_tokens=False, verbose=False)["input_ids"]
        blocks.append(pack_tokens(ids, SEQ)[: options.steps])
    batches = list(torch.stack(blocks, dim=1))  # sample i of a batch is of text i
    mixed = make_model(folder)

    stage(f"training in one batch, {options.steps} steps")
    lk.reset_stats()
    together = train(mixed, batches, names)
    print("\n".join(f"  {line}" for line in counters()))
    claims.require("every layer was served by the op", not lk.stats()["fallback"])

    stage("training each alone")
    rows = []
    for i, name in enumerate(names):
        alone = make_model(folder)
        (curve,) = train(alone, [batch[i : i + 1] for batch in batches], [name])
        claims.check(
            f"{name}: largest difference of a loss", max(abs(a - b) for a, b in zip(together[i], curve)),
            MAX_LOSS_DIFFERENCE,
        )  # fmt: skip
        own, other = parameters_of(mixed, name), parameters_of(alone, name)
        difference = max(relative(own[key].detach(), other[key].detach()) for key in own)
        claims.check(f"{name}: largest relative difference of the adapter", difference, MAX_ADAPTER_DIFFERENCE)
        claims.require(f"{name}: the loss fell", together[i][-1] < together[i][0])
        rows.append((name, f"{together[i][0]:.4f}", f"{together[i][-1]:.4f}", f"{curve[-1]:.4f}"))
    print(table(("text", "first loss", "last loss, in one batch", "alone"), rows, right=(1, 2, 3)))

    stage("serving all in one batch")
    prompt = "The"
    for name, text in zip(names, serve(mixed, tokenizer, names, prompt)):
        claims.require(f"{name}: as alone", serve(mixed, tokenizer, [name], prompt) == [text])
        print(f"    {text}")

    stage(f"a training step of the batch, {options.rounds} interleaved rounds")
    start = time.perf_counter()
    times = time_steps(mixed, batches[0], options.rounds)
    rows = [
        (name, f"{times.median(name):.3f} s", str(times.ratio(name, "one adapter")) if name != "one adapter" else "")
        for name in times.seconds
    ]
    print(table(("", "step", "/ one adapter, median [quartiles]"), rows, right=(1,)))
    if abs(times.ratio("null", "one adapter").median - 1) > MAX_NULL:
        print(f"  {NOISE}")
    print(f"\n{time.perf_counter() - start:.0f} s for that, {stage.elapsed():.0f} s in all")
    if claims.failed:
        print(f"FAILED: {', '.join(claims.failed)}")
    return 1 if claims.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
