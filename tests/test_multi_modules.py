"""MultiLoRALinear and ``inject(adapters=...)``: pools of adapters without PEFT, and one adapter of them in files."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from tiny_models import tiny_llama
from torch import nn

import lora_kernels as lk

IDS = torch.arange(18).view(3, 6)
OF_SAMPLES = torch.tensor([1, -1, 0])


def pool(**options):
    layer = lk.MultiLoRALinear(nn.Linear(12, 20), 3, r=4, alpha=8, **options)
    nn.init.normal_(layer.lora_B)
    return layer


def logits(model, ids):
    with lk.route_adapters(model, ids):
        return model(IDS).logits


def randomise(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)


def test_rows_use_their_adapters():
    layer, x = pool(), torch.randn(3, 5, 12)
    y = layer(x, OF_SAMPLES)
    base = F.linear(x, layer.weight, layer.bias)
    for sample, i in enumerate(OF_SAMPLES.tolist()):
        update = 0 if i < 0 else F.linear(F.linear(x[sample], layer.lora_A[i]), layer.lora_B[i]) * layer.scaling
        torch.testing.assert_close(y[sample], base[sample] + update)
    assert torch.equal(layer(x), base)
    with lk.route_adapters(layer, [1, None, 0]):
        assert torch.equal(layer(x), y)
    assert torch.equal(layer(x), base)
    y.sum().backward()
    assert [bool(grad.any()) for grad in layer.lora_B.grad] == [True, True, False]
    assert layer.weight.grad is None


def test_starts_as_the_plain_linear():
    linear = nn.Linear(12, 20)
    layer = lk.MultiLoRALinear(linear, 2, r=4, alpha=8, dropout=0.25, use_rslora=True, adapter_dtype=torch.float64)
    assert layer.weight is linear.weight
    assert layer.scaling == 4.0
    assert layer.lora_A.dtype == torch.float64
    assert not layer.lora_A[0].equal(layer.lora_A[1])
    assert "adapters=2, r=4, alpha=8.0, dropout=0.25, use_rslora=True" in repr(layer)
    twin = copy.deepcopy(layer)
    twin.load_state_dict(layer.state_dict())
    assert lk.is_fused(twin)


def test_inject_makes_pools():
    plain, model = (tiny_llama().eval() for _ in range(2))
    model.load_state_dict(plain.state_dict())
    report = lk.inject(model, ["q_proj", "up_proj"], r=3, alpha=6, adapters=2)
    assert {by for _, by in report.fused} == {"multi_lora_linear"}
    assert len(report.fused) == 6
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    randomise(model)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)  # nothing is routed
        mixed = logits(model, OF_SAMPLES.tolist())
        for i in (0, 1, -1):
            alone = logits(model, [i] * 3)
            torch.testing.assert_close(mixed[i == OF_SAMPLES], alone[i == OF_SAMPLES])
        assert not torch.allclose(mixed[0], plain(IDS).logits[0])


def test_an_adapter_of_a_pool_in_files(tmp_path):
    base = tiny_llama().eval()
    model = copy.deepcopy(base)
    lk.inject(model, ["q_proj", "up_proj"], r=3, alpha=6, adapters=2)
    randomise(model)
    for i in (0, 1):
        lk.save_adapter(model, tmp_path / str(i), adapter=i)
        stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / str(i))
        with torch.no_grad():
            torch.testing.assert_close(stock(IDS).logits, logits(model, [i] * 3))
    before = {name: p.clone() for name, p in model.named_parameters()}
    lk.load_adapter(model, tmp_path / "0", adapter=1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter[0], before[name][0])
            assert torch.equal(parameter[1], before[name][0])
            assert parameter.requires_grad
        else:
            assert torch.equal(parameter, before[name])
    plain = copy.deepcopy(base)
    lk.load_adapter(plain, tmp_path / "1")
    assert sum(isinstance(m, lk.LoRALinear) for m in plain.modules()) == 6


def test_refusals(tmp_path):
    linear = nn.Linear(4, 4)
    for adapters, error in ((0, ValueError), (True, TypeError), (2.0, TypeError)):
        with pytest.raises(error, match="adapters must be"):
            lk.MultiLoRALinear(linear, adapters, r=2, alpha=2)
        with pytest.raises(error, match="inject: adapters must be"):
            lk.inject(nn.Sequential(linear), ["0"], r=2, alpha=2, adapters=adapters)
    with pytest.raises(TypeError, match=r"expected a plain nn\.Linear"):
        lk.MultiLoRALinear(nn.Identity(), 2, r=2, alpha=2)
    packed = nn.Sequential(nn.Linear(64, 8))
    lk.quantize_(packed, "nf4")
    with pytest.raises(ValueError, match="adapters needs plain weights, that of 0 is quantised"):
        lk.inject(packed, ["0"], r=2, alpha=2, adapters=2)
    assert not any("lora" in name for name, _ in packed.named_parameters())

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    lk.inject(model, ["0"], r=2, alpha=2, adapters=2)
    with pytest.raises(ValueError, match="adapter must say which one, 0 has 2"):
        lk.save_adapter(model, tmp_path / "a")
    for wrong in (2, -1, "0"):
        with pytest.raises(ValueError, match="adapter must be a number from 0 to 1"):
            lk.save_adapter(model, tmp_path / "a", adapter=wrong)
    with pytest.raises(ValueError, match="already has an adapter"):
        lk.inject(model, ["1"], r=2, alpha=2)
    single = nn.Sequential(nn.Linear(4, 4))
    lk.inject(single, ["0"], r=2, alpha=2)
    with pytest.raises(ValueError, match="one of several, and layers of the model have one or none"):
        lk.save_adapter(single, tmp_path / "a", adapter=0)
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match="merge_adapter"):
        lk.merge_adapter(model)
