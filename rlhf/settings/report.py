"""What `rlhf report` reads. Types and ranges only: the values live in conf/report.yaml."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.settings.ranges import require


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Folders whose numbers are put side by side."""

    runs: list[str]
    """Folders with published.csv, modelled.csv and results.csv; the words right after the verb. table.md and plot.png appear in each."""

    def __post_init__(self) -> None:
        require(len(set(self.runs)) == len(self.runs), f"runs names a folder twice: {self.runs}")
