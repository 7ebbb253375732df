"""``integrations/sglang.py`` against a stub of SGLang that has its signatures: values against loops in float64."""

import inspect
import sys

import pytest
import sglang_stub
import torch
from numerics import assert_as_accurate
from sglang_stub import Embedding, ForwardBatch, ForwardMode, Head, Layer, SpecInfo, sglang_installed

from lora_kernels.integrations import sglang as adapter

RANKS, SCALINGS, MOST = [4, 0, 7, 1], [0.5, 0.0, -1.5, 2.0], 7
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def backend():
    with sglang_installed():
        adapter._backend.cache_clear()
        adapter.register()
        yield sglang_stub.get_backend_from_name("lora_kernels")(len(RANKS), torch.device("cpu"), server_args=None)
    adapter._backend.cache_clear()


def factors(k, widths, dtype=torch.float32):
    """Of each slot and slice, A [rank, k] and B [width, rank], representable in ``dtype``, as float64."""

    def random(*size):
        return torch.randn(size).div(size[-1] ** 0.5 or 1.0).to(dtype).double()

    return [[(random(rank, k), random(width, rank)) for width in widths] for rank in RANKS]


def buffers(own, k, widths, dtype):
    """SGLang's pools: slices one behind the other at an adapter's own rank; NaN where no adapter has anything."""
    A = torch.full((len(own), len(widths) * MOST, k), torch.nan, dtype=dtype)
    B = torch.full((len(own), sum(widths), MOST), torch.nan, dtype=dtype)
    for slot, slices in enumerate(own):
        rank = RANKS[slot]
        A[slot, : len(widths) * rank] = torch.cat([a for a, _ in slices])
        B[slot, :, :rank] = torch.cat([b for _, b in slices])
    return A, B


def looped(x, base, own, widths, rows, dtype):
    """Row by row; ``rows``: the slot of each."""
    y, x = base.to(dtype).clone(), x.to(dtype)
    for m, slot in enumerate(rows):
        first = 0
        for width, (A, B) in zip(widths, own[slot]):
            y[m, first : first + width] += SCALINGS[slot] * ((x[m] @ A.to(dtype).t()) @ B.to(dtype).t())
            first += width
    return y


def prepare(backend, slots, lengths=None, **how):
    """Returns the slot of each row."""
    mode = ForwardMode.DECODE if lengths is None else ForwardMode.EXTEND
    batch = ForwardBatch(mode, len(slots), lengths or [], **how.pop("batch", {}))
    backend.prepare_lora_batch(
        forward_batch=batch, weight_indices=slots, lora_ranks=RANKS, scalings=SCALINGS, use_cuda_graph=False, **how
    )
    return [slot for slot, rows in zip(slots, lengths or [1] * len(slots)) for _ in range(rows)]


