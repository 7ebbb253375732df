"""prompt_embedding as a torch op: registration, compilation, transforms, conversions, errors and dispatch."""

import itertools

import pytest
import torch
from naive_prompt import BATCH, BF16, FP16, FP32, FP64, LENGTHS, ROWS, TOKENS, VOCABULARY, call, make, trainable

import lora_kernels as lk
from lora_kernels.functional import prompt as prompt_functional
from lora_kernels.ops.prompt_embedding import SPEC

OP = torch.ops.lora_kernels.prompt_embedding.default
BACKWARD = torch.ops.lora_kernels.prompt_embedding_backward.default


@pytest.fixture(autouse=True)
def _compile_afresh():
    torch.compiler.reset()


def op_arguments(problem, padding_side="right"):
    return prompt_functional.arguments(*problem[:3], **problem.keywords(), padding_side=padding_side)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend):
    with lk.use_backend(backend):
        for source, side, full in (
            (torch.int32, "left", True),
            ("embeds", "right", True),
            (torch.int64, "left", False),
        ):
            mask, dtype = (torch.bool if full else None), (BF16 if full else FP32)
            problem, leaves = trainable(make(source, dtype, FP32, mask, full, full, full))
            torch.library.opcheck(OP, op_arguments(problem, side))
            layout = OP(*op_arguments(problem, side))[4]
            grad = torch.randn(BATCH, ROWS + TOKENS, leaves["prompt"].shape[-1], dtype=dtype)
            for needs in itertools.product((True, False), repeat=3):
                ids = problem.input_ids
                if ids is None:
                    needs = needs[0], False, needs[2]
                tasks = leaves["prompt"].shape[0] if full else 0
                torch.library.opcheck(
                    BACKWARD, (grad, layout, ids, problem.task_ids, tasks, ROWS, FP32, VOCABULARY, *needs)
                )


def gradients_of(function, problem, padding_side):
    problem, leaves = trainable(problem)
    output = function(problem, padding_side)
    return [*output, *torch.autograd.grad(output[0].square().sum(), list(leaves.values()))]


@pytest.mark.parametrize("source", [torch.int64, "embeds"])
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_compiled_equals_eager(padding_side, source):
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for full in (True, False):
        problem = make(source, BF16, FP32, torch.int64 if full else None, full, full, full)
        for a, b in zip(gradients_of(compiled, problem, padding_side), gradients_of(call, problem, padding_side)):
            assert (a is None and b is None) or torch.equal(a, b)
    assert set(lk.stats()["served"]) == {("prompt_embedding", "cpu"), ("prompt_embedding_backward", "cpu")}


def test_compiled_serves_other_sizes():
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    prompt, weight = torch.randn(ROWS, 6, requires_grad=True), torch.randn(VOCABULARY, 6)
    for batch, tokens in ((2, 5), (3, 9), (4, 3)):
        problem = make()._replace(input_ids=torch.randint(VOCABULARY, (batch, tokens)), prompt=prompt, weight=weight)
        assert torch.equal(compiled(problem).inputs_embeds, call(problem).inputs_embeds)


def test_function_and_registered_op_have_equal_gradients():
    for source, side in itertools.product((torch.int64, "embeds"), ("right", "left")):
        problem = make(source, BF16, FP32, torch.int64, True, True, True)
        registered = gradients_of(lambda p, side: OP(*op_arguments(p, side))[:4], problem, side)
        for a, b in zip(registered, gradients_of(call, problem, side)):
            assert torch.equal(a, b)


def test_double_backward_vmap_and_jvp_raise_clearly():
    problem, leaves = trainable(make())
    for output in (call(problem)[0], OP(*op_arguments(problem))[0]):
        (grad,) = torch.autograd.grad(output.square().sum(), leaves["prompt"], create_graph=True)
        with pytest.raises(RuntimeError, match="twice"):
            grad.sum().backward()
    with pytest.raises(RuntimeError, match="functorch transform"):
        torch.vmap(lambda prompt: call(problem, prompt=prompt))(torch.randn(2, *leaves["prompt"].shape))
    prompt = leaves["prompt"].detach()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(prompt, prompt)
        with pytest.raises(RuntimeError, match="forward-mode AD"):
            call(problem, prompt=dual)


