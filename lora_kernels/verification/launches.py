"""Every kernel, forward and backward, at sizes that lead to each kind of launch: what a sanitizer is run over.

``python -m lora_kernels.verification.launches`` prints a line per call: what served it, and that its results are
finite. A call that a backend refuses is printed with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..functional.lora import lora_linear
from ..functional.why import why
from ..modules.prefix import PrefixEncoder
from ..modules.prompt import PromptEmbedding
from ..support import cuda, winners
from .results import SEED


class Launch(NamedTuple):
    """One call, forward and backward."""

    name: str
    run: Callable[[], list[Tensor]]
    """Returns every result."""
    choose: Callable[[], dispatch.Choice]
    """What dispatch chooses for its forward."""


SMALL = {
    "decode": (1, 72, 136, 4),
    "decode, depth split": (3, 136, 1032, 16),
    "one tile column": (77, 33, 264, 12),
    "few rows": (40, 200, 520, 16),
    "ranks in one tile": (150, 264, 136, 16),
    "ranks in a wide tile": (150, 264, 136, 24),
    "ranks in two tiles": (140, 140, 72, 100),
    "ragged": (70, 75, 67, 5),
}
"""rows, columns, depth and rank."""
DTYPES = ((torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float16))


def lora_launches(device: torch.device) -> Iterator[Launch]:
    """A layer of each size in each dtype, every other one under dropout."""
    for i, (name, (m, n, k, rank)) in enumerate(SMALL.items()):
        for j, (dtype, adapter_dtype) in enumerate((*DTYPES, (torch.float32, torch.float32))):
            p = 0.3 * ((i + j) % 2)

            def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
                return torch.randn(shape, device=device).to(dtype)

            x, weight, bias, grad_y = random(m, k), random(n, k), random(n), random(m, n)
            lora_A, lora_B = random(rank, k, dtype=adapter_dtype), random(n, rank, dtype=adapter_dtype)
            leaves = [t.requires_grad_() for t in (x, lora_A, lora_B)]
            args: tuple[Any, ...] = (x, weight, lora_A, lora_B, bias)
            options: dict[str, Any] = {"scaling": 0.7, "dropout_p": p, "training": p > 0, "seed": SEED}

            def run(
                args: tuple = args, options: dict = options, leaves: list[Tensor] = leaves, grad_y: Tensor = grad_y
            ) -> list[Tensor]:
                with torch.no_grad():
                    inferred = lora_linear(*args, **options)
                y = lora_linear(*args, **options)
                return [inferred, y, *torch.autograd.grad(y, leaves, grad_y)]

            def choose(args: tuple = args, options: dict = options) -> dispatch.Choice:
                return why("lora_linear", *args, **options)

            kind = f"{str(dtype).removeprefix('torch.')}, adapter {str(adapter_dtype).removeprefix('torch.')}"
            yield Launch(f"lora, {name}: {m}x{n}x{k}, r={rank}, {kind}, dropout {p:g}", run, choose)


def prompt_launches(device: torch.device) -> Iterator[Launch]:
    """A prompt in front of texts on either side, a multitask one, and a prefix."""
    batch, tokens, rows, hidden, vocabulary = 3, 37, 5, 72, 50
    ids = torch.randint(vocabulary, (batch, tokens), device=device)
    mask = (torch.rand(batch, tokens, device=device) > 0.3).long()
    tasks = torch.arange(batch, device=device) % 2
    for dtype in (torch.bfloat16, torch.float32):
        table = torch.randn(vocabulary, hidden, device=device).to(dtype)
        for side, task_ids in (("right", None), ("left", None), ("left", tasks)):
            prompt = PromptEmbedding(rows, hidden, tasks=None if task_ids is None else 2, device=device)
            given = {"attention_mask": mask, "labels": ids, "task_ids": task_ids, "padding_side": side}

            def run(
                prompt: PromptEmbedding = prompt, table: Tensor = table, given: dict[str, Any] = given
            ) -> list[Tensor]:
                made = prompt(ids, table, **given)
                gradients = torch.autograd.grad(made.inputs_embeds.float().square().sum(), list(prompt.parameters()))
                return [*made, *gradients]

            def choose(
                prompt: PromptEmbedding = prompt, table: Tensor = table, given: dict[str, Any] = given
            ) -> dispatch.Choice:
                return why("prompt_embedding", ids, table, prompt.prompt(), **given)

            what = "prompt" if task_ids is None else "prompts of two tasks"
            yield Launch(f"{what}, padding on the {side}, {str(dtype).removeprefix('torch.')}", run, choose)
        prefix = PrefixEncoder(rows, 3, 2, 20, device=device)

        def run_prefix(prefix: PrefixEncoder = prefix, dtype: torch.dtype = dtype) -> list[Tensor]:
            made = [t for pair in prefix(batch, dtype=dtype, copies=True) for t in pair]
            squares = torch.stack([t.float().square().sum() for t in made])
            return [*made, *torch.autograd.grad(squares.sum(), list(prefix.parameters()))]

        def choose_prefix(prefix: PrefixEncoder = prefix, dtype: torch.dtype = dtype) -> dispatch.Choice:
            return why("prefix_kv", prefix.prefix(), 3, 2, batch_size=batch, dtype=dtype)

        yield Launch(f"prefix, {str(dtype).removeprefix('torch.')}", run_prefix, choose_prefix)


@contextlib.contextmanager
def served_by(backend: str) -> Iterator[None]:
    """Calls, and the backward of each, take one of ``winners.CANDIDATES``."""
    name, _, schedule = backend.partition(", ")
    with dispatch.use_backend(name), cuda.use_schedule(schedule or "auto"):
        yield


def is_refusal(error: RuntimeError) -> bool:
    """Whether a backend that was asked for does not serve a call."""
    return "cannot serve this call" in str(error)


def run(device: torch.device, backends: Sequence[str]) -> int:
    """Runs them all on each backend, prints a line for each, and returns how many gave a result that is not finite."""
    bad = 0
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        for backend in backends:
            torch.manual_seed(SEED)
            for launch in (*lora_launches(device), *prompt_launches(device)):
                with served_by(backend):
                    try:
                        choice = launch.choose()
                        results = launch.run()
                    except RuntimeError as error:
                        if not is_refusal(error):
                            raise
                        print(f"-  {launch.name}: {str(error).partition('cannot serve this call: ')[2]}", flush=True)
                        continue
                finite = all(bool(t.isfinite().all()) for t in results)
                bad += not finite
                print(f"{'ok' if finite else 'NOT FINITE'}  {launch.name}: {backend}, {choice.schedule}", flush=True)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    return bad


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 if a result is not finite."""
    parser = argparse.ArgumentParser(prog="python -m lora_kernels.verification.launches", description=__doc__)
    parser.add_argument("--device", default="cuda", help="(default: %(default)s)")
    options = parser.parse_args(argv)
    device, status = torch.device(options.device), dispatch.backends()
    names = winners.candidates(device) if device.type == "cuda" else ("cpu",)
    return 1 if run(device, [name for name in names if status[name.partition(", ")[0]].available]) else 0


if __name__ == "__main__":
    sys.exit(main())
