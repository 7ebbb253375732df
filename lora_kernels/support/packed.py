"""What all backends agree on about quantised weights."""

from __future__ import annotations

from ..reasons import Reason
from ..spec import Verdict

LAYOUTS = ("codes4", "codes4_low", "int8", "e4m3")
"""That kernels decode, on every backend."""
NO_KERNEL = Verdict(None, Reason.TORCH_DECODE)
"""Of the others, asked for a kernel."""
TORCH_DECODED = Verdict("dequantize + product", "plain torch code decodes the weight; what multiplies by it goes on")
"""Of the others, asked for a product."""
