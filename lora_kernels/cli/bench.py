"""``lora-kernels bench``: one layer beside PEFT and the frozen linear, or whole levels of cases."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch

from ..benchmarks.cases import EVENT_SAMPLE_S, NULL, OURS, SAMPLE_S, Case, Result, WrongResult, measure
from ..benchmarks.measure import NOISE, EventTimer, GraphTimer, Timer, host_timer, synchronizer
from ..benchmarks.winners import winners_of
from ..support import winners
from ..text import table
from . import _arguments as arguments
from ._console import CliError, error
from ._models import DTYPES, pick_device, require

LEVELS = ("layer", "decode", "sweep", "qlora", "experts", "adapters", "pack", "prompt", "block", "model")
ALL, MODELLED = "all", "modelled"
QUICK_CASES, QUICK_PAIRS = 2, 5


def add_parser(commands: Any) -> None:
    """Add the subcommand to the main parser."""
    parser = commands.add_parser(
        "bench",
        help="time LoRA layers, prompts, blocks and models beside stock PEFT",
        description="Time one LoRA layer, given by the options, or whole levels of cases: "
        f"{', '.join(LEVELS)}, or {ALL} of them. Stock PEFT, the frozen layer below it, a hand-written addmm and the "
        "fused layer take turns in one run. Results are checked before the clock starts; a wrong one ends the run with "
        f"status 1. The null row is PEFT against itself: what it shows is the noise of the machine. '{MODELLED}' "
        "prints what the CUDA kernels' schedules move and compute, by a model and without a GPU.",
    )

    def add(flag: str, **kwargs: Any) -> None:
        kwargs["help"] += " (default: %(default)s)"
        parser.add_argument(flag, **kwargs)

    size = arguments.integer(1)
    parser.add_argument("levels", nargs="*", metavar="LEVEL", help="what to time (default: one layer)")
    add("--m", type=size, default=512, metavar="M", help="tokens")
    add("--n", type=size, default=1536, metavar="N", help="out_features")
    add("--k", type=size, default=576, metavar="K", help="in_features")
    add("--rank", type=size, default=16, metavar="R", help="rank of the update")
    add("--dtype", choices=sorted(DTYPES), default="fp32", help="dtype of x and the frozen weight; the adapter is fp32")
    add("--dropout", type=arguments.probability, default=0.0, metavar="P", help="dropout on the LoRA branch")
    add("--pairs", type=arguments.integer(3), default=11, metavar="N", help="interleaved rounds")
    add("--attempts", type=arguments.integer(1), default=3, metavar="N",
        help="how often a case is measured at most while PEFT differs from itself by more than 2 %%")  # fmt: skip
    add("--device", default="auto", help="cpu, cuda, ...; auto is the GPU where there is one")
    add("--clock", choices=("wall", "cpu"), default="wall",
        help="cpu: seconds that this process computed, for a busy machine; use it with --threads 1")  # fmt: skip
    parser.add_argument(
        "--threads", type=arguments.threads, metavar="N", help="CPU threads (default: torch's own choice)"
    )
    parser.add_argument("--write-winners", action="store_true", help="time the one layer's forward, too, and each "
                        "schedule on a GPU; remember the fastest, for LORA_KERNELS_WINNERS=1")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="in minutes: the first cases of every level, or of those "
                        "named, a few rounds of each; then what served them on this machine, and why")  # fmt: skip
    parser.add_argument("--no-compile", action="store_true", help="leave out the rows of torch.compile")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=arguments.path, metavar="DIR", help="write results.json and plots there")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Carry out the command."""
    if options.quick:
        options.levels = options.levels or [ALL]
        options.pairs, options.attempts, options.no_compile = min(options.pairs, QUICK_PAIRS), 1, True
    unknown = set(options.levels) - {*LEVELS, ALL, MODELLED}
    if unknown:
        raise CliError(f"unknown level {sorted(unknown)[0]!r}; choose from {', '.join((*LEVELS, ALL, MODELLED))}")
    if MODELLED in options.levels:
        try:
            print(_modelled())
        except CliError as problem:
            if options.levels == [MODELLED]:
                raise
            print(problem, file=sys.stderr)  # what is measured does not need it
        if options.levels == [MODELLED]:
            return 0
    require("peft", "bench, which compares with stock PEFT,")
    if "qlora" in options.levels or ALL in options.levels:
        require("bitsandbytes", "bench qlora, which compares with it,")
    if "experts" in options.levels or ALL in options.levels:
        require("transformers", "bench experts, which takes its experts,")
    out = None if options.out is None else arguments.output_directory(options.out, overwrite=True)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    if options.write_winners and (device.type != "cuda" or options.levels):
        raise CliError("--write-winners needs --device cuda and one layer, given by the options")
    try:
        results, env, light = _measure_all(_cases(options, device), options, device)
    except WrongResult as problem:
        error(str(problem))
        return 1
    from ..benchmarks import report

    beside = sys.stderr if options.json else sys.stdout  # what a program reads is the JSON alone
    print(json.dumps({"environment": env, "results": [asdict(r) for r in results]}, indent=2) if options.json else
          "\n".join([*(f"{key}: {value}" for key, value in env.items()), "", report.render(results)]))  # fmt: skip
    if not options.levels and not options.json and not results[0].quotable:
        print(NOISE)
    if options.quick and not options.json:
        print(f"\n{report.chosen(results)}")
    if options.write_winners:
        eager, *_ = _measure_all(_cases(options, device), options, device, eager=True)
        found = winners_of(results, captured=True) | winners_of(eager, captured=False)
        print(f"wrote {winners.remember(device, found)}", file=beside)
    if out is not None:
        report.write_json(out / "results.json", results, env)
        for path in report.plot(out, results, env, light):
            print(f"wrote {path}", file=beside)
    return 0