def test_inference_mode_autocast_and_meta():
    problem, _ = trainable(make(labels=True))
    expected = call(problem)
    with torch.inference_mode():
        assert torch.equal(call(problem).inputs_embeds, expected.inputs_embeds)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(problem).inputs_embeds, expected.inputs_embeds), "as F.embedding, not cast"
    on_meta = type(problem)(*(None if t is None else t.detach().to("meta") for t in problem))
    for a, b in zip(call(on_meta), expected):
        assert (a.device.type, a.shape, a.dtype) == ("meta", b.shape, b.dtype)


def test_nothing_is_written_into_the_inputs():
    problem, leaves = trainable(make("embeds", mask=torch.int64, labels=True, tasks=True, ragged=True))
    before = [None if t is None else t.detach().clone() for t in problem]
    output = call(problem, "left").inputs_embeds
    grad = torch.randn_like(output)
    kept = grad.clone()
    torch.autograd.grad(output, list(leaves.values()), grad)
    assert torch.equal(grad, kept)
    for a, b in zip(problem, before):
        assert a is None or torch.equal(a.detach(), b)


# ------------------------------------------------------------------------------------------------ conversions


def converted(values, dtype):
    """values [n] cast by the kernel, as prompt rows."""
    prompt = values.view(16, -1)
    weight = torch.zeros(1, prompt.shape[1], dtype=dtype)
    output = lk.prompt_embedding(torch.zeros(1, 1, dtype=torch.int64), weight, prompt)
    return output.inputs_embeds[0, :16].reshape(-1)


