"""Seconds by part, on a GPU without waiting for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseTimer:
    """Adds up the time of named parts: by CUDA events on a GPU, by the clock on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.reset()

    def reset(self) -> None:
        self.spans: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self.cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self.spans.append((name, begin, end))
        else:
            began = time.perf_counter()
            yield
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def totals(self) -> dict[str, float]:
        """Seconds by part; waits for the GPU."""
        if self.cuda:
            torch.cuda.synchronize()
        totals = dict(self.seconds)
        for name, begin, end in self.spans:
            totals[name] = totals.get(name, 0.0) + begin.elapsed_time(end) / 1000
        return totals
