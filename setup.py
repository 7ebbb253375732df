"""Builds ``lora_kernels._C`` (CPU kernels, always) and ``lora_kernels._cuda`` (CUDA kernels, where nvcc is found).

Both are abi3 extensions on libtorch's stable ABI: built once, they run on every CPython >= 3.10 and torch >= 2.10,
with or without CUDA. No GPU is needed to build; a torch is (packaging/installed_torch.py). Environment:

    CXX                      C++ compiler (default: g++)
    CUDA_HOME                CUDA toolkit (default: the one nvcc on PATH belongs to, then /usr/local/cuda)
    LORA_KERNELS_CUDA        0: do not build CUDA; 1: fail if it cannot be built (default: build it where nvcc is found)
    TORCH_CUDA_ARCH_LIST     e.g. "8.0 9.0+PTX" (default: "8.0 9.0 10.0+PTX 12.0+PTX"); what nvcc
                             does not know is left out of either list, and a line says so
    LORA_KERNELS_STRICT      1: fail if the compiler spills registers of a kernel or gives it a stack (default: warn)
"""

from __future__ import annotations

import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = Path("csrc")
GPUS = SimpleNamespace(**runpy.run_path(str(ROOT / "lora_kernels" / "cli" / "plan" / "architectures.py")))
TORCH = SimpleNamespace(**runpy.run_path(str(ROOT / "packaging" / "installed_torch.py")))
# cp.async, and mma of bfloat16.
OLDEST_ARCH = 80
# Machine code serves later minor versions of its major one. PTX is for GPUs that then have none: 11.0, and later ones.
DEFAULT_ARCHS = "8.0 9.0 10.0+PTX 12.0+PTX"
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030a0000"]
CXX_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
# GCC 12 sees uninitialised reads in std::optional that are not there.
CXX_FLAGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f"]
# Packed weights are products that are rounded before anything is added to them.
EXACT = ["-ffp-contract=off"]
ISA_FLAGS = {  # of x86 alone
    "lora_branch_avx2.cpp": AVX2,
    "lora_branch_avx512.cpp": AVX512,
    "gated_activation_avx2.cpp": AVX2,
    "gated_activation_avx512.cpp": AVX512,
    "packed_weight_avx2.cpp": [*AVX2, "-mf16c", *EXACT],
    "packed_weight_avx512.cpp": [*AVX512, "-mavx512bw", *EXACT],
    "packed_weight_avx512_bf16.cpp": [*AVX512, "-mavx512bw", "-mavx512dq", "-mavx512bf16", *EXACT],
}
SOURCE_FLAGS = {**ISA_FLAGS, "packed_weight_portable.cpp": EXACT}


NO_CUDA_HINT = " (set LORA_KERNELS_CUDA=0 to build without CUDA)"


def find_nvcc() -> tuple[Path | None, str]:
    """The CUDA toolkit to build with, or why there is none."""
    wanted = os.environ.get("LORA_KERNELS_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"LORA_KERNELS_CUDA must be 0, 1 or unset, got {wanted!r}")
    if wanted == "0":
        return None, "LORA_KERNELS_CUDA=0"
    on_path = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), str(Path(on_path).parents[1]) if on_path else None, "/usr/local/cuda"]
    for home in filter(None, candidates):
        # An nvcc on PATH may be a wrapper: the toolkit is where the headers are.
        if (Path(home) / "bin" / "nvcc").is_file() and (Path(home) / "include" / "cuda_runtime_api.h").is_file():
            return Path(home), "nvcc found"
    if wanted == "1":
        raise SystemExit("LORA_KERNELS_CUDA=1, but nvcc is neither on PATH nor in CUDA_HOME nor in /usr/local/cuda")
    return None, "nvcc not found: set CUDA_HOME to build the CUDA kernels"