def _cases(options: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    from ..benchmarks import adapters, experts, layers, models, packs, prompts, quantized

    compiles = not options.no_compile
    if not options.levels:
        dtype = DTYPES[options.dtype]
        given = {"rank": options.rank, "dropout": options.dropout, "dtype": dtype, "adapter_dtype": torch.float32}
        given["alternatives"] = winners.candidates(device) if options.write_winners else ()
        for what in ("forward", "forward+backward") if options.write_winners else ("forward+backward",):
            yield layers.make_case(device, options.m, options.n, options.k, what=what, **given)
        return
    makers: dict[str, Callable[[], Iterator[Case]]] = {
        "layer": lambda: layers.layer_cases(device, compiles),
        "decode": lambda: layers.decode_cases(device),
        "sweep": lambda: layers.sweep_cases(device),
        "qlora": lambda: quantized.qlora_cases(device),
        "experts": lambda: experts.experts_cases(device),
        "adapters": lambda: adapters.adapters_cases(device),
        "pack": lambda: packs.pack_cases(device),
        "prompt": lambda: prompts.prompt_cases(device=device),
        "block": lambda: models.block_cases(device, compiles),
        "model": lambda: models.model_cases(device),
    }
    for level in LEVELS:
        if level in options.levels or ALL in options.levels:
            yield from islice(makers[level](), QUICK_CASES if options.quick else None)


def _measure_all(
    cases: Iterator[Case], options: argparse.Namespace, device: torch.device, *, eager: bool = False
) -> tuple[list[Result], dict[str, Any], Any]:
    """Layers on a GPU are timed as CUDA graphs, unless ``eager``."""
    from ..benchmarks import report
    from ..benchmarks.light import measure_light

    sync = synchronizer(device)
    host: Timer = host_timer(sync, time.process_time if options.clock == "cpu" else time.perf_counter)
    light = measure_light(device, host)
    results = []
    for case in cases:
        # A graph holds a layer; a model's step has an optimizer and decoding, which wait for the host.
        graphed = device.type == "cuda" and case.level in ("layer", "decode", "ranks", "tokens", "qlora")
        timer = (EventTimer(device) if eager else GraphTimer(device)) if graphed else host
        result = measure(
            case, options.pairs, timer, device, light.seconds, options.attempts,
            EVENT_SAMPLE_S if graphed else SAMPLE_S,
        )  # fmt: skip
        results.append(result)
        if options.levels:
            ratio, null = result.speedup[OURS], result.speedup[NULL]
            print(f"{case.level}: {case.name}, {case.what}: PEFT / fused {ratio}, null {null.median:.3f}",
                  file=sys.stderr, flush=True)  # fmt: skip
    return results, report.environment(device, light, options.clock), light


def _modelled() -> str:
    from .. import _native
    from ..benchmarks.traffic import PROBLEMS, model
    from .plan.architectures import ARCHITECTURES

    if _native.cuda is None:
        raise CliError(f"the model reads tiles from the CUDA extension: {_native.cuda_error}")
    arch = ARCHITECTURES["sm_80"]
    rows = []
    for m, n, k, r in PROBLEMS:
        launch = _native.cuda.plan_lora_linear(
            dtype="bf16", m=m, n=n, k=k, rank=r, rows_aligned=True, has_dropout=False,
            sms=arch.sms, shared_per_block=arch.shared_per_block, capability=80, schedule="one launch",
        )  # fmt: skip
        row = model((m, n, k, r), launch)
        sizes = (row.compulsory, row.fused, row.split, row.peft)
        rows.append((
            f"{m}x{n}x{k}, r={r}", f"{row.schedule} {row.tile[0]}x{row.tile[1]}",
            *(f"{size / 2**20:,.1f}" for size in sizes),
            f"{row.flops / 1e9:,.2f}", f"{row.flops / row.least_flops:.3f}",
        ))  # fmt: skip
    header = ("m x n x k", "schedule", "compulsory", "fused", "split", "PEFT", "mma Gflop", "/ least")
    return (
        "MODEL, not a measurement: MiB that blocks ask of the L2 cache and tensor-core work, bf16 forward on sm_80\n"
        + table(header, rows, right=(2, 3, 4, 5, 6, 7))
    )
