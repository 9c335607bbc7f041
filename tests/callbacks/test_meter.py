"""Memory by phase: what the clock keeps of a meter, and what the meter adds up."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from rlhf.callbacks.metrics import GpuMeter
from rlhf.inference.arena import Arena, mapped_memory
from rlhf.logging import PhaseClock


class Device:
    """PyTorch's statistics of a GPU, as far as the meter reads them."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def allocate(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)

    def reset(self) -> None:
        self.most = self.now


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    device = Device()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: device.most)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", device.reset)
    before = mapped_memory.now
    yield device
    assert mapped_memory.now == before, "an arena was left mapped"


def test_each_phase_has_its_own_peak(device: Device) -> None:
    device.allocate(100)
    clock, meter = PhaseClock(), GpuMeter()
    clock.meter = meter
    arena = Arena({"cache": ((64,), torch.float32)}, torch.device("cpu"))
    base = mapped_memory.now
    with clock("generate"):
        arena.map()
        device.allocate(10)
        device.allocate(-10)
        arena.unmap()
    with clock("train"):
        device.allocate(50)
        device.allocate(-50)
    with clock("train"):
        device.allocate(30)
        device.allocate(-30)
    seconds, peaks = clock.drain()
    assert peaks == {"generate": base + 110 + 256, "train": base + 150}
    assert seconds.keys() == peaks.keys() and clock.drain() == ({}, {})
    assert meter.most == base + 110 + 256


def test_what_happens_between_phases_counts_for_the_run_alone(device: Device) -> None:
    clock, meter = PhaseClock(), GpuMeter()
    clock.meter = meter
    base = mapped_memory.now
    device.allocate(500)
    device.allocate(-500)
    with clock("score"):
        device.allocate(7)
    assert clock.drain()[1] == {"score": base + 7}
    assert meter.most == base + 500


def test_without_a_meter_there_is_time_alone() -> None:
    clock = PhaseClock()
    with clock("score"):
        pass
    seconds, peaks = clock.drain()
    assert seconds.keys() == {"score"} and peaks == {}
