"""What only nvcc compiles, csrc/launch/: every launch is on the caller's stream, and no error is lost.

The emulator has launches of its own; that the bindings give them the caller's stream is tested there.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "csrc" / "launch"

pytestmark = pytest.mark.skipif(not LAUNCH.is_dir(), reason="the sources are not here: an installed package")


def functions():
    """(name of the file, parameters, body) of every function that launches a kernel or calls the runtime."""
    found = []
    for file in sorted(LAUNCH.iterdir()):
        text = re.sub(r"//.*", "", file.read_text())
        for match in re.finditer(r"cudaError_t \w+(\([^{;]*\)) \{\n(.*?)\n\}", text, re.DOTALL):
            if "<<<" in match[2] or "launch_variant" in match[2] or "cuda" in match[2].replace("cudaSuccess", ""):
                found.append((file.name, match[1], match[2]))
    return found


FUNCTIONS = functions() if LAUNCH.is_dir() else []
LAUNCHING = [function for function in FUNCTIONS if "<<<" in function[2] or "launch_variant" in function[2]]


def test_launches_are_found():
    assert sum("<<<" in body for *_, body in FUNCTIONS) == 2, "launch_variant's, and that of a kernel without variants"
    assert sum("launch_variant<" in body for *_, body in FUNCTIONS) >= 5


@pytest.mark.parametrize("function", LAUNCHING, ids=lambda f: f[0])
def test_a_launch_is_on_the_callers_stream(function):
    _, parameters, body = function
    assert re.search(r"\bcudaStream_t stream\b", parameters)
    for launch in re.findall(r"<<<(.*?)>>>", body):
        assert launch.rpartition(", ")[2] == "stream", "without a fourth argument it is the default stream"
    for call in re.findall(r"launch_variant<\w+>\((.*?)\);", body, re.DOTALL):
        assert call.rpartition(", ")[2] == "stream"


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f[0])
def test_every_error_is_returned(function):
    _, _, body = function
    for statement in re.split(r"(?<=[;{}])\s+", body):
        if re.search(r"\bcuda[A-Z]\w+\(", statement):
            assert re.match(r"return cuda|const cudaError_t error =", statement), statement
        if "<<<" in statement:
            assert re.search(re.escape(statement) + r"\s*return cudaGetLastError\(\);", body), "a launch's own error"
    if "const cudaError_t error" in body:
        assert re.search(r"const cudaError_t error[^;]*;\s*if \(error != cudaSuccess\) return error;", body)


def test_a_variant_is_launched_as_it_is_described():
    """Kills: shared memory that was not asked for, threads of another variant, more blocks than tickets count."""
    (body,) = [body for name, _, body in FUNCTIONS if name == "variant.h"]
    assert "if (blocks > INT32_MAX) return cudaErrorInvalidValue;" in body
    assert re.findall(r"cudaFuncAttributeMaxDynamicSharedMemorySize, ([\w:]+)\)", body) == ["Variant::kSharedBytes"]
    (launch,) = re.findall(r"<<<(.*?)>>>", body)
    assert launch == "static_cast<unsigned>(blocks), Variant::kThreads, Variant::kSharedBytes, stream"
