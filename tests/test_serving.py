"""``integrations/serving.py``: values against float64 loops, what a captured graph may rely on, and bad arguments."""

import pytest
import torch
from numerics import assert_as_accurate
from poisoned import memory_of_nan  # noqa: F401
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import lora_kernels as lk
from lora_kernels import dispatch
from lora_kernels.functional import multi_lora_shrink
from lora_kernels.integrations.serving import AdapterSlots, LoRAPool, ServingStep

FP32, FP64 = torch.float32, torch.float64
K, WIDTHS, MOST = 12, {"qkv": (8, 4, 4), "gate_up": (6, 6), "o": (10,)}, 5


@pytest.fixture(params=["reference", None], ids=str)
def backend(request):
    """None: what dispatch chooses."""
    with lk.use_backend(request.param):
        yield request.param


def pair(rank, k, n):
    return torch.randn(rank, k), torch.randn(n, rank)


def adapter(rank, only=None, leave_out=()):
    """Factors of each slice by pool; ``only``: that slice of qkv."""
    return {
        name: [
            pair(rank, K, n) if only is None or i == only or name != "qkv" else None for i, n in enumerate(widths)
        ]
        for name, widths in WIDTHS.items()
        if name not in leave_out
    }  # fmt: skip


def pools(dtype=FP32):
    return {name: LoRAPool(3, MOST, K, widths, dtype=dtype) for name, widths in WIDTHS.items()}


def looped(base, x, name, adapters, scalings, rows):
    """Row by row, in base's dtype; ``adapters`` and ``scalings`` by name."""
    y = base.clone()
    for m, who in enumerate(rows):
        first = 0
        for i, width in enumerate(WIDTHS[name]):
            own = None if who is None else adapters[who].get(name, [None] * 3)[i]
            if own is not None:
                A, B = (t.to(base.dtype) for t in own)
                y[m, first : first + width] += scalings[who] * ((x[m].to(base.dtype) @ A.t()) @ B.t())
            first += width
    return y


ADAPTERS = {"a": dict(rank=3), "b": dict(rank=5, only=2), "c": dict(rank=1, leave_out=("o",))}
FACTORS = {"a": 0.5, "b": -2.0, "c": 1.25}
STEPS = [
    (["a", None, "b", "c", "a"], [2, 3, 1, 2, 4]),
    (["c"], None),
    ([None, None], [1, 2]),
    (["b", "a", "c", None], [0, 3, 0, 1]),
]


def loaded(dtype=FP32):
    adapters = {name: adapter(**how) for name, how in ADAPTERS.items()}
    slots = AdapterSlots(3, pools(dtype))
    for name, weights in adapters.items():
        slots.load(name, weights, scaling=FACTORS[name])
    return slots, adapters


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("names", STEPS, ids=range(len(STEPS)))
def test_layers(names, padding, backend):
    """Kills: a slice that begins at the largest rank; slices that an adapter leaves alone; rows behind the filled ones
    that still belong to the step before.
    """
    slots, adapters = loaded()
    step = ServingStep(20, slots)
    step.fill(["a"] * 20)
    step.fill(*names)
    rows = [who for who, n in zip(names[0], names[1] or [1] * len(names[0])) for _ in range(n)] + [None] * padding
    for name, pool in slots.pools.items():
        x, base = torch.randn(len(rows), K), torch.randn(len(rows), sum(WIDTHS[name]))
        exact, plain = (looped(base.to(d), x, name, adapters, FACTORS, rows) for d in (FP64, FP32))
        y = base.clone()
        assert pool.add_(y, x, step) is y
        assert_as_accurate(y, plain, exact)


def test_the_whole_layer():
    slots, _ = loaded()
    step = ServingStep(8, slots)
    step.fill(["a", None, "b"], [3, 3, 2])
    x = torch.randn(2, 4, K)
    for name, pool in slots.pools.items():
        weight, bias = torch.randn(sum(WIDTHS[name]), K), torch.randn(sum(WIDTHS[name]))
        expected = pool.add_(torch.nn.functional.linear(x, weight, bias), x, step)
        torch.testing.assert_close(pool.linear(x, weight, bias, step), expected)
        used = ("multi_lora_linear", "reference"), ("multi_lora_linear", "cpu")
        assert any(key in lk.stats()["served"] for key in used) == (pool.slices == 1)
        lk.reset_stats()


