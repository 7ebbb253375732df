"""patch, unpatch and patch_peft on whole models, and patched models in training and generation."""

import copy
import pickle
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from numerics import assert_as_accurate
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import MultiheadAttention as LoraAttention
from tiny_models import tiny_llama
from torch import nn
from transformers.integrations.peft import MIN_PEFT_VERSION

import lora_kernels as lk
from lora_kernels.integrations.peft import linear as _peft_linear
from lora_kernels.reasons import Reason
from lora_kernels.support import cpu
from lora_kernels.support import cpu_product as _cpu_product

IDS = torch.arange(14).view(2, 7)
PER_LAYER = 7  # q, k, v, o, gate, up, down
PREFIX = "base_model.model.model.layers"


def make(model=None, **options):
    model = get_peft_model(
        model or tiny_llama(), LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | options))
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def patched_twin(stock):
    twin = copy.deepcopy(stock)
    lk.patch(twin)
    return twin


def loss_and_gradients(model, **inputs):
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS, **inputs).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def classes(model):
    return [type(m) for m in model.modules()]


@pytest.fixture
def clean_peft():
    yield
    lk.unpatch_peft()


# ----------------------------------------------------------------------------------------------------- patch


def test_every_layer_of_a_llama_is_fused():
    stock = make()
    patched = copy.deepcopy(stock)
    report = lk.patch(patched)
    assert str(report).splitlines() == [
        "21 of 21 LoRA layers fused",
        f"  fused  12  lora_linear  {PREFIX}.{{0..2}}.self_attn.{{q_proj,k_proj,v_proj,o_proj}}",
        f"  fused   9  lora_linear  {PREFIX}.{{0..2}}.mlp.{{gate_proj,up_proj,down_proj}}",
    ]
    ours, expected = loss_and_gradients(patched), loss_and_gradients(stock)
    assert ours.keys() == expected.keys()
    for name, value in ours.items():  # 21 layers deep, rounding adds up; one layer's bound is in test_peft.py
        assert (value - expected[name]).abs().max() <= 2e-4 * expected[name].abs().max(), name
    assert lk.stats()["fallback"] == {}
    assert sum(n for (op, _), n in lk.stats()["served"].items() if op == "lora_linear") == 3 * PER_LAYER


def test_patch_again_is_the_same():
    model = make()
    first, before = lk.patch(model), classes(model)
    assert lk.patch(model) == first
    assert classes(model) == before


def test_unpatch_restores_exactly():
    model = make()
    before, state = classes(model), dict(model.base_model.__dict__)
    lk.patch(model, frozen_linears=True)
    assert classes(model) != before
    lk.unpatch(model)
    assert classes(model) == before
    assert model.base_model.__dict__ == state
    lk.unpatch(model)
    assert classes(model) == before


def test_state_dict_parameters_and_types_stay():
    model = make()
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    lk.patch(model)
    assert list(model.state_dict()) == keys
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert sum(isinstance(m, LoraLinear) for m in model.modules()) == 3 * PER_LAYER
    assert all(lk.is_fused(m) for m in model.modules() if isinstance(m, LoraLinear))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_stay_fused(clone):
    model = make().eval()
    lk.patch(model)
    twin = clone(model)
    assert torch.equal(twin(IDS).logits, model(IDS).logits)
    assert classes(twin) == classes(model)


def test_other_layers_are_reported():
    model = make(target_modules=["q_proj", "embed_tokens"])
    add_hook_to_module(model.base_model.model.model.layers[1].self_attn.q_proj, ModelHook())
    report = lk.patch(model)
    assert report.fused == [
        ("base_model.model.model.embed_tokens", "lora_embedding"),
        (f"{PREFIX}.0.self_attn.q_proj", "lora_linear"),
        (f"{PREFIX}.2.self_attn.q_proj", "lora_linear"),
    ]
    assert report.kept == [(f"{PREFIX}.1.self_attn.q_proj", Reason.INSTANCE_FORWARD)]
    assert type(model.base_model.model.model.layers[1].self_attn.q_proj) is LoraLinear


