"""``adapter_config.json``: what a file may say, checked field by field, and what is written for a set of layers."""

from __future__ import annotations

import json
import math
import re
import reprlib
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..modules.base import scaling_of
from .inject import Targets

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_BEYOND_PLAIN_LORA = (
    "alora_invocation_tokens", "arrow_config", "fan_in_fan_out", "kasa_config", "layer_replication",
    "lora_bias", "modules_to_save", "monteclora_config", "target_parameters", "trainable_token_indices",
    "use_bdlora", "use_dora", "use_qalora", "velora_config",
)  # fmt: skip
"""Fields of PEFT's config that, if set, mean more than A and B on linear layers."""
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base weights alone; others need a base that was changed with them."""
_WITHOUT_EFFECT = (
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode",
    "loftq_config", "lora_ga_config", "megatron_config", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
)  # fmt: skip
"""Fields that say nothing about what a loaded adapter computes, or nothing without one of those above."""
_DEFAULTS: dict[str, Any] = {
    "lora_dropout": 0.0, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "target_modules": None,
    "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None, "bias": "none",
    "init_lora_weights": True,
}  # fmt: skip
_MAX_RANK = 2**31 - 1

_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = _shorten.maxlong = 80


# --------------------------------------------------------------------------------------------------- reading


def read_config(file: Path) -> dict[str, Any]:
    """The LoRA config in ``file``, complete and with values of the right types.

    Raises:
        FileNotFoundError, OSError: the file is not there or cannot be read.
        ValueError: anything else; the message names the file and the field.
    """
    if file.is_dir():
        raise ValueError(f"load_adapter: {file} is a directory, expected a file")
    if not file.exists():
        raise FileNotFoundError(f"load_adapter: {file} does not exist")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise OSError(error.errno, f"load_adapter: cannot read it: {error.strerror}", str(file)) from None
    except RecursionError:
        raise ValueError(f"load_adapter: {file} is not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"load_adapter: {file} is not JSON: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"load_adapter: {file} is not of a LoRA adapter, its peft_type is {_shorten.repr(kind)}")
    config = {**_DEFAULTS, **config}
    for name, (fits, expected) in _FIELDS.items():
        if not fits(config.get(name)):
            raise _misfit(file, name, config.get(name), expected)
    for name, fits, expected in (
        ("rank_pattern", _is_rank, f"a number, whole and from 1 to {_MAX_RANK}"),
        ("alpha_pattern", _is_number, "a number that is finite"),
    ):
        for pattern, value in config[name].items():
            _check_expression(file, name, pattern, rf"(.*\.)?({pattern})$")
            if not fits(value):
                raise _misfit(file, f"{name}: {pattern}", value, expected)
    for name in ("target_modules", "exclude_modules"):
        if isinstance(config[name], str):
            _check_expression(file, name, config[name], config[name])
    for pattern in _listed(config["layers_pattern"]):
        _check_expression(file, "layers_pattern", pattern, rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.")
    unknown = sorted(name for name in config.keys() - known_fields() if config[name])
    if unknown:
        warnings.warn(
            f"load_adapter: {file}: {', '.join(unknown)} is of a newer PEFT than this reader knows, and ignored",
            stacklevel=3,
        )
    return config


def known_fields() -> set[str]:
    """The fields of PEFT's ``LoraConfig`` about which it is known what they mean for a loaded adapter."""
    return {*_BEYOND_PLAIN_LORA, *_WITHOUT_EFFECT, *_DEFAULTS, *_FIELDS}


def refuse_more_than_lora(config: Mapping[str, Any], file: Path) -> None:
    """Raises ValueError for a config under which PEFT computes more than LoRA on linear layers."""
    more = {field: config[field] for field in _BEYOND_PLAIN_LORA if config.get(field)}
    if config["bias"] != "none":
        more["bias"] = config["bias"]
    if config["init_lora_weights"] not in _HARMLESS_INITS:
        more["init_lora_weights"] = config["init_lora_weights"]
    if more:
        fields = ", ".join(f"{field}={_shorten.repr(value)}" for field, value in more.items())
        raise ValueError(f"load_adapter: {file}: {fields} is not plain LoRA; load it with PEFT and use lk.patch")