class Arch(NamedTuple):
    """An entry of TORCH_CUDA_ARCH_LIST."""

    number: str
    """As nvcc writes it: 80, 90a."""
    ptx: bool
    """PTX beside the machine code."""

    @property
    def family(self) -> int:
        """Without the letter of what only this GPU has, as ``nvcc --list-gpu-arch`` lists it."""
        return int(self.number.rstrip("af"))

    def __str__(self) -> str:
        digits = str(self.family)
        return f"{digits[:-1]}.{digits[-1]}{self.number[len(digits) :]}{'+PTX' if self.ptx else ''}"


def read_archs(arch_list: str) -> list[Arch]:
    """A list such as "8.0 9.0+PTX"."""
    archs = []
    for entry in arch_list.replace(";", " ").split():
        number, _, ptx = entry.partition("+")
        digits = number.replace(".", "")
        if not digits.rstrip("af").isdigit() or ptx not in ("", "PTX"):
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: cannot read {entry!r}, expected e.g. 8.0 or 9.0+PTX")
        archs.append(Arch(digits, bool(ptx)))
    return archs


def offered_archs(cuda_home: Path) -> set[int]:
    """What the toolkit's nvcc compiles for."""
    command = [str(cuda_home / "bin" / "nvcc"), "--list-gpu-arch"]
    try:
        listed = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "output", None) or "").strip()
        raise SystemExit(f"{' '.join(command)} failed{NO_CUDA_HINT}: {error}" + f"\n{said}" * bool(said)) from None
    return {int(number) for number in re.findall(r"compute_(\d+)\b", listed)}


def buildable(wanted: list[Arch], offered: set[int]) -> tuple[list[Arch], list[Arch]]:
    """(what to build, what to leave out). Where PTX is left out, that of the newest to build stands in: GPUs later than
    the toolkit run it, if it is not of a kind that one GPU alone has (9.0a), or one family (10.0f).
    """
    kept = [arch for arch in wanted if arch.family in offered and arch.family >= OLDEST_ARCH]
    left_out = [arch for arch in wanted if arch not in kept]
    if not kept:
        possible = [str(Arch(str(number), False)) for number in sorted(offered) if number >= OLDEST_ARCH]
        raise SystemExit(
            f"TORCH_CUDA_ARCH_LIST: nothing can be built for {' '.join(map(str, wanted))}; "
            f"this nvcc can build the kernels for {' '.join(possible) or 'nothing'}"
        )
    if any(arch.ptx for arch in left_out):
        portable = [arch for arch in kept if arch.number.isdigit()]
        if portable:
            newest = max(portable, key=lambda arch: arch.family)
            kept[kept.index(newest)] = newest._replace(ptx=True)
        else:
            kept.append(Arch(str(max(arch.family for arch in kept)), True))
    return kept, left_out


def gencode(archs: list[Arch]) -> list[str]:
    """nvcc's flags. Kernels ask for nothing that the oldest GPU lacks, so GPUs share the PTX of the oldest of them:
    making it takes longer than making machine code of it. From 10.0 on ptxas spills with 8.0's, so those have their
    own, as has code for one GPU (9.0a), or one family.
    """
    portable = [arch for arch in archs if arch.number.isdigit()]
    older = [arch for arch in portable if arch.family < 100]
    newer = [arch for arch in portable if arch.family >= 100]
    groups = [older, newer, *([arch] for arch in archs if arch not in portable)]
    flags = []
    for group in filter(None, groups):
        oldest = min(group, key=lambda arch: arch.family).number
        codes = [f"sm_{arch.number}" for arch in group]
        if any(arch.ptx for arch in group):
            codes.append(f"compute_{oldest}")
        flags.append(f"-gencode=arch=compute_{oldest},code=[{','.join(codes)}]")
    return flags


def toolkit_version(cuda_home: Path) -> int:
    """13000 for 13.0; 0 where its header does not say."""
    header = (cuda_home / "include" / "cuda_runtime_api.h").read_text(errors="replace")
    version = re.search(r"#define\s+CUDART_VERSION\s+(\d+)", header)
    return 0 if version is None else int(version[1])


