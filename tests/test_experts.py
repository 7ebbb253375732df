"""PEFT's target_parameters on the experts of mixtures: patched equals stock, in every family and implementation."""

import copy

import pytest
import torch
from mixtures import (
    FAMILIES,
    IDS,
    IMPLEMENTATIONS,
    assert_same,
    experts_of,
    make_base,
    make_peft,
    outputs_and_gradients,
    randomise,
)
from peft import LoraConfig, PeftModel
from peft.tuners.lora import layer as _peft
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import lora_kernels as lk
from lora_kernels.functional.routing import combine, permute, route
from lora_kernels.integrations import experts as _experts
from lora_kernels.reasons import Reason


def twins(family="Qwen3Moe", implementation="grouped_mm", **options):
    """Stock PEFT, and a patched copy."""
    stock = make_peft(make_base(family, implementation), **options)
    patched = copy.deepcopy(stock)
    return stock, patched, lk.patch(patched)


def fallbacks(op="grouped_lora_linear"):
    """Of layers; an op that has no kernel is no matter of theirs."""
    of_layers = {str(reason) for reason in Reason} - {str(Reason.NO_KERNEL)}
    return {reason: n for (name, reason), n in lk.stats()["fallback"].items() if name == op and reason in of_layers}


def calls(op="grouped_lora_linear"):
    return sum(n for (name, _), n in lk.stats()["served"].items() if name == op)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, implementation):
    stock, patched, report = twins(family, implementation)
    layers = len(experts_of(stock))
    assert [by for _, by in report.fused] == ["grouped_lora_linear"] * 2 * layers
    assert report.kept == []
    ours, theirs = outputs_and_gradients(patched), outputs_and_gradients(stock)
    assert_same(ours, theirs)
    assert calls() == calls("grouped_lora_linear_backward") == 2 * layers
    for name, module in patched.named_modules():  # 28 tokens reach every expert of these
        if isinstance(module, ParamWrapper):
            for factor, grad in (
                ("A", ours[f"{name}.lora_A.default.weight"]),
                ("B", ours[f"{name}.lora_B.default.weight"]),
            ):
                of_experts = (
                    grad.view(module.num_experts, -1) if factor == "A" else grad.view(len(grad), -1, module.num_experts)
                )
                dims = 1 if factor == "A" else (0, 1)
                assert of_experts.abs().amax(dims).all(), f"an expert without a gradient: {name}"


@pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_one_of_the_two_projections(family, parameter):
    stock, patched, _ = twins(family, parameters=(parameter,))
    assert_same(outputs_and_gradients(patched), outputs_and_gradients(stock))
    assert calls() == len(experts_of(stock))


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
@pytest.mark.parametrize("swapped", [False, True])
def test_factors_as_other_versions_of_peft_lie(family, swapped):
    """Up to 0.18 nothing was swapped, 0.19.0 swapped what is transposed, later versions what is not; here both ways for
    both, computed by PEFT's own code.
    """
    stock = make_peft(make_base(family))
    for wrapper in [m for m in stock.modules() if isinstance(m, ParamWrapper)]:
        experts, first, last = wrapper.get_param().shape
        inside, outside = (last, first) if swapped else (first, last)
        wrapper._did_swap_in_out_features = swapped
        wrapper.lora_A["default"] = nn.Linear(inside, 3 * experts, bias=False)
        wrapper.lora_B["default"] = nn.Linear(3 * experts, outside, bias=False)
    randomise(stock)
    patched = copy.deepcopy(stock)
    report = lk.patch(patched)
    assert report.kept == []
    assert_same(outputs_and_gradients(patched), outputs_and_gradients(stock))


def test_several_adapters_disabling_merging_and_deleting():
    stock, patched, _ = twins()
    targets = stock.peft_config["default"].target_parameters
    for model in (stock, patched):
        torch.manual_seed(3)
        model.add_adapter("second", LoraConfig(r=2, lora_alpha=6, target_modules=[], target_parameters=targets))
        randomise(model)

    def same():
        assert_same(outputs_and_gradients(patched), outputs_and_gradients(stock))

    for active in ("second", ["default", "second"]):
        for model in (stock, patched):
            model.base_model.set_adapter(active)
        lk.reset_stats()
        same()
        assert fallbacks() == {}
    with stock.disable_adapter(), patched.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(patched(IDS).logits, stock(IDS).logits)
    assert set(fallbacks()) == {Reason.DISABLED}
    for model in (stock, patched):
        model.base_model.set_adapter("default")
        model.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(patched(IDS).logits, stock(IDS).logits)
    for model in (stock, patched):
        model.unmerge_adapter()
        model.delete_adapter("second")
    same()
    assert {type(m) for m in patched.merge_and_unload().modules()} == {
        type(m) for m in stock.merge_and_unload().modules()
    }


