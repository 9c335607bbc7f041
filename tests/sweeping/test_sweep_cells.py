"""sweep.yaml and what becomes of a cell's folder when a sweep goes on."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import UserError
from rlhf.sweeping.cells import Cell, Sweep, clear, fate, first_difference, held, joined, read_summary, read_sweep, write_summary
from rlhf.sweeping.metrics import column


def sweep(**changes: Any) -> Sweep:
    cells = [Cell("0", {"ppo.kl_coef": 1e-5, "data": "pairs"}), Cell("1", {"ppo.kl_coef": None, "data": ["ä", True]}, trial=3)]
    return Sweep(**{"verb": "ppo", "words": ["a=1,2"], "config_name": None, "config_dir": None, "commit": "0f+", "settings": {"jobs": 2},
                    "cells": cells, **changes})  # fmt: skip


def test_a_sweep_is_read_as_it_was_written(tmp_path: Path) -> None:
    sweep().write(tmp_path)
    assert read_sweep(tmp_path) == sweep()
    assert "trial" not in (tmp_path / "sweep.yaml").read_text().partition("- folder: '1'")[0], "a grid has no trials"
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.yaml"]


def test_a_directory_without_a_sweep(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no sweep \(no sweep\.yaml\)"):
        read_sweep(tmp_path)
    sweep(cells=[Cell("0", None)]).write(tmp_path)  # type: ignore[arg-type]
    null = (tmp_path / "sweep.yaml").read_text()
    for text in ("", "just words", "verb: ppo", "cells: [{folder: 0}]", "{", null):
        (tmp_path / "sweep.yaml").write_text(text)
        with pytest.raises(UserError, match=r"sweep\.yaml: this is no file of a sweep"):
            read_sweep(tmp_path)


def test_one_command_at_a_time(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from rlhf.sweeping.cells import held\nwith held(Path(sys.argv[1])): print('mine', flush=True); time.sleep(60)"
    folder = tmp_path / "new"
    other = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "mine\n"
    with pytest.raises(UserError, match="another command is at work there"), held(folder):
        pass
    other.kill()
    other.wait()
    with held(folder):
        assert list(folder.iterdir()) == [], "the lock leaves nothing behind"


# --- going on --------------------------------------------------------------------------------------------------------------------


def cell(folder: Path, status: str | None = None, error: str = "", *, begun: bool = True, checkpoint: bool = False) -> Path:
    folder.mkdir()
    (folder / "log.txt").write_text("what it said\n")
    if begun:
        (folder / "config.yaml").write_text("seed: 0\n")
        (folder / "metrics.csv").write_text("step,loss\n1,2\n")
    if checkpoint:
        (folder / "checkpoints" / "step-000002").mkdir(parents=True)
        (folder / "checkpoints" / "step-000002" / "manifest.json").write_text("{}")
    if status is not None:
        (folder / "summary.json").write_text(json.dumps({"status": status, "error": error}))
    return folder


@pytest.mark.parametrize(
    ("facts", "steps", "expected"),
    [
        ({"status": "done"}, False, "keep"),
        ({"status": "pruned", "error": "hopeless"}, False, "keep"),
        ({"status": "refused", "error": "UserError: no"}, False, "anew"),
        ({"status": "failed", "error": "RuntimeError: fire", "checkpoint": True}, False, "anew"),
        ({"status": "failed", "error": "Interrupted: by hand", "checkpoint": True}, False, "go on"),
        ({"status": "failed", "error": "Interrupted: by hand"}, False, "anew"),
        ({"checkpoint": True}, False, "go on"),
        ({}, False, "anew"),
        ({}, True, "go on"),
        ({"begun": False}, True, "anew"),
        ({"status": "failed", "error": "RuntimeError: fire"}, True, "anew"),
    ],
)
def test_what_becomes_of_a_cell(facts: dict[str, Any], steps: bool, expected: str, tmp_path: Path) -> None:
    assert fate(cell(tmp_path / "0", **facts), steps=steps) == expected


@pytest.mark.parametrize("text", ["", "{", "[]", '{"error": "no"}'])
def test_a_cell_with_a_damaged_summary_counts_as_cut_short(text: str, tmp_path: Path) -> None:
    saved, lost = cell(tmp_path / "0", checkpoint=True), cell(tmp_path / "1")
    for folder, expected in ((saved, "go on"), (lost, "anew")):
        (folder / "summary.json").write_text(text)
        assert read_summary(folder) is None
        assert fate(folder, steps=False) == expected
    clear(lost)
    assert [path.name for path in lost.iterdir()] == ["log.txt"]


def test_a_cell_that_never_began(tmp_path: Path) -> None:
    assert fate(tmp_path / "0", steps=False) == "anew"
    clear(tmp_path / "0")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_is_kept_beside(tmp_path: Path) -> None:
    for attempt in (1, 2):
        clear(cell(tmp_path / "0", "failed", f"RuntimeError: fire {attempt}", checkpoint=True))
        assert not (tmp_path / "0").exists()
        kept = tmp_path / f"0.failed-{attempt}"
        assert (read_summary(kept) or {})["error"] == f"RuntimeError: fire {attempt}"
        assert (kept / "checkpoints" / "step-000002" / "manifest.json").is_file()


@pytest.mark.parametrize("facts", [{}, {"status": "failed", "error": "Interrupted: by hand"}, {"status": "refused", "error": "no"}])
def test_of_a_run_cut_short_before_its_checkpoint_the_log_stays(facts: dict[str, Any], tmp_path: Path) -> None:
    clear(cell(tmp_path / "0", **facts))
    assert [path.name for path in tmp_path.rglob("*")] == ["0", "log.txt"]


def test_a_metric_that_is_no_number_is_null_in_the_file_alone(tmp_path: Path) -> None:
    told = {"metrics": {"a": math.nan, "b": -math.inf, "c": 1.5}, "config": {"x": [math.inf, 1]}, "status": "done"}
    write_summary(tmp_path, told)

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    said = json.loads((tmp_path / "summary.json").read_text(), parse_constant=no_constant)
    assert said == {"metrics": {"a": None, "b": None, "c": 1.5}, "config": {"x": [None, 1]}, "status": "done"}
    metrics = (read_summary(tmp_path) or {})["metrics"]
    assert math.isnan(metrics["a"]) and math.isnan(metrics["b"]) and metrics["c"] == 1.5


def test_the_first_difference_is_named() -> None:
    assert first_difference(["a=1", "b=2"], ["b=2", "a=1"]) is None
    assert first_difference(["a=1", "b=2"], ["a=1", "b=3"]) == "b=3 is not what the sweep began with"
    assert first_difference(["a=1", "b=2"], ["a=1"]) == "b=2, which the sweep began with, is missing"


def test_values_may_be_added_and_not_taken_away() -> None:
    def cells(*seeds: int) -> list[Cell]:
        return [Cell(str(i), {"seed": seed}) for i, seed in enumerate(seeds)]

    assert joined(cells(0, 1), cells(2, 0, 1, 3)) == [
        Cell("0", {"seed": 0}),
        Cell("1", {"seed": 1}),
        Cell("2", {"seed": 2}),
        Cell("3", {"seed": 3}),
    ]
    with pytest.raises(UserError, match="holds cell 1 seed=1, which these words leave out"):
        joined(cells(0, 1), cells(0, 2))


# --- metrics ---------------------------------------------------------------------------------------------------------------------


def test_a_column_is_read_while_it_grows(tmp_path: Path) -> None:
    assert column(tmp_path, "rollout/reward") is None
    file = tmp_path / "ppo" / "metrics.csv"  # a step of a pipeline
    file.parent.mkdir()
    file.write_text("step,loss,rollout/reward\n1,2,\n2,2,0.5\n3,2,0.7")
    assert column(tmp_path, "rollout/reward") == [(2, 0.5)], "the last line is not whole yet"
    file.write_text("step,loss,rollout/reward\n1,2,\n2,2,0.5\n3,2,0.75\n")
    assert column(tmp_path, "rollout/reward") == [(2, 0.5), (3, 0.75)]
    assert column(tmp_path, "rollout/rewrad") is None


def test_a_column_is_read_whatever_its_neighbours_are_called(tmp_path: Path) -> None:
    names = ["a\nb", "a\rb", "a\x0bb", "a\u2028b", 'a",b', "loss"]
    with (tmp_path / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["step", *names], [1, *range(6)], [2, *range(6)]])
    for i, name in enumerate(names):
        assert column(tmp_path, name) == [(1, i), (2, i)]
