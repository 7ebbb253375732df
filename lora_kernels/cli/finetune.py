"""``lora-kernels finetune``: train a LoRA adapter on a text file."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_kernels as lk

from ..adapters.files import replacing
from ..text import first_sentence
from . import _arguments as arguments
from ._console import CliError, Progress, counters, error, progress
from ._models import DTYPES, linear_names, load_model, load_tokenizer, pick_device, require
from ._training import (
    STATE_FILE,
    StateError,
    StopRequest,
    Trainer,
    TrainingDiverged,
    digest,
    held_out_loss,
    pack_tokens,
    read_header,
    split_blocks,
)

LOG_FILE = "training_log.json"
ALL_LINEAR = "all-linear"

_DEFAULTS: dict[str, Any] = {
    "rank": 16,
    "alpha": 32.0,
    "dropout": 0.0,
    "targets": [ALL_LINEAR],
    "lr": 1e-3,
    "warmup": 5,
    "steps": 40,
    "batch": 4,
    "seq": 128,
    "seed": 0,
    "dtype": "fp32",
    "quantize": None,
    "device": "auto",
    "threads": None,
    "eval_every": None,
    "save_every": None,
    "backend": "auto",
    "frozen_linears": False,
    "peft": False,
    "allow_missing": False,
}
_FREE = ("steps", "device", "threads", "eval_every", "save_every", "backend", "allow_missing")
"""What a resumed run may change: nothing that moves its losses by more than rounding."""


def add_parser(commands: Any) -> None:
    """Add the subcommand to the main parser."""
    parser = commands.add_parser(
        "finetune",
        help="train a LoRA adapter on a text file",
        description="Train a LoRA adapter of a causal language model on a text file. The last tenth of the text (at "
        "most 16 blocks) is held out and its loss is reported before and after. Ctrl-C saves and stops; --resume "
        "continues with the same losses as an uninterrupted run.",
    )

    def add(flag: str, text: str, **kwargs: Any) -> None:
        # Defaults are filled in later: a resumed run has to tell what was given from what was not.
        name = flag.removeprefix("--").replace("-", "_")
        default = _DEFAULTS.get(name)
        if default is not None and default is not False:
            text += f" (default: {','.join(default) if isinstance(default, list) else default})"
        parser.add_argument(flag, default=None, help=text, **kwargs)

    add("--model", "model directory, or a name on the Hugging Face hub", type=arguments.path, metavar="DIR")
    add("--text", "UTF-8 text file to train on", type=arguments.path, metavar="FILE")
    add("--out", "directory for the adapter, the trainer state and the log", type=arguments.path, metavar="DIR")
    add("--rank", "rank of the update", type=arguments.integer(1), metavar="R")
    add("--alpha", "the update is scaled by alpha / rank", type=arguments.positive)
    add("--dropout", "dropout on the LoRA branch, in [0, 1)", type=arguments.probability, metavar="P")
    add(
        "--targets",
        "comma-separated names of the linear layers to adapt, e.g. q_proj,v_proj; all-linear is all but the head",
        type=arguments.names,
        metavar="NAMES",
    )
    add("--lr", "learning rate", type=arguments.positive)
    add("--warmup", "steps over which the learning rate rises linearly", type=arguments.integer(0), metavar="N")
    add("--steps", "training steps", type=arguments.integer(1), metavar="N")
    add("--batch", "blocks per step", type=arguments.integer(1), metavar="N")
    add("--seq", "tokens per block", type=arguments.integer(2), metavar="N")
    add("--seed", "seed of the adapter, the data order and dropout", type=arguments.integer(0, 2**31), metavar="N")
    add("--dtype", "dtype of the frozen model; the adapter is fp32", choices=("fp32", "bf16"))
    add("--quantize", "pack the frozen linear layers so (QLoRA); with --peft, bitsandbytes does it", choices=lk.FORMATS)
    add("--device", "cpu, cuda, cuda:1, ...; auto is the GPU where there is one")
    add("--threads", "CPU threads (default: torch's own choice)", type=arguments.threads, metavar="N")
    add("--eval-every", "also report the held-out loss every N steps", type=arguments.integer(1), metavar="N")
    add("--save-every", "also save every N steps, not only at the end", type=arguments.integer(1), metavar="N")
    add("--backend", "run the fused ops on this backend only", choices=("auto", *lk.BACKENDS))
    add("--frozen-linears", "also serve linear layers without an adapter (for bf16 on a CPU without it)",
        action="store_true")  # fmt: skip
    add("--peft", "train with stock PEFT instead, for comparison", action="store_true")
    add("--allow-missing", "train even if the model's files lack some of its weights, or have others",
        action="store_true")  # fmt: skip
    add("--resume", "continue the run saved in DIR; its settings are taken over", type=arguments.path, metavar="DIR")
    parser.add_argument("--overwrite", action="store_true", help="write into --out even if it holds files already")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Carry out the command; see ``main`` for the exit status."""
    settings, header = _settings(options)
    out = settings["out"]
    same = options.resume is not None and Path(out).resolve() == Path(options.resume).resolve()
    arguments.output_directory(out, options.overwrite or same, f"continue that run with --resume {out}, or ")
    for name in ("frozen_linears", "backend"):
        if settings["peft"] and settings[name] != _DEFAULTS[name]:
            raise CliError(f"--{name.replace('_', '-')} has no meaning with --peft, which runs PEFT's own code")
    if settings["peft"] and settings["quantize"] not in (None, "nf4", "fp4"):
        raise CliError(f"--quantize {settings['quantize']} with --peft: bitsandbytes has nf4 and fp4 in four bits")
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    device = pick_device(settings["device"])
    with _backend(settings, device):
        try:
            blocks = read_blocks(settings["text"], load_tokenizer(settings["model"]), settings["seq"])
            if header and header["extra"]["data"] != digest(blocks):
                raise CliError(f"{settings['text']} is not the text of the saved run (or its tokenizer changed)")
            model = load_model(
                settings["model"], DTYPES[settings["dtype"]], device, allow_missing=settings["allow_missing"],
                in_4_bits=settings["quantize"] if settings["peft"] else None,
            )  # fmt: skip
            _check_fit(model, blocks)
            if settings["quantize"] and not settings["peft"]:
                print(lk.quantize_(model, settings["quantize"]))
            model = add_adapter(model, settings)
            train, held = split_blocks(blocks)
            trainer = Trainer(model, train, **{name: settings[name] for name in ("batch", "lr", "warmup", "seed")})
            session = _Session(trainer, held, settings, digest(blocks))
            if header:
                trainer.load(Path(options.resume) / STATE_FILE)
                session.held_out = [tuple(pair) for pair in header["extra"]["held_out"]]
            return session.train()
        except StateError as problem:
            raise CliError(str(problem)) from None


