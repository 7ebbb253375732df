"""What setup.py builds: modules that load everywhere, a complete sdist, a wheel that works outside the checkout."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import setup_script
import torch

import lora_kernels as lk
from lora_kernels import _native
from lora_kernels.cli.plan.architectures import kernel_resources, readable, resource_table

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(lk.__file__).parent
AARCH64 = "aarch64-linux-gnu-g++"
KERNEL_TABLE = ROOT / "build" / "kernel_resources.txt"


def python(code, **environment):
    """stdout of code in a fresh interpreter, outside the checkout."""
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, cwd="/", capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def needed_libraries(module):
    out = subprocess.run(["readelf", "-d", module], capture_output=True, text=True, check=True).stdout
    return {line.split("[")[1].rstrip("]") for line in out.splitlines() if "(NEEDED)" in line}


def test_what_was_built_is_recorded_and_loads():
    info = lk.build_info()
    assert info["C++"].startswith("built with")
    assert _native.cpu is not None
    assert info["CUDA"].startswith(("built for", "not built: "))
    # Also where torch is a CPU build: the CUDA module must load, the device is what is missing.
    assert (_native.cuda is not None) == info["CUDA"].startswith("built for"), _native.cuda_error


def test_modules_are_abi3_and_need_no_cuda_library():
    modules = sorted(PACKAGE.glob("_c*.so")) + sorted(PACKAGE.glob("_C*.so"))
    assert "_C.abi3.so" in {m.name for m in modules}
    for module in modules:
        assert module.name.endswith(".abi3.so")
        assert not {lib for lib in needed_libraries(module) if "cuda" in lib or "cudart" in lib or "python" in lib}


def test_import_is_light():
    heavy = ("peft", "transformers", "triton", "matplotlib", "rich", "accelerate")
    code = f"import sys, lora_kernels; print([m for m in {heavy} if m in sys.modules])"
    baseline = python(f"import sys, torch; print([m for m in {heavy} if m in sys.modules])")
    assert python(code) == baseline


def test_works_without_the_extensions():
    code = """
import sys
sys.modules["lora_kernels._C"] = sys.modules["lora_kernels._cuda"] = None
import torch, lora_kernels as lk
x, w, a, b = torch.randn(3, 8), torch.randn(6, 8), torch.randn(2, 8, requires_grad=True), torch.randn(6, 2)
y = lk.lora_linear(x, w, a, b, dropout_p=0.5, training=True)
y.sum().backward()
print(lk.backends()["cpu"], lk.why("lora_linear", x, w, a, b), lk.stats(), sep="\\n")
"""
    out = python(code)
    assert "available=False, detail='extension not built'" in out
    assert "backend='reference'" in out
    assert "('lora_linear', 'extension not built'): 1" in out


def test_works_without_triton():
    code = "import sys; sys.modules['triton'] = None; import lora_kernels as lk; print(lk.backends()['triton'])"
    assert python(code) == "BackendStatus(available=False, detail='triton not installed')"


def test_triton_kernels_are_installed_under_the_package():
    assert python("import lora_kernels.triton_kernels as t; print(t.__name__)") == "lora_kernels.triton_kernels"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the checkout without build products."""
    copy = tmp_path_factory.mktemp("checkout") / "source"
    skip = shutil.ignore_patterns(
        ".venv*", "build", "dist", "*.so", "_build_info.json", "*.egg-info", "__pycache__", ".git", ".mypy_cache"
    )
    shutil.copytree(ROOT, copy, ignore=skip)
    return copy


def backend_hook(checkout, hook, out, **environment):
    """Runs a PEP 517 hook in the checkout; returns the file it made."""
    code = f"import setuptools.build_meta as m; print('made', m.{hook}({str(out)!r}))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return out / run.stdout.strip().splitlines()[-1].removeprefix("made ")


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory):
    """The sdist, unpacked."""
    out = tmp_path_factory.mktemp("sdist")
    with tarfile.open(backend_hook(checkout, "build_sdist", out)) as archive:
        archive.extractall(out, filter="data")
    return out / f"lora_kernels-{lk.__version__}"


def test_sdist_holds_the_sources(checkout, sdist):
    names = {str(path.relative_to(sdist)) for path in sdist.rglob("*")}
    for folder in ("csrc", "tests", "examples", "packaging", "triton_kernels", "lora_kernels"):
        for path in (checkout / folder).rglob("*"):
            if path.is_file():
                assert str(path.relative_to(checkout)) in names
    assert {"LICENSE", "README.md", "setup.py", "pyproject.toml"} <= names


