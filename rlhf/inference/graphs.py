"""Captured CUDA graphs of a step, one for each of a few batch sizes; on the CPU the step is called as it is.

A graph replays about two hundred kernels without Python or the launch cost of each. It holds addresses: those of the weights, the cache and
the slots must not change between captures (see arena.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def batch_sizes(slots: int, *, step: int = 8) -> list[int]:
    """Sizes to capture, from all slots down by about a third each: a step costs little more for the rows that idle in it."""
    sizes, size = [slots], slots
    while size > step:
        size = max(step, size * 2 // 3 // step * step)
        sizes.append(size)
    return sizes


class Steps:
    """Runs `step(b)` for the first b rows."""

    def __init__(self, step: Callable[[int], None], slots: int, *, graphs: bool) -> None:
        """
        Args:
            step: does its work on the current CUDA stream, with nothing that waits for the GPU.
            graphs: capture, or call `step` itself.
        """
        self.step = step
        self.sizes = batch_sizes(slots)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.captures = graphs
        self.capture_seconds = 0.0
        self.pool = torch.cuda.graph_pool_handle() if graphs else None

    def width(self, rows: int) -> int:
        """The batch size that `rows` run at."""
        return min(size for size in self.sizes if size >= rows) if self.captures else rows

    def missing(self, size: int) -> bool:
        """Whether this size must be captured before it can run."""
        return self.captures and size not in self.graphs

    def capture(self, size: int) -> None:
        """All rows must be idle: the step runs once to compile kernels and get workspaces."""
        began = time.perf_counter()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step(size)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # What other threads do meanwhile (a loader pins memory, a server judges an answer) is theirs: by default it would break the capture.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            self.step(size)
        torch.cuda.synchronize()
        self.graphs[size] = graph
        self.capture_seconds += time.perf_counter() - began

    def drop(self) -> None:
        """Forgets the graphs: addresses have changed."""
        self.graphs.clear()
        self.pool = torch.cuda.graph_pool_handle() if self.captures else None  # a pool that no graph holds takes no new ones

    def run(self, size: int) -> None:
        if self.captures:
            self.graphs[size].replay()
        else:
            self.step(size)
