"""``nn.Module``s over the ops: a linear layer and an embedding with a LoRA adapter, and a frozen linear."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F

from . import dispatch, functional
from ._checks import FLOATS, PLAIN_TENSORS, inside_transform, why_no_base
from .class_swaps import in_place_of
from .ops import _cpu, _cpu_product
from .report import FROZEN_PAST_MKL, FROZEN_UPCAST

_LOW_PRECISION = (torch.bfloat16, torch.float16)


_USUAL_ROWS = 512
"""Of a training step, by which a layer is judged before it has seen any."""


def faster_product(weight: Tensor) -> str | None:
    """How ``frozen_linear`` multiplies by a frozen [N, K] weight where it beats torch, as a row of the report.

    That is on a CPU without a matmul for the weight's dtype, and in fp32 where oneDNN beats MKL, which torch takes.
    """
    if weight.device.type != "cpu":
        return None
    if weight.dtype in _LOW_PRECISION:
        return None if _cpu.has_native_matmul(weight.dtype) else FROZEN_UPCAST
    if weight.dtype != torch.float32 or weight.numel() == 0:
        return None
    both = (_cpu.product_verdict(weight.dtype, _USUAL_ROWS, weight, is_gradient) for is_gradient in (False, True))
    return FROZEN_PAST_MKL if any(verdict.schedule == "onednn" for verdict in both) else None


def _may_gain(x: Tensor, weight: Tensor) -> bool:
    """Whether ``frozen_linear`` serves these two, which are of one dtype, and may be faster."""
    dtype = weight.dtype
    if weight.device.type != "cpu" or (dtype != torch.float32 and dtype not in _LOW_PRECISION):
        return False
    if dtype == torch.float32 and is_compiling():
        return False
    if not _is_plain(x) or not _is_plain(weight) or inside_transform():
        return False
    if not is_compiling() and dispatch.forced_backend() not in (None, "cpu", "reference"):
        return False
    if dtype in _LOW_PRECISION:
        return True  # the op asks the CPU at run time; asking here would be traced by torch.compile
    if _cpu.reads_weight_once(x, weight):
        large = weight.numel() >= _cpu.LARGE_WEIGHT
        return large and _cpu_product.choose_for_few_rows(x.numel() // x.shape[-1], weight).schedule == "decode"
    if _cpu.matmul_verdict(x, weight).schedule == "onednn":
        return True
    rows = x.numel() // max(1, x.shape[-1])
    return x.requires_grad and _cpu.product_verdict(dtype, rows, weight, is_k_by_n=True).schedule == "onednn"


def _is_plain(t: Tensor) -> bool:
    return type(t) in PLAIN_TENSORS and t.layout == torch.strided and not t.is_nested


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``, through ``frozen_linear`` where that may be faster and nothing but x needs a gradient."""
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    if trains or x.dtype != weight.dtype or not _may_gain(x, weight) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    return functional.frozen_linear(x, weight, bias)


@in_place_of(nn.Linear)
class FrozenLinear(nn.Linear):
    """``nn.Linear`` whose frozen weight is multiplied by ``lk.frozen_linear`` where that is faster on a CPU.

    In bf16 and fp16 through fp32, on a CPU without instructions for them. In fp32 by oneDNN where that was measured to
    be faster than torch's own product, and for up to four rows and a large weight by a kernel that reads the weight
    once; in fp32 under ``torch.compile`` it is ``nn.Linear``.

    ``patch(model, frozen_linears=True)`` swaps the class of existing layers; results equal ``nn.Linear``'s up to
    rounding. The op has no double backward.
    """

    def forward(self, input: Tensor) -> Tensor:
        return _linear(input, self.weight, self.bias)


