"""What a logger may do beside numbers: show rows, distributions and pictures, and hear how the run ended.

Knows no logger. A logger that has these methods is asked; one that has not (metrics.csv, any logger of Lightning) is left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rlhf.config import UserError


@dataclass(kw_only=True)
class Ending:
    """How a run ended: the same words and numbers as in summary.json."""

    status: str = "done"
    error: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def describe(self, error: BaseException) -> None:
        self.status = "refused" if isinstance(error, UserError) else "failed"
        self.error = f"{type(error).__name__}: {error}"


@runtime_checkable
class RunLog(Protocol):
    """Every method may be called on every rank; rank zero's calls count."""

    def log_rows(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Rows of a table that grows; all of one name have the same columns."""

    def log_histograms(self, values: Mapping[str, Sequence[float]], step: int) -> None: ...

    def log_picture(self, name: str, file: Path) -> None: ...

    def finish(self, ending: Ending) -> None:
        """Nothing is logged after it."""


def run_logs(loggers: Iterable[Any]) -> list[RunLog]:
    return [logger for logger in loggers if isinstance(logger, RunLog)]


@contextmanager
def told(loggers: Iterable[Any]) -> Iterator[Ending]:
    """Tells the loggers how what happens inside ended; the caller puts metrics and seconds into the ending."""
    ending = Ending()
    try:
        yield ending
    except BaseException as error:
        ending.describe(error)
        raise
    finally:
        for logger in run_logs(loggers):
            logger.finish(ending)
