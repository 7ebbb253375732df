"""What the compiler makes of the main loops: LoRA costs the loop of a large tile nothing beside the frozen product's.

The frozen product's kernel serves no op and is not in the extension: it is compiled here, as setup.py compiles the
others.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import emulator
import pytest
import sass
import setup_script

from lora_kernels import _native

ARCHS = ("sm_80", "sm_90")
NAMES = ("HMMA", "LDSM", "LDGSTS", "BAR.SYNC")
"""As Loop has them, from the second on."""


class Loop(NamedTuple):
    """Instructions of one iteration."""

    total: int
    products: int
    fragment_loads: int
    copies: int
    barriers: int


pytestmark = [
    pytest.mark.skipif(_native.cuda is None, reason=f"lora_kernels._cuda: {_native.cuda_error}"),
    pytest.mark.skipif(setup_script.load().CUDA_HOME is None, reason=setup_script.load().CUDA_REASON),
    pytest.mark.skipif(sass.disassembler() is None, reason="cuobjdump is not installed"),
]


def loops(module: Path, kernel: str, arch: str) -> list[Loop]:
    """Every loop of a kernel."""
    bodies = sass.loops(sass.code(module, arch, kernel)[kernel])
    return [Loop(len(body), *(sum(name in text for text in body) for name in NAMES)) for body in bodies]


def main_loop(found: list[Loop]) -> Loop:
    """The loop over the depth of the base product: it copies, and has the most products from barrier to barrier."""
    return max(
        (loop for loop in found if loop.copies and loop.barriers), key=lambda loop: loop.products / loop.barriers
    )


def lora_loop(arch: str, *parts: str) -> Loop:
    """Of the kernel in the extension, for rows of one group, whose name has these parts."""
    parts = (*parts, "8OneGroup")
    (name,) = [name for name in _native.cuda.kernels() if all(part in name for part in parts)]
    return main_loop(loops(Path(_native.cuda.__file__), name, arch))


FROZEN = """
#include "kernels/frozen_linear.cuh"
namespace lk {{
using Frozen = FrozenLinear<LargeTile<{element}, kFewestWarpsN<{element}>>>;
template __global__ void lora_linear_kernel<Frozen>(const LoraLinearParams);
}}
"""


def compiled(text: str, arch: str, folder: Path) -> tuple[Path, list[str]]:
    """A module, and the names of its kernels."""
    source, module = folder / "frozen.cu", folder / "frozen.cubin"
    source.write_text(text)
    nvcc = setup_script.load().CUDA_HOME / "bin" / "nvcc"
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-arch={arch}", f"-I{emulator.CSRC}"]
    built = subprocess.run([nvcc, *flags, "-cubin", source, "-o", module], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    found = set(re.findall(rb"_ZN2lk\d+lora_linear\w*_kernelI\w+ParamsE", module.read_bytes()))
    return module, sorted(name.decode() for name in found)


def frozen_loop(arch: str, element: str, folder: Path) -> Loop:
    """Of the frozen product's large tile."""
    module, (name,) = compiled(FROZEN.format(element=element), arch, folder)
    return main_loop(loops(module, name, arch))


LARGE_4_WARPS, LARGE_8_WARPS = "ELi128ELi128ELi32ELi2ELi2E", "ELi128ELi128ELi32ELi2ELi4E"


@pytest.mark.parametrize(
    ("element", "tile", "expected"),
    [
        ("8BFloat16", LARGE_4_WARPS, (64, 16, 8, 1)),
        ("7Float16", LARGE_4_WARPS, (64, 16, 8, 1)),
        ("13TensorFloat32", "ELi128ELi128ELi16ELi2ELi4E", (32, 12, 4, 1)),
    ],
)
@pytest.mark.parametrize("arch", ARCHS)
def test_the_forward_has_the_loop_of_the_frozen_product(arch, element, tile, expected, tmp_path):
    frozen = frozen_loop(arch, element.lstrip("0123456789"), tmp_path)
    ours = lora_loop(arch, "10LoraLinearI", element, tile, "Li16ELNS_6AccessE0ENS_12ForwardRolesELb0E")
    assert (frozen.products, frozen.fragment_loads, frozen.copies, frozen.barriers) == expected
    assert ours[1:] == frozen[1:]
    assert ours.total <= frozen.total + 1


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("rank_tile", [16, 64])
def test_the_gradient_of_x_has_that_loop_with_w_transposed(arch, rank_tile):
    # The forward with as many warps; its base product is the frozen one.
    large = ("10LoraLinearI", "8BFloat16", LARGE_8_WARPS)
    plain = lora_loop(arch, *large, "Li64ELNS_6AccessE0ENS_12ForwardRolesELb0E")
    ours = lora_loop(arch, *large, f"Li{rank_tile}ELNS_6AccessE0ENS_10GradXRolesELb0E")
    assert (plain.products, plain.fragment_loads, plain.copies, plain.barriers) == (32, 12, 4, 1)
    assert ours[1:] == plain[1:]
    assert ours.total <= plain.total + 7


