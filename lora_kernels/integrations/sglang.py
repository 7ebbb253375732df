"""SGLang's LoRA layers computed by this package: a backend to choose with ``--lora-backend lora_kernels``.

Written from the signatures of SGLang's sources and tested against a stub that has them, on the CPU. It has never run in
SGLang.

SGLang wraps its linear layers and asks a backend for what adapters add. Its pools are those of ``serving.py``:
lora_A [slots, slices * max_rank, in_features], the slices of an adapter one behind the other at its own rank, and
lora_B [slots, out_features, max_rank]. A slot of rank 0 is that of requests without an adapter.

Served are column- and row-parallel layers, merged ones (gate and up, q, k and v, any number of slices), the embedding
and the head, with pruned and chunked logits; decoding under CUDA graphs. Not served, and refused by name: LoRA on the
experts of a mixture, tokens that an adapter adds, and CUDA graphs of prefill, which SGLang then runs without one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .serving import AdapterSlots, ServingStep, add_branch_, expand_, shrink

NAME = "lora_kernels"


def register(name: str = NAME) -> type:
    """Makes the backend known to SGLang in this process, and to its command line where that has a list of backends.

    SGLang starts processes of its own for the models. They know what entry points of the group ``sglang.srt.plugins``
    have registered there: a package that has one for this function makes it known to all of them.

    Args:
        name: by which ``--lora-backend`` chooses it.

    Returns:
        The class, a subclass of SGLang's ``BaseLoRABackend``.

    Raises:
        ImportError: SGLang is not installed, or has no ``srt.lora.backend.lora_registry``.
    """
    try:
        from sglang.srt.lora.backend.lora_registry import register_lora_backend
    except ImportError as error:
        raise ImportError(
            f"lora_kernels.integrations.sglang.register: needs SGLang with srt.lora.backend.lora_registry: {error}"
        ) from error
    backend = _backend()
    register_lora_backend(name)(lambda: backend)
    from sglang.srt import server_args

    choices = getattr(server_args, "LORA_BACKEND_CHOICES", None)
    if isinstance(choices, list) and name not in choices:
        choices.append(name)
    return backend


@functools.cache
def _backend() -> type:
    """Made when it is first asked for: SGLang is imported then."""
    from sglang.srt.lora.backend.base_backend import BaseLoRABackend

    return type("LoRAKernelsBackend", (_Methods, BaseLoRABackend), {"name": NAME, "__doc__": _Methods.__doc__})


@dataclass
class BatchInfo:
    """What a batch is computed with, in SGLang's hands: it looks at what stands below ``step``, and writes the last."""

    step: ServingStep
    bs: int
    use_cuda_graph: bool
    expected_tokens: int | None = None
    has_active_lora: bool = False


