"""``lora-kernels plan``, and what the CUDA extension says of its kernels. No GPU is needed, a build with nvcc is."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
from pathlib import Path

import pytest
import setup_script

from lora_kernels import _native
from lora_kernels.cli import main
from lora_kernels.cli.plan import PLANNED_OPS
from lora_kernels.cli.plan.architectures import ARCHITECTURES, blocks_per_sm
from lora_kernels.support import cuda, gpu_packed

needs_extension = pytest.mark.skipif(_native.cuda is None, reason=f"lora_kernels._cuda: {_native.cuda_error}")
PROBLEM = {"--m": 8192, "--n": 4096, "--k": 4096, "--r": 16, "--dtype": "bf16", "--arch": "sm_86"}


def command(*flags, op="lora_linear", **changes):
    options = {**PROBLEM, **{f"--{name}": value for name, value in changes.items()}}
    return ["plan", op, *(str(part) for option in options.items() for part in option), *flags]


@pytest.fixture
def plan(capsys):
    def run(*flags, **changes):
        assert main(command(*flags, **changes)) == 0
        return json.loads(capsys.readouterr().out)

    return run


@needs_extension
def test_plan_of_wgmma(plan):
    """The kernel, and what the copy engine is told of each matrix; the same without asking."""
    launch, best = (plan("--dropout", arch="sm_90", m=8190, r=24, schedule=name) for name in ("wgmma", "auto"))
    if isinstance(launch, list):
        launch = launch[0]
        assert "this build, or the driver, makes no tensor maps" in launch["reason"]
        pytest.skip("the extension was built without sm_90a")
    assert "as asked" in launch["reason"]
    assert "has run on no GPU yet" in best["reason"]
    assert {**launch, "reason": ""} == {**best, "reason": ""}
    assert launch["kernel"].startswith("_ZN2lk24lora_linear_wgmma_kernelINS_15LoraLinearWgmmaINS_8BFloat16ELi256ELi48E")
    assert (launch["grid"], launch["block"]) == ([132, 1, 1], [384, 1, 1])
    assert launch["workspace_bytes"] == 4 * (2 + 64)
    assert {name: (m["dims"], m["strides_in_bytes"], m["box"]) for m in launch["maps"] for name in [m["tensor"]]} == {
        "x": ([4096, 8190], [8192], [64, 128]),
        "w": ([4096, 4096], [8192], [64, 256]),
        "s": ([24, 8190], [48], [64, 128]),
        "b": ([24, 4096], [48], [64, 256]),
        "y": ([4096, 8190], [8192], [64, 64]),
    }
    assert all(m["swizzle_bytes"] == 2 * m["box"][0] and m["why"] for m in launch["maps"])
    fields = {field["name"]: field["offset"] for field in launch["params"]["fields"]}
    offsets = [fields[f"map of {name}"] for name in ("x", "w", "b", "s", "y", "a", "saved s")]
    assert offsets == list(range(offsets[0], launch["params"]["size"], 128))
    assert offsets[0] % 64 == 0


@needs_extension
def test_plan_of_wgmma_in_clusters(plan):
    """Blocks of a cluster copy half of a tile's w and b each. The gradient of x has none, and says so."""
    launch = plan(arch="sm_90", schedule="wgmma, clusters", m=8000)
    if launch["schedule"] != "wgmma":
        pytest.skip("the extension was built without sm_90a")
    assert (launch["grid"], launch["block"], launch["cluster"]) == ([132, 1, 1], [384, 1, 1], [2, 1, 1])
    assert launch["kernel"].startswith("_ZN2lk24lora_linear_wgmma_kernelINS_15LoraLinearWgmmaINS_8BFloat16ELi256ELi16E")
    assert "read w and b once" in launch["reason"]
    boxes = {m["tensor"]: m["box"] for m in launch["maps"]}
    assert boxes == {"x": [64, 128], "w": [64, 128], "s": [64, 128], "b": [64, 128], "y": [64, 64]}
    of_x = plan(op="lora_linear_backward", arch="sm_90", schedule="wgmma, clusters")[0]
    assert (of_x["schedule"], of_x["cluster"]) == ("wgmma", [1, 1, 1])
    assert "clusters as asked are for forwards alone" in of_x["reason"]


