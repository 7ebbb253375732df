"""Cases of ``lora-kernels bench`` for experts, adapters, packs: what they time, and that wrong results end them."""

import re
from collections import Counter

import pytest
import torch

import lora_kernels as lk
from lora_kernels.benchmarks import adapters, experts, packs
from lora_kernels.benchmarks.cases import BASELINE, OURS, WrongResult
from lora_kernels.cli import main

CPU = torch.device("cpu")


def make_experts():
    return experts.make_case(CPU, 4, 24, 12, 2, tokens=10, rank=3)


def make_adapters(what="decode"):
    return adapters.make_case(CPU, 2, what=what, blocks=1)


def make_pack(what="decode"):
    return packs.make_case(CPU, "q, k", 24, (16, 8), 3, what=what)


def served(step):
    lk.reset_stats()
    step()
    counts = Counter()
    for (op, _), n in lk.stats()["served"].items():
        counts[op] += n
    assert lk.stats()["fallback"] == {}
    return counts


def test_experts():
    case = make_experts()
    assert served(case.steps[BASELINE]) == served(case.steps[experts.FROZEN]) == served(case.steps[experts.LOOP]) == {}
    assert served(case.steps[OURS]) == {"grouped_lora_linear": 2, "grouped_lora_linear_backward": 2}
    assert case.schedules()["gate_up"]
    assert set(case.forwards) == {experts.FROZEN, BASELINE, OURS}


@pytest.mark.parametrize("what", ["decode", "forward+backward"])
def test_adapters(what):
    case = make_adapters(what)
    layers = len(adapters.SIZES)
    with case.within():
        assert served(case.steps[BASELINE]) == {}
        one, ours = served(case.steps[adapters.ONE]), served(case.steps[OURS])
    backward = what != "decode"
    assert one == Counter({"lora_linear": layers, "lora_linear_backward": layers * backward})
    assert ours == Counter({"multi_lora_linear": layers, "multi_lora_linear_backward": layers * backward})


@pytest.mark.parametrize("what", ["decode", "forward+backward"])
def test_packs(what):
    case, backward = make_pack(what), what != "decode"
    with case.within():
        assert served(case.steps[BASELINE]) == {}
        apart, ours = served(case.steps[packs.APART]), served(case.steps[OURS])
    assert apart == Counter({"lora_linear": 2, "lora_linear_backward": 2 * backward})
    assert ours == Counter({"lora_pack": 1, "lora_pack_backward": 1 * backward})


@pytest.mark.parametrize("make", [make_experts, make_adapters, make_pack])
def test_wrong_results_are_not_timed(make, monkeypatch):
    patch = lk.patch

    def spoiling(model):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter[0] += 0.1
        return patch(model)

    monkeypatch.setattr(lk, "patch", spoiling)
    with pytest.raises(WrongResult):
        make()


def test_a_quick_run_takes_a_few_cases_and_says_what_served_them(capsys):
    assert main(["bench", "decode", "pack", "--quick", "--pairs", "3", "--threads", "1", "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    table, chosen = printed.out.split("chosen here:")
    assert re.findall(r"^(decode|pack): .*PEFT / fused", printed.err, re.MULTILINE) == ["decode"] * 2 + ["pack"] * 2
    cases = re.findall(r"^  (\w+): .*: (\w+) on (\w+)", chosen, re.MULTILINE)
    assert [level for level, *_ in cases] == ["decode"] * 2 + ["pack"] * 2
    assert {(op, backend) for _, op, backend in cases} == {("lora_linear", "cpu"), ("lora_pack", "cpu")}
    assert chosen.count("forward: cpu, ") == 2, "the schedule, and its reason"
    assert "null: PEFT again" in table
