"""``lora_pack``: several LoRA linears of one x, as q, k and v or gate and up are, and their gradients.

Member i is a ``lora_linear`` with weight [N_i, K] and rank r_i of its own, 0 where it has no adapter. Its mask is that
of the seed ``philox.member_seed(seed, i)``. What each reads of x is read once; the gradient of x is one sum. s holds
each member's [rows, rank], one behind the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import _native, dispatch
from ..spec import Autograd, Kernel, OpSpec, Verdict
from ..support import cpu, cuda, fits, triton
from . import eager, lora_linear
from .eager import EagerFunction, as_rows, not_a_view
from .pack_members import Tensors, empty_s, expansions, members, of_all, of_member, parts_of, sizes

# ---------------------------------------------------------------------------------------------------- forward


def _of_each(
    forward: Callable[..., Any], x: Tensor, weights: Tensors, lora_As: Tensors, lora_Bs: Tensors, biases: Tensors,
    seed: Tensor | None, scalings: list[float], dropout_p: list[float],
) -> tuple[Tensors, Tensor]:  # fmt: skip
    ys, parts = [], []
    for i, (weight, A, B, *rest) in enumerate(members(weights, lora_As, lora_Bs, seed, scalings, dropout_p)):
        bias = biases[i] if biases and biases[i].numel() else None
        y, s = forward(x, weight, A, B, bias, *rest)
        ys.append(y)
        parts.append(s.flatten())
    return ys, torch.cat(parts)


def _reference(*args: Any) -> tuple[Tensors, Tensor]:
    return _of_each(lora_linear.SPEC.reference, *args)


def _fake(x: Tensor, weights: Tensors, lora_As: Tensors, *_: Any) -> tuple[Tensors, Tensor]:
    lead = x.shape[:-1]
    return [x.new_empty((*lead, w.shape[0])) for w in weights], empty_s(x, lora_As)


def _cpu_supports(
    x: Tensor, weights: Tensors, lora_As: Tensors, lora_Bs: Tensors, biases: Tensors, seed: Tensor | None, *_: Any
) -> Verdict:
    if seed is not None and x.dtype == torch.float64:
        return cpu.REFUSED_DTYPE
    if seed is None and cpu.reads_weight_once(x, weights[0]):
        for weight in weights:  # a generator's start is felt in a small layer
            if weight.stride()[1] != 1:
                break
        else:
            return cpu.DECODE
    return of_all([cpu.matmul_verdict(x, weight) for weight in weights])


def _cuda_supports(x: Tensor, weights: Tensors, lora_As: Tensors, lora_Bs: Tensors, *_: Any) -> Verdict:
    return cuda.pack_verdict(x, weights, lora_As, lora_Bs, backward=False)


def _cuda_one_by_one(schedule: str, *args: Any) -> tuple[Tensors, Tensor]:
    return _of_each(of_member(lora_linear.SPEC, rank_of=2), *args)


def _triton_supports(x: Tensor, weights: Tensors, lora_As: Tensors, *_: Any) -> Verdict:
    ns = [weight.shape[0] for weight in weights]
    return triton.pack_verdict(x, ns, [x.shape[-1]], [A.shape[0] for A in lora_As])


def _triton_run(schedule: str, *args: Any) -> tuple[Tensors, Tensor]:
    fits.check_lora_pack(*args)
    from ..triton_kernels import lora_pack

    return lora_pack.forward(schedule, *args)


def _flops(x: Tensor, weights: Tensors, lora_As: Tensors, *_: Any) -> int:
    m, n, k, r = sizes(x, weights, lora_As)
    return 2 * m * k * (n + r) + 2 * m * expansions(weights, lora_As)


def _bytes(x: Tensor, weights: Tensors, lora_As: Tensors, *_: Any) -> int:
    m, n, k, r = sizes(x, weights, lora_As)
    adapters = (r * k + expansions(weights, lora_As)) * lora_As[0].element_size()
    return (m * (k + n + r) + n * k) * x.element_size() + adapters


# --------------------------------------------------------------------------------------------------- backward


def _of_each_backward(
    backward: Callable[..., Any], grad_ys: Tensors, x: Tensor, s: Tensor, weights: Tensors, lora_As: Tensors,
    lora_Bs: Tensors, seed: Tensor | None, scalings: list[float], dropout_p: list[float], need_x: bool,
    need_A: list[bool], need_B: list[bool],
) -> tuple[Tensor, Tensors, Tensors]:  # fmt: skip
    grad_x, grad_As, grad_Bs = x.new_empty(0), [], []
    parts = parts_of(s, x, lora_As)
    each = members(weights, lora_As, lora_Bs, seed, scalings, dropout_p)
    for i, (weight, A, B, *rest) in enumerate(each):
        of_member, grad_A, grad_B = backward(grad_ys[i], x, parts[i], weight, A, B, *rest, need_x, need_A[i], need_B[i])
        grad_x = grad_x + of_member if i and need_x else of_member
        grad_As.append(grad_A if need_A[i] else A.new_empty(0))
        grad_Bs.append(grad_B if need_B[i] else B.new_empty(0))
    return grad_x, grad_As, grad_Bs


def _reference_backward(*args: Any) -> tuple[Tensor, Tensors, Tensors]:
    return _of_each_backward(lora_linear.BACKWARD.reference, *args)


def _fake_backward(
    grad_ys: Tensors, x: Tensor, s: Tensor, weights: Tensors, lora_As: Tensors, lora_Bs: Tensors, seed: Tensor | None,
    scalings: list[float], dropout_p: list[float], need_x: bool, need_A: list[bool], need_B: list[bool],
) -> tuple[Tensor, Tensors, Tensors]:  # fmt: skip
    return (
        x.new_empty(x.shape if need_x else 0),
        [A.new_empty(A.shape if need else 0) for A, need in zip(lora_As, need_A)],
        [B.new_empty(B.shape if need else 0) for B, need in zip(lora_Bs, need_B)],
    )


def _cpu_supports_backward(
    grad_ys: Tensors, x: Tensor, s: Tensor, weights: Tensors, lora_As: Tensors, lora_Bs: Tensors, seed: Tensor | None,
    *_: Any,
) -> Verdict:  # fmt: skip
    if seed is not None and x.dtype == torch.float64:
        return cpu.REFUSED_DTYPE
    verdict = of_all([cpu.matmul_verdict(grad, w, is_k_by_n=True) for grad, w in zip(grad_ys, weights)])
    # A few 16-bit rows are "aten", too, where the CPU has no instructions for them.
    return cpu.NATIVE if verdict is cpu.ATEN and cpu.is_native_16bit(x.dtype) else verdict


def _cuda_supports_backward(
    grad_ys: Tensors, x: Tensor, s: Tensor, weights: Tensors, lora_As: Tensors, lora_Bs: Tensors, *_: Any
) -> Verdict:
    return cuda.pack_verdict(x, weights, lora_As, lora_Bs, backward=True)


def _cuda_one_by_one_backward(schedule: str, *args: Any) -> tuple[Tensor, Tensors, Tensors]:
    return _of_each_backward(of_member(lora_linear.BACKWARD, rank_of=4), *args)


def _triton_supports_backward(
    grad_ys: Tensors, x: Tensor, s: Tensor, weights: Tensors, lora_As: Tensors, *_: Any
) -> Verdict:
    ns = [weight.shape[0] for weight in weights]
    return triton.pack_verdict(x, [x.shape[-1]], ns, [A.shape[0] for A in lora_As])


def _triton_run_backward(schedule: str, *args: Any) -> tuple[Tensor, Tensors, Tensors]:
    fits.check_lora_pack_backward(*args[:9], *args[10:])
    from ..triton_kernels import lora_pack

    return lora_pack.backward(schedule, *args)


def _needs(lora_As: Tensors, need_A: list[bool], need_B: list[bool], weights: Tensors) -> tuple[int, int]:
    """Elements of the gradients of all A and of all B that are asked for."""
    of_A = sum(A.numel() for A, need in zip(lora_As, need_A) if need)
    return of_A, sum(w.shape[0] * A.shape[0] for w, A, need in zip(weights, lora_As, need_B) if need)


def _flops_backward(
    grad_ys: Tensors, x: Tensor, s: Tensor, weights: Tensors, lora_As: Tensors, lora_Bs: Tensors, seed: Tensor | None,
    scalings: list[float], dropout_p: list[float], need_x: bool, need_A: list[bool], need_B: list[bool],
) -> int:  # fmt: skip
    m, n, k, r = sizes(x, weights, lora_As)
    of_A, of_B = _needs(lora_As, need_A, need_B, weights)
    of_s = expansions(weights, lora_As) if need_x or any(need_A) else 0
    return 2 * m * (of_s + need_x * k * (n + r) + of_A + of_B)


def _bytes_backward(
    grad_ys: Tensors, x: Tensor, s: Tensor, weights: Tensors, lora_As: Tensors, lora_Bs: Tensors, seed: Tensor | None,
    scalings: list[float], dropout_p: list[float], need_x: bool, need_A: list[bool], need_B: list[bool],
) -> int:  # fmt: skip
    m, n, k, r = sizes(x, weights, lora_As)
    elements = m * n + m * r + (n * k + m * k if need_x else 0) + (m * k if any(need_A) else 0)
    adapters = r * k + expansions(weights, lora_As) + sum(_needs(lora_As, need_A, need_B, weights))
    return elements * x.element_size() + adapters * lora_As[0].element_size()


BACKWARD = dispatch.register(
    OpSpec(
        name="lora_pack_backward",
        schema=(
            "(Tensor[] grad_ys, Tensor x, Tensor s, Tensor[] weights, Tensor[] lora_As, Tensor[] lora_Bs, "
            "Tensor? seed, float[] scalings, float[] dropout_p, bool need_x, bool[] need_A, bool[] need_B) "
            "-> (Tensor, Tensor[], Tensor[])"
        ),
        reference=_reference_backward,
        fake=_fake_backward,
        kernels={
            "cuda": Kernel(_cuda_supports_backward, _cuda_one_by_one_backward, run_schedules=(cuda.ONE_BY_ONE,)),
            "triton": Kernel(_triton_supports_backward, _triton_run_backward),
            "cpu": Kernel(_cpu_supports_backward),
        },
        flops=_flops_backward,
        bytes=_bytes_backward,
    )
)

# --------------------------------------------------------------------------------------------------- autograd


def _save(ctx: Any, inputs: tuple, output: tuple[Tensors, Tensor]) -> None:
    x, weights, lora_As, lora_Bs, _, seed, ctx.scalings, ctx.dropout_p = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], seed, *weights, *lora_As, *lora_Bs)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensors, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    _save(ctx, inputs, output)


def _gradients(ctx: Any, grad_ys: Sequence[Tensor | None], needs: tuple, backward: Callable[..., Any]) -> tuple:
    """Gradients of (x, weights, lora_As, lora_Bs, biases), whose ``needs`` are a bool or a list of them.

    ``backward`` calls the op. A member whose result nobody has used adds nothing to x's gradient, and has none itself.
    """
    x, s, seed, *others = ctx.saved_tensors
    count = len(ctx.scalings)
    weights, lora_As, lora_Bs = others[:count], others[count : 2 * count], others[2 * count :]
    used = [grad is not None for grad in grad_ys]
    need_x, *of_members = needs
    need_weights, need_As, need_Bs, need_biases = (
        [need and is_used for need, is_used in zip(each, used)] for each in of_members
    )
    need_x = need_x and any(used)
    grads = [
        x.new_zeros((*x.shape[:-1], weight.shape[0])) if grad is None else grad
        for grad, weight in zip(grad_ys, weights)
    ]
    grad_x, grad_As, grad_Bs = None, [None] * count, [None] * count
    if need_x or any(need_As) or any(need_Bs):
        grad_x, grad_As, grad_Bs = backward(
            grads, x, s, weights, lora_As, lora_Bs, seed, ctx.scalings, ctx.dropout_p, need_x, need_As, need_Bs
        )
    return (
        grad_x if need_x else None,
        [as_rows(grad).t() @ as_rows(x) if need else None for grad, need in zip(grads, need_weights)],
        [grad if need else None for grad, need in zip(grad_As, need_As)],
        [grad if need else None for grad, need in zip(grad_Bs, need_Bs)],
        [as_rows(grad).sum(0) if need else None for grad, need in zip(grads, need_biases)],
    )


@torch.autograd.function.once_differentiable
def _backward(ctx: Any, grad_ys: Sequence[Tensor | None], grad_s: None) -> tuple:
    op = torch.ops.lora_kernels.lora_pack_backward.default
    return *_gradients(ctx, grad_ys, ctx.needs_input_grad[:5], op), None, None, None


SPEC = dispatch.register(
    OpSpec(
        name="lora_pack",
        schema=(
            "(Tensor x, Tensor[] weights, Tensor[] lora_As, Tensor[] lora_Bs, Tensor[] biases, Tensor? seed, "
            "float[] scalings, float[] dropout_p) -> (Tensor[], Tensor)"
        ),
        reference=_reference,
        fake=_fake,
        kernels={
            "cuda": Kernel(_cuda_supports, _cuda_one_by_one, run_schedules=(cuda.ONE_BY_ONE,)),
            "triton": Kernel(_triton_supports, _triton_run),
            "cpu": Kernel(_cpu_supports),
        },
        autograd=Autograd(_setup_context, _backward),
        autocast=(0, 1, 4),
        flops=_flops,
        bytes=_bytes,
    )
)
"""``biases`` is of no member, or of each, with no elements where there is none; a member without an adapter has a
lora_A [0, K] and a lora_B [N, 0].
"""

_decode = dispatch.define_native(
    "lora_pack_decode",
    "(Tensor x, Tensor[] operands, float[] scalings) -> Tensor[]",
    lambda x, operands, scalings: [x.new_empty((*x.shape[:-1], len(w))) for w in operands[: len(scalings)]],
)


def _cpu_inference(
    x: Tensor, weights: Tensors, lora_As: Tensors, lora_Bs: Tensors, biases: Tensors, seed: Tensor | None,
    scalings: list[float], dropout_p: list[float], schedule: str,
) -> tuple[Any, ...]:  # fmt: skip
    if schedule == "decode":
        return (_decode(x, [*weights, *lora_As, *lora_Bs, *biases], scalings),)
    return dispatch.native(SPEC)(x, weights, lora_As, lora_Bs, biases, seed, scalings, dropout_p, schedule)


INFERENCE = replace(SPEC, kernels={**SPEC.kernels, "cpu": Kernel(_cpu_supports, native=_cpu_inference)})
"""``lora_pack`` where only the first result is asked for: a kernel may leave s out."""


def decodes(x: Tensor, weights: Tensors, *args: Any) -> bool:
    """Whether ``decode`` serves a call that wants no gradients. The usual way there is felt in a small layer."""
    return x.is_cpu and looks_at_sizes() and _cpu_supports(x, weights, *args) is cpu.DECODE


def decode(
    x: Tensor, weights: Tensors, lora_As: Tensors, lora_Bs: Tensors, biases: Tensors, seed: None, scalings: list[float],
    dropout_p: list[float],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Every member's y."""
    dispatch.count_served(SPEC.name, "cpu")
    return tuple(_decode(x, [*weights, *lora_As, *lora_Bs, *biases], scalings))


