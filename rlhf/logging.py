"""What a run says about itself: messages of rank zero, and which phase it is in.

Knows no trainer and no metric; the callbacks read the clock and draw the bars.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

log = logging.getLogger("rlhf")


class _RankZero(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or os.environ.get("RANK", "0") == "0"


def setup_logging() -> None:
    """One plain line a message on stderr; information from rank zero only, warnings from every rank."""
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("rlhf: %(message)s"))
        handler.addFilter(_RankZero())
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False


def quiet_libraries() -> None:
    """Libraries that speak at every start say nothing a user of this command can act on. Called once they are imported."""
    for name in ("lightning.pytorch", "lightning.fabric", "deepspeed", "DeepSpeed", "datasets", "filelock"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")


class PhaseMeter(Protocol):
    """What an accelerator adds to a clock."""

    def begin(self) -> None:
        """Waits for what is queued, so that it counts for the phase that asked for it, and measures the peak anew."""

    def end(self) -> int:
        """Waits for what is queued; returns the most bytes of memory in use since `begin`."""


class PhaseClock:
    """Seconds spent in each named phase of an iteration, and the peak of memory in it where there is a meter.

    `with clock("generate"): ...` adds to `seconds["generate"]` and raises `peaks["generate"]`; `listener` hears the name when a phase
    opens. Phases do not nest.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self.listener: Callable[[str], None] = lambda phase: None
        self.meter: PhaseMeter | None = None

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.listener(phase)
        if self.meter is not None:
            self.meter.begin()
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.meter is not None:
                self.peaks[phase] = max(self.peaks.get(phase, 0), self.meter.end())
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def drain(self) -> tuple[dict[str, float], dict[str, int]]:
        """The seconds and the peaks since the last call, and starts anew."""
        seconds, peaks, self.seconds, self.peaks = self.seconds, self.peaks, {}, {}
        return seconds, peaks
