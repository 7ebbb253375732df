"""A stand-in for the parts of SGLang that a LoRA backend meets, with its names and signatures and no code of its own.

Written from what ``sglang.srt.lora`` declares (Apache-2.0): the base class of backends and its registry, how long the
sequences of a batch are, which rows reach the head, and the layers that call a backend. The layers stand on plain
products, and a "device" of tensor parallelism is one of several objects.
"""

from __future__ import annotations

import enum
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor


class ForwardMode(enum.Enum):
    EXTEND = 1
    DECODE = 2
    TARGET_VERIFY = 5

    def is_decode(self) -> bool:
        return self is ForwardMode.DECODE

    def is_target_verify(self) -> bool:
        return self is ForwardMode.TARGET_VERIFY


@dataclass
class SpecInfo:
    draft_token_num: int


@dataclass
class ForwardBatch:
    forward_mode: ForwardMode
    batch_size: int
    extend_seq_lens_cpu: list[int] = field(default_factory=list)
    extend_logprob_start_lens_cpu: list[int] = field(default_factory=list)
    return_logprob: bool = False
    spec_info: SpecInfo | None = None

    @property
    def extend_seq_lens(self) -> Tensor:
        return torch.tensor(self.extend_seq_lens_cpu, dtype=torch.int32)


class BaseLoRABackend:
    supports_prefill_cuda_graph = False
    chunk_of_logits: int | None = None
    """SGLang has this in an environment variable."""

    def __init__(self, max_loras_per_batch: int, device: torch.device):
        self.max_loras_per_batch, self.device = max_loras_per_batch, device
        self.batch_info = self.lm_head_batch_info = self.lm_head_pass_batch_infos = self._lm_head_pass_idx = None
        self._is_moe_lora = False

    @property
    def is_moe_lora(self) -> bool:
        return self._is_moe_lora

    @is_moe_lora.setter
    def is_moe_lora(self, value: bool):
        self._is_moe_lora = value

    def reset_batch_state(self):
        self.batch_info = self.lm_head_batch_info = self.lm_head_pass_batch_infos = self._lm_head_pass_idx = None

    def _get_lm_head_pass_segments(self, weight_indices: list[int], pruned_lens: list[int]):
        if self.chunk_of_logits is None or sum(pruned_lens) <= self.chunk_of_logits:
            return None
        owners = [slot for slot, rows in zip(weight_indices, pruned_lens) for _ in range(rows)]
        parts = [owners[i : i + self.chunk_of_logits] for i in range(0, len(owners), self.chunk_of_logits)]
        return [(part, [1] * len(part)) for part in parts]

    def forward_with_base(
        self, layer, x: Tensor, base_fn, lora_a, lora_b, output_offset, offsets, *, all_reduce=None, kind="linear",
        pruned_batch_info=None,
    ) -> Tensor:  # fmt: skip
        raise NotImplementedError

    def run_lora_a_embedding(
        self, input_ids: Tensor, weights: Tensor, vocab_size: int, extra_embeddings: Tensor = None, *args, **kwargs
    ) -> Tensor: ...

    def run_lora_a_sgemm(self, x: Tensor, weights: Tensor, *args, **kwargs) -> Tensor: ...

    def run_lora_b_sgemm(self, x: Tensor, weights: Tensor, *args, **kwargs) -> Tensor: ...

    def run_qkv_lora(self, x: Tensor, qkv_lora_a: Tensor, qkv_lora_b: Tensor, *args, **kwargs) -> Tensor: ...

    def run_gate_up_lora(
        self, x: Tensor, gate_up_lora_a: Tensor, gate_up_lora_b: Tensor, *args, **kwargs
    ) -> Tensor: ...

    def init_cuda_graph_batch_info(self, max_bs_in_cuda_graph: int, num_tokens_per_bs: int): ...

    def init_decode_cuda_graph_batch_info(self, max_bs_in_cuda_graph: int, num_tokens_per_req: int): ...

    def prepare_lora_batch(
        self, forward_batch: ForwardBatch, weight_indices: list[int], lora_ranks: list[int], scalings: list[float],
        use_decode_cuda_graph: bool, use_prefill_cuda_graph: bool = False,
    ): ...  # fmt: skip


LORA_SUPPORTED_BACKENDS: dict[str, object] = {}
LORA_BACKEND_CHOICES = ["triton", "csgmv"]
"""What the command line lets through."""


def register_lora_backend(name):
    def decorator(make):
        LORA_SUPPORTED_BACKENDS[name] = make
        return make

    return decorator


def get_backend_from_name(name: str) -> type:
    return LORA_SUPPORTED_BACKENDS[name]()


def generate_sequence_lengths(forward_batch: ForwardBatch, device: torch.device | None = None) -> Tensor:
    count = forward_batch.batch_size
    if forward_batch.forward_mode.is_decode():
        return torch.ones(count, dtype=torch.int32, device=device)
    if forward_batch.forward_mode.is_target_verify():
        return torch.full((count,), forward_batch.spec_info.draft_token_num, dtype=torch.int32, device=device)
    return forward_batch.extend_seq_lens.to(device)


