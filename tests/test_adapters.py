"""save_adapter and load_adapter: PEFT's files in both directions, and files that must be refused."""

import json
import os

import pytest
import safetensors.torch
import torch
from adapter_models import assert_unchanged, injected, logits, randomise, snapshot, twin
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import Experts, tiny_llama
from torch import nn

import lora_kernels as lk
from lora_kernels import adapters

CONFIGS = [
    {"target_modules": ["q_proj", "down_proj"]},
    {"target_modules": "all-linear", "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.up_proj": 5}, "use_rslora": True},
    {
        "target_modules": ["v_proj"],
        "alpha_pattern": {r"layers\.2\.self_attn\.v_proj": 7},
        "layers_to_transform": [1, 2],
    },
    {"target_modules": r".*layers\.[01].*o_proj"},
]


@pytest.fixture
def base():
    return tiny_llama().eval()


# ------------------------------------------------------------------------------------------- both directions


@pytest.mark.parametrize("options", CONFIGS, ids=lambda o: str(o["target_modules"]))
def test_peft_loads_ours(base, tmp_path, options):
    plain = twin(base)
    model = injected(base, **options)
    lk.save_adapter(model, tmp_path)
    peft = PeftModel.from_pretrained(plain, tmp_path).eval()
    torch.testing.assert_close(logits(peft), logits(model), rtol=1e-5, atol=1e-5)
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("options", CONFIGS, ids=lambda o: str(o["target_modules"]))
def test_ours_loads_pefts(base, tmp_path, options):
    plain = twin(base)
    peft = randomise(get_peft_model(base, LoraConfig(r=4, lora_alpha=6, lora_dropout=0.1, **options))).eval()
    peft.save_pretrained(tmp_path)
    lk.load_adapter(plain, tmp_path)
    plain.eval()
    torch.testing.assert_close(logits(plain), logits(peft), rtol=1e-5, atol=1e-5)
    layers = [m for m in plain.modules() if isinstance(m, lk.LoRALinear)]
    assert all(layer.dropout_p == 0.1 for layer in layers)
    trained = {name for name, p in plain.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in plain.named_parameters() if "lora_" in name}


def test_round_trip_into_an_injected_model(base, tmp_path):
    model, other = injected(twin(base)), injected(twin(base))
    lk.save_adapter(model, tmp_path)
    before = dict(other.named_parameters())
    lk.load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(model))
    assert all(p is before[name] for name, p in other.named_parameters()), "optimizers hold these parameters"


@pytest.mark.parametrize("adapter", ["default", "other"])
def test_peft_model_round_trip(base, tmp_path, adapter):
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"])
    model = randomise(get_peft_model(twin(base), config, adapter_name=adapter)).eval()
    lk.patch(model)
    lk.save_adapter(model, tmp_path)
    other = randomise(get_peft_model(twin(base), config)).eval()
    lk.load_adapter(other, tmp_path)
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-5, atol=1e-5)
    plain = twin(base)
    lk.load_adapter(plain, tmp_path)
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-5)


def test_dora_in_a_peft_model(base, tmp_path):
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], use_dora=True)
    model, other = (randomise(get_peft_model(twin(base), config)).eval() for _ in range(2))
    lk.save_adapter(model, tmp_path)
    lk.load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(ValueError, match="use_dora=True is not plain LoRA; load it with PEFT"):
        lk.load_adapter(twin(base), tmp_path)


def test_hand_made_layers(tmp_path):
    """Names that are also ends of other names, mixed ranks and alphas: the config must choose exactly these layers."""
    model = Experts()
    for parent, name, r, alpha in (
        (model.layers[1]["experts"], 0, 2, 4),
        (model.layers[2], "up", 3, 9),
        (model.block[0], "gate_up", 2, 5),
    ):
        parent[name] = lk.LoRALinear.from_linear(parent[name], r=r, alpha=alpha)
    randomise(model)
    lk.save_adapter(model, tmp_path)
    peft = get_peft_model(Experts(), LoraConfig.from_pretrained(tmp_path))
    ours = {n: (m.rank, m.scaling) for n, m in model.named_modules() if isinstance(m, lk.LoRALinear)}
    theirs = {
        n.removeprefix("base_model.model."): (m.r["default"], m.scaling["default"])
        for n, m in peft.named_modules()
        if hasattr(m, "base_layer")
    }
    assert ours == theirs
    other = Experts()
    lk.load_adapter(other, tmp_path)
    assert all(torch.equal(p, dict(other.named_parameters())[n]) for n, p in model.named_parameters() if "lora_" in n)


