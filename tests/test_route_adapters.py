"""``lk.route_adapters``: an adapter per sample in training; and aLoRA, whose adapters act on some tokens."""

import contextlib
import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_layers import K, lin, make, randomise, run
from tiny_models import tiny_llama
from torch import nn

import lora_kernels as lk
from lora_kernels.reasons import Reason

IDS = torch.arange(28).view(4, 7)
NAMES = ["second", "__base__", "default", "second"]


def model_with_two(targets=("q_proj", "down_proj"), **options):
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=list(targets), **options))
    model.add_adapter("second", LoraConfig(r=2, target_modules=list(targets), **options))
    randomise(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    lk.patch(model)
    lk.reset_stats()
    return model


def gradients(model, ids, route, samples=slice(None)):
    """Of all adapters, for the sum of the losses of ``samples``, routed or by the active adapter."""
    model.zero_grad()
    with lk.route_adapters(model, route) if isinstance(route, list) else contextlib.nullcontext():
        logits = model(ids[samples]).logits
        (logits.log_softmax(-1)[..., 0].sum()).backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_each_adapter_learns_from_its_own_samples(checkpointing):
    model = model_with_two().train()
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    logits, mixed = gradients(model, IDS, NAMES)
    stats = lk.stats()
    assert {op for op, _ in stats["served"]} == {"multi_lora_linear", "multi_lora_linear_backward"}
    assert stats["fallback"] == {}
    for name in ("default", "second"):
        mine = [i for i, of_sample in enumerate(NAMES) if of_sample == name]
        model.base_model.set_adapter(name)
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in parameter_name)
        alone, expected = gradients(model, IDS, None, mine)
        torch.testing.assert_close(logits[mine], alone)
        own = {n: g for n, g in expected.items() if f".{name}." in n}
        assert own
        for n, grad in own.items():
            assert grad.any()
            assert (mixed[n] - grad).abs().max() <= 1e-5 * grad.abs().max() + 1e-7, n
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(logits[[1]], model(IDS[[1]]).logits)


def test_an_adapter_without_samples_gets_no_gradient():
    """As in a step on the others' samples alone: an optimizer leaves it where it is."""
    model = model_with_two().train()
    _, mixed = gradients(model, IDS, ["second", None, None, "second"])
    assert {(".second." in name, bool(grad.any())) for name, grad in mixed.items()} == {(True, True)}


def test_dropout_in_training():
    """One mask over the batch; a sample's update is that of its adapter, of what was kept."""
    model = model_with_two(lora_dropout=0.5).train()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(4, 5, 24)
    with lk.route_adapters(layer, NAMES):
        first, second = layer(x), layer(x)
    base = layer.base_layer(x)
    assert torch.equal(first[1], base[1])
    assert not torch.equal(first[0], second[0])
    layer.lora_dropout["second"].p = 0.25
    with lk.route_adapters(layer, NAMES):
        layer(x)
    assert lk.stats()["fallback"] == {("multi_lora_linear", Reason.DROPOUTS): 1}


def test_layers_that_are_not_fused_are_routed_by_peft():
    model = model_with_two()
    stock = copy.deepcopy(model)
    lk.unpatch(stock)
    with lk.route_adapters(model, NAMES), lk.route_adapters(stock, NAMES), torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, stock(IDS).logits)


def test_afterwards_all_is_as_before():
    model = model_with_two().eval()
    with torch.no_grad():
        before = model(IDS).logits
        with lk.route_adapters(model, NAMES):
            routed = model(IDS).logits
            with lk.route_adapters(model, [None] * 4):
                inner = model(IDS).logits
            assert torch.equal(model(IDS).logits, routed)
        assert torch.equal(model(IDS).logits, before)
        assert not torch.allclose(routed, before)
        with model.disable_adapter():
            torch.testing.assert_close(inner, model(IDS).logits)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("reentrant", [False, True])
def test_backward_outside_says_so(reentrant):
    """Recomputed by the active adapter, gradients would be another's."""
    model = model_with_two().train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with lk.route_adapters(model, NAMES):
        loss = model(IDS).logits.sum()
    with pytest.raises(RuntimeError, match="call backward inside"):
        loss.backward()
    model.zero_grad()
    model(IDS).logits.sum().backward()  # the active adapter's own step


