"""What PEFT's layers hold, read without importing PEFT, and which of their calls are exactly one op: the operands of
that op, or the reason where there is none.

Asked on every call, because everything here can change between two calls: adapters are switched, hooks come and go,
a model is sharded or offloaded. So the checks are plain dictionary reads, which torch.compile turns into guards.
``__dict__``, ``_modules`` and ``_parameters`` are read directly: ``nn.Module.__getattr__`` costs ten times as much.
"""

from .adapters import (
    Branch,
    active_adapters,
    branch_operands,
    is_alora,
    usual_scaling,
    why_not_called_as_is,
)
from .calls import call_reason, product_dtype
from .embedding import EmbeddingOperands, embedding_operands, ids_reason
from .experts import ExpertsBranch, experts_branch, is_experts, projections, why_not_experts
from .linear import Operands, SideBySide, adapter_operands, base_operands, glance, operands, plain_adapter
from .sharded import Shards, sharded_operands
from .zero3 import gather_parts, has_gathered_parts, reader_under_zero3

__all__ = [
    "Branch", "EmbeddingOperands", "ExpertsBranch", "Operands", "Shards", "SideBySide", "active_adapters",
    "adapter_operands", "base_operands", "branch_operands", "call_reason", "embedding_operands", "experts_branch",
    "gather_parts", "glance", "has_gathered_parts", "ids_reason", "is_alora", "is_experts", "operands", "plain_adapter",
    "product_dtype", "projections", "reader_under_zero3", "sharded_operands", "usual_scaling", "why_not_called_as_is",
    "why_not_experts",
]  # fmt: skip
