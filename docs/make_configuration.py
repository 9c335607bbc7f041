"""Writes docs/configuration.md from conf/ and rlhf/settings: `python docs/make_configuration.py`.

Knows YAML files and the syntax of dataclasses; imports nothing of rlhf and composes nothing. Comments in conf/ and docstrings of fields
are the text, so that the page says what the files say.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass
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
    kind: str
    meaning: str


def render() -> str:
    """The whole page."""
    settings = read_settings()
    parts = [INTRODUCTION, "## Verbs\n", *_verbs(), "## Groups\n"]
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
    """The comment behind each top-level key."""
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        key, colon, rest = line.partition(":")
        if colon and key.isidentifier() and " # " in rest.replace("  #", " #"):
            found[key] = rest.partition(" #")[2].strip()
    return found


def values(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text(encoding="utf-8")) or {}


def read_settings() -> dict[str, list[Field]]:
    """Fields of every settings class, inherited ones first."""
    own: dict[str, tuple[list[str], list[Field]]] = {}
    for file in sorted((ROOT / "rlhf" / "settings").glob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                own[node.name] = ([base.id for base in node.bases if isinstance(base, ast.Name)], list(_fields(node)))

    def all_fields(name: str) -> list[Field]:
        bases, fields = own[name]
        return [field for base in bases if base in own for field in all_fields(base)] + fields

    return {name: all_fields(name) for name in own}


def _fields(node: ast.ClassDef) -> Iterator[Field]:
    for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            yield Field(statement.target.id, _kind(statement.annotation), _docstring(following))


def _kind(annotation: ast.expr) -> str:
    text = ast.unparse(annotation).replace("None", "null")
    return text.removeprefix("Literal[").removesuffix("]").replace("'", "").replace(",", " or") if text.startswith("Literal") else text


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


def _verbs() -> list[str]:
    files = [file for file in sorted(CONF.glob("*.yaml")) if file.stem != "base"]
    rows = [[f"`{file.stem.replace('_', ' ')}`", leading_comment(file), _groups_of(file)] for file in files]
    base = CONF / "base.yaml"
    comments = line_comments(base)
    keys = [[f"`{key}`", code(value), comments.get(key, "")] for key, value in values(base).items() if key not in ("defaults", "hydra")]
    return [
        *table(["verb", "does", "groups beside those of every verb"], rows),
        f"Every verb but `report`: {_groups_of(base)}.\n",
        *table(["key of these verbs", "value", ""], keys),
        "`pipeline` also has `steps`, the steps it runs: " + code(values(CONF / "pipeline.yaml")["steps"]) + ".\n",
    ]


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
    return parts


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
        name = str(values(file).get("_target_", "")).rpartition("rlhf.settings.")[2]
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
                [f"`{field.name}.{f.name}`", f.kind, code(given[field.name].get(f.name)), f.meaning, ""] for f in settings[field.kind]
            ]
            value = ""
        rows.append([f"`{field.name}`", field.kind, value, field.meaning, comments.get(field.name, "")])
    return table(["key", "type", "value", "meaning", "note in the file"], rows + nested)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
