"""``lora-kernels check-gpu`` without a GPU: a dry run over the CPU's backends, with stubs for clocks and processes."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lora_kernels as lk
from lora_kernels.benchmarks import cases, gpu
from lora_kernels.benchmarks.cases import Case, WrongResult
from lora_kernels.benchmarks.measure import EventTimer, GraphTimer, host_timer
from lora_kernels.cli import _machine, check_gpu, main
from lora_kernels.verification import launches

CPU = torch.device("cpu")
SMI = "580.65.06, 1980 MHz, 3201 MHz, 1980 MHz, 120.00 W, 41, 3 %\n"
JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_gpu_sums" name="test_one[a-b]"/>
<testcase classname="tests.test_gpu_sums" name="test_two"><skipped message="no reason"/></testcase>
{}</testsuite></testsuites>"""
FAILED = '<testcase classname="tests.test_gpu_sums" name="test_three[x]"><failure message="1 is\nnot 2"/></testcase>'


@pytest.fixture(autouse=True)
def _hurry(monkeypatch):
    """A CPU's peak memory is found by a profiler; that and collecting garbage take longer than all else here."""
    monkeypatch.setattr(cases, "peak_bytes", lambda step, device: 0)
    monkeypatch.setattr(gc, "collect", lambda: 0)


class Processes:
    """Answers commands as the real ones do; ``answers`` by a word of the command replaces an answer."""

    def __init__(self, answers=None, junit=""):
        self.answers, self.junit, self.commands = answers or {}, junit, []

    def __call__(self, command, environment, limit):
        self.commands.append((list(command), dict(environment)))
        for word, answer in self.answers.items():
            if word in command:
                return answer
        if "pytest" in command:
            (path,) = (part.partition("=")[2] for part in command if part.startswith("--junitxml="))
            with open(path, "w") as file:
                file.write(JUNIT.format(self.junit))
            return _machine.Finished(1 if self.junit else 0, "   12 lora_linear: cuda, ticketed\n", 3.0)
        if "--tool" in command:
            return _machine.Finished(0, "ok  a: cuda, decode\n========= ERROR SUMMARY: 0 errors\n", 4.0)
        return _machine.Finished(0, SMI, 0.1)


def machine(processes=None, found=lambda name: f"/bin/{name}", **changes):
    timer = lambda device: host_timer()  # noqa: E731
    speeds = lambda device, timer: gpu.measure_speeds(device, timer, side=32, copied=1 << 12)  # noqa: E731
    given = {"timers": {gpu.GRAPH: timer, gpu.EAGER: timer}, "speeds": speeds} | changes
    return _machine.Machine(CPU, processes or Processes(), found, **given)


@pytest.fixture
def options(tmp_path):
    tests = tmp_path / "tests"
    tests.mkdir()
    for name in ("test_gpu_sums", "test_gpu_rehearsal", "test_other"):
        (tests / f"{name}.py").touch()
    return argparse.Namespace(
        quick=False, parts=list(check_gpu.PARTS), only=None, write_winners=False, tests=str(tests),
        out=str(tmp_path / "found.json"),
    )  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    """Every kind of case, as small as it can be."""
    pytest.importorskip("peft")
    from lora_kernels.benchmarks import prompts

    small = {"m": 9, "n": 24, "k": 16, "rank": 4}
    monkeypatch.setattr(
        gpu, "LAYERS",
        (gpu.Layer(**small, fp32_adapters=False, quick=True), gpu.Layer(**small, dropout=0.1),
         gpu.Layer(**small, autocast=True)),
    )  # fmt: skip
    monkeypatch.setattr(gpu, "DECODED", (gpu.Layer(**small | {"m": 1}, fp32_adapters=False),))
    monkeypatch.setattr(gpu, "PROMPTS", (("prompt", 3), ("prefix", 3)))
    monkeypatch.setattr(gpu, "PROMPT_HIDDEN", 128)
    monkeypatch.setattr(gpu, "MODEL", gpu.ModelShape(32, 48, 2, 2, 1, 50, 2, 7))
    monkeypatch.setattr(gpu, "ROUNDS", 3)
    monkeypatch.setattr(gpu, "QUICK_ROUNDS", 3)
    monkeypatch.setitem(prompts.SHAPES, 128, (2, 2, 1))
    monkeypatch.setattr(prompts, "VOCABULARY", 50)


