"""What a running cell has written so far. Knows metrics.csv; knows no metric."""

from __future__ import annotations

import csv
from pathlib import Path


def column(folder: Path, name: str) -> list[tuple[int, float]] | None:
    """Steps and values of one column of a run, or of the steps of a pipeline; None where no file has it.

    A line that is being written is left for the next look.
    """
    found: list[tuple[int, float]] | None = None
    for file in (folder / "metrics.csv", *sorted(folder.glob("*/metrics.csv"))):
        if not file.is_file():
            continue
        text = file.read_text(encoding="utf-8")
        rows = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
        if name in (rows.fieldnames or ()):
            found = [*(found or []), *((int(row["step"]), float(row[name])) for row in rows if row[name])]
    return found
