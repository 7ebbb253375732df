"""save_adapter and load_adapter where parameters have no memory of their own: on meta, offloaded, in shards."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from adapter_models import MAKERS, TARGETS, as_peft_reads, assert_unchanged, injected, logits, snapshot, twin
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import tiny_llama
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.nn.utils import parametrize, prune

import lora_kernels as lk

CPU = torch.device("cpu")
Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def base():
    return tiny_llama().eval()


@pytest.fixture
def saved(base, tmp_path):
    """(directory of an adapter, the logits of ``base`` with it)"""
    model = injected(twin(base))
    lk.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter", logits(model)


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def llama_of(model):
    return model.get_base_model() if isinstance(model, PeftModel) else model


def first_layer(model):
    return llama_of(model).model.layers[0].self_attn.q_proj


def first_lora_a(model):
    """(module, attribute)"""
    layer = first_layer(model)
    return (layer, "lora_A") if isinstance(layer, lk.LoRALinear) else (layer.lora_A["default"], "weight")


# ------------------------------------------------------------------------------------------------------- meta


def on_meta(kind):
    with torch.device("meta"):
        model = tiny_llama().eval()
        if kind == "injected":
            lk.inject(model, TARGETS, r=4, alpha=6)
        elif kind == "peft":
            model = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS))
    return model.eval()


def fill(model, base):
    """Gives ``model``, which is on the meta device, the weights of ``base``; its adapter is none of its business."""
    llama = llama_of(model)
    values = dict(base.named_parameters())
    for name, module in llama.named_modules():
        if "lora_" not in name:
            for attribute in module._parameters.keys() & {"weight"}:
                value = values[f"{name.removesuffix('.base_layer')}.weight"]
                module._parameters[attribute] = nn.Parameter(value.detach().clone(), requires_grad=False)
    llama.model.rotary_emb = base.model.rotary_emb


@pytest.mark.parametrize("filled_first", [False, True], ids=["all of it on meta", "adapter on meta"])
@pytest.mark.parametrize("kind", ["plain", "injected", "peft"])
def test_meta_parameters_are_replaced(base, saved, kind, filled_first):
    directory, expected = saved
    model = on_meta(kind)
    if filled_first:
        fill(model, base)
    lk.load_adapter(model, directory)
    adapter = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert adapter
    assert all(p.device == CPU and p.requires_grad for p in adapter.values())
    assert all(p.is_meta for n, p in model.named_parameters() if "lora_" not in n and not filled_first)
    if not filled_first:
        fill(model, base)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["injected", "peft"])
def test_meta_parameters_are_not_saved(kind, tmp_path):
    with pytest.raises(ValueError, match=rf"save_adapter: \S*{Q0}\.lora_A\S* is on the meta device and has no values"):
        lk.save_adapter(on_meta(kind), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------- offloaded

OFFLOADS = {
    "cpu": lambda model, folder: cpu_offload(model),
    "disk": lambda model, folder: disk_offload(model, str(folder)),
    "parts": lambda model, folder: dispatch_model(
        model, device_map=halves(model), main_device="cpu", offload_dir=str(folder)
    ),
    "block": lambda model, folder: cpu_offload(model, preload_module_classes=["LlamaDecoderLayer"]),
}


def halves(model):
    """Some layers in memory, the others on disk."""
    prefix = "base_model.model." if isinstance(model, PeftModel) else ""
    kept = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.1")
    places = dict.fromkeys(kept, "cpu") | dict.fromkeys(("model.layers.0", "model.layers.2"), "disk")
    return {prefix + name: place for name, place in places.items()}


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("kind", MAKERS)
def test_offloaded_adapter_is_read_and_written_where_it_is(base, saved, tmp_path, kind, offload):
    directory, expected = saved
    model = MAKERS[kind](twin(base))
    before = logits(model)
    OFFLOADS[offload](model, tmp_path / "weights")
    assert getattr(*first_lora_a(model)).is_meta
    lk.save_adapter(model, tmp_path / "out")
    torch.testing.assert_close(as_peft_reads(base, tmp_path / "out"), before, rtol=1e-5, atol=1e-5)

    lk.load_adapter(model, directory)
    assert getattr(*first_lora_a(model)).is_meta, "it must stay where it was"
    for _ in range(2):  # a forward brings values in and drops them again
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    lk.save_adapter(model, tmp_path / "out")
    torch.testing.assert_close(as_peft_reads(base, tmp_path / "out"), expected, rtol=1e-5, atol=1e-5)


def test_plain_model_that_is_offloaded_is_refused(base, saved):
    """accelerate put its own forward into every layer: it would bypass the adapter."""
    model = cpu_offload(twin(base))
    with pytest.raises(ValueError, match=rf"{Q0}: forward replaced on the instance"):
        lk.load_adapter(model, saved[0])
    assert not any(isinstance(module, lk.LoRALinear) for module in model.modules())


@pytest.mark.parametrize("kind", MAKERS)
def test_a_map_that_cannot_be_written_is_refused_before_anything_changes(base, saved, kind):
    model = MAKERS[kind](twin(base))
    holder, attribute = first_lora_a(model)
    add_hook_to_module(holder, AlignDevicesHook("cpu", offload=True))

    class Frozen:
        def __contains__(self, name):
            return name == attribute

    holder._hf_hook.weights_map = Frozen()
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=rf"{Q0}\.lora_A\S* is offloaded to a Frozen, whose entries cannot be replaced"
    ):
        lk.load_adapter(model, saved[0])
    assert_unchanged(model, before)


# ----------------------------------------------------------------------------------------------------- ZeRO-3


def partition(parameter, number):
    """What DeepSpeed's ZeRO-3 makes of a parameter: its values are in ``ds_tensor``, a part of them in each process."""
    parameter.ds_id, parameter.ds_shape, parameter.ds_tensor = number, parameter.shape, parameter.data.flatten()
    parameter.data = torch.empty(0, dtype=parameter.dtype)


