"""Layers as GPTQModel and AutoAWQ keep them, without these: numbers, zero points, scales and groups, bit by bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def packed(numbers: Tensor, bits: int, dim: int) -> Tensor:
    """int32 words whose bits along ``dim`` are those of the numbers, the lowest first; filled up with zeros."""
    rows = numbers.movedim(dim, 0).reshape(numbers.shape[dim], -1)
    stream = torch.stack([rows >> bit & 1 for bit in range(bits)], 1).flatten(0, 1)
    stream = nn.functional.pad(stream, (0, 0, 0, -len(stream) % 32)).unflatten(0, (-1, 32)).to(torch.int64)
    words = (stream << torch.arange(32)[:, None]).sum(1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).movedim(0, dim).contiguous()


def awq_packed(numbers: Tensor) -> Tensor:
    """The same along rows, of eight numbers in AWQ's order."""
    return packed(numbers.unflatten(1, (-1, 8))[..., list(AWQ_ORDER)].flatten(1), 4, 1)


class Stub(nn.Module):
    """A layer that multiplies by ``expected`` [N, K], which is the definition, in x's dtype; it has the buffers of
    ``method``, "gptq" or "awq".

    Args:
        version: of GPTQ's zeros; 1 keeps them less one.
        shuffled: groups are of columns here and there (desc_act).
    """

    def __init__(
        self, n: int, k: int, method: str = "gptq", bits: int = 4, group: int = 32, version: int = 1,
        shuffled: bool = False, bias: bool = True, dtype: torch.dtype = torch.float16,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features, self.out_features, self.bits = k, n, bits
        groups, most = -(-k // group), 2**bits
        numbers = torch.randint(most, (k, n))
        zeros = torch.randint(most, (groups, n))
        if method == "gptq" and version == 1:
            zeros[0, :2] = torch.tensor([0, most - 1])  # what one less, and one more, would not fit into the bits
        scales = ((torch.rand(groups, n) + 0.5) * k**-0.5 / most).to(dtype)
        of_column = torch.arange(k) // group
        if shuffled:
            of_column = of_column[torch.randperm(k)]
        difference = numbers - zeros[of_column]
        # Exact in float64; the libraries' product in the dtype of the scales rounds it once.
        self.expected = (difference.double() * scales[of_column].double()).to(dtype).t().contiguous()
        self.register_buffer("scales", scales)
        if method == "gptq":
            kept = (zeros - 1) % most if version == 1 else zeros
            self.register_buffer("qweight", packed(numbers, bits, 0))
            self.register_buffer("qzeros", packed(kept, bits, 1))
            self.register_buffer("g_idx", of_column.to(torch.int32))
            self.qzero_format = lambda: version
        else:
            self.register_buffer("qweight", awq_packed(numbers))
            self.register_buffer("qzeros", awq_packed(zeros))
        if bias:
            self.register_buffer("bias", torch.randn(n).to(dtype))
        else:
            self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.expected.to(x.dtype).t()
        return y if self.bias is None else y + self.bias.to(y.dtype)
