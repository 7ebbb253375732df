"""What a wheel must do where it was installed: no checkout, no compiler, and of what is built here nothing but it.

    python smoke.py cpu|cuda

Run by make_wheels.py with the interpreter of a fresh environment.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F

import lora_kernels as lk
from lora_kernels import _native

COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "nvcc", "ninja")


def check_origin(kind: str) -> None:
    """Everything comes from this environment, and the extensions are those that the wheel is to have."""
    found = [compiler for compiler in COMPILERS if shutil.which(compiler)]
    assert not found, f"here are compilers: {found}"
    site_packages = Path(sysconfig.get_path("platlib"))
    expected: dict[str, ModuleType | None] = {"_C": _native.cpu, "_cuda": _native.cuda if kind == "cuda" else None}
    for name, module in expected.items():
        path = site_packages / "lora_kernels" / f"{name}.abi3.so"
        assert path.is_file() == (module is not None), f"{path}: {_native.cpu_error} {_native.cuda_error}"
        assert module is None or Path(module.__file__ or "") == path, f"{module} is not of this environment"
    assert Path(lk.__file__).is_relative_to(site_packages), lk.__file__
    assert lk.build_info()["CUDA"].startswith("built for" if kind == "cuda" else "not built: LORA_KERNELS_CUDA=0")
    if _native.cuda is not None:
        assert _native.cuda.kernels(), "the CUDA extension has no kernels"


def served() -> int:
    """Calls of lora_linear that the C++ extension has answered."""
    return lk.stats()["served"].get(("lora_linear", "cpu"), 0)


def check_layer() -> None:
    """Value and gradients of lora_linear beside plain torch in double, by the extension."""
    x, weight, lora_A, lora_B = (torch.randn(s, dtype=torch.float64) for s in ((37, 72), (53, 72), (5, 72), (53, 5)))
    plain = [tensor.clone().requires_grad_() for tensor in (x, lora_A, lora_B)]
    ours = [tensor.float().requires_grad_() for tensor in (x, lora_A, lora_B)]
    expected = F.linear(plain[0], weight) + 0.5 * F.linear(F.linear(plain[0], plain[1]), plain[2])
    y = lk.lora_linear(ours[0], weight.float(), ours[1], ours[2], scaling=0.5)
    assert served() == 1, lk.stats()
    grad_y = torch.randn_like(expected)
    expected.backward(grad_y)
    y.backward(grad_y.float())
    for got, right in ((y, expected), *((one.grad, other.grad) for one, other in zip(ours, plain))):
        assert got is not None
        assert right is not None
        torch.testing.assert_close(got.double(), right, atol=1e-4, rtol=1e-4)


def check_peft() -> None:
    """A layer of PEFT's, patched, computes what it did."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(72, 53)), LoraConfig(target_modules=["0"], init_lora_weights=False)
    )
    x = torch.randn(37, 72)
    expected = model(x)
    report = lk.patch(model)
    before = served()
    torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
    assert served() == before + 1, f"{report}\n{lk.stats()}"


def check_commands() -> None:
    script = Path(sysconfig.get_path("scripts")) / "lora-kernels"
    for command in ("info", "doctor"):
        run = subprocess.run([script, command], capture_output=True, text=True)
        assert run.returncode == 0, f"lora-kernels {command}:\n{run.stdout}{run.stderr}"


def main() -> None:
    (kind,) = sys.argv[1:]
    check_origin(kind)
    check_layer()
    has_peft = find_spec("peft") is not None
    if has_peft:
        check_peft()
    check_commands()
    version = ".".join(map(str, sys.version_info[:3]))
    print(f"works: Python {version}, torch {torch.__version__}, {'with' if has_peft else 'without'} PEFT")


if __name__ == "__main__":
    main()
