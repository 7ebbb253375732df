"""PEFT models of prompt learning, patched: the same as stock PEFT in every model, in generation and on disk."""

import copy
import inspect
import pickle
import warnings

import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from numerics import assert_as_accurate
from peft import (
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from tiny_models import tiny_bert, tiny_llama, tiny_t5
from transformers import (
    BertForSequenceClassification,
    BertForTokenClassification,
    GenerationMixin,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)

import lora_kernels as lk
from lora_kernels.integrations.peft import prompt_models as _peft_prompt
from lora_kernels.reasons import Reason

ROWS, BATCH, TOKENS, VOCABULARY = 4, 3, 6, 61
LENGTHS = (6, 3, 5)
TASKS = torch.tensor([1, 0, 1])

CONFIGS = {
    "prompt": lambda task: PromptTuningConfig(task_type=task, num_virtual_tokens=ROWS),
    "mlp": lambda task: PromptEncoderConfig(task_type=task, num_virtual_tokens=ROWS, encoder_hidden_size=10),
    "lstm": lambda task: PromptEncoderConfig(
        task_type=task, num_virtual_tokens=ROWS, encoder_hidden_size=10, encoder_reparameterization_type="LSTM"
    ),
    "multitask": lambda task: MultitaskPromptTuningConfig(task_type=task, num_virtual_tokens=ROWS, num_tasks=2),
    "many tasks": lambda task: MultitaskPromptTuningConfig(task_type=task, num_virtual_tokens=ROWS, num_tasks=7),
    "prefix": lambda task: PrefixTuningConfig(task_type=task, num_virtual_tokens=ROWS),
    "projected prefix": lambda task: PrefixTuningConfig(
        task_type=task, num_virtual_tokens=ROWS, prefix_projection=True, encoder_hidden_size=10
    ),
}
BASES = {
    "causal": ("CAUSAL_LM", lambda: tiny_llama()),
    "seq2seq": ("SEQ_2_SEQ_LM", tiny_t5),
    "sequence": ("SEQ_CLS", lambda: tiny_llama(LlamaForSequenceClassification, pad_token_id=0, num_labels=3)),
    "token": ("TOKEN_CLS", lambda: tiny_llama(LlamaForTokenClassification, num_labels=3)),
    "features": ("FEATURE_EXTRACTION", lambda: tiny_llama(LlamaModel)),
    "bert sequence": ("SEQ_CLS", lambda: tiny_bert(BertForSequenceClassification)),
    "bert token": ("TOKEN_CLS", lambda: tiny_bert(BertForTokenClassification)),
}
OF_ENCODERS = ("bert sequence", "bert token")


def make(base, kind):
    """A stock model whose prompt is not as it was drawn: multitask factors are of the order of one."""
    task, model = BASES[base]
    model = get_peft_model(model().eval(), CONFIGS[kind](task))
    for name, parameter in model.named_parameters():
        if "prefix_task" in name:
            torch.nn.init.normal_(parameter)
    return model


def patched_twin(stock, **options):
    twin = copy.deepcopy(stock)
    lk.patch(twin, **options)
    return twin


def batch(side="right", base="causal", kind="prompt"):
    lengths = torch.tensor(LENGTHS)[:, None]
    column = torch.arange(TOKENS)
    mask = (column < lengths if side == "right" else column >= TOKENS - lengths).long()
    ids = torch.randint(2, VOCABULARY, (BATCH, TOKENS)).masked_fill(mask == 0, 0)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if base in ("causal", "seq2seq"):
        inputs["labels"] = ids.masked_fill(mask == 0, -100)
    elif "sequence" in base:
        inputs["labels"] = torch.tensor([0, 1, 1])
    elif base == "bert token":
        inputs["labels"] = torch.randint(2, (BATCH, TOKENS + ROWS))
    if kind in ("multitask", "many tasks"):
        inputs["task_ids"] = TASKS
    return inputs


def results(model, inputs):
    """Loss, logits or features, and gradients."""
    model.zero_grad()
    output = model(**inputs)
    main = output.logits if "logits" in output else output.last_hidden_state
    loss = output.loss if output.get("loss") is not None else main.square().sum()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "output": main.detach(), **gradients}


