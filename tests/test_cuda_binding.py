"""What stands between torch and the CUDA kernels: the binding's own source, over CPU tensors and emulated launches."""

from __future__ import annotations

import itertools

import misfits
import pytest
import torch
from emulated import check_backward, check_forward, grad_y_of, matrices, saved_s, steered
from numerics import assert_as_accurate

from lora_kernels import philox
from lora_kernels.ops.lora_linear import BACKWARD, SPEC
from lora_kernels.support.cuda import TENSOR_CORES

SEED = torch.tensor([77])
AUTO = TENSOR_CORES.schedule


@pytest.fixture(autouse=True)
def native():
    """The module that tests steer the launches with."""
    native = steered()
    yield native
    native.set_stream(0)
    native.set_row_gap(8)
    native.fail_launches(False)


def last_launch(native):
    return native.launches()[-1]


def is_whole(native):
    """Whether the last launch reads and writes all rows in chunks of 16 bytes."""
    return last_launch(native)["access"] == "whole"


def emulated(x, weight, lora_A, lora_B, bias=None, *, p=0.0, schedule=AUTO):
    seed = SEED if p > 0 else None
    return torch.ops.lora_kernels_emulated.lora_linear(x, weight, lora_A, lora_B, bias, seed, 1.7, p, schedule)