def looks_at_sizes() -> bool:
    """Whether whatever serves a call on the CPU, now, looks at the sizes of its operands: the extension does. Compilers
    before torch 2.14 cannot ask.
    """
    return _native.cpu is not None and not is_compiling() and dispatch.forced_backend() is None


class LoRAPackFunction(EagerFunction):
    """``lora_pack`` for eager autograd: one dispatch forward, one backward.

    Saves x once, s, the weights (by reference) and the 8-byte seed; never a mask or dropout(x).
    Call it through ``lk.lora_pack``, which checks the arguments. Autograd looks into no list: ``forward`` takes the
    number of members and the op's arguments with every list of tensors laid out.
    """

    differentiable = (0, 1, 2, 3, 4)

    @classmethod
    def on(cls, args: tuple) -> Any:
        x, weights, lora_As, lora_Bs, biases, seed, scalings, dropout_p = args
        return cls.apply(x, seed, scalings, dropout_p, *weights, *lora_As, *lora_Bs, *biases)

    @staticmethod
    def results(output: tuple[Tensors, Tensor]) -> tuple[Tensor, ...]:
        return tuple(output[0])

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, seed: Tensor | None, scalings: list[float], dropout_p: list[float], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        args = x, *_lists(tensors, len(scalings)), seed, scalings, dropout_p
        return tuple(map(not_a_view, eager.forward(ctx, SPEC, args, _save)[0]))

    @staticmethod
    @eager.backward
    def backward(ctx: Any, *grad_ys: Tensor | None) -> tuple:  # type: ignore[override]
        need_x, _, _, _, *needs = ctx.needs_input_grad
        lists = _lists(needs, len(ctx.scalings))
        grad_x, *grads = _gradients(ctx, grad_ys, (need_x, *lists), _run_backward)
        return grad_x, None, None, None, *(grad for of_list in grads for grad in of_list)


def _lists(laid_out: Sequence[Any], count: int) -> tuple[list, list, list, list]:
    """Of weights, lora_As, lora_Bs and biases."""
    first, second, third, biases = (list(laid_out[i * count : (i + 1) * count]) for i in range(4))
    return first, second, third, biases


def _run_backward(*args: Any) -> tuple[Any, ...]:
    return dispatch.run(BACKWARD, *args)
