"""``lora_linear`` for a layer whose weights are spread over processes: arguments are checked here, then computed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import dispatch
from ..ops import lora_linear as _op
from ..ops.tensor_parallel import column_parallel, row_parallel
from .lora import arguments_of_call


def lora_linear_of_shards(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, scaling: float | Tensor,
    dropout_p: float, training: bool, by_rows: bool, group: Any,
) -> Tensor:  # fmt: skip
    """What ``lora_linear`` gives for the whole layer, from this process's shards; every process of the group calls.

    A seed is drawn from each process's own generator, as the mask of ``nn.Dropout`` is: by columns, where all
    processes have the same x, their generators must be in the same state for the masks to be one.

    Args:
        x: [..., in_features], the same in all processes; by rows [..., in_features / processes].
        weight: [out_features / processes, in_features]; by rows [out_features, in_features / processes].
        lora_A: [rank, in_features], the same in all processes; by rows [rank, in_features / processes].
        lora_B: [out_features / processes, rank]; by rows [out_features, rank], the same in all processes.
        bias: [out_features / processes]; by rows [out_features], the same in all processes, and added once.
        group: the ``ProcessGroup`` over which the layer is spread.

    Returns:
        [..., out_features / processes]; by rows [..., out_features].
    """
    args = arguments_of_call(x, weight, lora_A, lora_B, bias, scaling, dropout_p, training, None)
    if dispatch.any_autocast() and dispatch.autocast_enabled(x.device.type):
        args = dispatch.autocast_args(_op.SPEC, x.device.type, args)
    return (row_parallel if by_rows else column_parallel)(args, group)
