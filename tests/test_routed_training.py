"""route_adapters: each adapter of a mixed batch trains as on its own samples, whatever serves its layers."""

import copy
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from lora_kernels import Reason

K, HIDDEN, N, T = 24, 40, 16, 3
NAMES = ["second", "__base__", "default", "third", "second", "default"]
ADAPTERS = ("default", "second", "third")


class Model(nn.Module):
    def __init__(self, checkpoints=False):
        super().__init__()
        self.up, self.down, self.checkpoints = nn.Linear(K, HIDDEN), nn.Linear(HIDDEN, N, bias=False), checkpoints

    def forward(self, x):
        h = checkpoint(self.up, x, use_reentrant=False) if self.checkpoints else self.up(x)
        return self.down(F.gelu(h))


def make(each=None, checkpoints=False, patched=True, **options):
    """A model with three adapters that train; ``each`` has options of single ones."""
    each = {"second": {"r": 5}, "third": {"lora_alpha": 3}} if each is None else each

    def config(name):
        own = {"r": 4, "lora_alpha": 7, "init_lora_weights": False, **options, **each.get(name, {})}
        return LoraConfig(target_modules=["up", "down"], **own)

    model = get_peft_model(Model(checkpoints), config("default"))
    for name in ADAPTERS[1:]:
        model.add_adapter(name, config(name))
    model.base_model.set_adapter(list(ADAPTERS))
    if patched:
        lk.patch(model)
    return model.train()


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    model.zero_grad()
    return found


def alone(model, x, names):
    """Outputs and gradients of each adapter's samples by PEFT itself, one adapter after the other."""
    outputs, found = torch.empty(len(x), T, N), {}
    for name in dict.fromkeys(names):
        mine = [i for i, other in enumerate(names) if other == name]
        if name == "__base__":
            with model.disable_adapter(), torch.no_grad():
                outputs[mine] = model(x[mine])
            continue
        model.base_model.set_adapter(name)
        y = model(x[mine])
        y.square().sum().backward()
        outputs[mine] = y.detach()
        found |= gradients(model)
    model.base_model.set_adapter(list(ADAPTERS))
    return outputs, found


def assert_trains_as_alone(model, stock, names=NAMES):
    x = torch.randn(len(names), T, K)
    wanted, wanted_grads = alone(stock, x, names)
    with lk.route_adapters(model, names):
        y = model(x)
        y.square().sum().backward()
    torch.testing.assert_close(y.detach(), wanted)
    found = gradients(model)
    assert found.keys() == wanted_grads.keys()
    assert {name for name in ADAPTERS if any(f".{name}." in key for key in found)} == {*names} - {"__base__"}
    for name, grad in wanted_grads.items():
        assert (found[name] - grad).abs().max() <= 1e-5 * grad.abs().max(), name


