"""The Triton kernels of prompt embedding in Triton's interpreter, on the CPU. Run by test_triton_prompt_embedding.py.

The interpreter rounds to bfloat16 wrongly and compares it as integers (Triton 3.8): here bfloat16 is copied only.
"""

from __future__ import annotations

import naive_prompt
import pytest
import torch
from covering import case_id, covering_pairs
from naive_prompt import BATCH, BF16, FP16, FP32, FP64, ROWS, TOKENS, VOCABULARY, Problem, call, make, trainable
from poisoned import by_triton, memory_of_nan  # noqa: F401
from touched_memory import memory_of_tensors  # noqa: F401

import lora_kernels as lk
from lora_kernels.triton_kernels import configs, prompt_embedding

SERVED = {("prompt_embedding", "triton"), ("prompt_embedding_backward", "triton")}


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles and scans smaller than even the tests' problems, so that there are several of each."""
    for name in ("copy_tile", "sum_tile"):
        monkeypatch.setattr(configs, name, lambda hidden, element_size: configs.RowTile(4, 8, 4))
    monkeypatch.setattr(prompt_embedding, "_SCAN", 4)


def detached(problem):
    return Problem(*(None if t is None else t.detach() for t in problem))


def assert_same(ours, expected):
    for name, a, b in zip(lk.PromptEmbeddingOutput._fields, ours, expected):
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype, name
            assert torch.equal(a, b), name


def check(problem, padding_side, grad_of=torch.randn_like, views=None):
    """Outputs and gradients, equal bit for bit to the definition; returns them."""
    live, leaves = trainable(problem)
    plain = detached(live)
    expected = naive_prompt.forward(plain, padding_side)
    ours = call(live if views is None else views(live), padding_side)
    assert_same(ours, expected)
    grad = grad_of(expected[0])
    exact = naive_prompt.backward(plain, padding_side, grad)
    gradients = torch.autograd.grad(ours.inputs_embeds, list(leaves.values()), grad)
    for name, gradient in zip(leaves, gradients):
        assert gradient.dtype == leaves[name].dtype
        assert torch.equal(gradient, exact[name]), name
    assert set(lk.stats()["served"]) == SERVED
    return [*ours[:3], *gradients]


CASES = covering_pairs(
    dtypes=((FP32, FP32), (FP16, FP32), (FP32, FP16), (FP16, FP16)),
    padding_side=("right", "left"),
    source=(torch.int64, torch.int32, "embeds"),
    mask=(None, torch.int64, torch.int32, torch.int16, torch.bool, torch.uint8, FP32, BF16, FP16, FP64),
    labels=(False, True),
    tasks=(False, True),
    ragged=(False, True),
    several_tiles=(False, True),
)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_combinations(case, request):
    if case["several_tiles"]:
        request.getfixturevalue("small_tiles")
    problem = make(case["source"], *case["dtypes"], case["mask"], case["labels"], case["tasks"], case["ragged"])
    check(problem, case["padding_side"])


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_bfloat16_is_copied(padding_side):
    problem = make(torch.int64, BF16, BF16, BF16, True, True, True)
    assert_same(call(problem, padding_side), naive_prompt.forward(problem, padding_side))


