"""The whole story on a real model: SmolLM2-135M trained with stock PEFT and with fused layers, side by side; then with
these served together, and without logits.

    python examples/demo.py               # what `make demo` runs; the picture is build/demo/demo.png

Every claim printed here is asserted; the exit status is 1 if one does not hold.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import smollm2
import torch
import transformers
from torch import Tensor, nn

import lora_kernels as lk
from lora_kernels.benchmarks.measure import MAX_NULL, NOISE, Timings, interleave, saved_bytes, synchronizer
from lora_kernels.cli._arguments import integer
from lora_kernels.cli._console import CliError, counters, progress
from lora_kernels.cli._models import pick_device
from lora_kernels.cli._training import Trainer, batch_at, held_out_loss, language_loss, pack_tokens, split_blocks
from lora_kernels.text import mebibytes, table

RANK, ALPHA, LR, WARMUP, STEPS, BATCH, SEQ, SEED = 16, 32, 1e-3, 5, 40, 4, 128, 0
ROUNDS = 9
DROPOUTS = (0.0, 0.1)
PROMPT = "LAWYER, n."
TOGETHER = "packs and loss"
"""The fourth variant: ``lk.patch(model, packs=True, loss=True)``."""
VARIANTS = ("frozen", "PEFT", "fused", TOGETHER)
QLORA_STEPS, QLORA_FORMAT = 10, "nf4"

MAX_GRADIENT_ERROR = 2e-4
MAX_PACKED_BYTES = 170e6
"""Of the parameters of SmolLM2-135M with its linear layers in NF4, double quantised: 540 MB in fp32."""
MAX_LOSS_DIFFERENCE = 2e-3
MAX_LOGITS_ERROR = 1e-4


class Claims:
    """Collects what was asserted, so that one failure does not hide the next."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def check(self, what: str, value: float, limit: float) -> None:
        """Print ``what`` and record a failure unless ``value`` is at most ``limit``."""
        holds = value <= limit  # False for NaN
        print(f"  {what}: {value:.2e} (limit {limit:.0e}) {'ok' if holds else 'FAILED'}")
        if not holds:
            self.failed.append(what)

    def require(self, what: str, holds: bool) -> None:
        """As ``check``, for something that is true or not."""
        print(f"  {what}: {'ok' if holds else 'FAILED'}")
        if not holds:
            self.failed.append(what)


class Stages:
    """Prints a numbered line with the elapsed time before each stage."""

    def __init__(self) -> None:
        self._start, self._count = time.perf_counter(), 0

    def __call__(self, title: str) -> None:
        self._count += 1
        print(f"\n[{self.elapsed():5.0f} s] {self._count}. {title}", flush=True)

    def elapsed(self) -> float:
        """Seconds since the demo began."""
        return time.perf_counter() - self._start


# ------------------------------------------------------------------------------------------------------ models


def with_peft(base: nn.Module) -> nn.Module:
    """A PEFT model around a copy of ``base``; every call starts from the same adapter."""
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(SEED)
    return peft.get_peft_model(copy.deepcopy(base), config)


def set_dropout(model: nn.Module, p: float) -> None:
    """Give every LoRA layer the dropout module that PEFT would have made for ``lora_dropout=p``."""
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            for name in module.lora_dropout:
                module.lora_dropout[name] = nn.Dropout(p) if p > 0 else nn.Identity()


