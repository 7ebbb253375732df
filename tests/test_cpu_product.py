"""Which library makes a CPU product: measured once for each kind, overruled by the environment, torch's in a tie."""

import subprocess
import sys

import pytest
import torch

import lora_kernels as lk
from lora_kernels.support import cpu_product as product

FP32 = torch.float32


@pytest.fixture
def machine(monkeypatch):
    """A CPU on which oneDNN's product takes ``machine.onednn`` seconds and MKL's 1; notes every stand-in."""

    class Machine:
        onednn = 0.5

    def fastest(own, other):
        a, b = (cell.cell_contents for cell in own.__closure__)
        Machine.stand_ins.append((a, b))
        return [1.0, Machine.onednn], 7

    Machine.stand_ins = []
    monkeypatch.setattr(product, "_fastest", fastest)
    monkeypatch.setattr(product, "_has_both", lambda: True)
    monkeypatch.setattr(product, "_chosen", {})
    monkeypatch.setattr(product, "_mode", "measure")
    return Machine


def matrix(n, k, offset=0):
    memory = torch.zeros(n * k + 32)
    first = (offset - memory.data_ptr()) % 64 // 4
    return memory[first : first + n * k].view(n, k)


@pytest.mark.parametrize(("onednn", "schedule"), [(0.5, "onednn"), (0.98, "aten"), (1.0, "aten"), (2.0, "aten")])
def test_the_faster_one_is_taken_and_a_tie_is_torchs(onednn, schedule, machine):
    machine.onednn = onednn
    found = product.choose(512, True, matrix(96, 64))
    assert found.schedule == schedule
    ratio = f"{1 / onednn:.2f} times as fast" if schedule == "onednn" else f"took {onednn:.2f} times as long"
    assert ratio in found.reason
    assert "in 7 products of 512x64 and 64x96 on 1 thread, aligned" in found.reason


def test_a_kind_is_measured_once(machine):
    for weight in (matrix(96, 64), matrix(96, 64), matrix(65, 33)):
        for rows in (512, 257):
            product.choose(rows, True, weight)
    assert len(machine.stand_ins) == 1
    others = [
        lambda: product.choose(513, True, matrix(96, 64)),  # more rows
        lambda: product.choose(512, True, matrix(129, 64)),
        lambda: product.choose(512, True, matrix(96, 65)),
        lambda: product.choose(512, False, matrix(96, 64)),
        lambda: product.choose(512, True, matrix(64, 96).t()),
        lambda: product.choose(512, True, matrix(64, 96), b_is_k_by_n=True),
        lambda: product.choose(512, True, matrix(96, 64, offset=40)),
    ]
    for other in others:
        other()
    assert len(machine.stand_ins) == 1 + len(others) - 1, "a [k, n] weight is the transposed view of one by rows"
    torch.set_num_threads(2)
    try:
        product.choose(512, True, matrix(96, 64))
    finally:
        torch.set_num_threads(1)
    assert len(machine.stand_ins) == len(others) + 1


@pytest.mark.parametrize("offset", [0, 40])
@pytest.mark.parametrize("gradient", [False, True])
def test_the_stand_in_is_of_its_kind(offset, gradient, machine):
    """Sizes, layout and alignment decide; a stand-in that is always aligned would choose wrongly for mapped files."""
    weight = matrix(96, 64, offset)
    product.choose(300, True, weight, b_is_k_by_n=gradient)
    ((a, b),) = machine.stand_ins
    assert a.shape == (300, 96 if gradient else 64)
    assert b.shape == ((64, 96) if gradient else (96, 64))
    assert b.stride() == ((1, 64) if gradient else (64, 1))
    assert b.data_ptr() % 64 == offset


def test_a_stand_in_is_small(machine):
    for rows, n, k in ((1 << 20, 49152, 576), (16, 8192, 8192), (1 << 14, 4096, 4096)):
        weight = torch.empty(1).expand(n, k)  # no memory: only sizes and strides are looked at
        product._measured(product.Kind(1, 1, 1, True, True, True, 1), (rows, *weight.shape), product._by_onednn)
        a, b = machine.stand_ins[-1]
        assert a.shape[0] >= min(rows, product.FROM_ROWS)
        assert a.shape[0] * b.numel() <= 1 << 27


def test_what_is_not_measured(machine):
    assert product.choose(product.FROM_ROWS - 1, True, matrix(96, 64)) is product.MKL
    assert product.choose(512, True, matrix(96, 128)[:, :64]) is product.MKL, "oneDNN would have it copied"
    torch.use_deterministic_algorithms(True)
    try:
        assert product.choose(512, True, matrix(96, 64)).schedule == "aten"
        assert product.choose_for_few_rows(2, matrix(96, 64)).schedule == "aten"
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.backends.mkldnn.flags(enabled=False):
        assert product.choose(512, True, matrix(96, 64)) is product.MKL
    assert machine.stand_ins == []
    assert product.choose_for_few_rows(2, matrix(96, 64)).schedule == "decode"


def test_why_says_which_and_why(machine):
    x, w = torch.randn(512, 64), matrix(96, 64)
    A, B = torch.randn(4, 64), torch.randn(96, 4)
    for op, args in (("lora_linear", (x, w, A, B)), ("frozen_linear", (x, w))):
        choice = lk.why(op, *args)
        assert (choice.backend, choice.schedule) == ("cpu", "onednn")
        assert "2.00 times as fast as torch's own" in choice.reason


def test_directions_are_chosen_apart(machine, monkeypatch):
    """The forward may go to one library and the gradient to the other."""
    weight, calls = matrix(96, 64), []
    monkeypatch.setattr(product, "_measured", lambda kind, *_: calls.append(kind.b_by_rows) or product.MKL)
    x = torch.randn(512, 64, requires_grad=True)
    y = lk.lora_linear(x, weight, torch.randn(4, 64, requires_grad=True), torch.randn(96, 4))
    assert calls == [True]
    y.sum().backward()
    assert calls == [True, False]


def test_measuring_leaves_no_trace(monkeypatch):
    """Neither under a dispatch mode (FLOP counters), nor under autocast, nor in the generator's state."""
    monkeypatch.setattr(product, "_chosen", {})
    if not product._has_both():
        pytest.skip("this torch has one library only, so nothing is ever measured")
    from torch.utils.flop_counter import FlopCounterMode

    before = torch.get_rng_state()
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
        found = product.choose(512, True, matrix(96, 64))
    assert counter.get_total_flops() == 0
    assert found.schedule in ("aten", "onednn")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("mode", "schedule"), [("mkl", "aten"), ("onednn", "onednn"), ("fastest", None)])
def test_environment(mode, schedule):
    code = (
        "import torch, lora_kernels as lk\n"
        "from lora_kernels.support import cpu_product as product\n"
        "product._has_both = lambda: True\n"
        "choice = lk.why('frozen_linear', torch.randn(512, 8), torch.randn(16, 8))\n"
        "print(choice.schedule, choice.reason)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"LORA_KERNELS_CPU_PRODUCT": mode},
        capture_output=True,
        text=True,
        check=False,
    )
    if schedule is None:
        assert "LORA_KERNELS_CPU_PRODUCT: expected one of measure, mkl, onednn, got 'fastest'" in run.stderr
    else:
        assert run.stdout.startswith(f"{schedule} LORA_KERNELS_CPU_PRODUCT={mode}")