def assert_close(ours, expected):
    """Relative to each tensor's own maximum: some whole gradients are of the order of 1e-7.

    The gradient of a multitask prompt's columns is a sum whose terms cancel to a small part of their size, so that the
    order of adding shows: up to 1e-5 of it in float32 (5e-14 in float64), where no other tensor is off by 1e-6.
    """
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        bound = (1e-4 if "prefix_task_cols" in name else 2e-5) * expected[name].abs().max().item()
        torch.testing.assert_close(
            value, expected[name], rtol=0, atol=bound, msg=lambda text, name=name: f"{name}: {text}"
        )


def served():
    return {op for op, _ in lk.stats()["served"]}


def is_prefix(kind):
    return "prefix" in kind


# ------------------------------------------------------------------------------------------------ forward, gradients

COMBINATIONS = [
    (base, kind)
    for base in BASES
    for kind in CONFIGS
    # PEFT itself does not pass tasks to this model, and these encoders take no keys and values.
    if not (base == "features" and "task" in kind) and not (base in OF_ENCODERS and is_prefix(kind))
]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("base", "kind"), COMBINATIONS)
def test_equals_stock_peft(base, kind, side):
    stock = make(base, kind)
    patched = patched_twin(stock)
    inputs = batch(side, base, kind)
    try:
        expected = results(stock, inputs)
    except ValueError as problem:  # transformers that calls the cache `cache` has no place for it in PEFT's eyes
        assert base in ("sequence", "token")
        assert is_prefix(kind)
        with pytest.raises(ValueError, match=str(problem)):
            patched(**inputs)
        return
    ours = results(patched, inputs)
    if kind == "lstm":  # whose gradients are summed in another order
        exact = results(copy.deepcopy(stock).double(), inputs)
        for name, value in ours.items():
            assert_as_accurate(value, expected[name], exact[name], name)
    else:
        assert_close(ours, expected)
    assert any("prompt_encoder" in name for name in ours)
    op = "prefix_kv" if is_prefix(kind) else "prompt_embedding"
    steps = {"frozen_linear"} if kind == "lstm" else set()
    assert served() == {op, f"{op}_backward"} | steps
    assert lk.stats()["fallback"] == {}


@pytest.mark.parametrize("base", ["causal", "seq2seq", "sequence", "features"])
def test_no_mask_and_given_embeddings(base):
    stock = make(base, "prompt")
    patched = patched_twin(stock)
    inputs = batch(base=base)
    del inputs["attention_mask"]
    if base == "sequence":
        inputs["input_ids"] = inputs["input_ids"].clamp(min=2)
    assert_close(results(patched, inputs), results(stock, inputs))
    if base != "sequence":  # it looks for the last token by its id
        inputs["inputs_embeds"] = stock.word_embeddings(inputs.pop("input_ids")).detach()
        assert_close(results(patched, inputs), results(stock, inputs))
    assert lk.stats()["fallback"] == {}


def test_multitask_seq2seq_with_one_prompt():
    config = CONFIGS["multitask"]("SEQ_2_SEQ_LM")
    config.num_transformer_submodules = 1
    stock = get_peft_model(tiny_t5(), config)
    patched = patched_twin(stock)
    inputs = batch(base="seq2seq", kind="multitask")
    assert_close(results(patched, inputs), results(stock, inputs))
    assert lk.stats()["fallback"] == {}
    inputs["decoder_attention_mask"] = torch.ones(BATCH, TOKENS)  # PEFT makes it longer than the labels
    assert_close(results(patched, inputs), results(stock, inputs))
    assert lk.stats()["fallback"] == {("prompt_embedding", str(Reason.EXTRA_ARGUMENTS)): 1}


@pytest.mark.parametrize("kind", ["prompt", "mlp", "prefix"])
def test_token_types_and_positions(kind):
    for base in ("causal", "bert sequence"):
        if base in OF_ENCODERS and is_prefix(kind):
            continue
        stock = make(base, kind)
        patched = patched_twin(stock)
        inputs = batch(base=base) | {"position_ids": torch.arange(TOKENS).expand(BATCH, -1) + 1}
        if base == "bert sequence":
            inputs["token_type_ids"] = torch.randint(2, (BATCH, TOKENS))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = results(stock, inputs)
        if is_prefix(kind):
            ours = results(patched, inputs)
        else:
            with pytest.warns(UserWarning, match="position_ids does not count the prompt"):
                ours = results(patched, inputs)
        assert_close(ours, expected)


