"""prompt_embedding: every combination of arguments against a per-sample definition, and the gradient contract."""

import itertools

import naive_prompt
import pytest
import torch
from naive_prompt import (
    BATCH,
    BF16,
    FP16,
    FP32,
    FP64,
    HIDDEN,
    LENGTHS,
    ROWS,
    TOKENS,
    VOCABULARY,
    Problem,
    call,
    make,
    trainable,
)

import lora_kernels as lk

# (dtype of the token embeddings, dtype of the prompt)
DTYPES = [
    (FP32, FP32),
    (BF16, FP32),
    (FP16, FP32),
    (FP32, BF16),
    (BF16, BF16),
    (BF16, FP16),
    (FP64, FP64),
    (FP32, FP64),
]
MASKS = [None, torch.int64, torch.int32, torch.bool, FP32, BF16, FP16, FP64, torch.uint8]


def poison(*outputs):
    """Leaves all-ones bytes (NaN, -1) where the allocator will put outputs of these sizes."""
    blocks = [torch.full((t.nbytes,), 0xFF, dtype=torch.uint8) for t in outputs if t is not None]
    del blocks


def assert_same(ours, expected):
    for name, a, b in zip(lk.PromptEmbeddingOutput._fields, ours, expected):
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype, name
            assert torch.equal(a, b), name


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize(("dtype", "prompt_dtype"), DTYPES)
def test_every_combination(dtype, prompt_dtype, padding_side):
    flags = (True, False)
    for source, mask, labels, tasks, ragged in itertools.product(
        (torch.int64, torch.int32, "embeds"), MASKS, flags, flags, flags
    ):
        problem, leaves = trainable(make(source, dtype, prompt_dtype, mask, labels, tasks, ragged))
        detached = problem._replace(**{name: t.detach() for name, t in leaves.items()})
        expected = naive_prompt.forward(detached, padding_side)
        grad = torch.randn_like(expected[0])
        exact = naive_prompt.backward(detached, padding_side, grad)
        for backend in ("cpu", "reference"):
            with lk.use_backend(backend):
                poison(*expected)
                ours = call(problem, padding_side)
                assert_same(ours, expected)
                poison(*exact.values())
                gradients = torch.autograd.grad(ours.inputs_embeds, list(leaves.values()), grad)
            for name, gradient in zip(leaves, gradients):
                assert gradient.dtype == leaves[name].dtype
                # The kernel sums in the same order; torch may not, and what differs may be rounded the other way.
                ulps = 0 if backend == "cpu" else 2 * torch.finfo(gradient.dtype).eps
                torch.testing.assert_close(gradient, exact[name], rtol=ulps, atol=ulps)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_gradcheck(backend, padding_side):
    for source, tasks, ragged in itertools.product((torch.int64, "embeds"), (True, False), (True, False)):
        problem, leaves = trainable(make(source, FP64, FP64, torch.bool, False, tasks, ragged))
        leaves = {name: t.detach()[..., :2].clone().requires_grad_() for name, t in leaves.items()}

        def f(*values, problem=problem, names=tuple(leaves)):
            return call(problem, padding_side, **dict(zip(names, values))).inputs_embeds

        with lk.use_backend(backend):
            assert torch.autograd.gradcheck(f, tuple(leaves.values()))


