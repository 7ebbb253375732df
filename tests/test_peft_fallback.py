"""A patched PEFT layer where it is not fused: bitwise what stock PEFT computes, and the reason is counted."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig
from peft_layers import BF16, K, N, Net, both_adapters, lin, make, run
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

import lora_kernels as lk
from lora_kernels.reasons import Reason


class OwnLinear(nn.Linear):
    pass


def adapter_elsewhere(model):
    model.add_adapter("elsewhere", LoraConfig(target_modules=["out"]))
    model.set_adapter("elsewhere")


def disabled_and_merged(model):
    model.merge_adapter()
    model.base_model.disable_adapter_layers()


def tensor_scaling(model):
    lin(model).scaling["default"] = torch.full((N,), 1.5)


def lora_and_dora(model):
    both_adapters(model, use_dora=True)


def bias_in_lora_B(model):  # PEFT's config refuses it together with DoRA
    lin(model).lora_B["default"].bias = nn.Parameter(torch.ones(N))


def unfreeze(model):
    lin(model).base_layer.weight.requires_grad_()


def own_dropout(model):
    lin(model).lora_dropout["default"] = nn.AlphaDropout(0.0)


def inplace_dropout(model):
    lin(model).lora_dropout["default"] = nn.Dropout(0.0, inplace=True)


def narrow_adapter(model):
    lin(model).lora_A.to(BF16), lin(model).lora_B.to(BF16)


def hook(path):
    return lambda model: lin(model).get_submodule(path).register_forward_hook(lambda m, args, out: out * 2)


def pre_hook(path):
    return lambda model: lin(model).get_submodule(path).register_forward_pre_hook(lambda m, args: (args[0] * 2,))


def backward_hook(path):
    return lambda model: lin(model).get_submodule(path).register_full_backward_hook(lambda m, gx, gy: (gx[0] * 2,))


def accelerate_hook(path):
    return lambda model: add_hook_to_module(lin(model).get_submodule(path), ModelHook())


A, B, BASE, DROP = "lora_A.default", "lora_B.default", "base_layer", "lora_dropout.default"
FALLBACKS = {
    "disabled": ({}, lambda m: m.base_model.disable_adapter_layers(), Reason.DISABLED),
    "disabled, merged": ({}, disabled_and_merged, Reason.DISABLED),
    "merged": ({}, lambda m: m.merge_adapter(), Reason.MERGED),
    "several adapters, DoRA and dropout": ({"lora_dropout": 0.2}, lora_and_dora, Reason.DORA),
    "several adapters, dropout and dtypes": (
        {"lora_dropout": 0.2},
        lambda m: narrow_adapter(m) or both_adapters(m),
        Reason.MIXED_DTYPES,
    ),
    "several adapters, one DoRA": ({}, lora_and_dora, Reason.DORA),
    "several adapters, dtypes": ({}, lambda m: narrow_adapter(m) or both_adapters(m), Reason.MIXED_DTYPES),
    "adapter elsewhere": ({}, adapter_elsewhere, Reason.NO_ACTIVE_ADAPTER),
    "dora, lora_bias": ({"use_dora": True}, bias_in_lora_B, Reason.DORA),
    "dora, hook": ({"use_dora": True}, hook("lora_magnitude_vector.default"), Reason.ADAPTER_HOOKS),
    "mica": ({"init_lora_weights": "mica"}, None, Reason.VARIANT),
    "conv1d, base trains": ({"net": Net(linear=Conv1D)}, lambda m: unfreeze(m), Reason.BASE_REQUIRES_GRAD),
    "linear subclass": ({"net": Net(linear=OwnLinear)}, None, Reason.BASE_LAYER),
    "tensor scaling": ({}, tensor_scaling, Reason.TENSOR_SCALING),
    "hook A": ({}, hook(A), Reason.ADAPTER_HOOKS),
    "hook B": ({}, hook(B), Reason.ADAPTER_HOOKS),
    "hook base": ({}, hook(BASE), Reason.ADAPTER_HOOKS),
    "hook dropout": ({"lora_dropout": 0.1}, hook(DROP), Reason.ADAPTER_HOOKS),
    "pre-hook A": ({}, pre_hook(A), Reason.ADAPTER_HOOKS),
    "backward hook B": ({}, backward_hook(B), Reason.ADAPTER_HOOKS),
    "accelerate base": ({}, accelerate_hook(BASE), Reason.INSTANCE_FORWARD),
    "accelerate A": ({}, accelerate_hook(A), Reason.INSTANCE_FORWARD),
    "own dropout": ({}, own_dropout, Reason.ADAPTER_MODULES),
    "inplace dropout": ({}, inplace_dropout, Reason.ADAPTER_MODULES),
    "parametrized base": ({}, lambda m: parametrizations.weight_norm(lin(m).base_layer), Reason.PARAMETRIZED),
    "parametrized A": ({}, lambda m: parametrizations.weight_norm(lin(m).lora_A.default), Reason.PARAMETRIZED),
    "base trains": ({}, unfreeze, Reason.BASE_REQUIRES_GRAD),
    "narrow adapter": ({}, narrow_adapter, Reason.MIXED_DTYPES),
}


@pytest.mark.parametrize(("options", "change", "reason"), FALLBACKS.values(), ids=FALLBACKS.keys())
def test_falls_back_to_peft(options, change, reason):
    options = dict(options)
    stock = make(net=copy.deepcopy(options.pop("net", None)), **options)
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    for model in (stock, patched):
        if change is not None:
            torch.manual_seed(1)
            change(model)
    x = torch.randn(6, K, requires_grad=True)
    torch.manual_seed(2)
    expected = run(lin(stock), x)
    torch.manual_seed(2)
    ours = run(lin(patched), x)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name
    assert lk.stats() == {"served": {}, "fallback": {("lora_linear", str(reason)): 1}}
    assert ("base_model.model.lin", reason) in lk.patch(patched).kept


def test_other_arguments():
    stock = make()
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    x = torch.randn(4, K)
    torch.testing.assert_close(lin(patched)(x, alora_offsets=None), lin(stock)(x, alora_offsets=None))
    assert lk.stats()["fallback"] == {}
    with pytest.raises(TypeError):
        lin(patched)(x, 3)
    assert lk.stats()["fallback"] == {("lora_linear", Reason.EXTRA_ARGUMENTS): 1}


@pytest.mark.parametrize("scaling", [float("inf"), -math.inf, math.nan, np.float32("inf")], ids=str)
def test_scaling_that_the_op_refuses(scaling):
    stock = make()
    lin(stock).scaling["default"] = scaling
    patched = copy.deepcopy(stock)
    assert lk.patch(patched).kept == [("base_model.model.lin", Reason.SCALING)]
    x = torch.randn(4, K)
    torch.testing.assert_close(lin(patched)(x), lin(stock)(x), rtol=0, atol=0, equal_nan=True)
    assert lk.stats() == {"served": {}, "fallback": {("lora_linear", Reason.SCALING): 1}}


def test_weight_made_in_inference_mode():
    """torch's linear saves such a weight only where x needs a gradient; our Function always would."""
    stock, x = make(), torch.randn(4, K)
    with torch.inference_mode():
        weight = nn.Parameter(lin(stock).base_layer.weight.clone(), requires_grad=False)
    lin(stock).base_layer.weight = weight
    patched = copy.deepcopy(stock)
    lin(patched).base_layer.weight = weight
    lk.patch(patched)
    ours, theirs = run(lin(patched), x), run(lin(stock), x)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert lk.stats() == {"served": {}, "fallback": {("lora_linear", Reason.INFERENCE_TENSOR): 1}}
    with torch.no_grad():
        torch.testing.assert_close(lin(patched)(x), theirs["y"])
    assert sum(lk.stats()["served"].values()) == 1


