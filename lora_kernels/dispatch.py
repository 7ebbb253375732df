"""Which backend serves a call, and why: registration, order, overrides and counters."""

from __future__ import annotations

import contextlib
import contextvars
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from . import _native
from .reasons import Reason
from .spec import OpSpec, Verdict

BACKENDS = ("cuda", "triton", "cpu", "reference")
_ORDER = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}
_REFERENCE_ONLY = ("reference",)
any_autocast = torch._C._is_any_autocast_enabled
"""Several times cheaper than asking for one device."""

_SPECS: dict[str, OpSpec] = {}
_native_ops: dict[str, Callable[..., Any]] = {}
_public = torch.library.Library("lora_kernels", "DEF")
_native_lib = torch.library.Library("lora_kernels_native", "DEF")


class BackendStatus(NamedTuple):
    """``detail`` names what was loaded, or why the backend is not available."""

    available: bool
    detail: str


class Choice(NamedTuple):
    """The outcome of dispatch for one call."""

    backend: str
    """Who serves it: one of ``BACKENDS``."""
    schedule: str
    """The algorithm it runs."""
    reason: str
    """Why this one, and why none that is asked before it."""


# ---------------------------------------------------------------------------------------------- registration


def register(spec: OpSpec) -> OpSpec:
    """Defines ``torch.ops.lora_kernels.<name>`` and its native twin from ``spec``; returns ``spec``."""
    name = spec.name
    _SPECS[name] = spec

    _public.define(name + spec.schema, tags=(torch.Tag.pt2_compliant_tag,))
    _public.impl(name, _registered(spec), "CompositeExplicitAutograd")
    torch.library.register_fake(spec.qualname, spec.fake, lib=_public)
    if spec.autograd is not None:
        torch.library.register_autograd(
            spec.qualname, spec.autograd.backward, setup_context=spec.autograd.setup_context, lib=_public
        )
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        if spec.autocast:
            _public.impl(name, _autocast_rule(spec, device_type, key), key)

    # The native twin takes the schedule that dispatch chose as one more argument.
    arguments, returns = spec.schema.split(" -> ")
    _native_ops[name] = define_native(
        name, f"{arguments[:-1]}, str schedule) -> {returns}", lambda *args, **_: spec.fake(*args[:-1])
    )
    return spec


def _registered(spec: OpSpec) -> Callable[..., Any]:
    """What the registered op computes by. Autograd, which compares versions of what it has saved, is told what is
    written in place: it sees no kernel write.
    """
    written = [i for i, argument in enumerate(spec.schema.split(", ")) if "!)" in argument]
    if not written:
        return lambda *args: run(spec, *args)

    def compute(*args: Any) -> Any:
        result = run(spec, *args)
        torch.autograd.graph.increment_version([args[i] for i in written])
        return result

    return compute


def define_native(name: str, schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Defines ``torch.ops.lora_kernels_native.<name>``, for the extensions to implement; returns what calls it."""
    _native_lib.define(name + schema)
    torch.library.register_fake(f"lora_kernels_native::{name}", fake, lib=_native_lib)
    # _op is what OpOverload's own __call__ calls; that, and the way to it from torch.ops, are felt in a small layer.
    return getattr(torch.ops.lora_kernels_native, name).default._op


def native(spec: OpSpec) -> Callable[..., Any]:
    """What computes the op in an extension: its arguments, then the schedule."""
    return _native_ops[spec.name]


def _autocast_rule(spec: OpSpec, device_type: str, key: str) -> Callable[..., Any]:
    op = getattr(torch.ops.lora_kernels, spec.name).default
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def rule(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return op(*autocast_args(spec, device_type, args))

    return rule


def autocast_enabled(device_type: str) -> bool:
    """``torch.is_autocast_enabled``, False for devices that know no autocast (meta)."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def autocast_args(spec: OpSpec, device_type: str, args: tuple) -> tuple:
    """``args`` with the autocast positions cast to the active autocast dtype (float64 is left alone, as torch does)."""
    dtype = torch.get_autocast_dtype(device_type)
    cast = list(args)
    for i in spec.autocast:
        given = cast[i]
        if isinstance(given, list):
            cast[i] = [_cast_unless_float64(t, dtype) for t in given]
        elif given is not None:
            cast[i] = _cast_unless_float64(given, dtype)
    return tuple(cast)


def _cast_unless_float64(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return t if t.dtype == torch.float64 else t.to(dtype)


def specs() -> dict[str, OpSpec]:
    """All registered ops by name."""
    return dict(_SPECS)


# ------------------------------------------------------------------------------------------------- overrides


def _checked_backend(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}, expected one of {', '.join(BACKENDS)}")
    return name


_environment = os.environ.get("LORA_KERNELS_BACKEND", "")
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "lora_kernels_backend",
    default=_checked_backend(_environment, "LORA_KERNELS_BACKEND") if _environment else None,
)


class use_backend:
    """Makes every op of this thread run on one backend; ``None`` restores the normal order.

    Takes effect when called, like ``torch.set_grad_enabled``; as a context manager it restores the previous setting
    on exit. A call that the backend cannot serve raises ``RuntimeError`` with the reason. The environment
    variable ``LORA_KERNELS_BACKEND`` sets the default of every thread.

    Args:
        name: "cuda", "triton", "cpu", "reference" or None.

    Raises:
        ValueError: another name.
    """

    def __init__(self, name: str | None) -> None:
        self._token = _forced.set(None if name is None else _checked_backend(name, "use_backend"))

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc: object) -> None:
        _forced.reset(self._token)


