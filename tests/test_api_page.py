"""docs/api.md: up to date, and every name on it can be imported and is what the page says."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from page_makers import maker

ROOT = Path(__file__).parents[1]
MAKER: Any = maker("make_api")
NAMES = [(module, name) for modules in MAKER.SURFACE.values() for module, names in modules.items() for name in names]


def test_the_page_of_the_api_is_up_to_date() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert page == MAKER.render(), "run: python docs/make_api.py"


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_a_name_on_the_page_is_there_with_the_arguments_shown(module: str, name: str) -> None:
    found = getattr(importlib.import_module(module), name)
    assert found.__module__ == module, "the page names the place where it is defined"
    shown = next(line for line in MAKER.describe(MAKER.read(module), MAKER.read(module).definition(name)) if line.startswith("```python"))
    call = re.match(rf"```python\n(?:with )?{name}\((.*)\)(?: ->.*| as .*)?\n", shown)
    if call is not None:
        arguments = ast.parse(f"def f({call.group(1)}): ...").body[0].args  # type: ignore[attr-defined]
        names = [one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        plain = [one.name for one in inspect.signature(found).parameters.values() if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
        assert names == plain


def test_the_names_of_the_page_of_recipes_are_on_it() -> None:
    """What docs/own_pipeline.md imports from this project may be imported."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "own_pipeline.md").read_text(), re.MULTILINE | re.DOTALL)
    nodes = [node for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    used = {(node.module, alias.name) for node in nodes for alias in node.names if str(node.module).startswith("rlhf.")}
    assert len(used) > 4
    assert {(module, name) for module, name in used if module != "rlhf.settings"} <= set(NAMES)


SOURCE = '''
"""A room. It knows nothing."""
from contextlib import contextmanager

class Thing(Base):
    """What it is.

    Args:
        size: how large,
            in all.
    """
    kind: str  # of thing
    size: int
    """Bytes | bits."""

    def __init__(self, size: int = 3) -> None: ...

    @property
    def half(self) -> float:
        """Of it."""

    def _hidden(self): ...

    def training_step(self, batch): ...

@contextmanager
def held(thing: Thing):
    """Keeps it."""

def mute(thing): ...

def vague(thing):
    """
    Args:
        thing: any.
    """
'''


def described(name: str) -> str:
    module = MAKER.Module("room", ast.parse(SOURCE), SOURCE.splitlines())
    return "\n".join(MAKER.describe(module, module.definition(name)))


def test_a_class_is_described_by_its_constructor_its_fields_and_its_methods() -> None:
    assert described("Thing").splitlines() == [
        "#### `Thing`", "", "```python", "Thing(size: int=3)", "```", "", "What it is.", "", "*Args*", "", "- `size`: how large, in all.", "",
        "| field | type | |", "| --- | --- | --- |", "| `kind` | `str` | of thing |", "| `size` | `int` | Bytes \\| bits. |", "",
        "**`Thing.half`** (property`: float`)", "", "Of it.",
    ]  # fmt: skip
    assert "with held(thing: Thing) as" in described("held")


@pytest.mark.parametrize(
    ("name", "reason"), [("mute", "has no docstring"), ("vague", "has no docstring"), ("absent", "room has no absent")]
)
def test_a_name_that_says_nothing_or_is_not_there_is_an_error(name: str, reason: str) -> None:
    with pytest.raises(LookupError, match=reason):
        described(name)