def test_tensor_parallel_shards():
    """Column-parallel: rows of B. Row-parallel: columns of A, and partial outputs that are summed."""
    slots, adapters = loaded()
    step = ServingStep(6, slots)
    step.fill(["a", "b", None, "c"], [2, 1, 1, 2])
    x, base = torch.randn(6, K), torch.randn(6, 10)
    whole = slots.pools["o"].add_(base.clone(), x, step)
    columns, total = [], torch.zeros(6, 10)
    for part in (slice(0, 5), slice(5, 10)):
        shard = AdapterSlots(3, {"o": LoRAPool(3, MOST, K, 5)})
        for name, of_layers in adapters.items():
            own = [(A, B[part]) for A, B in of_layers.get("o", ())] or [None]
            shard.load(name, {"o": own} if own != [None] else {"o": [(torch.zeros(1, K), torch.zeros(5, 1))]},
                       scaling=FACTORS[name])  # fmt: skip
        own_step = ServingStep(6, shard)
        own_step.fill(["a", "b", None, "c"], [2, 1, 1, 2])
        columns.append(shard.pools["o"].add_(base[:, part].clone(), x, own_step))
    torch.testing.assert_close(torch.cat(columns, 1), whole)
    for part in (slice(0, 7), slice(7, K)):
        pool = LoRAPool(3, MOST, part.stop - part.start, 10)
        pool.lora_A.copy_(slots.pools["o"].lora_A[:, :, part])
        pool.lora_B.copy_(slots.pools["o"].lora_B)
        total += pool.add_(base / 2, x[:, part], step)
    torch.testing.assert_close(total, whole)


def test_loading_and_evicting():
    slots, adapters = loaded()
    assert slots.loaded == {"a": 0, "b": 1, "c": 2}
    with pytest.raises(ValueError, match="all 3 slots are taken"):
        slots.load("d", adapters["a"], scaling=1.0)
    slots.evict("b")
    step, pool = ServingStep(4, slots), slots.pools["o"]
    with pytest.raises(ValueError, match="'b' is not loaded, loaded are 'a', 'c'"):
        step.fill(["a", "b"])
    x, base = torch.randn(3, K), torch.randn(3, 10)
    step.fill([1, 1, 1])  # a slot without an adapter
    assert torch.equal(pool.add_(base.clone(), x, step), base)
    # What is loaded next has fewer ranks and fewer pools, and nothing of the slot's last adapter.
    later = {"o": pair(2, K, 10)}
    assert slots.load("d", later, scaling=3.0) == 1
    step.fill(["d", None, "a"])
    expected = base.clone()
    expected[0] += 3.0 * (x[0] @ later["o"][0].t()) @ later["o"][1].t()
    A, B = adapters["a"]["o"][0]
    expected[2] += 0.5 * (x[2] @ A.t()) @ B.t()
    torch.testing.assert_close(pool.add_(base.clone(), x, step), expected)
    base = torch.randn(3, 16)
    assert torch.equal(slots.pools["qkv"].add_(base.clone(), x, step)[0], base[0])


def test_nothing_is_left_of_an_adapter_that_held_nan():
    """Kills: a slot that is cleared in one factor alone; its zeros would meet the other's NaN."""
    slots = AdapterSlots(1, {"layer": LoRAPool(1, MOST, K, (6, 6))})
    of_nan = torch.full((MOST, K), torch.nan), torch.full((6, MOST), torch.nan)
    slots.load("bad", {"layer": [of_nan] * 2}, scaling=1.0)
    slots.evict("bad")
    first = pair(3, K, 6)
    slots.load("good", {"layer": [first, None]}, scaling=1.0)
    step, x = ServingStep(2, slots), torch.randn(2, K)
    step.fill(["good", None])
    y = slots.pools["layer"].add_(torch.zeros(2, 12), x, step)
    torch.testing.assert_close(y[0, :6], (x[0] @ first[0].t()) @ first[1].t())
    assert not y[0, 6:].any()
    assert not y[1].any()


def test_a_load_that_fails_changes_nothing():
    slots, _ = loaded()
    slots.evict("b")
    before = [t.clone() for pool in slots.pools.values() for t in (pool.lora_A, pool.lora_B)]
    bad = {
        "weights must name pools": {"k_proj": pair(2, K, 4)},
        "pairs must be 3, one for each slice": {"o": pair(2, K, 10), "qkv": [pair(2, K, 8)]},
        "a pair must be": {"gate_up": [pair(2, K, 6)] * 2, "o": pair(2, K, 9)},
        "weights must have at least one pair of rank >= 1, got .'qkv'.": {"qkv": [None] * 3},
        "rank must be from 1 to 5": {"o": pair(6, K, 10)},
    }
    for message, weights in bad.items():
        with pytest.raises(ValueError, match=message):
            slots.load("d", weights, scaling=1.0)
    with pytest.raises(ValueError, match="'a' is loaded already"):
        slots.load("a", {"o": pair(2, K, 10)}, scaling=1.0)
    after = [t for pool in slots.pools.values() for t in (pool.lora_A, pool.lora_B)]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert slots.loaded == {"a": 0, "c": 2}
    assert slots.ranks.tolist() == [3, 0, 1]


