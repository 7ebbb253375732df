"""Wrapped models: adapters are saved, loaded and injected under the names that the model has without wrappers."""

import json
import sys
import types

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import compile_regions
from adapter_models import MAKERS, as_peft_reads, injected, logits, twin, with_peft
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import tiny_llama
from torch import nn
from torch.ao.quantization import QuantWrapper
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import lora_kernels as lk
from lora_kernels.adapters import wrappers

CPU = torch.device("cpu")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def base():
    return tiny_llama().eval()


def fsdp1(module):
    return FullyShardedDataParallel(module, device_id=CPU, use_orig_params=True)


def llama_of(model):
    return model.get_base_model() if isinstance(model, PeftModel) else model


def around_blocks(wrap):
    def wrapped(model):
        layers = llama_of(model).model.layers
        for index, layer in enumerate(layers):
            layers[index] = wrap(layer)
        return model

    return wrapped


def around_linears(wrap):
    def wrapped(model):
        for layer in llama_of(model).model.layers:
            layer.mlp.down_proj = wrap(layer.mlp.down_proj)
        return model

    return wrapped


def inside_peft(wrap):
    """Around the model that PEFT holds."""

    def wrapped(model):
        if isinstance(model, PeftModel):
            model.base_model.model = wrap(model.base_model.model)
            return model
        return wrap(model)

    return wrapped


WRAPPED = {
    "compile": torch.compile,
    "compiled blocks": around_blocks(torch.compile),
    "compiled linears": around_linears(torch.compile),
    "compiled regions": compile_regions,
    "checkpointed blocks": around_blocks(checkpoint_wrapper),
    "several at once": lambda m: nn.DataParallel(around_blocks(lambda b: offload_wrapper(torch.compile(b)))(m)),
    "DataParallel": nn.DataParallel,
    "DDP": DistributedDataParallel,
    "DDP of compiled": lambda m: DistributedDataParallel(torch.compile(m)),
    "compiled DDP": lambda m: torch.compile(DistributedDataParallel(m)),
    "AveragedModel": AveragedModel,
    "QuantWrapper": around_linears(QuantWrapper),
    "FSDP": lambda m: fsdp1(around_blocks(fsdp1)(m)),
    "inside PeftModel": inside_peft(torch.compile),
}