def test_wheel_of_the_sdist_works_outside_the_checkout(checkout, sdist, tmp_path):
    hasty = tmp_path / "c++"  # a minute of the suite's less
    hasty.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "g++")} "$@" -O0\n')
    hasty.chmod(0o755)
    wheel = backend_hook(sdist, "build_wheel", tmp_path, LORA_KERNELS_CUDA="0", CXX=str(hasty))
    assert "-cp310-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "lora_kernels/_C.abi3.so" in names
    # A package that is in the checkout and not in pyproject.toml's list is missed where it is imported late.
    sources = {str(path.relative_to(checkout)) for path in (checkout / "lora_kernels").rglob("*.py")}
    sources |= {f"lora_kernels/triton_kernels/{path.name}" for path in (checkout / "triton_kernels").glob("*.py")}
    assert sources <= set(names)
    assert "lora_kernels/py.typed" in names
    assert not [n for n in names if n.startswith(("csrc/", "tests/", "triton_kernels/")) or "_emu" in n]
    make_wheels = runpy.run_path(str(sdist / "packaging" / "make_wheels.py"))
    make_wheels["smoke"](wheel, "cpu", tmp_path, None)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"LORA_KERNELS_CUDA": "yes"}, "LORA_KERNELS_CUDA must be 0, 1 or unset"),
        ({"LORA_KERNELS_CUDA": "0", "TORCH_CUDA_ARCH_LIST": ""}, None),
    ],
)
def test_build_settings_are_checked(checkout, environment, message):
    run = subprocess.run(
        [sys.executable, "-c", "import setup"],
        cwd=checkout,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert (message or "") in run.stderr
    assert (run.returncode == 0) == (message is None)


def toolkit(folder, archs):
    """The home of a toolkit whose nvcc knows these architectures, and refuses others as nvcc does."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    (folder / "include").mkdir()
    (folder / "include" / "cuda_runtime_api.h").touch()
    nvcc.write_text(f"""#!{sys.executable}
import re, sys
known = {archs!r}
if "--list-gpu-arch" in sys.argv:
    print(*(f"compute_{{number}}" for number in known), sep="\\n")
elif "--version" in sys.argv:
    print("nvcc: NVIDIA (R) Cuda compiler driver", "Build of_this_test", sep="\\n")
else:
    for number in re.findall(r"(?:compute|sm)_(\\d+)", " ".join(sys.argv)):
        if int(number) not in known:
            sys.exit(f"nvcc fatal   : Unsupported gpu architecture 'compute_{{number}}'")
""")
    nvcc.chmod(0o755)
    return folder


@pytest.mark.parametrize(("version", "flags"), [("13000", ["-compress-mode=size"]), ("12090", []), (None, [])])
def test_machine_code_is_packed_where_all_drivers_unpack_it(tmp_path, version, flags):
    (tmp_path / "include").mkdir()
    text = "" if version is None else f"#define CUDART_VERSION  {version}\n"
    (tmp_path / "include" / "cuda_runtime_api.h").write_text(text)
    assert setup_script.load().compression(tmp_path) == flags


@pytest.mark.parametrize("broken", ["it fails", "it cannot be run"])
def test_an_nvcc_that_does_not_run_is_an_error_with_the_way_round_it(tmp_path, broken):
    """Kills: a traceback of subprocess, from every command of setup.py, also from one that builds nothing."""
    home = toolkit(tmp_path, ())
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho no libraries >&2\nexit 7\n")
    if broken == "it cannot be run":
        nvcc.write_text("#!/no/such/interpreter\n")
    with pytest.raises(SystemExit) as stopped:
        setup_script.load().offered_archs(home)
    assert str(nvcc) in str(stopped.value)
    assert "set LORA_KERNELS_CUDA=0" in str(stopped.value)
    assert ("no libraries" in str(stopped.value)) == (broken == "it fails")


CUDA_12_0 = (50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90)
CUDA_12_9 = (*CUDA_12_0, 100, 101, 103, 120, 121)


@pytest.mark.parametrize(
    ("known", "wanted", "built", "left_out"),
    [
        (CUDA_12_9, None, "8.0 9.0 10.0+PTX 12.0+PTX", ""),
        (CUDA_12_0, None, "8.0 9.0+PTX", "10.0+PTX 12.0+PTX"),
        (CUDA_12_0, "8.6;9.0a", "8.6 9.0a", ""),
        (CUDA_12_9, "12.0f", "12.0f", ""),
        (CUDA_12_0, "8.0+PTX 12.0+PTX", "8.0+PTX", "12.0+PTX"),
        (CUDA_12_0, "9.0 8.0 12.0", "9.0 8.0", "12.0"),
        (CUDA_12_0, "9.0 8.0 12.0+PTX", "9.0+PTX 8.0", "12.0+PTX"),
        (CUDA_12_0, "8.0+PTX 9.0 10.0+PTX", "8.0+PTX 9.0+PTX", "10.0+PTX"),
        (CUDA_12_0, "8.0 8.6 9.0a 10.0+PTX", "8.0 8.6+PTX 9.0a", "10.0+PTX"),
        (CUDA_12_0, "9.0a+PTX 10.0+PTX", "9.0a+PTX 9.0+PTX", "10.0+PTX"),
        (CUDA_12_9, "7.5 8.0 12.0+PTX", "8.0 12.0+PTX", "7.5"),  # an image's, which is also for a T4
    ],
)
def test_what_nvcc_cannot_build_is_left_out(tmp_path, known, wanted, built, left_out):
    """Its newest then gets the PTX that was asked for: later GPUs must find something to run."""
    setup, home = setup_script.load(), toolkit(tmp_path, known)
    kept, rest = setup.buildable(setup.read_archs(wanted or setup.DEFAULT_ARCHS), setup.offered_archs(home))
    assert (" ".join(map(str, kept)), " ".join(map(str, rest))) == (built, left_out)
    subprocess.run([home / "bin" / "nvcc", *setup.gencode(kept), "-c", "kernel.cu"], check=True)


@pytest.mark.parametrize(
    ("archs", "codes"),
    [
        ("9.0 8.0 12.0+PTX", ["compute_80,code=[sm_90,sm_80]", "compute_120,code=[sm_120,compute_120]"]),
        ("8.0 9.0 10.0+PTX 12.0", ["compute_80,code=[sm_80,sm_90]", "compute_100,code=[sm_100,sm_120,compute_100]"]),
        ("9.0a+PTX", ["compute_90a,code=[sm_90a,compute_90a]"]),
        ("8.0 12.0f", ["compute_80,code=[sm_80]", "compute_120f,code=[sm_120f]"]),
    ],
)
def test_gpus_share_the_ptx_of_the_oldest(archs, codes):
    """Kills: C++ compiled to PTX once per GPU, which doubles the build; others given the PTX of 9.0a."""
    setup = setup_script.load()
    assert setup.gencode(setup.read_archs(archs)) == [f"-gencode=arch={code}" for code in codes]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("12.0 7.5 10.0a", "nothing can be built for 12.0 7.5 10.0a; this nvcc can build the kernels for 8.0 8.6 8.7 "),
        ("Ampere", "cannot read 'Ampere'"),
    ],
)
def test_an_arch_list_of_which_nothing_can_be_built_is_an_error(wanted, message):
    setup = setup_script.load()
    with pytest.raises(SystemExit, match=f"TORCH_CUDA_ARCH_LIST: {message}"):
        setup.buildable(setup.read_archs(wanted), set(CUDA_12_0))


def test_what_is_left_out_is_said_and_recorded(checkout, tmp_path):
    code = """
import json, sys, setup
sys.argv = ["setup.py", "--version"]
setup.main()
print(json.dumps(setup.build_record()))"""
    home = toolkit(tmp_path, CUDA_12_0)
    environment = {"CUDA_HOME": str(home), "LORA_KERNELS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "7.5 9.0 12.0+PTX"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    record = json.loads(run.stdout.splitlines()[-1])
    assert record["CUDA"] == "built for 9.0+PTX with Build of_this_test"
    said = record["CUDA, left out"]
    assert said.startswith("7.5: the kernels need 8.0; 12.0+PTX: not known to ")
    assert f"warning: CUDA, left out: {said}" in run.stderr
    assert record["CUDA, wgmma"].startswith("left out: ")
    assert "warning: CUDA, kernels of wgmma left out: " in run.stderr


@pytest.mark.parametrize("in_place", [True, False])
def test_a_build_without_cuda_removes_the_checkouts_cuda_module_only_where_it_replaces_it(checkout, tmp_path, in_place):
    """Kills: a build elsewhere that takes away a module which it does not stand for; one in place that leaves it."""
    code = """
import sys, setup
from pathlib import Path

def build_nothing(command, extension):
    target = Path(command.get_ext_fullpath(extension.name))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.touch()

setup.NinjaBuild.build_extension = build_nothing
sys.argv[0] = "setup.py"
setup.main()"""
    copy = tmp_path / "source"
    shutil.copytree(checkout, copy)
    of_module = [copy / "lora_kernels" / "_cuda.abi3.so", copy / "build" / "kernel_resources.txt"]
    (copy / "build").mkdir(exist_ok=True)
    for path in of_module:
        path.touch()
    where = ["--build-temp", str(tmp_path / "temp"), "--build-lib", str(tmp_path / "lib")]
    run = subprocess.run(
        [sys.executable, "-c", code, "-q", "build_ext", *where, *["--inplace"] * in_place],
        cwd=copy,
        env={**os.environ, "LORA_KERNELS_CUDA": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert (tmp_path / "lib" / "lora_kernels" / "_C.abi3.so").is_file()
    assert [path.exists() for path in of_module] == [not in_place] * 2


@pytest.mark.skipif(shutil.which(AARCH64) is None, reason=f"{AARCH64} is not installed")
def test_the_cpu_extension_compiles_for_arm(monkeypatch, tmp_path):
    setup = setup_script.load()
    monkeypatch.setattr(setup.platform, "machine", lambda: "aarch64")
    headers = [Path(torch.__file__).parent / "include", Path(sysconfig.get_path("include"))]
    compiler = [AARCH64, *setup.CXX_FLAGS, "-O1", *setup.STABLE_ABI, *(f"-I{path}" for path in headers)]
    sources = [ROOT / source for source in setup.sources("_C")]
    assert not {source.name for source in sources} & setup.ISA_FLAGS.keys()
    # A distribution's Python.h may ask for the target's own pyconfig.h.
    asked = subprocess.run([*compiler, "-x", "c++", "-fsyntax-only", "-"], input=b"#include <Python.h>")
    if asked.returncode != 0:
        sources = [source for source in sources if "<Python.h>" not in source.read_text()]
    run = subprocess.run([*compiler, "-c", *sources], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    compiled = {path.stem for path in tmp_path.glob("*.o")}
    assert compiled == {source.stem for source in sources} >= {"lora_branch_portable", "lora_linear_cpu"}


PTXAS_LOG = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN2lk4tidyEv' for 'sm_80'
ptxas info    : Function properties for _ZN2lk4tidyEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 512 bytes smem, 504 bytes cmem[0]
ptxas info    : Compile time = 1.0 ms
ptxas info    : Compiling entry function '_ZN2lk6spillsEv' for 'sm_90a'
ptxas info    : Function properties for _ZN2lk6spillsEv
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 504 bytes cmem[0]
"""


def test_kernel_resources_are_read_and_tabulated():
    uses = kernel_resources(PTXAS_LOG)
    assert uses == [("_ZN2lk4tidyEv", "sm_80", 168, 0, 512), ("_ZN2lk6spillsEv", "sm_90a", 255, 24, 0)]
    table = resource_table(uses, {"_ZN2lk4tidyEv": (256, 1024)}).splitlines()
    assert table[0].split()[:6] == ["registers", "stack+spills", "threads", "shared", "blocks/SM", "arch"]
    assert table[1].split()[:6] == ["168", "0", "256", "1536", "1", "sm_80"]
    assert table[2].split()[:6] == ["255", "24", "?", "?", "?", "sm_90a"]


def test_spills_stop_a_strict_build_only(monkeypatch, capsys):
    setup = setup_script.load()
    uses = setup.kernels_in(PTXAS_LOG)
    monkeypatch.setenv("LORA_KERNELS_STRICT", "1")
    setup.check_spills(uses[:1])
    with pytest.raises(SystemExit, match=r"spilled.* by .*spills.* \(sm_90a\)"):
        setup.check_spills(uses)
    monkeypatch.delenv("LORA_KERNELS_STRICT")
    setup.check_spills(uses)
    assert "warning: registers are spilled" in capsys.readouterr().err


@pytest.mark.parametrize("code", [7508, 7510, 7512, 7519, 7520])
def test_wgmma_that_waits_for_itself_stops_any_build(code):
    """Kills: a kernel of wgmma that is right and no faster than those it is to replace; C7519 is harmless."""
    check, log = setup_script.load().check_wgmma, f"ptxas info    : (C{code}) Potential Performance Loss: wgmma in f"
    if code == 7519:
        return check(log, [])
    with pytest.raises(SystemExit, match=f"C{code}"):
        check(log, [])


def test_spills_in_kernels_of_wgmma_stop_any_build():
    setup = setup_script.load()
    uses = setup.kernels_in(PTXAS_LOG)
    setup.check_wgmma(PTXAS_LOG, uses[:1])
    with pytest.raises(SystemExit, match="spills registers"):
        setup.check_wgmma(PTXAS_LOG, uses)


@pytest.mark.parametrize(
    ("version", "archs", "problem"),
    [
        (13000, "8.0 9.0+PTX", ""), (12000, "9.0a", ""), (11080, "9.0", "older than CUDA 12.0"),
        (13000, "8.0 10.0", "9.0 is not built for"),
    ],
)  # fmt: skip
def test_kernels_of_wgmma_are_for_sm_90a_alone(tmp_path, version, archs, problem):
    setup = setup_script.load()
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime_api.h").write_text(f"#define CUDART_VERSION  {version}\n")
    assert problem in (found := setup.wgmma_problem(tmp_path, setup.read_archs(archs)))
    assert bool(found) == bool(problem)


def test_files_of_wgmma_have_their_own_architecture(tmp_path):
    """Kills: sm_90a asked of every file, whose compile times it would add to; the files' not being left out."""
    code = """
import pathlib, setuptools, setup
setup.WGMMA_PROBLEM = __PROBLEM__
text = setup.NinjaBuild(setuptools.Distribution()).ninja_file(setup.extension("_cuda"), pathlib.Path("there.so"))
print(text)"""
    environment = {
        **os.environ, "CUDA_HOME": str(toolkit(tmp_path, CUDA_12_0)), "LORA_KERNELS_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": "8.0 9.0",
    }  # fmt: skip
    for left_out in (False, True):
        command = [sys.executable, "-c", code.replace("__PROBLEM__", repr("too old" if left_out else ""))]
        text = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
        archs = dict(re.findall(r"build (\S+)\.cu\.o: nvcc .*\n  extra = (.*)", text))
        of_wgmma = {name for name, flags in archs.items() if flags == "-gencode=arch=compute_90a,code=[sm_90a]"}
        assert of_wgmma == {name for name in archs if "wgmma" in name}
        assert bool(of_wgmma) != left_out
        assert ("-DLK_NO_WGMMA" in text) == left_out
        assert len({flags for name, flags in archs.items() if name not in of_wgmma}) == 1


@pytest.mark.parametrize("log", ["", PTXAS_LOG.replace("bytes stack frame", "bytes of stack", 1)])
def test_output_of_ptxas_that_cannot_be_read_stops_a_strict_build(monkeypatch, capsys, log):
    monkeypatch.setenv("LORA_KERNELS_STRICT", "1")
    with pytest.raises(SystemExit, match="cannot be read"):
        setup_script.load().kernels_in(log)
    monkeypatch.delenv("LORA_KERNELS_STRICT")
    assert setup_script.load().kernels_in(log) == []
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.skipif(_native.cuda is None, reason=f"lora_kernels._cuda: {_native.cuda_error}")
@pytest.mark.skipif(not KERNEL_TABLE.is_file(), reason="lora_kernels was not built in this checkout")
def test_every_built_kernel_is_in_the_table_with_its_occupancy():
    lines = KERNEL_TABLE.read_text().splitlines()[1:]
    assert {line.split(maxsplit=6)[6] for line in lines} == set(map(readable, _native.cuda.kernels()))
    assert all(int(line.split()[4]) >= 1 for line in lines)


@pytest.mark.parametrize(
    ("gpus", "archs"), [("", "8.0 9.0+PTX"), ("8.6", "8.0 9.0+PTX"), ("12.0\n9.0\n12.0", "8.0 9.0+PTX 12.0")]
)
def test_make_builds_for_a_newer_gpu_that_is_there(tmp_path, gpus, archs):
    """Kills: machine code for it left to the driver, or asked for twice where two such GPUs are."""
    if shutil.which("make") is None or not (ROOT / "Makefile").is_file():
        pytest.skip("needs make and a checkout")
    listing = tmp_path / "nvidia-smi"
    listing.write_text(f"#!/bin/sh\nprintf '%s\\n' '{gpus}'\n")
    listing.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}  # and nothing that `make test` hands down
    command = ["make", "-n", "build", f"VENV={tmp_path / 'venv'}"]
    printed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    (asked,) = re.findall(r"TORCH_CUDA_ARCH_LIST:-(.*?)}", printed)
    assert asked.split() == archs.split()


def test_ci_builds_for_all_that_wheels_are_for():
    script = ROOT / ".ci" / "run"
    if not script.is_file():
        pytest.skip("needs a checkout")
    assert f'TORCH_CUDA_ARCH_LIST="{setup_script.load().DEFAULT_ARCHS}" make test' in script.read_text()
