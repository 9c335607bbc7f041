"""Who runs when: a loop in one thread that starts, watches and ends jobs.

Knows slots, GPUs and Ctrl-C; knows nothing of what a job does. Everything starts in the main thread, as `orphans` asks.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

from rlhf.sweeping.leases import Leases

POLL = 0.05
"""Seconds between two looks at the running jobs."""
WATCH = 1.0
"""Seconds between two looks at what they have written."""


class Handle(Protocol):
    """A job that has been started."""

    def poll(self) -> int | None: ...

    def interrupt(self) -> None: ...

    def kill(self) -> None: ...


@dataclass
class Task:
    """A job that can be started."""

    name: str
    gpus: int
    start: Callable[[list[str]], Handle]
    """Starts it on the GPUs it is given."""


class Source(Protocol):
    """Where tasks come from and results go to."""

    def next(self) -> Task | None:
        """The next task; None: none now, and none later unless one that runs ends."""

    def watch(self, task: Task) -> str | None:
        """A reason to stop a task that runs, or None."""

    def ended(self, task: Task, code: int, *, stopped: str | None, interrupted: bool) -> None:
        """A task has ended: by itself, by a reason to stop it, or by Ctrl-C."""


@dataclass
class _Running:
    task: Task
    handle: Handle
    gpus: list[str]


class Scheduler:
    """Runs the tasks of a source, first come, first served: a task that waits for GPUs is not overtaken, so that none waits for ever.

    Args:
        slots: jobs at a time.
    """

    def __init__(self, source: Source, *, slots: int, leases: Leases) -> None:
        self.source, self.slots, self.leases = source, slots, leases
        self.running: list[_Running] = []
        self.waiting: Task | None = None
        self.presses, self.told = 0, False
        self.terminated = False

    def run(self) -> bool:
        """Runs until nothing is left. Returns False when Ctrl-C cut it short.

        The first Ctrl-C is passed on once, and what runs may save and end; the second one kills. However this ends, TERM and errors
        included, no job is left behind.
        """
        looked = time.monotonic()
        with self._listening():
            try:
                while self._step():
                    if time.monotonic() - looked >= WATCH and not self.presses:
                        looked = time.monotonic()
                        self._watch()
                    time.sleep(POLL)
                return self.presses == 0
            finally:
                self._kill()

    def _step(self) -> bool:
        """Whether anything runs or waits, once what can start has started and what has ended is told."""
        if self.terminated:
            raise SystemExit(128 + signal.SIGTERM)
        if self.presses:
            self._pass_on()
        else:
            self._start()
        self._collect()
        return bool(self.running) or self._more()

    def _more(self) -> bool:
        if self.waiting is None and not self.presses:
            self.waiting = self.source.next()
        return self.waiting is not None and not self.presses

    def _pass_on(self) -> None:
        """Ctrl-C, to those that run: saving once, then the end."""
        if self.presses > 1:
            self._kill()
        elif not self.told:
            self.told = True
            for one in self.running:
                one.handle.interrupt()

    def _start(self) -> None:
        while len(self.running) < self.slots and self.presses == 0:
            task = self.waiting or self.source.next()
            if task is None:
                return
            gpus = self.leases.take(task.gpus)
            self.waiting = task if gpus is None else None
            if gpus is None:
                return
            self.running.append(_Running(task, task.start(gpus), gpus))

    def _collect(self, stopped: dict[int, str] | None = None) -> None:
        for one in list(self.running):
            code = one.handle.poll()
            if code is not None:
                self.running.remove(one)
                self.leases.give_back(one.gpus)
                reason = (stopped or {}).get(id(one))
                self.source.ended(one.task, code, stopped=reason, interrupted=self.presses > 0)

    def _watch(self) -> None:
        stopped = {}
        for one in self.running:
            reason = self.source.watch(one.task)
            if reason is not None and one.handle.poll() is None:
                one.handle.kill()
                stopped[id(one)] = reason
        self._collect(stopped)

    def _kill(self) -> None:
        for one in self.running:
            one.handle.kill()

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Signals only leave a mark: an exception could come between the start of a job and the note that it runs."""

        def press(number: int, frame: FrameType | None) -> None:
            self.presses += 1

        def terminate(number: int, frame: FrameType | None) -> None:
            self.terminated = True

        previous = {number: signal.signal(number, handler) for number, handler in ((signal.SIGINT, press), (signal.SIGTERM, terminate))}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