def assert_same_files(directory, expected):
    """As if the model had not been wrapped."""
    ours, theirs = load_file(directory / WEIGHTS), load_file(expected / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    a, b = (json.loads((path / CONFIG).read_text()) for path in (directory, expected))
    for config in (a, b):
        config["target_modules"] = sorted(config["target_modules"])
    assert a == b


@pytest.mark.parametrize("wrapping", WRAPPED)
@pytest.mark.parametrize("kind", MAKERS)
def test_saved_and_loaded_as_without_wrappers(base, tmp_path, kind, wrapping):
    options = {"rank_pattern": {r"layers\.1\.self_attn\.q_proj": 3}}
    bare = MAKERS[kind](twin(base), **options)
    lk.save_adapter(bare, tmp_path / "bare")
    expected = logits(bare)

    model = WRAPPED[wrapping](MAKERS[kind](twin(base), **options))
    names = [name for name, _ in model.named_modules()]
    lk.load_adapter(model, tmp_path / "bare")
    lk.save_adapter(model, tmp_path / "wrapped")
    assert [name for name, _ in model.named_modules()] == names, "the wrappers must be where they were"
    assert_same_files(tmp_path / "wrapped", tmp_path / "bare")
    torch.testing.assert_close(as_peft_reads(base, tmp_path / "wrapped"), expected, rtol=1e-5, atol=1e-5)


GROWING = ("compile", "compiled blocks", "compiled linears", "compiled regions", "checkpointed blocks", "DataParallel")


@pytest.mark.parametrize("wrapping", GROWING)
def test_inject_and_load_into_a_wrapped_plain_model(base, tmp_path, wrapping):
    whole = r"model\.layers\.[02]\.(self_attn\.q_proj|mlp\.down_proj)"
    bare = injected(twin(base), target_modules=whole)
    lk.save_adapter(bare, tmp_path / "bare")
    model = WRAPPED[wrapping](twin(base))
    report = lk.inject(model, whole, r=4, alpha=6)
    assert [name for name, _ in report.fused] == [n for n, m in bare.named_modules() if isinstance(m, lk.LoRALinear)]
    for wrapped in (model, WRAPPED[wrapping](twin(base))):  # with layers of ours, and plain
        lk.load_adapter(wrapped, tmp_path / "bare")
        lk.save_adapter(wrapped, tmp_path / "wrapped")
        assert_same_files(tmp_path / "wrapped", tmp_path / "bare")


@pytest.mark.parametrize(
    ("wrap", "kind"),
    [
        (DistributedDataParallel, "DistributedDataParallel"),
        (around_blocks(fsdp1), "FullyShardedDataParallel"),
        (lambda m: torch.compile(DistributedDataParallel(m)), "DistributedDataParallel"),
    ],
    ids=["DDP", "FSDP", "compiled DDP"],
)
def test_no_new_parameters_behind_the_back_of_a_wrapper(base, tmp_path, wrap, kind):
    """DDP and FSDP would not see them: each process would train its own adapter."""
    lk.save_adapter(injected(twin(base)), tmp_path)
    model = wrap(base)
    for act in (lambda: lk.inject(model, ["q_proj"], r=4, alpha=6), lambda: lk.load_adapter(model, tmp_path)):
        with pytest.raises(ValueError, match=f"the model is wrapped in {kind}, .* wrap it afterwards"):
            act()
    assert not any(isinstance(module, lk.LoRALinear) for module in model.modules())


def test_an_adapter_that_peft_made_of_a_wrapped_model(base, tmp_path):
    """Its config names wrappers in target_modules and patterns."""
    wrapped = around_blocks(torch.compile)(twin(base))
    config = LoraConfig(
        r=4, lora_alpha=6,
        target_modules=["layers.0._orig_mod.self_attn.q_proj", "model.layers.2._orig_mod.mlp.up_proj", "down_proj"],
        exclude_modules=["model.layers.1._orig_mod.mlp.down_proj"],
        rank_pattern={r"layers\.2\._orig_mod\.mlp\.up_proj": 7},
        alpha_pattern={r"layers\.0\._orig_mod\.self_attn\.q_proj": 3},
    )  # fmt: skip
    model = get_peft_model(wrapped, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    with wrappers.unwrapped(model) as bare:
        expected = logits(bare)
    lk.save_adapter(model, tmp_path)
    assert "_orig_mod" not in (tmp_path / CONFIG).read_text()
    torch.testing.assert_close(as_peft_reads(base, tmp_path), expected, rtol=1e-5, atol=1e-5)
    plain = twin(base)
    lk.load_adapter(plain, tmp_path)
    torch.testing.assert_close(logits(plain.eval()), expected, rtol=1e-5, atol=1e-5)
    lk.load_adapter(model, tmp_path)


def test_modules_to_save_of_a_wrapped_model(base, tmp_path):
    """PEFT finds them by names of modules, too."""
    model = with_peft(twin(base), modules_to_save=["lm_head"])
    nn.init.normal_(model.get_base_model().lm_head.modules_to_save["default"].weight)
    expected = logits(model)
    lk.save_adapter(around_blocks(torch.compile)(torch.compile(model)._orig_mod), tmp_path)
    torch.testing.assert_close(as_peft_reads(base, tmp_path), expected, rtol=1e-5, atol=1e-5)
    other = with_peft(twin(base), modules_to_save=["lm_head"])
    lk.load_adapter(DistributedDataParallel(other), tmp_path)
    torch.testing.assert_close(logits(other), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", MAKERS)
def test_the_class_of_a_sharded_model(base, tmp_path, kind):
    model = MAKERS[kind](base)
    fully_shard(llama_of(model), mesh=dist.init_device_mesh("cpu", (1,)))
    assert type(llama_of(model)).__name__ == "FSDPLlamaForCausalLM"
    lk.save_adapter(model, tmp_path)
    mapping = json.loads((tmp_path / CONFIG).read_text())["auto_mapping"]
    assert mapping == {"base_model_class": "LlamaForCausalLM", "parent_library": type(tiny_llama()).__module__}


class Named(nn.Module):
    """Parts that are called as wrappers call what they wrap, and are none."""

    def __init__(self):
        super().__init__()
        self.module = nn.ModuleDict({"_orig_mod": nn.Linear(4, 4), "module": nn.Linear(4, 4)})
        self._checkpoint_wrapped_module = nn.Linear(4, 4)

    def forward(self, x):
        return self._checkpoint_wrapped_module(self.module["module"](self.module["_orig_mod"](x)))


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, torch.compile], ids=["bare", "DataParallel", "compile"])
def test_names_that_wrappers_use_belong_to_the_model(tmp_path, wrap):
    model = wrap(Named())
    lk.inject(model, ["module._orig_mod", "_checkpoint_wrapped_module"], r=2, alpha=2)
    lk.save_adapter(model, tmp_path)
    layers = ("module._orig_mod", "_checkpoint_wrapped_module")
    assert load_file(tmp_path / WEIGHTS).keys() == {
        f"base_model.model.{layer}.{part}.weight" for layer in layers for part in ("lora_A", "lora_B")
    }
    peft = PeftModel.from_pretrained(Named(), tmp_path)
    assert {n for n, m in peft.get_base_model().named_modules() if hasattr(m, "base_layer")} == set(layers)


def test_deepspeeds_engine(base, tmp_path, monkeypatch):
    """A stand-in for its class, where it is defined."""

    class DeepSpeedEngine(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    home = types.ModuleType("deepspeed.runtime.engine")
    home.DeepSpeedEngine = DeepSpeedEngine
    monkeypatch.setitem(sys.modules, home.__name__, home)
    lk.save_adapter(injected(twin(base)), tmp_path / "bare")
    engine = DeepSpeedEngine(injected(twin(base)))
    lk.load_adapter(engine, tmp_path / "bare")
    lk.save_adapter(engine, tmp_path / "wrapped")
    assert_same_files(tmp_path / "wrapped", tmp_path / "bare")
    with pytest.raises(ValueError, match="wrapped in DeepSpeed"):
        lk.inject(DeepSpeedEngine(base), ["q_proj"], r=4, alpha=6)


def test_wrappers_are_back_after_an_error(base):
    model = around_blocks(torch.compile)(base)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="match no linear layer"):
        lk.inject(model, ["nowhere"], r=4, alpha=6)
    assert [name for name, _ in model.named_modules()] == names


def test_compiled_code_is_kept(tmp_path):
    """Taking wrappers away for a moment must not make torch compile anew."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)))
    lk.inject(model, r"\d\.0", r=2, alpha=2)
    for index in range(3):
        model[index] = torch.compile(model[index], backend=backend)
    x = torch.randn(2, 4)
    model(x)
    compiled = len(graphs)
    assert compiled
    lk.save_adapter(model, tmp_path)
    lk.load_adapter(model, tmp_path)
    model(x)
    assert len(graphs) == compiled


def test_every_known_class_exists():
    """A class that torch has renamed would not be recognised any more."""
    for kind, (home, name, _) in wrappers._WRAPPERS.items():
        if kind != wrappers.DEEPSPEED:
            assert issubclass(getattr(sys.modules[home], name), nn.Module), kind
