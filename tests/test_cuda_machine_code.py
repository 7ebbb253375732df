"""What must stand in the kernels' machine code, on the architectures that the extension was built for: in the suite, on
the last of those that share a PTX.

The emulator runs the kernels without csrc/ptx/, and checks the order that the source asks for. Here is what the
compiler made of it: the order of instructions between blocks, and how far loads are ahead of their use.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import sass
import setup_script

from lora_kernels import _native

pytestmark = [
    pytest.mark.skipif(setup_script.load().CUDA_HOME is None, reason=setup_script.load().CUDA_REASON),
    pytest.mark.skipif(sass.disassembler() is None, reason="cuobjdump is not installed"),
]


WGMMA, WGMMA_GRAD_X = "15LoraLinearWgmmaI", "ELb1ELi1EEEEEvNS_15LoraWgmmaParams"
WGMMA_CLUSTERS = "ELb0ELi2EEEEEvNS_15LoraWgmmaParams"


def built() -> list[str]:
    """The architectures that the extension has machine code for."""
    if _native.cuda is None or sass.disassembler() is None:
        return []
    return sorted(sass.architectures(Path(_native.cuda.__file__)), key=lambda arch: int(re.search(r"\d+", arch)[0]))


def of_the_suite(archs: list[str]) -> list:
    """The last of those that share a PTX, before 10.0 and from there on; the others are for the full suite."""
    older = [arch for arch in archs if len(arch) == len("sm_80")]
    last = {archs[-1], *older[-1:]} if archs else set()
    return [pytest.param(arch, marks=() if arch in last else pytest.mark.full) for arch in archs]


BUILT = built()
# sm_90a has the kernels of wgmma, and others only where it was all that was asked for.
on_every_arch = pytest.mark.parametrize(
    "arch", of_the_suite([arch for arch in BUILT if arch != "sm_90a"] or BUILT), scope="module"
)


def code(arch: str, pattern: str) -> dict[str, list[tuple[int, str]]]:
    """Of the kernels whose mangled name matches."""
    names = [name for name in sorted(_native.cuda.kernels()) if re.search(pattern, name)]
    return sass.code(Path(_native.cuda.__file__), arch, *names)


@pytest.fixture(scope="module")
def kernels(arch):
    """(mangled name, code) of every kernel of a LoRA linear and its gradients in bf16, those of wgmma apart."""
    return code(arch, r"^_ZN2lk\d+(grouped_|multi_)?lora_(?!linear_wgmma).*BFloat16").items()


def test_the_extension_is_there():
    assert _native.cuda is not None, f"nvcc is installed, but lora_kernels._cuda: {_native.cuda_error}"
    assert BUILT
    assert ("sm_90a" in BUILT) == any(WGMMA in name for name in _native.cuda.kernels())


# ------------------------------------------------------------------------------------------ order between blocks

EVENTS = {
    "B": r"BAR\.SYNC",  # sync_block
    "M": r"MEMBAR\.\w+\.GPU",  # a release's fence: what is before it is seen by other SMs before what is after it
    "I": r"CCTL\.IVALL",  # an acquire's: this SM's L1 forgets what it has read
    "A": r"(ATOMG|RED)\..*STRONG\.GPU",
    "L": r"LDG\..*STRONG\.GPU",
    "S": r"STG\..*STRONG\.GPU",
    "F": r"FENCE\.VIEW\.ASYNC",  # what threads have stored is shown to the copy engine
    "T": r"UTMALDG",  # which copies a box
    "c": r"SYNCS\.ARRIVE\.TRANS64\.RED\.A1T0",  # arrives at a barrier of the cluster
    "a": r"ATOMG|RED",  # weaker, or for this SM alone
    "l": r"LDG",  # to registers or, asynchronously, to shared memory
    "s": r"STG",
}
"""Opcodes of what orders memory, and of global memory's accesses, by a letter; the first that matches."""


def events(code: list[str]) -> str:
    """A kernel's in the order of its code; plain loads, or stores, that follow each other count once."""
    letters = []
    for instruction in code:
        opcode = re.sub(r"^@!?U?P\w+\s+", "", instruction)
        letter = next((letter for letter, pattern in EVENTS.items() if re.match(pattern, opcode)), "")
        letters.append(letter)
    return re.sub(r"l+", "l", re.sub(r"s+", "s", "".join(letters)))


PUBLISH = "BM[AS]"
"""All threads have stored; one of them releases."""
ACQUIRE = "(LI)+B"
"""One thread has polled a flag; then all load."""
ARRIVE = "BMAIs?B"
"""Both at once: the last block to arrive sees what all have stored, and sets the counter back."""


