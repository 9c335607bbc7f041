"""metrics.csv as curves: what is read, what is drawn of it, and which files are refused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from experiment_folder import run

from rlhf.reporting.curves import POINTS, BadCurve, curve, read_columns
from rlhf.reporting.figures import coloured, panels
from rlhf.reporting.runs import read_run
from rlhf.reporting.study import read_study

HEAD = "step,rollout/reward,other\n"


def columns(folder: Path, text: str) -> dict[str, tuple[list[float], list[float]]]:
    return read_columns(read_run(run(folder, curve=text)))


def test_gaps_and_what_is_being_written_are_left_out(tmp_path: Path) -> None:
    assert columns(tmp_path, HEAD + "1,0.5,x\n2,,\n3,nan,\n4,1.5,\n5,2.") == {
        "rollout/reward": ([1, 3, 4], pytest.approx([0.5, math.nan, 1.5], nan_ok=True))
    }
    assert columns(tmp_path, HEAD + "1,0.5") == columns(tmp_path, "st") == {}


def test_a_name_may_hold_other_ends_of_lines(tmp_path: Path) -> None:
    text = 'step,a\x0bb,"a\nb",a\u2028b,rollout/reward\n1,5,5,5,0.5\n'
    assert columns(tmp_path, text) == {"rollout/reward": ([1], [0.5])}


def test_curves_of_a_pipeline_are_its_steps(tmp_path: Path) -> None:
    run(tmp_path)
    run(tmp_path / "sft", curve="step,sft/loss\n1,3\n")
    run(tmp_path / "ppo", curve=HEAD + "1,0.5,\n")
    assert read_columns(read_run(tmp_path)) == {"sft/loss": ([1], [3]), "rollout/reward": ([1], [0.5])}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + "1,0.5\n2,1,\n", r"metrics\.csv:2: 2 fields, the header has 3"),
        (HEAD + "1,0.5,\n2,fast,\n", r"metrics\.csv:3: step and rollout/reward must be numbers, got '2' and 'fast'"),
        ("rollout/reward\n1\n", r"metrics\.csv:1: no column step"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadCurve, match=message):
        columns(tmp_path, text)


def test_mean_and_interval_at_every_step() -> None:
    one = curve("a", [([1, 2, 3], [1.0, 2.0, math.inf]), ([2, 3], [4.0, 5.0])])
    assert one is not None and one.steps.tolist() == [1, 2, 3] and one.mean.tolist() == [1.0, 3.0, 5.0]
    assert one.low.tolist()[1] == 2.0 and one.high.tolist()[1] == 4.0 and math.isnan(one.low[0]) and math.isnan(one.low[2])
    assert curve("a", []) is None and curve("a", [([1], [math.nan])]) is None


def test_a_long_curve_is_means_over_stretches() -> None:
    steps = np.arange(10 * POINTS, dtype=float)
    one = curve("a", [(steps.tolist(), (2 * steps).tolist())])
    assert one is not None and len(one.steps) == POINTS
    assert one.steps[0] == pytest.approx(4.5) and one.mean == pytest.approx(2 * one.steps)


def test_the_baseline_and_the_best_are_drawn_and_only_what_is_done(tmp_path: Path) -> None:
    for i in range(9):
        for seed in (0, 1):
            run(tmp_path / str(i) / str(seed), 0.1 * i, seed=seed, ppo={"x": i}, curve=HEAD + f"1,{i + seed},\n")
    run(tmp_path / "8" / "2", None, seed=2, ppo={"x": 8}, curve=HEAD + "1,1000,\n")
    run(tmp_path / "8" / "1", 0.8, seed=1, ppo={"x": 8}, curve=HEAD + "1\n")
    study = read_study([tmp_path], metric=None, baseline=None, metrics=None, direction=None)
    assert list(coloured(study)) == ["x=0", "x=8", "x=7", "x=6", "x=5", "x=4", "x=3"]
    (panel,), complaints = panels(study)
    assert {one.cell: one.mean[0] for one in panel.curves} == {
        "x=0": 0.5,
        "x=8": 8,
        "x=7": 7.5,
        "x=6": 6.5,
        "x=5": 5.5,
        "x=4": 4.5,
        "x=3": 3.5,
    }
    assert complaints == [f"No curve of {tmp_path / '8' / '1'}: {tmp_path / '8' / '1' / 'metrics.csv'}:2: 1 fields, the header has 3"]
