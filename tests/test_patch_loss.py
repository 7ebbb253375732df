"""patch(loss=True): the loss of causal language models without logits, against the models themselves."""

import copy
import inspect
import pickle

import language_models
import pytest
import torch
from language_models import MODELS, batch, llama, spread_out
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny_models import tiny_bert, tiny_t5
from torch import nn
from transformers import BertForMaskedLM, OPTConfig, OPTForCausalLM, Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutputWithPast

import lora_kernels as lk
from lora_kernels.reasons import Reason

LOSS = "linear_cross_entropy"


def with_adapters(model, targets=("lm_head", "o_proj"), **options):
    model = get_peft_model(model, LoraConfig(r=4, target_modules=list(targets), **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def step(model, **inputs):
    """The output, and the gradients of all that trains, by name."""
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(theirs, ours, rtol=2e-4):
    (output, grads), (our_output, our_grads) = theirs, ours
    assert our_output.logits is None
    assert type(our_output) is type(output)
    assert abs(our_output.loss.item() - output.loss.item()) <= 1e-6 * max(1.0, abs(output.loss.item()))
    assert grads.keys() == our_grads.keys()
    for name, grad in grads.items():
        assert (our_grads[name] - grad).norm() <= rtol * grad.norm() + 1e-7, name


@pytest.fixture(autouse=True)
def _counted():
    yield
    lk.reset_stats()


@pytest.mark.parametrize("name", MODELS)
def test_every_model_as_it_is(name):
    """Loss and all gradients, of a tied head, too; kills a cap or a factor that is left out or in the wrong order."""
    model = spread_out(MODELS[name]()).train()
    inputs = batch()
    theirs = step(model, **inputs)
    report = lk.patch(model, loss=True)
    assert report.fused == [("loss_function", LOSS)]
    assert str(report).startswith("1 of 1 loss fused")
    assert type(model).__name__ == MODELS[name]().__class__.__name__
    lk.reset_stats()
    compare(theirs, step(model, **inputs))
    assert lk.stats()["served"][LOSS, "cpu"] == 1
    lk.unpatch(model)
    assert type(model) is type(MODELS[name]())
    assert "_head_and_loss" not in model.__dict__
    assert step(model, **inputs)[0].logits is not None


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "gpt2"])
def test_an_adapter_on_the_head(name):
    targets = ("lm_head", "c_attn") if name == "gpt2" else ("lm_head", "o_proj")
    model = with_adapters(spread_out(MODELS[name]()), targets)
    inputs = batch()
    theirs = step(model, **inputs)
    report = lk.patch(model, loss=True)
    assert ("base_model.model.loss_function", LOSS) in report.fused
    assert "1 of 1 loss fused" in str(report).splitlines()[0]
    compare(theirs, step(model, **inputs))
    assert lk.stats()["fallback"].get((LOSS, str(Reason.LAYER_TYPE))) is None


def test_arguments_of_the_loss():
    model, inputs = llama(), batch()
    inputs["labels"] = inputs["input_ids"]
    shifted = torch.roll(inputs["labels"], -1, 1)
    calls = [
        {"num_items_in_batch": torch.tensor(7)}, {"num_items_in_batch": 7}, {"shift_labels": shifted},
        {"ignore_index": inputs["labels"][1, 3].item()}, {"use_cache": False, "output_hidden_states": True},
        {"attention_mask": torch.ones_like(shifted), "return_dict": True},
    ]  # fmt: skip
    theirs = [step(model, **inputs, **call) for call in calls]
    lk.patch(model, loss=True)
    for call, expected in zip(calls, theirs):
        ours = step(model, **inputs, **call)
        compare(expected, ours)
        assert set(ours[0].keys()) == set(expected[0].keys()) - {"logits"}
    assert LOSS not in {op for op, _ in lk.stats()["fallback"]}


def test_positional_arguments():
    model, inputs = llama(), batch()
    theirs = model(inputs["input_ids"], labels=inputs["labels"]).loss
    lk.patch(model, loss=True)
    assert torch.allclose(model(inputs["input_ids"], labels=inputs["labels"]).loss, theirs)
    assert inspect.signature(model.forward) == inspect.signature(llama().forward)


def fallbacks():
    return {reason: n for (op, reason), n in lk.stats()["fallback"].items() if op == LOSS}


