"""What tests of sweeps share: whether a process lives, and waiting for something to become true.

The waits are long for a machine whose cores other tests use too; only a test that fails sees their end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path


def alive(pid: int) -> bool:
    """Zombies are dead: only their parent has not yet asked."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(true: Callable[[], object], *, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def all_end(pids: Iterable[int], *, seconds: float = 30.0) -> None:
    left = set(pids)
    assert left, "no process was seen at all"
    wait_until(lambda: not any(alive(pid) for pid in left), seconds=seconds)