def frozen_reference(base: nn.Module) -> nn.Module:
    """``base`` itself, its embedding output requiring grad so that backward runs through every layer."""
    base.requires_grad_(False)
    base.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    return base


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits in evaluation mode without gradients."""
    model.eval()
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def relative(value: Tensor, reference: Tensor) -> float:
    """Largest absolute difference over the largest absolute value of ``reference``."""
    return ((value - reference).abs().max() / reference.abs().max()).item()


def sample(model: nn.Module, tokenizer, device: torch.device) -> str:
    """A greedy continuation of ``PROMPT``."""
    model.eval()
    inputs = tokenizer(PROMPT, return_tensors="pt").to(device)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    return " ".join(tokenizer.decode(ids[0], skip_special_tokens=True).split())


def in_4_bits(folder: Path, device: torch.device) -> nn.Module:
    """The model with its linear layers packed by bitsandbytes, as a QLoRA recipe loads it."""
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=QLORA_FORMAT, bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config, device_map={"": device}
    )


# ------------------------------------------------------------------------------------------------------ stages


def loss_of_wide_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """``language_loss`` in float64, from the model's logits: torch's own in fp32 is further from it, over a large
    vocabulary, than gradients that are compared may be.
    """
    logits = model(input_ids=tokens, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten())


def compare_gradients(
    stock: nn.Module, fused: nn.Module, tokens: Tensor, stock_loss: Callable[..., Tensor] = language_loss
) -> float:
    """Largest relative error over the gradients of all LoRA parameters, with a random B in place of the zero one."""
    models = (stock, fused)
    pairs = [[(n, p) for n, p in model.named_parameters() if p.requires_grad] for model in models]
    before = [p.detach().clone() for _, p in pairs[0]]
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for (name, a), (other, b) in zip(*pairs, strict=True):
            if name != other:
                raise RuntimeError(f"patch renamed the parameter {name} to {other}")
            if "lora_B" in name:
                a.copy_(0.02 * torch.randn(a.shape, generator=generator))
                b.copy_(a)
    gradients = []
    for model, loss, parameters in zip(models, (stock_loss, language_loss), pairs, strict=True):
        model.train()
        gradients.append(torch.autograd.grad(loss(model, tokens), [p for _, p in parameters]))
    with torch.no_grad():
        for (_, a), (_, b), value in zip(*pairs, before, strict=True):
            a.copy_(value)
            b.copy_(value)
    return max(relative(g, reference) for reference, g in zip(*gradients, strict=True))


def train(trainers: dict[str, Trainer], steps: int) -> Timings:
    """All runs, step by step in turn, on the same batches. Returns the times of their steps, optimizer included."""
    sync = synchronizer(next(iter(trainers.values())).device)
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    turns = list(trainers.items())
    with progress(steps, "  step") as display:
        for done in range(1, steps + 1):
            turns.append(turns.pop(0))  # none always runs first
            for name, trainer in turns:
                sync()
                start = time.perf_counter()
                trainer.step()
                sync()
                seconds[name].append(time.perf_counter() - start)
            losses = "  ".join(f"{name} {trainer.losses[-1]:.4f}" for name, trainer in trainers.items())
            display.update(done, f"loss {losses}")
    return Timings(seconds)


def trainers_of(models: dict[str, nn.Module], blocks: Tensor) -> dict[str, Trainer]:
    """A run of each model."""
    return {
        name: Trainer(model, blocks, batch=BATCH, lr=LR, warmup=WARMUP, seed=SEED) for name, model in models.items()
    }


def largest_difference(stock: Trainer, *others: Trainer) -> float:
    """Largest difference between the first loss curve and another."""
    return max(abs(a - b) for other in others for a, b in zip(stock.losses, other.losses, strict=True))


def step_times(steps: Timings, count: int) -> str:
    """What a training step of each took, and the share of PEFT's."""
    medians = ", ".join(f"{name} {steps.median(name):.3f} s" for name in steps.seconds)
    ratios = ", ".join(f"{name} / PEFT {steps.ratio(name, 'PEFT')}" for name in steps.seconds if name != "PEFT")
    return f"  training step: {medians}; {ratios}, median [quartiles] of {count} rounds"