def test_accelerate_hook_added_after_patching():
    model = make(target_modules=["q_proj"]).eval()
    expected = model(IDS).logits
    lk.patch(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    add_hook_to_module(layer, ModelHook())
    model(IDS)
    assert lk.stats()["fallback"] == {}
    lk.unpatch(model)
    assert torch.equal(model(IDS).logits, expected)


def test_layers_added_later_are_fused():
    model = make(target_modules=["q_proj"])
    lk.patch(model)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model.set_adapter("second")
    assert len(lk.patch(model).fused) == 6
    model(IDS)
    assert lk.stats()["fallback"] == {}


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"transformers {transformers.__version__} refuses PEFT {peft.__version__} in its own integration; "
    "the same layers are tested through PEFT",
)
def test_transformers_own_peft_integration():
    model = tiny_llama().eval()
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]))
    expected = model(IDS).logits
    assert len(lk.patch(model).fused) == 3
    torch.testing.assert_close(model(IDS).logits, expected)
    assert lk.stats()["fallback"] == {}


def test_models_without_peft_layers_are_refused():
    with pytest.raises(ValueError, match=r"patch: LlamaForCausalLM holds no PEFT layer; .* lk\.inject"):
        lk.patch(tiny_llama())


def test_patched_model_stays_patched(tmp_path):
    """Through load_adapter, add_adapter for other layers, pickling, and merge_and_unload, which leaves plain layers."""
    stock = make(target_modules=["q_proj"]).eval()
    stock.save_pretrained(tmp_path)
    patched = pickle.loads(pickle.dumps(patched_twin(stock)))
    for model in (stock, patched):
        model.load_adapter(tmp_path, "again")
        torch.manual_seed(4)
        model.add_adapter("more", LoraConfig(r=2, target_modules=["v_proj", "embed_tokens"], init_lora_weights=False))
    for adapter in ("again", "more", "default"):
        for model in (stock, patched):
            model.set_adapter(adapter)
        torch.testing.assert_close(patched(IDS).logits, stock(IDS).logits)
    assert sum(map(lk.is_fused, patched.modules())) == 7
    assert set(lk.stats()["fallback"]) == {
        ("lora_linear", Reason.NO_ACTIVE_ADAPTER), ("lora_embedding", Reason.NO_ACTIVE_ADAPTER)
    }  # fmt: skip
    merged = patched.merge_and_unload(adapter_names=["default"])
    torch.testing.assert_close(merged(IDS).logits, stock(IDS).logits, rtol=1e-4, atol=1e-5)
    assert {type(m) for m in merged.modules()} == {type(m) for m in tiny_llama().modules()}


@pytest.mark.parametrize(
    ("modules", "parameters", "kind"),
    [
        (["q_proj", "embed_tokens"], ["lm_head.weight"], _peft_linear.FusedEmbedding),
        (["q_proj"], ["mlp.up_proj.weight", "embed_tokens.weight"], None),
    ],
)
def test_unpatch_restores_every_kind_of_layer(modules, parameters, kind):
    stock = make(target_modules=modules, target_parameters=parameters, use_rslora=True).eval()
    patched = patched_twin(stock)
    fused = {type(m) for m in patched.modules() if lk.is_fused(m)}
    assert fused == {_peft_linear.FusedLinear, _peft_linear.FusedParamWrapper} | ({kind} if kind else set())
    is_counted = any(m._forward_pre_hooks for m in patched.modules())
    assert is_counted == (kind is None), "calls of a wrapper around an embedding's weight are counted by a hook"
    lk.unpatch(patched)
    assert not any(m._forward_pre_hooks for m in patched.modules())
    assert classes(patched) == classes(stock)
    assert vars(patched.base_model).keys() == vars(stock.base_model).keys()
    assert torch.equal(patched(IDS).logits, stock(IDS).logits)


# ------------------------------------------------------------------------------------------------ patch_peft


