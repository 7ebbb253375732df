"""Operands that do not fit are refused before a kernel is launched from Python, as the extensions refuse them."""

from __future__ import annotations

import misfits
import pytest
import torch

from lora_kernels import dispatch
from lora_kernels.support import fits, pools_fit

BATCH, TOKENS, ROWS, HIDDEN, TASKS = 3, 5, 2, 8, 4
ON_META = "tensors are on several devices"


def triton(op):
    """What computes an op by Triton kernels. None is reached here, so that Triton need not be installed."""
    return dispatch.specs()[op].kernels["triton"].run


@pytest.mark.parametrize("rows", [1, misfits.M])
def test_lora_linear(rows):
    for name in misfits.FORWARD:
        with pytest.raises(RuntimeError, match=misfits.message(name)):
            triton("lora_linear")("", *misfits.lora_linear(name, rows, torch.bfloat16))
    for name in misfits.BACKWARD:
        with pytest.raises(RuntimeError, match=misfits.message(name)):
            triton("lora_linear_backward")("", *misfits.lora_linear_backward(name, rows, torch.bfloat16))


@pytest.mark.parametrize("lead", [(), (7,), (2, 3)], ids=str)
def test_lora_linear_of_operands_that_fit(lead):
    x, grad_y, s = (torch.randn(*lead, columns) for columns in (8, 6, 2))
    weight, lora_A, lora_B, bias, seed = *map(torch.randn, ((6, 8), (2, 8), (6, 2), (6,))), torch.tensor([1])
    fits.check_lora_linear(x, weight, lora_A, lora_B, bias, seed)
    fits.check_lora_linear(x, weight, lora_A, lora_B, None, None)
    fits.check_lora_linear_backward(grad_y, x, s, weight, lora_A, lora_B, seed)


def test_lora_linear_of_other_dtypes_devices_and_ranks():
    x, weight, lora_A, lora_B = torch.randn(7, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    grad_y, s, bias, seed = torch.randn(7, 6), torch.randn(7, 2), torch.randn(6), torch.tensor([1])
    forward, backward = (x, weight, lora_A, lora_B, bias, seed), (grad_y, x, s, weight, lora_A, lora_B, seed)
    named = {"weight": weight, "lora_A": lora_A, "lora_B": lora_B, "seed": seed}
    for check, args, tensors in (
        (fits.check_lora_linear, forward, {**named, "bias": bias}),
        (fits.check_lora_linear_backward, backward, {**named, "grad_y": grad_y, "s": s}),
    ):
        for name, tensor in tensors.items():
            with pytest.raises(RuntimeError, match=f"{name} must be on x's device"):
                check(*misfits.elsewhere(args, tensor))
            other = [t.half() if t is tensor else t for t in args]
            with pytest.raises(RuntimeError, match=r"must (have|be one int64)"):
                check(*other)
    with pytest.raises(RuntimeError, match=r"lora_A must be .* rank of at least 1"):
        fits.check_lora_linear(x, weight, lora_A[:0], lora_B[:, :0], None, None)


def test_dropout_mask():
    with pytest.raises(RuntimeError, match="seed must be one int64 number"):
        triton("dropout_mask")("", torch.tensor([1, 2]), 3, 8, 0.5)


def test_halves_of_the_branch_of_no_ranks():
    """Kills: a pool that is only looked at where x's columns are."""
    x, ids = torch.randn(3, 8), torch.zeros(3, dtype=torch.int64)
    pools_fit.check_multi_lora_shrink(x, torch.randn(2, 1, 8), ids, None, None, None)
    with pytest.raises(RuntimeError, match="with adapters and ranks"):
        pools_fit.check_multi_lora_shrink(x, torch.randn(2, 0, 8), ids, None, None, None)
    pools_fit.check_multi_lora_expand(x, x[:, :1], torch.randn(2, 8, 1), ids, None, None, 1.0, None, None)
    with pytest.raises(RuntimeError, match="with adapters and ranks"):
        pools_fit.check_multi_lora_expand(x, x[:, :0], torch.randn(2, 8, 0), ids, None, None, 1.0, None, None)


def prompt_arguments():
    """Of ``prompt_embedding``, with everything optional; then the name of each tensor."""
    ids, mask = torch.zeros(BATCH, TOKENS, dtype=torch.int64), torch.ones(BATCH, TOKENS)
    per_sample = torch.zeros(BATCH, dtype=torch.int64)
    prompt, weight = torch.randn(TASKS, ROWS, HIDDEN), torch.randn(9, HIDDEN)
    return [prompt, ids, weight, None, mask, ids.clone(), per_sample, per_sample.clone(), False]


@pytest.mark.parametrize("position", [1, 2, 4, 5, 6, 7])
def test_prompt_embedding(position):
    args = prompt_arguments()
    fits.check_prompt_embedding(*args[:8])
    with pytest.raises(RuntimeError, match=ON_META):
        triton("prompt_embedding")("", *misfits.elsewhere(args, args[position]))
    args[position] = args[position][..., :-1]
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        triton("prompt_embedding")("", *args)


def test_prompt_embedding_with_tasks_for_one_prompt():
    args = prompt_arguments()
    args[0] = args[0][0]
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        triton("prompt_embedding")("", *args)


@pytest.mark.parametrize("position", [1, 2, 3])
def test_prompt_embedding_backward(position):
    ids, tasks = torch.zeros(BATCH, TOKENS, dtype=torch.int64), torch.zeros(BATCH, dtype=torch.int64)
    grad, layout = torch.randn(BATCH, ROWS + TOKENS, HIDDEN), torch.zeros(BATCH, 3, dtype=torch.int64)
    args = [grad, layout, ids, tasks, TASKS, ROWS, torch.float32, 9, True, True, True]
    fits.check_prompt_embedding_backward(*args[:4], ROWS, True)
    run = triton("prompt_embedding_backward")
    with pytest.raises(RuntimeError, match=ON_META):
        run("", *misfits.elsewhere(args, args[position]))
    args[position] = args[position][..., :-1]
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run("", *args)
    args[2], args[3] = None, tasks
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run("", *args)


def test_prefix_kv():
    fits.check_prefix_kv(torch.randn(5, 24), 2, 3, 1)
    for sizes in ((2, 5, 1), (0, 3, 1), (2, 0, 1), (2, 3, -1)):
        with pytest.raises(RuntimeError, match="prefix_kv: shapes do not fit"):
            triton("prefix_kv")("", torch.randn(5, 24), *sizes, False, torch.float32)
    grad = torch.randn(1, 2, 4, 2)
    fits.check_prefix_kv_backward([grad, grad])
    for other in (grad.half(), grad[..., :1], grad.to("meta")):
        with pytest.raises(RuntimeError, match="differ in shape, dtype or device"):
            triton("prefix_kv_backward")("", [grad, other], torch.float32)
