"""The problem of ``prompt_embedding`` and its gradients."""

from __future__ import annotations

import argparse
from typing import Any

from ...support.cuda import MAX_SIZE
from .. import _arguments as arguments
from ._planned_ops import register


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    size, positive = arguments.integer(0, MAX_SIZE), arguments.integer(1, MAX_SIZE)
    parser.add_argument("--batch", type=size, required=True, help="samples")
    parser.add_argument("--tokens", type=size, required=True, help="tokens of a sample, without the prompt")
    parser.add_argument("--prompt-rows", type=size, required=True, help="rows of the prompt")
    parser.add_argument("--hidden", type=positive, required=True, help="columns of the embeddings")
    parser.add_argument("--tasks", type=positive, default=1, help="prompts to choose from (default: 1)")
    parser.add_argument("--vocabulary", type=size, default=0, help="rows of the table of embeddings (default: 0)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), required=True, help="of the embeddings")
    parser.add_argument("--unaligned", action="store_true", help="rows of the tensors do not begin at 16 bytes")


def _add_forward_arguments(parser: argparse.ArgumentParser) -> None:
    _add_arguments(parser)
    parser.add_argument("--left", action="store_true", help="pads are on the left, as an attention mask says")


def _add_backward_arguments(parser: argparse.ArgumentParser) -> None:
    _add_arguments(parser)
    parser.add_argument("--weight", action="store_true", help="the table of embeddings trains, too")
    parser.add_argument("--embeds", action="store_true", help="the gradient of inputs_embeds is wanted, too")


def _problem(options: argparse.Namespace) -> dict[str, Any]:
    backward = options.op == "prompt_embedding_backward"
    sizes = ("dtype", "batch", "tokens", "prompt_rows", "hidden", "tasks", "vocabulary")
    return {
        **{name: getattr(options, name) for name in sizes},
        "rows_aligned": not options.unaligned,
        "need_prompt": True,
        "need_weight": backward and options.weight,
        "need_embeds": backward and options.embeds,
        "looks_for_tokens": not backward and options.left,
    }


register("prompt_embedding", _add_forward_arguments, _problem)
register("prompt_embedding_backward", _add_backward_arguments, _problem)
