"""csrc/ptx/ beside its twins in the emulator: the same functions, and asm statements that mean what the twin does.

Nothing but a GPU runs csrc/ptx/. What the emulated tests prove of a kernel holds on one if every function of the
machine does what its twin does.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
SITE = re.compile(r",?\s*emu::Site site = emu::Site::current\(\)")
QUALIFIERS = re.compile(r"\b(LK_DEVICE|inline|static)\b|\[\[noreturn\]\]")

pytestmark = pytest.mark.skipif(not CSRC.is_dir(), reason="the sources are not here: an installed package")


class Function(NamedTuple):
    """A function of a header, by its scope and name."""

    signature: str
    is_template: bool
    body: str


def block(text: str, begin: int) -> tuple[str, int]:
    """What is in the braces that open at ``begin``, and where it ends."""
    depth = 0
    for end in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[begin + 1 : end], end + 1
    raise AssertionError("braces do not match")


def parse(text: str, scope: str = "") -> dict[str, list[Function]]:
    """The public functions of a header by name, methods as ``Class::name``."""
    found: dict[str, list[Function]] = {}
    declaration = re.compile(
        r"struct\s+(?:alignas\(\d+\)\s+)?(?P<struct>\w+)\s*(?=\{)|private:|"
        r"(?P<template>template\s*<[^>]*>\s*)?(?P<before>(?:[\w\[\]&*:]+\s+)+\*?)(?P<name>\w+)(?P<parameters>\([^{};]*\))\s*(?=\{)"
    )
    at = 0
    while match := declaration.search(text, at):
        if match[0] == "private:":
            break
        body, at = block(text, match.end())
        if match["struct"]:
            for name, functions in parse(body, f"{match['struct']}::").items():
                found.setdefault(name, []).extend(functions)
        else:
            template = match["template"] or ""
            signature = f"{template} {QUALIFIERS.sub('', match['before'])} {SITE.sub('', match['parameters'])}"
            found.setdefault(scope + match["name"], []).append(
                Function(" ".join(signature.split()), bool(template), " ".join(body.split()))
            )
    return found


HEADERS = ("core.h", "cluster.h", "mbarrier.h", "tma.h", "wgmma.h")


def text_of(folder: str, name: str) -> str:
    """A header from its namespace on, but for what macros make, which has a test of its own."""
    text = re.sub(r"//.*", "", (CSRC / folder / "ptx" / name).read_text())
    text = re.sub(r"#define(?:.*\\\n)*.*\n", "", text[text.index("namespace lk {") + len("namespace lk {") :])
    return re.sub(r"template <class Element>\s+struct Warpgroup\b.*", "", text, flags=re.DOTALL)


def header(folder: str) -> dict[str, list[Function]]:
    found: dict[str, list[Function]] = {}
    for name in HEADERS:
        found |= parse(text_of(folder, name))
    return found


PTX, TWIN = (header(folder) if CSRC.is_dir() else {} for folder in (".", "emu"))


def test_both_have_the_same_functions():
    assert len(PTX) >= 30
    assert PTX.keys() == TWIN.keys()


@pytest.mark.parametrize("name", sorted(PTX))
def test_both_have_the_same_signatures(name):
    signatures = [{f.signature for f in side[name]} for side in (PTX, TWIN)]
    # The twin's template may stand for what is written in PTX for one type.
    if any(f.is_template for f in TWIN[name]):
        signatures = [{f.signature for f in side[name] if f.is_template} for side in (PTX, TWIN)]
    assert signatures[0] == signatures[1]


def test_both_have_the_same_structs_and_constants():
    def stated(folder: str) -> list[str]:
        text = "".join(text_of(folder, name) for name in HEADERS)
        return re.findall(r"struct alignas.*?};|constexpr .*?;|using \w+ = .*?;", text, re.DOTALL)

    assert len(stated(".")) >= 6
    assert stated(".") == stated("emu")


def statement(function: Function) -> tuple[str, str]:
    """The PTX of a function with its operands' names in place, and the clobbers."""
    match = re.search(r"asm (?:volatile )?\(|asm(?: volatile)?\(", function.body)
    assert match, "no asm"
    depth, end = 1, match.end()
    while depth:
        depth += {"(": 1, ")": -1}.get(function.body[end], 0)
        end += 1
    inner = function.body[match.end() : end - 1]
    template, *rest = re.split(r"\s*:\s*(?=(?:[^\"]*\"[^\"]*\")*[^\"]*$)", inner)
    text = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', template)).replace("\\n", "")
    lists = [re.findall(r'"([^"]+)"(?:\(((?:[^()]|\([^()]*\))*)\))?', part) for part in rest]
    operands = [name.strip() for part in lists[:2] for _, name in part]
    clobbers = lists[2][0][0] if len(lists) > 2 and lists[2] else ""
    return re.sub(r"%(\d)", lambda m: operands[int(m[1])], text), clobbers


