"""`metrics.csv`: one row a step, one column a metric, readable while the run goes on.

A resumed run drops the rows after its checkpoint, so that the file reads as if nothing had happened. Knows no trainer.
"""

from __future__ import annotations

import csv
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


class MetricsFile(Logger):
    """Rows are appended as they come; a new column rewrites the file through a temporary one."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.file = folder / "metrics.csv"
        self.columns: list[str] = ["step"]
        self.rows: list[dict[str, str]] = []
        if self.file.is_file():
            with self.file.open(newline="") as f:
                reader = csv.DictReader(f)
                self.columns = list(reader.fieldnames or ["step"])
                self.rows = [row for row in reader if None not in row.values()]  # a killed run may leave half a line

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The run directory's config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": str(step), **{name: f"{value:.9g}" for name, value in metrics.items()}}
        new = sorted(name for name in row if name not in self.columns)
        merges = bool(self.rows) and self.rows[-1]["step"] == row["step"]
        if merges:
            self.rows[-1] |= row
        else:
            self.rows.append(row)
        if new or merges or not self.file.exists():
            self.columns += new
            self._rewrite()
        else:
            with self.file.open("a", newline="") as f:
                csv.DictWriter(f, self.columns, restval="").writerow(row)

    @rank_zero_only
    def drop_after(self, step: int) -> None:
        """Forgets what was measured after this step, and half a line that a killed run left."""
        self.rows = [row for row in self.rows if int(row["step"]) <= step]
        if self.file.is_file():
            self._rewrite()

    def _rewrite(self) -> None:
        part = self.file.with_suffix(".part")
        with part.open("w", newline="") as f:
            writer = csv.DictWriter(f, self.columns, restval="")
            writer.writeheader()
            writer.writerows(self.rows)
        part.rename(self.file)