def written(options):
    with open(options.out) as file:
        return json.load(file)


# ----------------------------------------------------------------------------------------------- the whole command


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_at_once(capsys, tmp_path):
    out = tmp_path / "found.json"
    assert main(["check-gpu", "--out", str(out)]) == 2
    assert "needs a GPU" in capsys.readouterr().err
    assert not out.exists()


def test_a_dry_run_of_everything(options, tiny, capsys):
    processes = Processes()
    assert check_gpu.check(machine(processes), options) == 0
    found = written(options)
    assert found["failures"] == []
    assert found["environment"]["clocks before"]["driver_version"] == "580.65.06"
    assert found["environment"]["clocks after"]["clocks.sm"] == "1980 MHz"
    assert (found["tests"]["passed"], found["tests"]["failed"], found["tests"]["skipped"]) == (1, 0, 1)
    assert found["tests"]["schedules"] == {"lora_linear: cuda, ticketed": 12}
    assert [found[tool]["calls"] for tool in ("memcheck", "racecheck")] == [1, 1]
    bench = found["bench"]
    assert bench["left_out"] == []
    assert bench["speeds"]["copy"] > 0
    assert bench["speeds"]["products"].keys() == {"bfloat16", "float16"}
    # Three layers, two ways each, and a decoding step, by graph and eagerly; two prompts; three models.
    assert len(bench["results"]) == 2 * (3 * 2 + 1) + 2 + 3
    for result in bench["results"]:
        assert {"PEFT", "fused", "PEFT again"} <= result["seconds"].keys()
        assert result["served"], "which backend served it"
    layer = next(r for r in bench["results"] if r["what"] == "forward+backward" and r["flops"])
    assert layer["schedules"].keys() == {"forward", "backward"}
    assert layer["of product"] > 0
    assert layer["of copy"] > 0
    assert {"addmm", "fused, reference"} <= layer["seconds"].keys()
    assert "0 failed" in capsys.readouterr().out


def test_what_processes_are_asked(options):
    options.parts, processes = ["tests", "sanitizer"], Processes()
    check_gpu.check(machine(processes), options)
    (tests,) = (command for command, _ in processes.commands if "pytest" in command)
    assert [part.rpartition("/")[2] for part in tests if part.endswith(".py")] == ["test_gpu_sums.py"]
    tools = {c[c.index("--tool") + 1]: (c, e) for c, e in processes.commands if "--tool" in c}
    assert tools.keys() == {"memcheck", "racecheck"}
    assert tools["memcheck"][1]["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    assert "PYTORCH_NO_CUDA_MEMORY_CACHING" not in tools["racecheck"][1]
    assert not [c for c, _ in processes.commands if any(p in ("-r", "-pl", "-lgc", "-pm", "-ac") for p in c)]


@pytest.mark.parametrize(
    ("cores", "free", "workers"), [(16, 141, 10), (6, 141, 4), (16, 23.9, 3), (16, 4, 1), (1, 141, 1)]
)
def test_workers_are_as_many_as_cores_and_memory_allow(options, monkeypatch, cores, free, workers):
    """Kills: workers are counted by cores alone, and run out of a small GPU's memory."""
    pytest.importorskip("xdist")
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * 2**30), 0))
    processes = Processes()
    gpu_machine = dataclasses.replace(machine(processes), device=torch.device("cuda", 0))
    check_gpu.run_tests(gpu_machine, Path(options.tests), False, 1.0)
    ((command, _),) = processes.commands
    assert command[command.index("-n") + 1] == str(workers)