def assert_same_bits(a, b):
    assert torch.equal(a.isnan(), b.isnan())
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    assert torch.equal(a[~a.isnan()].view(bits), b[~b.isnan()].view(bits))


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_conversions_are_torchs(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for wide in (FP32, FP64):
        assert_same_bits(converted(every, wide), every.to(wide))
    # Every 16-bit value, the midpoint to its neighbour (ties to even) and the float32 values beside these.
    bits = every.float().view(torch.int32)
    half_ulp = 2**15 if dtype == BF16 else 2**12
    near = torch.cat([bits + offset for offset in (-1, 0, 1, half_ulp - 1, half_ulp, half_ulp + 1)]).view(FP32)
    tiny = torch.cat([torch.linspace(-2e-7, 2e-7, 2**16), torch.randint(-(2**31), 2**31, (2**16,)).int().view(FP32)])
    for values in (near, tiny):
        assert_same_bits(converted(values, dtype), values.to(dtype))


def test_subnormals_survive_flushing():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(FP16)
    wide = every.float()
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU does not flush")
    try:
        assert_same_bits(converted(every, FP32), wide)
        assert_same_bits(converted(wide, FP16), every)
    finally:
        torch.set_flush_denormal(False)


# ----------------------------------------------------------------------------------------------------- errors

INDEX = torch.zeros(BATCH, dtype=torch.int64)
BAD = [
    ({"input_ids": None}, ValueError, "exactly one of input_ids and inputs_embeds must be given, got neither"),
    ({"inputs_embeds": torch.randn(BATCH, TOKENS, 11)}, ValueError, "got both"),
    ({"input_ids": [1]}, TypeError, "input_ids must be a tensor, got list"),
    ({"input_ids": torch.zeros(BATCH, TOKENS)}, TypeError, "input_ids must have one of the dtypes int64, int32, got"),
    ({"input_ids": INDEX}, ValueError, r"input_ids must be \[batch, tokens\], got shape \(4,\)"),
    ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
    ({"weight": torch.zeros(5, 11, dtype=torch.int64)}, TypeError, "weight must have one of the dtypes float32"),
    ({"weight": torch.randn(5, 10)}, ValueError, r"weight must be \[vocabulary, 11\].*got shape \(5, 10\)"),
    ({"weight": torch.randn(5, 11, device="meta")}, ValueError, "weight must be on cpu like prompt, got meta"),
    ({"prompt": None}, TypeError, "prompt must be a tensor, got NoneType"),
    ({"prompt": torch.randn(2, ROWS, 11)}, ValueError, r"prompt must be \[rows, hidden\] without task_ids"),
    ({"task_ids": INDEX}, ValueError, r"prompt must be \[tasks, rows, hidden\] with task_ids"),
    ({"input_ids": None, "inputs_embeds": torch.randn(4, 5, 7)}, ValueError, r"must be \[batch, tokens, 11\]"),
    ({"attention_mask": torch.ones(BATCH, 8)}, ValueError, r"attention_mask must be \[4, 5\].*got shape \(4, 8\)"),
    ({"attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.complex64)}, TypeError, "attention_mask must have"),
    ({"labels": torch.randn(BATCH, TOKENS)}, TypeError, "labels must have one of the dtypes int64, int32, got"),
    ({"labels": torch.zeros(BATCH, 1, dtype=torch.int64)}, ValueError, r"labels must be \[4, 5\]"),
    ({"prompt_lengths": INDEX[:2]}, ValueError, r"prompt_lengths must be \[4\]"),
    ({"prompt_lengths": INDEX - 1}, ValueError, r"prompt_lengths\[0\] is -1, expected at least 0 and less than 4"),
    ({"prompt_lengths": (LENGTHS + 1).int()}, ValueError, r"prompt_lengths\[0\] is 4"),
    ({"input_ids": torch.eye(4, 5).long() * 17}, ValueError, r"input_ids\[0, 0\] is 17, expected .* less than 17"),
    ({"input_ids": torch.full((4, 5), -1).int()}, ValueError, r"input_ids\[0, 0\] is -1"),
    ({"prompt": torch.randn(2, 3, 11), "task_ids": INDEX + 2}, ValueError, r"task_ids\[0\] is 2, .* less than 2"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bad_arguments(backend, changes, error, message):
    problem = make()
    with lk.use_backend(backend), pytest.raises(error, match="prompt_embedding: .*" + message):
        call(problem, **changes)


def test_bad_padding_side():
    with pytest.raises(ValueError, match='padding_side must be "left" or "right", got \'both\''):
        call(make(), "both")


def test_an_id_out_of_range_raises_under_compile_too():
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    problem = make()
    compiled(problem)
    with pytest.raises(ValueError, match=r"input_ids\[0, 0\] is 17"):
        compiled(problem._replace(input_ids=problem.input_ids * 0 + VOCABULARY))


def test_the_native_backward_checks_what_it_reads():
    native = torch.ops.lora_kernels_native.prompt_embedding_backward.default
    grad, ids = torch.randn(1, 4, 2), torch.tensor([[5]])
    good = torch.tensor([[0, 0, 3]])
    for layout, index in ((good, ids), (good + 1, ids * 0), (torch.tensor([[0, -1, 3]]), ids * 0)):
        with pytest.raises(RuntimeError, match="out of range"):
            native(grad, layout, index, None, 0, 3, FP32, 5, True, True, True, "row_sum")
    for changed, message in (
        ({0: grad[0]}, r"grad must be \[batch, prompt_rows \+ tokens, hidden\]"), ({5: 5}, "grad must be"),
        ({1: good[:, :2]}, r"layout must be \[batch, 3\], int64"), ({1: good.int()}, "layout must be"),
        ({2: ids[:, :0]}, r"input_ids must be \[batch, tokens\]"), ({2: ids.short()}, "input_ids must be .* int64"),
        ({2: None}, "input_ids, which must be given"), ({3: ids}, r"task_ids must be \[batch\]"),
        ({3: ids[0].char()}, "task_ids must be .* int64"),
    ):  # fmt: skip
        args = [grad, good, ids, None, 0, 3, FP32, 6, True, True, True]
        for position, value in changed.items():
            args[position] = value
        with pytest.raises(RuntimeError, match=f"prompt_embedding_backward: .*{message}"):
            native(*args, "row_sum")


def test_the_native_forward_checks_what_it_reads():
    """Kills: a prompt of one dimension whose elements are taken for rows; ids of 16 bits that are read as 32; an
    argument that is not there and is looked at."""
    native = torch.ops.lora_kernels_native.prompt_embedding.default
    prompt, weight = torch.randn(3, 8), torch.randn(9, 8)
    ids, per_sample = torch.zeros(2, 5).long(), torch.ones(2).int()
    for changed, message in (
        ({1: None}, "input_ids with weight, or inputs_embeds, must be given"), ({2: None}, "input_ids with weight"),
        ({0: prompt[0]}, r"prompt must be \[prompt_rows, hidden\]"), ({0: prompt[None]}, "prompt must be"),
        ({6: per_sample}, "prompt must be"), ({2: weight[:, :7]}, r"weight must be \[vocabulary, hidden\]"),
        ({2: weight[:, None]}, "weight must be"), ({1: ids[0]}, r"input_ids must be \[batch, tokens\]"),
        ({1: ids.short()}, "input_ids must be .* int64"), ({1: ids.double()}, "input_ids must be .* int64"),
        ({1: None, 3: torch.randn(2, 8)}, r"inputs_embeds must be \[batch, tokens, hidden\]"),
        ({1: None, 3: torch.randn(2, 5, 7)}, "inputs_embeds must be"), ({4: ids[:, 1:]}, "attention_mask must be"),
        ({5: ids[1:]}, "labels must be"), ({7: per_sample[:1]}, r"prompt_lengths must be \[batch\]"),
        ({7: per_sample.short()}, "prompt_lengths must be .* int64"),
        ({0: prompt[None], 6: per_sample.bool()}, "task_ids must be .* int64"),
    ):  # fmt: skip
        args = [prompt, ids, weight, None, None, None, None, None, False]
        for position, value in changed.items():
            args[position] = value
        with pytest.raises(RuntimeError, match=f"prompt_embedding: .*{message}"):
            native(*args, "gather")


# --------------------------------------------------------------------------------------------------- dispatch


def test_why_and_stats():
    problem, leaves = trainable(make(dtype=BF16))
    choice = lk.why("prompt_embedding", *problem[:3], **problem.keywords(), padding_side="left")
    assert (choice.backend, choice.schedule) == ("cpu", "gather")
    assert lk.stats()["served"] == {}, "why must compute nothing"
    call(problem).inputs_embeds.sum().backward()
    assert leaves["prompt"].grad is not None
    assert lk.stats() == {
        "served": {("prompt_embedding", "cpu"): 1, ("prompt_embedding_backward", "cpu"): 1},
        "fallback": {},
    }
    with pytest.raises(ValueError, match="input_ids must be"):
        lk.why("prompt_embedding", problem.input_ids[0], *problem[1:3])


def test_float64_is_served_by_the_kernel():
    assert lk.why("prompt_embedding", *make(dtype=FP64, prompt_dtype=FP64)[:3]).backend == "cpu"


def test_gradient_of_embeddings_is_a_view_where_the_prompt_is_first():
    problem, leaves = trainable(make("embeds"))
    output = call(problem, prompt=leaves["prompt"].detach()).inputs_embeds
    grad = torch.randn_like(output)
    (gradient,) = torch.autograd.grad(output, leaves["inputs_embeds"], grad)
    assert gradient.data_ptr() == grad[:, ROWS:].data_ptr()


def test_cost_model():
    args = op_arguments(make(mask=torch.int64, labels=True))
    rows = BATCH * (ROWS + TOKENS)
    table = (BATCH * TOKENS + rows + ROWS) * 11 * 4
    assert SPEC.flops(*args) == 0
    assert SPEC.bytes(*args) == table + BATCH * TOKENS * 8 * 3 + rows * 8 * 3
