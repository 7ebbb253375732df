"""Linear layers whose weight is quantised: ``QuantizedLinear``, and an adapter on it or on another library's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import dispatch, formats
from ..class_swaps import give_back, in_place_of
from ..formats import DECODED, FORMATS, QuantizedWeight
from ..formats.int8 import exact_in_eval
from ..functional.lora import lora_linear_of_layer
from ..functional.packed import linear_of_layer
from ..plain import FLOATS, PLAIN_TENSORS, inside_transform
from ..reasons import Reason
from .lora import LoRALinear

_PARTS = "_part_"


class QuantizedLinear(nn.Linear):
    """A frozen linear layer that keeps its weight packed; ``lk.quantize_`` makes them of a model's layers.

    Equivalent to ``F.linear(x, weight.dequantize(), bias)`` for the ``QuantizedWeight`` that it was made of. In
    ``state_dict`` an "nf4", "fp4" or "int8" has the names and the bytes of bitsandbytes' layer, which can load it, and
    loads its.

    Moving it to a dtype changes what the weight decodes to, and none of its parts.

    Args:
        weight: the weight, which is not copied.
        bias: [out_features], floating point, or None. Nothing is checked: what does not fit raises in the call.

    Attributes:
        weight: the packed bytes, an integer parameter. ``quantized_weight()`` has the rest.
        in_features, out_features, bias: as in ``nn.Linear``.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self.keep(weight)

    def keep(self, weight: QuantizedWeight) -> None:
        """Takes over the parts of ``weight``."""
        data, *others = weight.parts
        # Of a shape that no other matrix can be added to: who takes bytes for numbers is to fail.
        self.weight = nn.Parameter(data.view(-1, 1), requires_grad=False)
        for index, part in enumerate(others, 1):
            self.register_buffer(f"{_PARTS}{index}", part, persistent=False)
        self._of_weight = weight.format, weight.layout, weight.block, len(weight.parts)
        self.compute_dtype = weight.dtype

    def quantized_weight(self) -> QuantizedWeight:
        """The weight; it refers to the layer's tensors."""
        name, layout, block, count = self._of_weight
        parts = (self.weight.data, *(self._buffers[f"{_PARTS}{index}"] for index in range(1, count)))
        shape = self.out_features, self.in_features
        return QuantizedWeight.of_layer(name, layout, parts, shape, block, self.compute_dtype)  # type: ignore[arg-type]

    @property
    def W_q(self) -> Tensor:
        """``weight`` by HQQ's name, which tells PEFT to ask ``dequantize`` for the numbers."""
        return self.weight

    def dequantize(self) -> Tensor:
        """The weight as a new tensor, which PEFT's DoRA asks for."""
        return self.quantized_weight().dequantize()

    def forward(self, input: Tensor) -> Tensor:
        return linear_of_layer(input, self.quantized_weight(), self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        wanted = fn(torch.empty(0, dtype=self.compute_dtype, device=self.weight.device)).dtype
        parts = {name: part for name, part in self._buffers.items() if name.startswith(_PARTS)}
        super()._apply(fn, recurse)
        for name, part in parts.items():
            moved: Any = self._buffers[name]
            if moved.dtype != part.dtype:  # type: ignore[union-attr]
                self._buffers[name] = part.to(moved.device)  # type: ignore[union-attr]
        if wanted in DECODED:
            self.compute_dtype = wanted
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self.quantized_weight()
        del destination[f"{prefix}weight"]
        for name, entry in FORMATS[weight.format].pack(weight).items():
            destination[prefix + name] = entry

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Mapping[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        own = f"{prefix}weight"
        names = {f"{prefix}{name}" for fmt in FORMATS.values() for name in fmt.entries}
        entries = {key[len(prefix) :]: state_dict[key] for key in state_dict if key.startswith(tuple(names))}
        if not entries:
            missing_keys.append(own)
        else:
            try:
                self._load(entries, local_metadata.get("assign_to_params_buffers", False))
            except ValueError as error:
                error_msgs.append(f"{prefix[:-1]}: {error}")
                return
        rest = {key: value for key, value in state_dict.items() if key[len(prefix) :] not in entries}
        rest[own] = self.weight
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs  # type: ignore[arg-type]
        )  # fmt: skip

    def _load(self, entries: Mapping[str, Tensor], assign: bool) -> None:
        found = (fmt.unpack(entries, self.compute_dtype) for fmt in FORMATS.values())
        weight = next((weight for weight in found if weight is not None), None)
        if weight is None:
            raise ValueError(f"the state dict has no packed weight, but {', '.join(sorted(entries))}")
        if weight.shape != (self.out_features, self.in_features):
            raise ValueError(f"a weight of {weight.shape} for a layer of {(self.out_features, self.in_features)}")
        if not assign:  # the entries stay who gave them
            device = self.weight.device
            weight = replace(weight, parts=tuple(part.to(device, copy=True) for part in weight.parts))
        self.keep(weight)

    def extra_repr(self) -> str:
        weight = self.quantized_weight()
        return f"{super().extra_repr()}, {weight.format}, {weight.bits_per_weight:.2f} bits per weight"


class QuantizedLoRALinear(LoRALinear):
    """``LoRALinear`` over a quantised weight. Its class has the layer's own class as its other base, so that what the
    layer keeps, moves, saves and loads stays as it was.

    Merging decodes the weight, adds the adapter and quantises again: ``merge`` returns how far the result is from the
    exact one. ``unmerge`` restores the packed bytes, of which ``merge(keep_base=True)`` keeps a copy.
    """

    _kept_parts: tuple[Tensor, ...] | None = None

    def forward(self, x: Tensor) -> Tensor:
        set_compute_type(self, x)
        weight = self._packed()
        if self.merged:
            return linear_of_layer(x, weight, self.bias)
        return lora_linear_of_layer(
            x, weight, self.lora_A, self.lora_B, self.bias, self.scaling, self.dropout_p, self.training
        )

    def merges_finite(self) -> bool:
        weight = self._packed()
        return _all_finite(self._merged(weight)[0])

    @torch.no_grad()
    def _merged(self, weight: QuantizedWeight) -> tuple[QuantizedWeight, Tensor]:
        """The sum quantised as ``weight`` is, and the exact sum."""
        exact = weight.dequantize(torch.float32) + self._update()
        if not torch.isfinite(exact).all():
            return weight, exact
        return FORMATS[weight.format].again(exact, weight), exact

    def _update(self) -> Tensor:
        return self.lora_B.detach().float() @ self.lora_A.detach().float() * self.scaling

    def _packed(self) -> QuantizedWeight:
        found = formats.from_module(self)
        if not isinstance(found, QuantizedWeight):
            raise RuntimeError(f"the packed weight of this layer cannot be read any more: {found}")
        return found

    def _shape(self) -> tuple[int, int]:
        return self._packed().shape

    @torch.no_grad()
    def merge(self, keep_base: bool = False) -> float:  # type: ignore[override]
        """Adds the adapter to the packed weight.

        Args:
            keep_base: keep a copy of the packed parts, without which ``unmerge`` is refused.

        Returns:
            What quantising again costs: the norm of the difference between the new weight and the exact sum, in norms
            of the update. Above 1, more is lost than the adapter adds. 0 where there is nothing to add.

        Raises:
            RuntimeError: already merged.
            ValueError: the merged weight would not be finite, or the layer keeps its weight in another form than it is
                read in. The weight is then unchanged.
        """
        if self.merged:
            raise RuntimeError("merge: the adapter is already merged; call unmerge() first")
        self.check_mergeable("merge")
        weight, update = self._packed(), self._update()
        size, lost = torch.linalg.vector_norm(update), 0.0
        if size != 0:  # NaN is not
            merged, exact = self._merged(weight)
            if not torch.isfinite(exact).all() or not _all_finite(merged):
                raise ValueError("merge: lora_A, lora_B and the merged weight must be finite; nothing was changed")
            lost = (torch.linalg.vector_norm(merged.dequantize(torch.float32) - exact) / size).item()
        self._kept_parts = tuple(part.clone() for part in weight.parts) if keep_base else None
        if size != 0:
            for part, new in zip(weight.parts, merged.parts):
                part.copy_(new.view(part.shape))
        self.merged = True
        return lost

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restores the packed parts as they were before ``merge(keep_base=True)``.

        Raises:
            RuntimeError: not merged, or merged without a copy.
        """
        self.check_unmergeable("unmerge")
        parts: Any = self._kept_parts
        for part, old in zip(self._packed().parts, parts):
            part.copy_(old)
        self._kept_parts, self.merged = None, False

    def check_mergeable(self, op: str) -> None:
        """``ValueError`` where what is read is computed from what the layer keeps, so that it cannot be written."""
        first, again = self._packed(), self._packed()
        if any(a.data_ptr() != b.data_ptr() for a, b in zip(first.parts, again.parts)):
            raise ValueError(f"{op}: this layer keeps its {first.format} in another form than it is read in")

    def check_unmergeable(self, op: str) -> None:
        super().check_unmergeable(op)
        if self._kept_parts is None:
            raise RuntimeError(f"{op}: the packed weight was merged without keep_base=True")

    def discard_adapter(self) -> None:
        for name in ("lora_A", "lora_B", *self._NUMBERS):
            delattr(self, name)
        self.__dict__.pop("_kept_parts", None)
        give_back(self, {ours: theirs for theirs, ours in _CLASSES.items()})

    def __reduce_ex__(self, protocol: Any) -> Any:
        original = _original(self, _CLASSES)
        parts: Any = super().__reduce_ex__(protocol)
        return (_empty, (original,), *parts[2:])


class FrozenPacked(nn.Module):
    """What ``patch(frozen_linears=True)`` puts in front of a packed layer's own class: its product from the packed
    bytes, where nothing else happens in the call. Calls that it leaves to the layer are counted in ``lk.stats()``.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        set_compute_type(self, x)
        weight = formats.from_module(self)
        bias: Any = self.bias
        reason = Reason.EXTRA_ARGUMENTS if args or kwargs else _why_not_linear(x, weight)
        if reason is None and bias is not None and bias.requires_grad:
            reason = Reason.BASE_REQUIRES_GRAD
        if reason is None:
            return linear_of_layer(x, weight, bias)  # type: ignore[arg-type]
        if not torch.compiler.is_compiling():
            dispatch.count_fallback("frozen_linear", reason)
        return super().forward(x, *args, **kwargs)


def _why_not_linear(x: Any, weight: QuantizedWeight | Reason | None) -> Reason | None:
    """Why this input is not multiplied by what ``from_module`` has read; None if it can be."""
    if not isinstance(weight, QuantizedWeight):
        return weight or Reason.BASE_LAYER
    if type(x) not in PLAIN_TENSORS:
        return Reason.DTENSOR
    if x.layout != torch.strided or x.is_nested:
        return Reason.LAYOUT
    if x.dtype not in FLOATS:
        return Reason.DTYPE
    if x.device != weight.device:
        return Reason.DEVICES
    if weight.dtype not in (None, x.dtype) and not x.is_cpu and not dispatch.autocast_enabled(x.device.type):
        return Reason.MIXED_DTYPES
    return Reason.TRANSFORM if inside_transform() else None


def set_compute_type(layer: Any, x: Tensor) -> None:
    """A layer of bitsandbytes' that was not told what to multiply in decides by its first input, whoever computes."""
    if not layer.__dict__.get("compute_type_is_set", True):  # a miss of getattr takes as long as a kernel does
        layer.set_compute_type(x)
        layer.compute_type_is_set = True


def frozen_packed(base: type[nn.Module]) -> type[nn.Module]:
    """The class that takes the place of ``base``."""
    if base not in _FROZEN:
        kind = in_place_of(base)(type(f"Frozen{base.__name__}", (FrozenPacked, base), {}))
        kind.__reduce_ex__ = _reduce_frozen  # type: ignore[method-assign, assignment]
        _FROZEN[base] = kind
    return _FROZEN[base]


def _reduce_frozen(self: FrozenPacked, protocol: Any) -> Any:
    original = _original(self, _FROZEN)
    parts: Any = nn.Module.__reduce_ex__(self, protocol)
    return (_empty_frozen, (original,), *parts[2:])


def _original(layer: nn.Module, made: Mapping[type, type]) -> type:
    """What the class of a layer stands for, for a copy of it.

    Raises:
        TypeError: somebody has put a class in front of ours, as FSDP does, whose state no copy would share.
    """
    for original, ours in made.items():
        if ours is type(layer):
            return original
    raise TypeError(f"{type(layer).__name__}: a wrapped layer (FSDP) is neither copied nor pickled; use state dicts")


def _empty_frozen(base: type[nn.Module]) -> nn.Module:
    kind = frozen_packed(base)
    return kind.__new__(kind)


def frozen_originals() -> dict[type, type]:
    """The classes that ``frozen_packed`` has made, and what they stand for."""
    return {ours: theirs for theirs, ours in _FROZEN.items()}


_FROZEN: dict[type, type[nn.Module]] = {}


def _all_finite(weight: QuantizedWeight) -> bool:
    return bool(torch.isfinite(weight.dequantize()).all())


def quantized_lora(base: type[nn.Module]) -> type[QuantizedLoRALinear]:
    """``QuantizedLoRALinear`` for layers of class ``base``, or of what ``frozen_packed`` has made of one."""
    base = frozen_originals().get(base, base)
    if base not in _CLASSES:
        _CLASSES[base] = type(f"LoRA{base.__name__}", (QuantizedLoRALinear, base), {"__module__": __name__})
    return _CLASSES[base]


_CLASSES: dict[type, type[QuantizedLoRALinear]] = {}


def _empty(base: type[nn.Module]) -> QuantizedLoRALinear:
    kind = quantized_lora(base)
    return kind.__new__(kind)


def why_no_packed_base(layer: nn.Module, packed: QuantizedWeight | Reason) -> Reason | None:
    """Why an adapter of ours cannot stand on what ``from_module`` has read of a layer; None if it can."""
    if "forward" in layer.__dict__:
        return Reason.INSTANCE_FORWARD
    if layer._parameters.get("weight") is None:
        return Reason.DISPLACED
    return packed if isinstance(packed, Reason) and packed is not Reason.INT8_EVAL else None


def _over_packed(linear: nn.Module) -> QuantizedLoRALinear | None:
    """``LoRALinear._over_packed``: another layer with the same tensors, and with what else its class keeps."""
    packed = formats.from_module(linear)
    if packed is None:
        return None
    reason = why_no_packed_base(linear, packed)
    if reason is not None:
        raise ValueError(f"from_linear: {reason}")
    layer = _empty(type(linear))
    fresh = nn.Module().__dict__
    layer.__dict__.update({**linear.__dict__, **fresh, "training": linear.training})
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        layer.__dict__[name].update(linear.__dict__[name])
    exact_in_eval(layer, True)
    return layer


LoRALinear._over_packed = staticmethod(_over_packed)
