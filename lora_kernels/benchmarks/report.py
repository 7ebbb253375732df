"""Results as a table, as JSON with the environment, and as plots."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..text import mebibytes, table
from .cases import BASELINE, NULL, OURS, Result
from .light import Light

COLOURS = {"frozen": "#9a9a9a", BASELINE: "#4477aa", OURS: "#cc6633", "addmm": "#66aa77"}


def environment(device: torch.device, light: Light, clock: str) -> dict[str, Any]:
    """What the numbers depend on."""
    cpu = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "cpu": cpu, "cpu capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "python": platform.python_version(), "clock": clock,
        "measured Gflop/s": round(light.flops / 1e9, 1), "measured GB/s": round(light.bytes / 1e9, 1),
    }  # fmt: skip


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def render(results: Sequence[Result]) -> str:
    """A table per level and kind of work."""
    parts = []
    for level, what in dict.fromkeys((r.level, r.what) for r in results):
        chosen = [r for r in results if (r.level, r.what) == (level, what)]
        rows = [row for result in chosen for row in _rows(result)]
        header = (what, "", "ms", "PEFT / it [quartiles]", "/ frozen", "saved", "peak", "of light")
        parts.append(f"{level}\n{table(header, rows, right=(2, 5, 6, 7))}")
    parts.extend(_summary(results))
    if any(not r.quotable for r in results):
        parts.append("?: PEFT differs from itself by more than 2 %; this row is too noisy to quote")
    return "\n\n".join(parts)


def chosen(results: Sequence[Result]) -> str:
    """By case, which backends served its calls, by which schedules, and which faster paths were passed over."""
    lines = ["chosen here:"]
    for result in results:
        lines.append(f"  {result.level}: {result.name}, {result.what}: {', '.join(sorted(result.served)) or 'nothing'}")
        lines += [f"    {name}: {schedule}" for name, schedule in result.schedules.items()]
        lines += [f"    passed over: {what}" for what in sorted(result.declined)]
    return "\n".join(lines)


def _rows(result: Result) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, seconds in result.seconds.items():
        share = result.light_share if name == OURS else None
        rows.append((
            ("" if result.quotable else "? ") + result.name if name == next(iter(result.seconds)) else "",
            f"null: {name}" if name == NULL else name,
            f"{1e3 * seconds:.3f}",
            str(result.speedup[name]) if name in result.speedup else "1",
            f"{result.over_frozen[name].median:.3f}" if name in result.over_frozen else "",
            mebibytes(result.saved[name]) if name in result.saved else "",
            mebibytes(result.peak[name]) if name in result.peak else "",
            f"{100 * share:.0f} %" if share else "",
        ))  # fmt: skip
    return rows


def _summary(results: Sequence[Result]) -> list[str]:
    """Geometric mean and least of PEFT's time over ours, for the layers in fp32 whose null run was quiet."""
    lines = []
    for what in ("forward", "forward+backward"):
        for dropout in (0.0, 0.1):
            cases = [
                r
                for r in results
                if r.level == "layer" and r.what == what and r.shape["dropout"] == dropout and "float32" in r.name
            ]
            ratios = [r.speedup[OURS].median for r in cases if r.quotable]
            if ratios:
                mean = math.exp(statistics.fmean(map(math.log, ratios)))
                lines.append(
                    f"layer, fp32, {what}, dropout {dropout:g}: PEFT / fused has geometric mean {mean:.2f} and is at "
                    f"least {min(ratios):.2f}, over {len(ratios)} quiet cases of {len(cases)}"
                )
    return ["\n".join(lines)] if lines else []


def _common(results: Sequence[Result]) -> str:
    """What the names of these results have in common."""
    parts = [result.name.split(", ") for result in results]
    return ", ".join(part for part in parts[0] if all(part in others for others in parts))


def write_json(path: Path, results: Sequence[Result], env: dict[str, Any]) -> None:
    """Everything, for later."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": env, "results": [asdict(r) for r in results]}, indent=1) + "\n")


def plot(folder: Path, results: Sequence[Result], env: dict[str, Any], light: Light) -> list[Path]:
    """Overhead over rank and over tokens, speed-up by case, and a roofline; each where its results are there."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    title = f"{env['device']}, {env['cpu']}, {env['threads']} threads, torch {env['torch']}"
    written = []

    def save(figure: Any, name: str) -> None:
        figure.suptitle(title, fontsize=8, color="#666666")
        figure.savefig(folder / name, dpi=130)
        pyplot.close(figure)
        written.append(folder / name)

    for level, key, label in (("ranks", "rank", "rank"), ("tokens", "m", "tokens")):
        swept = [r for r in results if r.level == level]
        if swept:
            figure, axis = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
            for name in (BASELINE, "addmm", OURS):
                values = [100 * (r.over_frozen[name].median - 1) for r in swept]
                axis.plot([r.shape[key] for r in swept], values, "o-", color=COLOURS[name], label=name)
            axis.axhline(0, color=COLOURS["frozen"], linewidth=1)
            axis.set_xscale("log", base=2)
            axis.set(
                xlabel=label, ylabel="time over the frozen layer, %", title=f"forward + backward, {_common(swept)}"
            )
            axis.title.set_fontsize(9)
            axis.legend(frameon=False)
            save(figure, f"overhead_by_{level}.png")

    layers = [r for r in results if r.level == "layer" and "float32" in r.name]
    if layers:
        figure, axis = pyplot.subplots(figsize=(7.5, 0.28 * len(layers) + 1.2), layout="constrained")
        names = [f"{r.name.replace(', float32', '')}, {r.what}" for r in layers]
        ratios = [r.speedup[OURS] for r in layers]
        spread = [[q.median - q.low for q in ratios], [q.high - q.median for q in ratios]]
        colours = [COLOURS[OURS] if r.quotable else COLOURS["frozen"] for r in layers]
        axis.barh(names, [q.median for q in ratios], xerr=spread, color=colours, error_kw={"linewidth": 0.8})
        axis.axvline(1, color=COLOURS[BASELINE])
        axis.invert_yaxis()
        axis.margins(y=0.01)
        axis.tick_params(axis="y", labelsize=7)
        axis.set(xlabel="PEFT / fused, with quartiles; grey: too noisy to quote")
        save(figure, "layers.png")
    roofs = [r for r in results if r.flops and r.bytes and "float32" in r.name]
    if roofs:
        figure, axis = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
        intensity = [r.flops / r.bytes for r in roofs]
        lowest, highest = min(intensity) / 2, max(intensity) * 2
        ridge = light.flops / light.bytes
        roof = [min(i * light.bytes, light.flops) / 1e9 for i in (lowest, ridge, max(highest, ridge))]
        axis.plot([lowest, ridge, max(highest, ridge)], roof, color="#666666", label="measured copy and product")
        for name in (BASELINE, OURS):
            speeds = [r.flops / r.seconds[name] / 1e9 for r in roofs]
            axis.scatter(intensity, speeds, s=14, color=COLOURS[name], label=name, zorder=3)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set(xlabel="least FLOPs per least byte", ylabel="least FLOPs / time, Gflop/s")
        axis.legend(frameon=False)
        save(figure, "roofline.png")
    return written
