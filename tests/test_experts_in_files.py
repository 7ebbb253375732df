"""``save_adapter(experts="2d")``: a pair of matrices per expert and layer, and whether PEFT reads them back."""

import json
import re
import warnings

import pytest
import torch
from mixtures import FAMILIES, IDS, make_base, make_peft
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file

import lora_kernels as lk


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_experts_in_files_as_checkpoints_name_them(family, tmp_path):
    """PEFT itself reads them: it makes one adapter of twice the rank of gate and up."""
    stock = make_peft(make_base(family), lora_alpha=5)
    lk.save_adapter(stock, tmp_path, experts="2d")
    gate = "block_sparse_moe.experts.1.w1" if family == "Mixtral" else "mlp.experts.1.gate_proj"
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert keys[f"base_model.model.model.layers.0.{gate}.lora_A.weight"].shape == (3, 24)
    assert not any("base_layer" in key for key in keys)
    loaded = PeftModel.from_pretrained(make_base(family), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, stock(IDS).logits)


@pytest.mark.filterwarnings("ignore:save_adapter. PEFT will not read this file")
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_in_files_are_the_experts(family, tmp_path):
    stock = make_peft(make_base(family), lora_alpha=5)
    lk.patch(stock)
    lk.save_adapter(stock, tmp_path, experts="2d")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] is None
    leaves = {key.split(".")[-3] for key in tensors}
    targets = config["target_modules"]
    is_shared = family in ("Qwen2Moe", "DeepseekV3")  # other layers have the same names
    assert isinstance(targets, str) if is_shared else targets == sorted(leaves)
    for key in tensors:
        layer = key.removeprefix("base_model.model.").rsplit(".", 2)[0]
        assert not is_shared or re.fullmatch(targets, layer)
    assert not is_shared or not any(re.fullmatch(targets, name) for name, _ in make_base(family).named_modules())
    for name, wrapper in stock.named_modules():
        if not isinstance(wrapper, ParamWrapper):
            continue
        delta, experts = wrapper.get_delta_weight("default"), wrapper.get_base_layer()
        delta = delta.transpose(1, 2) if experts.is_transposed else delta
        for expert, of_expert in enumerate(delta):
            found = {}
            for key, lora_A in tensors.items():
                path, leaf, part, _ = key.rsplit(".", 3)
                is_here = int(path.split(".layers.")[1].split(".")[0]) == int(name.split(".layers.")[1].split(".")[0])
                if is_here and path.endswith(f"experts.{expert}") and part == "lora_A":
                    found[leaf] = tensors[key.replace("lora_A", "lora_B")] @ lora_A * (5 / 3)
            down = next(leaf for leaf in ("w2", "down_proj") if leaf in found)
            if wrapper.parameter_name == "down_proj":
                parts = [found[down]]
            else:
                gate, up = (found.get(a, found.get(b)) for a, b in (("w1", "gate_proj"), ("w3", "up_proj")))
                parts = [gate, up] if experts.is_concatenated else [torch.stack([gate, up], 1).flatten(0, 1)]
            torch.testing.assert_close(torch.cat(parts), of_expert)


READ_BACK = {
    "all": {},
    "factors": {"lora_alpha": 1},
    "down has its own rank": {"rank_pattern": {".*down_proj": 5}},
    "one layer": {"layers_to_transform": [0]},
    "down alone": {"parameters": ("down_proj",)},
}
NOT_FOUND = "not found in the base model"
MISREAD = {  # family, options, the reason that is given, and how PEFT fails; None: it says nothing
    "gpt-oss": ("GptOss", {}, "checkpoints have no layer per expert", NOT_FOUND),
    "gpt-oss and q": ("GptOss", {"also": ["q_proj"]}, "checkpoints have no layer per expert", None),
    "granite": ("GraniteMoe", {}, "checkpoints have no layer per expert", NOT_FOUND),
    "a shared expert": ("Qwen2Moe", {}, "other layers have the names", NOT_FOUND),
    "a shared expert and q": ("Qwen2Moe", {"also": ["q_proj"]}, "other layers have the names", None),
    "rsLoRA": ("Qwen3Moe", {"use_rslora": True}, "it uses rsLoRA", None),
    "no down": ("Qwen3Moe", {"parameters": ("gate_up_proj",)}, "down has none", None),
    "own alpha": ("Mixtral", {"alpha_pattern": {".*gate_up_proj": 9}}, "another rank or alpha", None),
    "own rank": ("Mixtral", {"rank_pattern": {".*gate_up_proj": 5}}, "another rank or alpha", "size mismatch"),
}


def by_peft(stock, family, directory):
    """The logits of what PEFT itself reads, and of what was saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(make_base(family), directory)
    with torch.no_grad():
        return loaded(IDS).logits, stock(IDS).logits


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "Olmoe"])
@pytest.mark.parametrize("case", READ_BACK)
def test_a_file_of_experts_without_a_warning_is_read_back_by_peft(family, case, tmp_path):
    """Kills: a warning for every file."""
    stock = make_peft(make_base(family), **{"lora_alpha": 5} | READ_BACK[case])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        lk.save_adapter(stock, tmp_path, experts="2d")
    torch.testing.assert_close(*by_peft(stock, family, tmp_path))


@pytest.mark.parametrize("case", MISREAD)
def test_a_file_of_experts_that_peft_misreads_is_warned_of(case, tmp_path):
    """Kills: a case left out. PEFT is asked, too: it fails, or computes something else."""
    family, options, reason, failure = MISREAD[case]
    stock = make_peft(make_base(family), **{"lora_alpha": 5} | options)
    with pytest.warns(UserWarning, match=f"PEFT will not read this file as it is meant .*{reason}") as caught:
        lk.save_adapter(stock, tmp_path / "2d", experts="2d")
    assert 'experts="3d" is what PEFT reads' in str(caught[0].message)
    assert caught[0].filename == __file__
    if failure is not None:
        with pytest.raises((ValueError, RuntimeError), match=failure):
            by_peft(stock, family, tmp_path / "2d")
    else:
        read, meant = by_peft(stock, family, tmp_path / "2d")
        assert (read - meant).abs().max() > 0.1 * meant.abs().max()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        lk.save_adapter(stock, tmp_path / "3d")
    torch.testing.assert_close(*by_peft(stock, family, tmp_path / "3d"))


def test_experts_in_files_are_asked_for_where_there_are_some(tmp_path):
    model = make_base("Mixtral")
    for given, message in ((model, "needs a PeftModel"), (peft_without_experts(), "needs an adapter of experts")):
        with pytest.raises(ValueError, match=message):
            lk.save_adapter(given, tmp_path / "adapter", experts="2d")
    with pytest.raises(ValueError, match='experts must be "3d" or "2d"'):
        lk.save_adapter(model, tmp_path, experts="4d")
    assert not list(tmp_path.rglob("*.*"))


def peft_without_experts():
    return get_peft_model(make_base("Mixtral"), LoraConfig(target_modules=["q_proj"], exclude_modules=["experts"]))
