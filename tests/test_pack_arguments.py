"""lora_pack: what its arguments must be, of the function and of the registered ops."""

import pytest
import torch
from packs import FP32, Pack, op_arguments, small
from torch.autograd import forward_ad

import lora_kernels as lk
from lora_kernels import _native

ON_CPU = pytest.mark.skipif(_native.cpu is None, reason="lora_kernels._C is not built")
PACK = Pack(12, 40, (24, 16), (4, 3))


@pytest.fixture(params=["reference", None], ids=str)
def backend(request):
    with lk.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("rows", [12, 2])
def test_bad_arguments(backend, rows):
    with torch.set_grad_enabled(rows == 12):  # few rows without gradients have a way of their own
        check_bad_arguments(rows)


def check_bad_arguments(rows):
    t = {k: [v.detach() if v is not None else v for v in given] if isinstance(given, list) else given.detach()
         for k, given in small(PACK._replace(m=rows), bias=rows == 12).items()}  # fmt: skip
    if rows == 2:
        del t["biases"]
    x, Ws, As, Bs = t["x"], t["weights"], t["lora_As"], t["lora_Bs"]

    def refused(error, message, **changed):
        with pytest.raises(error, match=f"lora_pack: .*{message}"):
            lk.lora_pack(**{**t, **changed})

    refused(ValueError, "weights must be of one member at least", weights=[])
    refused(TypeError, "weights must be a list or tuple, got Tensor", weights=Ws[0])
    refused(ValueError, "lora_As must be of 2 members, as weights are, got 1", lora_As=As[:1])
    refused(ValueError, "lora_Bs must be of 2 members, as weights are, got 3", lora_Bs=[*Bs, Bs[0]])
    refused(ValueError, "biases must be of 2 members", biases=[None])
    refused(TypeError, "biases must be a list or tuple", biases=torch.randn(24))
    refused(ValueError, "scalings must be of 2 members", scalings=[1.0])
    refused(ValueError, "dropout_p must be of 2 members", dropout_p=[0.1] * 3)
    refused(TypeError, "member 1: lora_B must be a tensor", lora_Bs=[Bs[0], None])
    refused(TypeError, "member 0: lora_A must be a tensor", lora_As=[None, As[1]])
    refused(ValueError, r"member 1: lora_A must be \[rank, 40\]", lora_As=[As[0], torch.randn(3, 41)])
    refused(ValueError, r"member 1: lora_B must be \[16, 3\]", lora_Bs=[Bs[0], Bs[0]])
    refused(TypeError, "member 0: lora_B must be torch.float32", lora_Bs=[Bs[0].half(), Bs[1]])
    refused(TypeError, "member 0: lora_A must be torch.float32", lora_As=[As[0].half(), As[1]],
            lora_Bs=[Bs[0].half(), Bs[1]])  # fmt: skip
    refused(ValueError, r"member 0: x must be \[\.\.\., 40\]", x=torch.randn(rows, 39))
    refused(ValueError, r"member 1: x must be \[\.\.\., 41\]", weights=[Ws[0], torch.randn(16, 41)])
    refused(ValueError, r"member 1: weight must be \[out_features, in_features\]", weights=[Ws[0], torch.randn(40)])
    refused(TypeError, "member 1: weight must be torch.float32", weights=[Ws[0], Ws[1].half()])
    refused(ValueError, "member 1: weight must be on", weights=[Ws[0], Ws[1].to("meta")])
    refused(ValueError, r"member 1: bias must be \[16\]", biases=[None, torch.randn(24)])
    refused(TypeError, "member 0: x must be float32", x=x.int())
    refused(ValueError, "member 1: scaling must be finite", scalings=[1.0, float("inf")])
    refused(TypeError, "member 0: scaling must be a number", scalings="ab")
    refused(ValueError, "member 0: scaling must be a number or a floating-point tensor of one", scalings=torch.ones(2))
    refused(ValueError, "member 1: dropout_p must be", dropout_p=[0.1, 1.5])
    refused(ValueError, "member 0: dropout_p must be", dropout_p=-0.5, training=True)
    refused(TypeError, "seed must be an int", seed="1", dropout_p=0.5, training=True)
    refused(ValueError, "seed must be an int64 tensor", seed=torch.ones(1), dropout_p=0.5, training=True)
    packed = lk.FORMATS["nf4"].quantize(torch.randn(16, 64))
    refused(TypeError, "member 1: weight must be a tensor, got a QuantizedWeight", weights=[Ws[0], packed])


