"""What a machine does, measured: copies, matrix products, transfers from the host, collectives, launches, memory.

Knows devices and process groups; knows no configuration and no files.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import torch.distributed as dist

from rlhf.engines.floor import copy_work, matmul_work, timed

MEGA = 10**6


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much each measurement moves, and how often."""

    warmup: int
    repeats: int
    copy: int
    """Bytes."""
    width: int
    """Of a square matrix."""
    transfer: int
    """Bytes."""
    collective: int
    """Bytes that each rank contributes."""
    launches: int


@dataclass(frozen=True)
class Measurement:
    """One figure and the calls behind it."""

    value: float
    """In bytes/s, operations/s or seconds, of the median call; with several ranks the slowest one's."""
    seconds: list[float]
    """Of every counted call, on this rank."""


class Calibration:
    """Runs the measurements one by one, on all ranks at once. Collective where there are several."""

    def __init__(self, device: torch.device, sizes: Sizes, ranks: int) -> None:
        self.device, self.sizes, self.ranks = device, sizes, ranks

    def run(self) -> dict[str, Measurement]:
        """By name; what this machine has no part for is left out."""
        sizes, device = self.sizes, self.device
        found = {
            "copy": self._rate(copy_work(device, sizes.copy), 2 * sizes.copy),
            "matmul": self._rate(matmul_work(device, sixteen_bit(device), sizes.width), 2 * sizes.width**3),
            "launch": self._launch(),
        }
        if device.type == "cuda":
            found |= self._transfers()
        if self.ranks > 1:
            found |= self._collectives()
        return found

    def _seconds(self, work: Callable[[], Any]) -> list[float]:
        if self.ranks > 1:
            dist.barrier()
        return timed(work, self.device, repeats=self.sizes.repeats, warmup=self.sizes.warmup)

    def _rate(self, work: Callable[[], Any], amount: float) -> Measurement:
        seconds = self._seconds(work)
        return Measurement(-self._worst(-amount / statistics.median(seconds)), seconds)

    def _worst(self, value: float) -> float:
        """The largest of all ranks."""
        if self.ranks == 1:
            return value
        everyone = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(everyone, op=dist.ReduceOp.MAX)
        return float(everyone)

    def _launch(self) -> Measurement:
        """Seconds of one small operation started from Python, in a row of them: on a GPU the host's work, the GPU's being less."""
        x = torch.zeros(1, device=self.device)

        def row() -> None:
            for _ in range(self.sizes.launches):
                x.add_(1)

        seconds = [time / self.sizes.launches for time in self._seconds(row)]
        return Measurement(self._worst(statistics.median(seconds)), seconds)

    def _transfers(self) -> dict[str, Measurement]:
        """Between the device and pinned memory of the host, both ways; with several ranks all at once, as offloading does it."""
        size = self.sizes.transfer
        host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        device = torch.empty(size, dtype=torch.uint8, device=self.device)
        return {
            "host_to_device": self._rate(lambda: device.copy_(host, non_blocking=True), size),
            "device_to_host": self._rate(lambda: host.copy_(device, non_blocking=True), size),
        }

    def _collectives(self) -> dict[str, Measurement]:
        """Bytes that cross each link a second, as NCCL's tests count them (bus bandwidth): a sum moves 2 (n - 1) / n of what a rank
        contributes, a gathering n - 1 times that. And the seconds of a sum of one number."""
        n, size = self.ranks, self.sizes.collective // 2
        mine = torch.zeros(size, dtype=torch.bfloat16, device=self.device)
        whole = torch.empty(n * size, dtype=torch.bfloat16, device=self.device)
        parts, one = list(whole.split(size)), torch.zeros(1, device=self.device)
        small = self._seconds(lambda: dist.all_reduce(one))
        return {
            "all_reduce": self._rate(lambda: dist.all_reduce(mine), 2 * (n - 1) / n * size * 2),
            "all_gather": self._rate(lambda: dist.all_gather(parts, mine), (n - 1) * size * 2),
            "small_all_reduce": Measurement(self._worst(statistics.median(small)), small),
        }


def sixteen_bit(device: torch.device) -> torch.dtype:
    """bf16, or fp16 on GPUs whose matrix units do not know it (before compute capability 8)."""
    old = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8
    return torch.float16 if old else torch.bfloat16


def memory_bytes(device: torch.device) -> tuple[int, int]:
    """Of the device, as PyTorch can have it, and of the host; the same on a CPU."""
    host = int(psutil.virtual_memory().total)
    return (torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else host), host
