"""PromptEmbedding and PromptEncoder: against PEFT's modules and models, and how they start and find the embeddings."""

import pytest
import torch
from peft import PromptEmbedding as PeftPromptEmbedding
from peft import PromptEncoder as PeftPromptEncoder
from peft import PromptEncoderConfig, PromptTuningConfig, get_peft_model
from tiny_models import tiny_llama
from torch import nn

import lora_kernels as lk

ROWS, HIDDEN, BATCH, TOKENS, VOCABULARY = 4, 24, 3, 6, 61
LENGTHS = (6, 3, 5)


def batch():
    ids = torch.randint(VOCABULARY, (BATCH, TOKENS))
    mask = (torch.arange(TOKENS) < torch.tensor(LENGTHS)[:, None]).long()
    return ids, mask, ids.masked_fill(mask == 0, -100)


def encoder_config(kind, layers=2, **options):
    return PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=ROWS, encoder_reparameterization_type=kind,
        encoder_hidden_size=10, encoder_num_layers=layers, **options,
    )  # fmt: skip


def encoder_pair(kind, layers=2):
    """PEFT's encoder and ours with the same parameters."""
    config = encoder_config(kind, layers, token_dim=HIDDEN, num_transformer_submodules=1)
    theirs = PeftPromptEncoder(config)
    ours = lk.PromptEncoder(ROWS, HIDDEN, 10, kind=kind, num_layers=layers)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize(("kind", "layers"), [("MLP", 2), ("LSTM", 1), ("LSTM", 2)])
def test_encoder_equals_pefts(kind, layers):
    theirs, ours = encoder_pair(kind, layers)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ids, mask, labels = batch()
    table = nn.Embedding(VOCABULARY, HIDDEN).requires_grad_(False)

    prompts = theirs(torch.arange(ROWS).expand(BATCH, -1))
    expected = torch.cat([prompts, table(ids)], dim=1)
    actual = ours(ids, table, attention_mask=mask, labels=labels)
    torch.testing.assert_close(ours.prompt(), prompts[0])
    torch.testing.assert_close(actual.inputs_embeds, expected)

    grad = torch.randn_like(expected)
    expected.backward(grad)
    actual.inputs_embeds.backward(grad)
    for (name, a), b in zip(theirs.named_parameters(), ours.parameters()):
        torch.testing.assert_close(b.grad, a.grad, msg=name)


@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
def test_encoder_runs_on_its_tokens_once_whatever_the_batch(kind):
    _, ours = encoder_pair(kind)
    shapes = []
    ours.mlp_head.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    ours(torch.zeros(5, 2, dtype=torch.int64), torch.randn(VOCABULARY, HIDDEN))
    assert shapes == [(ROWS, HIDDEN)]


def test_prompt_embedding_state_dicts_go_both_ways():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=ROWS)
    config.token_dim, config.num_transformer_submodules = HIDDEN, 1
    theirs, ours = PeftPromptEmbedding(config, None), lk.PromptEmbedding(ROWS, HIDDEN)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.prompt(), theirs(torch.arange(ROWS)))
    theirs.load_state_dict(lk.PromptEmbedding(ROWS, HIDDEN).state_dict())


def our_encoder(config):
    if isinstance(config, PromptTuningConfig):
        return lk.PromptEmbedding(ROWS, HIDDEN)
    return lk.PromptEncoder(ROWS, HIDDEN, 10, kind=config.encoder_reparameterization_type)


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=ROWS),
        encoder_config("MLP"),
        encoder_config("LSTM"),
    ],
    ids=["prompt_tuning", "p_tuning_mlp", "p_tuning_lstm"],
)
def test_model_equals_pefts_under_right_padding(config):
    model = get_peft_model(tiny_llama(), config)
    theirs = model.prompt_encoder["default"]
    ours = our_encoder(config)
    ours.load_state_dict(theirs.state_dict())
    ids, mask, labels = batch()

    expected = model(input_ids=ids, attention_mask=mask, labels=labels)
    expected.loss.backward()
    base = model.get_base_model()
    inputs = ours(ids, base.get_input_embeddings(), attention_mask=mask, labels=labels)
    actual = base(**inputs._asdict())
    actual.loss.backward()

    real = inputs.attention_mask.bool()
    torch.testing.assert_close(actual.loss, expected.loss)
    torch.testing.assert_close(actual.logits[real], expected.logits[real])
    for (name, a), b in zip(theirs.named_parameters(), ours.parameters()):
        torch.testing.assert_close(b.grad, a.grad, msg=name)