def test_clocks_are_read_of_the_card_that_is_tested(monkeypatch):
    """Kills: nvidia-smi, which numbers every card of the machine, is asked by torch's number."""
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"0a1b-{device.index}")
    )
    processes = Processes()
    second = dataclasses.replace(machine(processes), device=torch.device("cuda", 1))
    assert _machine.clocks(second)["clocks.sm"] == "1980 MHz"
    ((command, _),) = processes.commands
    assert [part for part in command if "--id" in part] == ["--id=GPU-0a1b-1"]


def test_a_quick_run_is_a_part_of_it(options, tiny):
    options.quick = True
    processes = Processes()
    assert check_gpu.check(machine(processes), options) == 0
    found = written(options)
    assert "racecheck" not in found
    assert "-k" in next(c for c, _ in processes.commands if "pytest" in c)
    names = [r["name"] for r in found["bench"]["results"]]
    assert 0 < len(names) < 10


def test_failed_tests_are_reported_with_what_shows_them_again(options, capsys):
    options.parts = ["tests"]
    assert check_gpu.check(machine(Processes(junit=FAILED)), options) == 1
    (failure,) = written(options)["failures"]
    assert failure["message"] == "1 is not 2"
    assert failure["repro"].endswith("/tests/test_gpu_sums.py::test_three[x]'")
    assert failure["repro"] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("part", "word", "answer", "message"),
    [
        ("tests", "pytest", _machine.Finished(None, "", 9.0), "not finished"),
        ("tests", "pytest", _machine.Finished(3, "INTERNALERROR> no", 9.0), "status 3: INTERNALERROR> no"),
        ("sanitizer", "memcheck", _machine.Finished(None, "", 9.0), "not finished"),
        ("sanitizer", "memcheck", _machine.Finished(99, "========= ERROR SUMMARY: 2 errors", 9.0), "2 errors"),
        ("sanitizer", "memcheck", _machine.Finished(1, "ImportError: no", 9.0), "ImportError: no"),
    ],
)
def test_a_process_that_fails_is_a_failure(options, part, word, answer, message):
    options.parts, options.quick = [part], True
    assert check_gpu.check(machine(Processes({word: answer})), options) == 1
    (failure,) = written(options)["failures"]
    assert message in failure["message"]
    assert word in failure["repro"]


def test_a_part_that_raises_is_a_failure_beside_what_the_others_found(options, tiny, monkeypatch):
    """Kills: an error that nobody foresaw ends the command, and what had been found is lost."""

    def breaks(*args, **options):
        raise OSError("no space\nleft")

    options.parts, options.quick = ["tests", "bench"], True
    monkeypatch.setattr(check_gpu, "_read_junit", breaks)
    assert check_gpu.check(machine(), options) == 1
    found = written(options)
    assert found["tests"]["summary"] == "broken off: OSError: no space left"
    assert found["failures"] == [
        {"what": "tests", "message": "OSError: no space left", "repro": "lora-kernels check-gpu --parts tests"}
    ]
    assert found["bench"]["results"]
    monkeypatch.undo()
    monkeypatch.setattr(gpu, "run", breaks)
    options.parts = ["tests", "bench"]
    assert check_gpu.check(machine(), options) == 1
    found = written(options)
    assert found["tests"]["passed"] == 1
    assert [failure["what"] for failure in found["failures"]] == ["bench"]