def test_saving_loading_copying_and_unpatching(tmp_path):
    stock, patched, _ = twins()
    patched.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base("Qwen3Moe"), tmp_path, is_trainable=True)
    lk.patch(loaded)
    theirs = outputs_and_gradients(stock)
    for model in (loaded, copy.deepcopy(patched)):
        assert_same(outputs_and_gradients(model), theirs)
    lk.unpatch(patched)
    assert [type(m) for m in patched.modules()] == [type(m) for m in stock.modules()]
    assert all(torch.equal(a, b) for a, b in zip(outputs_and_gradients(patched).values(), theirs.values()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    stock, patched, _ = twins()
    for model in (stock, patched):
        model.train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(outputs_and_gradients(patched), outputs_and_gradients(stock))
    assert fallbacks() == {}


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_autocast(family):
    """As transformers' grouped_mm: the products are of the weights' dtype."""
    stock, patched, _ = twins(family)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(patched(IDS).logits, stock(IDS).logits, rtol=0.03, atol=0.03)
    assert calls() == 2 * len(experts_of(stock))


def test_bfloat16_under_float32_adapters():
    stock, patched, _ = twins("Mixtral", "eager")  # torch's grouped_mm takes no 16-bit rows of 40 bytes
    exact = copy.deepcopy(stock).double()
    for model in (stock, patched):
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                parameter.data = parameter.data.bfloat16()
    with torch.no_grad():
        wanted, ours, theirs = (m(IDS).logits.double() for m in (exact, patched, stock))
    assert (ours - wanted).abs().max() <= 2 * (theirs - wanted).abs().max()
    assert fallbacks() == {}


def test_what_is_left_to_peft(monkeypatch):
    stock, patched, _ = twins()
    inner = next(m for m in patched.modules() if isinstance(m, ParamWrapper) and isinstance(m.base_layer, ParamWrapper))

    def reason():
        lk.reset_stats()
        with torch.no_grad():
            torch.testing.assert_close(patched(IDS).logits, stock(IDS).logits)
        return fallbacks()

    assert reason() == {}
    hook = inner.get_base_layer().register_forward_hook(lambda *_: None)
    assert reason()[Reason.ADAPTER_HOOKS] >= 1
    hook.remove()
    hook = inner.base_layer.register_forward_pre_hook(lambda *_: None)
    assert reason()[Reason.ADAPTER_HOOKS] == 1
    hook.remove()
    ALL_EXPERTS_FUNCTIONS.register("somebody's", lambda *args: ALL_EXPERTS_FUNCTIONS["grouped_mm"](*args))
    for experts in experts_of(patched).values():
        experts.config._experts_implementation = "somebody's"
    assert reason()[Reason.EXPERTS_IMPLEMENTATION] >= 2
    for experts in experts_of(patched).values():
        experts.config._experts_implementation = "grouped_mm"
    with monkeypatch.context() as replaced:
        proxy = _peft._LoraFactorsProxy
        replaced.setattr(proxy, "forward", lambda self, W, forward=proxy.forward: forward(self, W))
        assert Reason.PROXY_REPLACED in reason()
    inner.get_base_layer().down_proj.requires_grad_(True)
    assert reason()[Reason.BASE_REQUIRES_GRAD] >= 1


def test_verify_finds_a_planted_fault(monkeypatch):
    _, patched, _ = twins("GptOss")
    found = lk.verify(patched)
    assert found.ok
    assert {check.op for check in found.checks} == {"grouped_lora_linear"}
    assert len(found.checks) == 2  # around the outer of two wrappers
    project = _experts._project
    monkeypatch.setattr(
        _experts, "_project",
        lambda experts, name, x, routing, branches: project(experts, name, x, routing, branches) * 1.001,
    )  # fmt: skip
    assert not lk.verify(patched).ok


def test_saved_for_backward_are_no_weights():
    """Of the size of all experts there is nothing but the parameters themselves."""
    stock, patched, _ = twins()
    sizes = {}
    for name, model in (("ours", patched), ("stock", stock)):
        weights = {p.data_ptr() for p in model.parameters()}
        kept = []

        def pack(t, kept=kept, weights=weights):
            if t.data_ptr() not in weights:
                kept.append(t.numel() * t.element_size())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer = next(m for m in model.modules() if isinstance(m, ParamWrapper))
            x, ids, shares = torch.randn(20, 24, requires_grad=True), torch.randint(5, (20, 2)), torch.rand(20, 2)
            layer(x, ids, shares)
        sizes[name] = sum(kept)
    assert sizes["ours"] <= 0.6 * sizes["stock"]


@pytest.mark.parametrize("patched", [False, True])
def test_an_adapter_per_sample_is_refused_by_name(patched):
    """When the context is entered, and not by PEFT in the first call. Other layers of the model are left unrouted."""
    model = make_peft(make_base("Mixtral"), also=("q_proj",))
    if patched:
        lk.patch(model)
    refused = pytest.raises(ValueError, match=r"default on .*layers.0.mlp.experts\S*\.down_proj and 3 more")
    with refused, lk.route_adapters(model, ["default", None]):
        raise AssertionError("entered")
    assert not any(m._forward_pre_hooks for m in model.modules())
    one = model.base_model.model.model.layers[0].self_attn.q_proj
    with lk.route_adapters(one, ["default", None]):
        one(torch.randn(2, 3, 24))


# ------------------------------------------------------------------------------------------------- routing


def test_routing_there_and_back():
    tokens, experts, top_k = 11, 4, 3
    ids = torch.rand(tokens, experts + 2).topk(top_k).indices  # two experts are somebody else's
    routing = route(ids, experts)
    flat = ids.flatten()[routing.choices]
    assert torch.equal(flat, flat.sort().values)
    ends = [int((flat <= e).sum()) for e in range(experts)]
    assert routing.offsets.tolist() == ends
    assert routing.offsets.dtype == torch.int32
    x = torch.randn(tokens, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(tokens, top_k, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: combine(permute(x, routing).sin(), w, routing), (x, weights))
    want = sum(weights[:, [j]] * x.sin() for j in range(top_k))
    torch.testing.assert_close(combine(permute(x, routing).sin(), weights, routing), want)


@pytest.mark.parametrize("need_weights", [False, True])
def test_combine_keeps_results_for_the_weights_alone(need_weights):
    """Kills: experts' results that are kept although nobody asks for a gradient of the weights."""
    tokens, top_k, features = 7, 2, 6
    routing = route(torch.rand(tokens, 4).topk(top_k).indices, 4)
    y = torch.randn(tokens * top_k, features, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.rand(tokens, top_k, requires_grad=need_weights)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        out = combine(y, weights, routing)
    assert (y.shape in kept) == need_weights
    grad = torch.randn_like(out)
    asked = [y, weights][: 1 + need_weights]
    in_plain_code = (y[routing.rows].view(tokens, top_k, features) * weights.unsqueeze(2)).sum(1)
    for ours, theirs in zip(torch.autograd.grad(out, asked, grad), torch.autograd.grad(in_plain_code, asked, grad)):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
@pytest.mark.parametrize("adapted", [(), ("gate_up_proj",), ("gate_up_proj", "down_proj")])
def test_experts_of_other_processes_are_skipped(family, adapted):
    """Under expert parallelism ids past the last expert are other processes', and their weights zero."""
    model = make_base(family)
    (experts, *_) = experts_of(model).values()
    count = experts.num_experts
    x = torch.randn(9, 24, requires_grad=True)
    ids = torch.rand(9, count + 1).topk(2).indices
    ids[0] = count
    weights = torch.rand(9, 2).masked_fill(ids >= count, 0.0).requires_grad_()
    experts._is_expert_parallel = True
    with torch.no_grad():  # a wrong expert would show
        experts.down_proj[-1] *= 100
    branches = {}
    for name in adapted:
        weight = getattr(experts, name)
        _, n, k = weight.transpose(1, 2).shape if experts.is_transposed else weight.shape
        branches[name] = torch.zeros(count, 2, k), torch.zeros(count, n, 2), 1.0
    ours = _experts.forward(experts, x, ids, weights, branches)
    theirs = experts(x, ids, weights)
    assert not ours[0].any()
    grad = torch.randn_like(ours)
    gradients = (torch.autograd.grad(y, (x, weights), grad) for y in (ours, theirs))
    for a, b in ((ours, theirs), *zip(*gradients)):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_as_an_implementation_of_transformers(family):
    _experts.register()
    model = make_base(family)
    wanted = outputs_and_gradients(model)
    model.set_experts_implementation("lora_kernels")
    assert_same(outputs_and_gradients(model), wanted)
    stock = make_peft(model)
    patched = copy.deepcopy(stock)
    assert lk.patch(patched).kept == []
    assert_same(outputs_and_gradients(patched), outputs_and_gradients(stock))


def test_compiled():
    _, patched, _ = twins()
    layer = next(m for m in patched.modules() if isinstance(m, ParamWrapper))
    x, ids, shares = torch.randn(20, 24, requires_grad=True), torch.randint(5, (20, 2)), torch.rand(20, 2)
    compiled = torch.compile(lambda *args: layer(*args), backend="aot_eager", fullgraph=True)
    for function in (compiled, lambda *args: checkpoint(layer, *args, use_reentrant=False)):
        y, want = function(x, ids, shares), layer(x, ids, shares)
        torch.testing.assert_close(y, want)
        for a, b in zip(torch.autograd.grad(y.sum(), x), torch.autograd.grad(want.sum(), x)):
            torch.testing.assert_close(a, b)


def test_compiled_calls_that_peft_serves():
    """Kills: the experts' closure read while compiling, which keeps torch from following their own forward."""
    _, patched, _ = twins()
    layer = next(m for m in patched.modules() if isinstance(m, ParamWrapper))
    args = torch.randn(20, 24), torch.randint(5, (20, 2)), torch.rand(20, 2)
    with torch.no_grad(), patched.disable_adapter():
        compiled = torch.compile(lambda *args: layer(*args), backend="eager")
        torch.testing.assert_close(compiled(*args), layer(*args))