def compression(cuda_home: Path) -> list[str]:
    """nvcc's flags. Packed for size, machine code takes a fifth of the room; the driver unpacks it when it is loaded:
    every driver that runs what a toolkit from 13 on has built.
    """
    return ["-compress-mode=size"] if toolkit_version(cuda_home) >= 13000 else []


WGMMA = "_wgmma_"
"""In the names of CUDA sources that are for sm_90a alone: what only this GPU has is machine code beside 9.0's."""
WGMMA_ARCHS = [Arch("90a", False)]
SERIALISED = re.compile(r"\(C75(?:08|10|12|20)\)")
"""ptxas' remarks that it waits for every wgmma by itself. C7519, a fence that it adds, costs nothing."""


def wgmma_problem(cuda_home: Path, archs: list[Arch]) -> str:
    """Why kernels for sm_90a are not built; empty where they are."""
    if toolkit_version(cuda_home) < 12000:
        return f"{cuda_home} is older than CUDA 12.0, the first with 9.0a"
    return "" if any(arch.family == 90 for arch in archs) else "9.0 is not built for"


def check_wgmma(log: str, kernels: list[Any]) -> None:
    """Stops a build whose kernels for sm_90a would be right, and slower than those that they are to replace."""
    slow = sorted(set(re.findall(rf"^.*{SERIALISED.pattern}.*$", log, re.MULTILINE)))
    slow += [f"{GPUS.readable(use.kernel)} spills registers" for use in kernels if use.memory]
    if slow:
        raise SystemExit("kernels of wgmma:\n" + "\n".join(slow))


def complain(message: str) -> None:
    """Stops a strict build, warns in any other."""
    if os.environ.get("LORA_KERNELS_STRICT") == "1":
        raise SystemExit(message)
    print(f"warning: {message}", file=sys.stderr)


def kernels_in(log: str) -> list[Any]:
    """What every kernel in the output of ``ptxas -v`` uses; none where it cannot be read, which is complained about."""
    try:
        return GPUS.kernel_resources(log)
    except ValueError as problem:
        complain(f"{problem}: whether kernels spill registers is not known")
        return []


def check_spills(kernels: list[Any]) -> None:
    """Complains about kernels that are correct, but slow."""
    spilling = [f"{GPUS.readable(use.kernel)} ({use.arch})" for use in kernels if use.memory]
    if spilling:
        complain(f"registers are spilled, or a stack is used, by {'; '.join(spilling)}")


def installed_torch() -> Any:
    """The torch that is built against."""
    torch = TORCH.find()
    if torch is None:
        raise SystemExit(f"there is no torch for {sys.executable}: lora_kernels is compiled against it")
    return torch