@pytest.mark.parametrize("kind", ["prompt", "mlp", "prefix"])
def test_bfloat16_base_under_float32_prompt(kind):
    task, model = BASES["causal"]
    stock = get_peft_model(model().bfloat16(), CONFIGS[kind](task))
    patched = patched_twin(stock)
    assert patched.prompt_encoder["default"].embedding.weight.dtype == torch.float32
    inputs = batch()
    ours, expected = results(patched, inputs), results(stock, inputs)
    assert ours["output"].dtype == torch.bfloat16
    assert torch.equal(ours["output"], expected["output"])
    for name, value in ours.items():  # PEFT sums the batch in bfloat16
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0.03 * expected[name].abs().max().item())


def test_the_encoder_runs_on_its_tokens_once_whatever_the_batch():
    for kind in ("mlp", "projected prefix"):
        patched = patched_twin(make("causal", kind))
        encoder = patched.prompt_encoder["default"]
        shapes = []
        (encoder.mlp_head if kind == "mlp" else encoder.transform).register_forward_hook(
            lambda module, inputs, output, shapes=shapes: shapes.append(tuple(inputs[0].shape[:-1]))
        )
        patched(**batch())
        assert shapes == [(ROWS,)]
        assert lk.stats()["fallback"] == {}


def test_a_prefix_is_not_copied_into_its_cache():
    patched = patched_twin(make("causal", "prefix"))
    cache = patched.get_prompt(5)
    assert cache.get_seq_length() == ROWS
    assert all(layer.keys.shape[0] == 5 and layer.keys.stride(0) == 0 for layer in cache.layers)
    other = patched_twin(make("seq2seq", "prefix")).get_prompt(2)
    assert type(other).__name__ == "EncoderDecoderCache"
    assert other.cross_attention_cache.get_seq_length() == 0


def test_gradient_checkpointing_and_training_base_embeddings():
    """A hook on the embeddings, and an embedding table that trains: both are called, not read."""
    stock = make("causal", "prompt")
    stock.word_embeddings.weight.requires_grad_()
    stock.enable_input_require_grads()
    patched = patched_twin(stock)
    inputs = batch()
    ours, expected = results(patched, inputs), results(stock, inputs)
    assert any("embed_tokens" in name for name in ours)
    assert_close(ours, expected)
    assert lk.stats()["fallback"] == {}


@pytest.mark.parametrize("kind", ["prompt", "mlp", "multitask", "prefix"])
def test_compiled_equals_eager(kind):
    torch.compiler.reset()
    patched = patched_twin(make("causal", kind))
    inputs = batch(kind=kind)
    expected = results(patched, inputs)
    assert_close(results(torch.compile(patched, backend="aot_eager", fullgraph=True), inputs), {
        f"_orig_mod.{name}" if "." in name else name: value for name, value in expected.items()
    })  # fmt: skip


# --------------------------------------------------------------------------------------------------- generation


PEFT_FINDS_THE_CACHE = "past_key_values" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
"""If not, PEFT puts the prompt in at every step, and so does a patched model: in steps that are not fused."""


def generate(model, side, **options):
    inputs = batch(side, "features")
    return model.generate(**inputs, **options, max_new_tokens=5, do_sample=False, pad_token_id=0)


GENERATIONS = [
    (kind, options)
    for kind in CONFIGS
    for options in ({}, {"num_beams": 2}, {"use_cache": False})
    # PEFT does not repeat task_ids for beams, and its prefixes are a cache.
    if not ("task" in kind and "num_beams" in options) and not ("prefix" in kind and "use_cache" in options)
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("kind", "options"), GENERATIONS, ids=str)
def test_generates_what_stock_peft_does(kind, options, side):
    stock = make("causal", kind)
    patched = patched_twin(stock)
    tasks = {"task_ids": TASKS} if "task" in kind else {}
    torch.manual_seed(1)
    expected = generate(stock, side, **tasks, **options)
    torch.manual_seed(1)
    ours = generate(patched, side, **tasks, **options)
    assert torch.equal(ours, expected)
    assert served() == {"prefix_kv" if is_prefix(kind) else "prompt_embedding"}
    if PEFT_FINDS_THE_CACHE:
        assert lk.stats()["fallback"] == {}


@pytest.mark.parametrize("kind", CONFIGS)
def test_seq2seq_generates_what_stock_peft_does(kind):
    stock = make("seq2seq", kind)
    patched = patched_twin(stock)
    tasks = {"task_ids": TASKS} if "task" in kind else {}
    torch.manual_seed(1)
    expected = generate(stock, "right", **tasks)
    torch.manual_seed(1)
    assert torch.equal(generate(patched, "right", **tasks), expected)
    assert lk.stats()["fallback"] == {}


