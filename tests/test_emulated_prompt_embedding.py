"""The CUDA kernels of prompt_embedding and their binding, emulated: values, gradients, orders of blocks, faults."""

from __future__ import annotations

import functools

import emulator
import misfits
import naive_prompt
import pytest
import torch
from covering import case_id, covering_pairs
from naive_prompt import BATCH, BF16, FP16, FP32, FP64, MASK, ROWS, TOKENS, VOCABULARY, Problem, make
from pretended_gpu import pretend_gpu

from lora_kernels.functional import prompt as prompt_functional
from lora_kernels.ops.prompt_embedding import BACKWARD, SPEC
from lora_kernels.reasons import Reason

DTYPES = [(FP32, FP32), (BF16, FP32), (FP16, FP32), (BF16, BF16), (FP16, FP16)]
MASKS = [None, torch.int64, torch.int32, torch.bool, FP32, BF16, FP16, FP64, torch.uint8]
ALIGNED, RAGGED, WIDE = 40, 11, 1100
"""Widths of a row: whole chunks, none, and more than the lanes of a warp move at a time."""


@pytest.fixture(scope="module", autouse=True)
def native():
    """The module that the tests steer the launches with."""
    library = torch.library.Library("lora_kernels_emulated_prompt", "DEF")
    for spec in (SPEC, BACKWARD):
        arguments, returns = spec.schema.split(" -> ")
        library.define(f"{spec.name}{arguments[:-1]}, str schedule) -> {returns}")
    yield emulator.load_prompt_embedding()
    library._destroy()


@pytest.fixture(autouse=True)
def _plain_options(native):
    yield
    native.set_options({})


def op_arguments(problem, side):
    return prompt_functional.arguments(*problem[:3], **problem.keywords(), padding_side=side)


def run_forward(problem, side, **options):
    """(inputs_embeds, attention_mask, position_ids, labels, layout) of the emulated kernel."""
    emulator.load_prompt_embedding().set_options({"resident_blocks": 3, **options})
    return torch.ops.lora_kernels_emulated_prompt.prompt_embedding(*op_arguments(problem, side), "")


def run_backward(problem, grad, layout, needs=(True, True, True), **options):
    """(grad_prompt, grad_weight, grad_embeds) of the emulated kernel."""
    emulator.load_prompt_embedding().set_options({"resident_blocks": 3, **options})
    tasks = problem.prompt.shape[0] if problem.prompt.dim() == 3 else 0
    vocabulary = 0 if problem.weight is None else problem.weight.shape[0]
    needs = needs[0], needs[1] and problem.weight is not None, needs[2]
    return torch.ops.lora_kernels_emulated_prompt.prompt_embedding_backward(
        grad, layout, problem.input_ids, problem.task_ids, tasks, problem.prompt.shape[-2], problem.prompt.dtype,
        vocabulary, *needs, "",
    )  # fmt: skip


