"""The training loop behind ``finetune`` and the demo: data, steps, held-out loss, and state that can be resumed."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..adapters.files import reading

STATE_FILE = "trainer_state.safetensors"
_STATE_VERSION = 1
_HELD_OUT_SHARE = 10
_HELD_OUT_MAX = 16


class TrainingDiverged(RuntimeError):
    """The loss is no longer a finite number."""


class StateError(RuntimeError):
    """A saved trainer state cannot be read or does not fit."""


# ------------------------------------------------------------------------------------------------------- data


def pack_tokens(ids: list[int], seq: int) -> Tensor:
    """``ids`` cut into rows of ``seq`` tokens [blocks, seq]; a shorter rest is dropped."""
    count = len(ids) // seq
    return torch.tensor(ids[: count * seq], dtype=torch.long).view(count, seq)


def split_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """``(train, held_out)``: the last tenth of the text, at least one block and at most 16, is held out."""
    held = min(_HELD_OUT_MAX, max(1, len(blocks) // _HELD_OUT_SHARE))
    return blocks[:-held], blocks[-held:]


def digest(blocks: Tensor) -> str:
    """A short fingerprint of the data, to notice a resume on another text."""
    return hashlib.sha256(blocks.numpy().tobytes()).hexdigest()[:16]


@functools.lru_cache(maxsize=4)
def _epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch))


def batch_at(blocks: Tensor, step: int, batch: int, seed: int) -> Tensor:
    """The batch of ``step``: shuffled per epoch by the seed alone, so that a resume needs no state of the data."""
    rows = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, index = divmod(position, len(blocks))
        rows.append(blocks[_epoch_order(len(blocks), seed, epoch)[index]])
    return torch.stack(rows)


# ------------------------------------------------------------------------------------------------------- loss


def language_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean next-token cross-entropy of a transformers causal language model over ``tokens`` [batch, seq]."""
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


@torch.no_grad()
def held_out_loss(
    model: nn.Module, blocks: Tensor, batch: int, device: torch.device, stop: Callable[[], bool] = lambda: False
) -> float | None:
    """Mean loss per token over ``blocks`` without dropout; None if ``stop()`` became true on the way."""
    training = model.training
    model.eval()
    total = 0.0
    try:
        for part in blocks.split(batch):
            if stop():
                return None
            total += language_loss(model, part.to(device)).item() * len(part)
    finally:
        model.train(training)
    return total / len(blocks)


# -------------------------------------------------------------------------------------------------------- loop