def targets_of(config: Mapping[str, Any], file: Path) -> Targets:
    """The layers that the config chooses."""
    if not config["target_modules"]:
        raise _misfit(file, "target_modules", config["target_modules"], "the layers to adapt")
    return Targets(
        config["target_modules"], config["r"], config["lora_alpha"],
        config["rank_pattern"], config["alpha_pattern"],
        config["exclude_modules"], config["layers_to_transform"], config["layers_pattern"],
    )  # fmt: skip


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MAX_RANK


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the floats
        return False


def _is_names(value: Any) -> bool:
    return value is None or isinstance(value, str) or (_is_list_of(value, str))


def _is_indices(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return value is None or all(isinstance(i, int) and not isinstance(i, bool) for i in items)


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


_NAMES = "a name, a list of names or null"
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, f"a number, whole and from 1 to {_MAX_RANK}"),
    "lora_alpha": (_is_number, "a number that is finite"),
    "lora_dropout": (lambda value: _is_number(value) and 0 <= value < 1, "a number in [0, 1)"),
    "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
    "rank_pattern": (lambda value: isinstance(value, dict), "an object"),
    "alpha_pattern": (lambda value: isinstance(value, dict), "an object"),
    "target_modules": (_is_names, _NAMES),
    "exclude_modules": (_is_names, _NAMES),
    "layers_pattern": (_is_names, _NAMES),
    "layers_to_transform": (_is_indices, "an index, a list of indices or null"),
}
"""Field -> whether a value fits, and what would."""


def _misfit(file: Path, field: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"load_adapter: {file}: {field} is {_shorten.repr(value)}, expected {expected}")


def _check_expression(file: Path, field: str, written: str, used: str) -> None:
    """``used``: the expression into which PEFT's rules put ``written``."""
    try:
        re.compile(used)
    except (re.error, OverflowError, RecursionError) as error:
        shown, why = _shorten.repr(written), str(error) or type(error).__name__
        raise ValueError(f"load_adapter: {file}: {field}: {shown} is no regular expression: {why}") from None


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []


# --------------------------------------------------------------------------------------------------- writing


def describe(ranks: Mapping[str, int], alphas: Mapping[str, float], modules: Iterable[str]) -> dict[str, Any]:
    """The fields by which PEFT chooses exactly the layers of ``ranks`` among ``modules``, with these numbers."""
    r, rank_pattern = _default_and_pattern(ranks)
    alpha, alpha_pattern = _default_and_pattern(alphas)
    return {
        "r": r, "rank_pattern": rank_pattern, "lora_alpha": alpha, "alpha_pattern": alpha_pattern,
        "target_modules": _target_modules(ranks, modules),
    }  # fmt: skip


def alpha_of(rank: int, alpha: float, use_rslora: bool, scaling: float) -> float:
    """The alpha that gives ``scaling``, which may have been changed since it was made of ``alpha``."""
    if math.isclose(scaling_of(rank, alpha, use_rslora), scaling, rel_tol=1e-9):
        return alpha
    return scaling / scaling_of(rank, 1.0, use_rslora)


def _default_and_pattern(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The most common value, and PEFT's pattern for the others: by last name where that says it, else by
    whole name.
    """
    default = Counter(values.values()).most_common(1)[0][0]
    by_leaf: dict[str, set[float]] = {}
    for name, value in values.items():
        by_leaf.setdefault(_leaf(name), set()).add(value)
    pattern = {}
    for name, value in values.items():
        if value != default:
            uniform = len(by_leaf[_leaf(name)]) == 1
            pattern[re.escape(_leaf(name)) if uniform else "^" + re.escape(name)] = value
    return default, pattern


def _target_modules(layers: Collection[str], modules: Iterable[str]) -> list[str] | str:
    """The last names of the layers where they choose these layers and no other module, else their whole names, which
    are also ends of names; where those choose another module, too, a regular expression.
    """
    wanted, modules = set(layers), list(modules)
    for names in ({_leaf(name) for name in layers}, wanted):
        if {module for module in modules if _ends_with_one_of(module, names)} == wanted:
            return sorted(names)
    return "|".join(re.escape(name) for name in sorted(wanted))


def _ends_with_one_of(module: str, names: Collection[str]) -> bool:
    parts = module.split(".")
    return any(".".join(parts[start:]) in names for start in range(len(parts)))


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
