"""Writes docs/configuration.md from conf/ and rlhf/settings: `python docs/make_configuration.py`.

Knows YAML files and the syntax of dataclasses; imports nothing of rlhf and composes nothing. Comments in conf/ and docstrings of fields
are the text, so that the page says what the files say.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
PAGE = ROOT / "docs" / "configuration.md"
FEW = 5
"""An option that sets more keys than these is described by its comment alone."""
LONG = 120
"""A value with more characters is left to its file."""

SAID_HERE = {
    "seed": ("int", "Of everything random."),
    "run_dir": ("str", "The run directory. It must not hold another run."),
    "resume": ("bool", ""),
    "steps": ("list[str]", "Steps of a pipeline that are run, in this order."),
    "checkpoint": ("str | null", "The run directory, or folder in HF layout, that is talked to."),
    "chat.server.host": ("str", "Address that the server listens on; 0.0.0.0: all of this machine's."),
    "chat.device": ("auto or cpu or cuda", "auto: a GPU if there is one."),
}
"""Type and meaning of keys outside the groups that have no settings class, or whose field has no docstring."""

INTRODUCTION = """\
# Configuration

Made by `docs/make_configuration.py` from `conf/` and `rlhf/settings/`; change those, then run it.

A verb is a file of `conf/`, which lists its groups. An option of a group is a file in the group's folder: `GROUP=OPTION`, or
`GROUP@PLACE=OPTION` for a group that a verb uses at several places (a model for each role). A key of the composed configuration is
`PLACE.KEY=VALUE`. `rlhf VERB --cfg job` prints the whole. Values live in `conf/` alone, types and ranges in `rlhf/settings/`.
"""


@dataclass(frozen=True)
class Field:
    """One key of a settings class."""

    name: str
    """Of a key in a nested section with the section's names before it: `server.port`."""
    kind: str
    meaning: str


def render() -> str:
    """The whole page."""
    settings = read_settings()
    parts = [INTRODUCTION, "## Verbs\n", *_verbs(settings), "## Groups\n"]
    for folder in sorted(path for path in CONF.iterdir() if path.is_dir() and not path.name.startswith("_")):
        parts += _group(folder, settings)
    return "\n".join(parts).rstrip() + "\n"


# --- reading -----------------------------------------------------------------------------------------------------------------


def leading_comment(file: Path) -> str:
    """The comment lines at the top of a file, joined; Hydra's own directives left out."""
    text = ""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("# @"):
            continue
        if not line.startswith("#"):
            break
        words = line.lstrip("# ")
        stop = "." if text and text[-1].isalnum() and words[:1].isupper() else ""
        text = f"{text}{stop} {words}".lstrip()
    return text


def line_comments(file: Path) -> dict[str, str]:
    """The comment behind each key, by its whole path."""
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        key, colon, rest = line.lstrip().partition(":")
        if not colon or not re.fullmatch(r"[\w/]+", key):
            continue
        indent = len(line) - len(line.lstrip())
        path = [*((before, name) for before, name in path if before < indent), (indent, key)]
        if " # " in rest.replace("  #", " #"):
            found[".".join(name for _, name in path)] = rest.partition(" #")[2].strip()
    return found


def values(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text(encoding="utf-8")) or {}