class Trainer:
    """AdamW on the parameters of ``model`` that require gradients: linear warm-up, then a constant rate.

    Args:
        model: a causal language model whose base is frozen.
        blocks: the training data [blocks, seq].
        batch: blocks per step.
        lr: learning rate after warm-up.
        warmup: steps over which the rate rises to ``lr``.
        seed: seed of the data order.
    """

    def __init__(self, model: nn.Module, blocks: Tensor, *, batch: int, lr: float, warmup: int, seed: int) -> None:
        self.model, self.blocks = model, blocks
        self.batch, self.lr, self.warmup, self.seed = batch, lr, warmup, seed
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.device = next(iter(self.parameters.values())).device
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=lr, weight_decay=0.0)
        self.losses: list[float] = []

    @property
    def done(self) -> int:
        """Number of completed steps."""
        return len(self.losses)

    def step(self) -> float:
        """Run one step and return its loss.

        Raises:
            TrainingDiverged: the loss is not finite; parameters are left as they were.
        """
        self.model.train()
        tokens = batch_at(self.blocks, self.done, self.batch, self.seed).to(self.device)
        loss = language_loss(self.model, tokens)
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingDiverged(f"the loss became {value} at step {self.done + 1}; try a lower learning rate")
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, (self.done + 1) / max(1, self.warmup))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(value)
        return value

    def save(self, path: Path, extra: dict[str, Any]) -> None:
        """Write everything that a resume needs as one new file.

        Parameters, optimizer moments and random state are tensors; losses and ``extra`` are JSON in the header.
        """
        tensors = {"rng.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        for name, parameter in self.parameters.items():
            tensors[f"parameter.{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}.{name}"] = value.detach()
        header = {"version": _STATE_VERSION, "losses": self.losses, "extra": extra}
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, path, metadata={"trainer": json.dumps(header)})

    def load(self, path: Path) -> None:
        """Continue from a state that ``save`` wrote.

        Raises:
            StateError: the file is damaged, or its parameters are not this model's.
        """
        header = read_header(path)
        try:
            with _opened(path) as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        except (OSError, SafetensorError) as error:
            raise StateError(f"{path} is damaged: {error}") from None
        saved = {name: tensor.shape for name, tensor in tensors.items() if name.startswith("parameter.")}
        if saved != {f"parameter.{name}": p.shape for name, p in self.parameters.items()}:
            raise StateError(f"{path} is of another model or adapter: parameter names or shapes differ")
        needed = {"rng.cpu"}
        if header["losses"]:
            needed |= {f"{key}.{name}" for name in self.parameters for key in ("step", "exp_avg", "exp_avg_sq")}
        if needed - tensors.keys():
            raise StateError(f"{path} is damaged: {min(needed - tensors.keys())} is missing")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"parameter.{name}"])
                if not header["losses"]:
                    continue
                # AdamW keeps its step count on the CPU whatever the parameter's device.
                self.optimizer.state[parameter] = {
                    "step": tensors[f"step.{name}"],
                    "exp_avg": tensors[f"exp_avg.{name}"].to(parameter.device),
                    "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(parameter.device),
                }
        self.losses = list(header["losses"])
        torch.set_rng_state(tensors["rng.cpu"])
        if self.device.type == "cuda" and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)


def read_header(path: Path) -> dict[str, Any]:
    """``{"losses": [...], "extra": {...}}`` of a state file, without reading its tensors.

    Raises:
        StateError: there is no such file, or it is not a trainer state.
    """
    try:
        with _opened(path) as file:
            header = json.loads((file.metadata() or {})["trainer"])
    except FileNotFoundError:
        raise StateError(f"there is no {path.name} in {path.parent}: nothing to resume") from None
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise StateError(f"{path} is damaged or not a trainer state: {error}") from None
    if not isinstance(header, dict):
        raise StateError(f"{path} is damaged or not a trainer state: its header is a {type(header).__name__}")
    if header.get("version") != _STATE_VERSION:
        raise StateError(f"{path} has version {header.get('version')}, expected {_STATE_VERSION}")
    if not isinstance(header.get("losses"), list) or not _is_complete(header.get("extra")):
        raise StateError(f"{path} is damaged: its header lacks what a resume needs")
    return header


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    with reading(path.parent) as locate, safe_open(locate(path.name), framework="pt") as file:
        yield file


def _is_complete(extra: Any) -> bool:
    """Whether ``extra`` is what a run saves: its settings, (step, held-out loss) pairs and the data's digest."""
    if not isinstance(extra, dict) or not {"settings", "held_out", "data"} <= extra.keys():
        return False
    settings, pairs = extra["settings"], extra["held_out"]
    return (
        isinstance(settings, dict)
        and all(isinstance(settings.get(name), str) for name in ("model", "text"))
        and isinstance(pairs, list)
        and len(pairs) > 0
        and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)
    )


# ----------------------------------------------------------------------------------------------------- signals


class StopRequest:
    """Turns the first Ctrl-C (or SIGTERM) into a flag that the loop checks; a second one acts as usual."""

    def __init__(self) -> None:
        self.signal: Any = None
        """Its number, once there was one."""
        self._previous: dict[int, Any] = {}

    def __call__(self) -> bool:
        """Whether a stop was asked for."""
        return self.signal is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        self._restore()

    def _handle(self, number: int, frame: object) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