def test_global_hooks_see_every_module():
    stock, x = make(), torch.randn(4, K)
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        assert torch.equal(lin(patched)(x), lin(stock)(x))
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 6
    assert lk.stats()["fallback"] == {("lora_linear", Reason.ADAPTER_HOOKS): 1}
    lin(patched)(x)
    assert sum(lk.stats()["served"].values()) == 1


def test_removed_hook_fuses_again():
    model, x = make(), torch.randn(4, K)
    lk.patch(model)
    handle = lin(model).lora_A.default.register_forward_hook(lambda *_: None)
    lin(model)(x)
    handle.remove()
    lin(model)(x)
    assert sum(lk.stats()["fallback"].values()) == sum(lk.stats()["served"].values()) == 1


def test_functorch_transforms():
    stock, x = make(), torch.randn(3, 4, K)
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(lin(patched))(x), torch.vmap(lin(stock))(x))
        ours, theirs = (torch.func.jvp(lin(m), (x,), (torch.ones_like(x),))[1] for m in (patched, stock))
    torch.testing.assert_close(ours, theirs)
    assert lk.stats()["fallback"] == {("lora_linear", Reason.TRANSFORM): 2}


def test_functional_call_and_inference_mode():
    model, x = make(), torch.randn(4, K)
    lk.patch(model)
    zero = {name: torch.zeros_like(p) for name, p in lin(model).named_parameters() if "lora_B" in name}
    base = F.linear(x, lin(model).base_layer.weight, lin(model).base_layer.bias)
    torch.testing.assert_close(torch.func.functional_call(lin(model), zero, x), base)
    with torch.inference_mode():
        assert not lin(model)(x).requires_grad
    assert lk.stats()["fallback"] == {}


def test_meta_tensors():
    model = make()
    lk.patch(model)
    model.to("meta")
    assert lin(model)(torch.randn(4, K, device="meta")).shape == (4, N)
    assert lk.stats()["fallback"] == {("lora_linear", Reason.META): 1}


def test_wrong_input_dtype_is_peft_s_error():
    model = make()
    lk.patch(model)
    with pytest.raises(RuntimeError, match="same dtype"):
        lin(model)(torch.randn(4, K, dtype=BF16))
    assert lk.stats()["fallback"] == {("lora_linear", Reason.MIXED_DTYPES): 1}


def test_dtensor_weights(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, distribute_module, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        stock = make()
        patched = copy.deepcopy(stock)
        lk.patch(patched)
        x = torch.randn(4, K)
        expected = lin(stock)(x)
        distribute_module(patched, mesh)
        y = lin(patched)(distribute_tensor(x, mesh, [Replicate()]))
        assert isinstance(y, DTensor)
        torch.testing.assert_close(y.to_local(), expected)
        assert lk.stats()["fallback"] == {("lora_linear", Reason.DTENSOR): 1}
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("case", "traced_before"), [("disabled", True), ("disabled", False), ("hook A", False)])
def test_compiled_layer_falls_back_too(case, traced_before):
    """A hook is set before the first trace: dynamo has no guards on hooks, with or without us."""
    torch.compiler.reset()
    model, x = make(), torch.randn(6, K, requires_grad=True)
    lk.patch(model)
    compiled = torch.compile(lin(model), fullgraph=True, backend="aot_eager")
    if traced_before:
        compiled(x)
    FALLBACKS[case][1](model)
    eager, traced = run(lin(model), x), run(compiled, x)
    for name, value in eager.items():
        torch.testing.assert_close(traced[name if name in traced else f"_orig_mod.{name}"], value)
