"""What ``lora-kernels check-gpu`` times: layers, decoding, prompts and a model's step, the most telling first.

Every layer is timed by replays of a CUDA graph, which is what the kernels take, and called from Python, which is what a
user of eager torch waits for.
"""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..support import winners
from ..text import one_line
from . import layers, models
from .cases import BASELINE, EVENT_SAMPLE_S, NULL, OURS, Case, Result, WrongResult, measure
from .measure import EventTimer, GraphTimer, Timer

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GRAPH, EAGER = "graph", "eager"
TIMERS: Mapping[str, Callable[[torch.device], Timer]] = {GRAPH: GraphTimer, EAGER: EventTimer}
ROUNDS, QUICK_ROUNDS = 11, 5
SLOWER = 1.02
"""Our time over PEFT's from which a case is listed as slower: what a quiet null run may differ by."""


class Layer(NamedTuple):
    """A LoRA layer to time; its default is what PEFT makes of a bfloat16 model."""

    m: int
    n: int
    k: int
    rank: int = 16
    dtype: torch.dtype = BF16
    fp32_adapters: bool = True
    dropout: float = 0.0
    autocast: bool = False
    compiled: bool = False
    quick: bool = False
    """Whether a short run times it, too."""


LAYERS = (
    Layer(8192, 4096, 4096, fp32_adapters=False, compiled=True, quick=True),
    Layer(8192, 4096, 4096, quick=True),
    Layer(8192, 4096, 4096, dropout=0.1),
    Layer(8192, 4096, 4096, autocast=True),
    Layer(2048, 4096, 4096, fp32_adapters=False, quick=True),
    Layer(2048, 4096, 4096, rank=4, fp32_adapters=False),
    Layer(2048, 4096, 4096, rank=64, fp32_adapters=False),
    Layer(2048, 4096, 4096, rank=128, fp32_adapters=False),
    Layer(4096, 14336, 4096, fp32_adapters=False),
    Layer(4096, 4096, 14336, fp32_adapters=False),
    Layer(2048, 1024, 4096, fp32_adapters=False),
    Layer(512, 4096, 4096, fp32_adapters=False, quick=True),
    Layer(128, 4096, 4096, fp32_adapters=False),
    Layer(512, 1536, 576),
    Layer(2048, 32001, 2048, fp32_adapters=False),
    Layer(2048, 4096, 4096, dtype=FP16, fp32_adapters=False),
)
DECODED = (
    Layer(1, 4096, 4096, fp32_adapters=False, quick=True),
    Layer(1, 14336, 4096, fp32_adapters=False),
    Layer(1, 4096, 14336, fp32_adapters=False),
    Layer(1, 4096, 4096, rank=64, fp32_adapters=False),
    Layer(1, 4096, 4096),
    Layer(8, 4096, 4096, fp32_adapters=False),
)
PROMPTS = (("prompt", 20), ("prefix", 20), ("mlp", 20))
PROMPT_HIDDEN = 2048


class ModelShape(NamedTuple):
    """A Llama, and the tokens of a step."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    batch: int
    tokens: int


MODEL = ModelShape(2048, 8192, 8, 32, 8, 32000, 8, 512)
"""Half the layers of Llama-3.2-1B."""
MODEL_KINDS = ((0.0, True, False), (0.1, True, True), (0.0, False, False))
"""Dropout, whether adapters are float32, and autocast."""


class Speeds(NamedTuple):
    """The best of a few runs, on this GPU, now."""

    copy: float
    """Bytes per second, read and written, of a copy far larger than the L2 cache."""
    products: dict[str, float]
    """FLOPs per second of a large square product by torch, by dtype."""

    def product(self, case: Case | Result) -> float:
        """Of the dtype that ``case`` names; 0 where none is known."""
        return next((rate for name, rate in self.products.items() if name in case.name), 0.0)

    def seconds(self, case: Case) -> float:
        """Time for the case's least work and least traffic, whichever takes longer; 0 where they are not known."""
        rate = self.product(case)
        return max(case.flops / rate, case.bytes / self.copy) if rate and case.flops else 0.0

    def shares(self, result: Result) -> dict[str, float]:
        """What ours reaches of each, counting its least work and traffic."""
        rate, seconds = self.product(result), result.seconds[OURS]
        if not (rate and result.flops):
            return {}
        return {"of product": result.flops / seconds / rate, "of copy": result.bytes / seconds / self.copy}