def test_short_names_where_they_are_enough(base, tmp_path):
    lk.save_adapter(injected(base), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert (config["r"], config["lora_alpha"]) == (4, 6)


def test_scale_changed_in_peft_is_kept(base, tmp_path):
    peft = randomise(get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"]))).eval()
    for layer in peft.base_model.model.model.layers:
        layer.self_attn.q_proj.set_scale("default", 0.5)
    linear = lk.LoRALinear.from_peft(peft.base_model.model.model.layers[0].self_attn.q_proj)
    holder = nn.ModuleDict({"q_proj": linear})
    lk.save_adapter(holder, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == 3


def test_compiled_model_saves_plain_names(base, tmp_path):
    model = injected(base)
    lk.save_adapter(torch.compile(model), tmp_path / "compiled")
    lk.save_adapter(model, tmp_path / "plain")
    files = (tmp_path / of / adapters.WEIGHTS_FILE for of in ("compiled", "plain"))
    compiled, plain = map(safetensors.torch.load_file, files)
    assert compiled.keys() == plain.keys()


# ---------------------------------------------------------------------------------------------- failed saves


def test_failed_save_keeps_the_old_adapter(base, tmp_path, monkeypatch):
    model = injected(base)
    lk.save_adapter(model, tmp_path)
    old = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def disk_full(tensors, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        lk.save_adapter(randomise(model), tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == old


def test_save_creates_directories_and_replaces(base, tmp_path):
    model, target = injected(base), tmp_path / "a" / "b"
    lk.save_adapter(model, target)
    (target / "notes.txt").write_text("mine")
    lk.save_adapter(randomise(model), str(target))
    other = injected(tiny_llama())
    lk.load_adapter(other, target)
    assert torch.equal(other.model.layers[0].self_attn.q_proj.lora_A, model.model.layers[0].self_attn.q_proj.lora_A)
    assert (target / "notes.txt").read_text() == "mine"


def test_save_refuses(base, tmp_path):
    with pytest.raises(ValueError, match="no LoRALinear layer"):
        lk.save_adapter(base, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is not a directory"):
        lk.save_adapter(injected(base), tmp_path / "file")
    peft = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    peft.add_adapter("second", LoraConfig(target_modules=["q_proj"]))
    peft.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="one adapter must be active"):
        lk.save_adapter(peft, tmp_path)
    with pytest.raises(ValueError, match="LlamaForCausalLM holds PEFT adapters but is no PeftModel"):
        lk.save_adapter(peft.base_model.model, tmp_path)


# ----------------------------------------------------------------------------------------------- refused files

WEIGHTS, CONFIG = adapters.WEIGHTS_FILE, adapters.CONFIG_FILE
Q0_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def edit_config(path, **changes):
    config = json.loads((path / CONFIG).read_text()) | changes
    (path / CONFIG).write_text(json.dumps(config))


def edit_weights(path, change):
    tensors = safetensors.torch.load_file(path / WEIGHTS)
    change(tensors)
    safetensors.torch.save_file(tensors, path / WEIGHTS)


def pickle_only(path):
    os.replace(path / WEIGHTS, path / "adapter_model.bin")


def truncate(path):
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-100])


DAMAGES = {
    "no directory": (lambda p: os.rename(p, f"{p}-gone"), FileNotFoundError, "adapter_config.json does not exist"),
    "no config": (lambda p: os.remove(p / CONFIG), FileNotFoundError, "adapter_config.json does not exist"),
    "no weights": (lambda p: os.remove(p / WEIGHTS), FileNotFoundError, "adapter_model.safetensors does not exist"),
    "pickle": (pickle_only, ValueError, "adapter_model.bin is a pickle"),
    "config not json": (lambda p: (p / CONFIG).write_text("{"), ValueError, "adapter_config.json is not JSON"),
    "config not a dict": (lambda p: (p / CONFIG).write_text("[]"), ValueError, "peft_type is 'list'"),
    "config binary": (lambda p: (p / CONFIG).write_bytes(b"\xff\xfe\x00"), ValueError, "is not JSON"),
    "other peft type": (lambda p: edit_config(p, peft_type="IA3"), ValueError, "peft_type is 'IA3'"),
    "no rank": (lambda p: edit_config(p, r=None), ValueError, "adapter_config.json: r is None"),
    "bad pattern": (
        lambda p: edit_config(p, rank_pattern={"q_proj": "x"}),
        ValueError,
        "q_proj is 'x', expected a number",
    ),
    "truncated": (truncate, ValueError, "adapter_model.safetensors is corrupt"),
    "empty weights": (lambda p: (p / WEIGHTS).write_bytes(b""), ValueError, "adapter_model.safetensors is corrupt"),
    "missing key": (lambda p: edit_weights(p, lambda t: t.pop(Q0_A)), ValueError, f"{Q0_A} is missing"),
    "unexpected key": (lambda p: edit_weights(p, lambda t: t.update(x=torch.ones(1))), ValueError, "x has no place"),
    "wrong shape": (
        lambda p: edit_weights(p, lambda t: t.update({Q0_A: torch.ones(4, 25)})),
        ValueError,
        rf"{Q0_A} has shape \(4, 25\), the model needs \(4, 24\)",
    ),
    "wrong rank": (
        lambda p: edit_weights(p, lambda t: t.update({Q0_A: torch.ones(8, 24)})),
        ValueError,
        rf"{Q0_A} has shape \(8, 24\)",
    ),
    "integers": (
        lambda p: edit_weights(p, lambda t: t.update({Q0_A: torch.ones(4, 24, dtype=torch.int32)})),
        ValueError,
        "expected floating point",
    ),
}


@pytest.mark.parametrize("kind", ["plain", "injected", "peft"])
@pytest.mark.parametrize(("damage", "error", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_adapter_changes_nothing(base, tmp_path, kind, damage, error, message):
    saved = tmp_path / "adapter"
    lk.save_adapter(injected(twin(base)), saved)
    model = base
    if kind == "injected":
        injected(model)
    elif kind == "peft":
        model = randomise(get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])))
    before = snapshot(model)
    damage(saved)
    with pytest.raises(error, match=f"load_adapter: .*{message}"):
        lk.load_adapter(model, saved)
    assert_unchanged(model, before)


@pytest.mark.parametrize("kind", ["injected", "peft"])
def test_other_scaling_is_refused(base, tmp_path, kind):
    lk.save_adapter(injected(twin(base), alpha=8), tmp_path)
    model = base
    if kind == "injected":
        injected(model)
    else:
        model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"]))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"scales model\.layers\.0\.\S+ by 2 \(r=4, lora_alpha=8\), the model by 1\.5"):
        lk.load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_merged_model_is_refused(base, tmp_path):
    model = injected(base)
    lk.save_adapter(model, tmp_path)
    lk.merge_adapter(model)
    with pytest.raises(ValueError, match="q_proj is merged; unmerge it"):
        lk.load_adapter(model, tmp_path)


@pytest.mark.parametrize(
    "field",
    [{"use_dora": True}, {"lora_bias": True}, {"bias": "lora_only"}, {"modules_to_save": ["lm_head"]},
     {"init_lora_weights": "pissa"}, {"alora_invocation_tokens": [1]}],
)  # fmt: skip
def test_more_than_plain_lora_is_refused(base, tmp_path, field):
    lk.save_adapter(injected(twin(base)), tmp_path)
    edit_config(tmp_path, **field)
    before = snapshot(base)
    with pytest.raises(ValueError, match=f"{next(iter(field))}=.* is not plain LoRA"):
        lk.load_adapter(base, tmp_path)
    assert_unchanged(base, before)


def test_adapter_of_another_model_is_refused(tmp_path):
    lk.save_adapter(injected(tiny_llama()), tmp_path)
    model = Experts()
    with pytest.raises(ValueError, match="match no linear layer"):
        lk.load_adapter(model, tmp_path)
    assert not any(isinstance(m, lk.LoRALinear) for m in model.modules())