@ON_CPU
@pytest.mark.parametrize("name", ["x", "weights", "lora_As", "lora_Bs"])
def test_sparse_operands_are_refused(name):
    t = small(PACK)
    t[name] = t[name].detach().to_sparse() if name == "x" else [v.detach().to_sparse() for v in t[name]]
    with pytest.raises(TypeError, match=r"lora_pack: .* must be a dense tensor"):
        lk.lora_pack(**t)


def test_transforms_are_refused():
    t = small(PACK)
    with pytest.raises(RuntimeError, match=r"lora_pack: .*not supported"):
        torch.func.vmap(lambda x: lk.lora_pack(**{**t, "x": x}))(torch.randn(2, 12, 40))
    with forward_ad.dual_level():
        As = [t["lora_As"][0], forward_ad.make_dual(t["lora_As"][1], torch.ones(3, 40))]
        with pytest.raises(RuntimeError, match=r"lora_pack: .*not supported"):
            lk.lora_pack(**{**t, "lora_As": As})
    y, _ = lk.lora_pack(**t)
    grad, _ = torch.autograd.grad(y.square().sum(), (t["x"], t["lora_As"][0]), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


WRONG = {
    "x": [torch.randn(12, 48)],
    "weights": [torch.randn(24, 32), torch.randn(1, 24, 40)],
    "lora_As": [torch.randn(4, 32), torch.randn(40), torch.randn(0, 8)],
    "lora_Bs": [torch.randn(23, 4), torch.randn(24, 3), torch.randn(24, 4).half()],
    "biases": [torch.randn(23), torch.randn(24).half()],
    "seed": [torch.tensor([1, 2]), torch.tensor([1.0])],
    "grad_ys": [torch.randn(12, 23), torch.randn(11, 24)],
    "s": [torch.randn(12 * 7 - 1), torch.randn(12, 7)],
}
NAMES = ("x", "weights", "lora_As", "lora_Bs", "biases", "seed", "scalings", "dropout_p")


@ON_CPU
@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("rows", [12, 2])
def test_registered_ops_read_nothing_that_does_not_fit(name, rows):
    """With 12 rows or few, in place of the first member's. Kills: a check left out."""
    ops = torch.ops.lora_kernels
    for misfit in WRONG[name]:
        t = dict(zip(NAMES, op_arguments(PACK._replace(m=rows), 0.1)))
        t |= {"grad_ys": [torch.randn(rows, n) for n in PACK.ns], "s": torch.randn(rows * 7)}
        if misfit.shape[0] == 12:
            misfit = misfit[:rows]
        t[name] = [misfit, *t[name][1:]] if isinstance(t[name], list) else misfit
        t = {k: [v.detach() for v in given] if isinstance(given, list) and k not in ("scalings", "dropout_p") else given
             for k, given in t.items()}  # fmt: skip
        of_member = name.removesuffix("es" if name == "biases" else "s") or name
        message = rf"\b({of_member}{'|x' if name == 'weights' else ''}) must (be|have)"
        if name not in ("grad_ys", "s"):
            with pytest.raises(RuntimeError, match=message):
                ops.lora_pack(*(t[k] for k in NAMES))
        if name != "biases":
            with pytest.raises(RuntimeError, match=message):
                ops.lora_pack_backward(
                    t["grad_ys"], t["x"], t["s"], t["weights"], t["lora_As"], t["lora_Bs"], t["seed"], t["scalings"],
                    t["dropout_p"], True, [True] * 2, [True] * 2,
                )  # fmt: skip


@ON_CPU
def test_lists_of_other_lengths_are_not_read():
    args = list(op_arguments(PACK, 0.0, FP32))
    for place in (1, 2, 3, 6, 7):
        given = [*args[:place], args[place][:1], *args[place + 1 :]]
        with pytest.raises(RuntimeError, match="must be of as many members"):
            torch.ops.lora_kernels_native.lora_pack.default(*given, "aten")
    for schedule in ("aten, aten, aten", "aten, onednn, aten"):
        with pytest.raises(RuntimeError, match="one schedule, or one per member"):
            torch.ops.lora_kernels_native.lora_pack.default(*args, schedule)
    decode = torch.ops.lora_kernels_native.lora_pack_decode.default
    for operands in (args[1], [*args[1], *args[2], *args[3], args[4][0]]):
        with pytest.raises(RuntimeError, match="operands must be weights, lora_As, lora_Bs and maybe biases"):
            decode(args[0], operands, args[6])
    with pytest.raises(RuntimeError, match=r"lora_A must be"):
        decode(args[0], [*args[1], *args[3], *args[2]], args[6])
    with pytest.raises(RuntimeError, match="biases must be of no member or of each"):
        torch.ops.lora_kernels_native.lora_pack.default(*args[:4], args[4][:1], *args[5:], "aten")
