"""Layers that read one x, served by one ``lora_pack``: the first of them that is called computes what all give.

The others, called with the same tensor, hand out what is theirs. Each layer is still called, with its hooks; a layer
that is called with another tensor, or is not as it was when the first was, computes its own. Results wait no longer
than one call of the module that the layers belong to, in the thread of that call; outside of it, layers compute their
own. A pack whose results nobody takes pauses, and tries again later.

Activation checkpointing runs a forward a second time, which has to do the same again. So what a pack does there depends
on nothing that it has seen before: it never pauses, and where a module checkpoints a part of its own forward, whose
second run is outside of it, layers of that part compute their own in both.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ... import operands
from ...formats import QuantizedWeight
from ...functional.pack import lora_pack
from ...reasons import Reason

_PACK = "_lora_pack"
"""Where a layer has (its pack, its place in it)."""
PACKS = "_lora_packs"
"""Where a module has the packs of its layers (``parents.py``)."""
ROLES = "_gated_mlp"
"""Where a gated MLP that is fused has the names of its layers (``mlp.py``)."""
OURS = (_PACK, PACKS, ROLES)
_MISSES, _PAUSE = 2, 64
"""After so many calls in a row whose results nobody asked for, a pack pauses for so many."""


class _Waiting(NamedTuple):
    """What is computed and not handed out, and under what circumstances it was."""

    x: Tensor
    modes: tuple
    operands: list[operands.Operands]
    versions: list[tuple[int, ...]]
    results: list[Tensor | None]


class Call:
    """A call of the module that a pack's layers belong to."""

    def __init__(self, outer: Call | None) -> None:
        self.outer = outer
        """Of the same module, from within which this one is called."""
        self.keeps = _keeps()
        self.waiting: _Waiting | None = None


class Pack:
    """Layers in the order in which a forward calls them. They hold it, it does not hold them: a model that nobody has
    any more is freed at once.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]
        self.misses, self.paused = 0, 0
        self.calls: dict[int, Call] = {}
        """By thread: each has its own."""

    @property
    def layers(self) -> list[Any]:
        return [layer() for layer in self._layers]

    def begin(self) -> Call:
        """A call of the layers' module begins in this thread. It must ``end``."""
        thread = _thread()
        call = self.calls[thread] = Call(self.calls.get(thread))
        return call

    def note(self, call: Call) -> None:
        """The module's forward is through: whether it has taken what was computed for it."""
        if call.waiting is not None:
            _note_miss(self)

    def end(self, call: Call) -> None:
        thread = _thread()
        if call.outer is None:
            del self.calls[thread]
        else:
            self.calls[thread] = call.outer

    def __deepcopy__(self, memo: dict[int, Any]) -> Pack:
        twin = memo[id(self)] = Pack([])
        twin._layers = [weakref.ref(copy.deepcopy(layer, memo)) for layer in self.layers]
        return twin

    def __getstate__(self) -> list[nn.Module]:
        return self.layers

    def __setstate__(self, layers: list[nn.Module]) -> None:
        self.__init__(layers)  # type: ignore[misc]


def _thread() -> int:
    return 0 if is_compiling() else threading.get_ident()


def attach(parent: nn.Module, layers: list[nn.Module]) -> None:
    """Makes a pack of these layers of ``parent``, whose class has to be one of ``parents.py``."""
    pack = Pack(layers)
    parent.__dict__[PACKS] = (*of_parent(parent), pack)
    for place, layer in enumerate(layers):
        layer.__dict__[_PACK] = pack, place


def of_parent(module: nn.Module) -> tuple[Pack, ...]:
    """The packs of a module's layers."""
    return module.__dict__.get(PACKS, ())


def detach(layers: Iterable[nn.Module]) -> None:
    """Takes them out of their packs."""
    for layer in layers:
        layer.__dict__.pop(_PACK, None)


def of_layer(layer: nn.Module) -> tuple[Pack, int] | None:
    """The pack of a layer, and its place there."""
    return layer.__dict__.get(_PACK)


def without_pack(layer: nn.Module) -> dict[int, Any]:
    """What ``copy.deepcopy`` takes as its memo for a copy of one layer alone."""
    found = of_layer(layer)
    return {} if found is None else {id(found): None}


def first_layer(module: nn.Module) -> str:
    """The name of a fused MLP's gate; that of ``module`` itself, "", for any other."""
    roles = module.__dict__.get(ROLES)
    return "" if roles is None else roles.gate