@pytest.mark.parametrize(("batch", "tokens", "rows"), [(0, 5, 3), (2, 0, 3), (2, 5, 0), (2, 0, 0), (0, 0, 0)])
@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_empty(backend, padding_side, batch, tokens, rows):
    ids = torch.randint(VOCABULARY, (batch, tokens))
    problem = Problem(
        ids, torch.randn(VOCABULARY, 6), torch.randn(2, rows, 6), None, torch.ones_like(ids), ids,
        torch.ones(batch, dtype=torch.int64), torch.full((batch,), rows // 2),
    )  # fmt: skip
    expected = naive_prompt.forward(problem, padding_side)
    grad = torch.randn_like(expected[0])
    exact = naive_prompt.backward(problem, padding_side, grad)
    live, leaves = trainable(problem)
    with lk.use_backend(backend):
        ours = call(live, padding_side)
        assert_same(ours, expected)
        gradients = torch.autograd.grad(ours.inputs_embeds, list(leaves.values()), grad)
    for name, gradient in zip(leaves, gradients):
        assert torch.equal(gradient, exact[name]), name


def test_equals_peft_layout_under_right_padding():
    p = make(mask=torch.int64, labels=True)
    ours = call(p)
    ones, ignored = p.attention_mask.new_ones(BATCH, ROWS), p.labels.new_full((BATCH, ROWS), -100)
    embedded = torch.nn.functional.embedding(p.input_ids, p.weight)
    mask = torch.cat([ones, p.attention_mask], dim=1)
    assert torch.equal(ours.inputs_embeds, torch.cat([p.prompt.expand(BATCH, -1, -1), embedded], dim=1))
    assert torch.equal(ours.attention_mask, mask)
    assert torch.equal(ours.labels, torch.cat([ignored, p.labels], dim=1))
    assert torch.equal(ours.position_ids, (mask.cumsum(1) - 1).clamp(min=0))


def test_left_padding_puts_the_prompt_in_front_of_the_text():
    p = make(mask=torch.int64)
    ours = call(p, "left")
    assert ours.attention_mask[1].tolist() == [0, 0, 1, 1, 1, 1, 0, 1]
    assert ours.position_ids[1].tolist() == [0, 0, 0, 1, 2, 3, 3, 4]
    assert torch.equal(ours.inputs_embeds[1, 2:5], p.prompt)
    assert torch.equal(ours.inputs_embeds[1, :2], p.weight[p.input_ids[1, :2]]), "pads keep their token rows"
    assert torch.equal(ours.inputs_embeds[3, -3:], p.prompt), "no real token: the prompt comes last"


def test_minus_zero_in_a_mask_is_a_pad():
    for dtype in (FP32, BF16, FP16, FP64):
        p = make()._replace(attention_mask=torch.tensor([[-0.0, 0.5, 0.0, 1.0, -1.0]] * BATCH).to(dtype))
        expected = naive_prompt.forward(p, "left")
        assert expected[2][0].tolist() == [0, 0, 1, 2, 3, 3, 4, 5]
        for backend in ("cpu", "reference"):
            with lk.use_backend(backend):
                assert_same(call(p, "left"), expected)


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
def test_non_contiguous_inputs_and_gradients(padding_side, source, layout):
    plain = make(source, FP32, BF16, torch.int32, True, True, True)
    expected = naive_prompt.forward(plain, padding_side)
    other, leaves = trainable(plain)
    views = Problem(*(None if t is None else strided(t, layout) for t in other))
    assert not views.prompt.is_contiguous()
    ours = call(views, padding_side)
    assert_same(ours, expected)
    grad = torch.randn_like(expected[0])
    exact = naive_prompt.backward(plain, padding_side, grad)
    gradients = torch.autograd.grad(ours.inputs_embeds, list(leaves.values()), strided(grad, layout))
    for name, gradient in zip(leaves, gradients):
        assert torch.equal(gradient, exact[name]), name


def test_expanded_gradient_and_prompt():
    p, leaves = trainable(make())
    call(p).inputs_embeds.sum().backward()
    assert torch.equal(leaves["prompt"].grad, torch.full((ROWS, HIDDEN), float(BATCH)))
    row = torch.randn(HIDDEN)
    assert torch.equal(call(p, prompt=row.expand(ROWS, HIDDEN)).inputs_embeds[0, :ROWS], row.expand(ROWS, HIDDEN))


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
    assert prompt.grad[:, 0].tolist() == [int((j < LENGTHS).sum()) for j in range(ROWS)]


@pytest.mark.parametrize(("dtype", "prompt_dtype"), [(FP32, FP32), (BF16, FP32)])
def test_gradients_do_not_depend_on_threads(dtype, prompt_dtype):
    # Large enough that every loop is split, and few ids, so that rows of the weight's gradient have many terms.
    batch, tokens, rows, hidden = 16, 64, 32, 2100
    mask = torch.rand(batch, tokens) > 0.3
    ids, weight = torch.randint(9, (batch, tokens)), torch.randn(9, hidden).to(dtype)
    prompt, task_ids = torch.randn(2, rows, hidden).to(prompt_dtype), torch.randint(2, (batch,))
    lengths = torch.randint(rows + 1, (batch,))
    problem, leaves = trainable(Problem(ids, weight, prompt, None, mask, None, task_ids, lengths))
    grad = torch.randn(batch, rows + tokens, hidden).to(dtype)

    def run(threads):
        torch.set_num_threads(threads)
        ours = call(problem, "left")
        return [*ours[:3], *torch.autograd.grad(ours.inputs_embeds, list(leaves.values()), grad)]

    before = torch.get_num_threads()
    try:
        first = run(1)
        detached = Problem(*(None if t is None else t.detach() for t in problem))
        exact = naive_prompt.backward(detached, "left", grad)
        for name, gradient in zip(leaves, first[3:]):
            assert torch.equal(gradient, exact[name]), name
        for threads in (1, 2, 3):
            for a, b in zip(first, run(threads)):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


def test_saves_the_places_and_the_ids_only():
    def saved(problem, **changes):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            call(problem, **changes)
        return sum(sizes)

    p = make(mask=torch.int64, labels=True)
    prompt = p.prompt.clone().requires_grad_()
    assert saved(p, prompt=prompt) == 24 * BATCH
    assert saved(p, prompt=prompt, weight=p.weight.clone().requires_grad_()) == 24 * BATCH + 8 * BATCH * TOKENS
    assert saved(make("embeds"), prompt=prompt) == 24 * BATCH


@pytest.mark.parametrize("wanted", [("prompt",), ("weight",), ("inputs_embeds",), ("prompt", "inputs_embeds")])
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_needs_input_grad_is_honoured(padding_side, wanted):
    p = make("embeds" if "inputs_embeds" in wanted else torch.int64, mask=torch.int64)
    ours = call(p._replace(**{name: getattr(p, name).requires_grad_() for name in wanted}), padding_side)
    assert ours.inputs_embeds.requires_grad
    assert not ours.attention_mask.requires_grad
    grad = torch.randn_like(ours.inputs_embeds)
    exact = naive_prompt.backward(Problem(*(None if t is None else t.detach() for t in p)), padding_side, grad)
    ours.inputs_embeds.backward(grad)
    for name in ("prompt", "weight", "inputs_embeds"):
        gradient = None if getattr(p, name) is None else getattr(p, name).grad
        assert gradient is None if name not in wanted else torch.equal(gradient, exact[name]), name