def described_kernels(module: Path) -> dict[str, tuple[int, int]]:
    """Threads and bytes of dynamic shared memory per kernel, which no compiler knows: the built extension tells."""
    code = f"""
import importlib.util, json, sys
sys.path = {installed_torch().path!r}
import torch
spec = importlib.util.spec_from_file_location("_cuda", {str(module)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(json.dumps(module.kernels()))
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if told.returncode != 0:
        complain(f"{module.name} does not load: {told.stderr.strip()}")
        return {}
    return json.loads(told.stdout)


CUDA_HOME, CUDA_REASON = find_nvcc()
ARCHS = LEFT_OUT = []
WGMMA_PROBLEM = CUDA_REASON
if CUDA_HOME is not None:
    ARCHS, LEFT_OUT = buildable(
        read_archs(os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS), offered_archs(CUDA_HOME)
    )
    WGMMA_PROBLEM = wgmma_problem(CUDA_HOME, ARCHS)


def sources(name: str) -> list[str]:
    """The C++ and CUDA files of an extension, relative to the root."""
    patterns = {"_C": ("bind/*_cpu.cpp", "cpu/*.cpp"), "_cuda": ("bind/*_cuda.cpp", "plan/*.cpp", "launch/*.cu")}[name]
    found = [p.relative_to(ROOT) for pattern in patterns for p in sorted((ROOT / CSRC).glob(pattern))]
    if WGMMA_PROBLEM:
        found = [p for p in found if WGMMA not in p.name]
    return [str(p) for p in found if p.name not in ISA_FLAGS or platform.machine() == "x86_64"]


class NinjaBuild(build_ext):
    """Compiles an extension's sources with ninja: in parallel, and only what changed."""

    def build_extension(self, ext: Extension) -> None:
        import ninja

        # pip gives an editable install a new folder each time, which would compile everything anew.
        temporary = ROOT / "build" / "objects" if self.editable_mode else Path(self.build_temp)
        build_dir = temporary.resolve() / ext.name.rpartition(".")[2]
        build_dir.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        (build_dir / "build.ninja").write_text(self.ninja_file(ext, target))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.call([str(Path(ninja.BIN_DIR) / "ninja"), *jobs], cwd=build_dir) != 0:
            hint = NO_CUDA_HINT if ext.name.endswith("_cuda") else ""
            raise SystemExit(f"building {ext.name} failed{hint}")
        if ext.name.endswith("_cuda"):
            self.check_resources(build_dir, target)

    def check_resources(self, build_dir: Path, module: Path) -> None:
        """Print what each kernel uses; complain about memory that the compiler had to add."""
        logs = [build_dir / f"{Path(source).name}.o.log" for source in sources("_cuda") if source.endswith(".cu")]
        kernels = kernels_in("".join(log.read_text() for log in logs))
        of_wgmma = "".join(log.read_text() for log in logs if WGMMA in log.name)
        check_wgmma(of_wgmma, kernels_in(of_wgmma) if of_wgmma else [])
        table = GPUS.resource_table(kernels, described_kernels(module))
        print(table, file=sys.stderr)
        (ROOT / "build").mkdir(exist_ok=True)
        (ROOT / "build" / "kernel_resources.txt").write_text(table)  # pip shows nothing of a build that succeeds
        check_spills(kernels)

    def ninja_file(self, ext: Extension, target: Path) -> str:
        torch_dir = installed_torch().folder
        headers = [torch_dir / "include", torch_dir / "include/torch/csrc/api/include", sysconfig.get_path("include")]
        include = [f"-I{path}" for path in headers]
        cuda = ext.name.endswith("_cuda")
        if cuda:
            include.append(f"-I{CUDA_HOME}/include")
        # libtorch, not libtorch_cuda: the CUDA build of torch brings the latter along, and the CPU build loads us too.
        link = [f"-L{torch_dir}/lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
        if cuda:
            link += [f"-L{CUDA_HOME}/lib64", "-lcudart_static", "-ldl", "-lpthread", "-lrt"]

        def escape(flags: list[str]) -> str:
            return " ".join(flag.replace("$", "$$").replace(" ", "\\ ") for flag in flags)

        cxx_flags = [*CXX_FLAGS, *STABLE_ABI, *(["-DUSE_CUDA"] if cuda else []), *include]
        cxx_flags += ["-DLK_NO_WGMMA"] if cuda and WGMMA_PROBLEM else []
        nvcc_flags = [
            "-O3",
            "-std=c++20",
            "--expt-relaxed-constexpr",
            "-Xcompiler=-fPIC,-fvisibility=hidden",
            "-Xptxas=-v",
            *(compression(CUDA_HOME) if cuda else []),
        ]
        lines = [
            f"cxx = {os.environ.get('CXX', 'g++')}",
            f"cxxflags = {escape(cxx_flags)}",
            f"nvcc = {CUDA_HOME}/bin/nvcc",
            f"nvccflags = {escape(nvcc_flags)}",
            "rule cxx",
            "  command = $cxx -MMD -MF $out.d $cxxflags $extra -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule nvcc",
            # What ptxas says about registers is read from the log, also when ninja has nothing to do.
            "  command = $nvcc -MD -MF $out.d $nvccflags $extra -c $in -o $out"
            " > $out.log 2>&1 || (cat $out.log; false)",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = $cxx -shared $in -o $out {escape(link)}",
        ]
        objects = []
        for source in ext.sources:
            rule = "nvcc" if source.endswith(".cu") else "cxx"
            objects.append(Path(source).name + ".o")
            lines.append(f"build {objects[-1]}: {rule} {str(ROOT.resolve() / source).replace(' ', '$ ')}")
            extra = gencode(WGMMA_ARCHS if WGMMA in source else ARCHS) if rule == "nvcc" else []
            lines.append(f"  extra = {escape([*SOURCE_FLAGS.get(Path(source).name, []), *extra])}")
        lines.append(f"build {str(target).replace(' ', '$ ')}: link {' '.join(objects)}")
        return "\n".join([*lines, ""])

    def run(self) -> None:
        if self.inplace and CUDA_HOME is None:
            # A stale module of an earlier build must not pass for this one.
            (ROOT / "lora_kernels" / "_cuda.abi3.so").unlink(missing_ok=True)
            (ROOT / "build" / "kernel_resources.txt").unlink(missing_ok=True)
        super().run()
        record = Path(self.build_lib) / "lora_kernels" / "_build_info.json"
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(build_record(), indent=2) + "\n")
        if self.inplace:
            shutil.copy(record, ROOT / "lora_kernels")
        print("\n".join(f"lora_kernels: {key}: {value}" for key, value in build_record().items()), file=sys.stderr)

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), str(Path(self.build_lib) / "lora_kernels" / "_build_info.json")]