def assert_same(ours, expected, names):
    for a, b, name in zip(ours, expected, names, strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name


def expected_forward(problem, side):
    """What ``run_forward`` is to give."""
    embeds, mask, positions, labels = naive_prompt.forward(problem, side)
    labels = torch.empty(0, dtype=torch.int64) if labels is None else labels
    return embeds, mask, positions, labels, SPEC.reference(*op_arguments(problem, side))[4]


def check_forward(problem, side, expected=None, **options):
    """Runs and compares; returns the layout."""
    ours = run_forward(problem, side, **options)
    expected = expected_forward(problem, side) if expected is None else expected
    assert_same(ours, expected, ("inputs_embeds", "attention_mask", "position_ids", "labels", "layout"))
    return ours[4]


def random_grad(problem, layout):
    """Of inputs_embeds."""
    tokens = (problem.input_ids if problem.inputs_embeds is None else problem.inputs_embeds).shape[1]
    source = problem.weight if problem.inputs_embeds is None else problem.inputs_embeds
    return torch.randn(layout.shape[0], problem.prompt.shape[-2] + tokens, source.shape[-1]).to(source.dtype)


def expected_backward(problem, side, grad):
    """What ``run_backward`` is to give: the sums are in the order of the definition, so the bits are the same."""
    exact = naive_prompt.backward(problem, side, grad)
    batch, tokens = grad.shape[0], grad.shape[1] - problem.prompt.shape[-2]
    embeds = problem._replace(weight=None, inputs_embeds=torch.empty(batch, tokens, grad.shape[2], dtype=grad.dtype))
    exact_embeds = naive_prompt.backward(embeds, side, grad)["inputs_embeds"]
    return exact["prompt"], exact.get("weight", grad.new_empty(0)), exact_embeds


def check_backward(problem, side, layout, grad=None, expected=None, **options):
    """Runs and compares."""
    grad = random_grad(problem, layout) if grad is None else grad
    grads = run_backward(problem, grad, layout, **options)
    expected = expected_backward(problem, side, grad) if expected is None else expected
    assert_same(grads, expected, ("prompt", "weight", "embeds"))
    return grads


AXES = {
    "source": [torch.int64, torch.int32, "embeds"],
    "dtypes": DTYPES,
    "mask": MASKS,
    "labels": [False, True],
    "tasks": [False, True],
    "ragged": [False, True],
    "side": ["right", "left"],
    "hidden": [ALIGNED, RAGGED],
}


@pytest.mark.parametrize("case", covering_pairs(**AXES), ids=case_id)
def test_values_and_gradients(native, case):
    case = dict(case)
    side, (dtype, prompt_dtype) = case.pop("side"), case.pop("dtypes")
    problem = make(dtype=dtype, prompt_dtype=prompt_dtype, **case)
    layout = check_forward(problem, side)
    assert native.last_launch()[0] == (case["hidden"] == ALIGNED)
    check_backward(problem, side, layout)
    assert native.last_launch()[0] == (case["hidden"] == ALIGNED)


@pytest.mark.parametrize("hidden", [WIDE, WIDE + 1])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_wide_rows(dtypes, hidden):
    problem = make(torch.int64, *dtypes, torch.int64, True, True, True, hidden)
    check_backward(problem, "left", check_forward(problem, "left"))


@pytest.mark.parametrize("side", ["right", "left"])
def test_more_tokens_than_a_block_looks_at_in_one_go(side):
    tokens = 2500
    mask = (torch.rand(3, tokens) < 0.7).to(torch.uint8)
    for b, first in enumerate((0, 1030, tokens)):
        mask[b, :first] = 0
    mask[1, 1030] = 1
    problem = Problem(
        torch.randint(VOCABULARY, (3, tokens)), torch.randn(VOCABULARY, 4), torch.randn(5, 4), None, mask,
        torch.randint(VOCABULARY, (3, tokens)), None, torch.tensor([5, 2, 3]),
    )  # fmt: skip
    check_forward(problem, side)


def test_more_tokens_of_a_row_of_the_table_than_a_list_holds():
    # Two blocks: the first has a frequent id and rereads the ids for every row, the second does not.
    ids = torch.randint(70, (2, 1300))
    ids[torch.rand(ids.shape) < 0.9] = 3
    problem = Problem(ids, torch.empty(70, 4), torch.randn(2, 4))
    layout = torch.tensor([[0, 0, 2]] * 2)
    grad = torch.randn(2, 1302, 4)
    assert int((ids == 3).sum()) > 2048
    check_backward(problem, "right", layout, grad, needs=(True, True, True))


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (True, True, False)]
)
def test_gradients_that_are_not_needed_are_empty(needs):
    problem = make(dtype=BF16, tasks=True, ragged=True)
    layout = check_forward(problem, "left")
    grad = torch.randn(BATCH, ROWS + TOKENS, RAGGED).bfloat16()
    all_grads = run_backward(problem, grad, layout)
    for need, ours, wanted in zip(needs, run_backward(problem, grad, layout, needs), all_grads):
        assert torch.equal(ours, wanted if need else wanted.flatten()[:0])


