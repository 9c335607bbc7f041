"""Whether a SLURM cluster still has a job: its queue, and what its accounting says of a job that is not in it.

Knows squeue and sacct; knows no submitit. No answer is no evidence: a controller that is down has lost nothing.
"""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass

FRESH = 30.0
"""Seconds for which an answer of squeue, which is about all jobs of the user, is believed."""
ANSWER = 20.0
"""Seconds that a program has to answer: the sweep looks at nothing else in the meantime."""


@dataclass(frozen=True)
class Answer:
    command: str
    ok: bool
    text: str
    """What it printed, or why there is no answer."""


def ask(*command: str) -> Answer:
    """What a program of the cluster says. One that is missing, fails or hangs is an answer that is not `ok`."""
    said = " ".join(command)
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=ANSWER, check=False)
    except OSError as error:
        return Answer(said, False, error.strerror or str(error))
    except subprocess.TimeoutExpired:
        return Answer(said, False, f"no answer in {ANSWER:.0f} s")
    if done.returncode:
        return Answer(said, False, " ".join(done.stderr.split()) or f"exit code {done.returncode}")
    return Answer(said, True, done.stdout)


class Queue:
    """The user's jobs on a cluster, asked for all of them at once.

    Args:
        clusters: names as sbatch was given them; None: the one that this machine belongs to.
    """

    def __init__(self, clusters: str | None = None) -> None:
        self.where = () if clusters is None else (f"--clusters={clusters}",)
        self.asked = float("-inf")
        self.answer = Answer("squeue", False, "not asked yet")

    def has(self, number: str) -> bool | None:
        """Whether the job waits, runs or ends at the moment; None: nobody answers."""
        if time.monotonic() - self.asked >= FRESH:
            self.answer = ask("squeue", *self.where, "--noheader", f"--user={os.getuid()}", "--states=all", "--format=%A")
            self.asked = time.monotonic()
        return number in self.answer.text.split() if self.answer.ok else None

    def cancel(self, number: str) -> Answer:
        """Takes the job away, if it is there after all."""
        return ask("scancel", *self.where, number)

    def accounting(self, number: str) -> Answer:
        """What sacct has on record of the job: its state, or nothing."""
        return ask("sacct", *self.where, "--allocations", "--noheader", "--parsable2", "--format=State", f"--jobs={number}")


@dataclass
class Absence:
    """How long a job has been missing.

    Args:
        patience: seconds after which it has vanished.
        every: seconds between two looks.
    """

    queue: Queue
    number: str
    patience: float
    every: float
    since: float = float("inf")
    looked: float = float("-inf")

    def vanished(self, now: float, *, at_once: bool = False) -> str | None:
        """What was looked at, once the queue has not had the job for that long and the accounting has no record of it; else None.

        Accounting that cannot be asked, as on clusters without any, knows nothing. What it knows is believed: it tells the end of a job.
        A queue that cannot be asked ends an absence, which begins again with the next answer.

        Args:
            at_once: the first look that finds it missing is enough.
        """
        if now - self.looked < self.every:
            return None
        self.looked = now
        if self.queue.has(self.number) is not False:
            self.since = float("inf")
            return None
        self.since = min(self.since, now)
        if now - self.since < self.patience and not at_once:
            return None
        records = self.queue.accounting(self.number)
        if records.ok and records.text.strip():
            self.since = float("inf")
            return None
        found = "has no record of it" if records.ok else f"does not answer ({records.text})"
        return f"`{self.queue.answer.command}` does not list it, `{records.command}` {found}"