def test_when_logits_are_made():
    """Where they are asked for, and where nobody trains, unless they are not wanted."""
    model, inputs = llama(), batch()
    lk.patch(model, loss=True)
    assert model(**inputs).logits is None
    assert model(**inputs, output_logits=True).logits.shape == (2, 11, 61)
    assert model(**inputs, logits_to_keep=torch.arange(11)).logits is not None
    with torch.no_grad():
        expected = model(**inputs)
        assert expected.logits is not None
        ours = model(**inputs, output_logits=False)
    assert ours.logits is None
    assert torch.allclose(ours.loss, expected.loss)
    assert fallbacks() == {str(Reason.LOGITS): 3}
    assert model(inputs["input_ids"]).logits is not None
    assert fallbacks() == {str(Reason.LOGITS): 3}


def test_generate_is_unchanged():
    model, ids = llama().eval(), batch()["input_ids"]
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    lk.patch(model, loss=True)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected)


def kept(model, **options):
    """Why the loss of a patched model is its own."""
    (reason,) = [why for name, why in lk.patch(model, loss=True, **options).kept if name.endswith("loss_function")]
    return reason


class OffBy(language_models.LlamaForCausalLM):
    """Does something to the logits, or to what is returned, that no config tells."""

    what = ""

    def forward(self, input_ids=None, labels=None, **kwargs):
        output = super().forward(input_ids, **kwargs)
        if self.what == "cap":
            output.logits = 30 * torch.tanh(output.logits / 30)
        loss = self.loss_function(output.logits, labels, self.vocab_size, **kwargs)
        if self.what == "penalty":
            loss = loss + 1e-3 * output.logits.square().mean()
        if self.what == "one output less":
            return CausalLMOutputWithPast(loss=loss, logits=output.logits)
        return CausalLMOutputWithPast(loss=loss, logits=output.logits, cache=output.cache)


@pytest.mark.parametrize(
    ("what", "dtype"),
    [
        ("cap", torch.float32), ("cap", torch.bfloat16), ("penalty", torch.float32), ("one output less", torch.float32),
        ("", torch.float32), ("", torch.bfloat16),
    ],
)  # fmt: skip
def test_a_forward_that_does_more_is_left_alone(what, dtype):
    model = OffBy(llama().config).to(dtype)
    model.what = what
    if what:
        assert kept(model) == Reason.LOSS_FORWARD
        assert type(model) is OffBy
    else:
        assert lk.patch(model, loss=True).fused == [("loss_function", LOSS)]


def test_a_config_that_promises_too_much():
    """A cap in the config that forward does not know; kills a config that is believed."""
    model = llama()
    model.config.final_logit_softcapping = 30.0
    assert kept(model) == Reason.LOSS_FORWARD


def test_what_is_no_language_model():
    assert kept(tiny_t5()) == Reason.LOSS_FORWARD
    assert kept(tiny_bert(BertForMaskedLM)) == Reason.LOSS_FUNCTION
    opt = OPTConfig(vocab_size=61, hidden_size=24, ffn_dim=40, num_hidden_layers=1, num_attention_heads=2,
                    word_embed_proj_dim=24, max_position_embeddings=32)  # fmt: skip
    assert kept(OPTForCausalLM(opt)) == Reason.LOSS_FORWARD  # it calls a part of its backbone
    with pytest.raises(ValueError, match="loss=True needs a model of transformers with a head, Linear holds none"):
        lk.patch(nn.Linear(3, 3), loss=True)
    with pytest.raises(ValueError, match="loss=True"):
        lk.patch(nn.Linear(3, 3))
    model = llama()
    model.forward = model.forward
    assert kept(model) == Reason.INSTANCE_FORWARD
    with torch.device("meta"):
        assert kept(llama()) == Reason.META


def test_calls_that_are_the_models_own():
    model, inputs = with_adapters(llama(), lora_dropout=0.1), batch()
    lk.patch(model, loss=True)
    base = model.base_model.model

    def reason_of(**more):
        lk.reset_stats()
        assert model(**inputs, **more).logits is not None
        (reason,) = fallbacks()
        return reason

    model.train()
    assert reason_of() == Reason.HEAD_DROPOUT
    model.eval()
    assert model(**inputs).logits is None
    with model.disable_adapter():
        assert reason_of() == Reason.DISABLED
    handle = base.lm_head.register_forward_hook(lambda *_: None)
    assert reason_of() == Reason.ADAPTER_HOOKS
    handle.remove()
    model.merge_adapter()
    assert reason_of() == Reason.MERGED
    model.unmerge_adapter()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["o_proj"]))
    model.set_adapter("other")
    assert reason_of() == Reason.NO_ACTIVE_ADAPTER
    model.set_adapter("default")
    lk.reset_stats()
    assert base(**inputs, return_dict=False)[1].shape == (2, 11, 61)
    assert fallbacks() == {str(Reason.EXTRA_ARGUMENTS): 1}
    assert model(**inputs).logits is None