def test_the_file_is_written_after_each_part(options, tiny, monkeypatch):
    """Kills: who interrupts the benchmark loses what the tests had found."""

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    options.parts, options.quick = ["tests", "bench"], True
    monkeypatch.setattr(gpu, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check_gpu.check(machine(Processes(junit=FAILED)), options)
    found = written(options)
    assert found["tests"]["failed"] == 1
    assert [failure["message"] for failure in found["failures"]] == ["1 is not 2"]


def test_what_is_not_there_is_left_out_with_the_reason(options, tmp_path):
    options.parts, options.tests = ["tests", "sanitizer"], str(tmp_path / "nowhere")
    assert check_gpu.check(machine(found=lambda name: None), options) == 0
    found = written(options)
    assert "no test_gpu_*.py" in found["tests"]["summary"]
    assert "not installed" in found["memcheck"]["summary"]
    assert found["environment"]["clocks before"] == {}
    unsupported = Processes({"memcheck": _machine.Finished(1, "Error: Device not supported", 1.0)})
    options.parts, options.quick = ["sanitizer"], True
    assert check_gpu.check(machine(unsupported), options) == 0
    assert "does not support" in written(options)["memcheck"]["summary"]


def test_only_times_what_was_named(options, tiny, capsys):
    options.only = "decode"
    processes = Processes()
    assert check_gpu.check(machine(processes), options) == 0
    found = written(options)
    assert {r["what"] for r in found["bench"]["results"]} == {"decode"}
    assert not any("pytest" in command for command, _ in processes.commands)
    options.only = "no such case"
    with pytest.raises(_machine.CliError, match="no such case"):
        check_gpu.check(machine(), options)


def test_winners_are_remembered_where_somebody_wants_it(options, tiny):
    written = []
    options.parts, options.quick = ["bench"], True
    remembering = machine(remember=lambda device, found: written.append(found))
    check_gpu.check(remembering, options)
    assert written == []
    options.write_winners = True
    check_gpu.check(remembering, options)
    assert written == [{}], "a CPU has no candidates"


def test_unknown_parts_are_refused(capsys):
    assert main(["check-gpu", "--parts", "test"]) == 2
    assert "tests, sanitizer, bench" in capsys.readouterr().err


@pytest.fixture
def make_gpu(tmp_path):
    """make_gpu(lists, fits): ``make gpu`` where nvidia-smi prints the one and the build, if it fits, is up to date."""
    root = Path(__file__).parents[1]
    if shutil.which("make") is None or not (root / "Makefile").is_file():
        pytest.skip("needs make and a checkout")

    def run(lists, fits):
        scripts = {
            "nvidia-smi": f"echo '{lists}'", "venv/bin/python": f"exit {0 if fits else 1}",
            "venv/bin/pip": 'echo "built for $TORCH_CUDA_ARCH_LIST"', "venv/bin/lora-kernels": 'echo "ran $*"',
        }  # fmt: skip
        for name, line in scripts.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"#!/bin/sh\n{line}\n")
            path.chmod(0o755)
        for stamp in (".torch-torch", ".packages", ".built"):
            (tmp_path / "venv" / stamp).touch()
        command = ["make", "gpu", f"VENV={tmp_path / 'venv'}", "GPU_ARGS=--quick"]
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}  # and nothing that `make test` hands down
        return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)

    return run


def test_make_gpu_takes_a_build_that_fits(make_gpu):
    done = make_gpu("9.0", fits=True)
    assert done.returncode == 0
    assert "built for" not in done.stdout
    assert "ran check-gpu --out build/gpu.json --quick" in done.stdout


def test_make_gpu_builds_for_the_present_gpu_alone(make_gpu):
    done = make_gpu("9.0\n8.6", fits=False)
    assert done.returncode == 0
    assert done.stdout.index("built for 9.0\n") < done.stdout.index("ran check-gpu")


@pytest.mark.parametrize("lists", ["", "NVIDIA-SMI has failed because it could not communicate with the driver"])
def test_make_gpu_without_a_gpu_says_so(make_gpu, lists):
    done = make_gpu(lists, fits=False)
    assert done.returncode == 2
    assert "no GPU here" in done.stderr
    assert done.stdout == ""


# ------------------------------------------------------------------------------------------------------- benchmark


def planned(name, make):
    return gpu.Planned(name, make, (gpu.GRAPH, gpu.EAGER), True)


def quiet_case():
    steps = dict.fromkeys(("PEFT", "fused"), lambda: time.sleep(1e-4))
    return Case("layer", "a bfloat16 case", "forward", steps)


def run(items, has_time=lambda: True, timers=None):
    timers = timers or dict.fromkeys((gpu.GRAPH, gpu.EAGER), lambda device: host_timer())
    speeds = lambda device, timer: gpu.Speeds(1e9, {"bfloat16": 1e9})  # noqa: E731
    return gpu.run(CPU, timers, items, has_time, rounds=3, say=lambda line: None, speeds=speeds)


