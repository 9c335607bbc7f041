"""The lists of what is measured on cards: every case is a job that there is, and the plan says of it what the list says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from jobs import composed

from rlhf.cli.bench.step import ppo_settings
from rlhf.config import build

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
sys.path.insert(0, str(EXPERIMENTS / "planner_memory"))

import planned  # noqa: E402

CASES = planned.load()
NEW = {**planned.load(EXPERIMENTS / "planner_memory" / "protocol.yaml"), **planned.load(EXPERIMENTS / "scaling" / "cases.yaml")}
LARGE = ("30b-2-mixz", "66b-2-mixz", "66b-2-mixz-shared")
"""Those for two H200; the other ones for two GPUs fit on H100."""
SMALL = planned.load(EXPERIMENTS / "scaling" / "cpu.yaml")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.fits] + ["1.3b-micro16-ema", "1.3b-offload"])
def test_the_plan_says_what_the_list_says(name: str) -> None:
    assert planned.predict(CASES[name]).fits == CASES[name].fits


@pytest.mark.parametrize("name", NEW)
def test_what_is_run_on_cards_fits_them(name: str) -> None:
    """But for the one whose host is too small, which says so."""
    hardware = "h200-141g" if name in LARGE else "h100-80g" if "trainer.devices=2" in NEW[name].words else planned.CARD
    found = planned.predict(NEW[name], hardware)
    assert found.fits == (name != "6.7b-offload")
    assert found.fits or found.host > 137e9 > found.total


@pytest.mark.parametrize("name", SMALL)
def test_the_script_tries_itself_on_cpu_ranks(name: str) -> None:
    config = composed("bench_step", *SMALL[name].words, "hardware=cpu", "plan.enforce=false", "run_dir=x")
    assert ppo_settings(build(config)).ppo.iterations == 2
