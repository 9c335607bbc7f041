"""The published protocol: its count of operations, and that a modelled row obeys its rules."""

from __future__ import annotations

import dataclasses

import pytest
from plans import job, machine

from rlhf.config import UserError
from rlhf.planning.paper import LARGEST_BATCH, SAMPLES, effective_operations, paper_iteration

ADAPTERS = job("lora@actor.lora=r128").roles["actor"].lora


def test_effective_throughput_is_counted_as_published() -> None:
    """13B on 8 A100-80G: 8.157 sequences/s are 67.8 TFLOP/s a GPU (figure 6 prints 67.1)."""
    net = job(actor="opt-13b").roles["actor"].network
    assert effective_operations(net, 1) * 8.157 / 8 / 1e12 == pytest.approx(67.8, abs=0.1)


def test_a_row_obeys_the_protocol() -> None:
    card = machine("a100-80g")
    row = paper_iteration(job(), card, 8, waves=True)
    assert row is not None
    assert row.batch <= LARGEST_BATCH and row.batch % 8 == 0
    assert row.peak <= 84.9e9
    assert row.hours == pytest.approx(SAMPLES / row.batch * row.time.total / 3600)
    assert row.dollars == pytest.approx(row.hours * 8 * 4.0)
    assert row.tflops < 312


def test_what_does_not_fit_whole_may_fit_with_adapters() -> None:
    card = machine("a100-40g", host_link_gbs=0, host_memory_gb=0)
    assert paper_iteration(job(actor="opt-2.7b"), card, 1, waves=False) is None
    assert paper_iteration(job(actor="opt-2.7b"), card, 1, waves=False, adapters=ADAPTERS) is not None


def test_waves_never_slow_it_down() -> None:
    card = machine("a100-40g")
    at_once, in_waves = (paper_iteration(job(), card, 1, waves=waves) for waves in (False, True))
    assert at_once is not None and in_waves is not None
    assert in_waves.hours <= at_once.hours


def test_a_price_that_is_not_known_gives_no_dollars() -> None:
    row = paper_iteration(job(actor="opt-125m"), machine("a100-40g"), 1, waves=True)
    assert row is not None and row.dollars is None


def test_gpus_fill_nodes() -> None:
    with pytest.raises(UserError, match="12 GPUs do not fill whole nodes"):
        paper_iteration(job(), machine(), 12, waves=True)
    with pytest.raises(UserError, match="step 3"):
        paper_iteration(dataclasses.replace(job(), step="sft"), machine(), 8, waves=True)
