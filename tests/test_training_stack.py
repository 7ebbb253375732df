"""Patched PEFT models under the tools that people train with: each gives what stock PEFT gives under it."""

import copy
import json

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import tiny_llama
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import Trainer, TrainingArguments

import lora_kernels as lk
from lora_kernels.reasons import Reason

IDS = torch.arange(48).view(6, 8)


def make(**options):
    """Stock PEFT and its patched twin."""
    config = LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | options))
    stock = get_peft_model(tiny_llama(), config)
    for name, parameter in stock.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    patched = copy.deepcopy(stock)
    assert lk.patch(patched).kept == []
    return stock, patched


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(ours, expected, tolerance=2e-4):
    """Relative to the largest element: rounding adds up over the layers."""
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        assert (value - expected[name]).abs().max() <= tolerance * expected[name].abs().max(), name


def served():
    return sum(n for (op, _), n in lk.stats()["served"].items() if op == "lora_linear")


# --------------------------------------------------------------------------------- transformers and accelerate


@pytest.mark.parametrize("use_reentrant", [None, True, False], ids=["", "reentrant", "non-reentrant"])
def test_trainer(use_reentrant, tmp_path):
    """With gradient accumulation, and with both kinds of activation checkpointing."""
    data = [{"input_ids": ids, "labels": ids} for ids in IDS]
    losses = []
    for kind, model in zip(("stock", "patched"), make()):
        arguments = TrainingArguments(
            output_dir=tmp_path / kind, max_steps=3, per_device_train_batch_size=1, gradient_accumulation_steps=2,
            learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
            gradient_checkpointing=use_reentrant is not None,
            gradient_checkpointing_kwargs=None if use_reentrant is None else {"use_reentrant": use_reentrant},
        )  # fmt: skip
        if use_reentrant:
            model.enable_input_require_grads()
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        trainer.save_model()
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert lk.stats()["fallback"] == {}
    assert served() == 6 * 21 * (1 if use_reentrant is None else 2)

    ours = PeftModel.from_pretrained(tiny_llama(), tmp_path / "patched").state_dict()
    assert_close(
        load_file(tmp_path / "patched" / "adapter_model.safetensors"),
        load_file(tmp_path / "stock" / "adapter_model.safetensors"),
        2e-3,  # Adam's steps turn small differences of a gradient near zero into larger ones
    )
    assert any("lora_A" in name for name in ours)


def test_accelerate_accumulates_gradients():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    results = []
    for model in make():
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        model, optimizer = accelerator.prepare(model, optimizer)
        for ids in IDS.split(2):
            with accelerator.accumulate(model):
                accelerator.backward(model(input_ids=ids, labels=ids).loss)
                if accelerator.sync_gradients:
                    results.append({name: g.clone() for name, g in gradients(model).items()})
                optimizer.step()
                optimizer.zero_grad()
    stock, patched = results
    assert_close(patched, stock)
    assert lk.stats()["fallback"] == {}


def test_accumulated_gradients_are_those_of_the_whole_batch():
    _, model = make()
    model(input_ids=IDS, labels=IDS).loss.backward()
    expected = {name: g.clone() for name, g in gradients(model).items()}
    model.zero_grad()
    for ids in IDS.split(2):
        (model(input_ids=ids, labels=ids).loss / 3).backward()
    assert_close(gradients(model), expected)


# ----------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, base):
    """fp32 adapters on bases of fp32 and bf16; the error of stock PEFT sets the bound."""
    stock, patched = make()
    for model in (stock, patched):
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(base)
    exact = copy.deepcopy(stock).double()
    results = []
    for model in (exact, stock, patched):
        model.config.use_cache = False
        with torch.autocast("cpu", dtype, enabled=model is not exact):
            output = model(input_ids=IDS, labels=IDS)
        output.loss.backward()
        results.append({"logits": output.logits.detach(), **gradients(model)})
    exact, stock, patched = results
    for name, value in patched.items():
        assert value.dtype == stock[name].dtype
        ours, theirs = ((t.double() - exact[name]).norm() / exact[name].norm() for t in (value, stock[name]))
        assert ours <= 2 * theirs + 4 * torch.finfo(dtype).eps, name
    assert lk.stats()["fallback"] == {}