FROZEN_WGMMA = """
#include "kernels/frozen_linear_wgmma.cuh"
#include "kernels/lora_linear_wgmma_variants.cuh"
namespace lk {{
template __global__ void lora_linear_wgmma_kernel<FrozenLinearWgmma<WgmmaLoop<{element}, {columns}, {turned}>>>(
    const __grid_constant__ LoraWgmmaParams);
}}
"""


def wgmma_loop(code: dict[str, list[tuple[int, str]]], name: str, columns: int) -> list[str]:
    """Instructions of one iteration over the depth."""
    holders = [body for body in sass.loops(code[name]) if any(f"HGMMA.64x{columns}x16" in text for text in body)]
    return min(holders, key=len)  # the others hold it, too: that over the tiles


def wgmma_kernel(element: str, columns: int, rank_tile: int, role: str = "forward", cluster: int = 1) -> str:
    """Its name; without kernels for sm_90a, the test is skipped."""
    if "sm_90a" not in sass.architectures(Path(_native.cuda.__file__)):
        pytest.skip("the extension was built without sm_90a")
    parts = f"15LoraLinearWgmmaINS_{element}ELi{columns}ELi{rank_tile}ELb{int(role == 'dX')}ELi{cluster}E"
    (name,) = [name for name in _native.cuda.kernels() if parts in name]
    return name


def wgmma_code() -> dict[str, list[tuple[int, str]]]:
    """Of all kernels of wgmma: disassembled once."""
    of_wgmma = sorted(name for name in _native.cuda.kernels() if "15LoraLinearWgmmaI" in name)
    return sass.code(Path(_native.cuda.__file__), "sm_90a", *of_wgmma)


@pytest.mark.parametrize("element", ["8BFloat16", "7Float16"])
@pytest.mark.parametrize("columns", [256, 128])
@pytest.mark.parametrize("role", ["forward", "dX"])
def test_the_loop_of_wgmma_is_that_of_a_plain_product(element, columns, role, tmp_path):
    """Kills: anything of the branch, of dropout or of spilled registers within the loop."""
    names, code = [wgmma_kernel(element, columns, rank_tile, role) for rank_tile in (16, 48)], wgmma_code()
    source = FROZEN_WGMMA.format(
        element=element.lstrip("0123456789"), columns=columns, turned=str(role == "dX").lower()
    )
    module, (plain,) = compiled(source, "sm_90a", tmp_path)
    plain_loop = wgmma_loop(sass.code(module, "sm_90a", plain), plain, columns)
    for name in names:
        loop = wgmma_loop(code, name, columns)
        assert sum("HGMMA" in text for text in loop) == 4, name
        assert sum("SYNCS" in text for text in loop) == 2, f"{name}: a wait and an arrival"
        assert not [text for text in loop if re.search(r"\b(LD[LGS]|ST[LGS]|HMMA|BAR)\b", text)], name
        turned = sum("tnspB" in text for text in loop)
        assert turned == (4 if role == "dX" else 0), f"{name}: w as it lies in memory"
        assert not [text for _, text in code[name] if re.search(r"\b(LDL|STL)\b", text)], name
        assert len(loop) <= len(plain_loop) + 2, name


@pytest.mark.parametrize("element", ["8BFloat16", "7Float16"])
@pytest.mark.parametrize("rank_tile", [16, 48])
def test_the_loop_of_clusters_is_that_of_single_blocks(element, rank_tile):
    """Kills: a stage given back by two arrivals, or behind a fence that waits for the memory of the whole GPU."""
    names = [wgmma_kernel(element, 256, rank_tile, cluster=cluster) for cluster in (1, 2)]
    code = wgmma_code()
    single, clustered = (wgmma_loop(code, name, 256) for name in names)
    for opcode in ("HGMMA", "SYNCS", "BAR", "LD", "ST"):
        assert sum(opcode in text for text in clustered) == sum(opcode in text for text in single), opcode
    assert not [text for text in clustered if re.search("MEMBAR|ERRBAR", text)]
    assert len(clustered) <= len(single) + 2
    multicast = [text for _, text in code[names[1]] if "UTMALDG" in text and "MULTICAST" in text]
    assert len(multicast) == 2, "w, and b"
    assert not [text for _, text in code[names[1]] if re.search(r"\b(LDL|STL)\b", text)]
