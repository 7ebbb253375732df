"""LoRA on layers that two processes share: the results of one process, and the messages of PEFT's own path."""

from functools import partial

import processes
import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from processes import adamw, fill, gradients, llama, sent, spread, spread_model, train, wholes
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel
from transformers import LlamaForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

import lora_kernels as lk
from lora_kernels import philox
from lora_kernels.functional.tensor_parallel import lora_linear_of_shards
from lora_kernels.reasons import Reason
from lora_kernels.report import FUSED_COLUMNS, FUSED_ROWS

R = 4
BATCHES = [torch.arange(step, step + 18).reshape(2, 9) * 7 % 61 for step in range(3)]
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BY_COLUMNS = [name for name in LAYERS if name not in processes.BY_ROWS]


def with_lora(model, **options):
    options = {"r": R, "lora_alpha": 8, "target_modules": LAYERS} | options
    model = get_peft_model(model, LoraConfig(**options))
    fill(model)
    return model


def mesh_of_two():
    return init_device_mesh("cpu", (2,))


# ------------------------------------------------------------------------------------------------------- models


def plan_of_transformers(rank, folder):
    """Biases are added once, gradients are sums, nothing but the sums of PEFT's path is sent."""
    base = f"{folder}/base"
    if rank == 0:
        llama(attention_bias=True, mlp_bias=True).save_pretrained(base)
    dist.barrier()
    results = {}
    for kind in ("one", "stock", "fused"):
        config = None if kind == "one" else DistributedConfig(tp_size=2)
        model = with_lora(LlamaForCausalLM.from_pretrained(base, distributed_config=config))
        if kind == "fused":
            report = lk.patch(model)
            assert not report.kept
            ways = {name.rpartition(".")[2]: way for name, way in report.fused}
            assert ways == dict.fromkeys(BY_COLUMNS, FUSED_COLUMNS) | dict.fromkeys(processes.BY_ROWS, FUSED_ROWS)
        elif kind == "stock":
            widen_for_transformers(model)
        with sent() as messages:
            results[kind] = *train(model, adamw(model), BATCHES), messages
        with torch.no_grad(), sent() as messages_of_inference:
            logits = model(input_ids=BATCHES[0]).logits
        results[kind] += (logits, messages_of_inference)
    assert lk.stats()["fallback"] == {}
    assert lk.stats()["served"]["lora_linear", "cpu"] == 4 * 2 * len(LAYERS)
    losses, grads, _, logits, _ = results["one"]
    assert losses[-1] < losses[0]
    for kind in ("stock", "fused"):
        torch.testing.assert_close(results[kind][0], losses, rtol=1e-6, atol=0)
        torch.testing.assert_close(wholes(results[kind][1]), grads, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(results[kind][3], logits, rtol=1e-4, atol=1e-5)
    assert results["fused"][2] == results["stock"][2]
    # Activations, and the head's logits: no weight.
    assert {shape for _, shape, _ in results["fused"][2]} == {(2, 9, 24), (2, 9, R), (2, 9, 31)}
    # Without gradients nobody needs s of all processes.
    of_s = [("allreduce", (2, 9, R), 2 * 9 * R * 4)] * 4
    assert sorted(results["fused"][4] + of_s) == results["stock"][4]


def widen_for_transformers(model):
    """PEFT 0.21.2 makes a row-parallel lora_A as wide as its shard; transformers 5.24 takes that for the whole."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            A = module.lora_A["default"]
            A.in_features = A.weight.shape[1]


def styles_of_torch(rank, folder):
    mesh = mesh_of_two()
    results = []
    for fused in (False, True):
        model = with_lora(llama())
        if fused:
            lk.patch(model)
        spread_model(model, mesh)
        with sent() as messages:
            results.append((*train(model, adamw(model), BATCHES), messages))
    one = with_lora(llama())
    expected = train(one, adamw(one), BATCHES)
    for losses, grads, _ in results:
        torch.testing.assert_close(losses, expected[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(wholes(grads), expected[1], rtol=1e-4, atol=1e-6)
    assert results[0][2] == results[1][2]
    assert lk.stats()["fallback"] == {}


def sixteen_bits(rank, folder):
    """PEFT takes x to its adapters' float32 and sums s there; the op rounds s, and its sums are half as long."""
    results = []
    for fused in (False, True):
        model = with_lora(llama().bfloat16())
        assert model.base_model.model.model.layers[0].mlp.up_proj.lora_A["default"].weight.dtype == torch.float32
        if fused:
            lk.patch(model)
        spread_model(model, mesh_of_two())
        with sent() as messages:
            results.append((*train(model, adamw(model), BATCHES), messages))
    stock, fused = results
    torch.testing.assert_close(fused[0], stock[0], rtol=1e-2, atol=0)
    assert lk.stats()["fallback"] == {}
    assert fused[2] == [(kind, shape, size // 2 if shape[-1] == R else size) for kind, shape, size in stock[2]]


def dropout_by_columns(rank, folder):
    """All processes drop the same, as one process does: the whole lora_As stay equal in them."""
    options = {"target_modules": BY_COLUMNS, "lora_dropout": 0.3}
    results = []
    for shared in (False, True):
        model = with_lora(llama(), **options)
        lk.patch(model)
        if shared:
            spread_model(model, mesh_of_two())
        torch.manual_seed(1)
        results.append(train(model, adamw(model), BATCHES))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(wholes(results[1][1]), results[0][1], rtol=1e-4, atol=1e-6)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            others = [torch.empty_like(parameter) for _ in range(2)]
            dist.all_gather(others, parameter.detach())
            assert torch.equal(*others), name


def recomputed_activations(rank, folder):
    mesh, losses = mesh_of_two(), []
    for again in (False, True):
        model = with_lora(llama(), lora_dropout=0.2)
        lk.patch(model)
        spread_model(model, mesh)
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        torch.manual_seed(1)
        losses.append(train(model.train(), adamw(model), BATCHES)[0])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    assert lk.stats()["fallback"] == {}


def fsdp2_with_lengths_that_differ(rank, folder):
    """Each process has texts of its own length; the losses' mean is what one process learns from."""
    parts = [[tokens[:, : 9 - 4 * of] for tokens in BATCHES] for of in range(2)]
    one = with_lora(llama())
    expected, optimizer = [], adamw(one)
    for both in zip(*parts):
        losses = [one(input_ids=tokens, labels=tokens).loss for tokens in both]
        (sum(losses) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(losses[rank].item())
    model = with_lora(llama())
    lk.patch(model)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh_of_two())
    fully_shard(model, mesh=mesh_of_two())
    losses, _ = train(model, adamw(model), parts[rank])
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    assert lk.stats()["fallback"] == {}


def files(rank, folder):
    one = with_lora(llama())
    expected = one(input_ids=BATCHES[0]).logits.detach()
    shared = with_lora(llama())
    lk.patch(shared)
    spread_model(shared, mesh_of_two())
    lk.save_adapter(shared, f"{folder}/adapter")
    fill(shared, std=0.1)
    dist.barrier()
    lk.load_adapter(shared, f"{folder}/adapter")
    torch.testing.assert_close(shared(input_ids=BATCHES[0]).logits, expected, rtol=1e-4, atol=1e-5)
    if rank == 0:
        lk.save_adapter(one, f"{folder}/of_one")
        ours, theirs = (load_file(f"{folder}/{name}/adapter_model.safetensors") for name in ("adapter", "of_one"))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    dist.barrier()


def merging(rank, folder):
    """Each process adds to its own shards, and sends nothing."""
    model = with_lora(llama())
    expected = model(input_ids=BATCHES[0]).logits.detach()
    with model.disable_adapter():
        without = model(input_ids=BATCHES[0]).logits.detach()
    lk.patch(model)
    spread_model(model, mesh_of_two())
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def logits():
        return model(input_ids=BATCHES[0]).logits.detach()

    for safe in (False, True):
        with sent() as messages:
            for layer in layers:
                layer.merge(safe_merge=safe)
        assert messages == ([("allreduce", (), 4)] * len(layers) if safe else [])  # whether every sum is finite
        torch.testing.assert_close(logits(), expected, rtol=1e-4, atol=1e-5)
        with model.disable_adapter():  # unmerges
            torch.testing.assert_close(logits(), without, rtol=1e-4, atol=1e-5)
        assert not any(layer.merged for layer in layers)
        torch.testing.assert_close(logits(), expected, rtol=1e-4, atol=1e-5)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    with torch.no_grad():
        of_broken = layers[0].lora_B["default"].weight
        kept = of_broken.to_local().clone()
        if rank == 1:
            of_broken.to_local()[0, 0] = torch.nan
        with pytest.raises(ValueError, match="would not be finite; the adapter default"):
            layers[0].merge(safe_merge=True)
        assert not layers[0].merged
        of_broken.to_local().copy_(kept)
    model = model.merge_and_unload()
    torch.testing.assert_close(logits(), expected, rtol=1e-4, atol=1e-5)


def packs_and_verify(rank, folder):
    model = with_lora(llama())
    lk.patch(model)
    spread_model(model, mesh_of_two())
    report = lk.patch(model, packs=True)
    assert {reason for _, reason in report.apart} == {Reason.PACK_SHARDED, Reason.DTENSOR}
    assert {what for _, what in report.fused} == {FUSED_COLUMNS, FUSED_ROWS}
    found = lk.verify(model)
    assert {check.verdict for check in found.checks} == {"kept"}
    assert all("spread over processes" in check.detail for check in found.checks)


# ------------------------------------------------------------------------------------------------------- layers

N, K, P = 14, 22, 0.4


def one_layer(rank, folder):
    """Against the whole layer in float64, with every gradient; numbers are odd where they may be."""
    for by_rows in (False, True):
        for dtype, of_adapter in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
            for p in (0.0, P):
                for has_bias in (False, True):
                    check_layer(rank, by_rows, dtype, of_adapter, p, has_bias)
        check_layer(rank, by_rows, torch.float32, torch.float32, 0.0, True, autocast=torch.bfloat16)
        for skipped in ("x", "lora_A", "lora_B"):
            check_layer(rank, by_rows, torch.float32, torch.float32, P, True, skipped=(skipped,))


def check_layer(rank, by_rows, dtype, of_adapter, p, has_bias, autocast=None, skipped=()):
    generator = torch.Generator().manual_seed(2)
    make = partial(torch.randn, generator=generator)
    full = {
        "x": make(K, 3, 5).to(dtype).permute(1, 2, 0), "weight": make(N, K).to(dtype),
        "lora_A": make(R, K).to(of_adapter), "lora_B": make(N, R).to(of_adapter),
        "bias": make(N).to(dtype) if has_bias else None,
    }  # fmt: skip
    grad_y = make(3, 5, N).to(dtype)
    torch.manual_seed(3)
    local_k = K // 2 if by_rows else K
    seed = lk.functional.checks.draw_seed(torch.device("cpu")) if p else 0
    mask = lk.dropout_mask(15, local_k, p, seed).repeat(1, K // local_k).reshape(3, 5, K) * philox.keep_scale(p)

    cuts = {"x": -1, "weight": 1, "lora_A": 1} if by_rows else {"weight": 0, "lora_B": 0, "bias": 0}

    def part(name, t):
        return None if t is None else t.chunk(2, cuts[name])[rank] if name in cuts else t

    trained = {name for name in full if name != "weight" and full[name] is not None} - set(skipped)
    shards = {name: part(name, t) for name, t in full.items()}
    shards = {
        name: t if t is None else t.detach().clone().requires_grad_(name in trained) for name, t in shards.items()
    }
    torch.manual_seed(3)
    x, weight, A, B, bias = shards.values()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = lora_linear_of_shards(x, weight, A, B, bias, 0.5, p, True, by_rows, dist.group.WORLD)
    y_of_grad = grad_y if by_rows else grad_y.chunk(2, -1)[rank]
    y.backward(y_of_grad.to(y.dtype))
    ours = {"y": y.detach()} | {name: shards[name].grad for name in trained}
    with torch.no_grad():
        torch.manual_seed(3)
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            without = lora_linear_of_shards(x, weight, A, B, bias, 0.5, p, True, by_rows, dist.group.WORLD)
    torch.testing.assert_close(without, ours["y"])

    def unfused(compute):
        given = {name: t if t is None else t.detach().clone().to(compute or t.dtype) for name, t in full.items()}
        for name in trained:
            given[name].requires_grad_()
        x, weight, A, B, bias = given.values()
        dropped = (x * mask.to(x.dtype)).to(A.dtype)
        with torch.autocast("cpu", autocast, enabled=autocast is not None and compute is None):
            update = nn.functional.linear(nn.functional.linear(dropped, A), B) * 0.5
            y = (nn.functional.linear(x, weight, bias) + update).to(x.dtype if autocast is None else torch.bfloat16)
        if compute is not None:
            y = y.to(compute)
        y.backward(grad_y.to(y.dtype))
        found = {"y": y.detach()} | {name: given[name].grad for name in trained}
        y_cut = found["y"] if by_rows else found["y"].chunk(2, -1)[rank]
        return {name: part(name, t) for name, t in found.items()} | {"y": y_cut}

    exact, plain = unfused(torch.float64), unfused(None)
    for name, reference in exact.items():
        eps = torch.finfo(autocast or dtype).eps
        error, bound = ((t[name].double() - reference).norm() / reference.norm() for t in (ours, plain))
        assert ours[name].dtype == plain[name].dtype, name
        assert error <= 2 * bound + 4 * eps, (name, error, bound, by_rows, dtype, p, has_bias, autocast, skipped)
    assert all(shards[name].grad is None for name in shards if shards[name] is not None and name not in trained)


# ------------------------------------------------------------------------------------- what is left to PEFT, and why


class OneLayer(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.lin = nn.Linear(K, features)

    def forward(self, x):
        return self.lin(x)


class Doubled(ColwiseParallel):
    """Somebody's own style."""

    @staticmethod
    def _prepare_output_fn(output_layouts, use_local_output, mod, outputs, device_mesh):
        return 2 * ColwiseParallel._prepare_output_fn(output_layouts, use_local_output, mod, outputs, device_mesh)


def two_adapters(model, mesh):
    model.add_adapter("other", LoraConfig(r=3, target_modules=["lin"]))
    model.base_model.set_adapter(["default", "other"])
    spread(model.base_model.model.lin, mesh, False)
    processes.parallelize_module(model.base_model.model.lin, mesh, {"lora_B.other": ColwiseParallel()})


def with_hook(of):
    def make(model, mesh):
        layer = model.base_model.model.lin
        spread(layer, mesh, False)
        module = layer.base_layer if of == "base_layer" else getattr(layer, of)["default"]
        module.register_forward_hook(lambda module, args, y: y * 1.5)

    return make


def trained_base(model, mesh):
    spread(model.base_model.model.lin, mesh, False)
    model.base_model.model.lin.base_layer.weight.requires_grad_()


def otherwise(**options):
    return lambda model, mesh: spread(model.base_model.model.lin, mesh, False, **options)


LEFT = {
    "gathered outputs": (otherwise(column=partial(ColwiseParallel, output_layouts=Replicate())), Reason.DTENSOR, {}),
    "another style": (otherwise(column=Doubled), Reason.DTENSOR, {}),
    "two adapters": (two_adapters, Reason.SHARDING, {}),
    "lora_bias": (otherwise(), Reason.LORA_BIAS, {"lora_bias": True}),
    "hook on lora_A": (with_hook("lora_A"), Reason.ADAPTER_HOOKS, {}),
    "hook on lora_B": (with_hook("lora_B"), Reason.SHARDING, {}),
    "hook on the base": (with_hook("base_layer"), Reason.DTENSOR, {}),
    "trained base": (trained_base, Reason.BASE_REQUIRES_GRAD, {}),
}


def other_ways(rank, folder):
    mesh, x = mesh_of_two(), torch.randn(5, K)
    for case, (act, reason, options) in LEFT.items():
        results = []
        for fused in (False, True):
            torch.manual_seed(0)
            model = with_lora(OneLayer(N), target_modules=["lin"], **options)
            if fused:
                lk.patch(model)
            act(model, mesh)
            y = model(x)
            y.square().sum().backward()
            results.append({"y": y.detach(), **wholes(gradients(model))})
        torch.testing.assert_close(*results, msg=lambda text, case=case: f"{case}: {text}")
        assert lk.stats()["fallback"] == {("lora_linear", reason): 1}, case
        assert lk.stats()["served"] == {}, case
        lk.reset_stats()


def uneven_shards(rank, folder):
    mesh, x = mesh_of_two(), torch.randn(5, K)
    model = with_lora(OneLayer(7), target_modules=["lin"])
    expected = model(x).tensor_split([4], -1)[rank]
    lk.patch(model)
    lk.reset_stats()
    spread(model.base_model.model.lin, mesh, False)
    torch.testing.assert_close(model(x), expected)
    assert lk.stats()["fallback"] == {("lora_linear", Reason.SHARDING): 1}


def dora(rank, folder):
    model = with_lora(OneLayer(N), target_modules=["lin"], use_dora=True)
    lk.patch(model)
    spread(model.base_model.model.lin, mesh_of_two(), False)
    assert [reason for _, reason in lk.patch(model).kept] == [Reason.VARIANT]


def two_dimensions_between_calls(rank, folder):
    """Under FSDP2 a weight is cut twice until the block is called."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "tensor"))
    model = with_lora(OneLayer(N), target_modules=["lin"])
    x = torch.randn(5, K)
    expected = model(x)
    lk.patch(model)
    spread(model.base_model.model.lin, mesh["tensor"], False)
    fully_shard(model, mesh=mesh["data"])
    assert [reason for _, reason in lk.patch(model).kept] == [Reason.SHARDING]
    lk.reset_stats()
    torch.testing.assert_close(model(x), expected)
    assert lk.stats()["fallback"] == {}
    assert lk.stats()["served"] == {("lora_linear", "cpu"): 1}


def compiled(rank, folder):
    torch.manual_seed(0)
    model = with_lora(OneLayer(N), target_modules=["lin"])
    x = torch.randn(5, K)
    expected = model(x).chunk(2, -1)[rank]
    lk.patch(model)
    spread(model.base_model.model.lin, mesh_of_two(), False)
    lk.reset_stats()
    y = torch.compile(model, backend="eager")(x)
    torch.testing.assert_close(y, expected)


SCENARIOS = (
    plan_of_transformers, styles_of_torch, sixteen_bits, dropout_by_columns, recomputed_activations,
    fsdp2_with_lengths_that_differ, files, merging, packs_and_verify, one_layer, other_ways, uneven_shards, dora,
    two_dimensions_between_calls, compiled,
)  # fmt: skip


pytestmark = pytest.mark.xdist_group("two processes")  # which are started once


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return processes.run(2, SCENARIOS, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_two_processes(found, scenario):
    assert found[scenario] == ""
