"""The yardstick of every numerical test.

Against a float64 reference, our error (largest element) is at most twice that of the unfused torch code in the same
dtype, plus four ulp of the largest reference element.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def max_error(actual: Tensor, exact: Tensor) -> float:
    assert actual.shape == exact.shape
    assert not actual.isnan().any(), "NaN where the reference is finite"
    return (actual.double() - exact.double()).abs().max().item() if exact.numel() else 0.0


def assert_as_accurate(
    ours: Tensor, unfused: Tensor, exact: Tensor, name: str = "result", terms: Tensor | None = None
) -> None:
    """``ours`` is as close to ``exact`` (float64) as the bound allows; ``unfused`` is torch's own result.

    ``terms`` are the sums of the magnitudes of what each element is a sum of. An ulp is then one of theirs: where there
    are a few elements, and the terms nearly cancel, rounding one of them is more than an ulp of what remains.
    """
    if exact.numel() == 0:
        assert ours.shape == exact.shape
        return
    ulp = torch.finfo(ours.dtype).eps * (exact if terms is None else terms).abs().max().item()
    allowed = 2 * max_error(unfused, exact) + 4 * ulp
    error = max_error(ours, exact)
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


class ResultSizes(TorchDispatchMode):
    """Collects in ``sizes`` how many elements every result has that does not share the memory of ``weight``."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self._weight = weight.data_ptr()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() != self._weight:
            self.sizes.append(result.numel())
        return result