def read_settings() -> dict[str, list[Field]]:
    """Fields of every settings class, inherited ones first. One that is a section, and of which nothing is said, is what its class is."""
    own: dict[str, tuple[list[str], list[Field]]] = {}
    about: dict[str, str] = {}
    for file in sorted((ROOT / "rlhf" / "settings").glob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                own[node.name] = ([base.id for base in node.bases if isinstance(base, ast.Name)], list(_fields(node)))
                about[node.name] = " ".join((ast.get_docstring(node) or "").split())

    def all_fields(name: str) -> list[Field]:
        bases, fields = own[name]
        inherited = [field for base in bases if base in own for field in all_fields(base)]
        return inherited + [replace(field, meaning=field.meaning or about.get(field.kind, "")) for field in fields]

    return {name: all_fields(name) for name in own}


def _fields(node: ast.ClassDef) -> Iterator[Field]:
    for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            yield Field(statement.target.id, _kind(statement.annotation), _docstring(following))


def _kind(annotation: ast.expr) -> str:
    text = ast.unparse(annotation).replace("None", "null")
    text = re.sub(r"Literal\[(.*?)\]", lambda found: found.group(1).replace("'", "").replace(",", " or"), text)
    return text.replace(" | ", " or ") if "Literal" in ast.unparse(annotation) else text


def _docstring(node: ast.stmt | None) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return " ".join(node.value.value.split())
    return ""


# --- writing -----------------------------------------------------------------------------------------------------------------


def table(heading: list[str], rows: list[list[str]]) -> list[str]:
    lines = [heading, ["---"] * len(heading), *[[cell.replace("|", "\\|") for cell in row] for row in rows]]
    return ["| " + " | ".join(line).rstrip() + " |" for line in lines] + [""]


def code(value: Any) -> str:
    if isinstance(value, str) and "\n" in value:
        return f"`{json.dumps(value, ensure_ascii=False)}`"
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000).removesuffix("...\n").strip()
    return f"`{text}`" if len(text) <= LONG else "see the file"


def _verbs(settings: dict[str, list[Field]]) -> list[str]:
    files = [file for file in sorted(CONF.glob("*.yaml")) if file.stem != "base"]
    rows = [[f"`{file.stem.replace('_', ' ')}`", leading_comment(file), _groups_of(file)] for file in files]
    base = CONF / "base.yaml"
    alone = [f"`{file.stem}`" for file in files if "base" not in values(file)["defaults"]]
    parts = [
        *table(["verb", "does", "groups beside those of every verb"], rows),
        f"Every verb but {' and '.join(alone)}: {_groups_of(base)}.\n",
        "Keys of these verbs that are in no group:\n",
        *_loose_keys(base, settings),
    ]
    for file in files:
        if set(values(file)) - {"defaults", "hydra", "verb", *_of_groups(file)}:
            parts += [f"Keys of `{file.stem.replace('_', ' ')}` that are in no group:\n", *_loose_keys(file, settings)]
    return parts


def _loose_keys(file: Path, settings: dict[str, list[Field]]) -> list[str]:
    """Keys that the file of a verb, or of every verb, holds itself, those of its sections by their settings class."""
    comments, rows = line_comments(file), []
    for key, value in values(file).items():
        if key in ("defaults", "hydra", "verb", *_of_groups(file)):
            continue
        if isinstance(value, dict) and "_target_" in value:
            said = comments.get(key, "")
            rows += [[f"`{key}`", _class(value), "", said, ""]] if said else []
            rows += _section_rows(key, value, comments, settings)
        else:
            kind, meaning = SAID_HERE.get(key, ("", ""))
            rows.append([f"`{key}`", kind, code(value), meaning, comments.get(key, "")])
    return table(["key", "type", "value", "meaning", "note in the file"], rows)


def _section_rows(prefix: str, given: dict[str, Any], comments: dict[str, str], settings: dict[str, list[Field]]) -> list[list[str]]:
    """A row for each key of a section, those of the sections in it behind them."""
    rows: list[list[str]] = []
    nested: list[list[str]] = []
    for field in settings[_class(given)]:
        key, value = f"{prefix}.{field.name}", given.get(field.name)
        section = isinstance(value, dict) and "_target_" in value
        kind, meaning = SAID_HERE.get(key, (field.kind, field.meaning))
        rows.append([f"`{key}`", kind, "" if section else code(value), meaning, comments.get(key, "")])
        nested += _section_rows(key, value, comments, settings) if isinstance(value, dict) and section else []
    return rows + nested


