"""The two halves of ``multi_lora_linear``'s branch, each launched by itself: kernels of ``multi_lora_linear.py``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lora_kernels import philox

from .adapter_pools import Order, Pools, order_launch, pools_of
from .launching import Launch, device_of, on_device, run_all
from .lora_linear import Matrix, matrix_of
from .multi_lora_linear import BranchTask, branch_launches, row_launches


def shrink(
    schedule: str, x: Tensor, lora_A: Tensor, adapter_ids: Tensor, ranks: Tensor | None, order: Tensor | None,
    ends: Tensor | None,
) -> Tensor:  # fmt: skip
    """The op ``multi_lora_shrink``: s [..., rank], in x's dtype, zeros where no adapter has ranks."""
    rows = x.reshape(-1, x.shape[-1])
    s = x.new_zeros((len(rows), lora_A.shape[1]))
    if len(rows) > 0:
        task, pools = shrink_operands(s, rows, lora_A, ranks)
        _run(0, schedule, x, task, pools, adapter_ids, order, ends)
    return s.view(*x.shape[:-1], lora_A.shape[1])


def expand(
    schedule: str, y: Tensor, s: Tensor, lora_B: Tensor, adapter_ids: Tensor, ranks: Tensor | None,
    scalings: Tensor | None, scaling: float, order: Tensor | None, ends: Tensor | None,
) -> None:  # fmt: skip
    """The op ``multi_lora_expand_``: the branch is added to y."""
    rows = y.view(-1, y.shape[-1])
    if len(rows) > 0:
        task, pools = expand_operands(rows, s.reshape(-1, s.shape[-1]), lora_B, ranks, scalings, scaling)
        _run(1, schedule, y, task, pools, adapter_ids, order, ends)


def shrink_operands(s: Tensor, x: Tensor, lora_A: Tensor, ranks: Tensor | None) -> tuple[BranchTask, Pools]:
    """Of a branch whose ``inner`` is s. What is said of its ``out`` is x's, so that tiles are those of a square layer's
    rows; nothing reads or writes it.
    """
    down, like_x = matrix_of(lora_A[0].t()), matrix_of(x)
    task = _task(p=like_x, down=down, up=down, out=like_x, inner=matrix_of(s), scaling=1.0, rank=lora_A.shape[1])
    return task, pools_of(lora_A, lora_A, ranks, None)


def expand_operands(
    y: Tensor, s: Tensor, lora_B: Tensor, ranks: Tensor | None, scalings: Tensor | None, scaling: float
) -> tuple[BranchTask, Pools]:
    """Of a branch whose ``inner`` is there; what is said of its p is y's."""
    up, like_y = matrix_of(lora_B[0].t()), matrix_of(y)
    task = _task(p=like_y, down=up, up=up, out=like_y, inner=matrix_of(s), scaling=scaling, rank=lora_B.shape[2])
    return task, pools_of(lora_B, lora_B, ranks, scalings)


def _task(*, p: Matrix, down: Matrix, up: Matrix, out: Matrix, inner: Matrix, scaling: float, rank: int) -> BranchTask:
    return BranchTask(
        p=p, down=down, up=up, out=out, inner=inner, seed=None, threshold=philox.keep_threshold(0.0),
        keep_scale=philox.keep_scale(0.0), scaling=scaling, depth=p.data.shape[1], columns=out.data.shape[1], rank=rank,
    )  # fmt: skip


def _run(
    half: int, schedule: str, like: Tensor, task: BranchTask, pools: Pools, adapter_ids: Tensor, order: Tensor | None,
    ends: Tensor | None,
) -> None:  # fmt: skip
    """The first or second launch of a branch, behind that of the order where it is needed and not given."""
    ids = adapter_ids.contiguous()
    with on_device(like):
        if schedule == "by row":
            return run_all([row_launches(task, pools, ids)[half]], like.device)
        launches: list[Launch] = []
        if order is None or ends is None:
            known, look_up = order_launch(ids, pools.count)
            launches.append(look_up)
        else:
            known = Order(order.contiguous(), ends.contiguous())
        device: Any = device_of(like.device)  # of a GPU that ``supports`` has seen
        launches.append(branch_launches(device, task, pools, known, drops="p")[half])
        run_all(launches, like.device)
