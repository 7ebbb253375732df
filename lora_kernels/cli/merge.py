"""``lora-kernels merge``: fold an adapter into its base model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_kernels as lk

from ..adapters.files import replacing
from ..text import first_sentence
from . import _arguments as arguments
from ._console import CliError, error
from ._models import DTYPES, load_model, load_tokenizer

_CHECK_TOKENS = 64
_LOGITS_LIMIT = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Allowed relative difference of the logits: rounding the merged weight to 16 bits moves them."""


def add_parser(commands: Any) -> None:
    """Add the subcommand to the main parser."""
    parser = commands.add_parser(
        "merge",
        help="fold an adapter into its base model",
        description="Add an adapter to the weights of its base model (W += scaling * B A) and save a plain model, "
        "which transformers loads like any other and which runs without added latency.",
    )
    arguments.add_model_and_adapter(parser)
    parser.add_argument(
        "--out", required=True, type=arguments.path, metavar="DIR", help="where to write the merged model"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="dtype to load, merge and save in; auto keeps the base model's (default: %(default)s)",
    )
    parser.add_argument(
        "--untie",
        action="store_true",
        help="give a layer whose weight another one shares (a tied output head) a weight of its own; without this an "
        "adapter on such a layer is refused",
    )
    parser.add_argument(
        "--allow-missing", action="store_true", help="merge even if the base model's files lack weights, or have others"
    )
    parser.add_argument("--check", action="store_true", help="load the result and compare its logits before keeping it")
    parser.add_argument("--overwrite", action="store_true", help="write into --out even if it holds files already")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Carry out the command; see ``main`` for the exit status."""
    out = arguments.output_directory(options.out, options.overwrite)
    device = torch.device("cpu")
    dtype = DTYPES.get(options.dtype, options.dtype)
    model = load_model(options.model, dtype, device, allow_missing=options.allow_missing)
    try:
        tokenizer = load_tokenizer(options.model)
    except CliError:
        tokenizer = None
        print(f"{options.model} has no tokenizer that loads; none is saved with the merged model")
    try:
        lk.load_adapter(model, options.adapter)
        layers = sum(isinstance(module, lk.LoRALinear) for module in model.modules())
        tokens = _check_tokens(model)
        expected = _logits(model, tokens) if options.check else None
        lost = lk.merge_adapter(model, untie=options.untie, unload=True)
        if lost:
            costs = sorted(lost.values())
            print(
                f"{len(lost)} quantised weights were quantised again: that has changed them by "
                f"{costs[len(costs) // 2]:.2f} (median; {costs[-1]:.2f} at most) of what the adapter adds"
            )
            if options.check:  # what is saved is to be what was merged
                expected = _packed_logits(model, tokens)
    except (ValueError, OSError) as problem:
        raise CliError(str(problem).replace("pass untie=True", "pass --untie")) from None
    try:
        _write(model, tokenizer, out, tokens, expected, lost)
    except _ComputesSomethingElse:
        error("the merged model does not compute what base and adapter compute; it was not kept")
        return 1
    except OSError as problem:
        error(f"could not save to {out}: {first_sentence(problem)}")
        return 1
    kind = "quantised" if lost else f"plain {str(model.dtype).removeprefix('torch.')}"
    print(f"merged {layers} layers; {kind} model saved in {out}")
    return 0


class _ComputesSomethingElse(Exception):
    pass


def _write(
    model: Any, tokenizer: Any, out: Path, tokens: Tensor, expected: Tensor | None, lost: dict[str, float]
) -> None:
    """Save beside the final place, check, then put all files there."""
    with replacing(out) as staged:
        # transformers cannot undo how it has loaded a packed checkpoint; its own names for the weights are as good.
        options = {"save_original_format": False} if getattr(model, "is_quantized", False) else {}
        model.save_pretrained(staged, **options)
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        if expected is not None:
            loaded = load_model(str(staged), model.dtype, tokens.device)
            logits = _packed_logits(loaded, tokens) if lost else _logits(loaded, tokens)
            difference = ((logits - expected).abs().max() / expected.abs().max()).item()
            limit = _LOGITS_LIMIT[model.dtype]
            print(f"logits, merged against base + adapter: relative difference {difference:.2e} (limit {limit:g})")
            if not difference <= limit:
                raise _ComputesSomethingElse


def _check_tokens(model: Any) -> Tensor:
    """Random tokens from the whole vocabulary [1, tokens]."""
    vocabulary = model.get_input_embeddings().num_embeddings
    length = min(_CHECK_TOKENS, getattr(model.config, "max_position_embeddings", _CHECK_TOKENS))
    return torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, use_cache=False).logits.float()


def _packed_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits from the packed weights as they are: bitsandbytes repacks them in eval mode on some CPUs, with a loss."""
    lk.patch(model, frozen_linears=True)
    try:
        return _logits(model, tokens)
    finally:
        lk.unpatch(model)