class _LoRALayer(nn.Module):
    """What ``LoRALinear`` and ``LoRAEmbedding`` share: an adapter's numbers, and merging."""

    weight: nn.Parameter
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    _NUMBERS = ("rank", "alpha", "use_rslora", "scaling", "merged", "_base_copy")
    _PLAIN: type[nn.Module]
    """What is left of the layer without its adapter."""

    @classmethod
    def _empty(cls, training: bool) -> Any:
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.training = training
        return layer

    def _set_numbers(self, r: int, alpha: float, use_rslora: bool) -> None:
        # Plain Python numbers, whatever kind came in: torch.compile and the adapter's JSON file want those.
        self.rank, self.use_rslora = int(r), bool(use_rslora)
        self.alpha = int(alpha) if isinstance(alpha, numbers.Integral) else float(alpha)
        self.scaling = scaling_of(self.rank, self.alpha, self.use_rslora)
        self.merged = False
        self._base_copy: Tensor | None = None

    def update_factors(self) -> tuple[Tensor, Tensor]:
        """(lora_A, lora_B) such that the update of ``weight`` is ``scaling * lora_B @ lora_A``."""
        return self.lora_A, self.lora_B

    def merge(self, keep_base: bool = False) -> None:
        """Adds the adapter to ``weight`` in place, so that the layer runs without it.

        Whether another module holds the same weight (a tied embedding) cannot be seen from here:
        ``lk.merge_adapter`` merges a whole model and checks that.

        Args:
            keep_base: keep a copy of ``weight`` in host memory, from which ``unmerge`` restores it bitwise.

        Raises:
            RuntimeError: already merged.
            ValueError: the merged weight would not be finite, or it is not this layer's own parameter (pruned or
                parametrized), so that what is written there would be lost. The weight is then unchanged.
        """
        if self.merged:
            raise RuntimeError("merge: the adapter is already merged; call unmerge() first")
        self.check_mergeable("merge")
        copy = self.weight.detach().to("cpu", copy=True) if keep_base else None
        functional.merge_(self.weight, *self.update_factors(), self.scaling)
        self._base_copy, self.merged = copy, True

    def check_mergeable(self, op: str) -> None:
        """``ValueError`` if the weight, or what the next call makes lora_A and lora_B of, is not in this layer."""
        for name in ("weight", "lora_A", "lora_B"):
            computed = name != "weight" and "parametrizations" in self._modules  # made anew whenever it is read
            if self._parameters.get(name) is None and not computed:
                raise ValueError(f"{op}: {name} is not a parameter of its module (pruned, parametrized or sharded)")

    def unmerge(self) -> None:
        """Takes the adapter out of ``weight`` again.

        Bitwise after ``merge(keep_base=True)``; otherwise the update is subtracted, which leaves a rounding
        error.

        Raises:
            RuntimeError: not merged.
        """
        if not self.merged:
            raise RuntimeError("unmerge: the adapter is not merged")
        self.check_mergeable("unmerge")
        if self._base_copy is None:
            functional.unmerge_(self.weight, *self.update_factors(), self.scaling)
        else:
            with torch.no_grad():
                self.weight.copy_(self._base_copy)
        self._base_copy, self.merged = None, False

    def discard_adapter(self) -> None:
        """Turns this module back into a plain one with its present ``weight``. Cannot be undone."""
        for name in ("lora_A", "lora_B", *self._NUMBERS):
            delattr(self, name)
        self.__class__ = self._PLAIN


