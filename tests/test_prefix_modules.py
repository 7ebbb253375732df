"""PrefixEncoder, and the state dicts of all prompt modules, against PEFT's modules, models and checkpoints."""

import pytest
import torch
from peft import PrefixEncoder as PeftPrefixEncoder
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from tiny_models import tiny_llama, tiny_t5

import lora_kernels as lk

ROWS, LAYERS, HEADS, HEAD_DIM, WIDTH = 4, 3, 1, 12, 10
VOCABULARY, BATCH = 61, 3


def config(projection, **options):
    return PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=ROWS,
        prefix_projection=projection,
        encoder_hidden_size=WIDTH,
        **options,
    )


def ours(projection):
    return lk.PrefixEncoder(ROWS, LAYERS, HEADS, HEAD_DIM, WIDTH if projection else None)


def batch():
    ids = torch.randint(VOCABULARY, (BATCH, 6))
    mask = (torch.arange(6) < torch.tensor([6, 3, 5])[:, None]).long()
    return ids, mask, torch.cat([mask.new_ones(BATCH, ROWS), mask], dim=1)


@pytest.mark.parametrize("projection", [False, True])
def test_encoder_equals_pefts(projection):
    sizes = {"token_dim": HEADS * HEAD_DIM, "num_layers": LAYERS, "num_attention_heads": HEADS}
    theirs, encoder = PeftPrefixEncoder(config(projection, **sizes)), ours(projection)
    assert list(encoder.state_dict()) == list(theirs.state_dict())
    encoder.load_state_dict(theirs.state_dict())
    rows = theirs(torch.arange(ROWS))
    torch.testing.assert_close(encoder.prefix(), rows)
    theirs.load_state_dict(ours(projection).state_dict())


@pytest.mark.parametrize("projection", [False, True])
def test_model_equals_pefts(projection):
    model = get_peft_model(tiny_llama(), config(projection))
    theirs, encoder = model.prompt_encoder["default"], ours(projection)
    encoder.load_state_dict(theirs.state_dict())
    ids, mask, longer = batch()
    labels = ids.masked_fill(mask == 0, -100)
    expected = model(input_ids=ids, attention_mask=mask, labels=labels)
    expected.loss.backward()
    actual = model.get_base_model()(
        input_ids=ids, attention_mask=longer, labels=labels, past_key_values=encoder.cache(BATCH)
    )
    actual.loss.backward()
    torch.testing.assert_close(actual.logits, expected.logits)
    for (name, a), b in zip(theirs.named_parameters(), encoder.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, msg=name)


def test_encoder_decoder_cache():
    encoder = lk.PrefixEncoder(ROWS, 3, 2, HEAD_DIM)
    ids, mask, longer = batch()
    output = tiny_t5()(
        input_ids=ids, attention_mask=mask, decoder_input_ids=ids, decoder_attention_mask=longer,
        past_key_values=encoder.cache(BATCH, encoder_decoder=True),
    )  # fmt: skip
    output.logits.square().sum().backward()
    assert encoder.embedding.weight.grad.abs().sum(1).min() > 0
    assert output.past_key_values.self_attention_cache.get_seq_length() == ROWS + 6
    assert output.past_key_values.cross_attention_cache.get_seq_length() == 6


def test_the_network_runs_on_its_tokens_once_whatever_the_batch():
    encoder, shapes = ours(True), []
    encoder.transform.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    encoder(5, dtype=torch.bfloat16)
    assert shapes == [(ROWS, LAYERS * 2 * HEADS * HEAD_DIM)]


def test_keys_and_values():
    pairs = ours(False)(2, dtype=torch.bfloat16, copies=True)
    assert len(pairs) == LAYERS
    assert all(t.shape == (2, HEADS, ROWS, HEAD_DIM) and t.dtype == torch.bfloat16 for pair in pairs for t in pair)


@pytest.mark.parametrize("projection", [False, True])
def test_compiled_equals_eager(projection):
    torch.compiler.reset()
    encoder = ours(projection)
    results = []
    for function in (encoder, torch.compile(encoder, fullgraph=True, backend="aot_eager")):
        outputs = [t for pair in function(BATCH) for t in pair]
        gradients = torch.autograd.grad([t.square().sum() for t in outputs], list(encoder.parameters()))
        results.append([*outputs, *gradients])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------- PEFT's checkpoints

OTHERS = {
    "prefix": (config(False), lambda: ours(False)),
    "projected prefix": (config(True), lambda: ours(True)),
    "prompt": (
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=ROWS), lambda: lk.PromptEmbedding(ROWS, 24),
    ),
    "encoder": (
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=ROWS, encoder_hidden_size=WIDTH),
        lambda: lk.PromptEncoder(ROWS, 24, WIDTH),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_checkpoints_go_both_ways(kind):
    stock_config, make = OTHERS[kind]
    model, module = get_peft_model(tiny_llama(), stock_config), make()
    checkpoint = get_peft_model_state_dict(model)
    plain = ours(False) if "prefix" in kind else lk.PromptEmbedding(ROWS, 24)
    plain.load_peft_state_dict(checkpoint)
    assert torch.equal(plain.embedding.weight, checkpoint["prompt_embeddings"])
    assert list(module.peft_state_dict()) == list(checkpoint)
    assert not module.peft_state_dict()["prompt_embeddings"].requires_grad
    if kind in ("projected prefix", "encoder"):
        with pytest.raises(ValueError, match="not the network that made"):
            module.load_peft_state_dict(checkpoint)
        module.load_state_dict(model.prompt_encoder["default"].state_dict())
        torch.testing.assert_close(module.peft_state_dict()["prompt_embeddings"], checkpoint["prompt_embeddings"])
    else:
        set_peft_model_state_dict(model, module.peft_state_dict())
        assert torch.equal(model.prompt_encoder["default"].embedding.weight, module.embedding.weight)


def test_a_prompt_of_tasks_is_saved_one_behind_the_other():
    assert lk.PromptEmbedding(2, 5, tasks=3).peft_state_dict()["prompt_embeddings"].shape == (6, 5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lk.PrefixEncoder(0, 1, 1, 1), ValueError, "num_virtual_tokens must be at least 1, got 0"),
        (lambda: lk.PrefixEncoder(1, 1, 1.0, 1), TypeError, r"heads must be an integer, got 1\.0"),
        (lambda: lk.PrefixEncoder(1, 1, 1, 1, 0), ValueError, "encoder_hidden_size must be at least 1"),
        (lambda: ours(False).load_peft_state_dict({}), ValueError, r"prompt_embeddings \(4, 72\), got nothing"),
        (
            lambda: lk.PromptEmbedding(2, 3).load_peft_state_dict({"prompt_embeddings": torch.zeros(2, 4)}),
            ValueError,
            r"must hold prompt_embeddings \(2, 3\), got \(2, 4\)",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
