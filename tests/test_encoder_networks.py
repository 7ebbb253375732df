"""The networks of prompt encoders, trained on the CPU, against torch's own modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.profiler import profile

from lora_kernels import _native, encoder_networks
from lora_kernels.encoder_networks import run_lstm, run_mlp
from lora_kernels.ops import _cpu

FP64 = torch.float64


def lstm(layers=2, bidirectional=True, dropout=0.0, bias=True, dtype=FP64):
    return nn.LSTM(
        5, 7, layers, bias=bias, dropout=dropout, bidirectional=bidirectional, batch_first=True, dtype=dtype
    )  # fmt: skip


def mlp(dtype=torch.float32):
    return nn.Sequential(nn.Linear(24, 40, dtype=dtype), nn.ReLU(), nn.Linear(40, 16, bias=False, dtype=dtype))


def gradients(run, network, rows, grad):
    """Output and gradients of rows and of the parameters that train."""
    rows = rows.clone().requires_grad_()
    leaves = [rows, *(p for p in network.parameters() if p.requires_grad)]
    torch.manual_seed(5)  # of the dropout
    y = run(network, rows)
    return [y, *torch.autograd.grad(y, leaves, grad)]


def call(network, rows):
    return network(rows.unsqueeze(0))[0].squeeze(0)


def is_ours(run, network, rows):
    """Whether this call goes through our functions."""
    y = run(network, rows)
    seen, names = [y.grad_fn], set()
    while seen:
        node = seen.pop()
        if node is not None and node.name() not in names:
            names.add(node.name())
            seen += [n for n, _ in node.next_functions]
    return any("_Recurrence" in name or "_Linear" in name for name in names)


@pytest.mark.parametrize("steps", [1, 2, 9])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_lstm_equals_torch(bidirectional, bias, steps):
    torch.manual_seed(0)
    network = lstm(bidirectional=bidirectional, bias=bias, dropout=0.3)
    rows, grad = torch.randn(steps, 5, dtype=FP64), torch.randn(steps, 14 if bidirectional else 7, dtype=FP64)
    assert is_ours(run_lstm, network, rows)
    for ours, theirs in zip(
        gradients(run_lstm, network, rows, grad), gradients(call, network, rows, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_a_long_narrow_lstm_is_torchs():
    assert is_ours(run_lstm, lstm(), torch.randn(encoder_networks.FEW_STEPS, 5, dtype=FP64))
    assert not is_ours(run_lstm, lstm(), torch.randn(encoder_networks.FEW_STEPS + 1, 5, dtype=FP64))


def test_lstm_of_which_a_part_trains():
    torch.manual_seed(0)
    network = lstm(layers=1)
    network.weight_hh_l0.requires_grad_(False)
    network.weight_ih_l0_reverse.requires_grad_(False)
    network.bias_hh_l0.requires_grad_(False)
    rows, grad = torch.randn(6, 5, dtype=FP64), torch.randn(6, 14, dtype=FP64)
    for ours, theirs in zip(
        gradients(run_lstm, network, rows, grad), gradients(call, network, rows, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.fixture
def onednn(monkeypatch):
    """Prefer oneDNN on any machine whose torch has it."""
    if _native.cpu is None or not _native.cpu.onednn:
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(_cpu, "prefers_onednn", lambda: True)


@pytest.mark.parametrize("rows", [16, 50])
def test_mlp_equals_torch(onednn, rows):
    torch.manual_seed(0)
    network = mlp()
    exact = copy.deepcopy(network).double()
    x, grad = torch.randn(rows, 24), torch.randn(rows, 16)
    assert is_ours(run_mlp, network, x)
    ours = gradients(run_mlp, network, x, grad)
    plain = gradients(nn.Sequential.__call__, network, x, grad)
    for mine, torchs, right in zip(
        ours, plain, gradients(nn.Sequential.__call__, exact, x.double(), grad.double()), strict=True
    ):
        allowed = 2 * (torchs - right).abs().max() + 4 * torch.finfo(torch.float32).eps * right.abs().max()
        assert (mine - right).abs().max() <= allowed


def test_mlp_of_which_a_part_trains(onednn):
    torch.manual_seed(0)
    network = mlp()
    network[0].weight.requires_grad_(False)
    network[2].weight.requires_grad_(False)
    x, grad = torch.randn(20, 24), torch.randn(20, 16)
    for ours, theirs in zip(
        gradients(run_mlp, network, x, grad), gradients(nn.Sequential.__call__, network, x, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def hooked(network):
    network.register_forward_hook(lambda module, inputs, output: output)


def replaced(network):
    network.forward = type(network).forward.__get__(network)


@pytest.mark.parametrize("change", [hooked, replaced])
@pytest.mark.parametrize(("run", "make"), [(run_lstm, lstm), (run_mlp, mlp)])
def test_changed_modules_are_called(onednn, run, make, change):
    network = make()
    parameter = next(network.parameters())
    rows = torch.randn(20, parameter.shape[1], dtype=parameter.dtype)
    assert is_ours(run, network, rows)
    change(network)
    assert not is_ours(run, network, rows)


@pytest.mark.parametrize(("run", "make"), [(run_lstm, lstm), (run_mlp, mlp)])
def test_without_gradients_the_module_is_called(onednn, monkeypatch, run, make):
    def refuse(*_):
        raise AssertionError("called without gradients")

    monkeypatch.setattr(encoder_networks._Recurrence, "apply", refuse)
    monkeypatch.setattr(encoder_networks._Linear, "apply", refuse)
    network = make()
    parameter = next(network.parameters())
    rows = torch.randn(20, parameter.shape[1], dtype=parameter.dtype)
    with torch.no_grad():
        assert run(network, rows).isfinite().all()


def test_the_recurrent_weights_gradient_is_one_product():
    """Of [4 hidden, steps] and [steps, hidden] per direction, and no step writes a gradient of that size."""
    network, rows = lstm(layers=1, dtype=torch.float32), torch.randn(9, 5)
    y = run_lstm(network, rows)
    with profile(record_shapes=True) as profiler:
        y.sum().backward()
    products = [e.input_shapes for e in profiler.events() if e.name == "aten::mm"]
    assert sum(shapes[:2] == [[28, 8], [8, 7]] for shapes in products) == 2