def test_minus_zero_in_a_mask_is_a_pad():
    for dtype in (FP32, BF16, FP16, FP64):
        p = make()._replace(attention_mask=torch.tensor([[-0.0, 0.5, 0.0, 1.0, -1.0]] * BATCH).to(dtype))
        assert_same(call(p, "left"), naive_prompt.forward(p, "left"))


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("source", [torch.int64, "embeds"])
def test_a_problem_of_several_tiles(source, padding_side):
    batch, tokens, rows, hidden = 5, 40, 9, 288
    mask = torch.rand(batch, tokens) > 0.4
    ids = torch.randint(9, (batch, tokens)) if source != "embeds" else None
    problem = Problem(
        ids, None if ids is None else torch.randn(9, hidden).half(), torch.randn(2, rows, hidden),
        torch.randn(batch, tokens, hidden).half() if ids is None else None,
        mask, torch.randint(9, (batch, tokens)), torch.randint(2, (batch,)), torch.randint(rows + 1, (batch,)),
    )  # fmt: skip
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        results.append(check(problem, padding_side))
    for a, b in zip(*results):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("batch", "tokens", "rows"), [(0, 5, 3), (2, 0, 3), (2, 5, 0), (2, 0, 0), (0, 0, 0), (1, 1, 1)]
)
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_empty(padding_side, batch, tokens, rows):
    ids = torch.randint(VOCABULARY, (batch, tokens))
    problem = Problem(
        ids, torch.randn(VOCABULARY, 6), torch.randn(2, rows, 6), None, torch.ones_like(ids), ids,
        torch.ones(batch, dtype=torch.int64), torch.full((batch,), rows // 2),
    )  # fmt: skip
    check(problem, padding_side)


def strided(t, layout):
    """The values of t with other strides."""
    if layout == "column":
        return t.unsqueeze(-1).expand(*t.shape, 2).contiguous()[..., 0]
    if layout == "transposed":
        return t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 1 else strided(t, "column")
    return torch.nn.functional.pad(t, (2, 3))[..., 2:-3]


@pytest.mark.parametrize("layout", ["column", "transposed", "slice"])
@pytest.mark.parametrize("source", [torch.int64, "embeds"])
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_strided_inputs_and_gradients(padding_side, source, layout):
    def views(problem):
        return Problem(*(None if t is None else strided(t, layout) for t in problem))

    problem = make(source, FP32, FP16, torch.int32, True, True, True)
    check(problem, padding_side, lambda out: strided(torch.randn_like(out), layout), views)


def test_expanded_gradient():
    p, leaves = trainable(make())
    call(p).inputs_embeds.sum().backward()
    assert torch.equal(leaves["prompt"].grad, torch.full_like(leaves["prompt"], BATCH))


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_prompt_gradient_reads_the_used_prompt_rows_only(padding_side):
    p = make(mask=torch.bool, ragged=True)
    prompt = p.prompt.requires_grad_()
    ours = call(p, padding_side)
    grad = torch.full_like(ours.inputs_embeds, float("nan"))
    for b in range(BATCH):
        for r, (kind, _) in enumerate(naive_prompt.columns(p, b, padding_side)):
            if kind == "prompt":
                grad[b, r] = 1.0
    ours.inputs_embeds.backward(grad)
    assert prompt.grad[:, 0].tolist() == [int((j < naive_prompt.LENGTHS).sum()) for j in range(ROWS)]


def test_an_index_out_of_range_reads_nothing():
    # On the CPU the arguments are checked first; a GPU has the kernel alone.
    p = make(tasks=True, ragged=True)
    ids, tasks = p.input_ids.clone(), p.task_ids.clone()
    ids[0, 1], ids[1, 0], tasks[1] = VOCABULARY, -1, 3
    lengths = torch.tensor([3, 3, -5, 99])
    args = p.prompt, ids, p.weight, None, None, None, tasks, lengths, False
    out, *_, layout = prompt_embedding.forward(*args)
    assert layout[:, 2].tolist() == [3, 3, 0, 3], "lengths are clamped"
    assert out.isnan().any(2).nonzero().tolist() == [[0, 4], [1, 0], [1, 1], [1, 2], [1, 3]]
    with pytest.raises(ValueError, match=r"input_ids\[0, 1\] is 17"):
        call(p, input_ids=ids)


def test_a_layout_out_of_range_reads_nothing():
    grad = torch.ones(2, ROWS + TOKENS, 4)
    layout = torch.tensor([[0, 0, ROWS], [0, 10**6, ROWS]])
    ids = torch.tensor([[0] * TOKENS, [99] * TOKENS])
    needs = True, True, True
    gradients = prompt_embedding.backward(grad, layout, ids, None, 0, ROWS, FP32, 5, *needs)
    assert torch.equal(gradients[0], torch.ones(ROWS, 4)), "of the first sample only"
    assert gradients[1][:, 0].tolist() == [TOKENS, 0, 0, 0, 0]


def test_backward_runs_where_forward_was_told_to():
    problem, _ = trainable(make())
    with lk.use_backend("triton"):
        output = call(problem).inputs_embeds
    with lk.use_backend(None):
        output.sum().backward()
    assert set(lk.stats()["served"]) == SERVED


def test_why_and_refusals():
    problem = make(dtype=FP16)
    choice = lk.why("prompt_embedding", *problem[:3], **problem.keywords())
    assert choice[:2] == ("triton", "gather")
    assert "prompt_embedding_backward" in lk.backends()["triton"].detail
    with pytest.raises(RuntimeError, match="dtype not served"):
        call(make(dtype=FP64))