def faults(name: str, order: str) -> list[str]:
    """What is wrong with how the blocks of a kernel learn of each other's results, from its events."""
    found = ["a" in order and "an atomic operation that other SMs need not see"]
    if "16LoraLinearPackedI" in name:  # the last part of s, which publishes what it has summed
        found.append(not re.search(f"{ARRIVE}.*s{PUBLISH}", order) and "s is published before its parts have arrived")
    if "15MultiLoraDecodeI" in name:  # parts of the depth arrive, too: the last looks for s
        found += [
            len(re.findall("(?<!M)A", order)) != 1 and "one addition orders nothing: drawing a ticket",
            not re.search(PUBLISH, re.sub(ARRIVE, "", order)) and "s is not published",
            not re.search(ARRIVE, order) and "the last block may miss partial sums",
            "L" not in order and "no flag is polled",
            "L" in re.sub(ACQUIRE, "", order) and "s may be loaded before its flag",
        ]
    elif WGMMA in name:
        # Tickets, and flags of what threads store and the copy engine reads: rounded adapters and s, by a warp, or s'
        # in the gradient of x, by a warpgroup.
        by_warps, by_groups = (1, 1) if WGMMA_GRAD_X in name else (2, 0)
        found += [
            len(re.findall("(?<!M)A", order)) < 1 + by_warps and "additions that order nothing: drawing tickets",
            len(re.findall("sM*FM+A", order)) < by_warps and "adapters, or s, are not published, or not shown",
            len(re.findall("sM*FBM+A", order)) < by_groups and "s' is not published, or not shown",
            "L" not in order and "no flag is polled",
            "L" in re.sub("(LI)+M*F", "", order) and "s may be copied before its flag, or before it is shown",
        ]
        if WGMMA_CLUSTERS in name:  # a ticket is told and heard: the first one, and those that follow
            found.append(len(re.findall("IM+c", order)) < 4 and "a cluster's ticket is taken, or given, without order")
    elif "10LoraLinearI" in name or "16LoraLinearPackedI" in name:  # tickets, and flags of s
        found += [
            len(re.findall("(?<!M)A", order)) != 1 and "one addition orders nothing: drawing a ticket",
            not re.search(PUBLISH, order) and "s is not published",
            "L" not in order and "no flag is polled",
            "L" in re.sub(ACQUIRE, "", order) and "s may be loaded before its flag",
        ]
        if "ForwardRolesELb1E" in name:  # column-0: the block that has s stores its flag
            found.append("BMS" not in order and "s of column 0 is not published")
    elif "A" in order or "L" in order:
        found.append(bool(re.search("[ALS]", re.sub(ARRIVE, "", order))) and "the last block may miss partial sums")
    return [fault for fault in found if fault]


def check_order(kernels) -> int:
    """Of how many kernels blocks learn of each other's results, all of them as they should."""
    checked = 0
    for name, code in kernels:
        order = events([instruction for _, instruction in code])
        assert faults(name, order) == [], (name, order)
        checked += bool(re.search("[AL]", order))
    return checked


@on_every_arch
def test_blocks_see_what_others_have_written(kernels):
    assert check_order(kernels) >= 15


@pytest.mark.skipif("sm_90a" not in BUILT, reason="not built for sm_90a")
def test_blocks_and_the_copy_engine_see_what_others_have_written():
    assert check_order(code("sm_90a", "lora_linear_wgmma.*BFloat16").items()) == 10


ORDERS = {
    "10LoraLinearI": "AlBlBsBMAIlBlLILIBlBlBsMAIs",
    "10LoraLinearIForwardRolesELb1E": "ABlBlBsBMAILILIBlBsBMSBsMAIs",
    "16LoraLinearPackedI": "ABlBsBMAIsBlsBMAIlBLILIBls",
    "15MultiLoraDecodeI": "ABlsBMAIlBlsBMAIsBlLILIBlBBs",
    "9LoraGradsI": "lBlsBMAIsBlsBs",
    WGMMA: "FBlFBAlsMFMAILILIMFAlslsMFMAIAATTLILIMFTLILIMFT",
    WGMMA + WGMMA_CLUSTERS: "FMIBcccBlFBAlsMFMAILILIMFAlslsMFMAIIMcAIMcIMcAIMcTTLILIMFTLILIMFTMIBIIII",
    WGMMA + WGMMA_GRAD_X: "FBTsMFBMAIBlFBAlsMFMAIlALILIMFATTTTLILIMFTTLILIMFT",
}
"""As they are, shortened, by a part of the kernel's name."""


