"""What patch(loss=True) tries before it takes a loss over, and what it looks at again in every call."""

import language_models
import pytest
import torch
import torch.nn.functional as F
from language_models import MODELS, batch, llama, spread_out
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BambaConfig, BambaForCausalLM

import lora_kernels as lk
from lora_kernels.reasons import Reason

LOSS = "linear_cross_entropy"
LOW = (torch.bfloat16, torch.float16)
Llama = language_models.LlamaForCausalLM


@pytest.fixture(autouse=True)
def _counted():
    lk.reset_stats()
    yield
    lk.reset_stats()


def kept(model):
    """Why the loss of a patched model is its own; None if it is not."""
    reasons = [why for name, why in lk.patch(model, loss=True).kept if name.endswith("loss_function")]
    return reasons[0] if reasons else None


def fallbacks():
    return {reason: n for (op, reason), n in lk.stats()["fallback"].items() if op == LOSS}


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_models_of_16_bits(name, dtype):
    """What models round is no reason; kills a bound that only float32 keeps to."""
    model = spread_out(MODELS[name]()).to(dtype)
    assert kept(model) is None
    assert model(**batch()).logits is None


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_an_adapter_on_a_head_of_16_bits(dtype):
    model = get_peft_model(llama().to(dtype), LoraConfig(r=4, target_modules=["lm_head"], lora_dropout=0.5))
    nn.init.normal_(model.base_model.model.lm_head.lora_B["default"].weight, std=0.3)
    assert kept(model) is None


class Penalty(Llama):
    """A small one of large logits, of which the config says nothing."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        output = super().forward(input_ids, labels=labels, **kwargs)
        if labels is not None:
            output.loss = output.loss + 1e-4 * output.logits.float().logsumexp(-1).square().mean()
        return output


class Early(Llama):
    """Bounds its logits in float32, as a config says; for ``late`` in its own dtype."""

    late = False

    def forward(self, input_ids=None, labels=None, **kwargs):
        output = super().forward(input_ids, **kwargs)
        logits = output.logits if self.late else output.logits.float()
        output.logits = 30 * torch.tanh(logits / 30)
        if labels is not None:
            output.loss = self.loss_function(output.logits, labels, self.vocab_size, **kwargs)
        return output


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_a_small_penalty_shows_in_every_dtype(dtype):
    """Kills a bound that is as wide as the rounding of logits."""
    assert kept(Penalty(llama().config).to(dtype)) == Reason.LOSS_FORWARD


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_where_logits_are_made_wide(late, dtype):
    config = llama().config
    config.final_logit_softcapping = 30.0
    model = Early(config).to(dtype)
    model.late = late
    assert kept(model) is None


def bamba(coefficient):
    config = BambaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, attn_layer_indices=[0], mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1,
        mamba_d_state=8, mamba_expand=2, z_loss_coefficient=coefficient,
    )  # fmt: skip
    return BambaForCausalLM(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_penalty_of_the_config(dtype):
    """However small: 1e-7 is below every bound."""
    assert kept(bamba(1e-7).to(dtype)) == Reason.LOSS_FORWARD
    assert kept(bamba(0.0).to(dtype)) is None


class Drops(Llama):
    """Between backbone and head, in training."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        handle = self.lm_head.register_forward_pre_hook(lambda _, args: F.dropout(args[0], 0.5, self.training))
        output = super().forward(input_ids, labels=labels, **kwargs)
        handle.remove()
        return output


class HasChild(Llama):
    """The same in a child of its own."""

    def __init__(self, config):
        super().__init__(config)
        self.drop = nn.Dropout(0.5)

    def forward(self, input_ids=None, labels=None, **kwargs):
        output = super().forward(input_ids, **kwargs)
        if labels is not None:
            output.loss = self.loss_function(self.drop(output.logits), labels, self.vocab_size, **kwargs)
        return output