def test_generation():
    model = model_with_two().eval()
    model.generation_config.eos_token_id = None
    with lk.route_adapters(model, NAMES):
        tokens = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    expected = model.generate(input_ids=IDS, adapter_names=NAMES, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(tokens, expected)


def test_beams_are_samples():
    model = model_with_two().eval()
    options = {"input_ids": IDS, "num_beams": 2, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with lk.route_adapters(model, [name for name in NAMES for _ in range(2)]):
        tokens = model.generate(**options)
    assert torch.equal(tokens, model.generate(adapter_names=NAMES, **options))


def test_bad_arguments():
    model = model_with_two()
    for value, error, message in (
        (["third"] * 4, ValueError, "no layer has an adapter 'third', known are default, second"),
        ([0] * 4, TypeError, "adapters of a PEFT model are names, got 0"),
    ):
        with pytest.raises(error, match=message), lk.route_adapters(model, value):
            pass
    with pytest.raises(ValueError, match="neither PEFT's LoRA layers nor MultiLoRALinear"):
        lk.route_adapters(nn.Linear(2, 2), [0]).__enter__()
    pool = lk.MultiLoRALinear(nn.Linear(4, 4), 2, r=1, alpha=1)
    for value, error, message in (
        (["a"], TypeError, "are numbers, got 'a'"), ([2], ValueError, "numbers from -1 to 1, got 2"),
    ):  # fmt: skip
        with pytest.raises(error, match=message), lk.route_adapters(pool, value):
            pass
    with lk.route_adapters(model, NAMES[:3]), pytest.raises(ValueError, match="should be the same as the number"):
        model(IDS)


def test_gradients_of_a_pool_under_checkpointing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    lk.inject(model, ["0", "2"], r=2, alpha=2, adapters=3)
    randomise(model)
    x = torch.randn(4, 6)
    with lk.route_adapters(model, [2, None, 0, 2]):
        torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).square().sum().backward()
    mixed = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for number, mine in ((0, [2]), (2, [0, 3]), (1, [])):
        model.zero_grad()
        with lk.route_adapters(model, [number] * len(mine)):
            model(x[mine]).square().sum().backward()
        for n, p in model.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(mixed[n][number], p.grad[number])


# ----------------------------------------------------------------------------------------------------- aLoRA


OFFSETS = [None, 2, 5, 9]  # of samples of five tokens: none, the last two, all, more than there are


@pytest.mark.parametrize("offsets", [OFFSETS, None, [None] * 4], ids=str)
@pytest.mark.parametrize("tokens", [5, None])
def test_alora_acts_on_the_last_tokens(offsets, tokens):
    stock = make(alora_invocation_tokens=[1])
    patched = copy.deepcopy(stock)
    assert lk.patch(patched).fused == [("base_model.model.lin", "multi_lora_linear")]
    x = torch.randn(*((4, tokens) if tokens else (4,)), K, requires_grad=True)
    kwargs = {} if offsets is None else {"alora_offsets": offsets}
    ours, expected = run(lin(patched), x, **kwargs), run(lin(stock), x, **kwargs)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert (ours[name] - value).abs().max() <= 1e-5 * value.abs().max() + 1e-6, name
    assert {op for op, _ in lk.stats()["served"]} == {"multi_lora_linear", "multi_lora_linear_backward"}
    assert lk.stats()["fallback"] == {}


def test_alora_beside_lora():
    stock = make(alora_invocation_tokens=[1]).eval()
    stock.add_adapter("second", LoraConfig(r=3, target_modules=["lin"]))
    randomise(stock)
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    x, kwargs = torch.randn(4, 5, K), {"adapter_names": ["default", "second", "__base__", "default"]}
    with torch.no_grad():
        for offsets in ([2, None, None, 4], [None, None, None, 1]):
            ours, theirs = (lin(m)(x, **kwargs, alora_offsets=offsets) for m in (patched, stock))
            torch.testing.assert_close(ours, theirs)
    assert {op for op, _ in lk.stats()["served"]} == {"multi_lora_linear"}


def test_an_alora_is_not_taken_for_a_lora_of_its_name():
    """Kills: ids remembered by names and offsets alone, of which another model's adapters may be aLoRA."""
    x = torch.randn(4, 5, K)
    lora, stock = make().eval(), make(alora_invocation_tokens=[1]).eval()
    patched = copy.deepcopy(stock)
    for model in (lora, patched):
        lk.patch(model)
    with torch.no_grad():
        lin(lora)(x, adapter_names=["default"] * 4)
        torch.testing.assert_close(lin(patched)(x), lin(stock)(x))
    assert lk.stats()["fallback"] == {}


def test_alora_in_a_model_and_generation():
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "up_proj"], alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM"
    )
    stock = get_peft_model(tiny_llama().eval(), config)
    randomise(stock)
    patched = copy.deepcopy(stock)
    assert {by for _, by in lk.patch(patched).fused} == {"multi_lora_linear"}
    ids = torch.tensor([[1, 2, 5, 6, 7, 8], [5, 6, 9, 1, 2, 3], [1, 2, 3, 4, 7, 8]])
    for model in (stock, patched):
        model.generation_config.eos_token_id = None
    results = []
    for model in (patched, stock):
        model.zero_grad()
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        tokens = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((output.logits.detach(), tokens, grads))
    (ours, our_tokens, our_grads), (theirs, their_tokens, their_grads) = results
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(our_tokens, their_tokens)
    for name, grad in their_grads.items():
        assert (our_grads[name] - grad).abs().max() <= 1e-4 * grad.abs().max() + 1e-7, name
    assert lk.stats()["fallback"] == {}