@pytest.mark.parametrize("name", ORDERS)
def test_the_check_knows_what_is_right(name):
    assert faults(name, ORDERS[name]) == []


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("10LoraLinearI", "sBMAI", "sBa"),  # atom.relaxed.cta
        ("10LoraLinearI", "sBMAI", "sBA"),  # atom.relaxed.gpu
        ("10LoraLinearI", "sBMAI", "BsMAI"),  # released before all have stored
        ("10LoraLinearI", "LILIB", "llB"),  # ld.relaxed.cta
        ("10LoraLinearI", "LILIB", "LLB"),  # ld.relaxed.gpu
        ("10LoraLinearI", "LILIBl", "LILIlB"),  # loaded before all know
        ("10LoraLinearIForwardRolesELb1E", "BMSB", "BSB"),  # st.relaxed.gpu
        ("10LoraLinearIForwardRolesELb1E", "BMSB", "BsB"),  # a plain store
        ("16LoraLinearPackedI", "sBMAIsB", "sBAsB"),  # the last part may miss the others
        ("16LoraLinearPackedI", "BlsBMA", "BlBsMA"),  # released before all of s is stored
        ("16LoraLinearPackedI", "lsBMAI", "lsBA"),
        ("16LoraLinearPackedI", "LILIBl", "LILIlB"),
        ("16LoraLinearPackedI", "LILIB", "LLB"),
        ("15MultiLoraDecodeI", "sBMAIlB", "sBAlB"),  # s is released by an addition that orders nothing
        ("15MultiLoraDecodeI", "lsBMAIlB", "lBsMAIlB"),
        ("15MultiLoraDecodeI", "BMAIsB", "BAsB"),
        ("15MultiLoraDecodeI", "LILIBl", "LILIlB"),
        ("15MultiLoraDecodeI", "LILIB", "LLB"),
        ("9LoraGradsI", "BMAIsB", "BAsB"),
        ("9LoraGradsI", "BMAIsBl", "BMAIslB"),
        ("9LoraGradsI", "sBMAI", "BsMAI"),
        (WGMMA, "lslsMFMAI", "lslsMAI"),  # one of two is not shown to the copy engine
        (WGMMA, "sMFMAI", "sMAI"),
        (WGMMA, "sMFMAI", "MFsMAI"),  # shown before it is stored
        (WGMMA, "sMFMAI", "sMFA"),  # added to the flag by an addition that orders nothing
        (WGMMA, "LILIMFT", "LLMFT"),  # ld.relaxed.gpu
        (WGMMA, "LILIMFT", "LILIT"),
        (WGMMA, "LILIMF", "llMF"),
        (WGMMA + WGMMA_CLUSTERS, "AIMcIMc", "AIcIMc"),  # a ticket is told by an arrival that orders nothing
        (WGMMA + WGMMA_CLUSTERS, "AIMcIMc", "AIMcMc"),  # mbarrier.try_wait of the block: it is read too early
        (WGMMA + WGMMA_CLUSTERS, "LILIMFT", "LILIT"),
        (WGMMA + WGMMA_GRAD_X, "sMFBMAI", "sBMAI"),  # s' is not shown
        (WGMMA + WGMMA_GRAD_X, "sMFBMAI", "sMBFMAI"),  # shown by one thread alone
        (WGMMA + WGMMA_GRAD_X, "sMFBMAI", "sMFBA"),
        (WGMMA + WGMMA_GRAD_X, "sMFMAI", "MFsMAI"),
        (WGMMA + WGMMA_GRAD_X, "LILIMFT", "LILIT"),
    ],
)
def test_the_check_sees_what_is_wrong(name, right, wrong):
    assert right in ORDERS[name]
    assert faults(name, ORDERS[name].replace(right, wrong))


# ------------------------------------------------------------------------------------------ depth of the pipeline


def stages(name: str) -> int:
    """Of the kernel's main loop: the Gemm in its name has element, M, N, depth, warps, warps, stages; others have 4."""
    gemm = re.search(r"4GemmINS_\d+[A-Za-z]+\d*E(?:Li\d+E){5}Li(\d+)E", name)
    return int(gemm[1]) if gemm else 4


