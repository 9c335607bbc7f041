"""From a resolved configuration to typed settings, and the error that says what a user got wrong.

Knows types; knows no values, no Hydra and no torch. What holds across groups stands in `rules`.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
import typing
from collections.abc import Iterable, Mapping
from types import SimpleNamespace, UnionType
from typing import Any

TARGET = "_target_"
ENTRY = "entry"
"""Key of a verb from outside this package: the import path of what it runs."""
SETTINGS = "rlhf.settings."

TOP_LEVEL = (
    "verb", "seed", "run_dir", "resume", "steps", "experiment",
    "data", "trainer", "launcher", "logger", "callbacks", "hardware", "plan",
    "actor", "critic", "ref", "reward", "sft", "rm", "dpo", "ppo", "rollout", "tp", "evaluation", "bench", "report", "checkpoint", "chat",
)  # fmt: skip
"""Every key that a verb or a sweep may have at the top: another one would be read by nobody."""
LARGEST_SEED = 2**32 - 1
"""numpy's limit."""
LARGEST = 3.4e38
"""fp32's limit: what is larger becomes infinite, or an error in the middle of a step."""
LARGEST_COUNT = 2**53
"""What a float still counts one by one; Python's ranges and PyTorch's sizes end not far above."""


class UserError(ValueError):
    """The input is refused: one sentence that says what is wrong and what to do. The command ends with exit code 2."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing where no choice is close."""
    match = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" (did you mean {match[0]!r}?)" if match else ""


def locate(path: str) -> Any:
    """The object at an import path such as `package.module.name`.

    Raises:
        UserError: nothing can be imported from there, whatever the module raises.
    """
    module, _, name = path.rpartition(".")
    if not module:
        raise UserError(f"cannot import {path!r}: an import path is module.name")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"cannot import {path!r}: {error}") from error
    except Exception as error:
        raise UserError(f"cannot import {path!r}: {module} raised {type(error).__name__}: {error}") from error


def build(node: Any, key: str = "") -> Any:
    """Turns a resolved config into settings: a mapping with a `_target_` in rlhf.settings becomes that dataclass, any other mapping a
    namespace, a list a list. Mappings with another target (callbacks, loggers) stay mappings, for Hydra to instantiate.

    Raises:
        UserError: an unknown, missing or mistyped key, or a value out of range; the message names the full key.
    """
    if isinstance(node, Mapping):
        if TARGET in node:
            return _build_target(node, key)
        return SimpleNamespace(**{str(name): build(value, _join(key, str(name))) for name, value in node.items()})
    if isinstance(node, list | tuple):
        return [build(value, f"{key}[{i}]") for i, value in enumerate(node)]
    return node


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _build_target(node: Mapping[str, Any], key: str) -> Any:
    if not str(node[TARGET]).startswith(SETTINGS):
        return dict(node)  # importing it may take seconds; it is looked at where it is built
    target: Any = locate(node[TARGET])
    hints = typing.get_type_hints(target)
    names = [f.name for f in dataclasses.fields(target)]
    for name in node:
        if name != TARGET and name not in names:
            raise UserError(f"{_join(key, name)}: no such key{nearest(name, names)}")
    values = {}
    for name in names:
        where = _join(key, name)
        if name not in node or node[name] == "???":
            raise UserError(f"{where}: a value is missing")
        value, kind = node[name], hints[name]
        plain = typing.get_origin(kind) is dict
        values[name] = dict(value) if plain and isinstance(value, Mapping) else build(value, where)
        if not fits(values[name], kind):
            large = isinstance(value, int | float) and LARGEST_COUNT < abs(value) < math.inf
            raise UserError(f"{where}: expected {_kind_name(kind)}, got {value!r}{', which is too large' if large else ''}")
        if kind is float and values[name] is not None:
            values[name] = float(values[name])  # type: ignore[arg-type]
    try:
        return target(**values)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(_join(key, str(error))) from error


def fits(value: Any, kind: Any) -> bool:
    """Whether a value from YAML can stand for an annotation; an int is a float; a bool, NaN or what fp32 does not hold is no number."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin in (typing.Union, UnionType):
        return any(fits(value, option) for option in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(fits(item, arguments[0]) for item in value)
    if origin is tuple:
        kinds = arguments[:1] * len(value) if isinstance(value, tuple) and arguments[-1] is ... else arguments
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(fits, value, kinds))
    if origin in (dict, Mapping):
        return isinstance(value, origin) and all(all(map(fits, pair, arguments)) for pair in value.items())
    if kind in (int, float):
        is_number = isinstance(value, kind if kind is int else int | float) and not isinstance(value, bool)
        return is_number and abs(value) <= (LARGEST_COUNT if kind is int else LARGEST)
    return isinstance(value, kind)


def _kind_name(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return "one of " + ", ".join(str(option) for option in arguments)
    if origin in (typing.Union, UnionType):
        return " | ".join(map(_kind_name, arguments))
    if kind is type(None):
        return "null"
    return kind.__name__ if isinstance(kind, type) and not arguments else str(kind)
