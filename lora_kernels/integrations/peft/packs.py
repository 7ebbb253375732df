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
import weakref
from collections.abc import Callable, Iterable
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ... import dispatch, operands
from ...formats import QuantizedWeight
from ...functional.pack import lora_pack_of_layers
from ...plain import FLOATS, inside_transform
from ...reasons import Reason

_PACK = "_lora_pack"
"""Where a layer has (its pack, its place in it)."""
PACKS = "_lora_packs"
"""Where a module has the packs of its layers (``parents.py``)."""
ROLES = "_gated_mlp"
"""Where a gated MLP that is fused has the names of its layers (``mlp.py``)."""
OURS = (_PACK, PACKS, ROLES)
_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks
"""The hooks on what is saved for backward, by which checkpointing without reentry works; None if there are none."""
_MISSES, _PAUSE = 2, 64
"""After so many calls in a row whose results nobody asked for, a pack pauses for so many."""


class _Waiting(NamedTuple):
    """What is computed and not handed out, and under what circumstances it was."""

    x: Tensor
    modes: tuple
    operands: list[operands.Operands]
    versions: list[int]
    results: list[Tensor | None]


class Call:
    """A call of the module that packs' layers belong to, in one thread."""

    __slots__ = ("keeps", "waiting")

    def __init__(self, traced: bool) -> None:
        self.keeps = _keeps(traced)
        self.waiting: dict[int, _Waiting] = {}
        """Of each pack, by its number."""


class Calls(dict[int, Call]):
    """Those that are going on, by thread. A copy of the module has none."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Calls:
        twin = memo[id(self)] = Calls()
        return twin

    def __reduce__(self) -> tuple:
        return Calls, ()


class Pack:
    """Layers in the order in which a forward calls them. They hold it, it does not hold them: a model that nobody has
    any more is freed at once.
    """

    def __init__(self, number: int, calls: Calls, layers: Iterable[nn.Module | None]) -> None:
        self.number, self.calls = number, calls
        self._layers = [_reference(layer) for layer in layers]
        self.misses, self.paused = 0, 0

    @property
    def layers(self) -> list[Any]:
        """None for one that is gone: its module was given another in its place."""
        return [layer() for layer in self._layers]

    def __deepcopy__(self, memo: dict[int, Any]) -> Pack:
        twin = memo[id(self)] = Pack(self.number, copy.deepcopy(self.calls, memo), [])
        twin._layers = [_reference(copy.deepcopy(layer, memo)) for layer in self.layers]
        return twin

    def __getstate__(self) -> tuple[int, Calls, list[nn.Module | None]]:
        return self.number, self.calls, self.layers

    def __setstate__(self, state: tuple[int, Calls, list[nn.Module | None]]) -> None:
        self.__init__(*state)  # type: ignore[misc]


def _reference(layer: nn.Module | None) -> Callable[[], nn.Module | None]:
    return _nobody if layer is None else weakref.ref(layer)


def _nobody() -> None:
    """What a reference to a layer that is gone gives."""


def attach(parent: nn.Module, layers: list[nn.Module]) -> None:
    """Makes a pack of these layers of ``parent``, whose class has to be one of ``parents.py``."""
    calls, packs = parent.__dict__.setdefault(PACKS, (Calls(), []))
    pack = Pack(len(packs), calls, layers)
    packs.append(pack)
    for place, layer in enumerate(layers):
        layer.__dict__[_PACK] = pack, place


def note_misses(parent: nn.Module, call: Call) -> None:
    """At the end of a call: whether it has taken what was computed for it."""
    for number, waiting in call.waiting.items():
        if any(result is not None for result in waiting.results):
            _note_miss(parent.__dict__[PACKS][1][number])


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
    traced = is_compiling()  # asked once: it takes as long as what it decides
    ongoing = pack.calls.get(0 if traced else get_ident())
    if ongoing is None:
        return Reason.PACK_OUTSIDE
    if place == 0:
        return _compute(pack, ongoing, x, traced)
    waiting = ongoing.waiting.get(pack.number)
    if waiting is None or waiting.x is not x or waiting.modes != _modes(x, traced):
        return Reason.PACK_APART
    now: Any = operands.operands(layer)
    if type(now) is not tuple or not _is_same(now, waiting.operands[place]):
        return Reason.PACK_APART
    if not traced and _versions(now[0], now[1], now[2]) != waiting.versions[place]:
        return Reason.PACK_APART
    results = waiting.results
    result = results[place]
    results[place] = None
    if place == len(results) - 1 and results.count(None) == len(results):
        del ongoing.waiting[pack.number]
        pack.misses = 0
    return Reason.PACK_APART if result is None else result


def _is_same(now: operands.Operands, then: operands.Operands) -> bool:
    """Whether a layer has what it had. A bias that is a sum, of the base's and the adapter's, is made for each call."""
    weight, lora_A, lora_B, bias, scaling, p, training, magnitude = now
    return (
        weight is then[0] and lora_A is then[1] and lora_B is then[2]
        and (bias is then[3] or type(bias) is Tensor is type(then[3]))
        and (scaling is then[4] or bool(scaling == then[4])) and p == then[5] and training is then[6]
        and magnitude is then[7]
    )  # fmt: skip


def _versions(weight: Any, lora_A: Tensor, lora_B: Tensor) -> int:
    """Of all of them, each of which only grows; inference mode knows none."""
    try:
        return weight._version + lora_A._version + lora_B._version
    except RuntimeError:
        return sum(0 if t.is_inference() else t._version for t in (weight, lora_A, lora_B))


def _modes(x: Tensor, traced: bool) -> tuple:
    """x's version, and what else a result depends on. Compilers have their own ways to know."""
    grad = torch.is_grad_enabled()
    if traced:
        return (grad,)
    cast = None
    if dispatch.any_autocast() and torch.is_autocast_enabled(x.device.type):
        cast = torch.get_autocast_dtype(x.device.type)
    return grad, cast, torch.is_inference_mode_enabled(), None if x.is_inference() else x._version