# ------------------------------------------------------------------------------------------------------- on disk


@pytest.fixture
def clean_peft():
    yield
    lk.unpatch_peft()


@pytest.mark.parametrize("base", ["causal", "seq2seq"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_checkpoints_go_both_ways(kind, base, tmp_path, clean_peft):
    stock = make(base, kind)
    pristine = copy.deepcopy(stock.get_base_model())
    inputs = batch("left", base, kind)

    def train(model):
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            optimizer.step()

    def load(folder):
        return PeftModel.from_pretrained(copy.deepcopy(pristine), folder)

    train(stock)
    stock.save_pretrained(tmp_path / "stock")
    expected = stock(**inputs).logits.detach()
    lk.patch_peft()
    loaded = load(tmp_path / "stock")
    assert type(loaded) in _peft_prompt.PLAIN
    torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    lk.unpatch_peft()

    ours = make(base, kind)
    ours.base_model.load_state_dict(pristine.state_dict())
    lk.patch(ours)
    train(ours)
    ours.save_pretrained(tmp_path / "ours")
    plain = load(tmp_path / "ours")
    assert type(plain) in _peft_prompt.FUSED
    torch.testing.assert_close(plain(**inputs).logits, ours(**inputs).logits, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------- left_padding="fixed"


@pytest.mark.parametrize("kind", ["prompt", "mlp", "multitask"])
def test_fixed_left_padding_gives_the_logits_of_the_text_alone(kind):
    model = patched_twin(make("causal", kind), left_padding="fixed")
    inputs = batch("left", kind=kind)
    outputs = model(**inputs)
    for b, length in enumerate(LENGTHS):
        alone = {name: value[b : b + 1] for name, value in inputs.items()}
        alone |= {name: alone[name][:, -length:] for name in ("input_ids", "attention_mask", "labels")}
        logits = model(**alone).logits
        torch.testing.assert_close(outputs.logits[b, -length:], logits[0, -length:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_fixed_left_padding_generates_as_the_text_alone(options):
    model = patched_twin(make("causal", "prompt"), left_padding="fixed")
    inputs = batch("left", "features")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    together = model.generate(**inputs, **options)[:, TOKENS:]
    for b, length in enumerate(LENGTHS):
        alone = model.generate(
            input_ids=inputs["input_ids"][b : b + 1, -length:], attention_mask=torch.ones(1, length).long(), **options
        )
        assert torch.equal(alone[0, length:], together[b])


def test_fixed_left_padding_of_a_classifier_and_of_right_pads():
    stock = make("bert sequence", "prompt")
    inputs = batch("right", "bert sequence")
    assert_close(results(patched_twin(stock, left_padding="fixed"), inputs), results(stock, inputs))
    fixed = patched_twin(make("bert token", "prompt"), left_padding="fixed")
    inputs = batch("left", "features") | {"token_type_ids": torch.ones(BATCH, TOKENS, dtype=torch.int64)}
    together = fixed(**inputs).logits
    for b, length in enumerate(LENGTHS):
        alone = fixed(**{name: value[b : b + 1, -length:] for name, value in inputs.items()}).logits
        torch.testing.assert_close(alone[0, -length:], together[b, -length:], rtol=1e-4, atol=1e-5)


def test_fixed_left_padding_never_uses_another_layout():
    model = patched_twin(make("causal", "prompt"), left_padding="fixed")
    inputs = batch("left")
    inputs["attention_mask"] = inputs["attention_mask"][:, None, None, :]
    with pytest.raises(RuntimeError, match="PEFT would use its own layout for this call: tensor layout not served"):
        model(**inputs)


def test_fixed_left_padding_needs_every_prompt_fused():
    def forward_replaced(kind):
        model = make("causal", kind)
        model.forward = lambda **inputs: None
        return model

    cpt = peft.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2], num_virtual_tokens=2
    )
    refused = {
        forward_replaced("prompt"): Reason.INSTANCE_FORWARD,
        get_peft_model(tiny_llama(), cpt): Reason.LAYER_TYPE,
    }
    for model, reason in refused.items():
        both = torch.nn.ModuleList([make("causal", "prompt"), model])
        with pytest.raises(ValueError, match=f'"fixed" needs .* 1.prompt_encoder.default cannot be: {reason}'):
            lk.patch(both, left_padding="fixed")
        assert not any(type(module) in _peft_prompt.PLAIN for module in both)
    prefix = forward_replaced("prefix")
    assert lk.patch(prefix, left_padding="fixed").kept == [("prompt_encoder.default", Reason.INSTANCE_FORWARD)]


# ------------------------------------------------------------------------------------------------------ fallback


def hook_encoder(model):
    model.prompt_encoder["default"].register_forward_hook(lambda module, inputs, output: output * 2)


FALLBACKS = {
    "int16 labels": ("prompt", lambda m, i: i.update(labels=i["labels"].to(torch.int16)), Reason.DTYPE),
    "hooked multitask encoder": ("multitask", lambda m, i: hook_encoder(m), Reason.ADAPTER_HOOKS),
    "hooked encoder": ("mlp", lambda m, i: hook_encoder(m), None),
    "hooked prompt": ("prompt", lambda m, i: hook_encoder(m), None),
    "hooked prefix": ("prefix", lambda m, i: hook_encoder(m), None),
}  # fmt: skip


@pytest.mark.parametrize("case", FALLBACKS)
def test_what_is_not_plain_keeps_its_meaning(case):
    kind, change, reason = FALLBACKS[case]
    stock = make("causal", kind)
    inputs = batch(kind=kind)
    patched = patched_twin(stock)
    for model in (stock, patched):
        change(model, inputs)
    expected, ours = results(stock, inputs), results(patched, inputs)
    assert_close(ours, expected)
    op = "prefix_kv" if is_prefix(kind) else "prompt_embedding"
    assert lk.stats()["fallback"] == ({} if reason is None else {(op, str(reason)): 1})


def test_a_subclass_of_an_encoder_is_left_alone():
    class Doubled(peft.PromptEmbedding):
        def forward(self, indices):
            return 2 * super().forward(indices)

    stock = make("causal", "prompt")
    stock.prompt_encoder["default"].__class__ = Doubled
    patched = patched_twin(stock)
    report = lk.patch(patched)
    assert report.kept == [("prompt_encoder.default", Reason.LAYER_TYPE)]
    inputs = batch()
    assert torch.equal(patched(**inputs).logits, stock(**inputs).logits)
    assert lk.stats()["fallback"] == {("prompt_embedding", str(Reason.LAYER_TYPE)): 1}


def test_missing_task_ids_raise_as_in_peft():
    patched = patched_twin(make("causal", "multitask"))
    inputs = batch(kind="prompt")
    with pytest.raises(ValueError, match="task_ids cannot be None"):
        patched(**inputs)
    assert lk.stats()["fallback"] == {("prompt_embedding", str(Reason.TASK_IDS)): 1}


def test_transforms_fall_back():
    stock = make("causal", "prompt")
    patched = patched_twin(stock)
    ids = batch()["input_ids"]
    prompt = {"prompt_encoder.default.embedding.weight": stock.prompt_encoder["default"].embedding.weight.detach()}

    def loss(model):
        return lambda p: torch.func.functional_call(model, p, kwargs={"input_ids": ids, "labels": ids}).loss

    ours, expected = torch.func.grad(loss(patched))(prompt), torch.func.grad(loss(stock))(prompt)
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name])
    assert lk.stats()["fallback"] == {("prompt_embedding", str(Reason.TRANSFORM)): 1}


# ------------------------------------------------------------------------------------------- patch, unpatch, report


def test_report():
    assert str(lk.patch(make("causal", "prompt"))).splitlines() == [
        "1 of 1 prompt fused",
        "  fused  1  prompt_embedding  prompt_encoder.default",
    ]
    assert "prompt_embedding, left padding fixed" in str(lk.patch(make("causal", "mlp"), left_padding="fixed"))
    wrapped = torch.nn.ModuleDict({"inner": make("seq2seq", "prefix")})
    assert lk.patch(wrapped).fused == [("inner.prompt_encoder.default", "prefix_kv")]
    cpt = peft.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2], num_virtual_tokens=2
    )
    report = lk.patch(get_peft_model(tiny_llama(), cpt))
    assert report.kept == [("prompt_encoder.default", Reason.LAYER_TYPE)]
    assert str(report).splitlines()[0] == "0 of 1 prompt fused"
    with pytest.raises(ValueError, match='left_padding must be "peft" or "fixed", got True'):
        lk.patch(make("causal", "prompt"), left_padding=True)


