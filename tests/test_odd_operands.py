"""Operands of no columns, and those that are no dense matrices of floats: torch's result, or a clear error."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft_layers import K, lin, make, run
from torch import nn

import lora_kernels as lk
from lora_kernels.reasons import Reason
from lora_kernels.support import cpu as _cpu
from lora_kernels.support import cpu_product as _cpu_product

FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64
ROWS = [0, 3, 70, 200]  # none, the kernel for a few, and the vendor library's
EMPTY = [(0, 6), (5, 0), (0, 0)]  # K and N


@pytest.fixture(params=["this CPU", "no native 16-bit matmul", "oneDNN", "ATen", "reference"])
def _schedule(request, monkeypatch):
    if request.param == "no native 16-bit matmul":
        monkeypatch.setattr(_cpu, "has_native_matmul", lambda dtype: dtype in (FP32, FP64))
    if request.param in ("ATen", "oneDNN"):
        monkeypatch.setattr(_cpu, "FEW_ROWS", 0)
    if request.param == "oneDNN":
        request.getfixturevalue("onednn")
        monkeypatch.setattr(_cpu_product, "FROM_ROWS", 0)
    if request.param == "ATen":
        monkeypatch.setattr(_cpu_product, "_mode", "mkl")
    with lk.use_backend("reference" if request.param == "reference" else None):
        yield


def poison_freed_memory():
    """What an op takes for its results was somebody's NaN before: an element that nobody writes shows."""
    for size in (2, 6, 10, 12, 15, 18, 30, 42, 140, 420, 700, 1200):
        for _ in range(3):
            torch.full((size,), float("nan"))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("k", "n"), EMPTY)
@pytest.mark.usefixtures("_schedule")
def test_lora_linear_of_no_columns(k, n, rows, dtype, dropout_p, bias):
    x, A, B, b = (
        torch.randn(shape).to(dtype).requires_grad_() for shape in ((rows, k), (2, k), (n, 2), (n,))
    )  # fmt: skip
    weight = torch.randn(n, k).to(dtype)
    poison_freed_memory()
    y = lk.lora_linear(x, weight, A, B, b if bias else None, scaling=2.0, dropout_p=dropout_p, training=True)
    assert torch.equal(y, b.expand(rows, n) if bias else torch.zeros(rows, n, dtype=dtype))
    poison_freed_memory()
    y.backward(torch.ones_like(y))
    for leaf in (x, A, B):
        assert leaf.grad.shape == leaf.shape
        assert not leaf.grad.any()
    if bias:
        assert torch.equal(b.grad, torch.full_like(b, rows))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("k", "n"), EMPTY)
@pytest.mark.usefixtures("_schedule")
def test_frozen_linear_of_no_columns(k, n, rows, dtype):
    x, weight, bias = torch.randn(rows, k).to(dtype).requires_grad_(), torch.randn(n, k).to(dtype), torch.ones(n)
    poison_freed_memory()
    y = lk.frozen_linear(x, weight, bias.to(dtype))
    assert torch.equal(y, torch.ones(rows, n, dtype=dtype))
    poison_freed_memory()
    y.backward(torch.ones_like(y))
    assert x.grad.shape == x.shape
    assert not x.grad.any()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize(("vocabulary", "features"), [(5, 0), (0, 4), (0, 0)])
@pytest.mark.usefixtures("_schedule")
def test_lora_embedding_of_no_columns(vocabulary, features, dtype):
    shapes = (vocabulary, features), (2, vocabulary), (features, 2)
    weight, A, B = (torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)
    ids = torch.arange(vocabulary)
    y = lk.lora_embedding(ids, weight, A, B)
    assert y.shape == (vocabulary, features)
    y.sum().backward()
    assert [t.grad.shape for t in (weight, A, B)] == [t.shape for t in (weight, A, B)]


@pytest.mark.parametrize(("k", "n"), EMPTY)
def test_dora_linear_of_no_columns(k, n):
    x, weight, A, B, m = (torch.randn(shape) for shape in ((3, k), (n, k), (2, k), (n, 2), (n,)))
    m.requires_grad_()
    y = lk.dora_linear(x, weight, A, B, m, torch.ones(n))
    assert y.shape == (3, n)
    y.sum().backward()
    assert m.grad.shape == m.shape