OPTIONS = [{}, {"use_rslora": True}, {"each": {}}, {"checkpoints": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("names", [NAMES, ["third"] * 4, ["second", "default"], ["__base__", "third"]], ids=str)
def test_an_adapter_trains_as_on_its_own_samples(names, options):
    """Kills: one factor for all of them; samples that are given the adapter of their place in the batch."""
    model, stock = make(**options), make(**options, patched=False)
    stock.load_state_dict(model.state_dict())
    lk.reset_stats()
    assert_trains_as_alone(model, stock, names)
    (_, backend), *_ = served = lk.stats()["served"]
    assert served["multi_lora_linear_backward", backend] == 2
    assert served["multi_lora_linear", backend] == (3 if options.get("checkpoints") else 2)
    assert lk.stats()["fallback"] == {}


@pytest.mark.parametrize(
    ("options", "change", "reason"),
    [
        ({"use_dora": True}, lambda m: None, Reason.DORA),
        ({}, lambda m: [fused.lora_A["second"].register_forward_hook(lambda *_: None) for fused in layers_of(m)],
         Reason.ADAPTER_HOOKS),
        ({"lora_bias": True}, lambda m: None, None),
    ],
    ids=["DoRA", "hooks", "biases of lora_B"],
)  # fmt: skip
def test_layers_that_one_op_cannot_serve_compute_the_same(options, change, reason):
    model = make(**options)
    change(model)
    stock = make(**options, patched=False)
    stock.load_state_dict(model.state_dict())
    lk.reset_stats()
    assert_trains_as_alone(model, stock)
    fallback = lk.stats()["fallback"]
    assert fallback.get(("multi_lora_linear", reason), 0) == (2 if reason else 0)
    assert reason or not fallback


def layers_of(model):
    return [m for m in model.modules() if lk.is_fused(m)]


def test_a_base_layer_with_a_hook_is_called():
    model, calls = make(), []
    model.base_model.model.up.base_layer.register_forward_hook(lambda *_: calls.append(1))
    with lk.route_adapters(model, NAMES):
        model(torch.randn(6, T, K))
    assert calls == [1]


def test_stock_layers_are_routed_too():
    stock = make(patched=False)
    assert_trains_as_alone(stock, copy.deepcopy(stock))


def test_dropout_is_one_mask_over_the_batch_and_of_the_op():
    model = make(lora_dropout=0.5)
    x = torch.randn(6, T, K)

    def outputs():
        torch.manual_seed(4)
        with lk.route_adapters(model, NAMES):
            return model.base_model.model.up(x)

    dropped = outputs()
    assert torch.equal(dropped, outputs())
    assert lk.stats()["fallback"] == {}
    layer = model.base_model.model.up
    for sample, name in enumerate(NAMES):
        base = layer.base_layer(x[sample])
        if name == "__base__":
            torch.testing.assert_close(dropped[sample], base)
        else:
            torch.manual_seed(4)
            seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)
            keep = lk.dropout_mask(6 * T, K, 0.5, seed).view(6, T, K)[sample]
            A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
            update = F.linear(F.linear(torch.where(keep, x[sample] * 2, 0), A), B) * layer.scaling[name]
            torch.testing.assert_close(dropped[sample], base + update)
    model.eval()
    assert not torch.equal(outputs(), dropped)


def test_adapters_that_drop_differently_go_one_by_one():
    each = {name: {"lora_dropout": p} for name, p in zip(ADAPTERS, (0.0, 1e-9, 0.0))}
    model, stock = make(each), make(each, patched=False)
    stock.load_state_dict(model.state_dict())
    assert_trains_as_alone(model, stock)
    assert lk.stats()["fallback"] == {("multi_lora_linear", Reason.DROPOUTS): 2}
    assert model.base_model.model.up.active_adapters == list(ADAPTERS)


def test_without_gradients_no_pools_are_made():
    """The adapters are read where they are, and the numbers are those of the op over pools."""
    model = make().eval()
    x = torch.randn(6, T, K)
    with lk.route_adapters(model, NAMES):
        y = model(x)
        with torch.no_grad():
            assert torch.equal(model(x), y)
            torch.testing.assert_close(model(x, adapter_names=NAMES), y)
    assert lk.stats()["fallback"] == {}


def test_names_end_with_the_context_and_the_innermost_counts():
    model = make()
    x = torch.randn(6, T, K)
    before = model(x)
    with pytest.raises(KeyError), lk.route_adapters(model, NAMES):
        raise KeyError
    assert torch.equal(model(x), before)
    with lk.route_adapters(model, NAMES):
        outer = model(x)
        with lk.route_adapters(model, ["__base__"] * 6):
            inner = model(x)
        assert torch.equal(model(x), outer)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), inner)


def test_refusals_and_a_warning():
    model, x = make(), torch.randn(6, T, K)
    for names in ("default", None):
        with pytest.raises(TypeError, match="adapters must be a sequence"), lk.route_adapters(model, names):
            pass
    model.base_model.set_adapter("default")
    with pytest.warns(UserWarning, match="second, third will get no gradient"), lk.route_adapters(model, NAMES):
        model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with lk.route_adapters(model, ["default"] * 6), torch.no_grad():
            model(x)
    model.merge_adapter()
    with (
        lk.route_adapters(model, ["default"] * 6),
        pytest.raises(ValueError, match="when there are merged adapters"),
    ):
        model(x)


def checkpointed(reentrant):
    """Adapters of one rank, whose recomputed tensors cannot be told apart."""
    model = make(each={}, checkpoints=True)
    if reentrant:
        model.base_model.model.forward = lambda x: model.base_model.model.down(
            checkpoint(model.base_model.model.up, x, use_reentrant=True)
        )
    return model


@pytest.mark.parametrize("reentrant", [False, True])
def test_one_backward_of_batches_with_other_adapters_says_so(reentrant):
    """Kills: the first batch recomputed by the adapters of the second one."""
    model, x = checkpointed(reentrant), torch.randn(2, T, K, requires_grad=True)
    with lk.route_adapters(model, ["default"] * 2):
        first = model(x).square().sum()
    with lk.route_adapters(model, ["second"] * 2):
        loss = first + model(x).square().sum()
        with pytest.raises(RuntimeError, match="for another batch than that of this context"):
            loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_batches_of_the_same_adapters_are_accumulated(reentrant):
    model, names = checkpointed(reentrant), ["default", "second"]
    batches = [torch.randn(2, T, K, requires_grad=True) for _ in range(3)]
    with lk.route_adapters(model, ["third"] * 2):
        model(batches[0])  # of which there is no backward
    for x in batches:
        with lk.route_adapters(model, names):
            model(x).square().sum().backward()
    wanted = gradients(model)
    with lk.route_adapters(model, names):
        losses = [model(x).square().sum() for x in batches[:2]]
    with lk.route_adapters(model, names):
        (sum(losses) + model(batches[2]).square().sum()).backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, wanted[name])


