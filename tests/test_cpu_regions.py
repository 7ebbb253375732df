"""Little work on the CPU is divided among threads while that pays, and its results do not show whether it was."""

import ctypes
import os
import subprocess

import pytest
import torch
from emulator_objects import CSRC

import lora_kernels as lk
from lora_kernels.benchmarks.layers import another_team

PROGRAM = """
#include "cpu/region_price.h"
using lk::cpu::RegionPrice;
static RegionPrice* price;
extern "C" {
void start() { price = new RegionPrice; }
int turn() { return static_cast<int>(price->next()); }
bool pays(int64_t work) { return price->pays(work); }
void observe(double elapsed, double all, double longest, int64_t work) { price->observe(elapsed, all, longest, work); }
}
"""
WORK = 1000
CHEAP, DEAR = (12.0, 20.0, 10.0, WORK), (60.0, 20.0, 10.0, WORK)
"""Two threads take 10 each. The region takes 2 more, so a fifth of the work is saved, or 50 more: five times the work
would pay for it."""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("regions")
    (folder / "regions.cpp").write_text(PROGRAM)
    compiler = (os.environ.get("CXX", "g++"), "-std=c++20", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}")
    subprocess.run([*compiler, "-shared", "-fPIC", "-o", "regions.so", "regions.cpp"], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "regions.so"))
    library.pays.restype = ctypes.c_bool
    library.pays.argtypes = [ctypes.c_int64]
    library.observe.argtypes = [ctypes.c_double] * 3 + [ctypes.c_int64]
    return library


@pytest.fixture
def price(program):
    program.start()
    return program


def test_all_work_is_divided_at_first(price):
    assert price.pays(1)


def test_dear_regions_are_for_more_work(price):
    """Kills: the time of all threads taken for what is saved, the least work of one region for that of both."""
    price.observe(*DEAR)
    assert price.pays(1), "one region says little"
    price.observe(*DEAR)
    assert not price.pays(5 * WORK)
    assert price.pays(5 * WORK + 1)


def test_cheap_regions_bring_it_back(price):
    for _ in range(2):
        price.observe(*DEAR)
    price.observe(*CHEAP)
    assert not price.pays(WORK // 5)
    assert price.pays(WORK // 5 + 1)


def test_one_thread_says_nothing(price):
    """As where a call comes from within a region: it took no time and saved none."""
    for _ in range(2):
        price.observe(*DEAR)
    price.observe(20.0, 20.0, 20.0, WORK)
    price.observe(20.0, 20.0, 20.0, WORK)
    assert not price.pays(5 * WORK)


def test_some_calls_are_divided_whether_it_pays_or_not(price):
    """The second of two, so that the timed one finds awake whom the first has woken."""
    as_known, wakes, timed = 0, 1, 2
    turns = [price.turn() for _ in range(256)]
    assert turns == ([wakes, timed] + [as_known] * 126) * 2


@pytest.mark.parametrize(("m", "n", "k"), [(1, 577, 577), (3, 1001, 130), (4, 1535, 64)])
def test_bits_do_not_depend_on_threads(m, n, k):
    """More calls than there are between two that are timed, and with regions cheap and dear."""
    x, w, a, b = torch.randn(m, k), torch.randn(n, k), torch.randn(5, k), torch.randn(n, 5)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with torch.no_grad():
            y = lk.lora_linear(x, w, a, b, scaling=0.5)
            exact = x.double() @ (w.double() + 0.5 * b.double() @ a.double()).T
            torch.testing.assert_close(y.double(), exact, atol=1e-4 * k**0.5, rtol=0)
            for count in (2, 3, 7):
                torch.set_num_threads(count)
                for _ in range(70):
                    assert torch.equal(lk.lora_linear(x, w, a, b, scaling=0.5), y)
            torch.set_num_threads(2)
            with another_team():
                for _ in range(300):
                    assert torch.equal(lk.lora_linear(x, w, a, b, scaling=0.5), y)
    finally:
        torch.set_num_threads(threads)
