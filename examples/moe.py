"""LoRA on the experts of a mixture: stock PEFT and fused layers, side by side.

    python examples/moe.py                # less than a minute; the picture is build/demo/moe.png

The model is made here: a small Qwen3-MoE over bytes, trained as a whole on the first half of the demo's text. Its
experts then get adapters (PEFT's ``target_parameters``), which learn the second half. Every claim printed here is
asserted; the exit status is 1 if one does not hold.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from pathlib import Path

import peft
import smollm2
import torch
import transformers
from demo import Claims, Stages, compare_gradients, frozen_reference, largest_difference, measure, train
from torch import Tensor, nn

import lora_kernels as lk
from lora_kernels.benchmarks.measure import MAX_NULL, NOISE, Timings
from lora_kernels.cli._arguments import integer
from lora_kernels.cli._console import counters, progress
from lora_kernels.cli._training import Trainer, batch_at, held_out_loss, pack_tokens, split_blocks
from lora_kernels.text import mebibytes, table

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, LAYERS = 32, 4, 256, 128, 2
RANK, ALPHA, LR, WARMUP, BATCH, SEQ, SEED = 16, 32, 2e-3, 5, 4, 128, 0
BASE_STEPS, STEPS, ROUNDS = 60, 30, 7
MAX_GRADIENT_ERROR = 2e-4
MAX_LOSS_DIFFERENCE = 2e-3


def make_base() -> nn.Module:
    """A mixture over bytes, whose experts are multiplied by torch's ``grouped_mm``."""
    torch.manual_seed(SEED)
    config = transformers.Qwen3MoeConfig(
        vocab_size=256, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, moe_intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=EXPERTS,
        num_experts_per_tok=TOP_K, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    return model


def with_adapters(base: nn.Module) -> nn.Module:
    """PEFT's model around a copy of ``base``, with adapters on both parameters of all experts."""
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(SEED)
    return peft.get_peft_model(copy.deepcopy(base), config)


def idle_experts(model: nn.Module, tokens: Tensor) -> int:
    """How many experts, of those that ``tokens`` reach, have an adapter without a gradient."""
    reached: dict[nn.Module, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda module, args: reached.update({module: args[1].unique()}))
        for module in model.modules()
        if isinstance(module, peft.tuners.lora.layer.ParamWrapper) and module.parameter_name == "down_proj"
    ]
    model.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()
    for hook in hooks:
        hook.remove()
    idle = 0
    for wrapper, experts in reached.items():
        lora_B = wrapper.lora_B["default"].weight.grad  # [out, rank * experts]: the expert is the fastest index
        gets_gradient = lora_B.view(len(lora_B), -1, EXPERTS).abs().amax((0, 1)) > 0
        idle += len(experts) - int(gets_gradient[experts].sum())
    model.zero_grad()
    return idle


