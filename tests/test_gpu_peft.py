"""PEFT models on a GPU, patched: loss and every gradient beside stock PEFT and float64, and what ``lk.verify`` says."""

from __future__ import annotations

import contextlib
import copy

import gpu
import pytest
import torch
from gpu import BF16, DEVICE, FP32
from numerics import assert_as_accurate
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from peft_layers import randomise
from transformers import LlamaConfig, LlamaForCausalLM

import lora_kernels as lk
from lora_kernels import dispatch
from lora_kernels.support import triton as triton_support

pytestmark = gpu.needed

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCABULARY = 499


@pytest.fixture(params=["as dispatched", "triton first"])
def order(request, monkeypatch):
    """The backends that serve LoRA layers, in dispatch's order or with Triton asked before CUDA."""
    names = ("cpu", "reference") if gpu.REHEARSED else ("cuda", "triton")
    available = [name for name in names if lk.backends()[name].available]
    if request.param == "as dispatched":
        return available
    if not lk.backends()["triton"].available or gpu.REHEARSED:
        pytest.skip(lk.backends()["triton"].detail)
    refused = triton_support.refusal(torch.device("cuda", 0))
    if refused is not None:
        pytest.skip(str(refused.reason))
    monkeypatch.setitem(dispatch._ORDER, "cuda", ("triton", "reference"))
    return ["triton"]


def base(dtype=BF16, layers=2):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=520, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0,
        attn_implementation="eager",  # another's backward adds in any order
    )  # fmt: skip
    return LlamaForCausalLM(config).to(DEVICE, dtype)


def make(dtype=BF16, *, fp32_adapters=True, layers=2, **options):
    """A stock PEFT model whose adapters do something."""
    config = LoraConfig(**{"r": 8, "lora_alpha": 12, "target_modules": TARGETS} | options)
    model = get_peft_model(base(dtype, layers), config, autocast_adapter_dtype=fp32_adapters)
    randomise(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.1)
    return model.train()


def inputs(batch=3, tokens=70):
    ids = torch.randint(VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def results(model, given, within=contextlib.nullcontext):
    """Loss, logits, and the gradient of everything that trains."""
    model.zero_grad(set_to_none=True)
    with within():
        output = model(**given)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": output.loss.detach(), "logits": output.logits.detach(), **gradients}


def patched_twin(stock):
    twin = copy.deepcopy(stock)
    report = lk.patch(twin)
    assert report.fused
    assert not report.kept, str(report)
    return twin


def assert_accurate(ours, bound, exact):
    """By the yardstick, in the dtype of ``bound``'s products; the loss, a single number, by eight bits of it."""
    assert ours.keys() == bound.keys() == exact.keys()
    for name, value in ours.items():
        if name == "loss":
            wrong, allowed = abs(value.item() - exact[name].item()), 2**-8 * abs(exact[name].item())
            assert wrong <= 2 * abs(bound[name].item() - exact[name].item()) + allowed
        else:
            assert_as_accurate(value.to(bound[name].dtype), bound[name], exact[name], name)


def assert_close(ours, expected):
    """But for what the order of float32 sums makes, relative to each tensor's largest element."""
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        largest = expected[name].abs().max().item()
        torch.testing.assert_close(
            value, expected[name], rtol=0, atol=5e-5 * largest, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_served_by(names, op="lora_linear"):
    served = {backend for served_op, backend in lk.stats()["served"] if served_op.removesuffix("_backward") == op}
    assert served, lk.stats()
    assert served <= set(names), lk.stats()


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "r": 12}, {"r": 64}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("fp32_adapters", [True, False])
def test_loss_and_gradients_in_bfloat16(order, fp32_adapters, options):
    stock, given = make(fp32_adapters=fp32_adapters, **options), inputs()
    patched = patched_twin(stock)
    lk.reset_stats()
    ours = results(patched, given)
    assert_served_by(order)
    bound = results(copy.deepcopy(stock).to(BF16), given)
    assert_accurate(ours, bound, results(copy.deepcopy(stock).double(), given))


def test_loss_and_gradients_under_autocast(order):
    stock, given = make(FP32), inputs()
    patched = patched_twin(stock)

    def autocast():
        return torch.autocast(DEVICE.type, BF16)

    lk.reset_stats()
    ours = results(patched, given, autocast)
    assert_served_by(order)
    sixteen_bit = {name: value.to(BF16) for name, value in results(stock, given, autocast).items()}
    assert_accurate(ours, sixteen_bit, results(copy.deepcopy(stock).double(), given))


def test_strict_float32_is_as_it_was():
    """No tensor-core kernel serves it, unless torch may take tf32: patching must neither raise nor round."""
    stock, given = make(FP32), inputs()
    patched = patched_twin(stock)
    assert_close(results(patched, given), results(stock, given))


def test_dropout_is_drawn_from_torchs_generator(order):
    stock, given = make(lora_dropout=0.1), inputs()
    patched = patched_twin(stock)

    def loss_and_gradients(seed):
        torch.manual_seed(seed)
        return results(patched, given)

    first, again, other = (loss_and_gradients(seed) for seed in (5, 5, 6))
    assert first["loss"] == again["loss"]
    assert gpu.same([v for n, v in first.items() if "lora" in n], [v for n, v in again.items() if "lora" in n])
    assert first["loss"] != other["loss"]
    drawn = torch.stack([loss_and_gradients(seed)["loss"] for seed in range(8)])
    patched.eval()
    evaluated = torch.stack([loss_and_gradients(seed)["loss"] for seed in range(2)])
    assert drawn.unique().numel() > 4
    assert evaluated.unique().numel() == 1
    assert (drawn.mean() - evaluated[0]).abs() <= 0.1 * evaluated[0], "dropout keeps the expectation"


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.1}, {"r": 17, "lora_dropout": 0.3}], ids=str)
def test_verify_finds_every_layer_right(order, options):
    patched = patched_twin(make(**options))
    found = lk.verify(patched, rows=70)
    assert [str(check) for check in found.checks if check.verdict != "ok"] == []
    assert len(found.checks) == 2 * len(TARGETS)