def test_patch_peft_covers_new_and_loaded_models(clean_peft, tmp_path):
    original = LoraModel._create_new_module
    lk.patch_peft()
    lk.patch_peft()
    base = tiny_llama().eval()
    model = make(copy.deepcopy(base)).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    loaded.load_adapter(tmp_path, "again")
    loaded.add_adapter("head", LoraConfig(r=2, target_modules=["lm_head"]))
    assert sum(type(m) is not LoraLinear and isinstance(m, LoraLinear) for m in loaded.modules()) == 22
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
    assert lk.stats()["fallback"] == {("lora_linear", Reason.NO_ACTIVE_ADAPTER): 1}, "lm_head has another adapter"
    assert classes(pickle.loads(pickle.dumps(loaded))) == classes(loaded)

    merged = copy.deepcopy(model).merge_and_unload()
    assert {type(m) for m in merged.modules()} == {type(m) for m in base.modules()}
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)

    lk.unpatch_peft()
    assert LoraModel._create_new_module is original
    assert any(type(m) is LoraLinear for m in make().modules())


def test_patch_peft_leaves_other_layer_types(clean_peft):
    lk.patch_peft()
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
    model = get_peft_model(attention, LoraConfig(r=2, target_modules=["attention"]))
    assert type(model.base_model.model["attention"]) is LoraAttention
    assert ("base_model.model.attention", "layer type not served: MultiheadAttention") in lk.patch(model).kept


def test_unpatch_peft_leaves_a_wrapper_that_came_later(clean_peft):
    lk.patch_peft()
    ours = LoraModel._create_new_module

    def wrapper(*args, **kwargs):
        return ours(*args, **kwargs)

    LoraModel._create_new_module = staticmethod(wrapper)
    lk.unpatch_peft()
    assert LoraModel._create_new_module is wrapper
    LoraModel._create_new_module = staticmethod(ours)


