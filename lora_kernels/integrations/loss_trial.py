"""The trial of ``patch(loss=True)``: whether a model's loss and gradient are those of its plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import dispatch
from ..plain import LOW_PRECISION
from ..reasons import Reason
from .loss_parts import Head, Plan, head_of, loss_of

_TOKENS, _SPREAD = 8, 20.0
"""Of the calls that are tried: tokens, and the spread of their logits, at which a bound of 30 or 50 shows."""


def tried(model: Any, plan: Plan) -> Plan | Reason:
    """The plan if head and loss, on random hidden states, are the model's own; with what its output is.

    The states take the place of what the backbone returns, so that their logits spread. Loss and gradient are compared:
    in eval mode, and with an attention mask where all but the backbone and the head train.
    """
    parts = {m for name in (plan.backbone, plan.head) for m in model._modules[name].modules()}
    around = {m for m in model.modules() if m not in parts}
    with _in_training(model, set()):
        head: Any = head_of(model, plan)
    if isinstance(head, Reason):
        return head
    if any(p.is_meta for p in model.parameters()):
        return Reason.META
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(len(head.weight), (1, _TOKENS), generator=generator).to(next(model.parameters()).device)
    labels[:, 2] = -100
    plain = {"labels": labels}
    shifted = {**plain, "shift_labels": labels.flip(1), "num_items_in_batch": torch.tensor(3)}
    masked = {**plain, "attention_mask": (torch.arange(_TOKENS, device=labels.device) < _TOKENS - 3).long()[None]}
    with (
        torch.random.fork_rng(devices),  # a forward that drops something in training
        dispatch.own_stats(), torch.inference_mode(False), torch.enable_grad(),
    ):  # fmt: skip
        try:
            with _in_training(model, set()):
                output = _agreed(model, plan, head, plain, generator)
                if output is None:
                    return Reason.LOSS_FORWARD
                takes = plan.passed_on is None and _agreed(model, plan, head, shifted, generator) is not None
            with _in_training(model, around):
                given = masked if "attention_mask" in plan.names else plain
                if _agreed(model, plan, head, given, generator) is None:
                    return Reason.LOSS_FORWARD
        except Exception:  # whatever goes wrong in a forward that is called in an unusual way, it is left alone
            return Reason.LOSS_FORWARD
    return plan._replace(output=output, takes_loss_arguments=takes)


def _agreed(model: Any, plan: Plan, head: Head, given: dict[str, Any], generator: torch.Generator) -> type | None:
    """The class of the model's output, if loss and gradient are ours; else None."""
    seen: dict[str, Any] = {}

    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        x = output.last_hidden_state
        x = torch.randn(x.shape, generator=generator).to(x)
        logits = nn.functional.linear(x.to(head.weight), head.weight).float() * (plan.logit_numbers.scale or 1.0)
        x = (x * (_SPREAD / logits.detach().std().to(x.device))).to(x.dtype).requires_grad_()
        seen["x"], seen["keys"] = x, set(output.keys())
        output["last_hidden_state"] = x
        return output

    handle = model._modules[plan.backbone].register_forward_hook(replace)
    try:
        theirs = model(input_ids=torch.arange(_TOKENS, device=given["labels"].device)[None], **given)
    finally:
        handle.remove()
    x = seen["x"]
    fields = type(theirs).__dataclass_fields__
    if set(theirs.keys()) - {"loss", "logits"} != {key for key in seen["keys"] if key in fields}:
        return None
    found = _loss_and_gradient(theirs.loss, x)
    ours = _loss_and_gradient(loss_of(x, head, plan, given), x)
    if x.dtype not in LOW_PRECISION:
        return type(theirs) if _are_near(ours, found, 1e-4, 4e-4) else None
    plain = (_loss_and_gradient(_plain_loss(model, plan, x, given, is_wide), x) for is_wide in (False, True))
    agrees = any(_are_near(one, found, 1e-4, 8e-3) for one in plain) and _are_near(ours, found, 3e-2, 0.12)
    return type(theirs) if agrees else None


def _plain_loss(model: Any, plan: Plan, x: Tensor, given: dict[str, Any], is_wide: bool) -> Tensor:
    """The loss as models compute it in 16 bits, which round what the op does not: a term of 1e-3 would be lost between.

    Args:
        is_wide: the logits are made float32 before anything is done to them.
    """
    logits = model._modules[plan.head](x)
    logits = logits.float() if is_wide else logits
    softcap, factor, divisor = plan.logit_numbers
    if factor is not None:
        logits = logits * factor
    if divisor is not None:
        logits = logits / divisor
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    of_loss = {name: value for name, value in given.items() if name != "attention_mask"}
    loss: Tensor = plan.loss_function(logits=logits, vocab_size=logits.shape[-1], **of_loss)
    return loss


def _loss_and_gradient(loss: Tensor, x: Tensor) -> tuple[float, Tensor]:
    return loss.item(), torch.autograd.grad(loss, x)[0].double()


def _are_near(a: tuple[float, Tensor], b: tuple[float, Tensor], of_loss: float, of_gradient: float) -> bool:
    """Whether losses and gradients are no further apart than these shares of ``b``'s."""
    near = abs(a[0] - b[0]) <= of_loss * abs(b[0])
    return near and bool((a[1] - b[1]).norm() <= of_gradient * b[1].norm())


@contextmanager
def _in_training(model: nn.Module, these: set[nn.Module]) -> Iterator[None]:
    """These modules of the model in training mode, all others in eval mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = module in these
        yield
    finally:
        for module, mode in modes:
            module.training = mode