def test_patched_models_generate(order):
    patched = patched_twin(make()).eval()
    ids = inputs(2, 9)["input_ids"]
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    made = patched.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert made.shape == (2, 21)
    assert_served_by(order)


PROMPTS = {
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "mlp": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=32),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "projected prefix": PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=32
    ),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_and_prefixes(order, kind):
    stock, given = get_peft_model(base(FP32), copy.deepcopy(PROMPTS[kind])).eval(), inputs()
    patched = patched_twin(stock)
    lk.reset_stats()
    ours = results(patched, given)
    assert_served_by(order, "prefix_kv" if "prefix" in kind else "prompt_embedding")
    assert any("prompt_encoder" in name for name in ours)
    assert_close(ours, results(stock, given))
    found = lk.verify(patched, rows=16)
    assert [str(check) for check in found.checks if check.verdict != "ok"] == []


@gpu.only
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_patched_model_under_reduce_overhead(dropout):
    """Warm-up, recording and replays of its graphs train as the eager model does."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    stock, given = make(layers=1, lora_dropout=dropout), inputs()
    patched = patched_twin(stock)
    exact = results(copy.deepcopy(stock).eval().double(), given)
    bound = results(copy.deepcopy(stock).eval().to(BF16), given)
    compiled = torch.compile(patched, mode="reduce-overhead", dynamic=False)
    losses = []
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        patched.zero_grad(set_to_none=True)
        loss = compiled(**given).loss
        loss.backward()
        losses.append(loss.item())
        if dropout == 0.0:
            ours = {"loss": loss.detach().clone()}
            ours |= {n: p.grad.clone() for n, p in patched.named_parameters() if p.grad is not None}
            assert_accurate(ours, *({n: t for n, t in found.items() if n != "logits"} for found in (bound, exact)))
    if dropout > 0.0:
        assert len(set(losses)) == 5, "every replay draws its own masks"
        assert max(losses) - min(losses) <= 0.2 * min(losses)
    assert counters["inductor"]["cudagraph_skips"] == 0, "no graph was taken"
