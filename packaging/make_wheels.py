"""``make wheel``: the wheels of a release, checked, and tried in environments that have nothing to build with.

    python packaging/make_wheels.py [--out dist] [--torch SPEC] cpu cuda

Two wheels of one version need two names. They differ as torch's do, in the version's local part: 0.2.0+cpu and
0.2.0+cu130, where the toolkit is 13.0. ``lora_kernels==0.2.0`` asks for either, ``pip list`` tells which is there, and
of a folder or an index with both pip takes the one with CUDA, which serves CPUs too. PyPI takes no local versions.

Each is built by ``setup.py`` over the objects of ``make build``, strictly (no kernel may spill registers); its use of
Python's C API is held against its tag by abi3audit; auditwheel names the oldest glibc that it runs with. pip installs
it into a fresh environment, where ``smoke.py`` runs without a compiler. Torch is lent to it by a .pth file that names
the folder of the one that this runs with (what an editable install hooks in there is not followed); with --torch, pip
installs one, and nothing is lent. Only then a wheel is put into dist.
"""

from __future__ import annotations

import argparse
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("cpu", "cuda")
MOST_BYTES = 60 << 20
# Torch has them, and has loaded them before ours are. CUDA's runtime is linked in; its driver comes with the GPU.
OF_TORCH = ("libtorch.so", "libtorch_cpu.so", "libc10.so")


def run(*command: object, cwd: Path | None = None, environment: dict[str, str] | None = None) -> None:
    """A command that must succeed, with this environment's programs before others."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    words = [str(word) for word in command]
    finished = subprocess.run(words, cwd=cwd, env={**os.environ, "PATH": path, **(environment or {})})
    if finished.returncode != 0:
        raise SystemExit(f"{' '.join(words)}: exit status {finished.returncode}")


def local_version(kind: str) -> str:
    """cpu, or cu130 for a toolkit of CUDA 13.0."""
    if kind == "cpu":
        return kind
    os.environ["LORA_KERNELS_CUDA"] = "1"  # without nvcc setup.py says where it has looked, and stops
    setup = runpy.run_path(str(ROOT / "setup.py"))
    version = setup["toolkit_version"](setup["CUDA_HOME"])
    return f"cu{version // 1000}{version % 1000 // 10}"


def build(kind: str, local: str, scratch: Path) -> Path:
    """The wheel as setup.py makes it, under the platform's own name."""
    # A build folder of its own, lest a module of another kind is taken along; objects are the same for both.
    folders = f"[build]\nbuild_base = {scratch}\nbuild_temp = {ROOT / 'build' / 'objects'}\n"
    names = f"[egg_info]\negg_base = {scratch}\ntag_build = +{local}\n"
    (scratch / "setup.cfg").write_text(folders + names)
    wanted = {"LORA_KERNELS_CUDA": str(int(kind == "cuda")), "LORA_KERNELS_STRICT": "1"}
    wanted["DIST_EXTRA_CONFIG"] = str(scratch / "setup.cfg")  # options, which commands that run twice keep
    hook = f"import setuptools.build_meta as m; m.build_wheel({str(scratch)!r}, {{'quiet': 'yes'}})"
    run(sys.executable, "-c", hook, cwd=ROOT, environment=wanted)
    (wheel,) = scratch.glob("*.whl")
    return wheel


def repair(wheel: Path, scratch: Path) -> Path:
    """The wheel under the name of the oldest platform that it runs on."""
    excluded = [option for library in OF_TORCH for option in ("--exclude", library)]
    run("auditwheel", "repair", *excluded, "--wheel-dir", scratch / "repaired", wheel)
    (repaired,) = (scratch / "repaired").glob("*.whl")
    if "-cp310-abi3-manylinux_" not in repaired.name:
        raise SystemExit(f"{repaired.name} is no wheel for every Python on an old enough Linux")
    size = repaired.stat().st_size
    if size >= MOST_BYTES:
        raise SystemExit(f"{repaired.name} has {size / 2**20:.1f} MiB; at most {MOST_BYTES >> 20} are wanted")
    return repaired


def smoke(wheel: Path, kind: str, scratch: Path, torch: str | None) -> None:
    """Installs the wheel into a fresh environment, and runs smoke.py there with nothing else on the PATH."""
    home = scratch / "environment"
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--python", python, "install"]
    if torch is None:
        site_packages = sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)})
        ours = find_spec("torch")
        if ours is None or ours.origin is None:
            raise SystemExit(f"{sys.executable} has no torch to lend: --torch names one to install")
        Path(site_packages, "lent_torch.pth").write_text(f"{Path(ours.origin).parents[1]}\n")
    run(*pip, *filter(None, [torch]), wheel, cwd=scratch)
    script = Path(shutil.copy(ROOT / "packaging" / "smoke.py", scratch))
    alone = {"PATH": str(home / "bin"), "HOME": str(scratch)}
    tried = subprocess.run([python, script, kind], cwd=scratch, env=alone)
    if tried.returncode != 0:
        raise SystemExit(f"{wheel.name} does not work in an empty environment")


def main() -> None:
    parser = argparse.ArgumentParser(description="Build, check and try the wheels of a release.")
    parser.add_argument("kinds", nargs="+", choices=KINDS)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where they go (default: dist)")
    parser.add_argument("--torch", help="what pip installs to try them with (default: the torch of this environment)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for kind, local in {kind: local_version(kind) for kind in options.kinds}.items():
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            built = build(kind, local, scratch)
            run("abi3audit", "--strict", built)
            repaired = repair(built, scratch)
            smoke(repaired, kind, scratch, options.torch)
            wheel = Path(shutil.move(repaired, options.out / repaired.name))
        print(f"{wheel}: {wheel.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