def _class(section: dict[str, Any]) -> str:
    """Name of the settings class that a section is built into; empty where it is none of rlhf.settings."""
    module, _, name = str(section.get("_target_", "")).rpartition(".")
    return name if module == "rlhf.settings" else ""


def _of_groups(file: Path) -> set[str]:
    """Places that the file's groups are put at, those of every verb among them: a key below one of them changes what its option says."""
    listed = values(file)["defaults"] + (values(CONF / "base.yaml")["defaults"] if "base" in values(file)["defaults"] else [])
    chosen = [key for item in listed if isinstance(item, dict) for key in item]
    return {(key.partition("@")[2] or key).partition(".")[0] for key in chosen}


def _groups_of(file: Path) -> str:
    chosen = [item for item in values(file)["defaults"] if isinstance(item, dict)]
    pairs = [(key, value) for item in chosen for key, value in item.items() if not key.startswith("override")]
    return ", ".join(f"`{key}={'null' if value is None else value}`" for key, value in pairs)


def _group(folder: Path, settings: dict[str, list[Field]]) -> list[str]:
    files = sorted(folder.glob("*.yaml"))
    rows = [[f"`{file.stem}`", leading_comment(file), _sets(file)] for file in files]
    parts = [f"### {folder.name}\n", *table(["option", "what it is", "sets"], rows)]
    for name, base in _classes(files).items():
        parts += [f"Keys, with the values of `{base.stem}`:\n", *_keys(settings[name], base, settings)]
    return parts + _entries(files)


def _entries(files: list[Path]) -> list[str]:
    """Keys of a group whose options are lists of objects, such as callbacks: each entry as the first file says that has it."""
    rows, seen = [], set()
    for file in files:
        comments = line_comments(file)
        for name, entry in values(file).items():
            if isinstance(entry, dict) and "_target_" in entry and not _class(entry) and name not in seen:
                seen.add(name)
                rows.append([f"`{name}`", f"`{entry['_target_']}`", f"`{file.stem}`", comments.get(name, "")])
                for key, value in _leaves({key: value for key, value in entry.items() if key != "_target_"}, f"{name}."):
                    rows.append([f"`{key}`", code(value), f"`{file.stem}`", comments.get(key, "")])
    return table(["key", "value", "of option", "note in the file"], rows) if rows and not _classes(files) else []


def _sets(file: Path) -> str:
    """The keys that a small option sets itself."""
    leaves = [(key, value) for key, value in _leaves(values(file), "") if "_target_" not in key and not key.startswith("defaults")]
    return ", ".join(f"`{key}`: {code(value)}" for key, value in leaves) if 0 < len(leaves) <= FEW else ""


def _leaves(node: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _classes(files: list[Path]) -> dict[str, Path]:
    """Settings classes that a group's files name, each with the first file (in reading order) that sets most of its keys."""
    found: dict[str, Path] = {}
    for file in files:
        name = _class(values(file))
        if name and (name not in found or len(values(file)) > len(values(found[name]))):
            found[name] = file
    return found


def _keys(fields: list[Field], base: Path, settings: dict[str, list[Field]]) -> list[str]:
    given, comments, nested = values(base), line_comments(base), []
    rows = []
    for field in fields:
        inner = field.kind in settings
        value = "" if field.name not in given or (inner and "_target_" not in given[field.name]) else code(given[field.name])
        if inner and isinstance(given.get(field.name), dict) and "_target_" in given[field.name]:
            nested += [
                [
                    f"`{field.name}.{f.name}`",
                    f.kind,
                    code(given[field.name].get(f.name)),
                    f.meaning,
                    comments.get(f"{field.name}.{f.name}", ""),
                ]
                for f in settings[field.kind]
            ]
            value = ""
        rows.append([f"`{field.name}`", field.kind, value, field.meaning, comments.get(field.name, "")])
    return table(["key", "type", "value", "meaning", "note in the file"], rows + nested)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