BATCHES = {
    "mixed": ([2, 1, 0, 2, 3], [3, 2, 4, 1, 1]),
    "decode": ([0, 2, 2, 1, 3, 0], None),
    "one row": ([2], None),
    "none has an adapter": ([1, 1], [2, 3]),
    "empty segments": ([0, 2, 1, 3], [0, 3, 0, 2]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("widths", [(10,), (6, 6), (8, 4, 4), (3, 5), (4, 2, 3, 1)], ids=str)
def test_layers(backend, widths, batch, dtype):
    """Kills: a slice that begins at the largest rank instead of the adapter's; ranks beyond an adapter's, which hold
    NaN; requests in place of rows; the factor of another slot; columns behind the last slice written to.
    """
    rows = prepare(backend, *BATCHES[batch])
    k, columns = 12, sum(widths) + 3
    own = factors(k, widths, dtype)
    weight, x = (torch.randn(n, k).to(dtype) for n in (columns, len(rows)))
    offsets = [0, *torch.tensor(widths).cumsum(0).tolist()]
    layer = Layer(backend, weight, *buffers(own, k, widths, dtype), offsets)
    base = x @ weight.t()
    exact, unfused = (looped(x, base, own, widths, rows, d) for d in (torch.float64, dtype))
    for y in (layer.forward(x), layer.forward_with_base(x)):
        assert y.dtype == dtype
        assert_as_accurate(y, unfused, exact)
        assert torch.equal(y[:, sum(widths) :], base[:, sum(widths) :])
        assert torch.equal(y[[i for i, slot in enumerate(rows) if RANKS[slot] == 0]], base[
            [i for i, slot in enumerate(rows) if RANKS[slot] == 0]
        ])  # fmt: skip


def test_a_branch_without_a_base_output(backend):
    rows = prepare(backend, [0, 2], [2, 2])
    own = factors(12, (8, 4, 4))
    A, B = buffers(own, 12, (8, 4, 4), torch.float32)
    x, none = torch.randn(4, 12), torch.zeros(4, 16)
    ours = backend.run_qkv_lora(x, A, B, output_offset_cpu=torch.tensor([0, 8, 12, 16]))
    expected = looped(x, none, own, (8, 4, 4), rows, torch.float64)
    assert_as_accurate(ours, expected.float(), expected)


def test_the_base_output_is_added_to_in_place(backend):
    prepare(backend, [0, 2])
    A, B = buffers(factors(12, (10,)), 12, (10,), torch.float32)
    x, base = torch.randn(2, 12), torch.randn(2, 10)
    s = backend.run_lora_a_sgemm(x, A)
    before = base.clone()
    assert backend.run_lora_b_sgemm(x=s, weights=B, base_output=base) is base
    assert not torch.equal(base, before)


@pytest.mark.parametrize("devices", [1, 2])
def test_row_parallel_layers_are_reduced_once(backend, devices):
    """Kills: a branch that every device adds in full; another reduction for s."""
    rows = prepare(backend, *BATCHES["mixed"])
    own = factors(12, (10,))
    A, B = buffers(own, 12, (10,), torch.float32)
    weight, x = torch.randn(10, 12), torch.randn(len(rows), 12)
    parts = []

    def all_reduce(part):
        parts.append(part.clone())
        return torch.full_like(part, torch.nan)  # the sum: of which nothing more is to be made

    for x_part, w_part, a_part in zip(x.chunk(devices, 1), weight.chunk(devices, 1), A.chunk(devices, 2)):
        layer = Layer(backend, w_part, a_part.contiguous(), B, (0, 10))
        assert layer.forward_with_base(x_part.contiguous(), all_reduce).isnan().all()
    assert [part.shape for part in parts] == [(len(rows), 10)] * devices
    exact, plain = (looped(x, x.to(d) @ weight.t().to(d), own, (10,), rows, d) for d in (torch.float64, torch.float32))
    assert_as_accurate(sum(parts), plain, exact)


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("logprobs", [False, True])
def test_the_head_gets_pruned_rows(backend, chunk, logprobs):
    """Kills: rows of the batch in place of those of the head, whole or in passes."""
    backend.chunk_of_logits = chunk
    slots, lengths, starts = [2, 1, 0], [3, 2, 4], [1, 2, 0]
    prepare(
        backend, slots, lengths, batch={"return_logprob": logprobs, "extend_logprob_start_lens_cpu": starts}
    )  # fmt: skip
    kept = [max(n - s, 1) for n, s in zip(lengths, starts)] if logprobs else [1, 1, 1]
    rows = [slot for slot, count in zip(slots, kept) for _ in range(count)]
    own = factors(12, (9,))
    weight, x = torch.randn(9, 12), torch.randn(len(rows), 12)
    head = Head(backend, weight, *buffers(own, 12, (9,), torch.float32), (0, 9))
    if chunk is None or len(rows) <= chunk:
        assert backend.lm_head_pass_batch_infos is None
        ours = head.forward(x)
    else:
        parts = []
        for i, part in enumerate(x.split(chunk)):
            backend._lm_head_pass_idx = i
            parts.append(head.forward(part))
        ours = torch.cat(parts)
    exact = looped(x, x.double() @ weight.t().double(), own, (9,), rows, torch.float64)
    assert_as_accurate(ours, looped(x, x @ weight.t(), own, (9,), rows, torch.float32), exact)


def test_embedding(backend):
    rows = prepare(backend, *BATCHES["mixed"])
    own = factors(20, (6,))
    table = torch.randn(20, 6)
    tokens = torch.randint(20, (len(rows),))
    layer = Embedding(backend, table, *buffers(own, 20, (6,), torch.float32), (0, 6))
    x = torch.nn.functional.one_hot(tokens, 20)
    exact = looped(x, table[tokens], own, (6,), rows, torch.float64)
    assert_as_accurate(layer.forward(tokens), looped(x, table[tokens], own, (6,), rows, torch.float32), exact)
    with pytest.raises(NotImplementedError, match="tokens that an adapter adds"):
        backend.run_lora_a_embedding(tokens, layer.A_buffer, 20, torch.zeros(4, 2, MOST))


def test_graphs_have_one_step_that_stays(backend):
    """Kills: metadata that a graph was captured with and the next batch leaves behind."""
    backend.init_decode_cuda_graph_batch_info(max_bs_in_cuda_graph=4, num_tokens_per_req=2)
    own = factors(12, (6, 6))
    layer = Layer(backend, torch.randn(12, 12), *buffers(own, 12, (6, 6), torch.float32), (0, 6, 12))
    seen = set()
    for slots in ([0, 2, 3], [2, 1]):
        batch = ForwardBatch(ForwardMode.TARGET_VERIFY, len(slots), spec_info=SpecInfo(2))
        backend.prepare_lora_batch(batch, slots, RANKS, SCALINGS, use_decode_cuda_graph=True)
        assert backend.batch_info.use_cuda_graph
        assert backend.batch_info.bs == len(slots)
        backend.batch_info.has_active_lora = True  # SGLang writes it
        step, x = backend.batch_info.step, torch.randn(8, 12)
        seen.add((step, *(t.data_ptr() for t in (step.adapter_ids, step.order, step.ends, step.slots.ranks))))
        rows = [slot for slot in slots for _ in range(2)] + [1] * (8 - 2 * len(slots))  # the graph's batch is padded
        exact = looped(x, x.double() @ layer.weight.t().double(), own, (6, 6), rows, torch.float64)
        assert_as_accurate(layer.forward(x), exact.float(), exact)
    assert len(seen) == 1


def test_an_idle_forward_has_no_adapters(backend):
    prepare(backend, [0])
    layer = Layer(backend, torch.randn(10, 12), *buffers(factors(12, (10,)), 12, (10,), torch.float32), (0, 10))
    backend.reset_batch_state()
    x = torch.randn(3, 12)
    assert torch.equal(layer.forward(x), x @ layer.weight.t())
    with pytest.raises(RuntimeError, match="before prepare_lora_batch"):
        layer.apply_lora(x @ layer.weight.t(), x)


def test_what_is_not_served_is_refused(backend):
    with pytest.raises(RuntimeError, match="before init_cuda_graph_batch_info"):
        prepare(backend, [0], use_decode_cuda_graph=True)
    with pytest.raises(NotImplementedError, match="graphs of prefill"):
        prepare(backend, [0], [3], use_prefill_cuda_graph=True)
    prepare(backend, [0, 1], [1, 1])
    A, B = buffers(factors(12, (6, 6)), 12, (6, 6), torch.float32)
    with pytest.raises(ValueError, match="output_offset_cpu"):
        backend.run_qkv_lora(torch.randn(2, 12), A, B, n_slices=2)
    with pytest.raises(ValueError, match="needs output_offset_cpu, 3 numbers"):
        backend.run_qkv_lora(torch.randn(2, 12), A, B, n_slices=2, output_offset_cpu=torch.tensor([0, 4, 8, 12]))
    backend.is_moe_lora = True
    with pytest.raises(NotImplementedError, match="experts of a mixture"):
        prepare(backend, [0])


def test_it_is_registered_under_a_name():
    with sglang_installed():
        adapter._backend.cache_clear()
        made = adapter.register("ours")
        assert sglang_stub.get_backend_from_name("ours") is made
        assert issubclass(made, sglang_stub.BaseLoRABackend)
        assert made.name == "lora_kernels"
        assert adapter.register("ours") is made
        assert sys.modules["sglang.srt.server_args"].LORA_BACKEND_CHOICES == ["triton", "csgmv", "ours"]
        del sys.modules["sglang.srt.server_args"].LORA_BACKEND_CHOICES  # as newer versions have it
        assert adapter.register("again") is made
    adapter._backend.cache_clear()


def test_every_method_is_called_as_the_base_class_declares_it(backend):
    """Whatever arguments SGLang's methods name, ours take by the same names."""
    compared = 0
    for name, method in inspect.getmembers(sglang_stub.BaseLoRABackend, inspect.isfunction):
        ours = getattr(type(backend), name)
        if ours is method:
            continue
        named = inspect.signature(ours).parameters
        wanted = inspect.signature(method).parameters
        assert [p for p, what in wanted.items() if what.kind not in (what.VAR_POSITIONAL, what.VAR_KEYWORD)
                and p not in named] == [], name  # fmt: skip
        compared += 1
    assert compared >= 8


def test_without_sglang(monkeypatch):
    monkeypatch.setitem(sys.modules, "sglang", None)
    with pytest.raises(ImportError, match="needs SGLang"):
        adapter.register()