@pytest.mark.parametrize("base", BASES)
def test_unpatch_restores(base):
    stock = make(base, "prompt")
    before = type(stock), dict(stock.__dict__)
    lk.patch(stock, left_padding="fixed")
    assert isinstance(stock, before[0])
    assert type(stock) is not before[0]
    lk.unpatch(stock)
    assert type(stock) is before[0]
    assert stock.__dict__.keys() == before[1].keys()
    lk.unpatch(stock)


def test_patched_models_are_copied_pickled_and_switched():
    model = make("causal", "prompt")
    model.add_adapter("second", CONFIGS["prompt"]("CAUSAL_LM"))
    stock = copy.deepcopy(model)
    assert lk.patch(model).fused == [
        ("prompt_encoder.default", "prompt_embedding"), ("prompt_encoder.second", "prompt_embedding"),
    ]  # fmt: skip
    inputs = batch()
    for name in ("second", "default"):
        stock.set_adapter(name)
        model.set_adapter(name)
        for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(twin(**inputs).logits, stock(**inputs).logits)
    with model.disable_adapter(), stock.disable_adapter():
        assert torch.equal(model(**inputs).logits, stock(**inputs).logits)
        assert model(**inputs).logits.shape[1] == TOKENS
    assert lk.stats()["fallback"] == {}


