"""A training step of SmolLM2-135M: frozen, PEFT, PEFT with a short addmm Function, fused, fused by blocks, PEFT again.

    python bench/training_step.py --dropout 0.1
    python bench/training_step.py --dropout 0.1 --one-process
    python bench/training_step.py --in-4-bits                  # QLoRA: PEFT on bitsandbytes' NF4, and fused over it

Models that share a process share its allocator, and how often that hands memory back to the kernel between two steps
depends on all of them. By default every model has a process of its own, as its user would give it: one model, default
settings. One process at a time steps, in turn; the others wait at a pipe. With --one-process the models take turns in
one. AdamW is included.

With --in-4-bits the base is in NF4, double quantised, multiplied in fp32; "unquantised" is stock PEFT in fp32 then.

"addmm" is what a user can write in a few lines of Python: an autograd Function of in-place addmm, without dropout.
"packs" is ``lk.patch(model, packs=True)``, "packs, loss" also ``loss=True``.

With a process for each model, the last column is what a step adds to the memory that its process has (on Linux): the
peak while it runs, less what was there before.

Before the clock starts, the losses of the fused and the addmm model must equal PEFT's: the first, where B is zero, and
without dropout (PEFT's mask is another) also the second, after one optimizer step.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lora_kernels.benchmarks.measure import MAX_NULL, NOISE, Timings, interleave
from lora_kernels.cli._arguments import integer, probability
from lora_kernels.text import mebibytes, table

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PATCHES: dict[str, dict[str, bool]] = {
    "fused": {},
    "packs": {"packs": True},
    "packs, loss": {"packs": True, "loss": True},
}
"""Variants that are patched, and how."""
VARIANTS = ("frozen", "PEFT", "addmm", *PATCHES, "null")
VARIANTS_IN_4_BITS = ("unquantised", "PEFT", "fused", "null")
RANK, ALPHA, BATCH, SEQ, SEED = 16, 32, 4, 128, 0
MAX_LOSS_DIFFERENCE = 1e-4
SETTLE_S = 0.05  # idle OpenMP threads of the process that stepped last spin for some milliseconds


def variants(options: argparse.Namespace) -> tuple[str, ...]:
    """What is compared; "addmm" knows no dropout."""
    if options.in_4_bits:
        return VARIANTS_IN_4_BITS
    return tuple(name for name in VARIANTS if not (options.dropout and name == "addmm"))


def make_step(variant: str, options: argparse.Namespace) -> Callable[[], float]:
    """Build one model; the result is its training step, which returns the loss."""
    sys.path.insert(0, str(EXAMPLES))
    import peft
    import smollm2
    import torch

    import lora_kernels as lk
    from lora_kernels.cli._models import load_model

    dropout, packed = options.dropout, "nf4" if options.in_4_bits and variant != "unquantised" else None
    folder = str(smollm2.model_dir(options.cache))
    model = load_model(folder, torch.float32, torch.device("cpu"), in_4_bits=packed)
    if options.copied:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    if variant == "frozen":
        model.requires_grad_(False).train()
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    else:
        torch.manual_seed(SEED)
        config = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(model, config).train()
    if variant == "addmm":
        from lora_kernels.benchmarks.models import use_addmm

        use_addmm(model)
    if variant in PATCHES:
        report = lk.patch(model, **PATCHES[variant])
        if report.kept or report.apart:
            raise RuntimeError(f"not every layer is fused:\n{report}")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4) if parameters else None
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(0, model.config.vocab_size, (BATCH, SEQ), generator=generator)

    def step() -> float:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def worker(options: argparse.Namespace) -> None:
    """Print a model's first two losses, then time a step for every line on stdin."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get among the answers
    step = make_step(options.worker, options)
    for _ in range(2):
        print(step(), file=answers, flush=True)
    print(resident_growth(step), file=answers, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, file=answers, flush=True)


def resident_growth(step: Callable[[], float]) -> float:
    """Bytes of memory that the process has at most while it steps, less those before; NaN where Linux does not tell."""
    status = Path("/proc/self/status")
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's: it keeps what earlier steps gave back
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except OSError:
        return float("nan")

    def kibibytes(field: str) -> int:
        return int(next(line for line in status.read_text().splitlines() if line.startswith(field)).split()[1])

    before = kibibytes("VmRSS:")
    step()
    return 1024.0 * (kibibytes("VmHWM:") - before)


