"""inject and load_adapter take only what they can serve, and refuse the rest before anything changes."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_llama
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import lora_kernels as lk
from lora_kernels.reasons import Reason


class Two(nn.Module):
    """The first layer can always be served; what is wrong is the second."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, x):
        return self.norm(self.second(self.first(x)))


class Own(torch.Tensor):
    pass


def with_weight(change):
    def displace(model):
        model.second.weight = nn.Parameter(change(model.second.weight.detach()), requires_grad=False)

    return displace


def as_buffer(name):
    def displace(model):
        value = getattr(model.second, name).detach()
        delattr(model.second, name)
        model.second.register_buffer(name, value)

    return displace


class Halved(nn.Module):
    def forward(self, value):
        return value / 2


def double_forward(model):
    forward = model.second.forward
    model.second.forward = lambda x: 2 * forward(x)


BAD_BASES = {
    "pruned": (lambda m: prune.random_unstructured(m.second, "weight", 0.5), Reason.DISPLACED),
    "pruned bias": (lambda m: prune.random_unstructured(m.second, "bias", 0.5), Reason.DISPLACED),
    "weight_norm, old": (lambda m: weight_norm(m.second), Reason.DISPLACED),
    "spectral_norm, old": (lambda m: spectral_norm(m.second), Reason.DISPLACED),
    "weight_norm": (lambda m: parametrizations.weight_norm(m.second), Reason.PARAMETRIZED),
    "parametrized": (
        lambda m: parametrize.register_parametrization(m.second, "bias", Halved()), Reason.PARAMETRIZED,
    ),
    "buffer": (as_buffer("weight"), Reason.DISPLACED),
    "bias is a buffer": (as_buffer("bias"), Reason.DISPLACED),
    "subclass": (with_weight(lambda w: w.as_subclass(Own)), Reason.DTENSOR),
    "int8": (with_weight(lambda w: w.to(torch.int8)), Reason.DTYPE),
    "float8": (with_weight(lambda w: w.to(torch.float8_e4m3fn)), Reason.DTYPE),
    "complex": (with_weight(lambda w: w.to(torch.complex64)), Reason.DTYPE),
    "sparse": (with_weight(lambda w: w.to_sparse()), Reason.LAYOUT),
    "flat": (with_weight(lambda w: w.flatten()), Reason.LAYOUT),
    "sharded away": (with_weight(lambda w: w.new_empty(0)), Reason.LAYOUT),
    "forward replaced": (double_forward, Reason.INSTANCE_FORWARD),
}  # fmt: skip


def snapshot(model):
    """What of a model a failed call may not have changed."""
    modules = {name: (type(m), list(m._parameters), list(m._buffers)) for name, m in model.named_modules()}
    return modules, {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize(("change", "reason"), BAD_BASES.values(), ids=BAD_BASES.keys())
def test_a_second_layer_that_cannot_be_served(change, reason, tmp_path):
    good = Two()
    lk.inject(good, ["first", "second"], r=2, alpha=4)
    lk.save_adapter(good, tmp_path)
    model = Two()
    change(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"inject: second: {reason}"):
        lk.inject(model, ["first", "second"], r=2, alpha=4)
    with pytest.raises(ValueError, match=f"load_adapter: .*: second: {reason}"):
        lk.load_adapter(model, tmp_path)
    with pytest.raises(TypeError if reason == Reason.PARAMETRIZED else ValueError, match="from_linear: "):
        lk.LoRALinear.from_linear(model.second, r=2, alpha=4)
    assert snapshot(model) == before
    report = lk.inject(model, "all-linear", r=2, alpha=4)
    assert report.fused == [("first", "lora_linear")]
    assert report.kept == [("second", reason)]
    assert before[0]["second"] == snapshot(model)[0]["second"]


def test_what_is_kept_computes_as_before():
    model = Two()
    prune.random_unstructured(model.second, "weight", 0.5)
    x = torch.randn(3, 6)
    expected = model(x)
    lk.inject(model, "all-linear", r=2, alpha=4)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64, "float32"], ids=str)
def test_adapter_dtypes_that_nothing_computes_in(dtype):
    model = Two()
    before = snapshot(model)
    for call in (
        lambda: lk.inject(model, ["first"], r=2, alpha=4, adapter_dtype=dtype),
        lambda: lk.LoRALinear.from_linear(model.first, r=2, alpha=4, adapter_dtype=dtype),
        lambda: lk.LoRALinear(6, 6, r=2, alpha=4, adapter_dtype=dtype),
        lambda: lk.LoRAEmbedding(6, 6, r=2, alpha=4, adapter_dtype=dtype),
    ):
        with pytest.raises(TypeError, match="adapter_dtype must be float32, bfloat16, float16, float64 or None, got"):
            call()
    assert snapshot(model) == before