def check_adapter(base: nn.Module, fused: nn.Module, tokens: Tensor, adapter: Path, claims: Claims) -> None:
    """Save the adapter; read into stock PEFT, and merged into a plain model, it must give the same logits."""
    reference = logits_of(fused, tokens)
    lk.save_adapter(fused, adapter)
    reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), adapter)
    error = relative(logits_of(reloaded, tokens), reference)
    claims.check("logits of the adapter in stock PEFT, relative difference", error, MAX_LOGITS_ERROR)
    del reloaded

    merged = copy.deepcopy(base)
    lk.load_adapter(merged, adapter)
    lk.merge_adapter(merged, unload=True)
    with tempfile.TemporaryDirectory(dir=adapter.parent) as temporary:
        merged.save_pretrained(temporary)
        merged = transformers.AutoModelForCausalLM.from_pretrained(temporary, dtype=torch.float32).to(tokens.device)
    error = relative(logits_of(merged, tokens), reference)
    claims.check("logits of the merged model, saved and loaded, relative difference", error, MAX_LOGITS_ERROR)
    tied = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    claims.require("the merged model's head is still tied to its embedding", tied)


def measure(models: dict[str, nn.Module], tokens: Tensor, rounds: int) -> tuple[Timings, dict[str, int]]:
    """Training-step times (loss and backward) and bytes saved for backward of the models, PEFT timed twice."""

    def stepper(model: nn.Module) -> Callable[[], None]:
        model.train()
        parameters = [p for p in model.parameters() if p.requires_grad]

        def step() -> None:
            language_loss(model, tokens).backward()
            for parameter in parameters:
                parameter.grad = None

        return step

    saved = {
        name: saved_bytes(lambda model=model: language_loss(model, tokens), [*model.parameters(), *model.buffers()])
        for name, model in models.items()
    }
    # Training and the pass above have warmed everything up but frozen's backward, which costs one sample of many.
    steps = {name: stepper(model) for name, model in models.items()}
    steps["null"] = steps["PEFT"]
    with progress(rounds, "  round") as display:
        times = interleave(
            steps, rounds, warmup=0, sync=synchronizer(tokens.device), after_round=lambda done: display.update(done, "")
        )
    return times, saved


def report_measurements(results: dict[float, tuple[Timings, dict[str, int]]]) -> str:
    """The measurements as a table."""
    rows = []
    for p, (times, saved) in results.items():
        for name in times.seconds:
            label = "null: PEFT again" if name == "null" else name
            ratio = "" if name == "PEFT" else str(times.ratio(name, "PEFT"))
            size = mebibytes(saved[name]) if name in saved else ""
            rows.append((f"{p:g}", label, f"{times.median(name):.3f} s", ratio, size))
    return table(("dropout", "", "step", "/ PEFT, median [quartiles]", "saved for backward"), rows, right=(0, 2, 4))


def qlora(folder: Path, blocks: Tensor, tokens: Tensor, claims: Claims) -> tuple[Trainer, Trainer, Timings]:
    """The same adapters over a 4-bit base: stock PEFT on bitsandbytes and fused, step by step in turn."""
    stock = with_peft(in_4_bits(folder, tokens.device))
    fused = copy.deepcopy(stock)
    report = lk.patch(fused)
    claims.require(f"all {len(report.fused)} LoRA layers are fused over {QLORA_FORMAT}", not report.kept)
    packed = sum(p.numel() * p.element_size() for p in fused.parameters() if not p.requires_grad)
    print(f"  frozen parameters: {packed / 1e6:.0f} MB")
    claims.require(f"they take at most {MAX_PACKED_BYTES / 1e6:.0f} MB", packed <= MAX_PACKED_BYTES)
    claims.check("largest relative error of a gradient", compare_gradients(stock, fused, tokens), MAX_GRADIENT_ERROR)
    trainers = trainers_of({"PEFT": stock, "fused": fused}, blocks)
    steps = train(trainers, QLORA_STEPS)
    difference = largest_difference(*trainers.values())
    claims.check("largest difference between the loss curves", difference, MAX_LOSS_DIFFERENCE)
    print(step_times(steps, QLORA_STEPS))
    return trainers["PEFT"], trainers["fused"], steps