class PenaltyInTraining(Llama):
    def forward(self, input_ids=None, labels=None, **kwargs):
        output = super().forward(input_ids, labels=labels, **kwargs)
        if self.training and labels is not None:
            output.loss = output.loss + output.logits.logsumexp(-1).square().mean()
        return output


class MasksLabels(Llama):
    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        if labels is not None and attention_mask is not None:
            labels = labels.masked_fill(attention_mask == 0, -100)
        return super().forward(input_ids, attention_mask=attention_mask, labels=labels, **kwargs)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", [Drops, HasChild, PenaltyInTraining, MasksLabels])
def test_what_shows_in_training_or_with_a_mask(kind, training):
    """Kills a trial in eval mode alone, one of the model without its children, and one without a mask."""
    model = kind(llama().config).train(training)
    model.model.eval()
    modes = [module.training for module in model.modules()]
    before = torch.random.get_rng_state()
    assert kept(model) == Reason.LOSS_FORWARD
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(before, torch.random.get_rng_state())


def test_no_generator_is_seeded(monkeypatch):
    """``torch.manual_seed`` would seed those of all devices, which nobody puts back."""

    def refuse(*_):
        raise AssertionError("a generator of the user's is seeded")

    for place, name in ((torch, "manual_seed"), (torch.cuda, "manual_seed_all"), (torch.random, "manual_seed")):
        monkeypatch.setattr(place, name, refuse)
    assert kept(llama()) is None


def test_a_loss_function_of_ones_own():
    """Set behind the patch; kills a plan that is believed for good."""
    model, inputs = llama(), batch()
    lk.patch(model, loss=True)
    theirs = model.loss_function
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum() * 0 + 42.0
    assert model(**inputs).loss == 42.0
    assert fallbacks() == {str(Reason.LOSS_FUNCTION): 1}
    model.loss_function = theirs
    assert model(**inputs).logits is None


@pytest.mark.parametrize(
    ("name", "key", "reason"),
    [
        ("gemma2", "final_logit_softcapping", Reason.LOSS_CONFIG), ("granite", "logits_scaling", Reason.LOSS_CONFIG),
        ("llama", "z_loss_coefficient", Reason.LOSS_FORWARD), ("mixtral", "output_router_logits", Reason.LOSS_FORWARD),
    ],
)  # fmt: skip
def test_a_config_that_changes(name, key, reason):
    model, inputs = spread_out(MODELS[name]()), batch()
    lk.patch(model, loss=True)
    assert model(**inputs).logits is None
    setattr(model.config, key, True if reason == Reason.LOSS_FORWARD else 1.0)
    ours = model(**inputs)
    assert fallbacks() == {str(reason): 1}
    lk.unpatch(model)
    assert torch.equal(ours.loss, model(**inputs).loss)


def test_the_balance_of_experts_in_a_config_within_the_config(monkeypatch):
    """As models of text and images have it."""
    model, inputs = language_models.mixtral(), batch()
    lk.patch(model, loss=True)
    text = type(model.config)(output_router_logits=True)
    monkeypatch.setattr(model.config, "get_text_config", lambda *_, **__: text, raising=False)
    assert model(**inputs).logits is not None
    assert fallbacks() == {str(Reason.LOSS_FORWARD): 1}
    assert model(**inputs, output_router_logits=False).logits is None


@pytest.mark.parametrize("name", ["labels", "shift_labels"])
def test_labels_of_another_length(name):
    model, inputs = llama(), batch()
    lk.patch(model, loss=True)
    inputs[name] = inputs["labels"][:, :5]
    with pytest.raises(ValueError, match=r"labels must be \[2, 11\] to fit the hidden states .*, got \[2, 5\]"):
        model(**inputs)


def test_labels_of_another_shape():
    """As many as there are rows do: each has the next as its label, over the ends of sequences."""
    model, inputs = llama(), batch()
    inputs["labels"] = inputs["labels"].reshape(1, -1)
    theirs = model(**inputs).loss
    lk.patch(model, loss=True)
    assert torch.allclose(model(**inputs).loss, theirs)