@pytest.mark.parametrize(("batch", "tokens", "rows"), [(0, 5, 3), (2, 0, 3), (2, 5, 0), (2, 0, 0), (0, 0, 0)])
@pytest.mark.parametrize("side", ["right", "left"])
def test_empty(side, batch, tokens, rows):
    ids = torch.randint(VOCABULARY, (batch, tokens))
    problem = Problem(
        ids, torch.randn(VOCABULARY, 8), torch.randn(2, rows, 8), None, torch.ones_like(ids), ids,
        torch.ones(batch, dtype=torch.int64), torch.full((batch,), rows // 2),
    )  # fmt: skip
    check_backward(problem, side, check_forward(problem, side))


# ---------------------------------------------------------------------------------------------------- layouts


def wide(t):
    """t as columns of a wider tensor of NaN: rows are strided."""
    return torch.nn.functional.pad(t, (8, 8), value=float("nan"))[..., 8:-8]


def off_16_bytes(t):
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t)


@pytest.mark.parametrize("source", [torch.int64, "embeds"])
@pytest.mark.parametrize("tasks", [False, True])
@pytest.mark.parametrize(
    ("layout", "aligned"), [(wide, True), (off_16_bytes, False), (lambda t: t.mT.contiguous().mT, True)]
)
def test_strides(native, layout, aligned, tasks, source):
    problem = make(source, BF16, FP32, torch.int64, False, tasks, True, ALIGNED)
    for name in ("weight", "prompt", "inputs_embeds"):
        if getattr(problem, name) is not None:
            problem = problem._replace(**{name: layout(getattr(problem, name))})
    places = check_forward(problem, "left")
    assert native.last_launch()[0] == aligned
    grad = layout(torch.randn(BATCH, ROWS + TOKENS, ALIGNED).bfloat16())
    check_backward(problem, "left", places, grad)
    assert native.last_launch()[0] == aligned


def test_one_tensor_off_16_bytes_is_enough(native):
    problem = make(dtype=BF16, hidden=ALIGNED)
    for name in ("weight", "prompt"):
        check_forward(problem._replace(**{name: off_16_bytes(getattr(problem, name))}), "right")
        assert not native.last_launch()[0]


def test_a_batch_of_slices_an_expanded_gradient_and_strided_columns():
    problem = make("embeds", BF16, mask=torch.int64, labels=True, hidden=ALIGNED)
    problem = problem._replace(
        inputs_embeds=torch.randn(BATCH, 2 * TOKENS, ALIGNED).bfloat16()[:, 2 : 2 + TOKENS],
        attention_mask=MASK.t().contiguous().t(),
        labels=torch.randint(9, (BATCH, 2 * TOKENS))[:, ::2],
    )
    layout = check_forward(problem, "left")
    check_backward(problem, "left", layout, torch.randn(1, 1, ALIGNED).bfloat16().expand(BATCH, ROWS + TOKENS, ALIGNED))


# ------------------------------------------------------------------------------------- indices out of range

OUTSIDE = [
    ("input_ids", -1),
    ("input_ids", VOCABULARY),
    ("input_ids", 2**40),
    ("task_ids", 3),
    ("task_ids", -(2**33)),
    ("prompt_lengths", ROWS + 1),
    ("prompt_lengths", -1),
]


@pytest.mark.parametrize(("name", "value"), OUTSIDE)
def test_an_index_out_of_range_gives_nan_or_stops_the_kernel(monkeypatch, name, value):
    good = make(dtype=BF16, mask=torch.int64, tasks=True, ragged=True, hidden=ALIGNED)
    good = good._replace(**{n: getattr(good, n).long() for n in ("task_ids", "prompt_lengths")})
    bad = getattr(good, name).clone()
    bad.view(-1)[1] = value
    problem = good._replace(**{name: bad})
    ours, expected = run_forward(problem, "left"), run_forward(good, "left")
    changed = ours[0].isnan().all(-1)
    assert not ours[0][~changed].isnan().any()
    if name == "prompt_lengths":
        nearest = bad.clamp(0, ROWS)
        for a, b in zip(ours, run_forward(good._replace(prompt_lengths=nearest), "left")):
            assert torch.equal(a, b)
    else:
        assert changed.sum() == (1 if name == "input_ids" else good.prompt_lengths[1])
        assert torch.equal(ours[0][~changed], expected[0][~changed])
        grad = torch.randn_like(ours[0])
        assert all(g.isfinite().all() for g in run_backward(problem, grad, ours[4]))
    monkeypatch.setenv("LORA_KERNELS_DEVICE_ASSERT", "1")
    run_forward(good, "left")
    with pytest.raises(RuntimeError, match="trap"):
        run_forward(problem, "left")
    if name != "prompt_lengths":
        with pytest.raises(RuntimeError, match="trap"):
            run_backward(problem, torch.randn_like(ours[0]), ours[4])


