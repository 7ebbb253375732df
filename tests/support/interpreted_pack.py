"""The Triton kernels of packs in Triton's interpreter. Run by test_triton_pack.py. Not in bfloat16."""

from __future__ import annotations

import pytest
import torch
from covering import case_id, covering_pairs
from numerics import assert_as_accurate
from packs import FP16, FP32, FP64, PACKS, SEED, Pack, apart, leaves, make_problem, op_arguments, run, small
from poisoned import memory_of_nan  # noqa: F401
from touched_memory import memory_of_tensors  # noqa: F401

import lora_kernels as lk
from lora_kernels.support import triton as _triton
from lora_kernels.triton_kernels import lora_pack
from lora_kernels.triton_kernels.launching import Device

ONE_SM, MANY_SMS = 1, 10**6


@pytest.fixture
def launched(monkeypatch):
    """The launches of packs, as they come."""
    found = []
    run_all = lora_pack.run_all
    monkeypatch.setattr(lora_pack, "run_all", lambda launches, gpu: (found.append(launches), run_all(launches, gpu)))
    return found


@pytest.fixture
def pretend(monkeypatch):
    """pretend(target, sms): kernels are configured as for this GPU."""

    def choose(target, sms):
        for module in (lora_pack, _triton):
            monkeypatch.setattr(module, "device_of", lambda _: Device(target, sms))

    return choose


def check(pack, dtype, adapter_dtype, p=0.0, *, bias=False, in_columns=False):
    """Values and gradients against float64, of each member."""
    problem = make_problem(pack, dtype, adapter_dtype, bias)
    if in_columns:
        problem["weights"] = [w.t().contiguous().t() for w in problem["weights"]]

    def torch_code(**tensors):
        return apart(**tensors, scalings=pack.scalings, p=p)

    def ours(**tensors):
        with lk.use_backend("triton"):
            return lk.lora_pack(**tensors, scalings=pack.scalings, dropout_p=p, training=True, seed=SEED)

    exact = run(problem, FP64, FP64, torch_code)
    unfused, found = run(problem, dtype, dtype, torch_code), run(problem, dtype, adapter_dtype, ours)
    for name, a in found.items():
        assert a.dtype == (adapter_dtype if "A" in name or "B" in name else dtype)
        assert_as_accurate(a, unfused[name], exact[name], name)
    assert set(lk.stats()["served"]) == {("lora_pack", "triton"), ("lora_pack_backward", "triton")}


AXES = {
    "pack": tuple(pack for pack in PACKS if pack.m * pack.k < 20_000),
    "dtypes": ((FP16, FP16), (FP16, FP32), (FP32, FP32)),
    "p": (0.0, 0.3),
    "target": ("sm_80", "sm_90", "gfx942"),
    "sms": (ONE_SM, MANY_SMS),
    "bias": (False, True),
    "in_columns": (False, True),
}


@pytest.mark.parametrize("case", covering_pairs(**AXES), ids=case_id)
def test_values_and_gradients(case, pretend):
    """Kills: a tile column off by one among members; one member's operands, scaling, mask or flag taken of another; a
    member's part of grad_x left out.
    """
    pretend(case["target"], case["sms"])
    check(case["pack"], *case["dtypes"], case["p"], bias=case["bias"], in_columns=case["in_columns"])


LARGE = Pack(150, 160, (272, 144, 128), (24, 8, 80))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_large_tiles_in_one_launch(target, p, pretend, launched):
    pretend(target, ONE_SM)
    check(LARGE, FP16, FP16, p)
    forward, backward = launched
    fused = 2 if target == "gfx942" else 1
    assert [len(forward), len(backward)] == [fused, fused + 6]
    for launch in (forward[0], backward[0]):
        assert (launch.constants["BLOCK_ROWS"], launch.constants["BLOCK_COLUMNS"]) == (128, 128)


def test_schedules_agree_bit_for_bit(pretend):
    pretend("sm_80", ONE_SM)
    args = op_arguments(LARGE, 0.3, FP16)
    (ys, s), (others, s2) = (lora_pack.forward(schedule, *args) for schedule in ("ticketed", "split"))
    for a, b in zip((*ys, s), (*others, s2)):
        assert torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.parametrize("wanted", [("x",), ("lora_As",), ("lora_Bs",), ("x", "lora_Bs")], ids=str)
def test_needs_input_grad_is_honoured(wanted, pretend):
    pretend("sm_80", MANY_SMS)
    t = small(PACKS[2], FP16)
    rest = {"scalings": PACKS[2].scalings, "dropout_p": 0.3, "training": True, "seed": SEED}

    def gradients(of):
        with lk.use_backend("triton"):
            return torch.autograd.grad(sum(y.float().sum() for y in lk.lora_pack(**t, **rest)), of)

    full = dict(zip(map(id, leaves(t)), gradients(leaves(t))))
    for name in ("x", "lora_As", "lora_Bs"):
        for i, leaf in enumerate(t[name] if isinstance(t[name], list) else [t[name]]):
            leaf.requires_grad_(name in wanted and i != 1)
    some = [leaf for leaf in leaves(t) if leaf.requires_grad]
    for leaf, grad in zip(some, gradients(some), strict=True):
        assert torch.equal(grad, full[id(leaf)])


def test_why_and_refusals():
    t = small(PACKS[0], FP16)
    with lk.use_backend("triton"):
        assert lk.why("lora_pack", **t)[:2] == ("triton", "ticketed")
        for pack, why in (
            (Pack(3, 8, (4, 4), (2, 257)), "rank above 256"),
            (Pack(3, 8, (4,) * 5, (2,) * 5), "more members than a launch takes"),
            (Pack(3, 8, (4, 0), (2, 2)), "tensor layout not served"),
        ):
            with pytest.raises(RuntimeError, match=why):
                lk.lora_pack(**small(pack, FP16))


@pytest.mark.parametrize("place", [1, 2, 3, 4])
def test_what_does_not_fit_is_not_launched(place):
    args = list(op_arguments(PACKS[0], 0.3, FP16))
    args[place] = [args[place][0][..., 1:], *args[place][1:]]
    with lk.use_backend("triton"), pytest.raises(RuntimeError, match="must be"):
        torch.ops.lora_kernels.lora_pack(*args)
