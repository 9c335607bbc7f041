"""The sweeps of sweeps/: each composes, and its first job runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from sweeps_of_tests import HERE, composer, summary

from rlhf.cli.job import run_job
from rlhf.cli.pipeline import run_pipeline
from rlhf.cli.sweep.words import Composer
from rlhf.config import build
from rlhf.rules import check
from rlhf.settings import SearchSweepConfig
from rlhf.sweeping.search import Number

# --- the sweeps of sweeps/ ---------------------------------------------------------------------------------------------------------

SWEEPS = HERE.parents[1] / "sweeps"
NAMED = {
    "kl_grid": ("ppo", 9), "seeds": ("pipeline", 5), "zero_grid": ("ppo", 16), "ablation_details": ("pipeline", 45), "model_scaling": ("pipeline", 4),
    "lr_search": ("pipeline", 0),
}  # fmt: skip
"""Sweep -> its verb and how many cells it has; a search has none beforehand."""
TINY = (
    "debug=short", *(f"model@{role}.model=tiny" for role in ("actor", "critic", "reward")), "data=quickstart", "data.max_rows=96", "trainer=cpu",
    "trainer.threads=1", "ppo.iterations=1", "ppo.batch_size=8", "ppo.minibatch_size=8", "ppo.micro_batch_size=4", "rollout.max_new_tokens=8",
    "callbacks=none",
)  # fmt: skip
TINY_PIPELINE = (
    "sft.max_steps=1", "rm.max_steps=1", "sft.batch_size=8", "sft.micro_batch_size=8", "rm.batch_size=8", "rm.micro_batch_size=8", "evaluation=pipeline",
    "evaluation.prompts=4", "evaluation.pairs=4", "evaluation.samples=1", "evaluation.batch_size=4",
)  # fmt: skip


def named(name: str, *words: str) -> Composer:
    return composer("--config-dir", str(SWEEPS), "-cn", name, *words, verb=NAMED[name][0])


def test_every_file_of_sweeps_is_known() -> None:
    assert {file.stem for file in SWEEPS.glob("*.yaml")} == set(NAMED)


@pytest.mark.parametrize("name", NAMED)
def test_a_named_sweep_composes(name: str) -> None:
    sweep = named(name)
    settings = build(sweep.settings(()), "sweep")
    if isinstance(settings, SearchSweepConfig):
        assert all(isinstance(one, Number) and one.log for one in sweep.space().values()) and settings.metric == "gold/ppo"
        return
    cells = sweep.grid()
    assert len(cells) == NAMED[name][1]
    configs = [sweep.config(cell.words, Path("runs/x/0")) for cell in cells[:: max(1, len(cells) // 5)]]
    for config, error in configs:
        assert error is None
        check(build(config))
    assert len({json.dumps(config) for config, _ in configs}) == len(configs), "every cell is another run"


def test_the_switches_are_those_of_the_experiment() -> None:
    """A switch says what a cell `corrected-SWITCH` of experiments/ablation_details says, but for sizes."""
    cells = yaml.safe_load((SWEEPS.parent / "experiments" / "ablation_details" / "cells.yaml").read_text())["cells"]
    flipped = {cell["name"].removeprefix("corrected-").replace("-", "_"): cell["set"] for cell in cells if cell.get("from") == "corrected"}
    for file in (SWEEPS / "switch").glob("*.yaml"):
        switch = yaml.safe_load(file.read_text())
        words = [word for word in flipped.get(file.stem, []) if "micro_batch_size" not in word]
        (switch.get("ppo") or {}).pop("micro_batch_size", None)
        said = {f"ppo.{key}": value for key, value in _leaves(switch.get("ppo", {}))}
        assert said == {word.partition("=")[0]: yaml.safe_load(word.partition("=")[2]) for word in words}, file.name


def _leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        yield from _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]


@pytest.mark.launch
@pytest.mark.parametrize("name", ["zero_grid", "ablation_details", "model_scaling"])
def test_the_first_job_of_a_named_sweep_runs(name: str, tmp_path: Path) -> None:
    """In this process. kl_grid, seeds and lr_search are the same verbs with other numbers."""
    small = [*TINY, *(TINY_PIPELINE if NAMED[name][0] == "pipeline" else ())]
    sweep = named(name, *small)
    config, error = sweep.config(sweep.grid()[0].words, tmp_path / "0")
    assert error is None
    (run_pipeline if NAMED[name][0] == "pipeline" else run_job)(config)
    assert summary(tmp_path / "0")["status"] == "done"