def forced_backend() -> str | None:
    """The backend set by ``use_backend`` or the environment, None if there is none."""
    return _forced.get()


# ---------------------------------------------------------------------------------------------------- choice


def backends() -> dict[str, BackendStatus]:
    """Availability of every backend, in order of preference. On a machine with GPUs, the current one is asked."""
    from importlib.util import find_spec

    def extension(module: Any, error: str, found: str) -> BackendStatus:
        return BackendStatus(module is not None, found if module is not None else error)

    cuda = extension(_native.cuda, _native.cuda_error, "lora_kernels._cuda")
    if cuda.available and not torch.cuda.is_available():
        cuda = BackendStatus(False, "lora_kernels._cuda loads, but torch sees no CUDA device")
    elif cuda.available:
        problem = _native.cuda_problem(torch.device("cuda", torch.cuda.current_device()))
        if problem is not None:
            cuda = BackendStatus(False, "lora_kernels._cuda loads, but: {}: {}".format(*problem))
    served = ", ".join(name for name, spec in _SPECS.items() if "triton" in spec.kernels)
    if find_spec("triton") is None:
        triton = BackendStatus(False, str(Reason.TRITON_NOT_INSTALLED))
    elif not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        triton = BackendStatus(False, f"{Reason.NOT_INTERPRETED}; serves {served}")
    else:
        triton = BackendStatus(True, f"serves {served}")
    return {
        "cuda": cuda,
        "triton": triton,
        "cpu": extension(_native.cpu, _native.cpu_error, "lora_kernels._C"),
        "reference": BackendStatus(True, "plain torch"),
    }


def _ask(spec: OpSpec, backend: str, args: tuple) -> Verdict:
    """What ``backend`` says to this call."""
    kernel = spec.kernels.get(backend)
    if kernel is None:
        return _REFERENCE if backend == "reference" else _NO_KERNEL
    if (backend == "cpu" and _native.cpu is None) or (backend == "cuda" and _native.cuda is None):
        return _NOT_BUILT
    return kernel.supports(*args)


_REFERENCE = Verdict("torch", "plain torch code")
_NO_KERNEL = Verdict(None, Reason.NO_KERNEL)
_NOT_BUILT = Verdict(None, Reason.EXTENSION_NOT_BUILT)


def _device_type(args: tuple) -> str:
    """An op's first argument is a tensor or a list of them."""
    first = args[0]
    if not isinstance(first, torch.Tensor):
        first = first[0]
    return "cpu" if first.is_cpu else first.device.type  # where a call takes microseconds, the string counts


def _select(spec: OpSpec, args: tuple) -> tuple[str, Verdict, tuple[tuple[str, str], ...]]:
    """The backend that serves a call, its verdict, and the (backend, reason) pairs that were passed over on the way."""
    forced = _forced.get()
    device = _device_type(args)
    if forced is not None:
        if (
            forced != "reference"
            and forced not in _ORDER.get(device, ())
            and not (forced == "triton" and device == "cpu")
        ):
            raise RuntimeError(f"{spec.name}: backend {forced!r} was asked for, but the tensors are on {device!r}")
        verdict = _ask(spec, forced, args)
        if verdict.schedule is None:
            raise RuntimeError(
                f"{spec.name}: backend {forced!r} was asked for but cannot serve this call: {verdict.reason}"
            )
        return forced, verdict, ()

    passed: tuple[tuple[str, str], ...] = ()
    for backend in _ORDER.get(device, _REFERENCE_ONLY):
        verdict = _ask(spec, backend, args)
        if verdict.schedule is not None:
            return backend, verdict, passed
        passed += ((backend, verdict.reason),)
    raise AssertionError("the reference backend serves every call")