def test_left_padding_gives_the_logits_of_the_text_alone():
    base = tiny_llama()
    prompt = lk.PromptEmbedding.from_vocabulary(base.get_input_embeddings(), ROWS)
    text = torch.randint(VOCABULARY, (1, 4))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), text], dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    alone = prompt(text, base.get_input_embeddings())
    inputs = prompt(padded, base.get_input_embeddings(), attention_mask=mask, padding_side="left")
    logits = [base(**{k: v for k, v in x._asdict().items() if v is not None}).logits[:, -4:] for x in (alone, inputs)]
    torch.testing.assert_close(logits[1], logits[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_learns(dtype):
    base = tiny_llama().to(dtype).requires_grad_(False)
    ids, mask, labels = batch()
    module = lk.PromptEmbedding.from_token_ids(ids[0], base.get_input_embeddings(), ROWS)
    assert module.embedding.weight.dtype == torch.float32
    optimizer = torch.optim.Adam(module.parameters(), lr=0.03)
    losses = []
    for _ in range(30):
        inputs = module(ids, base.get_input_embeddings(), attention_mask=mask, labels=labels)
        assert inputs.inputs_embeds.dtype == dtype
        loss = base(**inputs._asdict()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


# ------------------------------------------------------------------------------------------------------ start


def test_starts_at_the_vocabulary():
    table = nn.Embedding(VOCABULARY, HIDDEN, dtype=torch.bfloat16)
    for embedding in (table, table.weight):
        made = [
            lk.PromptEmbedding.from_vocabulary(embedding, ROWS, generator=torch.Generator().manual_seed(seed)).prompt()
            for seed in (3, 3, 4)
        ]
        rows = table.weight.float()
        assert all((rows == row).all(1).any() for row in made[0])
        assert torch.equal(made[0], made[1])
        assert not torch.equal(made[0], made[2])
        assert made[0].requires_grad
        assert made[0].dtype == torch.float32


def test_starts_at_a_text():
    table = torch.randn(VOCABULARY, HIDDEN)
    assert torch.equal(lk.PromptEmbedding.from_token_ids([5, 9, 2], table).prompt(), table[[5, 9, 2]])
    assert torch.equal(lk.PromptEmbedding.from_token_ids([5, 9, 2], table, 2).prompt(), table[[5, 9]])
    repeated = lk.PromptEmbedding.from_token_ids(torch.tensor([5, 9, 2]), table, 7, tasks=2).prompt()
    assert torch.equal(repeated, table[[5, 9, 2, 5, 9, 2, 5]].expand(2, -1, -1))


def test_tasks():
    module = lk.PromptEmbedding(ROWS, HIDDEN, tasks=2)
    assert module.prompt().shape == (2, ROWS, HIDDEN)
    ids, table, tasks = torch.zeros(3, 2, dtype=torch.int64), torch.randn(VOCABULARY, HIDDEN), torch.tensor([1, 0, 1])
    output = module(ids, table, task_ids=tasks, prompt_lengths=torch.tensor([4, 2, 0])).inputs_embeds
    assert torch.equal(output[0, :ROWS], module.prompt()[1])
    assert torch.equal(output[1, :2], module.prompt()[0, :2])
    output.sum().backward()
    assert module.embedding.weight.grad.view(2, ROWS, HIDDEN)[:, :, 0].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


# ------------------------------------------------------------------------------------------------- embeddings


class Scaled(nn.Embedding):
    def forward(self, input):
        return super().forward(input) * 3.0


def test_a_plain_embedding_is_not_called():
    table, module = nn.Embedding(VOCABULARY, HIDDEN), lk.PromptEmbedding(ROWS, HIDDEN)
    ids = batch()[0]
    with torch.profiler.profile() as profile:
        output = module(ids, table)
    assert "aten::embedding" not in {event.name for event in profile.events()}
    output.inputs_embeds.sum().backward()
    assert table.weight.grad.sum(1).sum() == BATCH * TOKENS * HIDDEN


@pytest.mark.parametrize("kind", ["subclass", "hook", "max_norm", "instance forward", "padding_idx"])
def test_any_other_embedding_keeps_its_meaning(kind):
    cls, options = nn.Embedding, {}
    if kind == "subclass":
        cls = Scaled
    elif kind in ("max_norm", "padding_idx"):
        options = {"max_norm": 0.5} if kind == "max_norm" else {"padding_idx": 0}
    table = cls(VOCABULARY, HIDDEN, **options)
    if kind == "hook":
        table.register_forward_hook(lambda module, inputs, output: output + 1)
    elif kind == "instance forward":
        table.forward = lambda ids: nn.functional.embedding(ids, table.weight) - 2
    ids = torch.zeros(2, 3, dtype=torch.int64)
    output = lk.PromptEmbedding(ROWS, HIDDEN)(ids, table).inputs_embeds
    assert torch.equal(output[:, ROWS:], table(ids))
    if kind == "padding_idx":
        output.sum().backward()
        assert not table.weight.grad.any(), "the row of padding_idx does not train"


def test_given_embeddings():
    module, embeds = lk.PromptEncoder(ROWS, HIDDEN), torch.randn(2, 3, HIDDEN)
    for table in (None, nn.Embedding(VOCABULARY, HIDDEN)):
        output = module(None, table, inputs_embeds=embeds).inputs_embeds
        assert torch.equal(output[:, ROWS:], embeds)


@pytest.mark.parametrize("kind", ["embedding", "MLP"])
def test_compiled_equals_eager(kind):
    torch.compiler.reset()
    module = lk.PromptEmbedding(ROWS, HIDDEN) if kind == "embedding" else lk.PromptEncoder(ROWS, HIDDEN, 10)
    ids, mask, labels = batch()
    table = nn.Embedding(VOCABULARY, HIDDEN).requires_grad_(False)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    results = []
    for function in (module, compiled):
        output = function(ids, table, attention_mask=mask, labels=labels)
        gradients = torch.autograd.grad(output.inputs_embeds.square().sum(), list(module.parameters()))
        results.append([*output, *gradients])
    for a, b in zip(*results):
        assert torch.equal(a, b)


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: lk.PromptEmbedding(0, 8), ValueError, "num_virtual_tokens must be at least 1, got 0"),
        (lambda: lk.PromptEmbedding(2.0, 8), TypeError, r"num_virtual_tokens must be an integer, got 2\.0"),
        (lambda: lk.PromptEmbedding(2, 8, tasks=0), ValueError, "tasks must be at least 1"),
        (lambda: lk.PromptEncoder(2, True), TypeError, "hidden_size must be an integer, got True"),
        (lambda: lk.PromptEncoder(2, 8, kind="CNN"), ValueError, 'kind must be "MLP" or "LSTM", got \'CNN\''),
        (lambda: lk.PromptEncoder(2, 8, dropout=1), ValueError, r"dropout must be a number in \[0, 1\), got 1"),
        (lambda: lk.PromptEncoder(2, 8, num_layers=0), ValueError, "num_layers must be at least 1"),
        (lambda: lk.PromptEmbedding.from_vocabulary(nn.ReLU(), 2), TypeError, "a module with a weight, got ReLU"),
        (
            lambda: lk.PromptEmbedding.from_vocabulary(torch.ones(3), 2),
            ValueError,
            "embedding must be a floating-point",
        ),
        (lambda: lk.PromptEmbedding.from_token_ids([], torch.ones(3, 2)), ValueError, "at least one"),
        (
            lambda: lk.PromptEmbedding.from_token_ids([3], torch.ones(3, 2)),
            ValueError,
            r"must be in \[0, 3\), got \[3\]",
        ),
        (lambda: lk.PromptEmbedding(2, 8)(torch.zeros(1, 1).long()), TypeError, "weight must be a tensor"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()