def plot(
    path: Path, trainers: dict[str, Trainer], held: dict[str, float], results: dict,
    packed: tuple[Trainer, Trainer, Timings],
) -> None:  # fmt: skip
    """One picture: loss curves, held-out loss, step time, saved bytes; the curves and the step over a 4-bit base."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"frozen": "#9a9a9a", "PEFT": "#4477aa", "fused": "#cc6633", TOGETHER: "#228833", "before": "#cccccc"}
    figure, axes = pyplot.subplots(2, 3, figsize=(15, 7.5), layout="constrained")
    figure.suptitle(f"SmolLM2-135M, LoRA r={RANK} on all linear layers, {BATCH}x{SEQ} tokens, fp32")
    (curves, losses, packed_curves), (step_time, memory, packed_time) = axes
    packed_stock, packed_fused, packed_steps = packed

    for axis, what, runs in (
        (curves, "training loss", trainers),
        (packed_curves, f"training loss over {QLORA_FORMAT}", {"PEFT": packed_stock, "fused": packed_fused}),
    ):
        for (name, run), width in zip(runs.items(), (6, 3, 1)):
            axis.plot(range(1, run.done + 1), run.losses, color=colours[name], linewidth=width, alpha=0.6, label=name)
        difference = largest_difference(*runs.values())
        axis.set(title=f"{what} (largest difference {difference:.1e})", xlabel="step", ylabel="loss")
        axis.legend(frameon=False)
    seconds = [packed_steps.median(name) for name in ("PEFT", "fused")]
    bars = packed_time.bar(
        ["PEFT + bitsandbytes", "fused"], seconds, color=[colours["PEFT"], colours["fused"]], width=0.6
    )
    packed_time.bar_label(bars, fmt="%.2f", padding=2)
    packed_time.set(title=f"training step over {QLORA_FORMAT}", ylabel="seconds")
    packed_time.margins(y=0.25)

    bars = losses.bar(list(held), list(held.values()), color=[colours[name] for name in held], width=0.6)
    losses.bar_label(bars, fmt="%.3f", padding=2)
    losses.set(title="held-out loss", ylabel="loss", ylim=(0, 1.15 * max(held.values())))

    groups = list(results)
    for offset, name in zip((-0.3, -0.1, 0.1, 0.3), VARIANTS, strict=True):
        measured = [p for p in groups if name in results[p][1]]
        places = [groups.index(p) + offset for p in measured]
        for axis, values, label in (
            (step_time, [results[p][0].median(name) for p in measured], "%.2f"),
            (memory, [results[p][1][name] / 2**20 for p in measured], "%.0f"),
        ):
            axis.bar_label(axis.bar(places, values, 0.19, color=colours[name], label=name), fmt=label, padding=2)
    for axis, title, unit in ((step_time, "loss + backward", "seconds"), (memory, "saved for backward", "MiB")):
        axis.set(title=title, ylabel=unit, xticks=range(len(groups)), xticklabels=[f"dropout {p:g}" for p in groups])
        axis.margins(y=0.25)
        axis.legend(frameon=False, ncols=2, loc="upper left")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])

    def add(flag: str, **kwargs: Any) -> None:
        parser.add_argument(flag, **kwargs)

    add("--cache", type=Path, default=smollm2.DEFAULT_CACHE, help="folder of all files (default: %(default)s)")
    add("--png", type=Path, help="where to put the picture (default: demo.png in the cache)")
    add("--device", default="cpu", help="cpu, cuda, ... (default: %(default)s)")
    add("--steps", type=integer(1), default=STEPS, help="training steps (default: %(default)s)")
    add("--rounds", type=integer(2), default=ROUNDS, help="interleaved timing rounds (default: %(default)s)")
    return parser.parse_args()


def main() -> int:
    """Run the demo and return its exit status."""
    options = parse_arguments()
    device = pick_device(options.device)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT and transformers about each other
    claims, stage = Claims(), Stages()

    stage("model and text")
    try:
        folder = smollm2.model_dir(options.cache)
    except smollm2.DemoDataError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    text, source = smollm2.load_text(options.cache)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    blocks, held = split_blocks(pack_tokens(ids, SEQ))
    tokens = batch_at(blocks, options.steps, BATCH, SEED).to(device)  # the first batch that is not trained on
    print(f"  model: SmolLM2-135M-Instruct in {folder}, fp32 on {device}, {torch.get_num_threads()} CPU thread(s)")
    print(f"  text: {source}\n  {len(blocks)} training and {len(held)} held-out blocks of {SEQ} tokens")

    stage("adapters: stock PEFT, and the same with lk.patch")
    stock, fused = with_peft(base), with_peft(base)
    report = lk.patch(fused)
    print(f"  {len(report.fused)} of {len(report.fused) + len(report.kept)} layers fused")
    for name, reason in report.kept:
        print(f"  kept: {name} ({reason})")
    claims.require("every LoRA layer is fused", bool(report.fused) and not report.kept)
    together = with_peft(base)
    print("\n".join(f"  {line}" for line in str(lk.patch(together, packs=True, loss=True)).splitlines()))

    stage("gradients of every LoRA parameter, fused against PEFT, B not zero")
    for name, model, loss in (("fused", fused, language_loss), (TOGETHER, together, loss_of_wide_logits)):
        error = compare_gradients(stock, model, tokens, loss)
        claims.check(f"{name}, largest relative error", error, MAX_GRADIENT_ERROR)

    stage(f"training, {options.steps} steps each, in turn")
    losses = {"before": held_out_loss(stock, held, BATCH, device)}
    before = sample(base, tokenizer, device)
    trainers = trainers_of({"PEFT": stock, "fused": fused, TOGETHER: together}, blocks)
    lk.reset_stats()
    steps = train(trainers, options.steps)
    difference = largest_difference(*trainers.values())
    claims.check("largest difference between the loss curves", difference, MAX_LOSS_DIFFERENCE)
    print(step_times(steps, options.steps))
    print("\n".join(f"  {line}" for line in counters()))
    losses |= {"PEFT": held_out_loss(stock, held, BATCH, device), "fused": held_out_loss(fused, held, BATCH, device)}
    print(f"  held-out loss: before {losses['before']:.4f}, PEFT {losses['PEFT']:.4f}, fused {losses['fused']:.4f}")
    claims.require("training lowered the held-out loss", losses["fused"] < losses["before"])
    print(f"  before: {before}\n  after:  {sample(fused, tokenizer, device)}")

    stage("the adapter in stock PEFT, and merged")
    adapter = options.cache / "adapter"
    check_adapter(base, fused, tokens, adapter, claims)

    stage(f"step time and memory, {options.rounds} interleaved rounds per dropout")
    models = dict(zip(VARIANTS, (frozen_reference(base), stock, fused, together), strict=True))
    results = {}
    for p in DROPOUTS:
        for model in (stock, fused, together):
            set_dropout(model, p)
        results[p] = measure(models, tokens, options.rounds)
        models.pop("frozen", None)  # it has no dropout to change
    print(report_measurements(results))
    ceiling = results[0.0][1]["PEFT"] + 8 * len(report.fused)  # under dropout, each layer keeps an 8-byte seed
    for p, (times, saved) in results.items():
        claims.require(
            f"fused at dropout {p:g} saves no more than PEFT without dropout, but for the seeds",
            saved["fused"] <= ceiling,
        )
        claims.require(
            f"{TOGETHER} at dropout {p:g} saves less than the frozen model", saved[TOGETHER] < results[0.0][1]["frozen"]
        )
        if abs(times.ratio("null", "PEFT").median - 1) > MAX_NULL:
            print(f"  dropout {p:g}: {NOISE}")

    stage(f"QLoRA: the base in {QLORA_FORMAT}, {QLORA_STEPS} steps each, in turn")
    packed = qlora(folder, blocks, tokens, claims)

    picture = options.png or options.cache / "demo.png"
    plot(picture, trainers, losses, results, packed)
    stage(f"done; picture in {picture}, adapter in {adapter}")
    if claims.failed:
        print("FAILED: " + "; ".join(claims.failed), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CliError as problem:
        sys.exit(f"error: {problem}")
    except KeyboardInterrupt:
        sys.exit(130)