class _Methods:
    """The methods of SGLang's ``BaseLoRABackend``, over ``serving.py``.

    Under CUDA graphs one ``ServingStep`` of the largest batch serves all graphs; other batches make one of their own.
    """

    batch_info: BatchInfo | None
    lm_head_batch_info: BatchInfo | None
    lm_head_pass_batch_infos: list[BatchInfo] | None

    def __init__(self, max_loras_per_batch: int, device: torch.device, **_: Any) -> None:
        super().__init__(max_loras_per_batch, device)  # type: ignore[call-arg]
        self._slots = AdapterSlots(max_loras_per_batch, device=device)
        self._graph_step: ServingStep | None = None

    # ------------------------------------------------------------------------------------------ once per batch

    def init_cuda_graph_batch_info(self, max_bs_in_cuda_graph: int, num_tokens_per_bs: int) -> None:
        """Room for the largest batch that is captured."""
        self._graph_step = ServingStep(max_bs_in_cuda_graph * num_tokens_per_bs, self._slots)

    def init_decode_cuda_graph_batch_info(self, max_bs_in_cuda_graph: int, num_tokens_per_req: int) -> None:
        """The same, as newer versions call it."""
        self.init_cuda_graph_batch_info(max_bs_in_cuda_graph, num_tokens_per_req)

    def prepare_lora_batch(
        self,
        forward_batch: Any,
        weight_indices: list[int],
        lora_ranks: list[int],
        scalings: list[float],
        use_cuda_graph: bool = False,
        use_prefill_cuda_graph: bool = False,
        *,
        use_decode_cuda_graph: bool = False,
    ) -> None:
        """Says who the rows of the next forward belong to.

        Args:
            forward_batch: SGLang's.
            weight_indices: the slot of each request.
            lora_ranks, scalings: of each slot.
            use_cuda_graph, use_decode_cuda_graph: what older and newer versions call a decoding batch of a graph.
        """
        from sglang.srt.lora.utils import generate_sequence_lengths

        if getattr(self, "is_moe_lora", False):
            raise NotImplementedError("lora_kernels: LoRA on the experts of a mixture is not served in SGLang")
        if use_prefill_cuda_graph:
            raise NotImplementedError("lora_kernels: CUDA graphs of prefill are not served in SGLang")
        is_graph = use_cuda_graph or use_decode_cuda_graph
        lengths = generate_sequence_lengths(forward_batch, device=torch.device("cpu")).tolist()
        self._slots.assign(lora_ranks, scalings)
        if is_graph and self._graph_step is None:
            raise RuntimeError("lora_kernels: prepare_lora_batch before init_cuda_graph_batch_info")
        step = self._graph_step if is_graph and self._graph_step else ServingStep(max(1, sum(lengths)), self._slots)
        step.fill(weight_indices, lengths)
        self.batch_info = BatchInfo(step, len(weight_indices), is_graph)
        self.lm_head_batch_info, self.lm_head_pass_batch_infos = self._lm_head(forward_batch, weight_indices)
        self._lm_head_pass_idx = None

    def _lm_head(
        self, forward_batch: Any, weight_indices: list[int]
    ) -> tuple[BatchInfo | None, list[BatchInfo] | None]:
        """The rows that reach the head, where it does not get all: of the batch, and of each pass over its logits."""
        from sglang.srt.lora.utils import get_lm_head_pruned_lens

        lengths = get_lm_head_pruned_lens(forward_batch)
        if lengths is None:
            return None, None
        whole = self._pruned(weight_indices, lengths)
        passes = self._get_lm_head_pass_segments(weight_indices, lengths)  # type: ignore[attr-defined]
        return whole, None if passes is None else [self._pruned(*segments) for segments in passes]

    def _pruned(self, weight_indices: Sequence[int], lengths: Sequence[int]) -> BatchInfo:
        step = ServingStep(max(1, sum(lengths)), self._slots)
        step.fill(weight_indices, lengths)
        return BatchInfo(step, len(weight_indices), use_cuda_graph=False, expected_tokens=sum(lengths))

    # ---------------------------------------------------------------------------------------------- of layers

    def run_lora_a_sgemm(
        self, x: Tensor, weights: Tensor, pruned_batch_info: BatchInfo | None = None, stack_num: int = 1, *_: Any,
        **__: Any,
    ) -> Tensor:  # fmt: skip
        """s [rows, stack_num * max_rank], without the factor."""
        return shrink(x, weights, self._step(pruned_batch_info), stack_num)

    def run_lora_b_sgemm(
        self, x: Tensor, weights: Tensor, base_output: Tensor | None = None,
        pruned_batch_info: BatchInfo | None = None, *_: Any, **__: Any,
    ) -> Tensor:  # fmt: skip
        """``base_output`` with the branch added in place; without one, the branch. x is s."""
        return expand_(_output(base_output, x, weights), x, weights, self._step(pruned_batch_info))

    def run_qkv_lora(
        self, x: Tensor, qkv_lora_a: Tensor, qkv_lora_b: Tensor, output_offset: Tensor | None = None,
        max_qkv_out_dim: int | None = None, base_output: Tensor | None = None, n_slices: int = 3, *_: Any,
        output_offset_cpu: Tensor | None = None, **__: Any,
    ) -> Tensor:  # fmt: skip
        """The whole branch of a layer of ``n_slices``, whose columns ``output_offset_cpu`` says.

        Raises:
            ValueError: that is missing, not on the CPU (reading it would wait for the device), or of other slices.
        """
        if output_offset_cpu is None or not output_offset_cpu.is_cpu or len(output_offset_cpu) != n_slices + 1:
            raise ValueError(f"lora_kernels: run_qkv_lora needs output_offset_cpu, {n_slices + 1} numbers on the CPU")
        y = _output(base_output, x, qkv_lora_b)
        return self._add(y, x, qkv_lora_a, qkv_lora_b, output_offset_cpu.tolist())

    def run_gate_up_lora(
        self, x: Tensor, gate_up_lora_a: Tensor, gate_up_lora_b: Tensor, base_output: Tensor | None = None, *_: Any,
        **__: Any,
    ) -> Tensor:  # fmt: skip
        """The whole branch of a layer of two slices of one width."""
        columns = gate_up_lora_b.shape[-2]
        y = _output(base_output, x, gate_up_lora_b)
        return self._add(y, x, gate_up_lora_a, gate_up_lora_b, (0, columns // 2, columns))

    def forward_with_base(
        self, layer: Any, x: Tensor, base_fn: Callable[[], Tensor], lora_a: Tensor, lora_b: Tensor,
        output_offset: Tensor | None, offsets: Sequence[int], *, all_reduce: Callable[[Tensor], Tensor] | None = None,
        kind: Any = "linear", pruned_batch_info: BatchInfo | None = None,
    ) -> Tensor:  # fmt: skip
        """The base and the branch. A row-parallel layer's are added before ``all_reduce``, which is then one."""
        if all_reduce is None:
            return layer.apply_lora(base_fn(), x)
        return all_reduce(add_branch_(base_fn(), x, lora_a, lora_b, self._step(pruned_batch_info), offsets))

    def run_lora_a_embedding(
        self, input_ids: Tensor, weights: Tensor, vocab_size: int, extra_embeddings: Tensor | None = None, *_: Any,
        **__: Any,
    ) -> Tensor:  # fmt: skip
        """s [tokens, max_rank]: the columns of lora_A [slots, max_rank, vocab_size] that the tokens are. What stands
        beyond an adapter's rank, or in the row of no adapter, is not read by what comes next.

        Raises:
            NotImplementedError: with ``extra_embeddings``, which SGLang's own layers do not serve either.
        """
        if extra_embeddings is not None:
            raise NotImplementedError("lora_kernels: tokens that an adapter adds are not served in SGLang")
        step = self._step(None)
        ids, _order = step.of(input_ids.unsqueeze(-1))
        tokens = input_ids.reshape(-1).clamp(max=vocab_size - 1)
        return weights[ids.clamp(min=0).long(), :, tokens]

    def _add(self, y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, offsets: Sequence[int]) -> Tensor:
        return add_branch_(y, x, lora_A, lora_B, self._step(None), offsets)

    def _step(self, pruned: BatchInfo | None) -> ServingStep:
        info = self.batch_info if pruned is None else pruned
        if info is None:
            raise RuntimeError("lora_kernels: a layer was called before prepare_lora_batch")
        return info.step


def _output(base_output: Tensor | None, x: Tensor, lora_B: Tensor) -> Tensor:
    return x.new_zeros((*x.shape[:-1], lora_B.shape[-2])) if base_output is None else base_output
