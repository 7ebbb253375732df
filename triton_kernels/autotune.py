"""Tiles by measurement instead of by table: off, unless the environment variable ``LORA_KERNELS_AUTOTUNE`` is 1.

A problem is then measured with each of its candidate tiles when it is first met, which takes about a second, and the
fastest is remembered in ``$XDG_CACHE_HOME/lora_kernels`` (``~/.cache``), in one JSON file per device name and version
of Triton and of this package: ``{problem: [rows, columns, depth, warps, stages]}``. Which tile wins can change the
rounding of a result, and two machines may then differ.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from lora_kernels import measured

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
            _known[path] = measured.read(path, "tiles", _tile)
        known = _known[path]
        if known.get(problem) not in tiles:
            times = [milliseconds(prepare(i)) for i in range(len(tiles))]
            known[problem] = tiles[times.index(min(times))]
            measured.write(path, "tiles", known, _tile)
        return tiles.index(known[problem])


def milliseconds(run: Callable[[], None]) -> float:
    """Median time of ``run`` on the current device, the L2 cache empty."""
    from triton.testing import do_bench

    return do_bench(run, return_mode="median")


def cache_path(device: torch.device) -> Path:
    """The file for a device."""
    import triton

    return measured.file_of("tiles", device_name(device), f"triton-{triton.__version__}")


def device_name(device: torch.device) -> str:
    """As the driver calls it."""
    return torch.cuda.get_device_name(device)


def _tile(sizes: Sequence[int]) -> TileShape:
    return tuple(map(int, sizes))
