"""A cell as a process of this machine. Knows a command and a log; knows nothing of what it does."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from rlhf.sweeping.orphans import child_environment


def spawn(command: Sequence[str], *, stdin: str, out: IO[bytes], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Starts a process that reads a text and dies with this one. Call it from the main thread.

    It has a session of its own: Ctrl-C in the terminal reaches it once, through us.
    """
    with tempfile.TemporaryFile() as file:  # a pipe holds 64 KB only
        file.write(stdin.encode())
        file.seek(0)
        return subprocess.Popen(
            command, stdin=file, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **environment, **child_environment()},
        )  # fmt: skip


class LocalJob:
    """Args:
    stdin: what the process reads.
    log: gets all it writes, behind what is there.
    """

    def __init__(self, command: Sequence[str], *, stdin: str, log: Path, environment: Mapping[str, str]) -> None:
        with log.open("ab") as out:
            self.process = spawn(command, stdin=stdin, out=out, environment=environment)

    def poll(self) -> int | None:
        """The exit code; below 0: the signal that ended it. None while it runs."""
        return self.process.poll()

    def interrupt(self) -> None:
        """Ctrl-C: the job saves and ends."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """Ends the process and what it started: workers are of its session, ranks are bound to it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Ended:
    """A job that has ended already, done."""

    def poll(self) -> int | None:
        return 0

    def interrupt(self) -> None:
        pass

    def kill(self) -> None:
        pass