def gather(parameter):
    """As inside ``deepspeed.zero.GatheredParameters``."""
    parameter.data = parameter.ds_tensor.view(parameter.ds_shape)


@pytest.mark.parametrize("kind", MAKERS)
def test_partitioned_parameters(base, saved, tmp_path, kind):
    directory, expected = saved
    model = MAKERS[kind](twin(base))
    parameters = dict(model.named_parameters())
    last = list(parameters)[-1 if kind == "injected" else -3]
    for number, parameter in enumerate(parameters.values()):
        partition(parameter, number)
    for act in (lk.save_adapter, lk.load_adapter):
        folder = tmp_path / "out" if act is lk.save_adapter else directory
        with pytest.raises(ValueError, match=rf"{act.__name__}: .*{Q0}\.lora_A\S* is partitioned by DeepSpeed ZeRO-3"):
            act(model, folder)
    assert not (tmp_path / "out").exists()

    for parameter in parameters.values():
        gather(parameter)
    lk.save_adapter(model, tmp_path / "out")
    torch.testing.assert_close(as_peft_reads(base, tmp_path / "out"), logits(model), rtol=1e-5, atol=1e-5)

    lora = [name for name in parameters if "lora_" in name]
    partition(parameters[lora[-1]], 0)  # one of many: nothing may be loaded in part
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"{lora[-1]} is partitioned"):
        lk.load_adapter(model, directory)
    assert_unchanged(model, before)
    gather(parameters[lora[-1]])
    lk.load_adapter(model, directory)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert last in parameters


@pytest.mark.parametrize("kind", MAKERS)
def test_an_empty_shard_without_a_mark_is_not_saved(base, tmp_path, kind):
    model = MAKERS[kind](base)
    holder, attribute = first_lora_a(model)
    getattr(holder, attribute).data = torch.empty(0)
    with pytest.raises(ValueError, match=rf"{Q0}\.lora_A\S* has shape \(0,\)"):
        lk.save_adapter(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------- FSDP


def shard(model, mesh):
    for layer in llama_of(model).model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=False)
    return fully_shard(model, mesh=mesh, reshard_after_forward=False)


@pytest.mark.parametrize("kind", MAKERS)
def test_fully_shard(base, saved, tmp_path, one_process, kind):
    directory, expected = saved
    model = shard(MAKERS[kind](twin(base)), one_process)
    logits(model)  # leaves gathered copies in the place of the shards: what is written to those is lost
    lk.load_adapter(model, directory)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    lk.save_adapter(model, tmp_path / "out")
    torch.testing.assert_close(as_peft_reads(base, tmp_path / "out"), expected, rtol=1e-5, atol=1e-5)
    if kind == "peft":
        assert model.base_model.model.__class__.__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("kind", MAKERS)