@needs_extension
def test_plan_of_the_gradients_by_wgmma(plan):
    """One launch has s', dX and parts of dB; dA is made, and dB summed, where they are elsewhere."""
    launches = plan(op="lora_linear_backward", arch="sm_90", n=4104)
    launch, last = launches[0], launches[-1]
    if launch["schedule"] != "wgmma":
        pytest.skip("the extension was built without sm_90a")
    assert (len(launches), last["schedule"]) == (2, "split rows")
    assert "parts of dB are there and only summed" in last["reason"]
    assert launch["kernel"].startswith(
        "_ZN2lk24lora_linear_wgmma_kernelINS_15LoraLinearWgmmaINS_8BFloat16ELi256ELi16ELb1E"
    )
    assert {m["tensor"]: (m["dims"], m["box"]) for m in launch["maps"]} == {
        "x": ([4104, 8192], [64, 128]),
        "w": ([4096, 4104], [64, 64]),  # as it lies
        "a": ([16, 4104], [16, 64]),
        "s": ([16, 8192], [64, 128]),
        "saved s": ([16, 8192], [16, 128]),
        "b": ([4096, 16], [64, 64]),
        "y": ([4096, 8192], [64, 64]),
    }
    assert [m["swizzle_bytes"] for m in launch["maps"] if m["box"][0] == 16] == [32, 32]
    assert launch["workspace_bytes"] == 4 * (2 + 64 + 64 * 4104 * 16)
    assert cuda._told(launches) == ("wgmma", launch["reason"]), "what lk.why says"


@needs_extension
def test_plan_of_the_gradients_by_wgmma_of_many_ranks(plan):
    """Parts of dB would be too large; tiles of s' are as wide as a row of 128 bytes."""
    launch, last = plan(op="lora_linear_backward", arch="sm_90", schedule="wgmma", r=72)[-2:]
    if launch["schedule"] != "wgmma":
        pytest.skip("the extension was built without sm_90a")
    assert {m["tensor"]: m["box"] for m in launch["maps"]}["a"] == [64, 64]
    assert "saved s" not in [m["tensor"] for m in launch["maps"]]
    assert "dY is read again" in last["reason"]


@needs_extension
@pytest.mark.parametrize(
    ("changes", "flags", "reason"),
    [
        ({"arch": "sm_80"}, [], "it is sm_90's alone"),
        ({"arch": "sm_100"}, [], "it is sm_90's alone"),
        ({"dtype": "tf32"}, [], "its kernel is for bf16 and fp16"),
        ({"r": 12}, [], "rows of whole chunks of 16 bytes"),
        ({}, ["--unaligned"], "rows of whole chunks of 16 bytes"),
    ],
)
@pytest.mark.parametrize("op", ["lora_linear", "lora_linear_backward"])
def test_what_does_not_fit_wgmma_is_told_and_served_otherwise(plan, changes, flags, reason, op):
    launches = plan(*flags, **{"op": op, "arch": "sm_90", "schedule": "wgmma", **changes})
    launches = launches if isinstance(launches, list) else [launches]
    assert all(launch["schedule"] != "wgmma" for launch in launches)
    assert "wgmma does not fit: " in launches[0]["reason"]
    assert reason in launches[0]["reason"] or "makes no tensor maps" in launches[0]["reason"]