def check(x, weight, lora_A, lora_B, bias=None, *, p=0.0, schedule=AUTO):
    """Run, and compare with float64 and with plain torch code."""
    y, s = emulated(x, weight, lora_A, lora_B, bias, p=p, schedule=schedule)
    args = (x, weight, lora_A, lora_B, bias)
    seed = SEED if p > 0 else None
    unfused = SPEC.reference(*args, seed, 1.7, p)
    exact = SPEC.reference(*(None if t is None else t.double() for t in args), seed, 1.7, p)
    for ours, theirs, true, name in zip((y, s), unfused, exact, "ys"):
        assert ours.dtype == x.dtype
        assert ours.is_contiguous()
        assert_as_accurate(ours, theirs, true, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lead", [(), (1,), (70,), (2, 35), (2, 3, 11), (0,), (2, 0, 3)], ids=str)
def test_leading_sizes(native, dtype, lead):
    _, *rest = matrices(1, 72, 40, 8, dtype, bias=True)
    check(torch.randn(*lead, 40).to(dtype), *rest, p=0.3)
    if 0 not in lead:
        assert is_whole(native)


def wide(t):
    """t as columns of a wider matrix of NaN: rows are strided."""
    columns = t.shape[1]
    return torch.nn.functional.pad(t, (columns, columns), value=float("nan"))[:, columns:-columns]


def test_strided_rows_are_not_copied(native):
    tensors = dict(zip(("x", "weight", "lora_A", "lora_B"), map(wide, matrices(70, 72, 40, 8, "bf16")[:4])))
    check(*tensors.values())
    launch = last_launch(native)
    assert {name: launch[name] for name in tensors} == {name: t.data_ptr() for name, t in tensors.items()}
    assert launch["access"] == "whole"


def test_other_layouts_are_copied(native):
    x, weight, lora_A, lora_B, bias = matrices(70, 72, 40, 8, "bf16", bias=True)
    tensors = [t.t().contiguous().t() for t in (x, weight, lora_A, lora_B)]
    check(*tensors, torch.stack([bias, bias], 1)[:, 0])
    launch = last_launch(native)
    names = ("x", "weight", "lora_A", "lora_B")
    left = [name for name, t in zip(names, tensors, strict=True) if launch[name] == t.data_ptr()]
    assert (left, launch["schedule"]) == (["weight"], "expand"), "the vendor's GEMM reads a transposed weight as it is"


def test_rows_that_lie_too_far_apart_are_copied(native):
    stride = 2**25 + 8
    x, *rest = matrices(2, 72, 40, 8, "bf16")
    far = torch.empty(stride + 40, dtype=x.dtype).as_strided((2, 40), (stride, 1)).copy_(x)
    check(far, *rest)
    assert last_launch(native)["x"] != far.data_ptr()


FARTHEST = 2**25
"""Elements from row to row: kMaxRowStride of csrc/config/tiles.h."""


def far_apart(t, folder):
    """t with its rows as far apart as they may be, in a file of nothing else but holes."""
    file = folder / "rows"
    memory = torch.from_file(str(file), shared=True, size=(t.shape[0] - 1) * FARTHEST + t.shape[1], dtype=t.dtype)
    file.unlink()  # the memory stays
    return memory.as_strided(t.shape, (FARTHEST, 1)).copy_(t)


@pytest.mark.parametrize("sms", [1, 1000], ids=["large tile", "small tile"])
def test_rows_that_lie_as_far_apart_as_they_may(native, tmp_path, sms):
    # Beyond 2^31 elements, and in a large tile 2^32 bytes from its first row, on the way in and on the way out.
    x, weight, lora_A, lora_B, bias = matrices(130, 72, 40, 8, "bf16", bias=True)
    native.set_sms(sms)
    native.set_row_gap(FARTHEST - 72)
    far = far_apart(x, tmp_path)
    check(far, weight, lora_A, lora_B, bias, p=0.3)
    assert last_launch(native)["x"] == far.data_ptr(), "not copied"


@pytest.mark.parametrize("sms", [1, 1000], ids=["large tile", "small tile"])
def test_gradients_of_rows_that_lie_as_far_apart_as_they_may(native, tmp_path, sms):
    grad_y, x, *rest = problem((130,), 72, 40, 8, torch.bfloat16)
    native.set_sms(sms)
    native.set_row_gap(FARTHEST - 40)
    for ours, unfused, exact in zip(*backward((far_apart(grad_y, tmp_path), far_apart(x, tmp_path), *rest))):
        assert_as_accurate(ours, unfused, exact)


@pytest.mark.parametrize("schedule", ["one launch", "cublas"])
def test_rows_of_an_adapter_that_lie_as_far_apart_as_they_may(native, tmp_path, schedule):
    """Kills: offsets of rows that are gathered reckoned in 32 bits, as those of whole chunks are."""
    x, weight, lora_A, lora_B, _ = matrices(200, 130, 40, 3, "bf16", float_adapters=True)
    far = far_apart(lora_B, tmp_path)
    near = torch.ops.lora_kernels_emulated.lora_linear(x, weight, lora_A, lora_B, None, None, 1.7, 0.0, schedule)
    ours = torch.ops.lora_kernels_emulated.lora_linear(x, weight, lora_A, far, None, None, 1.7, 0.0, schedule)
    assert last_launch(native)["lora_B"] == far.data_ptr(), "not copied"
    assert torch.equal(ours[0], near[0])


@pytest.mark.parametrize("layout", ["batch of slices", "expanded batch", "transposed batch"])
def test_x_of_three_dimensions(layout):
    _, *rest = matrices(1, 72, 40, 8, "bf16")
    x = torch.randn(3, 25, 40).bfloat16()
    views = {
        "batch of slices": x[:, 2:20],
        "expanded batch": x[:1].expand(3, -1, -1),
        "transposed batch": x.transpose(0, 1),
    }
    check(views[layout], *rest)


def accesses(native):
    """What the launches since the last question read in chunks."""
    return {launch["schedule"]: launch["access"] for launch in native.launches()}


@pytest.mark.parametrize("which", range(4))
def test_a_tensor_that_begins_off_16_bytes_is_seen(native, which):
    """By who reads it: kills a launch that gathers what another's operand makes it."""
    tensors = list(matrices(70, 72, 40, 8, "fp16")[:4])
    check(*tensors, p=0.3)
    assert set(accesses(native).values()) == {"whole"}
    t = tensors[which]
    tensors[which] = torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t)
    check(*tensors, p=0.3)
    found = accesses(native)
    if which < 2:  # x, which shrink reads, and w, which only the vendor's GEMM does
        assert found == {"shrink": ("gather all", "whole")[which], "expand": "whole"}
    else:
        assert set(found.values()) == {"whole"}, "an adapter is copied"


@pytest.mark.parametrize(
    ("n", "k", "rank", "shrink", "expand"),
    [
        (71, 40, 8, "whole", "whole"),
        (72, 41, 8, "gather all", "whole"),
        (72, 40, 7, "gather ranks", "gather ranks"),
        (71, 41, 7, "gather all", "gather ranks"),
    ],
)
def test_ragged_sizes_are_seen(native, n, k, rank, shrink, expand):
    check(*matrices(70, n, k, rank, "bf16"), p=0.3, schedule="cublas")
    assert accesses(native) == {"shrink": shrink, "expand": expand}
    if k % 8 == 0:
        check(*matrices(70, n, k, rank, "bf16"), p=0.3, schedule="one launch")
        assert accesses(native) == {"ticketed": shrink}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_adapters(dtype):
    x, weight, lora_A, lora_B, bias = matrices(70, 72, 40, 8, dtype, bias=True)
    lora_A, lora_B = (torch.randn(t.shape) / t.shape[1] ** 0.5 for t in (lora_A, lora_B))
    y, s = emulated(x, weight, lora_A, lora_B, bias)
    rounded_y, rounded_s = emulated(x, weight, lora_A.to(dtype), lora_B.to(dtype), bias)
    assert torch.equal(y, rounded_y)
    assert torch.equal(s, rounded_s)


