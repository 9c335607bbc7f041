"""A run in TensorBoard: scalars, distributions, rows as text, and its settings beside its final numbers (HPARAMS).

Knows tensorboard and a run directory; knows no trainer and no config.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from rlhf.callbacks.run_log import Ending

FINAL = "final/"
"""Before the names of final numbers, which HPARAMS shows: without it they would be points of the curves."""


class TensorBoardLog(TensorBoardLogger):
    """Event files in `tensorboard/` of the run directory."""

    def __init__(self, *, folder: Path, first_step: int | None = None) -> None:
        """
        Args:
            folder: of the run.
            first_step: of a resumed run; what an earlier part wrote from there on is forgotten.
        """
        super().__init__(save_dir=str(folder), name="tensorboard", version="", default_hp_metric=False, purge_step=first_step)

    @rank_zero_only
    def log_rows(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        self.experiment.add_text(name, markdown(rows), step)

    @rank_zero_only
    def log_histograms(self, values: Mapping[str, Sequence[float]], step: int) -> None:
        for name, numbers in values.items():
            kept = np.array([x for x in numbers if math.isfinite(x)])
            if len(kept):
                self.experiment.add_histogram(name, kept, step)

    @rank_zero_only
    def log_picture(self, name: str, file: Path) -> None:
        from matplotlib.image import imread

        self.experiment.add_image(name, imread(file)[:, :, :3], 0, dataformats="HWC")

    @rank_zero_only
    def finish(self, ending: Ending) -> None:
        if self._experiment is None:
            return
        finite = {f"{FINAL}{name}": value for name, value in ending.metrics.items() if math.isfinite(value)}
        if finite:
            super().log_hyperparams(self.hparams, finite)
        self.experiment.add_text("status", ending.status if ending.error is None else f"{ending.status}: {ending.error}")
        self.experiment.close()


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table; what would end a cell or a row is written otherwise."""

    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in cells) + " |"

    names = list(rows[0])
    return "\n".join([line(names), line(["---"] * len(names)), *(line([row[name] for name in names]) for row in rows)])
