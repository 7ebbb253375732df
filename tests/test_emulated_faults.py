"""The emulator's checks and the comparisons of results notice what a faulty kernel leaves out.

Each scenario is a launch that needs everything in it: with one barrier, wait, store, order or tail fewer, either the
emulator or the comparison with float64 must complain. Random scheduling alone misses faults between blocks; releases
are stalled, outputs poisoned, and the order of all accesses is tracked.
"""

from __future__ import annotations

import functools

import emulated_grouped as grouped
import emulated_multi as multi
import pytest
import torch
from emulated import check_backward, check_forward, grad_y_of, matrices, saved_s

MANY = 1000


def forward(problem, name="bf16", **options):
    def run(**fault):
        *_, schedule, reports = check_forward(matrices(*problem, name), **options, **fault)
        return schedule, reports

    return run


def backward(problem, name="bf16", **options):
    def run(**fault):
        x, weight, lora_A, lora_B, _ = matrices(*problem, name)
        s = saved_s(x, lora_A, options.get("p", 0.0))
        _, reports = check_backward((grad_y_of(x, weight), x, s, weight, lora_A, lora_B), **options, **fault)
        return "backward", reports

    return run


def of_groups(check, rows, *sizes, **options):
    def run(**fault):
        *_, launches = check(grouped.problem(rows, *sizes, "bf16", behind=3), **options, **fault)
        return "grouped", [launch["report"] for launch in launches]

    return run


def of_pools(check, rows, *sizes, ranks=(24, 5, 40), **options):
    ids = [-1 if row % 7 == 3 else row * row % 3 for row in range(rows)]

    def run(**fault):
        *_, launches = check(multi.problem(ids, ranks, *sizes, "bf16"), **options, **fault)
        return "multi", [launch["report"] for launch in launches]

    return run


# More k-tiles than stages, so that the last one lies where a result is staged first; two batches of ranks where there
# can be. tf32 has other stages and fragments: half as deep, and transposed without ldmatrix.
SCENARIOS = {
    "ticketed": forward((256, 136, 272, 200), p=0.3),
    "ticketed-ranks": forward((200, 75, 272, 7), p=0.3),
    "ticketed-halves": forward((200, 75, 272, 12), p=0.3),
    "ticketed-tf32": forward((200, 132, 76, 72), "tf32", p=0.3),
    "column-0": forward((256, 136, 272, 40)),
    "dual": forward((150, 64, 424, 24)),
    "dual-split": forward((60, 136, 1784, 16), sms=40),
    "decode": forward((5, 136, 1544, 16), sms=40),
    "cublas": forward((150, 136, 1544, 24), p=0.3, sms=40, schedule="cublas"),
    "cublas-gathered": forward((150, 75, 1543, 200), p=0.3, sms=40, schedule="cublas"),
    "backward-cublas": backward((520, 72, 264, 72), p=0.3, sms=MANY, schedule="cublas"),
    "backward": backward((200, 264, 136, 16), p=0.3),
    "backward-wide": backward((600, 272, 136, 200), p=0.3, sms=MANY),
    "backward-tf32": backward((200, 76, 132, 12), "tf32", p=0.3),
    "grouped": of_groups(grouped.check_forward, (70, 0, 130), 136, 272, 24, p=0.3),
    "grouped-onto-y": of_groups(grouped.check_forward, (70, 0, 130), 136, 272, 24, p=0.3, schedule="cublas"),
    "grouped-backward": of_groups(grouped.check_backward, (0, 300, 20), 232, 136, 16, p=0.3, sms=MANY),
    "multi-decode": of_pools(multi.check_forward, 13, 136, 1544, sms=40),
    "multi-decode-small": of_pools(multi.check_forward, 60, 136, 272),
    "multi": of_pools(multi.check_forward, 150, 136, 1544, p=0.3, sms=40),
    "multi-ragged": of_pools(multi.check_forward, 150, 136, 1544, ranks=(23, 5, 37), p=0.3, sms=40),
    "multi-backward": of_pools(multi.check_backward, 900, 136, 72, p=0.3, sms=MANY),
    "backward-wide-tf32": backward((520, 100, 68, 72), "tf32", p=0.3, sms=MANY),
}


WITHOUT_FLAGS = ("decode", "dual-split", "multi", "multi-ragged", "multi-backward")


def attempt(scenario, seed=0, **fault):
    """The scenario's result under one schedule."""
    torch.manual_seed(0)
    return SCENARIOS[scenario](seed=seed, resident_blocks=4, stall_release=True, **fault)


@functools.cache
def unchanged(scenario):
    """(schedule, reports) of the kernel as it is."""
    return attempt(scenario)


def survives(scenario, **fault):
    """Whether a faulty kernel passes every check under a few schedules."""
    try:
        for seed in range(3):
            attempt(scenario, seed, **fault)
    except (AssertionError, RuntimeError):
        return False
    return True


def sites(scenario, kind):
    """Call sites in the order of the faults' numbers; a launch after another one has its own numbers."""
    return [getattr(report, kind) for report in unchanged(scenario)[1]]


@pytest.mark.parametrize("scenario", list(SCENARIOS))
def test_the_unchanged_kernel_survives(scenario):
    schedule, _ = unchanged(scenario)
    assert scenario.startswith(schedule)
    assert survives(scenario)


# Of ranks that are gathered, the branch copies nothing asynchronously: nothing is waited for there.
# Where few rows have waited for s, the stages are free already.
WITHOUT_EFFECT = {
    ("ticketed-ranks", "drop_async_wait"): "lora_branch.cuh",
    ("multi-decode", "drop_barrier"): "lora_branch.cuh",
    ("multi-decode-small", "drop_barrier"): "lora_branch.cuh",
}
LEFT_OUT = {
    "drop_barrier": "barrier_sites",
    "drop_async_wait": "async_wait_sites",
    "drop_global_store": "global_store_sites",
}


@pytest.mark.parametrize(
    ("scenario", "fault"),
    # Rows that are not aligned are not copied asynchronously.
    [(s, f) for s in SCENARIOS for f in LEFT_OUT if (s, f) != ("cublas-gathered", "drop_async_wait")],
)
def test_everything_left_out_is_caught(scenario, fault):
    names = sites(scenario, LEFT_OUT[fault])
    count = max(len(launch) for launch in names)
    assert count >= 1
    without_effect = WITHOUT_EFFECT.get((scenario, fault), "nowhere")
    needed = [i for i in range(count) if not any(i < len(at) and at[i].startswith(without_effect) for at in names)]
    missed = [i for i in needed if survives(scenario, **{fault: i})]
    assert not missed, [[launch[i] for launch in names if i < len(launch)] for i in missed]


@pytest.mark.parametrize(
    ("scenario", "fault"),
    # The blocks of dual do not meet, and those of decode, cublas and many adapters in one atomic addition: no flag is
    # loaded.
    [
        (s, f)
        for s in SCENARIOS
        if s != "dual"
        for f in ("drop_acquire", "drop_release_order", "early_release")
        if f != "drop_acquire" or not ("cublas" in s or s in WITHOUT_FLAGS)
    ],
)
def test_a_missing_order_between_blocks_is_caught(scenario, fault):
    assert not survives(scenario, **{fault: True})


@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if name != "cublas-gathered"])
def test_a_tail_that_is_not_zero_is_caught(scenario):
    assert not survives(scenario, ignore_copy_size=True)