@pytest.mark.parametrize(("op", "left"), [("lora_linear", 3 * 2 * 4), ("frozen_linear", 0), ("lora_embedding", 0)])
def test_costs_of_no_columns(op, left):
    """``left``: the bytes of s, all that has elements."""
    spec = lk.dispatch.specs()[op]
    x, weight, A, B = (torch.randn(shape) for shape in ((3, 0), (0, 0), (2, 0), (0, 2)))
    args = {
        "lora_linear": (x, weight, A, B, None, None, 1.0, 0.0), "frozen_linear": (x, weight),
        "lora_embedding": (torch.zeros(0, dtype=torch.int64), weight, A, B, 1.0, -1),
    }[op]  # fmt: skip
    assert spec.flops(*args) == 0
    assert spec.bytes(*args) == left


@pytest.mark.parametrize(("k", "n"), EMPTY)
def test_a_layer_of_no_columns_in_peft(k, n):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(k, n)

        def forward(self, x):
            return self.lin(x)

    stock = make(net=Net())
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    x = torch.randn(3, k, requires_grad=True)
    expected, ours = run(lin(stock), x), run(lin(patched), x)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name
    for model in (stock, patched):
        model.merge_adapter()
    assert torch.equal(patched(x), stock(x))
    assert lk.stats()["served"].keys() == {("lora_linear", "cpu"), ("lora_linear_backward", "cpu")}


# -------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize(("n", "k"), [(5, 0), (0, 4), (0, 0)])
def test_merging_nothing(n, k):
    weight = torch.randn(n, k)
    assert lk.merge_(weight, torch.randn(2, k), torch.randn(n, 2)) is weight
    layer = lk.LoRALinear(k, n, r=2, alpha=4)
    layer.merge()
    layer.unmerge()


@pytest.mark.parametrize("op", ["merge_", "unmerge_"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_merging_into_other_numbers_is_refused(dtype, op):
    """An integer weight would take the update cut off to whole numbers."""
    weight = torch.ones(3, 4).to(dtype)
    with pytest.raises(TypeError, match=f"^{op}: weight must be float32, bfloat16, float16 or float64, got {dtype}"):
        getattr(lk, op)(weight, torch.ones(2, 4), torch.ones(3, 2), 0.4)
    assert torch.equal(weight.to(torch.complex64), torch.ones(3, 4).to(torch.complex64))


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (3.0, TypeError, "weight must be a tensor, got float"),
        (torch.ones(12), ValueError, r"weight must be \[out_features, in_features\], got shape \(12,\)"),
        (torch.ones(3, 4).to_sparse(), TypeError, "weight must be a dense tensor, got a torch.sparse_coo one"),
    ],
    ids=["number", "vector", "sparse"],
)
@pytest.mark.parametrize("op", ["merge_", "unmerge_"])
def test_merging_into_no_matrix_is_refused(op, weight, error, message):
    with pytest.raises(error, match=f"^{op}: {message}"):
        getattr(lk, op)(weight, torch.ones(2, 4), torch.ones(3, 2))


@pytest.mark.parametrize("op", ["merge_", "unmerge_"])
@pytest.mark.parametrize(
    ("scaling", "error", "message"),
    [
        ("2", TypeError, "scaling must be a number, got str"),
        (float("-inf"), ValueError, "scaling must be finite, got -inf"),
        (3e38, ValueError, "lora_A, lora_B and the .*merged weight must be finite; the weight was left unchanged"),
    ],
)
def test_merging_by_no_factor_is_refused(op, scaling, error, message):
    """Kills: a factor that is negated before it is looked at, as which ``unmerge_`` would show it."""
    weight = torch.ones(3, 4)
    with pytest.raises(error, match=f"^{op}: {message}"):
        getattr(lk, op)(weight, torch.full((2, 4), 10.0), torch.ones(3, 2), scaling)
    assert torch.equal(weight, torch.ones(3, 4))


# -------------------------------------------------------------------------------------------------------- layouts