def test_heads_that_are_not_served():
    assert kept(with_adapters(llama(), use_dora=True)) == Reason.DORA
    assert kept(get_peft_model(llama(), LoraConfig(target_modules=["o_proj"], modules_to_save=["lm_head"]))) == (
        Reason.LAYER_TYPE
    )


def test_the_balance_of_experts_is_a_part_of_the_loss():
    model, inputs = language_models.mixtral(), batch()
    expected = model(**inputs, output_router_logits=True).loss
    lk.patch(model, loss=True)
    assert torch.allclose(model(**inputs, output_router_logits=True).loss, expected)
    assert fallbacks() == {str(Reason.LOSS_FORWARD): 1}


def test_a_patched_prompt():
    model = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    inputs = batch()
    theirs = step(model, **inputs)
    lk.patch(model, loss=True)
    compare(theirs, step(model, **inputs))


def test_fewer_bytes_are_saved():
    """Neither logits nor their fp32 copy: at least two of [rows, vocabulary] less."""
    model, inputs = with_adapters(llama()), batch(4, 32)

    def saved():
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t
        ):
            model(**inputs).loss.backward()
        return sum(sizes.values())

    lk.patch(model)
    before = saved()
    lk.patch(model, loss=True)
    assert saved() <= before - 4 * 32 * 61 * 4
    assert model(**inputs).logits is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model, inputs = with_adapters(llama()), batch()
    theirs = step(model, **inputs)
    lk.patch(model, loss=True)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    compare(theirs, step(model.train(), **inputs, use_cache=False))


def test_autocast():
    model, inputs = with_adapters(llama()), batch()
    exact = step(model, **inputs)
    lk.patch(model, loss=True)
    with torch.autocast("cpu", torch.bfloat16):
        output, grads = step(model, **inputs)
    assert output.logits is None
    assert output.loss.dtype == torch.float32
    assert torch.allclose(output.loss, exact[0].loss, rtol=1e-2)
    for name, grad in exact[1].items():
        assert (grads[name] - grad).norm() <= 0.05 * grad.norm(), name


def test_compile():
    model, inputs = with_adapters(llama()), batch()
    lk.patch(model, loss=True)
    expected = step(model, **inputs, use_cache=False)
    lk.reset_stats()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(**inputs, use_cache=False).loss
    loss.backward()
    assert torch.allclose(loss, expected[0].loss)
    assert lk.stats()["served"][LOSS, "cpu"] == 1


def test_trainer(tmp_path):
    """Several small batches of one step, whose losses are divided by the tokens of them all."""
    data = [{"input_ids": row, "labels": row} for row in torch.randint(3, 61, (8, 9))]

    def losses(loss):
        torch.manual_seed(0)
        model = with_adapters(llama())
        if loss:
            lk.patch(model, loss=True)
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2, logging_steps=1,
            learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
        trainer.train()
        found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return [*found, trainer.evaluate()["eval_loss"]]

    theirs = losses(False)
    lk.reset_stats()
    assert losses(True) == pytest.approx(theirs, rel=1e-4)
    assert lk.stats()["served"][LOSS, "cpu"] == 4


def test_copies_and_pickles():
    model, inputs = llama(), batch()
    lk.patch(model, loss=True)
    expected = model(**inputs).loss
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin(**inputs).logits is None
        assert torch.equal(twin(**inputs).loss, expected)
        lk.unpatch(twin)
        assert type(twin) is type(llama())


def test_a_wrapper_that_has_kept_the_forward():
    """As accelerate's hooks and its autocast do; kills a plan that is taken for granted."""
    model, inputs = llama(), batch()
    lk.patch(model, loss=True)
    model._old_forward, kept_elsewhere = model.forward, model.forward
    lk.unpatch(model)
    assert model._old_forward.__func__ is type(llama()).forward
    assert kept_elsewhere(**inputs).logits is not None


def test_patching_again_and_verifying():
    model = with_adapters(llama())
    lk.patch(model, loss=True)
    assert ("base_model.model.loss_function", LOSS) in lk.patch(model).fused
    assert lk.is_fused(model.base_model.model)
    assert {check.verdict for check in lk.verify(model).checks} == {"ok"}
    before = torch.random.get_rng_state()
    lk.patch(model, loss=True)
    assert torch.equal(before, torch.random.get_rng_state())
    assert model.base_model.model.lm_head.training
    assert lk.stats() == {"served": {}, "fallback": {}}