def why_not(pack: Pack, x: Tensor) -> list[operands.Operands] | Reason:
    """What the pack computes with, or why the layers compute for themselves."""
    found: list[Any] = []
    dtypes: Any = None
    for reference in pack._layers:
        layer = reference()
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
        dtypes_now = weight.dtype, lora_A.dtype, lora_B.dtype
        if dtypes_now != dtypes or torch.is_grad_enabled():  # of layers that are alike, x is looked at once
            reason = operands.call_reason(x, weight, lora_A, lora_B)
            if reason is not None:
                return reason
            dtypes = dtypes_now
        if weight.device != x.device:
            return Reason.DEVICES
        found.append(of_layer)
    return found


def _compute(pack: Pack, ongoing: Call, x: Any, traced: bool) -> Tensor | Reason:
    if ongoing.waiting.pop(pack.number, None) is not None:
        _note_miss(pack)
    keeps = _keeps(traced)
    if ongoing.keeps != keeps:
        return Reason.PACK_OUTSIDE
    if pack.misses >= _MISSES and not _may_run_twice():
        pack.paused += 1
        if pack.paused % _PAUSE:
            return Reason.PACK_APART
    found: Any = _at_a_glance(pack, x) if keeps == _INFERENCE and not _may_run_twice() else None
    if found is None:
        found = why_not(pack, x)
        if type(found) is Reason:
            return found
    weights, lora_As, lora_Bs, biases, scalings, ps, training, _ = map(list, zip(*found))
    results: list[Any] = list(lora_pack_of_layers(x, weights, lora_As, lora_Bs, biases, scalings, ps, training))
    first, results[0] = results[0], None
    versions = [] if traced else list(map(_versions, weights, lora_As, lora_Bs))
    ongoing.waiting[pack.number] = _Waiting(x, _modes(x, traced), found, versions, results)
    return first


def _at_a_glance(pack: Pack, x: Any) -> list[operands.Operands] | None:
    """As ``why_not``, without gradients, of layers that are plain and alike: the first is looked at closely, the others
    when they are called, which they mostly are. None for layers that are not.
    """
    if operands.reader_under_zero3() is not None:  # the others are not gathered yet
        return None
    first, *others = pack._layers
    of_first: Any = operands.operands(first())
    if type(of_first) is not tuple or type(x) is not Tensor or not x.is_cpu or of_first[7] is not None:
        return None
    dtype = x.dtype
    found = [of_first]
    for reference in others:
        layer = reference()
        of_layer: Any = None if layer is None else operands.glance(layer)
        if of_layer is None:
            return None
        found.append(of_layer)
    for weight, lora_A, lora_B, *_ in found:
        if weight.dtype is not dtype or lora_A.dtype is not dtype or lora_B.dtype is not dtype or not weight.is_cpu:
            return None
    if dtype not in FLOATS or x.layout is not torch.strided or dispatch.any_autocast() or inside_transform():
        return None
    return found


def _note_miss(pack: Pack) -> None:
    if not is_compiling() and not _may_run_twice():
        pack.misses += 1


# ------------------------------------------------------------------------------------------ activation checkpointing


_INFERENCE = (False, None)


def _keeps(traced: bool) -> tuple:
    """What differs inside of a checkpointed part of a module's forward from the module's own: whether there are
    gradients, and where what is saved for them goes. Compilers have their own ways to know.
    """
    return () if traced else (torch.is_grad_enabled(), _saved_tensors_hooks(True))


def _may_run_twice() -> bool:
    """Whether what happens now may be run again by activation checkpointing, or is that: without reentry, tensors that
    are saved are hooked; with it, the first run is the forward of an ``autograd.Function``, where there is no
    forward-mode AD; the second is in a backward.
    """
    in_function = not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled()
    return in_function or _saved_tensors_hooks(True) is not None or torch._C._current_graph_task_id() != -1