def _settings(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The run's settings, and the header of the saved run that it continues, if any."""
    given = {
        name: value
        for name, value in vars(options).items()
        if value is not None and name in (*_DEFAULTS, "model", "text", "out")
    }
    for name in ("model", "text"):  # absolute, so that a resume works from another directory
        if name in given and Path(given[name]).exists():
            given[name] = os.path.abspath(given[name])
    if not options.resume:
        missing = [f"--{name}" for name in ("model", "text", "out") if name not in given]
        if missing:
            raise CliError(f"finetune needs {', '.join(missing)} (or --resume DIR)")
        return {**_DEFAULTS, **given}, None
    if not Path(options.resume).is_dir():
        raise CliError(f"--resume: {options.resume} is not a directory")
    try:
        header = read_header(Path(options.resume) / STATE_FILE)
    except StateError as problem:
        raise CliError(str(problem)) from None
    saved = header["extra"]["settings"]
    for name in _DEFAULTS.keys() - set(_FREE):
        before = saved.get(name, _DEFAULTS[name])
        if name in given and given[name] != before:
            flag = "--" + name.replace("_", "-")
            raise CliError(f"{flag} {given[name]} differs from the {before} of the run to resume")
    settings = {**_DEFAULTS, **saved, "out": options.resume, **given}
    done, evaluated = len(header["losses"]), header["extra"]["held_out"][-1][0]
    if done > settings["steps"] or evaluated == settings["steps"]:
        raise CliError(f"the run in {options.resume} has {done} steps already; give a larger --steps to go on")
    return settings, header


@contextlib.contextmanager
def _backend(settings: dict[str, Any], device: torch.device) -> Iterator[None]:
    """Force one backend for the run, after asking it whether it would serve the run's layers."""
    name = settings["backend"]
    if name == "auto":
        yield
        return
    status = lk.backends()[name]
    if not status.available:
        raise CliError(f"--backend {name} is not available: {status.detail}")
    with lk.use_backend(name):
        like: dict[str, Any] = {"dtype": DTYPES[settings["dtype"]], "device": device}
        x, weight, rank = torch.zeros(1, 8, **like), torch.zeros(8, 8, **like), settings["rank"]
        try:
            lk.why("lora_linear", x, weight, torch.zeros(rank, 8, **like), torch.zeros(8, rank, **like))
        except RuntimeError as problem:
            raise CliError(f"--backend {name}: {first_sentence(problem)}") from None
        yield


def read_blocks(path: str, tokenizer: Any, seq: int) -> Tensor:
    """The text as blocks of ``seq`` tokens [blocks, seq], enough of them to train on and to hold out."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as problem:
        raise CliError(f"{path} is not UTF-8 text: {problem.reason} at byte {problem.start}") from None
    except OSError as problem:
        raise CliError(f"cannot read {path}: {problem.strerror}") from None
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    blocks = pack_tokens(ids, seq)
    if len(blocks) < 2:
        raise CliError(
            f"{path} is too short: {len(ids)} tokens make {len(blocks)} block(s) of --seq {seq}, and training needs at "
            "least 2 (one is held out)"
        )
    return blocks


def _check_fit(model: Any, blocks: Tensor) -> None:
    """The blocks must fit the model's context and vocabulary."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and blocks.shape[1] > limit:
        raise CliError(f"--seq {blocks.shape[1]} is longer than the model's context of {limit}")
    vocabulary = model.get_input_embeddings().num_embeddings
    if blocks.max() >= vocabulary:
        raise CliError(f"the tokenizer produces id {blocks.max()}, but the model's vocabulary ends at {vocabulary - 1}")


# ------------------------------------------------------------------------------------------------------ adapter


def add_adapter(model: nn.Module, settings: dict[str, Any]) -> nn.Module:
    """``model`` with a new adapter that starts from the seed, the same one for fused layers and stock PEFT."""
    targets = ALL_LINEAR if settings["targets"] == [ALL_LINEAR] else settings["targets"]
    if targets != ALL_LINEAR:
        known = linear_names(model)
        unknown = [name for name in targets if name not in known]
        if unknown:
            raise CliError(f"--targets: no linear layer is called {', '.join(unknown)}; there are {', '.join(known)}")
    linears = (module for module in model.modules() if isinstance(module, nn.Linear))
    largest = max((max(linear.in_features, linear.out_features) for linear in linears), default=1)
    if settings["rank"] > largest:
        raise CliError(f"--rank {settings['rank']} is larger than every layer ({largest} features at most)")
    model.requires_grad_(False)
    if settings["peft"]:
        peft = require("peft", "--peft")
        config = peft.LoraConfig(
            r=settings["rank"], lora_alpha=settings["alpha"], lora_dropout=settings["dropout"],
            target_modules=targets, task_type="CAUSAL_LM",
        )  # fmt: skip
        model = peft.get_peft_model(model, config)
    else:
        lk.inject(
            model, target_modules=targets, r=settings["rank"], alpha=settings["alpha"], dropout=settings["dropout"]
        )
        if settings["frozen_linears"]:
            print(lk.patch(model, frozen_linears=True))
    reset_adapter(model, settings["seed"])
    torch.manual_seed(settings["seed"])  # dropout
    return model


@torch.no_grad()
def reset_adapter(model: nn.Module, seed: int) -> None:
    """Draw every lora_A anew as PEFT initialises it, from ``seed`` and the order of the layers alone."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            bound = 1 / math.sqrt(parameter.shape[-1])  # kaiming_uniform_ with a = sqrt(5)
            parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))


# ------------------------------------------------------------------------------------------------------ session


class _Session:
    """One run: trains, reports, saves."""

    def __init__(self, trainer: Trainer, held: Tensor, settings: dict[str, Any], data: str) -> None:
        self.trainer, self.held, self.settings, self.data = trainer, held, settings, data
        self.out = Path(settings["out"])
        self.held_out: list[tuple[int, float]] = []
        self._recent: deque[float] = deque(maxlen=10)

    def train(self) -> int:
        """Run to the last step or to the first Ctrl-C. Returns the exit status."""
        trainer, steps = self.trainer, self.settings["steps"]
        trained = sum(p.numel() for p in trainer.parameters.values())
        packed = "" if self.settings["quantize"] is None else f" over {self.settings['quantize']}"
        print(
            f"{len(trainer.blocks)} training and {len(self.held)} held-out blocks of {self.settings['seq']} tokens; "
            f"{trained:,} trainable parameters; {self.settings['dtype']}{packed} on {trainer.device}, "
            f"{'stock PEFT' if self.settings['peft'] else 'lora_kernels'}"
        )
        first = trainer.done
        with StopRequest() as stop:
            try:
                with progress(steps, "step", first) as display:
                    self._loop(display, stop)
            except TrainingDiverged as problem:
                error(f"{problem}; nothing was saved for this step")
                return 1
            if trainer.done == 0:
                print("interrupted before the first step; there is nothing to save", file=sys.stderr)
                return 128 + stop.signal
            if not self.save():
                return 1
        if stop():
            print(
                f"interrupted at step {trainer.done} of {steps}; adapter and trainer state are saved in {self.out}\n"
                f"continue with: lora-kernels finetune --resume {self.out}",
                file=sys.stderr,
            )
            return 128 + stop.signal
        (_, before), (_, after) = self.held_out[0], self.held_out[-1]
        print(f"held-out loss {before:.4f} -> {after:.4f}")
        if not self.settings["peft"]:
            print("\n".join(counters()))
        print(f"adapter saved in {self.out}")
        return 0

    def _loop(self, display: Progress, stop: StopRequest) -> None:
        trainer, settings = self.trainer, self.settings
        while not stop():
            if self._due() and not self._evaluate(display, stop):
                return
            if trainer.done >= settings["steps"]:
                return
            start = time.perf_counter()
            loss = trainer.step()
            self._recent.append(time.perf_counter() - start)
            rate = settings["batch"] * settings["seq"] * len(self._recent) / sum(self._recent)
            display.update(trainer.done, f"loss {loss:.4f}  {rate:,.0f} tokens/s")
            if settings["save_every"] and trainer.done % settings["save_every"] == 0:
                self.save()

    def _due(self) -> bool:
        """Whether the held-out loss of the current step is wanted and missing."""
        done, every = self.trainer.done, self.settings["eval_every"]
        wanted = done in (0, self.settings["steps"]) or (every and done % every == 0)
        return bool(wanted) and not any(step == done for step, _ in self.held_out)

    def _evaluate(self, display: Progress, stop: StopRequest) -> bool:
        """Record the held-out loss; False if a stop was asked for on the way."""
        loss = held_out_loss(self.trainer.model, self.held, self.settings["batch"], self.trainer.device, stop)
        if loss is None:
            return False
        self.held_out.append((self.trainer.done, loss))
        display.note(f"step {self.trainer.done}: held-out loss {loss:.4f}")
        return True

    def save(self) -> bool:
        """Write state, adapter and log, all replaced or none. Returns False, with a message, if that failed."""
        extra = {"settings": self.settings, "held_out": self.held_out, "data": self.data}
        log = {"losses": self.trainer.losses, "held_out": self.held_out, "settings": self.settings}
        try:
            with replacing(self.out) as staged:
                self.trainer.save(staged / STATE_FILE, extra)
                lk.save_adapter(self.trainer.model, staged)
                (staged / LOG_FILE).write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
        except OSError as problem:
            error(f"could not save to {self.out}: {first_sentence(problem)}; what was saved there before is untouched")
            return False
        return True