def measure_speeds(device: torch.device, timer: Timer, side: int = 8192, copied: int = 1 << 31) -> Speeds:
    """Times products of random matrices of ``side`` rows, and a copy that reads and writes ``copied`` bytes in all."""
    rounds, rates = 7, {}
    with torch.no_grad():
        for dtype in (BF16, FP16):
            a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            best = min(timer(lambda a=a, b=b: torch.mm(a, b), 1) for _ in range(rounds))  # type: ignore[misc]
            rates[str(dtype).removeprefix("torch.")] = 2 * side**3 / best
        source = torch.ones(copied // 2, dtype=torch.int8, device=device)
        target = torch.empty_like(source)
        best = min(timer(lambda: target.copy_(source), 1) for _ in range(rounds))
    return Speeds(copied / best, rates)


# ------------------------------------------------------------------------------------------------------ cases


class Planned(NamedTuple):
    """A case that is made when its turn comes."""

    name: str
    make: Callable[[], Case]
    timers: tuple[str, ...]
    quick: bool


def plan(device: torch.device, quick: bool = False) -> list[Planned]:
    """What is timed, or in a quick run; what a quick run holds comes first, because time may run out."""
    planned = []
    for layer in LAYERS:
        for what in ("forward", "forward+backward"):
            make = partial(_layer_case, device, layer, what)
            planned.append(Planned(_name_of(layer, what), make, (GRAPH, EAGER), layer.quick))
    for layer in DECODED:
        make = partial(_layer_case, device, layer, "decode")
        planned.append(Planned(_name_of(layer, "decode"), make, (GRAPH, EAGER), layer.quick))
    for method, rows in PROMPTS:
        make = partial(_prompt_case, device, method, rows)
        planned.append(Planned(f"{method}, {rows} rows", make, (EAGER,), method == PROMPTS[0][0]))
    for dropout, fp32_adapters, autocast in MODEL_KINDS:
        make = partial(model_case, device, MODEL, dropout, fp32_adapters=fp32_adapters, autocast=autocast)
        name = f"model step, dropout {dropout:g}" + ", fp32 adapters" * fp32_adapters + ", autocast" * autocast
        planned.append(Planned(name, make, (EAGER,), dropout == 0.0 and fp32_adapters))
    return sorted((item for item in planned if item.quick or not quick), key=lambda item: not item.quick)


def _name_of(layer: Layer, what: str) -> str:
    kind = str(layer.dtype).removeprefix("torch.") + ", fp32 adapters" * layer.fp32_adapters
    kind += ", autocast" * layer.autocast
    return f"{what}, {layer.m}x{layer.n}x{layer.k}, r={layer.rank}, {kind}, dropout {layer.dropout:g}"


def _layer_case(device: torch.device, layer: Layer, what: str) -> Case:
    return layers.make_case(
        device, layer.m, layer.n, layer.k, rank=layer.rank, dropout=layer.dropout, what=what, dtype=layer.dtype,
        adapter_dtype=FP32 if layer.fp32_adapters else layer.dtype, compiled=layer.compiled and what != "decode",
        autocast=layer.autocast, alternatives=winners.candidates(device) if device.type == "cuda" else ("reference",),
        level="decode" if what == "decode" else "layer",
    )  # fmt: skip


def _prompt_case(device: torch.device, method: str, rows: int) -> Case:
    from . import prompts  # imports PEFT

    (case,) = prompts.prompt_cases([method], [PROMPT_HIDDEN], [rows], device)
    return case


def model_case(device: torch.device, shape: ModelShape, dropout: float, *, fp32_adapters: bool, autocast: bool) -> Case:
    """A bfloat16 Llama's training step: forward, backward, AdamW on the adapters."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, vocab_size=shape.vocabulary,
        max_position_embeddings=2 * shape.tokens,
    )  # fmt: skip
    with device:
        base = AutoModelForCausalLM.from_config(config, dtype=BF16)
    found = models.variants(base, dropout, fp32_adapters=fp32_adapters)
    tokens = torch.randint(shape.vocabulary, (shape.batch, shape.tokens), device=device)

    def loss(model: nn.Module) -> Tensor:
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    def within() -> contextlib.AbstractContextManager:
        return torch.autocast(device.type, BF16) if autocast else contextlib.nullcontext()

    with within():
        check_model(found, loss)
    # Backward must run through all layers of the frozen model, too.
    base.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    steps = {name: models.training_step(model, partial(loss, model)) for name, model in found.items()}
    constants = [t for model in found.values() for t in [*model.parameters(), *model.buffers()]]
    kind = "bfloat16" + ", fp32 adapters" * fp32_adapters + ", autocast" * autocast
    title = f"Llama of {shape.layers}x{shape.hidden}, {shape.batch}x{shape.tokens} tokens, r={models.RANK}, {kind}"
    forwards = {name: partial(loss, found[name]) for name in ("frozen", BASELINE, OURS)}
    return Case("model", f"{title}, dropout {dropout:g}", "step with AdamW", steps, forwards, constants, within=within)


def check_model(found: Mapping[str, nn.Module], loss: Callable[[nn.Module], Tensor]) -> None:
    """Loss and adapters' gradients of every variant are as near to float32's as PEFT's, without dropout.

    By their norms: twice PEFT's distance and four ulp are allowed.

    Raises:
        WrongResult: one is further away.
    """

    def results(model: nn.Module) -> list[Tensor]:
        model.eval()
        value = loss(model)
        gradients = torch.autograd.grad(value, [p for p in model.parameters() if p.requires_grad])
        model.train()
        return [value.detach().float(), *(g.float() for g in gradients)]

    with torch.autocast(next(found[BASELINE].parameters()).device.type, enabled=False):
        exact = results(copy.deepcopy(found[BASELINE]).float())
    bound = results(found[BASELINE])
    for name in found.keys() - {BASELINE, "frozen"}:
        for i, (value, theirs, reference) in enumerate(zip(results(found[name]), bound, exact, strict=True)):
            allowed = 2 * (theirs - reference).norm() + 4 * torch.finfo(BF16).eps * reference.norm()
            if not (value - reference).norm() <= allowed:
                raise WrongResult(f"{name}: {'the loss' if i == 0 else f'gradient {i}'} is not what PEFT computes")


# -------------------------------------------------------------------------------------------------------- run


class Failure(NamedTuple):
    """Something that was not as it should be, and the command that shows it again."""

    what: str
    message: str
    repro: str


@dataclass
class Timed:
    """What ``run`` found."""

    speeds: Speeds | None = None
    results: list[tuple[str, Result]] = field(default_factory=list)
    """With the timer's name."""
    failures: list[Failure] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Cases that there was no time for."""

    def slower(self) -> list[str]:
        """Cases in which ours took longer than PEFT, beyond what a quiet machine differs by."""
        return [
            f"{r.name}, {r.what}, {timer}: {1 / r.speedup[OURS].median:.3f} of PEFT's time"
            for timer, r in self.results
            if r.quotable and 1 / r.speedup[OURS].median > SLOWER
        ]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        rows = []
        for timer, result in self.results:
            shares = self.speeds.shares(result) if self.speeds else {}
            rows.append({"timer": timer, **asdict(result), "quotable": result.quotable, **shares})
        return {
            "speeds": self.speeds._asdict() if self.speeds else None, "results": rows, "slower": self.slower(),
            "left_out": self.left_out,
        }  # fmt: skip


def run(
    device: torch.device, timers: Mapping[str, Callable[[torch.device], Timer]], planned: Sequence[Planned],
    has_time: Callable[[], bool], *, rounds: int = ROUNDS, say: Callable[[str], None] = print,
    speeds: Callable[[torch.device, Timer], Speeds] = measure_speeds,
) -> Timed:  # fmt: skip
    """Times what was planned while there is time; what raises is a failure, and the rest goes on.

    Args:
        timers: by name, what makes a timer; a new one for each case, because it holds the case's graphs.
        has_time: asked before each case.
        say: gets a line per result.
        speeds: how the GPU's own are measured.
    """
    found = Timed()
    for item in planned:
        if not has_time():
            found.left_out.append(item.name)
            continue
        repro = f"lora-kernels check-gpu --only {item.name!r}"
        try:
            if found.speeds is None:
                found.speeds = speeds(device, timers[EAGER](device))
            case = item.make()
        except Exception as error:  # whatever one case raises, the others are worth timing
            found.failures.append(Failure(item.name, _message(error), repro))
            continue
        for i, name in enumerate(item.timers):
            once = case if i == 0 else replace(case, forwards={})
            try:
                result = measure(
                    once, rounds, timers[name](device), device, found.speeds.seconds, sample_s=EVENT_SAMPLE_S
                )
            except Exception as error:
                found.failures.append(Failure(f"{item.name}, {name}", _message(error), repro))
                continue
            found.results.append((name, result))
            say(_line(result, name))
        del case
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def _line(result: Result, timer: str) -> str:
    others = ", ".join(
        f"{name} {ratio.median:.3f}" for name, ratio in result.speedup.items() if name not in (OURS, NULL)
    )
    frozen = f", ours / frozen {result.over_frozen[OURS].median:.3f}" if result.over_frozen else ""
    return (
        f"{result.name}, {result.what}, {timer}: {1e6 * result.seconds[OURS]:.1f} us, PEFT / ours "
        f"{result.speedup[OURS].median:.3f} (null {result.speedup[NULL].median:.3f}){frozen}; PEFT / {others or '-'}"
    )


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)[:500]}"


def selected(planned: Sequence[Planned], text: str | None) -> Iterator[Planned]:
    """Those whose name contains ``text``; all without one."""
    return (item for item in planned if text is None or text in item.name)
