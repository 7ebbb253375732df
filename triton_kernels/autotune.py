"""Tiles by measurement instead of by table: off, unless the environment variable ``LORA_KERNELS_AUTOTUNE`` is 1.

A problem is then measured with each of its candidate tiles when it is first met, which takes about a second, and the
fastest is remembered in ``$XDG_CACHE_HOME/lora_kernels`` (``~/.cache``), in one JSON file per device name and version
of Triton and of this package: ``{problem: [rows, columns, depth, warps, stages]}``. Which tile wins can change the
rounding of a result, and two machines may then differ.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from lora_kernels._version import __version__

TileShape = tuple[int, ...]

_lock = threading.Lock()
_known: dict[Path, dict[str, TileShape]] = {}


def is_enabled(device: torch.device) -> bool:
    """Whether kernels on ``device`` may be measured now; a graph that is being captured takes what the table says."""
    if os.environ.get("LORA_KERNELS_AUTOTUNE") != "1" or device.type != "cuda":
        return False
    return not torch.cuda.is_current_stream_capturing()


def fastest(
    problem: str, tiles: Sequence[TileShape], prepare: Callable[[int], Callable[[], None]], device: torch.device
) -> int:
    """Index of the fastest of ``tiles``.

    Args:
        problem: what the answer depends on, in words.
        prepare: what to run, and how often one likes, to compute the problem with a tile of that index.
    """
    path = cache_path(device)
    with _lock:
        if path not in _known:
            _known[path] = _read(path)
        known = _known[path]
        if known.get(problem) not in tiles:
            times = [milliseconds(prepare(i)) for i in range(len(tiles))]
            known[problem] = tiles[times.index(min(times))]
            _write(path, known)
        return tiles.index(known[problem])


def milliseconds(run: Callable[[], None]) -> float:
    """Median time of ``run`` on the current device, the L2 cache empty."""
    from triton.testing import do_bench

    return do_bench(run, return_mode="median")


def cache_path(device: torch.device) -> Path:
    """The file for a device."""
    import triton

    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_kernels"
    name = f"{device_name(device)}-triton-{triton.__version__}-{__version__}"
    return folder / f"tiles-{re.sub(r'[^A-Za-z0-9.]+', '-', name)}.json"


def device_name(device: torch.device) -> str:
    """As the driver calls it."""
    return torch.cuda.get_device_name(device)


def _read(path: Path) -> dict[str, TileShape]:
    try:
        entries = json.loads(path.read_text())
        return {problem: tuple(map(int, tile)) for problem, tile in entries.items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"lora_kernels: {path} is not a cache of tiles and is ignored: {error}", stacklevel=2)
        return {}


def _write(path: Path, known: dict[str, TileShape]) -> None:
    """Replaces the file in one step, keeping what other processes have put there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**_read(path), **known}, indent=1)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"lora_kernels: tiles are not remembered: {error}", stacklevel=2)
