"""Hydra's and OmegaConf's errors in the words of who typed the command. Knows their messages; composes only to name the nearest key."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf

from rlhf.cli.compose import conf_dir, search_in
from rlhf.config import SETTINGS, TARGET, nearest

MEANT = {"learning_rate": "lr", "max_epochs": "epochs", "num_epochs": "epochs", "train_batch_size": "batch_size"}
"""Other names of what some keys end with."""


def explain(error: Exception, primary: str, folder: Path | None = None) -> str:
    """Hydra's and OmegaConf's errors as one sentence that names the key and the nearest right one. `primary` is the file composed,
    `folder` what `--config-dir` names."""
    text = str(error)
    cause = str(error.__cause__ or "")
    if isinstance(error, OverrideParseException):
        return _unread(str(getattr(error, "override", "")), _first_line(text))
    if isinstance(error, MissingConfigException) and "Available options" in text:
        missing = re.search(r"Could not find '([^']*)'", text)
        return _no_such_option(missing.group(1) if missing else "", folder)
    several = re.match(r"(?:Ambiguous value for argument|Sweep parameters) '(\S+?)=(.*?)'(?: requires --multirun|\n|$)", text)
    if several:
        values = several.group(2)
        whole = "" if "(" in values or "@" in several.group(1) else f", or write {several.group(1)}=[{values}] for one value that is a list"
        return f"{several.group(1)}={values} names several values: add -m for a run with each{whole}"
    key = re.search(r"Could not override '([^']*)'|^Override (\S+?)=.* looks like a config group override", text)
    if key:
        return _unknown_key(key.group(1) or key.group(2), primary, folder)
    group = re.search(r"In '[^']*': Could not find '([^']*)'|Could not override '([^']*)'\. No match in the defaults list", text)
    if group:
        return f"{group.group(1) or group.group(2)}: no such group or option; rlhf {_as_typed(primary, folder)} --help lists them"
    if isinstance(error, ConfigCompositionException) and cause:
        return _first_line(cause)
    return " ".join(text.split())


def _no_such_option(name: str, folder: Path | None) -> str:
    """`name` is a group and an option of it, which may lie in a folder of the group: experiment/dschat/opt-13b. Only Hydra's own groups lie
    in a folder themselves."""
    group, _, option = name.partition("/") if not name.startswith("hydra/") else name.rpartition("/")
    inside, _, last = option.rpartition("/")
    places = [place / group / inside for place in (conf_dir(), folder) if place is not None]
    options = sorted({(Path(inside) / file.stem).as_posix() for place in places for file in place.glob("*.yaml")})
    longer = [one for one in options if last and last in one]
    hint = f" (did you mean {' or '.join(map(repr, longer))}?)" if longer else nearest(option, options)
    return f"{group}={option}: no such option{hint}" + (f"; there are {', '.join(options)}" if options else "")


def _unread(word: str, said: str) -> str:
    """A word that Hydra's grammar does not take, and how to write what it may have meant."""
    key, equals, value = word.partition("=")
    if "LexerNoViableAltException" in said:
        said = "it has a character that is read between quotes only"
    hint, (section, _, name) = "", key.rpartition(".")
    if equals and section and "/" in name:
        hint = f"; a name with / is given in a mapping: {section}={{{name}: {value}}}"
    elif equals and value and not re.match(r"[\[{'\"]|\w+\(", value) and not value.endswith(","):
        text = '"' + value.replace('"', '\\"') + '"'
        hint = f"; text is written between quotes, and these between the shell's: {key}={shlex.quote(text)}"
    elif equals and "quotes" in said:
        hint = '; text within a list or mapping is quoted there, as in ["a b.jsonl"]'
    return f"cannot read {word!r} as key=value: {said}{hint}"


def _unknown_key(key: str, primary: str, folder: Path | None) -> str:
    """Names the nearest key of the composed config, or the nearest group."""
    key = key.lstrip("+~")
    search_in(folder)
    cfg = hydra.compose(config_name=primary, return_hydra_config=True)
    GlobalHydra.instance().clear()
    verb = _as_typed(primary, folder)
    groups = [name for name in cfg.hydra.runtime.choices if not name.startswith("hydra/")]
    in_package = [name for name in groups if name.startswith(f"{key}@")]  # `model` where `model@actor.model` is meant
    if "@" in key or "/" in key or in_package:
        similar = nearest(in_package[0] if in_package else key, groups)
        return f"{key}: no such group in rlhf {verb}{similar}; rlhf {verb} --help lists them"
    composed: Any = OmegaConf.to_container(cfg, resolve=False)
    known = list(_keys(composed, ""))
    if isinstance(_node(composed, key), dict):  # a mapping that is given names it does not have yet, such as a function's keywords
        return f"{key}: new keys in it need a plus: +{key}={{NAME: VALUE}}, or +{key}.NAME=VALUE"
    parent, _, end = key.rpartition(".")
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == parent}
    close = difflib.get_close_matches(end, siblings, n=1)
    if not close and _takes_any(composed, parent):
        return f"{key}: {parent} has no such key; a new one needs a plus: +{key}=VALUE"
    elsewhere = [name for name in known if name not in siblings.values() and not f"{key}.".startswith(f"{name}.")]
    similar = _same_end(key, known) or nearest(key, [siblings[name] for name in close]) or nearest(key, elsewhere)
    return f"{key}: no such key{similar}; rlhf {verb} --cfg job shows them all"


def _node(composed: dict[str, Any], key: str) -> Any:
    """What a key holds; None where there is none."""
    node: Any = composed
    for name in key.split("."):
        node = node.get(name) if isinstance(node, dict) else None
    return node


def _takes_any(composed: dict[str, Any], key: str) -> bool:
    """Whether names of the user's may be added to a section: an entry of callbacks, a keyword of a class, a flag of sbatch."""
    node = _node(composed, key)
    return isinstance(node, dict) and key.partition(".")[0] != "hydra" and not str(node.get(TARGET, "")).startswith(SETTINGS)


def _same_end(key: str, known: Iterable[str]) -> str:
    """The key of the same section that ends as this one is meant to."""
    section, _, end = key.split(".")[0], *key.rpartition(".")[1:]
    same = [name for name in known if name.startswith(f"{section}.") and name.rpartition(".")[2] == MEANT.get(end, end)]
    return f" (did you mean {same[0]!r}?)" if same else ""


def _as_typed(primary: str, folder: Path | None) -> str:
    """The words behind `rlhf` that start from a file: those of `bench_step` are `bench step`, those of a user's file name its folder."""
    return primary.replace("_", " ") if (conf_dir() / f"{primary}.yaml").is_file() else f"{primary} --config-dir {shlex.quote(str(folder))}"


def _keys(node: Any, prefix: str) -> Iterable[str]:
    for name, value in node.items() if isinstance(node, dict) else ():
        key = f"{prefix}.{name}" if prefix else str(name)
        yield key
        yield from _keys(value, key)


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "the configuration cannot be composed"