class LoRALinear(_LoRALayer):
    """A linear layer with a low-rank adapter (LoRA, Hu et al., ICLR 2022), computed by ``lk.lora_linear``.

    Equivalent to::

        F.linear(x, weight, bias) + scaling * F.linear(F.linear(F.dropout(x, dropout, training), lora_A), lora_B)

    ``weight`` and ``bias`` are frozen; ``lora_A`` starts Kaiming-uniform and ``lora_B`` zero, as in PEFT, so
    that the layer starts as the plain linear. All are ordinary entries of ``state_dict``. A merged layer's
    ``weight`` holds the adapter: unmerge it before saving a state dict that is to be loaded into an unmerged
    layer.

    Args:
        in_features, out_features, bias, device, dtype: as ``nn.Linear``.
        r: rank of the adapter, at least 1.
        alpha: the update is scaled by ``alpha / r``, or ``alpha / sqrt(r)`` with ``use_rslora``.
        dropout: probability of zeroing an element of x on the adapter's branch while training, in [0, 1).
        use_rslora: rank-stabilised scaling (Kalajdzievski, 2023).
        adapter_dtype: dtype of lora_A and lora_B. None means float32 over a 16-bit weight, else the weight's
            dtype.

    Attributes:
        weight [out_features, in_features], bias [out_features] or None: frozen parameters.
        lora_A [r, in_features], lora_B [out_features, r]: trained parameters.
        rank, alpha, scaling, dropout_p, use_rslora: the numbers above.
        merged: whether ``weight`` contains the adapter.

    Raises:
        TypeError, ValueError: a rank, alpha or dropout that is not a number in its range.
    """

    _NUMBERS = (*_LoRALayer._NUMBERS, "dropout_p")
    _PLAIN = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        *,
        bias: bool = True,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_hyperparameters("LoRALinear", r, alpha, dropout)
        super().__init__()
        base = nn.Linear(in_features, out_features, bias, device, dtype)
        check_base("LoRALinear", base, adapter_dtype)
        adapter = empty_adapter(base.weight, r, in_features, out_features, adapter_dtype)
        self._adopt(base.weight, base.bias, adapter, r, alpha, dropout, use_rslora)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> LoRALinear:
        """A ``LoRALinear`` around the parameters of ``linear``, which are shared, not copied, and become frozen.

        Hooks on ``linear`` are not carried over. Arguments and errors are those of the class; ``TypeError``
        if ``linear`` is not a plain ``nn.Linear``, ``ValueError`` if its weight or bias is not a floating-point
        parameter of its own (pruned, parametrized, quantised) or its forward was replaced.
        """
        check_hyperparameters("from_linear", r, alpha, dropout)
        check_plain_linear("from_linear", linear)
        check_base("from_linear", linear, adapter_dtype)
        layer = cls._empty(linear.training)
        adapter = empty_adapter(linear.weight, r, linear.in_features, linear.out_features, adapter_dtype)
        layer._adopt(linear.weight, linear.bias, adapter, r, alpha, dropout, use_rslora)
        return layer

    @classmethod
    def from_peft(cls, peft_lora_linear: nn.Module, adapter: str | None = None) -> LoRALinear:
        """A ``LoRALinear`` around the parameters of a PEFT ``lora.Linear``; all are shared and train as before.

        Args:
            peft_lora_linear: PEFT's layer.
            adapter: name of the adapter; None means the active one.

        Raises:
            TypeError: not a PEFT ``lora.Linear``.
            ValueError: no such adapter, or the layer computes more than plain LoRA. The message gives the
                reason.
        """
        from .integrations.peft import plain_adapter

        weight, bias, lora_A, lora_B, alpha, scaling, dropout, use_rslora = plain_adapter(peft_lora_linear, adapter)
        layer = cls._empty(peft_lora_linear.training)
        for name, parameter in (("weight", weight), ("bias", bias), ("lora_A", lora_A), ("lora_B", lora_B)):
            layer.register_parameter(name, parameter)
        layer._describe(lora_A.shape[0], alpha, dropout, use_rslora)
        layer.scaling = scaling
        return layer

    def _adopt(
        self, weight: nn.Parameter, bias: nn.Parameter | None, adapter: tuple[nn.Parameter, nn.Parameter],
        r: int, alpha: float, dropout: float, use_rslora: bool,
    ) -> None:  # fmt: skip
        """Takes over a base weight and bias and starts an adapter, of which only the room is there."""
        for name, base in (("weight", weight), ("bias", bias)):
            self.register_parameter(name, None if base is None else base.requires_grad_(False))
        self.lora_A, self.lora_B = adapter
        self._describe(r, alpha, dropout, use_rslora)
        self.reset_adapter()

    def _describe(self, r: int, alpha: float, dropout: float, use_rslora: bool) -> None:
        self._set_numbers(r, alpha, use_rslora)
        self.out_features, self.in_features = self.weight.shape
        self.dropout_p = float(dropout)

    def reset_adapter(self) -> None:
        """Draws lora_A anew and sets lora_B to zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return _linear(x, self.weight, self.bias)
        own = self._parameters  # four times quicker than attributes, which is felt in a small layer
        try:
            weight, lora_A, lora_B, bias = own["weight"], own["lora_A"], own["lora_B"], own["bias"]
        except KeyError:  # pruned, parametrized, a replica or sharded: they are attributes then
            weight, lora_A, lora_B, bias = self.weight, self.lora_A, self.lora_B, self.bias
        return functional.lora_linear(
            x, weight, lora_A, lora_B, bias,
            scaling=self.scaling, dropout_p=self.dropout_p, training=self.training,
        )  # fmt: skip

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        text += f", r={self.rank}, alpha={self.alpha}, dropout={self.dropout_p}"
        text += ", use_rslora=True" if self.use_rslora else ""
        return text + (", merged=True" if self.merged else "")


class LoRAEmbedding(_LoRALayer):
    """An embedding with a low-rank adapter (LoRA, Hu et al., ICLR 2022), computed by ``lk.lora_embedding``.

    Equivalent to::

        F.embedding(ids, weight) + scaling * F.embedding(ids, lora_A.T) @ lora_B.T

    ``weight`` is frozen; ``lora_A`` starts at zero and ``lora_B`` normally distributed, as in PEFT, so that the layer
    starts as the plain embedding. There is no dropout, as in PEFT.

    Args:
        num_embeddings, embedding_dim, padding_idx, device, dtype: as ``nn.Embedding``.
        r, alpha, use_rslora, adapter_dtype: as ``LoRALinear``.

    Attributes:
        weight [num_embeddings, embedding_dim]: a frozen parameter.
        lora_A [r, num_embeddings], lora_B [embedding_dim, r]: trained parameters.
        rank, alpha, scaling, use_rslora: the numbers above.
        merged: whether ``weight`` contains the adapter.

    Raises:
        TypeError, ValueError: a rank or alpha that is not a number in its range.
    """

    _PLAIN = nn.Embedding

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int,
        alpha: float,
        *,
        padding_idx: int | None = None,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_hyperparameters("LoRAEmbedding", r, alpha, 0.0)
        super().__init__()
        base = nn.Embedding(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        check_base("LoRAEmbedding", base, adapter_dtype)
        self._adopt(base, r, alpha, use_rslora, adapter_dtype)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        *,
        r: int,
        alpha: float,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> LoRAEmbedding:
        """A ``LoRAEmbedding`` around the weight of ``embedding``, which is shared, not copied, and becomes frozen.

        Hooks on ``embedding`` are not carried over. Arguments and errors are those of the class; ``TypeError`` if
        ``embedding`` is not a plain ``nn.Embedding``, ``ValueError`` if it has options that a frozen weight has no use
        for (max_norm, scale_grad_by_freq, sparse), or its weight is none that ``LoRALinear.from_linear`` takes.
        """
        check_hyperparameters("from_embedding", r, alpha, 0.0)
        kind = type(embedding)
        if kind is not nn.Embedding:
            raise TypeError(f"from_embedding: expected a plain nn.Embedding, got {kind.__module__}.{kind.__qualname__}")
        if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
            raise ValueError("from_embedding: an embedding with max_norm, scale_grad_by_freq or sparse is not served")
        check_base("from_embedding", embedding, adapter_dtype)
        layer = cls._empty(embedding.training)
        layer._adopt(embedding, r, alpha, use_rslora, adapter_dtype)
        return layer

    def _adopt(
        self, base: nn.Embedding, r: int, alpha: float, use_rslora: bool, adapter_dtype: torch.dtype | None
    ) -> None:
        """Takes over a base weight and starts a new adapter."""
        for name in ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type"):
            setattr(self, name, getattr(base, name))
        self.scale_grad_by_freq = self.sparse = False
        self.weight = base.weight.requires_grad_(False)
        adapter = empty_adapter(base.weight, r, self.num_embeddings, self.embedding_dim, adapter_dtype)
        self.lora_A, self.lora_B = adapter
        self._set_numbers(r, alpha, use_rslora)
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """Sets lora_A to zero and draws lora_B anew."""
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    def update_factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_B.t(), self.lora_A.t()

    def forward(self, input: Tensor) -> Tensor:
        if self.merged:
            return F.embedding(input, self.weight, self.padding_idx)
        return functional.lora_embedding(
            input, self.weight, self.lora_A, self.lora_B, scaling=self.scaling, padding_idx=self.padding_idx
        )

    def extra_repr(self) -> str:
        text = f"{self.num_embeddings}, {self.embedding_dim}"
        text += f", padding_idx={self.padding_idx}" if self.padding_idx is not None else ""
        text += f", r={self.rank}, alpha={self.alpha}" + (", use_rslora=True" if self.use_rslora else "")
        return text + (", merged=True" if self.merged else "")


def scaling_of(r: int, alpha: float, use_rslora: bool) -> float:
    """The factor of the update: ``alpha / r``, or ``alpha / sqrt(r)``."""
    return alpha / (math.sqrt(r) if use_rslora else r)


def check_plain_linear(op: str, linear: Any) -> None:
    """``TypeError`` unless ``linear`` computes what ``nn.Linear`` computes."""
    kind = type(linear)
    if kind not in (nn.Linear, FrozenLinear):
        raise TypeError(f"{op}: expected a plain nn.Linear, got {kind.__module__}.{kind.__qualname__}")


def empty_adapter(
    weight: Tensor, r: int, columns: int, rows: int, adapter_dtype: torch.dtype | None
) -> tuple[nn.Parameter, nn.Parameter]:
    """lora_A [r, columns] and lora_B [rows, r] beside ``weight``, without values yet."""
    if adapter_dtype is None:
        adapter_dtype = torch.float32 if weight.dtype in _LOW_PRECISION else weight.dtype
    lora_A, lora_B = (
        nn.Parameter(torch.empty(shape, dtype=adapter_dtype, device=weight.device))
        for shape in ((r, columns), (rows, r))
    )
    return lora_A, lora_B


def check_base(op: str, layer: nn.Module, adapter_dtype: torch.dtype | None) -> None:
    """Raises unless an adapter of this dtype can share the parameters of ``layer``, whose class has been looked at."""
    check_adapter_dtype(op, adapter_dtype)
    reason = why_no_base(layer)
    if reason is not None:
        raise ValueError(f"{op}: {reason}")


def check_adapter_dtype(op: str, adapter_dtype: torch.dtype | None) -> None:
    """``TypeError`` for a dtype that adapters cannot be computed in."""
    if adapter_dtype is not None and adapter_dtype not in FLOATS:
        names = "float32, bfloat16, float16, float64 or None"
        raise TypeError(f"{op}: adapter_dtype must be {names}, got {adapter_dtype!r}")


def check_hyperparameters(op: str, r: Any, alpha: Any, dropout: Any) -> None:
    """Raises ``TypeError`` or ``ValueError`` for a rank, alpha or dropout that cannot be used."""
    for name, value, kind in (
        ("r", r, numbers.Integral),
        ("alpha", alpha, numbers.Real),
        ("dropout", dropout, numbers.Real),
    ):
        if isinstance(value, bool) or not isinstance(value, kind):
            expected = "an integer" if kind is numbers.Integral else "a number"
            raise TypeError(f"{op}: {name} must be {expected}, got {value!r}")
    if r < 1:
        raise ValueError(f"{op}: r must be at least 1, got {r}")
    if not math.isfinite(alpha):
        raise ValueError(f"{op}: alpha must be finite, got {alpha}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"{op}: dropout must be in [0, 1), got {dropout}")
