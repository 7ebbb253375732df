"""``lora-kernels doctor``: every row of what is known to go wrong, what was built and cannot serve, and who serves."""

import json
import re
from pathlib import Path

import pytest
import torch

import lora_kernels as lk
from lora_kernels import _native
from lora_kernels.cli import _conflicts, _machine, doctor, info, main
from lora_kernels.cli._conflicts import CONFLICTS, OLDEST, Installation
from lora_kernels.formats import LAYOUTS
from lora_kernels.functional.why import _BINDERS, examples

ROOT = Path(__file__).parents[1]
GOOD = {"torch": "2.13.0", "triton": "3.7.0", "transformers": "5.20.0", "peft": "0.21.2", "numpy": "2.3.1"}


def here(flags=(), gpu=False, **versions) -> Installation:
    """An installation in which nothing is wrong, but for what is planted."""
    return Installation({**GOOD, **versions}, frozenset(flags), gpu)


def applying(installation: Installation) -> list[str]:
    return [conflict.what for conflict in CONFLICTS if conflict.applies(installation)]


def test_nothing_goes_wrong_where_nothing_is_planted():
    assert applying(here()) == []
    assert applying(Installation({})) == []


ROWS = {
    # Of each row: an installation to which it applies, and the nearest ones to which it does not.
    "torch older": (here(torch="2.9.1+cu128"), [here(torch="2.10.0"), here(torch="2.10.0a0+git1")]),
    "peft older": (here(peft="0.17.1"), [here(peft="0.18.0"), here(peft=None)]),
    "transformers older": (here(transformers="4.57.1"), [here(transformers="5.0.0rc1"), here(transformers="5")]),
    "triton older": (here(triton="3.5.1", gpu=True), [here(triton="3.6.0", gpu=True), here(triton="3.5.1")]),
    "bitsandbytes older": (here(bitsandbytes="0.45.5"), [here(bitsandbytes="0.46.0")]),
    "torchao older": (here(torchao="0.14.1"), [here(torchao="0.15.0")]),
    "PEFT 0.21.2 under": (
        here(transformers="5.24.0"),
        [
            here(transformers="5.23.1"),
            here(transformers="5.24.0", peft="0.22.0"),
            here(transformers="5.24.0", peft=None),
        ],
    ),
    "PEFT 0.21.2 makes": (
        here(transformers="5.24.0"),
        [here(transformers="5.23.1"), here(transformers="5.24.0", peft=None)],
    ),
    "bitsandbytes on a CPU": (
        here(["avx512_bf16"], bitsandbytes="0.50.0"),
        [here(["avx512f"], bitsandbytes="0.50.0"), here(["avx512_bf16"])],
    ),
    "torch 2.14": (
        here(["amx_bf16"], torch="2.14.1+cu130"),
        [here(["amx_bf16"], torch="2.13.0"), here(["amx_bf16"], torch="2.15.0"), here(torch="2.14.1")],
    ),
    "Triton 3.6": (
        here(triton="3.6.0", numpy="2.4.0"),
        [here(triton="3.7.0", numpy="2.4.0"), here(triton="3.6.0", numpy="2.3.5")],
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_a_conflict_is_seen_where_it_is_planted(row):
    bad, good = ROWS[row]
    assert [what for what in applying(bad) if what.startswith(row)]
    assert [what for installation in good for what in applying(installation) if what.startswith(row)] == []


def test_every_row_is_tried_and_says_what_to_do():
    assert len(CONFLICTS) == len(ROWS)
    for conflict in CONFLICTS:
        assert sum(conflict.what.startswith(row) for row in ROWS) == 1
        assert conflict.remedy
        assert re.match(r"lora-kernels (verify|check-gpu)|pytest tests/\w+\.py|python -c ", conflict.proof)
        for file in re.findall(r"tests/\w+\.py", conflict.proof):
            assert (ROOT / file).is_file()


@pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="an installed package")
def test_the_oldest_versions_are_those_of_the_package():
    text = (ROOT / "pyproject.toml").read_text()
    declared = dict(re.findall(r'"(torch|peft|transformers|triton|bitsandbytes|torchao)>=([\d.]+)', text))
    assert declared == OLDEST


@pytest.mark.parametrize(
    ("bigger", "smaller"), [("2.10", "2.9.1"), ("5", "4.57.1"), ("2.14.1+cu130", "2.14.0+cu132"), ("3.6.0", "3.5.99")]
)
def test_versions_are_compared_as_numbers(bigger, smaller):
    assert _conflicts.numbers(bigger) > _conflicts.numbers(smaller)
    assert _conflicts.numbers("5") == _conflicts.numbers("5.0.0+x")


# --------------------------------------------------------------------------------------- built, but of no use


def backends(**details) -> dict[str, dict[str, object]]:
    return {
        name: {"available": detail is None, "detail": detail or name}
        for name, detail in ({"cpu": None, "cuda": None} | details).items()
    }


CPU, GPU = {"gpus": [], "driver": None}, {"gpus": ["a GPU"], "driver": "580.1"}
UNSEEN = {"gpus": [], "driver": "580.1"}
BUILT = {"C++": "built with g++", "CUDA": "built for 80 90 with nvcc"}


@pytest.mark.parametrize(
    ("build", "status", "machine", "wrong"),
    [
        (BUILT, backends(), GPU, []),
        (BUILT, backends(cuda="loads, but torch sees no CUDA device"), CPU, []),
        (BUILT, backends(cuda="loads, but torch sees no CUDA device"), UNSEEN, ["CUDA"]),
        (BUILT, backends(cuda="failed to load: undefined symbol"), CPU, ["CUDA"]),
        (BUILT, backends(cuda=f"loads, but: {lk.Reason.DRIVER}"), GPU, ["CUDA"]),
        (BUILT, backends(cpu="failed to load: libtorch"), CPU, ["C++"]),
        (BUILT, backends(cpu="failed", cuda="failed to load: x"), GPU, ["C++", "CUDA"]),
        ({"built": "nothing"}, backends(cpu="extension not built", cuda="extension not built"), GPU, []),
        ({**BUILT, "CUDA": "not built: no nvcc"}, backends(cuda="extension not built"), GPU, []),
    ],
)
def test_what_was_built_and_cannot_serve(build, status, machine, wrong):
    found = doctor.cannot_serve(build, status, machine)
    assert [line.partition(" was ")[0] for line in found] == wrong
    assert all(status["cpu" if line.startswith("C++") else "cuda"]["detail"] in line for line in found)


def test_what_is_wrong_decides_the_status(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "cannot_serve", lambda *facts: [])
    monkeypatch.setattr(_machine, "version", GOOD.get)
    assert main(["doctor"]) == 0
    assert "Nothing is wrong" in capsys.readouterr().out
    monkeypatch.setattr(_machine, "version", {**GOOD, "peft": "0.17.0"}.get)
    assert main(["doctor"]) == 1
    assert "WRONG: peft older than 0.18" in capsys.readouterr().out
    monkeypatch.setattr(_machine, "version", {**GOOD, "transformers": "5.24.0"}.get)
    assert main(["doctor"]) == 0, "who generates with prompts is concerned, and nobody else"
    shown = capsys.readouterr().out
    assert "applies here: yes  PEFT 0.21.2" in shown
    assert "concerns: generate with prompts" in shown


def test_an_extension_that_does_not_load_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(_machine, "version", GOOD.get)
    monkeypatch.setattr(lk, "build_info", lambda: {"C++": "built with g++ 12", "CUDA": "not built: no nvcc"})
    monkeypatch.setattr(_native, "cpu", None)
    monkeypatch.setattr(_native, "cpu_error", "failed to load: libc10.so: no such file")
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "WRONG: C++ was built with g++ 12, but does not serve: failed to load: libc10.so" in shown
    assert re.search(r"lora_linear +cpu +fp32 bf16 fp16 +reference", shown)


def test_a_backend_that_cannot_be_had_is_wrong(capsys):
    with lk.use_backend("cuda" if not torch.cuda.is_available() else "cpu"):
        assert main(["doctor"]) == 1
        shown = capsys.readouterr().out
        assert re.search(r"lora_linear +\w+ +fp32 bf16 fp16 +none", shown)
        assert re.search(r"WRONG: LORA_KERNELS_BACKEND asks for what cannot serve .*lora_linear.*: they raise", shown)
        assert main(["info"]) == 0
        assert "was asked for" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ the page


def test_the_page_has_every_op_and_format(monkeypatch, capsys):
    monkeypatch.setenv("LORA_KERNELS_WINNERS", "0")
    main(["doctor", "--json"])
    facts = json.loads(capsys.readouterr().out)
    functions = {function for function, _ in _BINDERS}
    assert functions == set(examples()), "each function that `why` knows says what call to ask it about"
    assert {row["op"] for row in facts["ops"]} == functions
    for op in functions:
        asked = " ".join(row["dtypes"] for row in facts["ops"] if (row["op"], row["device"]) == (op, "cpu"))
        assert sorted(asked.split()) == ["bf16", "fp16", "fp32"]
    made = {fmt.layout.name for fmt in lk.FORMATS.values()}
    assert {row["format"] for row in facts["formats"]} == set(lk.FORMATS) | (LAYOUTS.keys() - made)
    assert all(row["backend"] in lk.BACKENDS and row["reason"] for row in (*facts["ops"], *facts["formats"]))
    assert facts["switches"]["LORA_KERNELS_WINNERS"] == "0"
    assert len(facts["conflicts"]) == len(CONFLICTS)
    assert facts["packages"]["torch"] == _machine.version("torch")


def test_the_page_says_why_nobody_faster_serves(monkeypatch):
    monkeypatch.setattr(_native, "cpu", None)
    rows = [row for row in doctor.served_ops() if row["op"] == "lora_linear"]
    assert [(row["dtypes"], row["backend"]) for row in rows if row["device"] == "cpu"] == [
        ("fp32 bf16 fp16", "reference")
    ]
    assert str(lk.Reason.EXTENSION_NOT_BUILT) in rows[0]["reason"]


def test_examples_are_calls_that_the_functions_take():
    """What the page asks about can be called: sizes and dtypes fit."""
    for name, example in examples().items():
        arguments = example(lambda *shape, dtype=torch.float32: torch.zeros(shape, dtype=dtype))
        getattr(lk.functional, name)(*arguments)


def test_flags_of_a_cpu(tmp_path):
    file = tmp_path / "cpuinfo"
    assert doctor.cpu_flags(file) == frozenset()
    file.write_text("processor\t: 0\nflags\t\t: fpu avx2 amx_bf16\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    assert doctor.cpu_flags(file) == {"fpu", "avx2", "amx_bf16"}
    file.write_text("processor\t: 0\nFeatures\t: fp asimd sve\n")
    assert doctor.cpu_flags(file) == {"fp", "asimd", "sve"}


def test_a_backend_is_described_in_short():
    facts = {
        "build": {"C++": "built"},
        "backends": {"triton": {"available": False, "detail": "no GPU; serves a, b, c"}},
    }
    assert info.built(facts)[-1].splitlines()[-1].split() == ["triton", "no", "no", "GPU;", "serves", "3", "ops"]
