"""The networks that make a prompt, while they train on a CPU.

A prompt is one sequence of some tens of rows, and its encoder is as wide as the model: nearly all of the time goes into
reading weights and writing their gradients. Here an LSTM's steps are products of a matrix and a vector by the kernel
that decodes, and one product at the end makes the gradient of its recurrent weight; the linear layers' products go to
the faster one of torch's two libraries. What neither helps is left to torch's modules. There is no double backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F

from .. import _native, dispatch
from ..ops import frozen_linear
from ..plain import has_hooks, inside_transform
from ..support import cpu

FEW_STEPS, WIDE_HIDDEN = 32, 1024
"""torch's LSTM (oneDNN's) costs much per call and little per step, as long as the weights stay in the cache."""


def run_mlp(mlp: Any, rows: Tensor) -> Tensor:
    """``mlp(rows)`` for rows [rows, features]."""
    if is_compiling() or type(mlp) is not nn.Sequential or not _is_plain(mlp) or not _trains_on_cpu(rows, mlp):
        return mlp(rows)
    module: Any
    for module in mlp:
        plain = type(module) is nn.Linear and _is_plain(module)
        rows = _linear(rows, module.weight, module.bias) if plain else module(rows)
    return rows


def run_lstm(lstm: Any, rows: Tensor) -> Tensor:
    """``lstm(rows[None])[0][0]`` for a ``batch_first`` LSTM and one sequence, rows [steps, features].

    Returns:
        [steps, directions * hidden_size]. Gradients are torch's, summed in another order; dropout draws its mask.
    """
    faster = not is_compiling() and (rows.shape[0] <= FEW_STEPS or lstm.hidden_size >= WIDE_HIDDEN)
    plain = faster and type(lstm) is nn.LSTM and _is_plain(lstm) and not lstm.proj_size
    if not plain or not _trains_on_cpu(rows, lstm):
        return lstm(rows.unsqueeze(0))[0].squeeze(0)
    directions = 2 if lstm.bidirectional else 1
    for layer in range(lstm.num_layers):
        if layer:
            rows = F.dropout(rows, lstm.dropout, lstm.training)
        weights = lstm.all_weights[layer * directions : (layer + 1) * directions]
        outputs = [_run_direction(rows, *weights[0])]
        if directions == 2:  # the second goes from the last row to the first
            outputs.append(_run_direction(rows.flip(0), *weights[1]).flip(0))
        rows = torch.cat(outputs, dim=1)
    return rows


def _run_direction(rows: Tensor, weight_ih: Tensor, weight_hh: Tensor, *biases: Tensor) -> Tensor:
    bias: Any = sum(biases) if biases else None
    return _Recurrence.apply(_linear(rows, weight_ih, bias), weight_hh)


def _is_plain(module: nn.Module) -> bool:
    """Whether calling the module is exactly its class's forward, on parameters of its own."""
    own = all(p is None or type(p) is nn.Parameter for p in module._parameters.values())
    return own and not has_hooks(module) and "forward" not in module.__dict__


def _trains_on_cpu(rows: Tensor, network: nn.Module) -> bool:
    """Whether fp32 or fp64 parameters on the CPU may get gradients now, and no other backend was asked for."""
    if dispatch.forced_backend() not in (None, "cpu"):
        return False
    if not torch.is_grad_enabled() or dispatch.any_autocast():
        return False
    if inside_transform() or rows.device.type != "cpu":
        return False
    if rows.dtype != torch.float32 and rows.dtype != torch.float64:
        return False
    parameters = list(network.parameters())
    trains = rows.requires_grad or any(p.requires_grad for p in parameters)
    return trains and all(p.dtype == rows.dtype and p.device == rows.device for p in parameters)


# -------------------------------------------------------------------------------------------------------- linear


def _takes_onednn(rows: Tensor, weight: Tensor) -> bool:
    fits = rows.dtype == torch.float32 and rows.dim() == 2 and rows.shape[-1] == weight.shape[1]
    return fits and cpu.matmul_verdict(rows, weight).schedule == "onednn"


