"""The tour (docs/tour): each step is right and free of races on the emulator, misses what is left out, and its page has
the numbers of ``python docs/tour/run.py``.
"""

from __future__ import annotations

import re
import sys

import documents
import emulator_objects
import numpy as np
import pytest
import torch
from documents import ROOT
from numerics import assert_as_accurate

TOUR = ROOT / "docs" / "tour"
pytestmark = pytest.mark.skipif(not TOUR.is_dir(), reason="the docs are not here: an installed package")
if TOUR.is_dir():
    tour = emulator_objects.imported(TOUR / "run.py")

STEPS = (1, 2, 3, 4, 5)
LINES = 120
PAGE = "docs/tour/README.md"


def test_every_step_is_a_file_of_few_lines():
    files = sorted(TOUR.glob("step*.cuh"))
    assert [file.name[:6] for file in files] == [f"step{step}_" for step in STEPS]
    assert {file.name: count for file in files if (count := file.read_text().count("\n")) > LINES} == {}


# Rows short of a tile and beyond it, a depth short of a stage and beyond a ring, ranks of one stage and of two.
CASES = ((1, 8, 8, 8), (130, 136, 72, 16), (127, 264, 264, 72))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("step", STEPS)
def test_a_step_is_as_accurate_as_torch(step, case):
    """Kills: an edge that is off by one, a stage at another's place, s of other rows; and on any schedule, a race."""
    given = tour.operands(tour.Case(*case))
    exact, unfused = (torch.from_numpy(values) for values in tour.references(given))
    schedules = tour.SCHEDULES[: 2 if step == 1 else 4]  # there, no block hears of another
    results = [tour.run(step, given, **schedule)[0] for schedule in schedules]
    assert_as_accurate(torch.from_numpy(tour.exactly(results[0])).bfloat16(), unfused, exact)
    for other in results[1:]:
        assert np.array_equal(other, results[0]), "the order of blocks and warps changes y"


@pytest.mark.parametrize("step", STEPS[1:])
def test_no_bank_is_asked_twice(step):
    _, reports = tour.run(step, tour.operands(tour.RAGGED))
    assert max(report.load_matrix_turns for report in reports) == (0 if step == 5 else 1)


# ------------------------------------------------------------------------------------------------------- faults

SITES = {
    "drop_global_store": "global_store_sites",
    "drop_barrier": "barrier_sites",
    "drop_async_wait": "async_wait_sites",
    "drop_arrival": "arrival_sites",
    "drop_barrier_wait": "barrier_wait_sites",
    "drop_proxy_fence": "proxy_fence_sites",
    "drop_multiply_wait": "multiply_wait_sites",
    "drop_multiply_fence": "multiply_fence_sites",
}
BETWEEN_BLOCKS = ("drop_acquire", "drop_release_order", "early_release")
# How many of each a step's source names, and which faults without a place concern it.
FAULTS = {
    1: ({"drop_global_store": 1}, ()),
    2: ({"drop_global_store": 1, "drop_barrier": 2, "drop_async_wait": 1}, ("ignore_copy_size",)),
    # Barriers: the ticket, a stage, s before its flag and behind it.
    3: ({"drop_global_store": 1, "drop_barrier": 4, "drop_async_wait": 1}, ("ignore_copy_size", *BETWEEN_BLOCKS)),
    # Of barriers in memory: who fills, who reads. Fences of proxies: the ring's barriers, s before and behind its flag.
    4: (
        {
            "drop_global_store": 1, "drop_barrier": 2, "drop_arrival": 2, "drop_barrier_wait": 2, "drop_proxy_fence": 3,
        },
        ("ignore_copy_size", "ignore_expected_bytes", *BETWEEN_BLOCKS),
    ),
    # Arrivals: a stage that is filled, the end that is told; a stage that is left, in the loop and behind it.
    5: (
        {
            "drop_global_store": 1, "drop_barrier": 2, "drop_arrival": 4, "drop_barrier_wait": 2, "drop_proxy_fence": 3,
            "drop_multiply_wait": 2, "drop_multiply_fence": 1,
        },
        ("ignore_copy_size", "ignore_expected_bytes", *BETWEEN_BLOCKS),
    ),
}  # fmt: skip
CASE = tour.Case(140, 264, 264, 72) if TOUR.is_dir() else None
CASE_OF_STEP_1 = tour.Case(9, 24, 40, 8) if TOUR.is_dir() else None