@pytest.mark.parametrize("layout", [(-5, 0, 3), (9, 9, 9), (2**40, -(2**40), 2**33), (0, TOKENS + 1, ROWS)], ids=str)
def test_a_layout_out_of_range_stays_within_the_gradient(layout):
    grad = torch.randn(BATCH, ROWS + TOKENS, RAGGED)
    run_backward(make(), grad, torch.tensor([layout] * BATCH))


def test_tensors_of_several_devices_are_refused():
    ops = torch.ops.lora_kernels_emulated_prompt
    problem = make(mask=torch.int64, labels=True, tasks=True, ragged=True)
    args = op_arguments(problem, "right")
    tensors = [t for t in args[1:] if isinstance(t, torch.Tensor)]
    assert len(tensors) == 6
    for tensor in tensors:
        with pytest.raises(RuntimeError, match=r"prompt_embedding: .* must be on prompt's device"):
            ops.prompt_embedding(*misfits.elsewhere(args, tensor), "")
    grad, layout = torch.randn(BATCH, ROWS + TOKENS, RAGGED), torch.tensor([[0, 0, ROWS]] * BATCH)
    args = (grad, layout, problem.input_ids, problem.task_ids, problem.prompt.shape[0], ROWS, FP32, VOCABULARY)
    for tensor in args[1:4]:
        with pytest.raises(RuntimeError, match=r"prompt_embedding_backward: .* must be on grad's device"):
            ops.prompt_embedding_backward(*misfits.elsewhere(args, tensor), True, True, True, "")


def test_empty_tables_are_refused():
    problem = make()
    with pytest.raises(RuntimeError, match="empty table"):
        run_forward(problem._replace(weight=problem.weight[:0]), "right")


@pytest.mark.parametrize("dtypes", [(FP64, FP64), (FP32, FP64), (FP32, BF16), (BF16, FP16)], ids=str)
def test_other_dtypes_are_refused(monkeypatch, dtypes):
    pretend_gpu(monkeypatch)
    problem = make(torch.int64, *dtypes)
    with pytest.raises(RuntimeError, match="serve float32, bfloat16 and float16"):
        run_forward(problem, "right")
    grad = torch.randn(BATCH, ROWS + TOKENS, RAGGED).to(dtypes[0])
    with pytest.raises(RuntimeError, match="serve float32, bfloat16 and float16"):
        run_backward(problem, grad, torch.tensor([[0, 0, ROWS]] * BATCH))
    assert SPEC.kernels["cuda"].supports(*op_arguments(problem, "right")).reason == Reason.DTYPE


def test_launches_go_to_the_callers_stream(native):
    native.set_stream(0x77)
    run_forward(make(), "right")
    assert native.last_launch()[3] == 0x77
    run_backward(make(), torch.randn(BATCH, ROWS + TOKENS, RAGGED), torch.tensor([[0, 0, ROWS]] * BATCH))
    assert native.last_launch()[3] == 0x77
    native.set_stream(0)


def test_what_dispatch_asks(monkeypatch):
    verdicts = {}
    for major in (7, 8):
        pretend_gpu(monkeypatch, (major, 0))
        verdicts[major] = SPEC.kernels["cuda"].supports(*op_arguments(make(dtype=BF16), "right"))
    assert verdicts[7].reason == Reason.ARCHITECTURE
    assert verdicts[8].schedule == "gather"
    huge = torch.empty(2**20, 2**11, dtype=torch.int64, device="meta")
    arguments = op_arguments(make(dtype=BF16), "right")
    assert SPEC.kernels["cuda"].supports(arguments[0], huge, *arguments[2:]).reason == Reason.SIZE
    grad = torch.empty(BATCH, ROWS + TOKENS, RAGGED, dtype=BF16)
    rest = torch.empty(BATCH, 3, dtype=torch.int64), None, None, 0, ROWS
    assert BACKWARD.kernels["cuda"].supports(grad, *rest, FP32, 0, True, False, False).schedule == "row_sum"
    assert BACKWARD.kernels["cuda"].supports(grad, *rest, FP16, 0, True, False, False).reason == Reason.DTYPE