@on_every_arch
def test_main_loops_wait_for_the_oldest_stage_alone(kernels):
    # As many stages as there are but two, the one in use and the one to be filled, are under way behind the wait.
    checked = 0
    for name, code in kernels:
        if "16LoraLinearPackedI" in name:
            continue  # its warps have stages of their own: below
        bodies = [
            body
            for body in map(" ".join, sass.loops(code))
            if all(opcode in body for opcode in ("HMMA", "LDGSTS", "BAR.SYNC"))
        ]
        if not bodies:
            continue  # operands that are not copied asynchronously
        pending = {body: set(re.findall(r"\bDEPBAR\.LE SB0, (0x[0-9a-f]+)", body)) for body in bodies}
        if (
            "10ManyGroupsELb1E" in name
        ):  # tiles of y have a branch alone, whose loop is not a main loop; those of s have
            assert {hex(stages(name) - 2)} in pending.values(), name
        else:
            loop = max(bodies, key=lambda body: body.count("HMMA") / body.count("BAR.SYNC"))
            assert pending[loop] == {hex(stages(name) - 2)}, name
        checked += 1
    assert checked >= 10


# ----------------------------------------------------------------------------------------------- packed weights


@pytest.fixture(scope="module")
def dequantizing(arch):
    """(mangled name, opcodes) of every kernel of dequantize."""
    found = [
        (name, [re.sub(r"^@!?U?P\w+\s+", "", text).split()[0] for _, text in instructions])
        for name, instructions in code(arch, "dequantize_kernel").items()
    ]
    assert len(found) == 24
    return found


@on_every_arch
def test_weights_are_read_and_written_16_bytes_at_a_time(dequantizing):
    """Kills: stores that the compiler splits into words, as it does with what is put together in registers."""
    checked = 0
    for name, opcodes in dequantizing:
        if "ELb1E" in name:
            stores = {opcode for opcode in opcodes if opcode.startswith("STG")}
            copies = {opcode for opcode in opcodes if opcode.startswith("LDGSTS")}
            assert stores == {"STG.E.128"}, name
            assert copies == {"LDGSTS.E.BYPASS.128.ZFILL"}, name
            checked += 1
    assert checked >= 12


@on_every_arch
def test_scales_are_not_fused(dequantizing):
    """Kills: a product and a sum of which the compiler makes one operation, whose bits are not bitsandbytes'; products
    in which subnormal numbers are zero.
    """
    for name, opcodes in dequantizing:
        sums_and_products = {opcode for opcode in opcodes if opcode.startswith(("FFMA", "FADD", "FMUL"))}
        assert sums_and_products <= {"FADD", "FMUL"}, name
        assert "FADD" in opcodes or "E4M3" in name, name


# What a warp's scheduler issues to the units of arithmetic, HMMA's apart: not memory, branches or uniform registers.
NOT_ARITHMETIC = r"LD|ST|HMMA|U|B|CALL|RET|WARPSYNC|DEPBAR|NOP|EXIT"
STAGE_DEPTH = 256
"""Of a warp, in a pass of the main loop."""


@on_every_arch
def test_few_rows_decode_in_few_instructions(arch):
    """Kills: weights that are scaled, or rounded, one by one. A GPU that streams packed weights has time for about six.

    Everything in the loop counts: copies, scales and x, too. Its inner loop is passed once for every 8 rows of x.
    """
    packed = code(arch, "16LoraLinearPackedI")
    assert len(packed) == 6
    for name, instructions in packed.items():
        row_tile = int(re.search(r"ELi(\d+)E", name)[1])
        rows = 16 if row_tile <= 16 else 32
        loops = [[re.sub(r"^@!?U?P\w+\s+", "", text) for text in loop] for loop in sass.loops(instructions)]
        decoding = [loop for loop in loops if all(any(op in text for text in loop) for op in ("PRMT", "HMMA"))]
        bodies = [loop for loop in decoding if any("LDGSTS" in text for text in loop)]
        body = min(bodies, key=len)
        assert (
            sum("LDGSTS.E.BYPASS.128" in text for text in body) == sum("LDGSTS" in text for text in body) == rows // 4
        )
        assert {text for text in body if "DEPBAR.LE SB0" in text} == {"DEPBAR.LE SB0, 0x1"}, "of two stages, one"
        inner = [loop for loop in decoding if len(loop) < len(body)]
        assert len(inner) == (row_tile > 8)
        passed = body + [text for loop in inner for text in loop] * (row_tile // 8 - 1)
        arithmetic = [text for text in passed if not re.match(NOT_ARITHMETIC, text)]
        assert len(arithmetic) <= 6 * rows * STAGE_DEPTH // 32, name