def call(pack: Pack, place: int, layer: nn.Module, x: Any) -> Tensor | Reason:
    """What the layer in this place gives for x, or why it computes that itself."""
    ongoing = pack.calls.get(_thread())
    if ongoing is None:
        return Reason.PACK_OUTSIDE
    if place == 0:
        return _compute(pack, ongoing, x)
    waiting = ongoing.waiting
    if waiting is None or waiting.x is not x or waiting.modes != _modes(x):
        return Reason.PACK_APART
    now: Any = operands.operands(layer)
    if type(now) is not tuple or not _is_same(now, waiting.operands[place]):
        return Reason.PACK_APART
    if _versions(now) != waiting.versions[place]:
        return Reason.PACK_APART
    results = waiting.results
    result = results[place]
    results[place] = None
    if all(left is None for left in results):
        ongoing.waiting, pack.misses = None, 0
    return Reason.PACK_APART if result is None else result


def _is_same(now: operands.Operands, then: operands.Operands) -> bool:
    """Whether a layer has what it had. A bias that is a sum, of the base's and the adapter's, is made for each call."""
    weight, lora_A, lora_B, bias, *numbers, magnitude = now
    return (
        weight is then[0] and lora_A is then[1] and lora_B is then[2]
        and (bias is then[3] or type(bias) is Tensor is type(then[3]))
        and all(a is b or a == b for a, b in zip(numbers, then[4:7])) and magnitude is then[7]
    )  # fmt: skip


def _versions(of_layer: operands.Operands) -> tuple[int, ...]:
    """Traced code, and inference mode, know none."""
    if is_compiling():
        return ()
    return tuple(0 if t.is_inference() else t._version for t in of_layer[:3])  # type: ignore[union-attr]


def _modes(x: Tensor) -> tuple:
    """x's version, and what else a result depends on. Compilers have their own ways to know."""
    if is_compiling():
        return (torch.is_grad_enabled(),)
    cast = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
    inference = torch.is_inference_mode_enabled()
    return torch.is_grad_enabled(), inference, cast, 0 if x.is_inference() else x._version


def why_not(pack: Pack, x: Tensor) -> list[operands.Operands] | Reason:
    """What the pack computes with, or why the layers compute for themselves."""
    found: list[Any] = []
    for layer in pack.layers:
        if layer is None:
            return Reason.PACK_APART
        of_layer: Any = operands.operands(layer)
        if type(of_layer) is not tuple:
            return of_layer if type(of_layer) is Reason else Reason.SIDE_BY_SIDE
        weight, lora_A, lora_B, _, _, _, _, magnitude = of_layer
        if magnitude is not None:
            return Reason.PACK_DORA
        if type(weight) is QuantizedWeight:
            return Reason.PACK_QUANTIZED
        reason = operands.call_reason(x, weight, lora_A, lora_B)
        if reason is not None:
            return reason
        if weight.device != x.device:
            return Reason.DEVICES
        found.append(of_layer)
    return found


def _compute(pack: Pack, ongoing: Call, x: Any) -> Tensor | Reason:
    if ongoing.waiting is not None:
        ongoing.waiting = None
        _note_miss(pack)
    if ongoing.keeps != _keeps():
        return Reason.PACK_OUTSIDE
    if pack.misses >= _MISSES and not _may_run_twice():
        pack.paused += 1
        if pack.paused % _PAUSE:
            return Reason.PACK_APART
    found: Any = why_not(pack, x)
    if type(found) is Reason:
        return found
    weights, lora_As, lora_Bs, biases, scalings, ps, training, _ = zip(*found)
    drops = any(training)
    probabilities = [p if trains else 0.0 for p, trains in zip(ps, training)] if drops else 0.0
    results: list[Any] = list(
        lora_pack(x, weights, lora_As, lora_Bs, biases, scalings=scalings, dropout_p=probabilities, training=drops)
    )
    first, results[0] = results[0], None
    ongoing.waiting = _Waiting(x, _modes(x), found, [_versions(of_layer) for of_layer in found], results)
    return first


def _note_miss(pack: Pack) -> None:
    if not is_compiling() and not _may_run_twice():
        pack.misses += 1


# ------------------------------------------------------------------------------------------ activation checkpointing


def _saves_elsewhere() -> tuple[Any, Any] | None:
    """The hooks of tensors that are saved for backward, which checkpointing without reentry works by."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _keeps() -> tuple:
    """What differs inside of a checkpointed part of a module's forward from the module's own. Compilers have their own
    ways to know.
    """
    return () if is_compiling() else (torch.is_grad_enabled(), _saves_elsewhere())


def _may_run_twice() -> bool:
    """Whether what happens now may be run again by activation checkpointing, or is that: without reentry, tensors that
    are saved are hooked; with it, the first run is the forward of an ``autograd.Function``, where there is no
    forward-mode AD; the second is in a backward.
    """
    in_function = not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled()
    return in_function or _saves_elsewhere() is not None or torch._C._current_graph_task_id() != -1