def test_dropout_everywhere_and_mask():
    x, weight, lora_A, lora_B, _ = matrices(70, 72, 40, 8, "bf16")
    assert not emulated(x, weight, lora_A, lora_B, p=1.0)[1].any()
    ones = torch.ones_like(x)
    _, s = emulated(ones, weight, torch.ones_like(lora_A), lora_B, p=0.5)
    kept = philox.keep_mask(SEED, *x.shape, 0.5).sum(1, keepdim=True)
    assert torch.equal(s, (2.0 * kept).to(s.dtype).expand_as(s))


def test_limits_are_known_by_device(native):
    """Kills: another device's limits. What a device has once said is not asked again."""
    native.set_sms(1)  # forgets
    assert [native.limits_of(device, sms) for device, sms in ((0, 3), (1, 7), (0, 5))] == [3, 7, 3]
    native.set_sms(1)


def test_other_dtypes_are_refused():
    with pytest.raises(RuntimeError, match="bfloat16, float16 and, in tf32, float32"):
        emulated(*matrices(70, 72, 40, 8, torch.float64)[:4])


@pytest.mark.parametrize(
    ("n", "k", "rank", "access"), [(76, 44, 4, "whole"), (76, 42, 4, "gather all"), (75, 44, 4, "gather ranks")]
)
def test_float32_is_multiplied_in_tf32(native, n, k, rank, access):
    x, weight, lora_A, lora_B, bias = matrices(70, n, k, rank, "tf32", bias=True)
    y, s, *_ = check_forward((x, weight, lora_A, lora_B, bias))
    assert torch.equal(emulated(x, weight, lora_A, lora_B, bias)[0], y)
    assert is_whole(native), "x is read by the vendor's GEMM alone"
    check_backward((grad_y_of(x, weight), x, saved_s(x, lora_A), weight, lora_A, lora_B))
    backward((grad_y_of(x, weight), x, s, weight, lora_A, lora_B))
    assert accesses(native)["split rows"] == access
    other = emulated(x, weight, lora_A.double(), lora_B.double(), bias)
    assert torch.equal(other[0], y), "other adapters"


@pytest.mark.parametrize(("m", "schedule"), [(3, "decode"), (50, "dual"), (130, "ticketed")])
def test_schedules(native, m, schedule):
    check(*matrices(m, 72, 520, 16, "bf16", bias=True))
    assert last_launch(native)["schedule"] == schedule


def test_an_unknown_schedule_is_refused():
    """Kills: a name that nobody knows means the fastest."""
    x, weight, lora_A, lora_B, _ = matrices(3, 72, 40, 8, "bf16")
    known = 'schedule must be "auto", "tensor cores", "one launch", "cublas", "wgmma" or "wgmma, clusters", '
    known += 'got "cutlass"'
    with pytest.raises(RuntimeError, match=known):
        check(x, weight, lora_A, lora_B, schedule="cutlass")
    with pytest.raises(RuntimeError, match=known):
        backward((grad_y_of(x, weight), x, saved_s(x, lora_A), weight, lora_A, lora_B), schedule="cutlass")


# -------------------------------------------------------------------------------------------------- gradients


def backward(args, *, p=0.0, needs=(True, True, True), schedule=AUTO):
    """Gradients by the emulated op, by plain torch code and in float64; args are (grad_y, x, s, weight, A, B)."""
    seed = SEED if p > 0 else None
    ours = torch.ops.lora_kernels_emulated.lora_linear_backward(*args, seed, 1.7, p, *needs, schedule)
    unfused = BACKWARD.reference(*args, seed, 1.7, p, *needs)
    exact = BACKWARD.reference(*(t.double() for t in args), seed, 1.7, p, *needs)
    return ours, unfused, exact


def problem(lead, n, k, rank, dtype, *, float_adapters=False):
    _, weight, lora_A, lora_B, _ = matrices(1, n, k, rank, dtype, float_adapters=float_adapters)
    x, grad_y = torch.randn(*lead, k).to(dtype), torch.randn(*lead, n).to(dtype)
    return grad_y, x, (x.double() @ lora_A.double().t()).to(dtype), weight, lora_A, lora_B


