"""multi_lora_linear: what its arguments must be, of the function and of the registered ops."""

import pytest
import torch
from many_adapters import small

import lora_kernels as lk
from lora_kernels import _native

ON_CPU = pytest.mark.skipif(_native.cpu is None, reason="lora_kernels._C is not built")


@pytest.fixture(params=["reference", None], ids=str)
def backend(request):
    with lk.use_backend(request.param):
        yield request.param


def test_bad_arguments(backend):
    t = {k: None if v is None else v.detach() for k, v in small().items()}

    def refused(error, message, **changed):
        with pytest.raises(error, match=f"multi_lora_linear: .*{message}"):
            lk.multi_lora_linear(**{**t, **changed})

    ids, x = t["adapter_ids"], t["x"]
    refused(ValueError, "adapter_ids must be from -1 to 3, got -1 to 4", adapter_ids=ids.clamp(max=2) + 2 * (ids == 2))
    refused(ValueError, "adapter_ids must be from -1 to 3, got -2", adapter_ids=ids - (ids == -1).long())
    refused(ValueError, "adapter_ids must be one for each row", adapter_ids=ids[:-1])
    refused(ValueError, "adapter_ids must be one for each row", adapter_ids=ids[0])
    refused(TypeError, "adapter_ids must be int32 or int64", adapter_ids=ids.float())
    refused(TypeError, "adapter_ids must be a tensor", adapter_ids=ids.tolist())
    refused(ValueError, "adapter_ids must be on cpu", adapter_ids=ids.to("meta"))
    refused(ValueError, r"ranks must be \[4\]", ranks=torch.tensor([1, 2]))
    refused(ValueError, "ranks must be from 0 to 7", ranks=torch.tensor([1, 2, 8, 7]))
    refused(ValueError, "ranks must be from 0 to 7", ranks=torch.tensor([1, -1, 7, 7]))
    refused(TypeError, "ranks must be a tensor", ranks=[1, 2, 3, 4])
    refused(TypeError, "ranks must be int32 or int64", ranks=torch.ones(4))
    refused(ValueError, r"lora_A must be \[adapters, rank, 40\]", lora_A=torch.randn(4, 7, 41))
    refused(ValueError, r"lora_A must be \[adapters, rank, 40\]", lora_A=torch.randn(7, 40))
    refused(ValueError, r"lora_A must be \[adapters, rank, 40\]", lora_A=torch.randn(0, 7, 40))
    refused(ValueError, r"lora_B must be \[4, 24, 7\]", lora_B=torch.randn(4, 24, 6))
    refused(TypeError, "lora_B must be torch.float32 like lora_A", lora_B=t["lora_B"].half())
    refused(TypeError, "lora_A must be torch.float32 like x", lora_A=t["lora_A"].half(), lora_B=t["lora_B"].half())
    refused(ValueError, r"weight must be \[out_features, in_features\]", weight=torch.randn(2, 24, 40))
    refused(ValueError, r"x must be \[\.\.\., 40\]", x=torch.randn(23, 41))
    refused(TypeError, "x must be float32", x=x.int())
    refused(TypeError, "x must be a dense tensor", x=x.to_sparse())
    refused(ValueError, r"one element or \[4\]", scaling=torch.ones(2))
    refused(ValueError, "scaling must be finite", scaling=float("inf"))
    refused(TypeError, "scaling must be a number", scaling="1")
    refused(ValueError, "dropout_p must be", dropout_p=1.5)
    refused(ValueError, r"bias must be \[24\]", bias=torch.randn(4, 24))


MISFITS = {
    "x": [torch.randn(4, 9), torch.randn(5, 8)], "weight": [torch.randn(6, 9), torch.randn(1, 6, 8)],
    "lora_A": [torch.randn(2, 3, 9), torch.randn(0, 3, 8), torch.randn(2, 0, 8), torch.randn(3, 8)],
    "lora_B": [torch.randn(2, 5, 3), torch.randn(2, 6, 2), torch.randn(3, 6, 3), torch.randn(2, 6, 3).half()],
    "adapter_ids": [torch.tensor([0, 1, 2, 0]), torch.tensor([0, -2, 1, 0]), torch.tensor([0, 1]), torch.zeros(4)],
    "ranks": [torch.tensor([1, 4]), torch.tensor([-1, 3]), torch.tensor([1]), torch.ones(2)],
    "scalings": [torch.ones(3), torch.ones(2, 1)], "bias": [torch.randn(5), torch.randn(6).half()],
    "seed": [torch.tensor([1, 2]), torch.tensor([1.0])], "grad_y": [torch.randn(4, 5), torch.randn(3, 6)],
    "s": [torch.randn(4, 2), torch.randn(3, 3)],
}  # fmt: skip


@ON_CPU
@pytest.mark.parametrize("name", MISFITS)
def test_registered_ops_read_nothing_that_does_not_fit(name):
    ops = torch.ops.lora_kernels
    for misfit in MISFITS[name]:
        t = {
            "x": torch.randn(4, 8), "weight": torch.randn(6, 8), "lora_A": torch.randn(2, 3, 8),
            "lora_B": torch.randn(2, 6, 3), "adapter_ids": torch.tensor([0, 1, -1, 0]), "ranks": torch.tensor([2, 3]),
            "scalings": torch.ones(2), "bias": torch.randn(6), "seed": torch.tensor([1]), "grad_y": torch.randn(4, 6),
            "s": torch.randn(4, 3), name: misfit,
        }  # fmt: skip
        pools = [t[k] for k in ("weight", "lora_A", "lora_B", "adapter_ids", "ranks", "scalings")]
        message = rf"\b{name}\b.* must (be|have)|must be .*\b{name}\b|x must be|each row of x"
        if name not in ("grad_y", "s"):
            with pytest.raises(RuntimeError, match=message):
                ops.multi_lora_linear(t["x"], *pools, t["bias"], t["seed"], 1.0, 0.1)
        if name != "bias":
            with pytest.raises(RuntimeError, match=message):
                ops.multi_lora_linear_backward(
                    t["grad_y"], t["x"], t["s"], *pools, t["seed"], 1.0, 0.1, True, True, True
                )


@ON_CPU
def test_misfits_of_adapters_that_lie_apart():
    x, W, A, B = torch.randn(3, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    apart = torch.ops.lora_kernels_native.multi_lora_apart
    for args, message in (
        ((x, W, [A], [B, B], torch.zeros(3).int(), None, [1.0]), "must be of as many adapters"),
        ((x, W, [], [], torch.zeros(3).int(), None, []), "must be of as many adapters"),
        ((x, W, [A], [B], torch.zeros(3).int(), None, [1.0, 2.0]), "must be of as many adapters"),
        ((x, W, [A[:, 1:]], [B], torch.zeros(3).int(), None, [1.0]), "lora_A must be"),
        ((x, W, [A], [B[1:]], torch.zeros(3).int(), None, [1.0]), "lora_B must be"),
        ((x, W, [A], [B], torch.ones(3).int(), None, [1.0]), "adapter_ids must be"),
        ((x, W, [A], [B], torch.zeros(2).int(), None, [1.0]), "adapter_ids must be"),
        ((x, W[:, 1:], [A], [B], torch.zeros(3).int(), None, [1.0]), "x must be"),
        ((x, W, [A], [B], torch.zeros(3).int(), B[0], [1.0]), "bias must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            apart(*args, "aten")