def test_disabled_adapters_do_not_keep_patch_off():
    model = make("causal", "prompt")
    inputs = batch()
    before = results(model, inputs)
    with model.disable_adapter():
        assert lk.patch(model).kept == [("prompt_encoder.default", Reason.INSTANCE_FORWARD)]
    assert "forward" in model.__dict__  # PEFT leaves it there
    assert lk.patch(model, left_padding="fixed").kept == []
    assert lk.patch(model).fused == [("prompt_encoder.default", "prompt_embedding")]
    assert_close(results(model, inputs), before)
    assert served() == {"prompt_embedding", "prompt_embedding_backward"}
    lk.unpatch(model)
    assert torch.equal(results(model, inputs)["output"], before["output"])


@pytest.mark.parametrize("inside", [False, True])
def test_unpatch_after_and_while_adapters_are_disabled(inside):
    model = make("causal", "prompt")
    inputs = batch()
    before = results(model, inputs)
    torch.manual_seed(1)
    text = generate(model, "left")
    lk.patch(model)
    with model.disable_adapter():
        alone = model(**inputs).logits
        if inside:
            lk.unpatch(model)
            assert torch.equal(model(**inputs).logits, alone)
    lk.unpatch(model)
    assert "forward" not in model.__dict__
    assert torch.equal(results(model, inputs)["output"], before["output"])
    torch.manual_seed(1)
    assert torch.equal(generate(model, "left"), text)
    assert lk.patch(model).kept == []


def test_unpatch_rebinds_what_an_accelerate_hook_wraps():
    model = make("causal", "prompt")
    inputs = batch()
    expected = model(**inputs).logits
    lk.patch(model)
    add_hook_to_module(model, ModelHook())
    lk.unpatch(model)
    assert torch.equal(model(**inputs).logits, expected)
    remove_hook_from_module(model)  # leaves the method that it wrapped on the instance
    assert torch.equal(model(**inputs).logits, expected)
    assert lk.patch(model).kept == []


@pytest.mark.parametrize("base", ["causal", "seq2seq", "sequence", "token", "features"])
def test_the_class_has_the_name_that_pipelines_look_for(base):
    stock = make(base, "prompt")
    patched = patched_twin(stock)
    assert type(patched) is not type(stock)
    assert patched.__class__.__name__ == stock.__class__.__name__
    assert type(pickle.loads(pickle.dumps(patched))) is type(patched)


def test_patch_peft(clean_peft):
    lk.patch_peft()
    lk.patch_peft()
    for base, (task, model) in BASES.items():
        made = get_peft_model(model(), CONFIGS["prompt"](task))
        assert type(made) in _peft_prompt.PLAIN, base
    lk.unpatch_peft()
    assert (
        type(get_peft_model(tiny_llama(LlamaForCausalLM), CONFIGS["prompt"]("CAUSAL_LM"))) is peft.PeftModelForCausalLM
    )
    assert PeftModel._setup_prompt_encoder.__module__.startswith("peft")
