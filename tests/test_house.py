"""The house: imports run one way, some folders know no torch, PTX stands in one place, no list names every op."""

import ast
import re
from pathlib import Path

import pytest

from lora_kernels import dispatch
from lora_kernels.cli.plan import PLANNED_OPS

ROOT = Path(__file__).parents[1]
FLOORS = (
    # From the bottom. What stands on a floor imports from lower floors, and within its package without circles.
    ("_version", "reasons", "precision", "philox", "architectures", "text", "class_swaps"),
    ("_native", "spec", "plain", "report", "measured"),
    ("formats",),
    ("dispatch",),
    ("triton_kernels",),
    ("support",),
    ("ops",),
    ("functional",),
    ("frozen_linears",),
    ("operands",),
    ("modules",),
    ("adapters", "integrations"),
    ("verification",),
    ("",),  # lora_kernels/__init__.py: the public names
    ("benchmarks",),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
TORCH_FREE = ("config", "cpu", "formats", "kernels", "launch", "params", "plan", "ptx")
INCLUDES_TORCH = re.compile(r"#include\s*[<\"](torch|ATen|c10)/")
STATES_PTX = re.compile(r"\basm\b")

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the sources are not here: an installed package")


def sources() -> dict[str, str]:
    """The package's modules by name, and their text."""
    files = [*ROOT.glob("lora_kernels/**/*.py"), *ROOT.glob("triton_kernels/*.py")]
    names = {}
    for file in files:
        parts = file.relative_to(ROOT).with_suffix("").parts
        if "triton_kernels" in parts:
            parts = ("lora_kernels", *parts[parts.index("triton_kernels") :])
        names[".".join(part for part in parts if part != "__init__")] = file.read_text()
    return names


def imports(name: str, text: str, modules: set[str], is_package: bool) -> set[str]:
    """The modules of the package that ``name`` imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".") if is_package else name.split(".")[:-1]
            start = ".".join(base[: len(base) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (start, node.module)))
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                found.add(whole if whole in modules else module)
    return (found & modules) - {name}


def graph(texts: dict[str, str]) -> dict[str, set[str]]:
    packages = {name.rpartition(".")[0] for name in texts}
    return {name: imports(name, text, set(texts), name in packages) for name, text in texts.items()}


def floor(module: str) -> int:
    return FLOOR[module.removeprefix("lora_kernels").lstrip(".").partition(".")[0]]


def upward(arrows: dict[str, set[str]]) -> list[str]:
    """Imports from a higher floor, or between rooms of one floor."""
    found = []
    for name, targets in arrows.items():
        for target in targets:
            same_room = name.split(".")[1:2] == target.split(".")[1:2]
            if not same_room and floor(target) >= floor(name):
                found.append(f"{name} -> {target}")
    return sorted(found)


def circles(arrows: dict[str, set[str]]) -> list[str]:
    """Modules that import themselves in the end. A package's ``__init__`` that lists its parts' names is none."""
    packages = {name.rpartition(".")[0] for name in arrows}
    left = {name: {t for t in targets if t not in packages} for name, targets in arrows.items() if name not in packages}
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def test_every_room_has_a_floor():
    rooms = {name.split(".")[1] if "." in name else "" for name in sources()}
    assert rooms == FLOOR.keys()


def test_imports_run_one_way():
    arrows = graph(sources())
    # The commands are users of the package; what measures is, too. Modules below name neither.
    assert upward(arrows) == []
    assert circles(arrows) == []


@pytest.mark.parametrize(
    ("module", "line", "found"),
    [
        ("lora_kernels.modules.lora", "from ..integrations.peft import patch", "integrations.peft"),
        ("lora_kernels.dispatch", "def f():\n    from .ops import lora_linear", "ops.lora_linear"),
        ("lora_kernels.adapters.files", "import lora_kernels.integrations.peft.linear", "integrations.peft.linear"),
        ("lora_kernels.report", "from .plain import FLOATS", "plain"),
    ],
)
def test_a_planted_import_is_found(module, line, found):
    texts = sources()
    texts[module] += f"\n{line}\n"
    assert upward(graph(texts)) == [f"{module} -> lora_kernels.{found}"]


def test_a_planted_circle_is_found():
    texts = sources()
    texts["lora_kernels.functional.checks"] += "\nfrom .dora import dora_linear\n"
    assert "lora_kernels.functional.checks" in circles(graph(texts))


def test_kernels_know_no_torch():
    files = [file for folder in TORCH_FREE for file in ROOT.glob(f"csrc/{folder}/**/*") if file.is_file()]
    assert len({file.parent for file in files}) >= len(TORCH_FREE)
    assert [str(file) for file in files if INCLUDES_TORCH.search(file.read_text())] == []
    # The build reads what nvcc offers and says without torch, too.
    architectures = ast.parse((ROOT / "lora_kernels/architectures.py").read_text())
    names = [alias.name for node in ast.walk(architectures) if isinstance(node, ast.Import) for alias in node.names]
    assert "torch" not in names


def test_ptx_stands_in_its_headers():
    files = [file for file in ROOT.glob("csrc/**/*") if file.is_file()]
    code = {file: re.sub(r"//.*", "", file.read_text()) for file in files}
    stated = {file.parent.relative_to(ROOT / "csrc").parts for file, text in code.items() if STATES_PTX.search(text)}
    # The emulator's own: switching stacks.
    assert stated - {("emu",)} == {("ptx",)}


def test_no_list_of_ops():
    """A file that names most ops is one that the next op must touch; the public names are the exception."""
    ops = {name for name in dispatch.specs() if not name.endswith("_backward")}
    assert len(ops) >= 6
    shared = [*ROOT.glob("lora_kernels/**/*.py"), *ROOT.glob("triton_kernels/*.py"), *ROOT.glob("csrc/**/*")]
    shared += [ROOT / "setup.py", ROOT / "Makefile", ROOT / "pyproject.toml"]
    lists = {}
    for file in shared:
        if file.is_file():
            text = file.read_text()
            named = {op for op in ops if re.search(rf"\b{op}\b", text)}
            if len(named) > len(ops) // 2:
                lists[str(file.relative_to(ROOT))] = sorted(named)
    allowed = {"lora_kernels/__init__.py", "lora_kernels/functional/__init__.py"}
    assert lists.keys() <= allowed, lists


def test_an_op_is_planned_by_files_of_its_own():
    """``lora-kernels plan``: an op that the command named itself, or one planned in C++ that it missed, would show."""
    planners = {}
    for file in ROOT.glob("csrc/plan/*.cpp"):
        planners |= {op: file.stem for op in re.findall(r"\bPyObject\* plan_(\w+)\(", file.read_text())}
    assert {op: plan.problem.__module__.rpartition(".")[2] for op, plan in PLANNED_OPS.items()} == planners
    command = ROOT / "lora_kernels/cli/plan"
    for file in (file for file in command.glob("*.py") if file.stem not in planners.values()):
        assert [op for op in dispatch.specs() if re.search(rf"\b{op}\b", file.read_text())] == [], file.name