def test_fsdp1_keeps_parameters_elsewhere(base, saved, tmp_path, one_process, kind):
    directory, expected = saved
    model = MAKERS[kind](twin(base)).requires_grad_(True)
    llama = llama_of(model).model
    for index, layer in enumerate(llama.layers):
        llama.layers[index] = FullyShardedDataParallel(layer, device_id=CPU)
    model = FullyShardedDataParallel(model, device_id=CPU)
    for act in (lk.save_adapter, lk.load_adapter):
        folder = tmp_path / "out" if act is lk.save_adapter else directory
        with pytest.raises(ValueError, match=rf"{Q0}\.lora_A\S* is not a parameter of its layer.*summon_full_params"):
            act(model, folder)
    assert not (tmp_path / "out").exists()
    with FullyShardedDataParallel.summon_full_params(model):
        lk.load_adapter(model, directory)
        lk.save_adapter(model, tmp_path / "out")
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(as_peft_reads(base, tmp_path / "out"), expected, rtol=1e-5, atol=1e-5)


def _two_processes(rank, folder):
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    for kind, make in MAKERS.items():
        torch.manual_seed(0)
        whole = make(tiny_llama().eval())
        expected = logits(whole)
        model = shard(copy.deepcopy(whole), dist.init_device_mesh("cpu", (2,)))
        assert getattr(*first_lora_a(model)).to_local().numel() < getattr(*first_lora_a(whole)).numel()
        lk.save_adapter(model, f"{folder}/{kind}")
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.zeros_(parameter.to_local())
        dist.barrier()
        lk.load_adapter(model, f"{folder}/{kind}")
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)

        sharded = FullyShardedDataParallel(copy.deepcopy(whole), device_id=CPU, use_orig_params=True)
        with pytest.raises(ValueError, match=r"lora_A\S* has shape \(\d+,\).*summon_full_params"):
            lk.save_adapter(sharded, f"{folder}/no")
    dist.destroy_process_group()


def test_shards_of_two_processes(tmp_path):
    """Both write into one directory, too, at the same time."""
    mp.spawn(_two_processes, (str(tmp_path),), nprocs=2)
    for kind, make in MAKERS.items():
        torch.manual_seed(0)
        base = tiny_llama().eval()
        expected = logits(make(copy.deepcopy(base)))
        directory = tmp_path / kind
        assert sorted(file.name for file in directory.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        torch.testing.assert_close(as_peft_reads(base, directory), expected, rtol=1e-5, atol=1e-5)
    assert not (tmp_path / "no").exists()


# -------------------------------------------------------------------------------- parameters that are computed


@pytest.mark.parametrize("kind", MAKERS)
def test_pruned_adapter(base, saved, tmp_path, kind):
    """Reading what the forward reads is right; a write would last until the next forward computes it anew."""
    model = MAKERS[kind](base)
    holder, attribute = first_lora_a(model)
    prune.l1_unstructured(holder, attribute, amount=0.5)
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"{Q0}\.lora_A\S* is computed from other parameters"):
        lk.load_adapter(model, saved[0])
    assert_unchanged(model, before)
    if kind == "peft":  # PEFT would write weight_orig and weight_mask, and read no lora_A
        with pytest.raises(ValueError, match=rf"{Q0}\.lora_A\S* is computed from other parameters"):
            lk.save_adapter(model, tmp_path / "out")
    else:
        lk.save_adapter(model, tmp_path / "out")
        values = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert torch.equal(values[f"base_model.model.{Q0}.lora_A.weight"], holder.lora_A)


def test_parametrized_adapter_is_not_written(base, saved):
    model = injected(base)
    parametrize.register_parametrization(first_layer(model), "lora_A", nn.Identity())
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"{Q0}\.lora_A is computed from other parameters"):
        lk.load_adapter(model, saved[0])
    assert_unchanged(model, before)


@pytest.mark.parametrize("kind", MAKERS)
def test_inference_parameters_are_written(base, saved, kind):
    with torch.inference_mode():
        model = MAKERS[kind](twin(base))
    assert getattr(*first_lora_a(model)).is_inference()
    lk.load_adapter(model, saved[0])
    torch.testing.assert_close(logits(model), saved[1], rtol=1e-5, atol=1e-5)


def test_a_tensor_that_nobody_understands_is_refused(base, saved):
    class Remote(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise AssertionError("must not be asked")

    model = injected(base)
    remote = torch.Tensor._make_wrapper_subclass(Remote, (4, 24), dtype=torch.float32)
    first_layer(model)._parameters["lora_A"] = remote
    with pytest.raises(ValueError, match=rf"{Q0}\.lora_A is a Remote, which is not understood"):
        lk.load_adapter(model, saved[0])


def test_values_keep_the_dtype_of_the_model(base, saved):
    model = injected(twin(base).to(torch.bfloat16), adapter_dtype=torch.bfloat16)
    lk.load_adapter(model, saved[0])
    assert first_layer(model).lora_A.dtype == torch.bfloat16