def ptx(name: str) -> set[str]:
    return {statement(f)[0] for f in PTX[name] if "asm" in f.body}


MMA = "{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}, {d[0], d[1], d[2], d[3]};"
LDMATRIX = "ldmatrix.sync.aligned.m8n8.x4{}.shared.b16 {{r[0], r[1], r[2], r[3]}}, [row_address];"
HALVES = "{{.reg .b16 l, h; mov.b32 {{l, h}}, packed; cvt.f32.f16 f, {};}}"
MEANINGS = {
    # The result first; of two that are packed, the upper half before the lower; `low` is the twin's lower half.
    "BFloat16::pack": "cvt.rn.bf16x2.f32 packed, high, low;",
    "Float16::pack": "cvt.rn.f16x2.f32 packed, high, low;",
    "Float16::low": HALVES.format("l"),  # a vector's first element is the lower half
    "Float16::high": HALVES.format("h"),
    "TensorFloat32::round": "cvt.rna.tf32.f32 rounded, __uint_as_float(bits);",
    # d, a, b, c; fragments in the order of their registers.
    "BFloat16::multiply_add": f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {MMA}",
    "Float16::multiply_add": f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {MMA}",
    "TensorFloat32::multiply_add": f"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {MMA}",
    "load_matrix_x4": LDMATRIX.format(""),
    "load_matrix_x4_transposed": LDMATRIX.format(".trans"),
    "copy_async_16": "cp.async.cg.shared.global [address], [source], 16, bytes;",
    "copy_async_8": "cp.async.ca.shared.global [address], [source], 8, bytes;",
    "copy_async_commit": "cp.async.commit_group;",
    "copy_async_wait": "cp.async.wait_group kPending;",
    "load_shared_16": "ld.shared.v4.b32 {v.word[0], v.word[1], v.word[2], v.word[3]}, [address];",
    "load_shared_8": "ld.shared.b64 v, [address];",
    "load_shared_4": "ld.shared.b32 v, [address];",
    "store_shared_16": "st.shared.v4.b32 [address], {v.word[0], v.word[1], v.word[2], v.word[3]};",
    "store_shared_8": "st.shared.v2.f32 [address], {v.x, v.y};",
    "store_shared_4": "st.shared.b32 [address], v;",
    "store_global": (
        "st.global.v2.f32 [p], {value.x, value.y};",
        "st.global.v4.b32 [p], {value.word[0], value.word[1], value.word[2], value.word[3]};",
    ),
    # At the device's scope: the blocks of a launch run on all its SMs.
    "atomic_add": "atom.relaxed.gpu.global.add.u32 old, [p], value;",
    "atomic_add_acquire_release": "atom.acq_rel.gpu.global.add.u32 old, [p], value;",
    "store_release": "st.release.gpu.global.u32 [p], value;",
    "load_acquire": "ld.acquire.gpu.global.u32 v, [p];",
    "permute_bytes": "prmt.b32 permuted, low, high, selector;",
    "in_register": "add.f32 same, f, 0f80000000;",
    # sm_90: barriers of this block alone, and phases by parity.
    "barrier_init": "mbarrier.init.shared::cta.b64 [barrier], arrivals;",
    "barrier_init_done": "fence.mbarrier_init.release.cluster;",
    "barrier_arrive": "mbarrier.arrive.shared::cta.b64 _, [barrier];",
    "barrier_arrive_expecting": "mbarrier.arrive.expect_tx.shared::cta.b64 _, [barrier], bytes;",
    "barrier_wait": (
        "{.reg .pred p;wait_%=: mbarrier.try_wait.parity.shared::cta.b64 p, [barrier], parity; @!p bra wait_%=;}"
    ),
    "sync_named": "bar.sync barrier, threads;",
    # Between blocks of a cluster.
    "cluster_rank": "mov.u32 rank, %%cluster_ctarank;",
    "sync_cluster": "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;",
    "cluster_address": "mapa.shared::cluster.u32 mapped, address, rank;",
    "store_cluster_4": "st.shared::cluster.b32 [address], v;",
    "barrier_arrive_cluster": "mbarrier.arrive.shared::cluster.b64 _, [barrier];",
    "barrier_release_cluster": "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [barrier];",
    "barrier_wait_cluster": (
        "{.reg .pred p;wait_%=: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [barrier], parity;"
        " @!p bra wait_%=;}"
    ),
    "fence_proxy_async": "fence.proxy.async;",
    "fence_proxy_async_shared": "fence.proxy.async.shared::cta;",
    # The innermost coordinate first.
    "prefetch_map": "prefetch.tensormap [map];",
    "load_box": (
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[address], [map, {column, row}], [barrier];"
    ),
    "load_box_cluster": (
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[address], [map, {column, row}], [barrier], static_cast<uint16_t>(ranks);"
    ),
    "store_box": "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [map, {column, row}], [address];",
    "store_commit": "cp.async.bulk.commit_group;",
    "store_wait_read": "cp.async.bulk.wait_group.read kPending;",
    "release_registers": "setmaxnreg.dec.sync.aligned.u32 kRegisters;",
    "claim_registers": "setmaxnreg.inc.sync.aligned.u32 kRegisters;",
    "store_matrix_x4": "stmatrix.sync.aligned.m8n8.x4.shared.b16 [row_address], {r[0], r[1], r[2], r[3]};",
    "multiply_fence": "wgmma.fence.sync.aligned;",
    "multiply_commit": "wgmma.commit_group.sync.aligned;",
    "multiply_wait": "wgmma.wait_group.sync.aligned kPending;",
}
"""By the PTX manual; several where a function is overloaded."""