def test_a_case_that_raises_does_not_end_the_others():
    def wrong():
        raise WrongResult("y is off")

    found = run([planned("wrong", wrong), planned("right", quiet_case)])
    assert [(f.what, f.message) for f in found.failures] == [("wrong", "WrongResult: y is off")]
    assert found.failures[0].repro == "lora-kernels check-gpu --only 'wrong'"
    assert [timer for timer, _ in found.results] == [gpu.GRAPH, gpu.EAGER]


def test_a_case_that_no_graph_can_hold_is_timed_eagerly():
    def no_graph(device):
        raise RuntimeError("cannot be captured")

    found = run([planned("a", quiet_case)], timers={gpu.GRAPH: no_graph, gpu.EAGER: lambda device: host_timer()})
    assert [f.what for f in found.failures] == ["a, graph"]
    assert [timer for timer, _ in found.results] == [gpu.EAGER]


def test_cases_without_time_are_named():
    times = iter([True, False])
    found = run([planned("a", quiet_case), planned("b", quiet_case)], has_time=lambda: next(times))
    assert found.left_out == ["b"]
    assert len(found.results) == 2


def test_what_is_slower_than_peft_is_listed():
    def case(ours):
        return Case("layer", "x", "forward", {"PEFT": lambda: 1.0, "fused": lambda: ours})

    says = dict.fromkeys((gpu.GRAPH, gpu.EAGER), lambda device: lambda step, repeats: step())
    assert run([planned("a", lambda: case(1.01))], timers=says).slower() == []
    assert len(run([planned("a", lambda: case(1.5))], timers=says).slower()) == 2


def test_a_wrong_model_is_noticed(tiny):
    from lora_kernels.benchmarks import models

    right = models.variants

    def wrong(*args, **options):
        found = right(*args, **options)
        for module in found["fused"].modules():
            if hasattr(module, "lora_A"):
                module.scaling["default"] *= 2
        return found

    gpu.model_case(CPU, gpu.MODEL, 0.0, fp32_adapters=False, autocast=False)
    models.variants = wrong
    try:
        with pytest.raises(WrongResult, match="fused"):
            gpu.model_case(CPU, gpu.MODEL, 0.0, fp32_adapters=False, autocast=False)
    finally:
        models.variants = right


def test_the_plan_names_every_case_once_and_begins_with_the_quick_ones():
    everything, quick = gpu.plan(CPU), gpu.plan(CPU, quick=True)
    names = [item.name for item in everything]
    assert len(set(names)) == len(names)
    assert names[: len(quick)] == [item.name for item in quick]
    for kind in ("forward,", "forward+backward,", "decode,", "prompt,", "model step,"):
        assert any(item.name.startswith(kind) for item in quick), kind


# ------------------------------------------------------------------------------------------------ clocks, processes


@pytest.fixture
def cuda(monkeypatch):
    """As much of torch.cuda as the timers call; every event is a millisecond after the one before."""
    recorded = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            recorded.append(self)

        def synchronize(self):
            assert recorded[-1] is self

        def elapsed_time(self, end):
            return float(recorded.index(end) - recorded.index(self))

    class Stream:
        def wait_stream(self, other):
            pass

    class Nothing:
        def __init__(self, *_):
            pass

        def __enter__(self):
            pass

        def __exit__(self, *_):
            pass

    class Graph:
        replays = 0

        def replay(self):
            Graph.replays += 1

    stubs = {
        "Event": Event, "Stream": Stream, "stream": Nothing, "graph": Nothing, "CUDAGraph": Graph,
        "current_stream": Stream, "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=64),
    }  # fmt: skip
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    return Graph


@pytest.mark.parametrize(("repeats", "calls"), [(1, 8), (10, 10)])
def test_events_surround_calls_that_follow_each_other(cuda, repeats, calls):
    """The stub's events are a millisecond apart. Kills: waiting for the GPU between calls; too few of them."""
    made = []
    assert EventTimer(CPU)(lambda: made.append(1), repeats) == pytest.approx(1e-3 / calls)
    assert len(made) == calls