def test_merge_and_unmerge_in_place():
    stock = make().eval()
    patched = patched_twin(stock)
    expected = patched(IDS).logits
    patched.merge_adapter()
    torch.testing.assert_close(patched(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert lk.stats()["fallback"] == {("lora_linear", Reason.MERGED): 3 * PER_LAYER}
    patched.unmerge_adapter()
    torch.testing.assert_close(patched(IDS).logits, expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------- training, generation


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_sees_the_same_masks(use_reentrant):
    model = make(lora_dropout=0.3).train()
    lk.patch(model)
    torch.manual_seed(11)
    expected = loss_and_gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(11)
    served = sum(lk.stats()["served"].values())
    ours = loss_and_gradients(model)
    assert sum(lk.stats()["served"].values()) - served > served, "nothing was recomputed"
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name


def test_backends_agree_on_a_model_with_dropout():
    model = make(lora_dropout=0.3).train()
    lk.patch(model)
    torch.manual_seed(5)
    ours = loss_and_gradients(model)
    with lk.use_backend("reference"):
        torch.manual_seed(5)
        reference = loss_and_gradients(model)
    for name, value in ours.items():
        largest = reference[name].abs().max().item()
        torch.testing.assert_close(value, reference[name], rtol=0, atol=1e-4 * largest)


def test_training_follows_peft():
    stock = make().train()
    patched = patched_twin(stock)
    curves = []
    for model in (stock, patched):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        losses = []
        for _ in range(5):
            losses.append(loss_and_gradients(model)["loss"].item())
            optimizer.step()
        curves.append(losses)
    assert curves[0][-1] < curves[0][0]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_generation_is_the_same():
    stock = make().eval()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = stock.generate(input_ids=IDS, **options)
    assert torch.equal(patched_twin(stock).generate(input_ids=IDS, **options), expected)


def test_disabled_adapters():
    stock = make(target_modules=["q_proj"]).eval()
    patched = patched_twin(stock)
    with stock.disable_adapter(), patched.disable_adapter():
        assert torch.equal(patched(IDS).logits, stock(IDS).logits)
    assert lk.stats()["fallback"] == {("lora_linear", Reason.DISABLED): 3}


# -------------------------------------------------------------------------------------------- frozen linears


@pytest.fixture
def no_native_bf16(monkeypatch):
    monkeypatch.setattr(cpu, "has_native_matmul", lambda dtype: dtype == torch.float32)


def test_frozen_linears_are_upcast(no_native_bf16):
    stock = make(tiny_llama().bfloat16(), target_modules=["q_proj"]).eval()
    patched = copy.deepcopy(stock)
    report = lk.patch(patched, frozen_linears=True)
    assert str(report).splitlines()[0] == "3 of 3 LoRA layers fused, 19 frozen linears upcast"
    assert ("base_model.model.lm_head", "frozen, upcast") in report.fused
    assert not any("base_layer" in name for name, _ in report.fused), "they are within the fused layers"
    assert lk.patch(patched, frozen_linears=True) == report

    exact = copy.deepcopy(stock).double()(IDS).logits
    assert_as_accurate(patched(IDS).logits, stock(IDS).logits, exact)
    served = {op for op, _ in lk.stats()["served"]}
    assert served == {"lora_linear", "frozen_linear"}

    lk.unpatch(patched)
    assert classes(patched) == classes(stock)
    assert torch.equal(patched(IDS).logits, stock(IDS).logits)


def test_base_of_an_unfused_layer_is_upcast_too(no_native_bf16):
    model = make(tiny_llama().bfloat16(), target_modules=["q_proj"], init_lora_weights="mica")
    report = lk.patch(model, frozen_linears=True)
    assert (f"{PREFIX}.0.self_attn.q_proj", Reason.VARIANT) in report.kept
    assert (f"{PREFIX}.0.self_attn.q_proj.base_layer", "frozen, upcast") in report.fused
    adapters = [m for n, m in model.named_modules() if n.endswith(("lora_A.default", "lora_B.default"))]
    assert {type(m) for m in adapters} == {nn.Linear}


def test_frozen_linears_without_peft(no_native_bf16):
    model = tiny_llama().bfloat16()
    model.requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_()
    report = lk.patch(model, frozen_linears=True)
    assert str(report).splitlines()[0] == "21 frozen linears upcast"
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    layer = model.lm_head
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 24, dtype=torch.bfloat16)
    assert torch.equal(compiled(x), layer(x))


def test_frozen_linears_of_an_injected_model(no_native_bf16):
    model = tiny_llama().bfloat16()
    lk.inject(model, "all-linear", r=2, alpha=4)
    assert lk.patch(model, frozen_linears=True).fused == [("lm_head", "frozen, upcast")]
    loss_and_gradients(model)
    assert {op for op, _ in lk.stats()["served"]} >= {"lora_linear", "frozen_linear"}


def test_fast_dtypes_are_left_alone(monkeypatch):
    monkeypatch.setattr(_cpu_product, "_mode", "mkl")
    model = tiny_llama().requires_grad_(False)
    before = classes(model)
    report = lk.patch(model, frozen_linears=True)
    assert str(report).splitlines()[0] == "0 frozen linears swapped"
    assert {reason for _, reason in report.kept} == {Reason.FAST_PRODUCT}
    assert classes(model) == before


def test_fp32_goes_past_mkl_where_that_is_slow(onednn, monkeypatch):
    monkeypatch.setattr(_cpu_product, "FROM_ROWS", 4)
    stock = make(tiny_llama(), target_modules=["q_proj"])
    patched = copy.deepcopy(stock)
    report = lk.patch(patched, frozen_linears=True)
    assert str(report).splitlines()[0] == "3 of 3 LoRA layers fused, 19 frozen linears past MKL"
    assert ("base_model.model.lm_head", "frozen, past MKL") in report.fused

    results = [loss_and_gradients(model) for model in (patched, stock)]
    assert lk.stats()["served"]["frozen_linear", "cpu"] == 19
    assert lk.stats()["served"]["frozen_linear_backward", "cpu"] == 17, "the first k and v need no gradient of x"
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)
    lk.unpatch(patched)
    assert classes(patched) == classes(stock)


# --------------------------------------------------------------------------------------------------- imports


def test_peft_is_imported_only_when_needed():
    code = """
import sys, torch, lora_kernels as lk
linear = torch.nn.Linear(2, 2).requires_grad_(False)
lk.patch(linear, frozen_linears=True), lk.unpatch(linear), lk.unpatch_peft()
lk.inject(torch.nn.ModuleDict({"a": linear}), ["a"], r=1, alpha=1)
print([m for m in ("peft", "transformers", "safetensors") if m in sys.modules])
sys.modules["peft"] = None  # as if it were not installed
lk.patch_peft()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "[]", result.stderr
    assert "ImportError: patch_peft needs PEFT; install it with: pip install lora_kernels[peft]" in result.stderr