# ------------------------------------------------------------------------------------------- compile and export


def block(model):
    """A decoder layer, as a module of one tensor."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            llama = model.base_model.model.model
            self.layer, self.rotary = llama.layers[0], llama.rotary_emb

        def forward(self, x):
            positions = torch.arange(x.shape[1])[None]
            return self.layer(x, position_embeddings=self.rotary(x, positions), attention_mask=None)

    return Block()


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}], ids=["LoRA, dropout", "DoRA"])
def test_compiled_block_has_no_breaks_and_one_trace(options):
    _, model = make(**options)
    layer = block(model)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], 1e-2)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    losses = []
    x = torch.randn(2, 6, 24)
    try:
        for step in range(20):
            loss = compiled(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if step == 0:
                torch.compiler.set_stance("fail_on_recompile")
    finally:
        torch.compiler.set_stance("default")
    assert losses[-1] < losses[0]
    assert lk.stats()["fallback"] == {}
    assert served() == 20 * 7


def test_compiled_block_equals_eager():
    stock, patched = make()
    x = torch.randn(2, 6, 24, requires_grad=True)
    torch.compiler.reset()
    results = []
    for layer in (block(stock), torch.compile(block(patched), fullgraph=True, backend="aot_eager")):
        x.grad = None
        y = layer(x)
        y.square().sum().backward()
        found = {name.removeprefix("_orig_mod."): g for name, g in gradients(layer).items()}
        results.append({"y": y.detach(), "dx": x.grad, **found})
    assert_close(results[1], results[0])


def test_exported_block():
    stock, patched = make()
    x = torch.randn(2, 6, 24)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(block(patched).eval(), (x,), dynamic_shapes={"x": {1: tokens}})
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called.count("lora_kernels.lora_linear.default") == 7
    for example in (x, torch.randn(2, 9, 24)):
        torch.testing.assert_close(program.module()(example), block(stock).eval()(example))


# -------------------------------------------------------------------------------------------- tensor parallel


def test_shards_under_whole_adapters_fall_back(tmp_path):
    """A base is shared and its adapter is not, which PEFT has nowhere: its own forward; the others stay fused."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        stock, patched = make(target_modules=["gate_proj", "up_proj", "down_proj", "q_proj"])
        expected = stock(input_ids=IDS).logits
        plan = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
        for layer in patched.base_model.model.model.layers:
            mlp = layer.mlp
            parallelize_module(
                mlp, init_device_mesh("cpu", (1,)), {f"{name}.base_layer": style for name, style in plan.items()}
            )
        assert isinstance(mlp.up_proj.base_layer.weight, DTensor)
        torch.testing.assert_close(patched(input_ids=IDS).logits, expected)
        assert lk.stats()["fallback"] == {("lora_linear", Reason.SHARDING): 9}
        assert served() == 3
        assert [reason for _, reason in lk.patch(patched).kept] == [Reason.SHARDING] * 9
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------- files


def test_saved_files_are_the_same(tmp_path):
    for kind, model in zip(("stock", "patched"), make(target_modules=["q_proj", "embed_tokens"])):
        model.save_pretrained(tmp_path / kind)
    stock, patched = tmp_path / "stock", tmp_path / "patched"
    name = "adapter_model.safetensors"
    assert (stock / name).read_bytes() == (patched / name).read_bytes()
    configs = [json.loads((directory / "adapter_config.json").read_text()) for directory in (stock, patched)]
    for config in configs:
        config["target_modules"].sort()  # PEFT writes a set
    assert configs[0] == configs[1]


def test_state_dicts_go_both_ways():
    stock, patched = make(use_dora=True)
    for source, target in ((stock, patched), (patched, stock)):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.add_(0.01)
        assert target.load_state_dict(source.state_dict()) == ([], [])
        torch.testing.assert_close(target(input_ids=IDS).logits, source(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