@pytest.mark.parametrize("rank", [16, 24, 7])
@pytest.mark.parametrize("float_adapters", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients(dtype, float_adapters, rank):
    args = problem((2, 3, 50), 72, 136, rank, dtype, float_adapters=float_adapters)
    for ours, unfused, exact, like in zip(*backward(args, p=0.3), (args[1], args[4], args[5])):
        assert (ours.shape, ours.dtype) == (like.shape, like.dtype)
        assert_as_accurate(ours, unfused, exact)


@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3))[1:], ids=str)
def test_gradients_that_are_not_needed_are_empty(needs):
    for need, ours, unfused, exact in zip(needs, *backward(problem((70,), 72, 40, 8, torch.bfloat16), needs=needs)):
        if need:
            assert_as_accurate(ours, unfused, exact)
        else:
            assert ours.numel() == 0


def test_gradients_of_other_layouts():
    grad_y, x, s, weight, lora_A, lora_B = problem((70,), 72, 40, 8, torch.bfloat16)
    args = (*(t.t().contiguous().t() for t in (grad_y, x, s, weight)), wide(lora_A), wide(lora_B))
    for ours, unfused, exact in zip(*backward(args)):
        assert_as_accurate(ours, unfused, exact)


OPERANDS = ("grad_y", "x", "s", "weight", "lora_A", "lora_B")


def off_16_bytes(t):
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t)


@pytest.mark.parametrize("laid_out", [wide, off_16_bytes])
@pytest.mark.parametrize("name", OPERANDS)
@pytest.mark.parametrize("schedule", [AUTO, "cublas"])
def test_gradients_of_one_operand_that_lies_otherwise(schedule, name, laid_out):
    # Strided: s is read as rows of the rank's length, and must be copied. Misaligned: every operand must be asked,
    # by the launch that reads it: s is read by dX's, or, beside the vendor's GEMM, by that of dB.
    args = list(problem((70,), 72, 40, 8, torch.bfloat16))
    args[OPERANDS.index(name)] = laid_out(args[OPERANDS.index(name)])
    for ours, unfused, exact in zip(*backward(args, p=0.3, schedule=schedule)):
        assert_as_accurate(ours, unfused, exact)


@pytest.mark.parametrize(
    ("n", "k", "rank", "needs", "expand", "grads"),
    [
        (71, 40, 8, (True, True, True), "whole", "gather ranks"),
        (71, 40, 8, (True, True, False), "whole", "whole"),
        (72, 41, 8, (True, True, True), "gather all", "gather all"),
        (72, 41, 8, (True, False, True), "gather all", "whole"),
        (72, 40, 7, (True, True, True), "gather ranks", "gather ranks"),
    ],
)
def test_gradients_gather_what_is_ragged_where_it_is_read(native, n, k, rank, needs, expand, grads):
    """Kills: an odd n, of dY alone, makes x be gathered, and dX's branch, which reads neither."""
    args = problem((70,), n, k, rank, torch.bfloat16)
    for need, ours, unfused, exact in zip(needs, *backward(args, p=0.3, needs=needs, schedule="cublas")):
        if need:
            assert_as_accurate(ours, unfused, exact)
    assert accesses(native) == {"expand": expand, "split rows": grads}


@pytest.mark.parametrize("float_adapters", [False, True])
def test_gradients_without_rows_are_zero(float_adapters):
    args = problem((0,), 72, 40, 8, torch.bfloat16, float_adapters=float_adapters)
    (grad_x, grad_A, grad_B), *_ = backward(args)
    assert grad_x.shape == (0, 40)
    assert not grad_A.any()
    assert not grad_B.any()


# --------------------------------------------------------------------------------------------------- counters

CALLERS_STREAM = 0x77


