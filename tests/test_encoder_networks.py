"""The networks of prompt encoders, trained on the CPU, against torch's own modules."""

from __future__ import annotations

import copy

import pytest
import torch
from numerics import assert_as_accurate
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook
from torch.profiler import profile

import lora_kernels as lk
from lora_kernels.functional import encoders as encoder_networks
from lora_kernels.functional.encoders import run_lstm, run_mlp

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
    if y.grad_fn is None:
        return False
    waiting, nodes = [y.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            waiting += [n for n, _ in node.next_functions]
    return any("_Recurrence" in node.name() or "_Linear" in node.name() for node in nodes)


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


@pytest.mark.parametrize("column_major", [False, True])
def test_lstm_in_float32(column_major):
    """Wider than a vector, with a remainder: the steps' products are those of the kernel that decodes."""
    torch.manual_seed(0)
    network = nn.LSTM(20, 37, 2, bidirectional=True, batch_first=True)
    if column_major:
        network.weight_hh_l1 = nn.Parameter(network.weight_hh_l1.detach().t().contiguous().t())
        assert network.weight_hh_l1.stride() == (1, 148)
    exact = copy.deepcopy(network).double()
    rows, grad = torch.randn(9, 20), torch.randn(9, 74)
    right = gradients(call, exact, rows.double(), grad.double())
    for ours, theirs, reference in zip(
        gradients(run_lstm, network, rows, grad), gradients(call, network, rows, grad), right, strict=True
    ):
        assert_as_accurate(ours, theirs, reference)


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


@pytest.mark.parametrize("rows", [16, 50])
def test_mlp_equals_torch(onednn, rows):
    torch.manual_seed(0)
    network = mlp()
    exact = copy.deepcopy(network).double()
    x, grad = torch.randn(rows, 24), torch.randn(rows, 16)
    assert is_ours(run_mlp, network, x)
    ours = gradients(run_mlp, network, x, grad)
    plain = gradients(nn.Sequential.__call__, network, x, grad)
    right = gradients(nn.Sequential.__call__, exact, x.double(), grad.double())
    for mine, torchs, reference in zip(ours, plain, right, strict=True):
        assert_as_accurate(mine, torchs, reference)


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


def frozen(network):
    network.requires_grad_(False)


def hooked_inside(network):
    for module in network:
        hooked(module)


def replaced(network):
    network.forward = type(network).forward.__get__(network)


@pytest.mark.parametrize(
    ("run", "make", "change"),
    [(run, make, change) for run, make in ((run_lstm, lstm), (run_mlp, mlp)) for change in (hooked, replaced, frozen)]
    + [(run_mlp, mlp, hooked_inside)],
)
def test_changed_modules_are_called(onednn, run, make, change):
    network = make()
    parameter = next(network.parameters())
    rows = torch.randn(20, parameter.shape[1], dtype=parameter.dtype)
    assert is_ours(run, network, rows)
    change(network)
    assert not is_ours(run, network, rows)


@pytest.mark.parametrize(("run", "make"), [(run_lstm, lstm), (run_mlp, mlp)])
def test_a_global_hook_and_another_backend_keep_the_module(onednn, run, make):
    network = make()
    parameter = next(network.parameters())
    rows = torch.randn(20, parameter.shape[1], dtype=parameter.dtype)
    hook = register_module_forward_hook(lambda module, inputs, output: None)
    assert not is_ours(run, network, rows)
    hook.remove()
    with lk.use_backend("reference"):
        assert not is_ours(run, network, rows)
    assert is_ours(run, network, rows)


def test_forward_mode_keeps_the_module():
    torch.manual_seed(0)
    network, rows, tangent = lstm(), torch.randn(6, 5, dtype=FP64), torch.randn(6, 5, dtype=FP64)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(rows, tangent)
        ours, theirs = (forward_ad.unpack_dual(run(network, dual)).tangent for run in (run_lstm, call))
    assert torch.equal(ours, theirs)


def test_an_mlp_of_other_shapes_is_served(onednn):
    network = nn.Sequential(nn.Unflatten(1, (4, 6)), nn.Linear(6, 5), nn.Flatten(1))
    x, grad = torch.randn(20, 24), torch.randn(20, 20)
    for ours, theirs in zip(
        gradients(run_mlp, network, x, grad), gradients(nn.Sequential.__call__, network, x, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


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