# ------------------------------------------------------------------------------------------- orders and faults


def test_the_same_bits_in_every_order():
    torch.manual_seed(1)
    problem = make(torch.int64, BF16, FP32, torch.bool, True, True, True, ALIGNED)
    grad = torch.randn(BATCH, ROWS + TOKENS, ALIGNED).bfloat16()

    def run(**options):
        outputs = run_forward(problem, "left", **options)
        return [*outputs, *run_backward(problem, grad, outputs[4], **options)]

    first = run()
    for seed in range(1, 6):
        for resident in (1, 2, 8):
            for a, b in zip(run(seed=seed, resident_blocks=resident), first):
                assert torch.equal(a, b)


def forward_scenario(hidden, mask, labels=torch.int64):
    """A forward that needs every barrier: the first real token comes late, and there are more rows than flags."""

    @functools.cache
    def given():
        torch.manual_seed(0)
        tokens = 1100
        attention_mask = torch.ones(2, tokens).to(mask)
        attention_mask[0, :1050] = 0
        attention_mask[1, 3:400] = 0
        problem = Problem(
            torch.randint(40, (2, tokens)), torch.randn(40, hidden).bfloat16(), torch.randn(2, 4, hidden), None,
            attention_mask, torch.randint(40, (2, tokens)).to(labels), torch.tensor([1, 0]), torch.tensor([2, 3]),
        )  # fmt: skip
        return problem, "left", expected_forward(problem, "left")

    return lambda **fault: check_forward(*given(), **fault)


def backward_scenario(hidden, dtype, prompt_dtype):
    """All gradients, with a token that is too frequent for one list."""

    @functools.cache
    def given():
        torch.manual_seed(0)
        tokens = 1100
        ids = torch.randint(5, (2, tokens))
        ids[torch.rand(ids.shape) < 0.97] = 3
        lengths = torch.tensor([4, 2])
        mask = torch.ones(2, tokens, dtype=torch.int64)
        mask[1, :700] = 0
        weight, prompt = torch.empty(5, hidden, dtype=dtype), torch.randn(4, hidden).to(prompt_dtype)
        problem = Problem(ids, weight, prompt, attention_mask=mask, prompt_lengths=lengths)
        layout = torch.tensor([[0, 0, 4], [2, 700, 2]])
        grad = random_grad(problem, layout)
        return problem, "left", layout, grad, expected_backward(problem, "left", grad)

    return lambda **fault: check_backward(*given(), **fault)


SCENARIOS = {
    "aligned": forward_scenario(8, torch.int64),
    "unaligned": forward_scenario(3, torch.float16, torch.int32),
    "byte mask": forward_scenario(3, torch.uint8),
    "backward": backward_scenario(8, BF16, FP32),
    "backward-16-bit": backward_scenario(8, BF16, BF16),
    "backward-unaligned": backward_scenario(3, BF16, BF16),
    "backward-float": backward_scenario(3, FP32, FP32),
}


def survives(scenario, **fault):
    """Whether a faulty kernel passes every check under a few schedules."""
    try:
        for seed in range(3):
            SCENARIOS[scenario](seed=seed, resident_blocks=4, **fault)
    except (AssertionError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("fault", ["drop_barrier", "drop_global_store"])
@pytest.mark.parametrize("scenario", list(SCENARIOS))
def test_everything_left_out_is_caught(native, scenario, fault):
    assert survives(scenario)
    report = native.last_launch()[2]
    sites = {"drop_barrier": report.barrier_sites, "drop_global_store": report.global_store_sites}[fault]
    assert len(sites) >= 2
    missed = [site for i, site in enumerate(sites) if survives(scenario, **{fault: i})]
    assert not missed