def _multiply(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a bᵀ + bias, by the library that is faster."""
    return dispatch.run(frozen_linear.SPEC, a, b, bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _Linear.apply(x, weight, bias) if _takes_onednn(x, weight) else F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    """``F.linear`` with each of its three products by the library that is faster."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            _multiply(grad_y, weight.t()) if need_x else None,
            _multiply(grad_y.t(), x.t()) if need_weight else None,
            grad_y.sum(0) if need_bias else None,
        )


# ---------------------------------------------------------------------------------------------------------- LSTM


def _matrix_vector(weight: Tensor, x: Tensor, add: Tensor) -> Tensor:
    """weight x + add; for fp32 by the kernel that decodes, which reads several rows of the weight at a time."""
    if x.dtype != torch.float32 or _native.cpu is None:
        return torch.addmv(add, weight, x)
    return torch.ops.lora_kernels_native.frozen_linear.default(x.unsqueeze(0), weight, add, "decode")[0]


class _Recurrence(torch.autograd.Function):
    """The steps of one direction of an LSTM layer (Hochreiter and Schmidhuber, 1997) on one sequence.

    forward(inputs [steps, 4 * hidden], weight_hh [4 * hidden, hidden]) -> h [steps, hidden]. ``inputs`` is what x and
    the biases add to the arguments of the gates: input, forget, cell, output. One direction at a time, because the
    recurrent weights of both may not fit into the cache.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        dispatch.count_served("frozen_linear", "reference" if _native.cpu is None else "cpu")  # the steps as one
        steps, hidden, weight = inputs.shape[0], weight.shape[1], weight.contiguous()
        gates = torch.empty_like(inputs, memory_format=torch.contiguous_format)
        cells, squashed, states = (inputs.new_empty(steps, hidden) for _ in range(3))
        i, f, g, o = (gate.unbind(0) for gate in gates.view(steps, 4, hidden).unbind(1))
        for t in range(steps):
            arguments = _matrix_vector(weight, states[t - 1], inputs[t]) if t else inputs[t]
            torch.sigmoid(arguments, out=gates[t])
            torch.tanh(arguments[2 * hidden : 3 * hidden], out=g[t])
            torch.mul(i[t], g[t], out=cells[t])
            if t:
                cells[t].addcmul_(f[t], cells[t - 1])
            torch.tanh(cells[t], out=squashed[t])
            torch.mul(o[t], squashed[t], out=states[t])
        ctx.save_for_backward(gates, cells, squashed, states, weight)
        return states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_states: Tensor) -> tuple:  # type: ignore[override]
        gates, cells, squashed, states, weight = ctx.saved_tensors
        steps, hidden = states.shape
        i, f, g, o = gates.view(steps, 4, hidden).unbind(1)
        before = torch.cat([torch.zeros_like(cells[:1]), cells[:-1]])
        # Of each gate's argument: what the gradient of the cell (of the state, for the output gate) is multiplied by.
        slopes = torch.stack([g * i * (1 - i), before * f * (1 - f), i * (1 - g * g)], dim=1)
        output_slope, cell_slope = squashed * o * (1 - o), o * (1 - squashed * squashed)

        grad_gates = torch.empty_like(gates)
        grad_cells, grad_outputs = grad_gates.view(steps, 4, hidden).split((3, 1), dim=1)
        grad_cell = torch.zeros_like(cells[0])
        transposed = weight.t().contiguous()
        for t in reversed(range(steps)):
            grad_state = grad_states[t]
            if t + 1 < steps:
                grad_state = _matrix_vector(transposed, grad_gates[t + 1], grad_state)
                grad_cell = grad_cell * f[t + 1]
            grad_cell = torch.addcmul(grad_cell, grad_state, cell_slope[t])
            torch.mul(grad_cell, slopes[t], out=grad_cells[t])
            torch.mul(grad_state, output_slope[t], out=grad_outputs[t, 0])
        need_inputs, need_weight = ctx.needs_input_grad
        grad_weight = grad_gates[1:].t() @ states[:-1] if need_weight else None
        return grad_gates if need_inputs else None, grad_weight