def test_no_room_for_an_adapter_changes_nothing(monkeypatch):
    """Adapters are allocated for all layers before the first becomes a LoRALinear."""
    model, allocate, made = Two(), torch.empty, []

    def fail_late(*args, **kwargs):
        made.append(1)
        if len(made) == 4:
            raise torch.OutOfMemoryError("no room")
        return allocate(*args, **kwargs)

    before = snapshot(model)
    monkeypatch.setattr(torch, "empty", fail_late)
    with pytest.raises(torch.OutOfMemoryError):
        lk.inject(model, ["first", "second"], r=2, alpha=4)
    assert snapshot(model) == before


@pytest.mark.parametrize("change", ["pruned", "int8", "subclass"])
def test_embeddings_are_asked_too(change):
    embedding = nn.Embedding(6, 6)
    holder = nn.Module()
    holder.second = embedding
    BAD_BASES[change][0](holder)
    with pytest.raises(ValueError, match=f"from_embedding: {BAD_BASES[change][1]}"):
        lk.LoRAEmbedding.from_embedding(embedding, r=2, alpha=4)


def test_meta_models_are_served():
    with torch.device("meta"):
        model = Two()
    lk.inject(model, ["first"], r=2, alpha=4)
    assert model.first.lora_A.is_meta


# -------------------------------------------------------------------------------------------------- several names


class Shared(Two):
    def __init__(self):
        super().__init__()
        self.again = self.second


@pytest.mark.parametrize("targets", [["second"], ["again"], ["first", "second"], "second|again"])
def test_one_layer_under_two_names(targets):
    """PEFT would put the adapter on the first name only: here it would act under both."""
    model = Shared()
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"inject: second, again: {Reason.SHARED}"):
        lk.inject(model, targets, r=2, alpha=4)
    assert snapshot(model) == before
    peft = get_peft_model(Shared(), LoraConfig(target_modules=["second"])).base_model.model
    assert peft.second is not peft.again


def test_all_linear_keeps_layers_with_two_names():
    model = Shared()
    report = lk.inject(model, "all-linear", r=2, alpha=4)
    assert report.fused == [("first", "lora_linear")]
    assert report.kept == [("second", Reason.SHARED), ("again", Reason.SHARED)]


# ----------------------------------------------------------------------- parents that read the weight of their child


def encoder(**options):
    options = {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "dropout": 0.0, "batch_first": True} | options
    return nn.TransformerEncoderLayer(**options)


@pytest.mark.parametrize("name", ["linear1", "linear2", "self_attn.out_proj"])
def test_linears_that_their_parent_does_not_call_are_refused(name):
    model = encoder()
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"inject: {name}: {Reason.PARENT_READS}"):
        lk.inject(model, [name], r=2, alpha=4)
    assert snapshot(model) == before


def test_all_linear_keeps_them():
    model = nn.Sequential(nn.Linear(8, 8), encoder(), nn.Linear(8, 8))
    report = lk.inject(model, "all-linear", r=2, alpha=4)
    assert [name for name, _ in report.fused] == ["0", "2"]
    assert report.kept == [(f"1.{name}", Reason.PARENT_READS) for name in ("self_attn.out_proj", "linear1", "linear2")]


def test_loss_that_reads_its_linear():
    if not hasattr(nn, "LinearCrossEntropyLoss"):
        pytest.skip("this torch has no LinearCrossEntropyLoss")
    model = nn.Sequential(nn.Linear(8, 8), nn.LinearCrossEntropyLoss(8, 5))
    assert lk.inject(model, "all-linear", r=2, alpha=4).kept == [("1.linear", Reason.PARENT_READS)]


@pytest.mark.parametrize(
    "options",
    [{"batch_first": False}, {"activation": torch.tanh}, {"d_model": 9, "nhead": 3}],
    ids=["sequence first", "activation", "odd heads"],
)
def test_encoders_that_always_call_their_linears_are_served(options):
    """torch's fast path is closed to them for good: an adapter shows in eval mode, too."""
    model = encoder(**options).eval()
    x = torch.randn(3, 2, model.linear1.in_features)
    lk.inject(model, ["linear1", "linear2"], r=2, alpha=4)
    with torch.no_grad():
        before = model(x)
        nn.init.normal_(model.linear1.lora_B)
        assert not torch.allclose(model(x), before)


def test_the_reason_is_true():
    """In eval mode torch does pass by an adapter on linear1; if it learns to call the layer, this refusal can go."""
    model = encoder().eval().requires_grad_(False)
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        before = model(x)
        model.linear1 = lk.LoRALinear.from_linear(model.linear1, r=2, alpha=4).eval()
        nn.init.normal_(model.linear1.lora_B)
        assert torch.equal(model(x), before)


def test_patch_reports_peft_layers_that_are_passed_by():
    stock = get_peft_model(
        nn.Sequential(nn.Linear(8, 8), encoder()),
        LoraConfig(r=2, target_modules=["0", "linear1", "linear2"], init_lora_weights=False),
    )
    patched = copy.deepcopy(stock)
    report = lk.patch(patched)
    assert report.fused == [("base_model.model.0", "lora_linear")]
    assert report.kept == [(f"base_model.model.1.{name}", Reason.PARENT_READS) for name in ("linear1", "linear2")]
    x = torch.randn(2, 3, 8)
    for mode in (True, False):  # when it trains, the encoder does call them
        lk.reset_stats()
        torch.testing.assert_close(patched.train(mode)(x), stock.train(mode)(x))
    assert lk.stats()["served"].keys() == {("lora_linear", "cpu")}


