"""What `rlhf report` reads and what it says of it. Types and ranges only: the values live in conf/report.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf.settings.ranges import require


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Folders whose numbers are put side by side: runs and sweeps, or published tables (folders with a published.csv)."""

    runs: list[str]
    """The folders; the words right after the verb. All folders of runs make one report; of a published table, table.md and plot.png appear in each."""
    metric: str | None
    """Metric of summary.json that cells are compared by. null: gold/ppo, or else the first of the list in docs/report.md that there is."""
    baseline: str | None
    """Cell that the others are compared with, by its name or as `key=value`. null: the first one."""
    metrics: list[str]
    """Further columns. Empty: KL, reward, length, distinct-2 and hours, as far as there are any."""
    direction: Literal["higher", "lower"] | None
    """What is better of `metric`. null: lower where its name speaks of a loss, perplexity, KL, time or memory, or else higher."""
    out: str | None
    """Folder of report.html, table.csv, table.md and the figures. null: the first folder of runs."""

    def __post_init__(self) -> None:
        require(len(set(self.runs)) == len(self.runs), f"runs names a folder twice: {self.runs}")
        require(len(set(self.metrics)) == len(self.metrics), f"metrics names a metric twice: {self.metrics}")
        for name in ("metric", "baseline", "out"):
            require(getattr(self, name) != "", f"{name} must not be empty; null stands for the default")