def test_bad_steps():
    slots, _ = loaded()
    step = ServingStep(4, slots)
    step.fill(["a", "b"])
    for message, given in {
        "room for 4 rows, got 5": (["a"] * 5,),
        "lengths must be 2 numbers": (["a", "b"], [1]),
        "lengths must be 1 numbers from 0 on": (["a"], [-1]),
        "number must be from -1 to 2": ([3],),
        "must be integers, one for each row": (torch.zeros(3),),
        "without lengths": (torch.zeros(2, dtype=torch.int64), [1, 2]),
    }.items():
        with pytest.raises(ValueError, match=message):
            step.fill(*given)
    assert step.rows == 2
    assert step.adapter_ids.tolist() == [0, 1, -1, -1]
    for rows in (1, 5):
        with pytest.raises(ValueError, match=f"2 rows were filled and there is room for 4, got x with {rows}"):
            slots.pools["o"].add_(torch.zeros(rows, 10), torch.zeros(rows, K), step)
    with pytest.raises(ValueError, match="max_rows must be at least 1"):
        ServingStep(0, slots)
    with pytest.raises(ValueError, match="pool 'o' must have 2 slots"):
        AdapterSlots(2, {"o": LoRAPool(3, MOST, K, 10)})
    with pytest.raises(ValueError, match="max_rank must be at least 1"):
        LoRAPool(3, 0, K, 10)
    with pytest.raises(ValueError, match="one for each of 3 slots"):
        slots.assign([1, 2], [1.0])


def test_ids_may_come_from_the_device():
    slots, _ = loaded()
    step = ServingStep(6, slots)
    step.fill(["c", "c"], [3, 3])
    step.fill(torch.tensor([2, -1, 0, 2]))
    assert step.adapter_ids.tolist() == [2, -1, 0, 2, -1, -1]
    assert step.row_ranks.tolist() == [1, 0, 3, 1, 0, 0]
    assert step.ends.tolist() == [1, 1, 3]
    assert step.order[:3].tolist() == [2, 0, 3]


def test_recorded_calls_serve_the_next_step(monkeypatch):
    """A graph's replay: the ops of a step run again, on the arguments that they had, after all of it has changed.

    Kills: a ``fill``, ``load``, ``evict`` or ``assign`` that makes tensors instead of writing into them; a length, rank
    or factor that is read on the host.
    """
    slots, adapters = loaded()
    step = ServingStep(8, slots)
    step.fill(["a"] * 8)
    x, y, recorded, run = torch.randn(8, K), torch.randn(8, 10), [], dispatch.run

    def recording(spec, *args):
        result = run(spec, *args)
        recorded.append((spec, args, result))
        return result

    monkeypatch.setattr(dispatch, "run", recording)
    slots.pools["o"].add_(y, x, step)
    monkeypatch.undo()
    assert len(recorded) == 2

    slots.evict("a")
    adapters["d"] = adapter(4)
    slots.load("d", adapters["d"], scaling=0.75)
    step.fill(["b", "d", None], [2, 3, 1])
    rows, scalings = ["b"] * 2 + ["d"] * 3 + [None] * 3, FACTORS | {"d": 0.75}
    base = torch.randn(8, 10)
    y.copy_(base)
    x.copy_(torch.randn(8, K))
    (shrink, shrink_args, s), (expand, expand_args, _) = recorded
    s.copy_(run(shrink, *shrink_args))
    run(expand, *expand_args)
    exact = looped(base.double(), x, "o", adapters, scalings, rows)
    assert_as_accurate(y, looped(base, x, "o", adapters, scalings, rows), exact)


def test_nothing_is_read_on_the_host(monkeypatch):
    """Tensors that have no values, a GPU's where torch has those: what depends on one fails. Kernels are left out."""
    device = "cuda" if torch.backends.cuda.is_built() else "cpu"
    monkeypatch.setattr(dispatch, "run", lambda spec, *args: spec.fake(*args))
    with FakeTensorMode():
        pool = LoRAPool(3, MOST, K, WIDTHS["qkv"], device=device)
        step = ServingStep(8, AdapterSlots(3, {"qkv": pool}, device=device))
        step.fill(torch.empty(8, dtype=torch.int32, device=device))
        x, y = (torch.empty(8, size, device=device) for size in (K, sum(WIDTHS["qkv"])))
        assert pool.add_(y, x, step) is y
        assert multi_lora_shrink(x, pool.lora_A, step.adapter_ids).shape == (8, 3 * MOST)
        with pytest.raises(DataDependentOutputException):
            step.ends.tolist()


def test_buffers_stay_where_they_are():
    slots, adapters = loaded()
    step = ServingStep(8, slots)
    tensors = [step.adapter_ids, step.order, step.ends, step.row_ranks, slots.ranks, slots.scalings]
    tensors += [t for pool in slots.pools.values() for t in (pool.lora_A, pool.lora_B)]
    before = [t.data_ptr() for t in tensors]
    for names in (["a", "b"], [None], ["c"] * 8):
        step.fill(names)
        slots.evict("b")
        slots.load("b", adapters["b"], scaling=1.0)
        slots.assign([3, 5, 1], [0.5, 1.0, 1.25])
        now = [step.adapter_ids, step.order, step.ends, step.row_ranks, slots.ranks, slots.scalings]
        now += [t for pool in slots.pools.values() for t in (pool.lora_A, pool.lora_B)]
        assert [t.data_ptr() for t in now] == before