@pytest.mark.parametrize("how", ["patch", "patch_peft"])
@pytest.mark.parametrize("targets", [["self_attn"], ["self_attn", "linear1"]], ids=str)
def test_patching_does_not_change_the_path_of_an_encoder(targets, how):
    """torch's fast path is closed by hooks on any part, and counting calls by one would bring adapters to work that
    in PEFT are passed by.
    """
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(1)
    stock = get_peft_model(nn.Sequential(encoder()), config).eval()
    if how == "patch":
        patched = copy.deepcopy(stock)
        lk.patch(patched)
    else:
        lk.patch_peft()
        try:
            torch.manual_seed(1)
            patched = get_peft_model(nn.Sequential(encoder()), config).eval()
        finally:
            lk.unpatch_peft()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        assert torch.equal(patched(x), stock(x))


def test_attention_of_peft_is_not_passed_by():
    """PEFT merges its adapters into both weights for the call."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    stock = get_peft_model(Net(), LoraConfig(r=2, target_modules=["attention"], init_lora_weights=False))
    patched = copy.deepcopy(stock)
    report = lk.patch(patched)
    assert Reason.PARENT_READS not in [reason for _, reason in report.kept]
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(patched(x), stock(x))


# --------------------------------------------------------------------------- what only looks like a model with adapters


def test_a_child_called_base_layer():
    model = nn.ModuleDict({"base_layer": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    assert [name for name, _ in lk.inject(model, ["base_layer", "head"], r=2, alpha=4).fused] == ["base_layer", "head"]


def test_a_peft_config_that_was_left_behind(tmp_path):
    """As ``unload`` of PEFT 0.18 leaves it."""

    def unloaded():
        config = LoraConfig(r=2, target_modules=["q_proj"])
        model = get_peft_model(tiny_llama(), config).unload()
        model.peft_config = {"default": config}
        return model

    model, fresh = unloaded(), unloaded()
    lk.inject(model, ["v_proj"], r=2, alpha=4)
    lk.save_adapter(model, tmp_path)
    lk.load_adapter(fresh, tmp_path)
    assert torch.equal(*(m.model.layers[0].self_attn.v_proj.lora_A for m in (model, fresh)))


def test_peft_layers_under_any_name_are_found():
    inner = get_peft_model(Two(), LoraConfig(target_modules=["first"]))
    for model in (inner, inner.base_model.model, nn.ModuleDict({"inner": inner})):
        with pytest.raises(ValueError, match=r"is a PEFT model|already has an adapter"):
            lk.inject(model, ["second"], r=2, alpha=4)


# --------------------------------------------------------------------------------------- patterns that match nothing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["first", "thrid"]}, "inject: target_modules: 'thrid' matches no module"),
        ({"exclude_modules": ["norms"]}, "inject: exclude_modules: 'norms' excludes no module"),
        ({"exclude_modules": r"norm\d"}, r"inject: exclude_modules: 'norm\\\\d' excludes no module"),
        ({"rank_pattern": {"thrid": 4}}, "inject: rank_pattern: 'thrid' matches none of the chosen modules"),
        ({"alpha_pattern": {"norm": 4}}, "inject: alpha_pattern: 'norm' matches none of the chosen modules"),
    ],
    ids=["target", "exclude", "exclude, regex", "rank", "alpha"],
)
def test_patterns_that_match_nothing_warn(options, message):
    with pytest.warns(UserWarning, match=message) as caught:
        lk.inject(Two(), **({"target_modules": ["first", "second"], "r": 2, "alpha": 4} | options))
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules": ["first", "thrid"]}, "quantize_: modules: 'thrid' matches no module"),
        ({"exclude_modules": ["secnod"]}, "quantize_: exclude_modules: 'secnod' excludes no module"),
    ],
    ids=["modules", "exclude"],
)
def test_quantize_warns_of_them_too(options, message):
    """Kills: a layer that a typing error has packed, and nothing says so."""
    with pytest.warns(UserWarning, match=message) as caught:
        lk.quantize_(Two(), "int8", **options)
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("modules", "error", "message"),
    [
        (["thrid"], ValueError, r"quantize_: modules \['thrid'\] match no linear layer"),
        (3, TypeError, "quantize_: modules must be a string or a list of names, got 3"),
        ("(", ValueError, r"quantize_: modules: '\(' is no regular expression"),
    ],
)
def test_quantize_names_its_own_argument(modules, error, message):
    with pytest.raises(error, match=message):
        lk.quantize_(Two(), modules=modules)


def test_patterns_that_match_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lk.inject(tiny_llama(), r=2, alpha=4, target_modules="all-linear", exclude_modules=["lm_head"])
        lk.inject(
            Two(), ["first", "second", "norm"], r=2, alpha=4, exclude_modules=["norm"],
            rank_pattern={"first": 3}, alpha_pattern={"sec.*": 3, "second": 2},
        )  # fmt: skip