def test_a_graph_is_captured_once_and_replayed(cuda):
    calls, timer = [], GraphTimer(CPU)

    def step():
        calls.append(1)

    assert timer(step, 2) == pytest.approx(1e-3)
    assert len(calls) == 4, "three to warm up, one captured"
    timer(step, 5)
    assert len(calls) == 4
    assert cuda.replays == 7
    timer.once(step)
    assert (len(calls), cuda.replays) == (5, 7)


def test_what_serves_a_step_is_asked_where_it_is_timed(monkeypatch):
    """Dispatch may choose otherwise into a graph."""
    where = []

    class Timer:
        def once(self, step):
            where.append("captured")
            step()
            where.pop()

        def __call__(self, step, repeats):
            return 1.0

    case = quiet_case()
    case = Case(case.level, case.name, case.what, case.steps, schedules=lambda: {"forward": "".join(where)})
    timers = dict.fromkeys((gpu.GRAPH, gpu.EAGER), lambda device: Timer())
    assert [result.schedules for _, result in run([planned("a", lambda: case)], timers=timers).results] == [
        {"forward": "captured"}
    ] * 2
    plain = dict.fromkeys((gpu.GRAPH, gpu.EAGER), lambda device: host_timer())
    assert run([planned("a", lambda: case)], timers=plain).results[0][1].schedules == {"forward": ""}


def test_commands_end_in_time_and_return_what_they_printed():
    done = _machine.run_command([sys.executable, "-c", "import os; print(os.environ['WORD'])"], {"WORD": "here"}, 60.0)
    assert (done.status, done.output.strip()) == (0, "here")
    late = "import time; print('begun', flush=True); time.sleep(60)"
    done = _machine.run_command([sys.executable, "-c", late], {}, 2.0)
    assert (done.status, done.output.strip()) == (None, "begun")
    assert done.seconds < 30


PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
child.wait()
"""


def has_ended(pid):
    """Or is a zombie, which some init has to collect."""
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] in "ZX"


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_what_a_late_command_began_ends_with_it():
    """Kills: the child alone is killed, and its own children go on using the GPU."""
    done = _machine.run_command([sys.executable, "-c", PARENT], {}, 3.0)
    assert done.status is None
    assert wait_until(lambda: has_ended(int(done.output)))


def test_an_interrupt_ends_commands_that_a_terminal_does_not_reach(options):
    """Kills: Ctrl-C waits for commands, in sessions of their own, to run into their limit."""
    options.parts, options.quick = ["tests"], True
    begun = []

    def interrupted(command, environment, limit):
        if "pytest" not in command:
            return _machine.Finished(0, SMI, 0.1)
        begun.append(command)
        return _machine.run_command([sys.executable, "-c", "import time; time.sleep(60)"], {}, 60.0)

    def interrupt():
        assert wait_until(lambda: _machine._running)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    start = time.monotonic()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore the signal
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            check_gpu.check(machine(interrupted), options)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert begun
    assert time.monotonic() - start < 30


# --------------------------------------------------------------------------------------------------------- launches


def test_launches_run_every_kernel(capsys):
    assert launches.main(["--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 * len(launches.SMALL) + 2 * 4
    assert all(line.startswith("ok") for line in lines)
    served = {op for op, _ in lk.stats()["served"]}
    assert {"lora_linear_backward", "prompt_embedding_backward", "prefix_kv_backward"} <= served


def test_launches_notice_what_is_not_finite_and_print_refusals(monkeypatch, capsys):
    right = launches.lora_linear
    monkeypatch.setattr(launches, "lora_linear", lambda x, *args, **options: right(x, *args, **options) / 0.0)
    monkeypatch.setattr(launches, "SMALL", {"decode": (1, 72, 136, 4)})
    assert launches.main(["--device", "cpu"]) == 1
    assert capsys.readouterr().out.count("NOT FINITE") == 4
    monkeypatch.undo()
    monkeypatch.setattr(launches, "SMALL", {"decode": (1, 72, 136, 4)})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert launches.run(CPU, ["triton"]) == 0
    assert "ok" not in capsys.readouterr().out
