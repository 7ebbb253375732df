"""How wheels come about (packaging/): which torch pip builds against, and what `make wheel` lets through."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import setup_script
import setuptools
import torch

import lora_kernels as lk

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def packaging(monkeypatch):
    """A module of packaging/ by name, fresh."""
    monkeypatch.syspath_prepend(ROOT / "packaging")

    def load(name):
        for loaded in ("build_backend", "installed_torch", "make_wheels"):
            monkeypatch.delitem(sys.modules, loaded, raising=False)
        return __import__(name)

    return load


@pytest.fixture
def backend(packaging, monkeypatch):
    """The build backend where no torch can be imported, with a function that installs one of a version, or hides it."""
    module = packaging("build_backend")
    monkeypatch.setattr(module.build_meta, "get_requires_for_build_wheel", lambda settings: ["of setuptools"])
    monkeypatch.setattr(module.build_meta, "get_requires_for_build_editable", lambda settings: ["of setuptools"])
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if not (Path(folder) / "torch").exists()])
    monkeypatch.setattr(module.installed_torch.site, "getsitepackages", lambda: [])
    monkeypatch.setattr(sys, "prefix", sys.base_prefix + "/of a venv")
    return module


def put_torch(folder, version):
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text("raise AssertionError('imported')\n")
    (folder / "torch" / "version.py").write_text(f"__version__ = {version!r}\n")


HOOKS = ("get_requires_for_build_wheel", "get_requires_for_build_editable")


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("how", ["in it", "by a .pth file"])
def test_an_installed_torch_is_built_against_and_none_is_downloaded(backend, monkeypatch, tmp_path, hook, how):
    """Kills: the newest torch of the index, downloaded beside the one that is installed, to which pip has shut off."""
    site_packages = tmp_path / "site-packages"
    site_packages.mkdir()
    put_torch(site_packages if how == "in it" else tmp_path / "elsewhere", "2.10.0a0+git")
    if how == "by a .pth file":
        (site_packages / "torch.pth").write_text(f"{tmp_path / 'elsewhere'}\n")
    monkeypatch.setattr(backend.installed_torch.site, "getsitepackages", lambda: [str(site_packages)])
    before = sys.path[:]
    assert getattr(backend, hook)() == ["of setuptools"]
    assert sys.path == before, "other packages of the environment stay hidden"
    found = backend.installed_torch.find()
    assert found.version == "2.10.0a0+git"
    assert str(found.folder.parent) in found.path


@pytest.mark.parametrize("hook", HOOKS)
def test_a_torch_that_is_too_old_is_not_replaced_by_a_build(backend, monkeypatch, tmp_path, hook):
    put_torch(tmp_path, "2.9.1+cu128")
    monkeypatch.setattr(backend.installed_torch.site, "getsitepackages", lambda: [str(tmp_path)])
    with pytest.raises(SystemExit, match=r"needs torch >= 2\.10, and 2\.9\.1\+cu128 is installed in "):
        getattr(backend, hook)()


@pytest.mark.parametrize("hook", HOOKS)
def test_where_pip_knows_of_no_torch_it_is_asked_for_one(backend, hook):
    """It comes anyway: lora_kernels depends on it."""
    assert getattr(backend, hook)() == ["torch>=2.10", "of setuptools"]


@pytest.mark.parametrize("hook", HOOKS)
def test_an_environment_made_for_the_build_says_that_it_hides_torch(backend, monkeypatch, hook):
    """Kills: `python -m build` and uv, which download another torch, as nobody can know which one is installed."""
    monkeypatch.setattr(sys, "prefix", str(Path(setuptools.__file__).parents[1]))
    with pytest.raises(SystemExit) as stopped:
        getattr(backend, hook)()
    assert sys.prefix in str(stopped.value)
    assert "pip install --no-build-isolation ." in str(stopped.value)
    assert "python -m build --no-isolation" in str(stopped.value)


def test_a_process_that_pip_isolates_finds_the_installed_torch(tmp_path):
    """As pip does: the tools in a folder of their own, and a sitecustomize that takes the interpreter's away."""
    tools = Path(setuptools.__file__).parents[1]
    for tool in (*tools.glob("setuptools*"), tools / "_distutils_hack"):
        (tmp_path / tool.name).symlink_to(tool)
    (tmp_path / "sitecustomize.py").write_text(
        "import site, sys\nsys.path = [p for p in sys.path if p not in site.getsitepackages()]\n"
    )
    (tmp_path / "setup.cfg").write_text(f"[egg_info]\negg_base = {tmp_path}\n")
    code = """
import importlib.util, sys
assert importlib.util.find_spec("torch") is None
sys.path.insert(0, "packaging")
import build_backend, installed_torch
print(build_backend.get_requires_for_build_wheel(), installed_torch.find().version, "torch" in sys.modules)"""
    of_pip = {"PYTHONPATH": str(tmp_path), "PYTHONNOUSERSITE": "1", "DIST_EXTRA_CONFIG": str(tmp_path / "setup.cfg")}
    environment = {**os.environ, **of_pip, "LORA_KERNELS_CUDA": "0"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == f"[] {torch.__version__} False"


def test_the_oldest_torch_is_the_same_everywhere(packaging):
    major, minor = packaging("installed_torch").OLDEST_TORCH
    assert f'"torch>={major}.{minor}"' in (ROOT / "pyproject.toml").read_text()
    assert f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000" in setup_script.load().STABLE_ABI
    assert lk.build_info()["oldest torch"] == f"{major}.{minor}"


@pytest.mark.parametrize(("header", "local"), [("13000", "cu130"), ("12090", "cu129"), ("12040", "cu124")])
def test_wheels_with_cuda_are_named_after_the_toolkit(packaging, monkeypatch, tmp_path, header, local):
    """Kills: two wheels of one version and name."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho compute_80\n")
    nvcc.chmod(0o755)
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime_api.h").write_text(f"#define CUDART_VERSION  {header}\n")
    for name, value in (("CUDA_HOME", str(tmp_path)), ("LORA_KERNELS_CUDA", ""), ("TORCH_CUDA_ARCH_LIST", "")):
        monkeypatch.setenv(name, value)
    make_wheels = packaging("make_wheels")
    assert make_wheels.local_version("cuda") == local
    assert make_wheels.local_version("cpu") == "cpu"


@pytest.mark.parametrize(
    ("tags", "size", "message"),
    [
        ("cp310-abi3-manylinux_2_34_x86_64", 60 << 20, "has 60.0 MiB"),
        ("cp310-abi3-linux_x86_64", 1, "no wheel for every Python"),
        ("cp311-cp311-manylinux_2_34_x86_64", 1, "no wheel for every Python"),
        ("cp310-abi3-manylinux_2_34_x86_64", (60 << 20) - 1, None),
    ],
)
def test_a_wheel_that_is_large_or_for_few_is_not_let_through(packaging, monkeypatch, tmp_path, tags, size, message):
    make_wheels = packaging("make_wheels")

    def auditwheel(*command, **_):
        assert command[:2] == ("auditwheel", "repair")
        repaired = tmp_path / "repaired" / f"lora_kernels-0.2.0+cpu-{tags}.whl"
        repaired.parent.mkdir()
        with repaired.open("wb") as file:
            file.truncate(size)

    monkeypatch.setattr(make_wheels, "run", auditwheel)
    if message is None:
        assert make_wheels.repair(tmp_path / "built.whl", tmp_path).stat().st_size == size
    else:
        with pytest.raises(SystemExit, match=message):
            make_wheels.repair(tmp_path / "built.whl", tmp_path)


def test_nothing_is_bundled_that_torch_has(packaging):
    """Kills: a copy of libtorch in the wheel, which would be another one than torch's."""
    links = set(re.findall(r"-ltorch\w*", (ROOT / "setup.py").read_text()))
    assert {f"lib{link.removeprefix('-l')}.so" for link in links} <= set(packaging("make_wheels").OF_TORCH)