@pytest.mark.parametrize("name", MEANINGS)
def test_an_asm_statement_means_what_its_twin_does(name):
    meaning = MEANINGS[name]
    assert ptx(name) == ({meaning} if isinstance(meaning, str) else set(meaning))


def test_every_asm_statement_has_its_meaning_here():
    assert {name for name, functions in PTX.items() if any("asm" in f.body for f in functions)} == MEANINGS.keys()


def test_the_compiler_moves_no_access_across_another():
    # What writes memory, waits, or reads what others write, is volatile and a barrier for the compiler.
    for name, functions in PTX.items():
        changes = re.match(
            r"store_|copy_async|atomic_add|load_acquire|load_matrix|load_box|barrier_|sync_[nc]|fence_|multiply_[fcw]",
            name,
        )
        for f in functions:
            if changes and "asm" in f.body:
                assert "asm volatile" in f.body, name
                assert statement(f)[1] == "memory", name


@pytest.mark.parametrize(("element", "ptx_type"), [("BFloat16", "bf16"), ("Float16", "f16")])
def test_products_of_warpgroups(element, ptx_type):
    """Kills: an accumulator left out or out of place, an operand's number that is another's, a sign, p turned for q."""
    flags = ("-E", "-P", "-x", "c++", "-DLK_DEVICE=", "-DLK_UNROLL=")
    command = [os.environ.get("CXX", "g++"), *flags, str(CSRC / "ptx/wgmma.h")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    body, _ = block(text, text.index("{", text.index(f"struct Warpgroup<{element}>")))
    (functions,) = parse(body).values()
    counts = [int(re.search(r"float ?\(&d\)\[(\d+)\]", f.signature)[1]) for f in functions]
    assert counts == [8, 16, 32, 64, 128]
    for count, f in zip(counts, functions, strict=True):
        assert re.search(r"uint64_t p, uint64_t q, bool accumulates\)$", f.signature)
        template, outputs, inputs = re.split(r"\s*:\s*(?=(?:[^\"]*\"[^\"]*\")*[^\"]*$)", f.body, maxsplit=2)
        statement = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', template)).replace("\\n", "")
        registers = ", ".join(f"%{i}" for i in range(count))
        p, q, accumulates, *turned = (f"%{count + i}" for i in range(5))
        assert statement == (
            f"{{.reg .pred a; setp.ne.b32 a, {accumulates}, 0; "
            f"wgmma.mma_async.sync.aligned.m64n{2 * count}k16.f32.{ptx_type}.{ptx_type} "
            f"{{{registers}}}, {p}, {q}, a, 1, 1, {', '.join(turned)};}}"
        )
        indices = re.findall(r'"\+f"\(d\[([\d +]+)\]\)', outputs)
        assert [sum(map(int, index.split("+"))) for index in indices] == list(range(count))
        assert re.findall(r'"(\w)"\(', inputs) == ["l", "l", "r", "n", "n"]
        order = [inputs.index(name) for name in ("(p)", "(q)", "accumulates", "kTransposedP", "kTransposedQ")]
        assert order == sorted(order)
