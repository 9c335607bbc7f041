"""The list of cells, and where the results of a study lie. Knows files; knows no training and no statistics."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_name("cells.yaml")


@dataclass(frozen=True)
class Cell:
    name: str
    base: str | None
    """The cell it is compared with; None: the first one."""
    flips: tuple[str, ...]
    """Its overrides on top of the base's."""
    overrides: tuple[str, ...]
    """All of them. Each key once: the last word of a key counts."""


def load(file: Path = FILE) -> dict[str, Cell]:
    """The cells by name, in the order of the file.

    Raises:
        ValueError: two cells of one name, or a base that does not come before its cell.
    """
    text = yaml.safe_load(file.read_text(encoding="utf-8"))
    cells: dict[str, Cell] = {}
    for entry in text["cells"]:
        name, base, flips = entry["name"], entry.get("from"), tuple(entry["set"])
        if name in cells:
            raise ValueError(f"{file.name}: two cells are called {name}")
        if base is not None and base not in cells:
            raise ValueError(f"{file.name}: {name} is made from {base}, which does not come before it")
        below = text["common"] if base is None else cells[base].overrides
        last = {override.partition("=")[0]: override for override in [*below, *flips]}
        cells[name] = Cell(name=name, base=base, flips=flips, overrides=tuple(last.values()))
    return cells


def chosen(cells: dict[str, Cell], names: Sequence[str]) -> list[Cell]:
    """The cells with these names, in the order of the file; without names: all.

    Raises:
        ValueError: a name that no cell has.
    """
    unknown = [name for name in names if name not in cells]
    if unknown:
        raise ValueError(f"no such cell: {', '.join(unknown)}")
    return [cell for cell in cells.values() if not names or cell.name in names]


def run_folder(out: Path, cell: str, seed: int) -> Path:
    return out / "runs" / cell / f"seed-{seed}"


def read_summary(folder: Path) -> dict[str, Any] | None:
    """`summary.json` of a finished run; None where there is none."""
    file = folder / "summary.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