def noticed(step, **fault):
    """What the emulator says of a fault, or that y is wrong; empty: nothing, on any schedule."""
    for schedule in tour.SCHEDULES[:3]:
        try:
            error = tour.error(step, CASE_OF_STEP_1 if step == 1 else CASE, **schedule, **fault)
        except RuntimeError as told:
            return str(told)
        if not error <= 2.0:
            return f"error {error}"
    return ""


@pytest.mark.parametrize("step", STEPS)
def test_whatever_is_left_out_is_missed(step):
    """Each store, barrier, arrival, wait and fence by itself."""
    counts, _ = FAULTS[step]
    _, reports = tour.run(step, tour.operands(CASE_OF_STEP_1 if step == 1 else CASE))
    for fault, name in SITES.items():
        sites = max((getattr(report, name) for report in reports), key=len)
        assert len(sites) == counts.get(fault, 0), fault
        assert [site for i, site in enumerate(sites) if not noticed(step, **{fault: i})] == [], fault


@pytest.mark.parametrize(("step", "fault"), [(step, fault) for step in STEPS for fault in FAULTS[step][1]])
def test_other_faults_are_missed(step, fault):
    assert noticed(step, **{fault: True})


# ------------------------------------------------------------------------------------------------------- the page


def tables(text):
    """Of a page: each table as its rows by their labels; the columns' heads are the row without one."""
    found = re.findall(r"(?:^\|.*\n)+", text + "\n", re.MULTILINE)
    rows = ([[cell.strip() for cell in line.split("|")[1:-1]] for line in lines.splitlines()] for lines in found)
    return [{row[0]: row[1:] for row in table if not row[0].startswith("---")} for table in rows]


def test_the_page_has_the_tables_of_the_command():
    page = documents.read(PAGE)
    heads = {tour.head(step) for step in STEPS}
    of_page = [table for table in tables(page) if heads.issuperset(table.get("", ["another table"]))]
    of_command = tables("\n\n".join(tour.page_tables()))
    assert f"Every operand once would be {tour.every_operand_once()}." in page
    assert [table[""] for table in of_page] == [table[""] for table in of_command]
    for theirs, ours in zip(of_page, of_command, strict=True):
        if tour.compiler() not in page:  # the emulator's numbers stay
            theirs = {label: row for label, row in theirs.items() if "KB" in label}
            ours = {label: row for label, row in ours.items() if label in theirs}
        assert theirs == ours, "`python docs/tour/run.py --page` prints the tables"


def places(step, code):
    """(fault, index) of the calls that the emulator can leave out, in lines of the sources that have this code."""
    _, reports = tour.run(step, tour.operands(CASE))
    found = []
    for fault, name in SITES.items():
        for i, site in enumerate(getattr(reports[-1], name)):
            file, _, line = site.partition(":")
            if code in (TOUR / file).read_text().splitlines()[int(line) - 1]:
                found.append((fault, i))
    return found


def test_what_the_page_takes_out_stops_with_what_it_says():
    """Kills: a step that is no longer checked for what it is about."""
    (table,) = re.findall(r"(?:^\| [2-5] \| .*`.*\n)+", documents.read(PAGE), re.MULTILINE)
    rows = [(int(row[2]), *re.findall(r"`([^`]+)`", row)) for row in table.splitlines()]
    assert {step for step, *_ in rows} == {2, 3, 4, 5}
    for step, code, told in rows:
        ((fault, i),) = places(step, code)
        assert told in noticed(step, **{fault: i}), code


def test_no_register_is_spilled():
    if not tour.has_machine_code():
        pytest.skip(tour.compiler())
    assert {step: tour.code(step).spills for step in STEPS} == dict.fromkeys(STEPS, 0)


def test_the_command_runs_one_step(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "--step", "3"])
    tour.main()
    told = capsys.readouterr().out
    assert "3 ticketed" in told
    assert tables(told)[-1][""] == [tour.head(3)]
    assert "2 tiled" not in told


@pytest.mark.parametrize("fault", [{"drop_barrier": 2}, {"drop_global_store": 0}])
def test_the_command_fails_where_a_step_is_wrong(monkeypatch, fault):
    monkeypatch.setattr(sys, "argv", ["run.py", "--step", "3"])
    monkeypatch.setattr(tour, "SCHEDULES", (fault,))
    with pytest.raises(SystemExit, match=r"^3 ticketed: "):
        tour.main()