def plot(path: Path, stock: Trainer, fused: Trainer, times: Timings, saved: dict[str, int]) -> None:
    """Loss curves, step time and bytes saved for backward."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"frozen": "#9a9a9a", "PEFT": "#4477aa", "fused": "#cc6633"}
    figure, (curves, step_time, memory) = pyplot.subplots(1, 3, figsize=(14, 4), layout="constrained")
    figure.suptitle(f"{LAYERS} layers of {EXPERTS} experts {HIDDEN}x{INTERMEDIATE}, top {TOP_K}, LoRA r={RANK}, fp32")
    steps = range(1, stock.done + 1)
    curves.plot(steps, stock.losses, color=colours["PEFT"], linewidth=4, alpha=0.5, label="PEFT")
    curves.plot(steps, fused.losses, color=colours["fused"], linewidth=1.4, label="fused")
    curves.set(title=f"training loss (largest difference {largest_difference(stock, fused):.1e})", xlabel="step")
    curves.legend(frameon=False)
    for axis, title, values in (
        (step_time, "loss + backward, seconds", {name: times.median(name) for name in colours}),
        (memory, "saved for backward, MiB", {name: saved[name] / 2**20 for name in colours}),
    ):
        bars = axis.bar(list(values), list(values.values()), color=list(colours.values()), width=0.6)
        axis.bar_label(bars, fmt="%.3g", padding=2)
        axis.set(title=title)
        axis.margins(y=0.15)
    for axis in (curves, step_time, memory):
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> int:
    """Run the example and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=smollm2.DEFAULT_CACHE, help="default: %(default)s")
    parser.add_argument("--base-steps", type=integer(1), default=BASE_STEPS, help="default: %(default)s")
    parser.add_argument("--steps", type=integer(1), default=STEPS, help="of the adapters (default: %(default)s)")
    parser.add_argument("--rounds", type=integer(2), default=ROUNDS, help="default: %(default)s")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT and transformers about each other
    claims, stage = Claims(), Stages()
    device = torch.device("cpu")

    stage(f"a mixture over bytes, {options.base_steps} steps on the first half of the text")
    text, source = smollm2.load_text(options.cache)
    blocks = pack_tokens(list(text.encode()), SEQ)
    first, (blocks, held) = blocks[: len(blocks) // 2], split_blocks(blocks[len(blocks) // 2 :])
    tokens = batch_at(blocks, options.steps, BATCH, SEED)  # the first batch that is not trained on
    base = make_base()
    trainer = Trainer(base, first, batch=BATCH, lr=LR, warmup=WARMUP, seed=SEED)
    with progress(options.base_steps, "  step") as display:
        for done in range(1, options.base_steps + 1):
            display.update(done, f"loss {trainer.step():.4f}")
    print(f"  text: {source}\n  loss {trainer.losses[0]:.4f} -> {trainer.losses[-1]:.4f}")

    stage("adapters on the experts: stock PEFT, and the same with lk.patch")
    stock, fused = with_adapters(base), with_adapters(base)
    report = lk.patch(fused)
    print("\n".join(f"  {line}" for line in str(report).splitlines()))
    claims.require("every adapter is fused", bool(report.fused) and not report.kept)
    claims.check("largest relative error of a gradient", compare_gradients(stock, fused, tokens), MAX_GRADIENT_ERROR)
    claims.require("no expert that tokens reach is without a gradient", idle_experts(fused, tokens) == 0)

    stage(f"training, {options.steps} steps each, in turn")
    before = held_out_loss(stock, held, BATCH, device)
    trainers = [Trainer(m, blocks, batch=BATCH, lr=LR, warmup=WARMUP, seed=SEED) for m in (stock, fused)]
    lk.reset_stats()
    train(dict(zip(("PEFT", "fused"), trainers)), options.steps)
    claims.check("largest difference between the loss curves", largest_difference(*trainers), MAX_LOSS_DIFFERENCE)
    print("\n".join(f"  {line}" for line in counters()))
    after = {name: held_out_loss(m, held, BATCH, device) for name, m in (("PEFT", stock), ("fused", fused))}
    print(f"  held-out loss: before {before:.4f}, PEFT {after['PEFT']:.4f}, fused {after['fused']:.4f}")
    claims.require("training lowered the held-out loss", after["fused"] < before)

    stage(f"step time and memory, {options.rounds} interleaved rounds")
    models = {"frozen": frozen_reference(base), "PEFT": stock, "fused": fused}
    times, saved = measure(models, tokens, options.rounds)
    rows = [
        (
            "null: PEFT again" if name == "null" else name, f"{times.median(name):.3f} s",
            "" if name == "PEFT" else str(times.ratio(name, "PEFT")), mebibytes(saved[name]) if name in saved else "",
        )
        for name in times.seconds
    ]  # fmt: skip
    print(table(("", "step", "/ PEFT, median [quartiles]", "saved for backward"), rows, right=(1, 3)))
    if abs(times.ratio("null", "PEFT").median - 1) > MAX_NULL:
        print(f"  {NOISE}")
    claims.require("fused saves less for backward than PEFT", saved["fused"] < saved["PEFT"])

    stage("one pair of matrices per expert, in a file")
    adapter = options.cache / "moe-adapter"
    lk.save_adapter(fused, adapter, experts="2d")
    reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), adapter)
    difference = abs(held_out_loss(reloaded, held, BATCH, device) - after["fused"])
    claims.check("held-out loss of the adapter in stock PEFT, difference", difference, MAX_LOSS_DIFFERENCE)

    picture = options.cache / "moe.png"
    plot(picture, *trainers, times, saved)
    print(f"\npicture: {picture}, {stage.elapsed():.0f} s in all")
    if claims.failed:
        print(f"FAILED: {', '.join(claims.failed)}")
    return 1 if claims.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