def build_record() -> dict[str, str]:
    """What is built here, for ``lora_kernels.build_info()``."""

    def version(command: list[str]) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    cuda = {"CUDA": f"not built: {CUDA_REASON}"}
    if CUDA_HOME is not None:
        nvcc = version([f"{CUDA_HOME}/bin/nvcc", "--version"]).splitlines()[-1]
        cuda = {"CUDA": f"built for {' '.join(map(str, ARCHS))} with {nvcc}"}
        cuda["CUDA, wgmma"] = f"left out: {WGMMA_PROBLEM}" if WGMMA_PROBLEM else "built for 9.0a"
    if LEFT_OUT:
        cuda["CUDA, left out"] = left_out_text()
    return {
        "C++": f"built with {version([os.environ.get('CXX', 'g++'), '--version']).splitlines()[0]}",
        **cuda,
        "torch headers": installed_torch().version,
        "oldest torch": ".".join(map(str, TORCH.OLDEST_TORCH)),
    }


def left_out_text() -> str:
    """What is not built, and why."""
    old = [str(arch) for arch in LEFT_OUT if arch.family < OLDEST_ARCH]
    unknown = [str(arch) for arch in LEFT_OUT if arch.family >= OLDEST_ARCH]
    reasons = [f"{' '.join(old)}: the kernels need 8.0"] if old else []
    if unknown:
        reasons.append(f"{' '.join(unknown)}: not known to {CUDA_HOME}/bin/nvcc; CUDA_HOME may name a later toolkit")
    return "; ".join(reasons)


def warn_of_what_is_left_out() -> None:
    """Before a build that takes minutes."""
    if LEFT_OUT:
        print(f"warning: CUDA, left out: {left_out_text()}", file=sys.stderr)
    if CUDA_HOME is not None and WGMMA_PROBLEM:
        print(f"warning: CUDA, kernels of wgmma left out: {WGMMA_PROBLEM}", file=sys.stderr)


def extension(name: str) -> Extension:
    return Extension(f"lora_kernels.{name}", sources(name), py_limited_api=True)


def main() -> None:
    """Builds what this machine can build."""
    warn_of_what_is_left_out()
    setup(
        ext_modules=[extension("_C"), *([extension("_cuda")] if CUDA_HOME is not None else [])],
        cmdclass={"build_ext": NinjaBuild},
    )


if __name__ == "__main__":
    main()