def start_worker(variant: str, options: argparse.Namespace) -> subprocess.Popen:
    """A process that runs ``worker``."""
    role = "PEFT" if variant == "null" else variant
    command = [sys.executable, __file__, "--worker", role, "--dropout", str(options.dropout)]
    command += ["--copied"] * options.copied + ["--in-4-bits"] * options.in_4_bits
    return subprocess.Popen(
        [*command, "--cache", str(options.cache)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def answer(process: subprocess.Popen) -> float:
    """The next number that a worker prints."""
    line = process.stdout.readline()
    if not line:
        raise SystemExit("error: a worker died; its message is above")
    return float(line)


def check_losses(losses: dict[str, list[float]], dropout: float) -> None:
    """Stop if a model does not compute what PEFT's does."""
    for name in losses.keys() - {"frozen", "unquantised"}:
        differences = [abs(a - b) for a, b in zip(losses[name], losses["PEFT"], strict=True)]
        if max(differences[: 1 if dropout else 2]) > MAX_LOSS_DIFFERENCE:
            raise SystemExit(f"error: the losses differ: PEFT {losses['PEFT']}, {name} {losses[name]}")


def measure_in_one_process(options: argparse.Namespace) -> Timings:
    """As ``measure``, with all models in this process."""
    names = variants(options)
    steps = {name: make_step("PEFT" if name == "null" else name, options) for name in names}
    check_losses({name: [step() for _ in range(2)] for name, step in steps.items()}, options.dropout)
    return interleave(steps, options.rounds)


def measure(options: argparse.Namespace) -> tuple[Timings, dict[str, float]]:
    """Seconds per step of every variant, one sample a round, in rotating order; bytes that one adds at its peak."""
    growth: dict[str, float] = {}
    workers: dict[str, subprocess.Popen] = {}
    losses: dict[str, list[float]] = {}
    names = variants(options)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    try:
        for name in names:  # one at a time: starting up together, they would fight for the cores
            workers[name] = start_worker(name, options)
            losses[name] = [answer(workers[name]) for _ in range(2)]
            growth[name] = answer(workers[name])
        check_losses(losses, options.dropout)
        for done in range(options.rounds):
            shift = (done // 2) % len(names)
            order = names[shift:] + names[:shift]
            for name in order if done % 2 == 0 else reversed(order):
                time.sleep(SETTLE_S)
                workers[name].stdin.write("step\n")
                workers[name].stdin.flush()
                seconds[name].append(answer(workers[name]))
    finally:
        for process in workers.values():
            process.stdin.close()
            process.wait()
    return Timings(seconds), growth


def main() -> int:
    """Print the table; the exit status is 1 if the null run says that the machine was not quiet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dropout", type=probability, default=0.0, help="lora_dropout (default: %(default)s)")
    parser.add_argument("--rounds", type=integer(2), default=11, help="samples of each (default: %(default)s)")
    parser.add_argument("--cache", type=Path, default=Path("build/demo"), help="folder of the model's files")
    parser.add_argument(
        "--copied",
        action="store_true",
        help="weights in memory of their own, not mapped from the file, where they begin at any byte",
    )
    parser.add_argument("--one-process", action="store_true", help="all models in one process")
    parser.add_argument("--in-4-bits", action="store_true", help="over a base in NF4 (needs bitsandbytes)")
    parser.add_argument("--worker", choices=(*VARIANTS, *VARIANTS_IN_4_BITS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return 0
    times, growth = (measure_in_one_process(options), {}) if options.one_process else measure(options)
    rows = [
        (
            "null: PEFT again" if name == "null" else name,
            f"{times.median(name):.3f} s",
            str(times.ratio(name, "PEFT")),
            mebibytes(growth[name]) if math.isfinite(growth.get(name, math.nan)) else "",
        )
        for name in times.seconds
    ]
    heads = f"dropout {options.dropout:g}", "step", "/ PEFT, median [quartiles]", "adds at its peak"
    print(table(heads, rows, right=(1, 3)))
    if abs(times.ratio("null", "PEFT").median - 1) > MAX_NULL:
        print(NOISE)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