def test_code_that_was_compiled_before_is_routed():
    """Kills: hooks alone, for which compiled code does not look again."""
    model, x, pools = make().eval(), torch.randn(6, T, K), of_pools()
    for module, routes in ((model, (NAMES, NAMES[::-1])), (pools, ([0, 1, -1] * 2, [1] * 6))):
        compiled = torch.compile(module, backend="eager")
        with torch.no_grad():
            for route in (None, *routes, None):
                if route is None:
                    torch.testing.assert_close(compiled(x), module(x))
                    continue
                with lk.route_adapters(module, route):
                    torch.testing.assert_close(compiled(x), module(x))


def of_pools():
    pools = nn.Sequential(nn.Linear(K, N), nn.GELU())
    lk.inject(pools, ["0"], r=2, alpha=2, adapters=2)
    nn.init.normal_(pools[0].lora_B)
    return pools


@pytest.mark.parametrize("has_grad", [False, True])
@pytest.mark.parametrize(("build", "route"), [(make, NAMES), (of_pools, [0, 1, -1] * 2)], ids=["peft", "pools"])
def test_compiled_right_after_a_routed_call(build, route, has_grad):
    """Kills: a hook that waits for the next call, and that torch.compile cannot trace."""
    module, x = build(), torch.randn(6, T, K)
    plain = module(x).detach()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    with torch.set_grad_enabled(has_grad):
        for _ in range(2):
            with lk.route_adapters(module, route):
                routed = module(x)
            assert has_grad == any(m._forward_pre_hooks for m in module.modules())
            torch.testing.assert_close(compiled(x), plain)
            torch.testing.assert_close(compiled(x), plain)
            with lk.route_adapters(module, route):
                torch.testing.assert_close(compiled(x), routed)
            torch.testing.assert_close(module(x), plain)
    assert not any(m._forward_pre_hooks for m in module.modules())


def test_compiled_code_is_not_taken_for_the_backward_of_another_route():
    """Kills: code that was made after one context, in which nothing asks any more, for a backward after the next."""
    module, x = of_pools(), torch.randn(6, T, K, requires_grad=True)
    compiled = torch.compile(module, backend="eager")
    with lk.route_adapters(module, [0] * 6):
        compiled(x)
    compiled(x)
    with lk.route_adapters(module, [1] * 6):
        loss = checkpoint(compiled, x, use_reentrant=True).sum()
    with pytest.raises(RuntimeError, match="call backward inside"):
        loss.backward()


def test_a_context_without_gradients_forgets_no_batch_before():
    """Kills: a hook that leaves although the backward of an earlier context has yet to ask it."""
    for between in (NAMES, NAMES[::-1]):
        model, x = make(checkpoints=True), torch.randn(6, T, K)
        with lk.route_adapters(model, NAMES):
            loss = model(x).sum()
        with torch.no_grad(), lk.route_adapters(model, between):
            model(x)
        with pytest.raises(RuntimeError, match="call backward inside"):
            loss.backward()


def test_a_copy_is_routed_as_long_as_its_original():
    model, x = make(), torch.randn(6, T, K)
    unrouted = model(x)
    with lk.route_adapters(model, NAMES):
        twin, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        assert torch.equal(twin(x), model(x))
        torch.testing.assert_close(pickled(x), unrouted)
    torch.testing.assert_close(twin(x), unrouted)
    torch.testing.assert_close(model(x), unrouted)
    assert not any(m._forward_pre_hooks for copied in (model, twin, pickled) for m in copied.modules())


def test_threads_take_turns():
    """Kills: the adapters of whoever came last, for all threads."""
    model, x = make(), torch.randn(6, T, K)
    with ThreadPoolExecutor(1) as other, lk.route_adapters(model, NAMES):
        mine = model(x)
        with pytest.raises(RuntimeError, match="let threads take turns"):
            other.submit(lk.route_adapters(model, ["default"] * 6).__enter__).result()
        assert torch.equal(model(x), mine)
        assert torch.equal(other.submit(model, x).result(), mine)
    with ThreadPoolExecutor(1) as other:
        other.submit(lk.route_adapters(model, NAMES).__enter__).result()