def choose(spec: OpSpec, args: tuple) -> Choice:
    """Pure dispatch: which backend serves a call, and why; nothing is counted."""
    backend, verdict, passed = _select(spec, args)
    reason = str(verdict.reason)
    if _forced.get() is not None:
        reason = f"asked for; {reason}"
    elif passed:
        reason += "; " + ", ".join(f"{name}: {why}" for name, why in passed)
    schedule: Any = verdict.schedule  # the verdict is a yes
    return Choice(backend, schedule, reason)


def explain(spec: OpSpec, args: tuple) -> Choice:
    """The choice for a call, with the schedule and reason of the launch itself where the backend can tell."""
    choice = choose(spec, args)
    kernel = spec.kernels.get(choice.backend)
    if kernel is None or kernel.explain is None:
        return choice
    verdict = kernel.explain(*args)
    schedule: Any = verdict.schedule
    return choice._replace(schedule=schedule, reason=f"{choice.reason}; {verdict.reason}")


def run(spec: OpSpec, *args: Any) -> Any:
    """Chooses a backend, counts the call and computes it. No autograd: that is the caller's."""
    backend, verdict, passed = _select(spec, args)
    counters = _counters.get()
    with _lock:
        counters["served"][spec.name, backend] += 1
        for _, reason in passed:
            counters["fallback"][spec.name, str(reason)] += 1
    kernel = spec.kernels.get(backend)
    if kernel is not None and (
        kernel.run is None or (kernel.run_schedules and verdict.schedule not in kernel.run_schedules)
    ):
        return (kernel.native or _native_ops[spec.name])(*args, verdict.schedule)
    device_type = _device_type(args)
    if any_autocast() and autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            return _compute(spec, kernel, verdict, args)
    if kernel is None and device_type == "meta":
        return spec.fake(*args)  # some references read numbers, and there are none
    return _compute(spec, kernel, verdict, args)


def _compute(spec: OpSpec, kernel: Any, verdict: Verdict, args: tuple) -> Any:
    """By the kernel's ``run``, or, without a kernel, by the reference."""
    return spec.reference(*args) if kernel is None else kernel.run(verdict.schedule, *args)


# -------------------------------------------------------------------------------------------------- counters

_lock = threading.Lock()
Counters = dict[str, defaultdict[tuple[str, str], int]]  # what ``stats`` tells of


def _zeros() -> Counters:
    return {"served": defaultdict(int), "fallback": defaultdict(int)}


_EVERYBODYS = _zeros()
_counters: contextvars.ContextVar[Counters] = contextvars.ContextVar("lora_kernels_counters", default=_EVERYBODYS)
"""Where this thread counts."""


def count_fallback(op: str, reason: Reason) -> None:
    """Records that a layer ran its own forward instead of ``op``."""
    with _lock:
        _counters.get()["fallback"][op, str(reason)] += 1


def count_served(op: str, backend: str) -> None:
    """Records a call that was computed outside ``run``."""
    with _lock:
        _counters.get()["served"][op, backend] += 1


def stats() -> dict[str, dict[tuple[str, str], int]]:
    """Counts since the last ``reset_stats``.

    Returns:
        ``{"served": {(op, backend): n}, "fallback": {(op, reason): n}}``. A fallback is a call that a faster path
        declined; reasons are the values of ``lora_kernels.Reason``.
    """
    with _lock:
        return {name: dict(counts) for name, counts in _counters.get().items()}


@contextlib.contextmanager
def own_stats(counters: Counters | None = None) -> Iterator[None]:
    """Counters of this thread's own, for calls that are nobody's; other threads count on. They begin at zero, or are
    those of a forward whose gradients autograd forms in a thread of its own.
    """
    token = _counters.set(counters or _zeros())
    try:
        yield
    finally:
        _counters.reset(token)


def own_counters() -> Counters | None:
    """Those of ``own_stats`` here, None outside of it."""
    counters = _counters.get()
    return None if counters is _EVERYBODYS else counters


def reset_stats() -> None:
    """Sets every counter of ``stats`` to zero."""
    with _lock:
        for counts in _counters.get().values():
            counts.clear()