LAYOUTS = {
    "sparse_coo": lambda t: t.to_sparse(),
    "sparse_csr": lambda t: t.to_sparse_csr(),
    "mkldnn": lambda t: t.to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor(list(t[None])),
    "jagged nested": lambda t: torch.nested.nested_tensor(list(t[None]), layout=torch.jagged),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("trains", [True, False])
def test_operands_that_are_not_dense_are_named(layout, name, trains):
    shapes = {"x": (3, 8), "weight": (6, 8), "lora_A": (2, 8), "lora_B": (6, 2)}
    given = {key: torch.randn(shape) for key, shape in shapes.items()}
    given["lora_A"].requires_grad_(trains)
    given[name] = LAYOUTS[layout](given[name].detach())
    kind = "nested" if "nested" in layout else layout
    with pytest.raises(TypeError, match=f"lora_linear: {name} must be a dense tensor, got a .*{kind} one"):
        lk.lora_linear(**given)
    if name in ("x", "weight"):
        with pytest.raises(TypeError, match=f"frozen_linear: {name} must be a dense tensor, got a .*{kind} one"):
            lk.frozen_linear(given["x"], given["weight"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    ["input_ids", "weight", "prompt", "inputs_embeds", "attention_mask", "labels", "task_ids", "prompt_lengths"],
)
@pytest.mark.parametrize("layout", ["sparse_coo", "nested"])
def test_operands_of_prompts_that_are_not_dense_are_named(layout, name):
    given = {
        "input_ids": torch.zeros(2, 3, dtype=torch.int64), "weight": torch.randn(5, 4), "prompt": torch.randn(2, 2, 4),
        "attention_mask": torch.ones(2, 3), "labels": torch.ones(2, 3, dtype=torch.int64),
        "task_ids": torch.ones(2, dtype=torch.int64), "prompt_lengths": torch.ones(2, dtype=torch.int64),
    }  # fmt: skip
    if name == "inputs_embeds":
        given |= {"inputs_embeds": torch.randn(2, 3, 4), "input_ids": None, "weight": None}
    given[name] = LAYOUTS[layout](given[name])
    with pytest.raises(TypeError, match=f"prompt_embedding: {name} must be a dense tensor, got a .*{layout} one"):
        lk.prompt_embedding(**given)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_prefix_that_is_not_dense_is_named(layout):
    kind = "nested" if "nested" in layout else layout
    with pytest.raises(TypeError, match=f"prefix_kv: prefix must be a dense tensor, got a .*{kind} one"):
        lk.prefix_kv(LAYOUTS[layout](torch.randn(3, 8)), 2, 2)


def test_sparse_embeddings_are_named():
    ids, weight, A, B = torch.tensor([1]), torch.randn(5, 4), torch.randn(2, 5), torch.randn(4, 2)
    with pytest.raises(TypeError, match="lora_embedding: ids must be a dense tensor"):
        lk.lora_embedding(ids.to_sparse(), weight, A, B)
    with pytest.raises(TypeError, match="lora_embedding: weight must be a dense tensor"):
        lk.lora_embedding(ids, weight.to_sparse(), A, B)


def test_other_errors_stay_what_they_are():
    """Only a layout is said to be wrong where it is."""
    weight, A, B = torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    with pytest.raises(RuntimeError, match="not supported; use plain autograd"):
        torch.vmap(lambda row: lk.lora_linear(row, weight, A, B))(torch.randn(3, 8))


@pytest.mark.parametrize("trains", [True, False])
def test_a_peft_layer_takes_sparse_inputs_as_before(trains):
    stock = make().train(trains)
    patched = copy.deepcopy(stock)
    lk.patch(patched)
    x = torch.randn(3, K).to_sparse()
    expected, ours = run(lin(stock), x), run(lin(patched), x)
    assert all(torch.equal(ours[name], value) for name, value in expected.items())
    assert lk.stats() == {"served": {}, "fallback": {("lora_linear", Reason.LAYOUT): 1}}


def test_a_frozen_linear_takes_sparse_inputs_as_before():
    layer = lk.FrozenLinear(8, 6).requires_grad_(False)
    x = torch.randn(3, 8)
    torch.testing.assert_close(layer(x.to_sparse()), F.linear(x, layer.weight, layer.bias))