@needs_extension
def test_plan_of_a_large_problem(plan):
    launch = plan()
    params = launch.pop("params")
    kernel = launch.pop("kernel")
    assert launch == {
        "schedule": "ticketed",
        "reason": "several blocks per SM: tiles of s run beside tiles of y; large tiles fill the waves of SMs well; "
        "mma.sync is what the vendor's GEMM uses here, too: one launch saves the passes over x and y",
        "grid": [64 * (1 + 32), 1, 1],
        "block": [128, 1, 1],
        "cluster": [1, 1, 1],
        "dynamic_smem": (64 << 10) + 16,
        "workspace_bytes": 4 * (2 + 64),
    }
    assert kernel.startswith("_ZN2lk18lora_linear_kernelINS_10LoraLinearINS_4GemmINS_8BFloat16E")
    fields = params["fields"]
    assert [f["name"] for f in fields[:3]] == ["x", "w", "a"]
    ends = [0, *(f["offset"] + f["size"] for f in fields)]
    for field, end in zip(fields, ends):
        assert field["offset"] == -(-end // field["size"]) * field["size"], (
            "no field lies in the padding before this one"
        )
    assert params["size"] == -(-ends[-1] // 8) * 8


@needs_extension
@pytest.mark.parametrize(
    ("changes", "flags", "schedule", "reason"),
    [
        ({"m": 64, "n": 8192}, [], "dual", "few rows: every block computes s for its part of the depth"),
        ({"sms": 4096, "schedule": "one launch"}, [], "ticketed", "small tiles fill the waves of SMs better"),
        ({"r": 4}, [], "ticketed", "rows of the rank's length are not whole chunks"),
        ({"r": 12}, [], "ticketed", "rows of the rank's length are not whole chunks"),
        ({"n": 32001, "arch": "sm_90"}, [], "ticketed", "costs the vendor's GEMM most of its rate"),
        ({"m": 1, "r": 4}, [], "decode", "few rows: reading w is all that counts"),
        ({"m": 1}, [], "decode", "few rows: reading w is all that counts"),
        ({"n": 64}, [], "dual", "y is one tile wide"),
        ({"r": 64}, [], "column-0", "one block per SM"),
        ({"r": 64, "dtype": "fp16", "arch": "sm_120"}, ["--dropout"], "ticketed", "dropout is applied once"),
        ({"dtype": "tf32", "k": 4092}, [], "ticketed", "several blocks per SM"),
        ({"dtype": "tf32", "m": 1}, [], "decode", "few rows"),
    ],
)
def test_plan_is_what_the_launch_chooses(plan, changes, flags, schedule, reason):
    launch = plan(*flags, **changes)
    assert launch["schedule"] == schedule
    assert reason in launch["reason"]
    assert _native.cuda.kernels()[launch["kernel"]] == (launch["block"][0], launch["dynamic_smem"])


@needs_extension
@pytest.mark.parametrize(
    ("changes", "flags", "reason"),
    [
        ({"arch": "sm_90", "r": 4}, [], "mma.sync reaches three fifths of the rate of the vendor's wgmma"),
        ({"arch": "sm_90", "m": 248}, ["--dropout"], "mma.sync reaches three fifths of the rate of the vendor's wgmma"),
        ({"m": 129, "n": 1024}, [], "fewer tiles than SMs"),
        ({"m": 1, "r": 128}, [], "fewer tiles than SMs"),
        ({}, ["--unaligned"], "are not whole chunks of 16 bytes"),
        ({"dtype": "tf32", "k": 4094}, [], "are not whole chunks of 16 bytes"),
    ],
)
@pytest.mark.parametrize("op", ["lora_linear", "lora_linear_backward"])
def test_plan_of_the_vendors_gemm(plan, op, changes, flags, reason):
    if op == "lora_linear_backward" and "n" in changes:
        changes = {**changes, "n": 4096, "k": 1024}  # dX is the narrow one
    drops = "--dropout" in flags and op == "lora_linear"
    first, expand, product, *rest = plan(*flags, op=op, **changes)
    assert [launch["schedule"] for launch in (first, expand, product)] == [
        "shrink" if drops else "cublas", "expand", "cublas",
    ]  # fmt: skip
    assert all(reason in launch["reason"] for launch in (first, expand, product))
    for launch in (*([first] if drops else []), expand, *rest):
        assert _native.cuda.kernels()[launch["kernel"]] == (launch["block"][0], launch["dynamic_smem"])


@needs_extension
@pytest.mark.parametrize(
    ("changes", "schedule", "reason"),
    [
        ({}, "ticketed", "tile columns enumerate members"),
        ({"schedule": "cublas"}, "one by one", "as asked"),
        ({"m": 64}, "one by one", "few rows: each member's launch"),
        ({"arch": "sm_90"}, "one by one", "mma.sync reaches three fifths"),
        ({"arch": "sm_90", "schedule": "one launch"}, "ticketed", "as asked"),
    ],
)
def test_plan_of_packs(capsys, changes, schedule, reason):
    options = {"m": 4096, "k": 1024, "dtype": "bf16", "arch": "sm_86"} | changes
    flags = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    flags += ["--n", "1024", "256", "256", "--r", "16", "0", "8"]
    for op, others in (("lora_pack", 0), ("lora_pack_backward", 2)):
        assert main(["plan", op, *flags]) == 0
        launches = json.loads(capsys.readouterr().out)
        first, *rest = launches if isinstance(launches, list) else [launches]
        assert first["schedule"] == schedule
        if schedule == "ticketed":
            assert reason in first["reason"] or op == "lora_pack_backward"
            assert [launch["schedule"] for launch in rest] == ["split rows"] * others
            assert _native.cuda.kernels()[first["kernel"]] == (first["block"][0], first["dynamic_smem"])
        else:
            assert reason in first["reason"]


@needs_extension
def test_plans_of_packs_refuse_what_is_none():
    device = dict(sms=108, shared_per_block=166912, capability=80, is_served=True)
    for n, rank in (((), ()), ((8,) * 5, (8,) * 5), ((8, 8), (8,))):
        with pytest.raises(ValueError, match="must be of 1 to 4 members"):
            _native.cuda.plan_lora_pack(dtype="bf16", m=8, n=n, k=8, rank=rank, **device)
    with pytest.raises(ValueError, match="schedule must be"):
        _native.cuda.plan_lora_pack(dtype="bf16", m=8, n=(8,), k=8, rank=(8,), schedule="split", **device)


GROUPED = {"--groups": 8, **PROBLEM, "--m": 4096}


@needs_extension
@pytest.mark.parametrize(
    ("changes", "flags", "schedules", "reason"),
    [
        ({}, [], ["ticketed"], "the vendor's grouped GEMM serves bf16 on sm_90 and sm_100"),
        ({"arch": "sm_90"}, [], ["cublas", "ticketed"], "mma.sync reaches three fifths of the rate"),
        ({"arch": "sm_90"}, ["--in-columns"], ["cublas", "ticketed"], "mma.sync reaches three fifths of the rate"),
        ({"arch": "sm_90", "dtype": "fp16"}, [], ["ticketed"], "the vendor's grouped GEMM serves bf16"),
        ({"arch": "sm_90", "dtype": "fp16"}, ["--shared"], ["cublas", "ticketed"], "three fifths of the rate"),
        ({"arch": "sm_90", "m": 256}, [], ["ticketed"], "few rows of each group: reading its weight"),
        ({"m": 256}, ["--shared"], ["cublas", "ticketed"], "every group's tiles would read it again"),
        ({"m": 256, "groups": 1}, ["--shared"], ["ticketed"], "mma.sync is what the vendor's GEMM uses here"),
        ({"arch": "sm_90", "schedule": "one launch"}, ["--in-columns"], ["ticketed"], "as asked"),
    ],
)
def test_plan_of_rows_in_groups(capsys, changes, flags, schedules, reason):
    options = GROUPED | {f"--{name}": value for name, value in changes.items()}
    flags = [str(part) for option in options.items() for part in option] + flags
    for op, others in (("grouped_lora_linear", []), ("grouped_lora_linear_backward", ["split rows"])):
        assert main(["plan", op, *flags]) == 0
        launches = json.loads(capsys.readouterr().out)
        launches = launches if isinstance(launches, list) else [launches]
        assert [launch["schedule"] for launch in launches] == [*schedules, *others]
        assert all(reason in launch["reason"] for launch in launches[: len(schedules)])
        for launch in launches:
            if launch["schedule"] != "cublas":
                assert _native.cuda.kernels()[launch["kernel"]] == (launch["block"][0], launch["dynamic_smem"])
                names = [field["name"] for field in launch["params"]["fields"]]
                assert names[0] == "x"
                assert "groups.ends" in names


@needs_extension
@pytest.mark.parametrize(
    ("changes", "flags", "schedules", "reason"),
    [
        ({"m": 1}, [], ["decode"], "w is streamed once"),
        ({"m": 64, "r": 13}, [], ["decode"], "w is streamed once"),
        ({"m": 65}, [], ["cublas", "order", "shrink", "expand"], "one product over all rows"),
        ({"m": 1}, ["--dropout"], ["cublas", "order", "shrink", "expand"], "one product over all rows"),
        ({"m": 1}, ["--in-columns"], ["cublas", "order", "shrink", "expand"], "one product over all rows"),
        ({"m": 1, "schedule": "cublas"}, [], ["cublas", "order", "shrink", "expand"], "one product over all rows"),
    ],
)
def test_plan_of_many_adapters(capsys, changes, flags, schedules, reason):
    options = {"--adapters": 8, **PROBLEM} | {f"--{name}": value for name, value in changes.items()}
    flags = [str(part) for option in options.items() for part in option] + flags
    gradients = ["cublas", "order", "shrink", "expand", "split rows"]
    for op, expected in (("multi_lora_linear", schedules), ("multi_lora_linear_backward", gradients)):
        assert main(["plan", op, *flags]) == 0
        launches = json.loads(capsys.readouterr().out)
        launches = launches if isinstance(launches, list) else [launches]
        assert [launch["schedule"] for launch in launches] == expected
        assert op.endswith("backward") or reason in launches[0]["reason"]
        for launch in launches:
            if launch["schedule"] != "cublas":
                assert _native.cuda.kernels()[launch["kernel"]] == (launch["block"][0], launch["dynamic_smem"])


@needs_extension
@pytest.mark.parametrize("op", ["lora_linear", "lora_linear_backward"])
def test_no_plan_of_an_unknown_schedule(op):
    """Kills: a name that nobody knows means the fastest."""
    sizes = dict(dtype="bf16", m=8, n=8, k=8, rank=8, rows_aligned=True, has_dropout=False)
    device = dict(sms=108, shared_per_block=166912, capability=80)
    with pytest.raises(ValueError, match=r'schedule must be "auto", .* or "wgmma, clusters", got "cutlass"'):
        getattr(_native.cuda, f"plan_{op}")(**sizes, **device, schedule="cutlass")


@needs_extension
@pytest.mark.parametrize(
    ("op", "problem", "message"),
    [
        ("lora_linear", dict(m=8, n=8, rank=8, rows_aligned=True, has_dropout=False, sms=0), "sms must be at least 1"),
        ("grouped_lora_linear", dict(m=8, n=8, rank=8, groups=0, is_shared=False, in_columns=False), "groups must be"),
        ("multi_lora_linear", dict(m=8, n=8, rank=8, adapters=2, w_is_whole=True, has_dropout=False, sms=0), "sms"),
        ("lora_pack", dict(m=8, n=(8,), rank=(8,), is_served=True, sms=-1), "sms must be at least 1, got -1"),
        ("dequantize", dict(n=8, block=0, layout="codes4", aligned=True), "block must be at least 1, got 0"),
        ("lora_linear_packed", dict(m=8, n=8, rank=8, block=0), "block must be at least 1, got 0"),
    ],
)
def test_what_a_plan_divides_by_is_not_zero(op, problem, message):
    """Kills: an interpreter that ends with a division by zero."""
    device = dict(sms=108, shared_per_block=166912) | ({} if op == "dequantize" else dict(capability=80))
    with pytest.raises(ValueError, match=message):
        getattr(_native.cuda, f"plan_{op}")(**dict(dtype="bf16", k=64) | device | problem)


@needs_extension
@pytest.mark.parametrize("op", ["prefix_kv", "prefix_kv_backward"])
def test_no_plan_of_a_grid_that_no_launch_has(op):
    device = dict(sms=108, shared_per_block=166912)
    sizes = dict(tokens=2**20, layers=32, heads=2**20, head_dim=128, batch=1)
    with pytest.raises(ValueError, match="too many tiles"):
        getattr(_native.cuda, f"plan_{op}")(dtype="bf16", prefix_dtype="bf16", **sizes, rows_aligned=True, **device)


@needs_extension
@pytest.mark.parametrize("dtype", ["bf16", "tf32"])
@pytest.mark.parametrize("rank", [16, 64])
def test_plan_of_the_gradients(plan, rank, dtype):
    first, second = plan(op="lora_linear_backward", r=rank, dtype=dtype)
    assert (first["schedule"], second["schedule"]) == ("ticketed", "split rows")
    partial_grad_b = 64 * 4096 * 16 if rank == 16 else 0
    assert first["workspace_bytes"] == 4 * (2 + 64 + partial_grad_b)
    for launch in (first, second):
        assert _native.cuda.kernels()[launch["kernel"]] == (launch["block"][0], launch["dynamic_smem"])


PROMPT = {"--batch": 2, "--tokens": 32, "--prompt-rows": 20, "--hidden": 576, "--dtype": "bf16", "--arch": "sm_80"}


@needs_extension
@pytest.mark.parametrize(
    ("op", "flags", "changes", "blocks", "reason"),
    [
        ("prompt_embedding", [], {}, 2 * (1 + 7), "a row per warp"),
        ("prompt_embedding", ["--left"], {}, 2 * (1 + 2), "looks for the first real token itself"),
        ("prompt_embedding", [], {"--batch": 0}, 0, ""),
        ("prompt_embedding_backward", [], {}, 12, "in its order"),
        ("prompt_embedding_backward", [], {"--tasks": 3, "--dtype": "fp32"}, 34, ""),
        ("prompt_embedding_backward", ["--weight", "--embeds"], {"--vocabulary": 1000}, 12 + 8 + 16, ""),
    ],
)
@pytest.mark.parametrize("aligned", [True, False])
def test_plan_of_prompt_embedding(capsys, op, flags, changes, blocks, reason, aligned):
    options = {**PROMPT, **changes}
    flags = flags if aligned else [*flags, "--unaligned"]
    assert main(["plan", op, *(str(part) for option in options.items() for part in option), *flags]) == 0
    launch = json.loads(capsys.readouterr().out)
    if aligned or op == "prompt_embedding":
        assert launch["grid"] == [blocks, 1, 1]
    assert reason in launch["reason"]
    assert ("Lb1E" in launch["kernel"]) == aligned
    assert launch["workspace_bytes"] == 0
    assert _native.cuda.kernels()[launch["kernel"]] == (launch["block"][0], launch["dynamic_smem"])


@needs_extension
@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        (["--dtype", "bf16"], 60 * 3 * 100 * 16),
        (["--dtype", "bf16", "--prefix-dtype", "bf16"], 60 * 3 * 100 * 8),
        (["--dtype", "fp32", "--unaligned"], 60 * 3 * 100 * 64),
    ],
)
def test_plan_of_prefix_kv(capsys, options, blocks):
    sizes = ["--tokens", "100", "--layers", "30", "--heads", "3", "--head-dim", "64", "--arch", "sm_80"]
    per_part = -(-blocks // 60 // 256)
    assert main(["plan", "prefix_kv", *sizes, *options]) == 0
    launch = json.loads(capsys.readouterr().out)
    assert main(["plan", "prefix_kv_backward", *sizes, *options]) == 0
    backward = json.loads(capsys.readouterr().out)
    assert launch["grid"] == [60 * per_part, 1, 1]
    assert [b["grid"][0] for b in backward] == [32 * per_part, 28 * per_part]
    for one in (launch, *backward):
        assert ("Lb1E" in one["kernel"]) == ("--unaligned" not in options)
        assert _native.cuda.kernels()[one["kernel"]] == (one["block"][0], one["dynamic_smem"])


@needs_extension
@pytest.mark.parametrize(
    ("options", "blocks", "aligned"),
    [
        ([], 1536 * 576 // 16384, True),
        (["--block", "32", "--n", "1537"], 1537 * 576 // 16384 + 1, True),
        (["--unaligned"], 1536 * 576 // 512, False),
        (["--block", "96"], 1536 * 576 // 512, False),
        (["--layout", "codes4_low", "--block", "16"], 1536 * 576 // 16384, True),
        (["--layout", "int8"], 1536 * 576 // 8192, True),
        (["--layout", "e4m3", "--block", "128"], 1536 * 576 // 8192, True),
        (["--layout", "e4m3", "--block", "100"], 1536 * 576 // 256, False),
    ],
)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_plan_of_dequantize(capsys, dtype, options, blocks, aligned):
    sizes = ["--n", "1536", "--k", "576", "--dtype", dtype, "--arch", "sm_80"]
    assert main(["plan", "dequantize", *sizes, *options]) == 0
    launch = json.loads(capsys.readouterr().out)
    assert launch["grid"] == [blocks, 1, 1]
    assert ("Lb1E" in launch["kernel"]) == aligned
    assert _native.cuda.kernels()[launch["kernel"]] == (launch["block"][0], launch["dynamic_smem"])


@needs_extension
def test_plan_of_dequantize_refuses_a_block_over_row_ends(capsys):
    assert main(["plan", "dequantize", *["--n", "64", "--k", "96", "--dtype", "bf16", "--arch", "sm_80"]]) == 2
    assert "block must be even, and k a multiple of it, got 64 and 96" in capsys.readouterr().err


@needs_extension
@pytest.mark.parametrize(("columns", "aligned"), [(128256, True), (50257, False)])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_plan_of_cross_entropy_rows(capsys, dtype, columns, aligned):
    sizes = ["--rows", "512", "--columns", str(columns), "--dtype", dtype, "--arch", "sm_90"]
    assert main(["plan", "cross_entropy_rows", *sizes]) == 0
    launch = json.loads(capsys.readouterr().out)
    assert launch["grid"] == [512, 1, 1]
    assert ("Lb1E" in launch["kernel"]) == aligned
    assert _native.cuda.kernels()[launch["kernel"]] == (launch["block"][0], launch["dynamic_smem"])


PACKED = {"--m": 1, "--n": 4096, "--k": 4096, "--r": 16, "--dtype": "bf16", "--arch": "sm_80"}


@needs_extension
@pytest.mark.parametrize(
    ("changes", "blocks", "row_tile"),
    [
        ({}, 4 + 256, 8),
        ({"--m": 16, "--r": 33, "--dtype": "fp16"}, 3 * 4 + 256, 16),
        ({"--n": 4097, "--k": 128, "--m": 8}, 1 + 257, 8),
        ({"--k": 2**20, "--block": 4096}, 8 + 256, 8),
        ({"--m": 17}, 4 + 128, 32),
        ({"--m": 32, "--arch": "sm_100"}, 4 + 128, 32),
        ({"--m": 64, "--n": 4065, "--r": 17}, 2 * 2 * 4 + 2 * 128, 32),
    ],
    ids=str,
)
def test_plan_of_few_rows_by_a_packed_weight(capsys, changes, blocks, row_tile):
    options = {**PACKED, **changes}
    assert main(["plan", "lora_linear_packed", *(str(part) for option in options.items() for part in option)]) == 0
    launch = json.loads(capsys.readouterr().out)
    assert launch["schedule"] == "decode"
    assert launch["grid"] == [blocks, 1, 1]
    assert f"ELi{row_tile}E" in launch["kernel"]
    assert _native.cuda.kernels()[launch["kernel"]] == (launch["block"][0], launch["dynamic_smem"])
    row_tiles, columns = (-(-options["--m"] // 32), 32) if row_tile == 32 else (1, 16)
    tiles_of_s = -(-options["--r"] // 16) * row_tiles
    parts = (blocks - -(-options["--n"] // columns) * row_tiles) // tiles_of_s
    assert launch["workspace_bytes"] == 4 * (2 + tiles_of_s + tiles_of_s * parts * 16 * row_tile)


@needs_extension
@pytest.mark.parametrize(
    "changes", [{"--m": 65}, {"--r": 65}, {"--block": 32}, {"--k": 4160, "--block": 4096}], ids=str
)
def test_plan_of_many_rows_by_a_packed_weight_is_that_of_two_ops(capsys, changes):
    options = {**PACKED, **changes}
    assert main(["plan", "lora_linear_packed", *(str(part) for option in options.items() for part in option)]) == 2
    assert "others take those of dequantize and of lora_linear" in capsys.readouterr().err


@needs_extension
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_most_rows_that_are_decoded_are_what_dispatch_takes_them_for(capsys, arch):
    """Kills: a number that was changed on one side only."""
    most = gpu_packed.most_decoded_rows(divmod(int(arch.removeprefix("sm_")), 10))
    for rows, status in ((most, 0), (most + 1, 2)):
        options = {**PACKED, "--m": rows, "--arch": arch}
        arguments = [str(part) for option in options.items() for part in option]
        assert main(["plan", "lora_linear_packed", *arguments]) == status
    capsys.readouterr()


@needs_extension
def test_no_rows_need_no_block(plan):
    assert plan(m=0)["grid"] == [0, 1, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "sm_70"}, "--arch: invalid choice"),
        ({"m": -1}, "--m: must be at least 0"),
        ({"r": 257}, "--r: must be at most 256"),
        ({"dtype": "fp32"}, "--dtype: invalid choice"),
        pytest.param({"m": 2**24, "n": 2**24}, "tickets are 32 bits wide", marks=needs_extension),
    ],
    ids=str,
)
def test_plan_refuses_in_one_line(capsys, changes, message):
    assert main(command(**changes)) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_plan_without_the_extension(capsys, monkeypatch):
    monkeypatch.setattr(_native, "cuda", None)
    monkeypatch.setattr(_native, "cuda_error", "extension not built")
    assert main(command()) == 2
    assert "lora_kernels._cuda, which cannot be loaded: extension not built" in capsys.readouterr().err


@needs_extension
def test_kernels_are_named_and_listed_as_they_were_compiled():
    # The names under which the CUDA runtime finds the kernels of a module are strings in it; host functions are, too,
    # and their variables, which have the type of a parameter twice. A kernel takes parameters.
    module = Path(_native.cuda.__file__).read_bytes()
    compiled = {name.decode() for name in re.findall(rb"(_ZN2lk\d+\w*?_kernel[IE]\w*)(?<!Ev)(?=\0)", module)}
    assert {name for name in compiled if "RKN2lk" not in name} == set(_native.cuda.kernels())


def each(**axes):
    """Keyword arguments, with every combination of these values."""
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


ROWS, TYPES = {"dtype": ["bf16", "fp16", "tf32"], "capability": [90]}, {"dtype": ["bf16", "fp16", "fp32"]}
RANKS = [16, 64, 128, 15, 63, 127]
EITHER = [True, False]
PROBLEMS = {
    # By planned op, whose gradients have the same: problems that lead to all of its kernels.
    "lora_linear": each(
        **ROWS, m=[16, 64, 100, 8192], n=[64, 4096, 4095], k=[4096, 4095], rank=RANKS, has_dropout=EITHER,
        schedule=["one launch", "cublas", "wgmma", "wgmma, clusters"], rows_aligned=[True],
    ),
    "grouped_lora_linear": each(
        **ROWS, m=[64, 8192], n=[4096], k=[4096], rank=RANKS, groups=[4], is_shared=[True], in_columns=EITHER,
        schedule=["one launch", "cublas"],
    ),
    "multi_lora_linear": each(
        **ROWS, m=[16, 64, 8192], n=[4096], k=[4096], rank=RANKS, adapters=[4], w_is_whole=[True], has_dropout=[False],
    ),
    "lora_pack": each(
        **ROWS, m=[100, 8192], n=[(4096, 256)], k=[4096], rank=[(16, 8), (64, 8)], is_served=[True],
        schedule=["one launch"],
    ),
    "lora_linear_packed": each(
        dtype=["bf16", "fp16"], m=[1, 16, 17], n=[64], k=[64], block=[64], rank=[16], capability=[90]
    ),
    "dequantize": each(
        **TYPES, layout=gpu_packed.LAYOUTS, n=[64], k=[64], block=[64], aligned=EITHER,
    ),
    "gated_activation": each(**TYPES, count=[64, 63], aligned=[True]),
    "cross_entropy_rows": each(**TYPES, rows=[8], columns=[64, 63]),
    "prefix_kv": each(
        **TYPES, prefix_dtype=["fp32"], tokens=[8], layers=[2], heads=[2], head_dim=[64, 63], batch=[2],
        rows_aligned=[True],
    ),
    "prompt_embedding": each(
        **TYPES, batch=[2], tokens=[8], prompt_rows=[4], hidden=[64, 63], tasks=[1], vocabulary=[8],
        rows_aligned=[True], need_prompt=[True], need_weight=[True], need_embeds=[True], looks_for_tokens=[False],
    ),
}  # fmt: skip


@needs_extension
def test_every_compiled_kernel_is_one_that_a_problem_leads_to():
    """Kills: kernels that nobody dispatches to, as twins for rows that no configuration sends there; each is compiled
    for every architecture, and shipped.
    """
    reached = set()
    for name, problems in PROBLEMS.items():
        plans = [getattr(_native.cuda, f"plan_{name}{role}", None) for role in ("", "_backward")]
        for problem, plan_of in itertools.product(problems, filter(None, plans)):
            launches = plan_of(**problem, sms=132, shared_per_block=227 << 10)
            reached |= {one.get("kernel") for one in (launches if isinstance(launches, list) else [launches])}
    assert {name.removesuffix("_backward") for name in PLANNED_OPS} == PROBLEMS.keys()
    unplanned = "_ZN2lk19dropout_mask_kernelENS_17DropoutMaskParamsE"  # an op's one kernel, of one launch
    assert set(_native.cuda.kernels()) - reached == {unplanned}


@pytest.mark.parametrize(
    ("arch", "registers", "threads", "shared", "blocks"),
    [
        ("sm_80", 255, 128, 64 << 10, 2),  # registers and shared memory
        ("sm_80", 168, 256, 64 << 10, 1),  # registers
        ("sm_86", 115, 128, 48 << 10, 2),  # shared memory
        ("sm_90", 22, 256, 0, 8),  # threads
        ("sm_86", 16, 32, 0, 16),  # blocks
    ],
)
def test_blocks_per_sm(arch, registers, threads, shared, blocks):
    assert blocks_per_sm(ARCHITECTURES[arch], registers, threads, shared) == blocks


OCCUPANCY = """
#include <cstdio>
#include <cstring>
#include "cuda_runtime_api.h"
#include "cuda_occupancy.h"
int main() {
  int major, minor, sm_shared, opt_in, sm_threads, registers, threads, shared;
  while (std::scanf("%d%d%d%d%d%d%d%d", &major, &minor, &sm_shared, &opt_in, &sm_threads, &registers, &threads,
                    &shared) == 8) {
    cudaOccDeviceProp device;
    std::memset(static_cast<void*>(&device), 0, sizeof device);
    device.computeMajor = major;
    device.computeMinor = minor;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = sm_threads;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.numSms = 1;
    device.sharedMemPerBlock = 48 << 10;
    device.sharedMemPerMultiprocessor = sm_shared;
    device.sharedMemPerBlockOptin = opt_in;
    device.reservedSharedMemPerBlock = 1024;
    cudaOccFuncAttributes kernel;
    std::memset(static_cast<void*>(&kernel), 0, sizeof kernel);
    kernel.maxThreadsPerBlock = 1024;
    kernel.numRegs = registers;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = opt_in;
    cudaOccDeviceState state;
    std::memset(static_cast<void*>(&state), 0, sizeof state);
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, shared) != 0) return 1;
    std::printf("%d\\n", result.activeBlocksPerMultiprocessor);
  }
}
"""


def test_blocks_per_sm_is_what_the_toolkit_computes(tmp_path):
    toolkit = setup_script.load().CUDA_HOME
    if toolkit is None or not (toolkit / "include" / "cuda_occupancy.h").is_file():
        pytest.skip("no CUDA toolkit with cuda_occupancy.h")
    source, program = tmp_path / "occupancy.cpp", tmp_path / "occupancy"
    source.write_text(OCCUPANCY)
    subprocess.run(["g++", f"-I{toolkit}/include", str(source), "-o", str(program)], check=True)
    usages = (16, 64, 128, 168, 255), (32, 64, 128, 256), (0, 1000, 48 << 10, 64 << 10, 96 << 10)
    cases = [(arch, *usage) for arch in ARCHITECTURES for usage in itertools.product(*usages)]
    lines = []
    for name, *usage in cases:
        arch = ARCHITECTURES[name]
        number = name.removeprefix("sm_")
        limits = arch.shared_per_sm, arch.shared_per_block, arch.threads_per_sm
        lines.append(" ".join(map(str, (number[:-1], number[-1], *limits, *usage))))
    done = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True)
    assert [blocks_per_sm(ARCHITECTURES[name], *usage) for name, *usage in cases] == list(map(int, done.stdout.split()))