def get_lm_head_pruned_lens(forward_batch: ForwardBatch) -> list[int] | None:
    if forward_batch.forward_mode is not ForwardMode.EXTEND:
        return None
    if not forward_batch.return_logprob:
        return [1] * forward_batch.batch_size
    starts = forward_batch.extend_logprob_start_lens_cpu
    return [max(rows - start, 1) for rows, start in zip(forward_batch.extend_seq_lens_cpu, starts)]


@contextmanager
def sglang_installed() -> Iterator[None]:
    """``import sglang`` finds this, without the backends that others have registered."""
    parts = {
        "sglang.srt.lora.backend.base_backend": [BaseLoRABackend],
        "sglang.srt.lora.backend.lora_registry": [register_lora_backend, get_backend_from_name],
        "sglang.srt.lora.utils": [generate_sequence_lengths, get_lm_head_pruned_lens],
        "sglang.srt.model_executor.forward_batch_info": [ForwardBatch, ForwardMode],
    }
    parts["sglang.srt.server_args"] = []
    modules: dict[str, types.ModuleType] = {}
    for name, contents in parts.items():
        pieces = name.split(".")
        for end in range(1, len(pieces) + 1):
            modules.setdefault(".".join(pieces[:end]), types.ModuleType(".".join(pieces[:end]))).__path__ = []
        for content in contents:
            setattr(modules[name], content.__name__, content)
    LORA_SUPPORTED_BACKENDS.clear()
    modules["sglang.srt.server_args"].LORA_BACKEND_CHOICES = LORA_BACKEND_CHOICES[:]
    modules["sglang.srt"].server_args = modules["sglang.srt.server_args"]
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


# ------------------------------------------------------------------------------------------------------ layers


class Layer:
    """A layer with LoRA over a base product, of whose columns the first ones have adapters.

    Args:
        weight: [columns, in_features].
        offsets: where the columns of each slice begin and the last ones end.
    """

    def __init__(self, backend, weight: Tensor, A_buffer: Tensor, B_buffer: Tensor, offsets: Sequence[int]) -> None:
        self.lora_backend, self.weight, self.A_buffer, self.B_buffer = backend, weight, A_buffer, B_buffer
        self.offsets = tuple(offsets)
        self.output_offset = self.output_offset_cpu = torch.tensor(offsets, dtype=torch.int32)
        widths = self.output_offset.diff()
        self.n_slices, self.max_out_dim = len(widths), int(widths.max())
        self.are_equal = self.n_slices == 2 and len(widths.unique()) == 1

    def apply_lora(self, base_output: Tensor, x: Tensor) -> Tensor:
        where = {"output_offset": self.output_offset, "output_offset_cpu": self.output_offset_cpu}
        if self.n_slices == 1:
            s = self.lora_backend.run_lora_a_sgemm(x, self.A_buffer)
            return self.lora_backend.run_lora_b_sgemm(x=s, weights=self.B_buffer, base_output=base_output, **where)
        if self.are_equal:
            return self.lora_backend.run_gate_up_lora(
                x=x, gate_up_lora_a=self.A_buffer, gate_up_lora_b=self.B_buffer, base_output=base_output, **where
            )
        return self.lora_backend.run_qkv_lora(
            x=x, qkv_lora_a=self.A_buffer, qkv_lora_b=self.B_buffer, base_output=base_output,
            max_qkv_out_dim=self.max_out_dim, n_slices=self.n_slices, **where,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        base_output = x @ self.weight.t()
        return base_output if self.lora_backend.batch_info is None else self.apply_lora(base_output, x)

    def forward_with_base(self, x: Tensor, all_reduce=None) -> Tensor:
        """As newer versions have it."""
        return self.lora_backend.forward_with_base(
            self, x, lambda: x @ self.weight.t(), self.A_buffer, self.B_buffer, self.output_offset, self.offsets,
            all_reduce=all_reduce,
        )  # fmt: skip


class Head(Layer):
    """Gets the rows that a batch prunes its states to, in passes where it has them."""

    def apply_lora(self, base_output: Tensor, x: Tensor) -> Tensor:
        backend, info = self.lora_backend, self.lora_backend.lm_head_batch_info
        if backend._lm_head_pass_idx is not None:
            info = backend.lm_head_pass_batch_infos[backend._lm_head_pass_idx]
        if info is not None:
            assert not info.use_cuda_graph
            assert info.expected_tokens == len(x)
        s = backend.run_lora_a_sgemm(x, self.A_buffer, pruned_batch_info=info)
        return backend.run_lora_b_sgemm(
            x=s, weights=self.B_buffer, output_offset=self.output_offset, output_offset_cpu=self.output_offset_cpu,
            base_output=base_output, pruned_batch_info=info,
        )  # fmt: skip


class Embedding(Layer):
    """``weight`` is [vocabulary, features]."""

    def forward(self, ids: Tensor) -> Tensor:
        s = self.lora_backend.run_lora_a_embedding(
            input_ids=ids, weights=self.A_buffer, vocab_size=len(self.weight), extra_embeddings=None
        )
        return self.lora_backend.run_lora_b_sgemm(
            x=s, weights=self.B_buffer, output_offset=self.output_offset, output_offset_cpu=self.output_offset_cpu,
            base_output=self.weight[ids],
        )  # fmt: skip
