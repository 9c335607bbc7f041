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


class PhaseClock:
    """Seconds spent in each named phase of an iteration.

    `with clock("generate"): ...` adds to `seconds["generate"]`; `listener` hears the name when a phase opens. `synchronize` is
    called at both ends so that work queued on an accelerator counts where it was asked for.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.listener: Callable[[str], None] = lambda phase: None
        self.synchronize: Callable[[], None] = lambda: None

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.listener(phase)
        self.synchronize()
        start = time.perf_counter()
        try:
            yield
        finally:
            self.synchronize()
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def drain(self) -> dict[str, float]:
        """The seconds since the last call, and starts anew."""
        seconds, self.seconds = self.seconds, {}
        return seconds