def live_bytes(call):
    """(what ``call`` returns, bytes that it has allocated and not given back)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    events = profile.profiler.kineto_results.events()
    return result, sum(event.nbytes() for event in events if event.name() == "[memory]")


def steps(m, n, k, rank):
    """A forward and a backward of such a problem, to be called."""
    x, weight, lora_A, lora_B, _ = matrices(m, n, k, rank, "bf16")
    args = grad_y_of(x, weight), x, saved_s(x, lora_A), weight, lora_A, lora_B
    needs = (True, True, True)
    return (
        lambda: emulated(x, weight, lora_A, lora_B, p=0.3),
        lambda: torch.ops.lora_kernels_emulated.lora_linear_backward(*args, SEED, 1.7, 0.3, *needs, AUTO),
    )


def test_a_call_keeps_no_memory(native):
    # What lives on between calls belongs to whichever pool the call ran in: CUDA graph trees refuse it. No other test
    # has so many counters, which would have to be kept now if they were not kept before.
    forward, _ = steps(128 * 1100, 8, 8, 8)
    results, live = live_bytes(forward)
    assert native.launches()[0]["counters"]
    assert live == sum(t.numel() * t.element_size() for t in results)


def test_every_launch_finds_counters_that_are_zero(native):
    # One memset per call, on the stream of its launches: a node of the graph if they are captured.
    native.set_stream(CALLERS_STREAM)
    for step in steps(300, 264, 136, 16):
        for _ in range(3):
            before = native.memsets()
            step()
            launches = native.launches()
            assert any(launch["counters"] for launch in launches)
            assert all(launch["counters_were_zero"] for launch in launches)
            assert native.memsets() == before + 1
            assert {native.memset_stream()} == {launch["stream"] for launch in launches} == {CALLERS_STREAM}


@pytest.mark.parametrize(("m", "n", "schedule"), [(3, 264, "decode"), (70, 64, "dual")])
def test_a_launch_that_needs_no_counters_has_none(native, m, n, schedule):
    before = native.memsets()
    check(*matrices(m, n, 40, 8, "bf16"))
    launch = last_launch(native)
    assert (launch["schedule"], launch["counters"]) == (schedule, 0)
    assert native.memsets() == before


def test_counts_of_a_failed_launch_are_seen_by_no_other(native):
    forward, backward = steps(300, 264, 136, 16)
    native.fail_launches(True)
    for step, op in ((forward, "lora_linear"), (backward, "lora_linear_backward")):
        with pytest.raises(RuntimeError, match=f"^{op}: launch failure"):
            step()
    native.fail_launches(False)
    for step in (forward, backward):
        step()
        assert all(launch["counters_were_zero"] for launch in native.launches())


def test_no_rows_launch_nothing(native):
    before = native.memsets()
    y, s = emulated(torch.empty(0, 40).bfloat16(), *matrices(1, 72, 40, 8, "bf16")[1:4])
    assert (y.shape, s.shape) == ((0, 72), (0, 8))
    assert native.memsets() == before


@pytest.mark.parametrize("namespace", ["lora_kernels_emulated", "lora_kernels_native"])
def test_a_rank_of_0_is_refused(namespace):
    # The kernels read the last row of A where a row is past its end.
    ops = getattr(torch.ops, namespace)
    x, weight, lora_A, lora_B, _ = matrices(70, 72, 40, 8, torch.float32)
    empty = (lora_A[:0], lora_B[:, :0])
    with pytest.raises(RuntimeError, match=r"lora_A must be .* rank of at least 1"):
        ops.lora_linear(x, weight, *empty, None, None, 1.0, 0.0, AUTO)
    grad_y, s = grad_y_of(x, weight), torch.empty(70, 0)
    with pytest.raises(RuntimeError, match=r"lora_A must be .* rank of at least 1"):
        ops.lora_linear_backward(grad_y, x, s, weight, *empty, None, 1.0, 0.0, True, True, True, AUTO)


@pytest.mark.parametrize("rows", [1, misfits.M])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_launched_on_what_does_not_fit(rows, dtype):
    ops = torch.ops.lora_kernels_emulated
    for name in misfits.FORWARD:
        with pytest.raises(RuntimeError, match=misfits.message(name)):
            ops.lora_linear(*misfits.lora_linear(name, rows, dtype), AUTO)
    for name in misfits.BACKWARD:
        with pytest.raises(RuntimeError, match=misfits.message(name)):
            ops.lora_linear_backward(*misfits.lora_linear_backward(name, rows, dtype), AUTO)


def test_nothing_is_launched_on_tensors_of_several_devices():
    x, weight, lora_A, lora_B, bias = matrices(70, 72, 40, 8, "bf16", bias=True)
    grad_y, s = grad_y_of(x, weight), saved_s(x, lora_A)
    named = {"weight": weight, "lora_A": lora_A, "lora_B": lora_B, "seed": SEED}
    forward, backward = (x, weight, lora_A, lora_B, bias, SEED), (grad_y, x, s, weight, lora_A, lora_B, SEED)
    ops = torch.ops.lora_kernels_emulated
    for name, tensor in (named | {"bias": bias}).items():
        with pytest.raises(RuntimeError, match=f"{name} must be on x's device"):
            ops.lora_linear(*misfits.elsewhere(forward, tensor), 1.0, 0.5, AUTO)
    for name, tensor in (named | {"grad_y": grad_y, "s": s}).items():
        with pytest.raises(RuntimeError, match=f"{name} must be on x's device"):
            ops.lora_linear_backward(*misfits.elsewhere(backward, tensor), 1.0, 0.5, True, True, True, AUTO)
