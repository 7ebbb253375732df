"""Versions and machines that are known to go wrong together: what happens, who is concerned, and the way round it.

Besides versions older than what the package was made for, a row is here because somebody saw it happen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

OLDEST = {
    "torch": "2.10",
    "peft": "0.18",
    "transformers": "5",
    "triton": "3.6",
    "bitsandbytes": "0.46",
    "torchao": "0.15",
}
"""The oldest versions that the package is made for, as in pyproject.toml."""


@dataclass(frozen=True)
class Installation:
    """What a conflict may depend on."""

    versions: Mapping[str, str | None]
    """Of packages, by name; None where one is not installed."""
    cpu_flags: frozenset[str] = field(default_factory=frozenset)
    """As Linux names what the CPU can do."""
    has_gpu: bool = False

    def has(self, flag: str) -> bool:
        """Whether the CPU has it."""
        return flag in self.cpu_flags

    def at_least(self, package: str, version: str) -> bool:
        """Whether a package is installed in this version or a later one."""
        found = self.versions.get(package)
        return found is not None and numbers(found) >= numbers(version)

    def below(self, package: str, version: str) -> bool:
        """Whether a package is installed in a version before this one."""
        found = self.versions.get(package)
        return found is not None and numbers(found) < numbers(version)


def numbers(version: str) -> tuple[int, ...]:
    """``version`` to compare by: "2.14.1+cu130" is (2, 14, 1), and "5" as much as "5.0"."""
    parts = [int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3]]
    return tuple(parts + [0] * (3 - len(parts)))


@dataclass(frozen=True)
class Conflict:
    """A row of the table.

    Attributes:
        what: the versions or the machine, and what goes wrong there.
        remedy: the way round it.
        proof: the command that shows whether it does.
        applies: whether it goes wrong in this installation.
        concerns: the uses in which it does; "" for every use of an installation, which ``doctor`` then calls broken.
    """

    what: str
    remedy: str
    proof: str
    applies: Callable[[Installation], bool]
    concerns: str = ""


_VERIFY = "lora-kernels verify --model DIR --adapter DIR"


def _too_old(package: str, oldest: str) -> Conflict:
    return Conflict(
        what=f"{package} older than {oldest}: the package was made for later ones",
        remedy=f"pip install '{package}>={oldest}'",
        proof="lora-kernels check-gpu" if package == "triton" else _VERIFY,
        applies=lambda here: here.below(package, oldest) and (package != "triton" or here.has_gpu),
        concerns={"bitsandbytes": "bases that it has packed", "torchao": "bases that it has packed"}.get(package, ""),
    )


CONFLICTS = (
    *(_too_old(package, oldest) for package, oldest in OLDEST.items()),
    Conflict(
        what="PEFT 0.21.2 under transformers 5.24 does not find the cache when it generates: prompts are put in again "
        "at every step, prefixes are dropped; a patched model does the same",
        remedy='lk.patch(model, left_padding="fixed"), for prompts',
        proof="pytest tests/test_peft_prompts.py",
        applies=lambda here: here.at_least("transformers", "5.24") and here.below("peft", "0.21.3"),
        concerns="generate with prompts or prefixes",
    ),
    Conflict(
        what="PEFT 0.21.2 makes a row-parallel lora_A whose in_features is its shard's, which transformers 5.24 takes "
        "for the whole: PEFT's own forward raises in training",
        remedy="lk.patch(model): what it fuses does not read it; or set lora_A.in_features to lora_A.weight.shape[1]",
        proof="pytest tests/test_tensor_parallel.py",
        applies=lambda here: here.at_least("transformers", "5.24") and here.below("peft", "0.21.3"),
        concerns="tensor parallelism by a plan of transformers",
    ),
    Conflict(
        what="bitsandbytes on a CPU with AVX512_BF16 repacks 4-bit weights in eval mode, with a loss; such layers are "
        "left to it",
        remedy="patch before the first call in eval mode; for inference lk.unpatch, as its kernel may be faster",
        proof=_VERIFY,
        applies=lambda here: here.at_least("bitsandbytes", "0") and here.has("avx512_bf16"),
        concerns="4-bit bases in eval mode on the CPU",
    ),
    Conflict(
        what="torch 2.14 on a CPU with AMX reads beside strided rows in a product of bfloat16: NaN there gets into y",
        remedy="x.contiguous(), where x is a part of a wider matrix",
        proof="python -c \"import torch; w = torch.full((105, 168), float('nan')).bfloat16(); w[:, 8:144] = 1; "
        'print((w[:, 8:144] @ torch.ones(136, 72).bfloat16()).isnan().any())"',
        applies=lambda here: here.at_least("torch", "2.14") and here.below("torch", "2.15") and here.has("amx_bf16"),
        concerns="bfloat16 x in strided rows, on the CPU",
    ),
    Conflict(
        what="Triton 3.6 with numpy 2.4: its interpreter fails",
        remedy="pip install 'numpy<2.4'",
        proof="pytest tests/test_triton_lora_linear.py",
        applies=lambda here: here.below("triton", "3.7") and here.at_least("numpy", "2.4"),
        concerns="TRITON_INTERPRET=1",
    ),
)
