"""experiments/ablation_details: the cells compose, a sitting goes on where the last one stopped, and the report computes what it says."""

from __future__ import annotations

import copy
import csv
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from rlhf.config import build
from rlhf.rules import check

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "experiments" / "ablation_details"
sys.path.insert(0, str(FOLDER))

import cells as cell_list  # noqa: E402
import record  # noqa: E402
import report  # noqa: E402
import run as runner  # noqa: E402

CELLS = cell_list.load()
PAGE = (ROOT / "docs" / "ppo_details.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def configs() -> dict[str, dict[str, Any]]:
    """The resolved config of every cell. Hydra composes once a preset; values are set on top, which refuses a key that is not there."""
    presets: dict[str, Any] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, cell in CELLS.items():
        words = dict(override.split("=", 1) for override in cell.overrides)
        preset = words.pop("ppo")
        if preset not in presets:
            with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
                presets[preset] = compose("pipeline", ["steps=[ppo,evaluate]", *runner.THREAD, f"ppo={preset}"])
            presets[preset].run_dir = "unused"
        cfg = copy.deepcopy(presets[preset])
        for key, value in words.items():
            OmegaConf.update(cfg, key, yaml.safe_load(value), merge=False)
        found[name] = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    return found


def test_every_cell_is_accepted(configs: dict[str, dict[str, Any]]) -> None:
    assert len(configs) > 50
    for config in configs.values():
        check(build(config))
        assert config["trainer"]["accelerator"] == "cpu" and config["trainer"]["threads"] == 1


def test_every_cell_differs_from_its_base_by_every_override(configs: dict[str, dict[str, Any]]) -> None:
    """A flip to the value that the base has would measure nothing."""
    for name, cell in CELLS.items():
        if cell.base is None:
            continue
        mine, base = configs[name], configs[cell.base]
        for flip in cell.flips:
            path = flip.partition("=")[0].split(".")
            assert path == ["ppo"] or lookup(mine, path) != lookup(base, path), f"{name}: {flip}"
        assert mine != base, name


def lookup(config: Any, path: list[str]) -> Any:
    for part in path:
        config = config[part]
    return config


def test_all_departures_of_dschat_are_in_the_riddle(configs: dict[str, dict[str, Any]]) -> None:
    """Each key in which the bases differ is mended alone (or with what it needs) and broken alone; but dropout is in neither."""
    ours, theirs = flat(configs["corrected4"]["ppo"]), flat(configs["dschat4"]["ppo"])
    apart = {key for key in ours if ours[key] != theirs[key]} - {"micro_batch_size", "score_in_train_mode"}
    for base, other in (("dschat4", ours), ("corrected4", theirs)):
        turned = set()
        for name, cell in CELLS.items():
            if cell.base == base:
                mine = flat(configs[name]["ppo"])
                turned |= {key for key in apart if mine[key] == other[key]}
        assert turned == apart


def flat(node: dict[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in node.items():
        found |= flat(value, f"{before}{name}.") if isinstance(value, dict) else {before + name: value}
    return found


def test_the_list_refuses_a_base_that_is_not_there_and_a_name_twice(tmp_path: Path) -> None:
    file = tmp_path / "cells.yaml"
    for entries, message in (
        ([{"name": "a", "from": "b", "set": []}], "a is made from b"),
        ([{"name": "a", "set": []}, {"name": "a", "set": []}], "two cells are called a"),
    ):
        file.write_text(json.dumps({"common": [], "cells": entries}))
        with pytest.raises(ValueError, match=message):
            cell_list.load(file)


def test_the_last_word_of_a_key_counts(tmp_path: Path) -> None:
    file = tmp_path / "cells.yaml"
    entries = [{"name": "a", "set": ["ppo=x", "k=2"]}, {"name": "b", "from": "a", "set": ["ppo=y", "l=3"]}]
    file.write_text(json.dumps({"common": ["k=1"], "cells": entries}))
    assert cell_list.load(file)["b"].overrides == ("k=2", "ppo=y", "l=3")


# --- a sitting -----------------------------------------------------------------------------------------------------------------


class FakePipeline:
    """Stands for the process of a run: writes what `rlhf pipeline` leaves behind."""

    def __init__(self, outcomes: dict[str, str]) -> None:
        self.outcomes = outcomes
        self.calls: list[tuple[str, int, tuple[str, ...]]] = []

    def __call__(self, steps: str, seed: int, run_dir: Path, overrides: Any, log: Path) -> int:
        self.calls.append((steps, seed, tuple(overrides)))
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("said")
        for step in steps.split(","):
            (run_dir / step / "export").mkdir(parents=True)
        outcome = self.outcomes.get(run_dir.parent.name, "done")
        if outcome == "done":
            write(run_dir, {"status": "done", "metrics": {"gold/ppo": 0.7}})
        if "ppo" in steps:
            (run_dir / "ppo" / "metrics.csv").write_text("step,critic/clip_fraction\n1,0.5\n")
            write(run_dir / "ppo", {"status": "done" if outcome == "done" else "failed", "metrics": {}, "error": outcome})
            if outcome != "done":  # the pipeline's own, which names the step
                kind, _, message = outcome.partition(": ")
                write(run_dir, {"status": "failed", "metrics": {}, "error": f"{kind}: ppo: {message}"})
        return 0 if outcome == "done" else 1


def write(folder: Path, summary: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary))


def test_a_sitting_keeps_results_and_the_next_one_does_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakePipeline({"dschat": "Collapsed: iteration 3: actor/entropy = 0", "corrected4": "RuntimeError: no space"})
    monkeypatch.setattr(runner, "pipeline", fake)
    words = [
        "--out",
        str(tmp_path),
        "--record",
        str(tmp_path / "runs.csv"),
        "--jobs",
        "2",
        "--seeds",
        "0,1",
        "--cells",
        "corrected,dschat,corrected4",
    ]
    assert runner.main(words) == 1
    assert [call[0] for call in fake.calls].count("sft,reward") == 2, "once a seed"
    statuses = {path.parts[-3]: json.loads(path.read_text())["status"] for path in tmp_path.glob("runs/*/seed-1/summary.json")}
    assert statuses == {"corrected": "done", "dschat": "diverged"}
    assert (tmp_path / "runs" / "dschat" / "seed-0" / "metrics.csv").is_file()
    assert not list((tmp_path / "work").rglob("export")) and len(list((tmp_path / "failed").iterdir())) == 2
    fake.calls.clear()
    fake.outcomes.clear()
    assert runner.main(words) == 0
    assert sorted((steps, seed) for steps, seed, _ in fake.calls) == [("ppo,evaluate", 0), ("ppo,evaluate", 1)]
    assert all("ppo.epochs=4" in overrides for _, _, overrides in fake.calls), "only what had failed"


def test_nothing_is_started_when_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakePipeline({})
    monkeypatch.setattr(runner, "pipeline", fake)
    assert (
        runner.main(
            ["--out", str(tmp_path), "--record", str(tmp_path / "runs.csv"), "--seeds", "0", "--cells", "corrected", "--hours", "0"]
        )
        == 3
    )
    assert [call[0] for call in fake.calls] == ["sft,reward"]


def test_a_result_of_another_cell_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(runner, "pipeline", FakePipeline({}))
    write(tmp_path / "runs" / "corrected" / "seed-0", {"status": "done", "overrides": ["ppo=corrected", "ppo.iterations=1"]})
    assert runner.main(["--out", str(tmp_path), "--record", str(tmp_path / "runs.csv"), "--seeds", "0", "--cells", "corrected"]) == 2
    assert "ppo.iterations=1" in capsys.readouterr().err
    assert runner.main(["--out", str(tmp_path), "--record", str(tmp_path / "runs.csv"), "--cells", "corected"]) == 2
    assert "no such cell: corected" in capsys.readouterr().err


def test_runs_of_an_earlier_sitting_are_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """runs.csv knows them, wherever their folders are."""
    monkeypatch.setattr(runner, "pipeline", FakePipeline({}))
    known = tmp_path / "known.csv"
    line = {name: 0.5 for name in (*record.METRICS, *record.CURVES, "wall_seconds")} | {
        "status": "done",
        "commit": "abc",
        "torch": "",
        "error": "",
    }
    for overrides, code in ((" ".join(CELLS["corrected"].overrides), 0), ("ppo=corrected", 2)):
        record.write({"corrected": {0: line | {"cell": "corrected", "seed": 0, "overrides": overrides}}}, CELLS, known)
        words = ["--out", str(tmp_path / "out"), "--record", str(known), "--seeds", "0,1", "--cells", "corrected", "--list"]
        assert runner.main(words) == code
    out, err = capsys.readouterr()
    assert out.splitlines() == ["1 of 2 runs are left", "corrected seed 1"]
    assert err.startswith("error: runs.csv, seed 0: corrected was run with ppo=corrected, which is not what it is now")


def test_a_process_gets_one_thread_and_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def fake(command: list[str], **options: Any) -> SimpleNamespace:
        seen.update(options, command=command)
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(runner.subprocess, "run", fake)
    assert runner.pipeline("ppo,evaluate", 4, tmp_path / "r", ["ppo.epochs=4"], tmp_path / "logs" / "log") == 3
    assert seen["env"]["CUDA_VISIBLE_DEVICES"] == "" and seen["env"]["OMP_NUM_THREADS"] == "1"
    assert {"seed=4", "steps=[ppo,evaluate]", "trainer.threads=1", "ppo.epochs=4", f"run_dir={tmp_path / 'r'}"} <= set(seen["command"])


# --- the report ----------------------------------------------------------------------------------------------------------------


def summary(gold: float | None, **more: Any) -> dict[str, Any]:
    """As run.py leaves it; no gold score: the run diverged."""
    metrics = {} if gold is None else {"gold/ppo": gold, "gold/sft": 0.5, "kl": 1.0, "length/ppo": 3.0, "distinct_2/ppo": 0.6}
    status = {"status": "diverged", "error": "Collapsed: iteration 3"} if gold is None else {"status": "done"}
    return {"metrics": metrics, "wall_seconds": 50.0, "commit": "abc", **status, **more}


def results(out: Path, golds: dict[str, list[float | None]]) -> list[report.Row]:
    for name, values in golds.items():
        for seed, gold in enumerate(values):
            write(cell_list.run_folder(out, name, seed), summary(gold))
            rows = "step,critic/clip_fraction\n1,0.25\n2,0.75\n3,\n"
            (cell_list.run_folder(out, name, seed) / "metrics.csv").write_text(rows)
    return report.table(CELLS, record.read_out(out))


GOLDS: dict[str, list[float | None]] = {
    "corrected": [0.70, 0.72, 0.68],
    "corrected-greedy": [0.50, 0.53, 0.47],
    "corrected-entropy": [0.71, 0.70, 0.69],
    "corrected-scaled": [0.75, 0.76, 0.74],
    "dschat": [0.40, 0.42, 0.41],
    "dschat4": [None, None, 0.3],
    "dschat4-sampled": [0.5, 0.6, 0.4],
}


def test_the_numbers_of_a_row(tmp_path: Path) -> None:
    rows = {r["cell"]: r for r in results(tmp_path, GOLDS)}
    greedy = rows["corrected-greedy"]
    assert greedy["n"] == greedy["pairs"] == 3 and greedy["gold"] == pytest.approx(0.5) and greedy["gold_sd"] == pytest.approx(0.03)
    assert (
        greedy["diff"] == pytest.approx(-0.2) and greedy["diff_low"] == pytest.approx(-0.21) and greedy["diff_high"] == pytest.approx(-0.19)
    )
    assert greedy["value_clipped"] == 0.5 and math.isnan(greedy["ratio_clipped"]) and greedy["kl"] == 1.0 and greedy["seconds"] == 50.0
    assert (
        rows["dschat4"]["n"] == 1
        and rows["dschat4"]["below_sft"] == 1
        and rows["dschat4"]["diverged"] == 2
        and rows["dschat4"]["pairs"] == 1
    )
    assert greedy["below_sft"] == 1 and rows["corrected"]["below_sft"] == 0
    assert rows["dschat4"]["message"] == "Collapsed: iteration 3"
    assert rows["dschat4-sampled"]["pairs"] == 1 and rows["dschat4-sampled"]["diff"] == pytest.approx(0.1)


def test_the_verdicts(tmp_path: Path) -> None:
    verdicts = {r["cell"]: (r["verdict"], r["by_student_too"]) for r in results(tmp_path, GOLDS)}
    assert verdicts == {
        "corrected": ("base", "no"), "dschat": ("hurts", "yes"), "dschat4": ("diverges", "no"), "dschat4-sampled": ("mends", "no"),
        "corrected-greedy": ("hurts", "yes"), "corrected-scaled": ("helps", "yes"), "corrected-entropy": ("no difference seen", "no"),
    }  # fmt: skip
    assert report.verdict(0.1, 0.2, pairs=2, diverged=0, base_diverged=0) == "too few seeds"
    assert report.verdict(0.1, 0.2, pairs=3, diverged=0, base_diverged=0) == "helps"


def test_the_intervals() -> None:
    values = np.random.default_rng(1).normal(0.1, 0.05, size=10).tolist()
    half = 2.262 * np.std(values, ddof=1) / math.sqrt(10)
    assert report.student(values) == pytest.approx((np.mean(values) - half, np.mean(values) + half))
    low, high = report.bootstrap(values)
    assert (high - low) / 2 == pytest.approx(1.96 * np.std(values) / math.sqrt(10), rel=0.1), "the normal interval, for ten values"
    assert low < np.mean(values) < high
    assert math.isnan(report.bootstrap([1.0])[0]) and math.isnan(report.student([1.0])[0])


def test_the_table_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    rows = results(tmp_path, GOLDS)
    assert report.main(["--out", str(tmp_path), "--to", str(tmp_path / "to")]) == 0
    assert (tmp_path / "to" / "effects.png").stat().st_size > 1000
    again = report.table(CELLS, record.read(tmp_path / "to" / "runs.csv"))
    assert [r["cell"] for r in again] == [r["cell"] for r in rows]
    assert report.markdown(again) == report.markdown(rows) == (tmp_path / "to" / "table.md").read_text()
    with (tmp_path / "to" / "table.csv").open(newline="") as f:
        assert next(csv.DictReader(f))["cell"] == "corrected"


def test_sittings_add_up(tmp_path: Path) -> None:
    first, second, to = tmp_path / "first", tmp_path / "second", tmp_path / "to"
    results(first, {"corrected": [0.70, 0.72], "dschat4": [None, 0.3]})
    assert report.main(["--out", str(first), "--to", str(to)]) == 0
    results(second, {"corrected": [0.71], "corrected-greedy": [0.5, 0.6]})
    assert report.main(["--out", str(second), "--to", str(to)]) == 0
    runs = record.read(to / "runs.csv")
    assert [runs["corrected"][seed]["gold"] for seed in (0, 1)] == [0.71, 0.72], "run again, the new number counts"
    assert runs["dschat4"][0]["error"] == "Collapsed: iteration 3" and math.isnan(runs["dschat4"][0]["gold"])
    table = (to / "table.csv").read_text()
    assert report.main(["--to", str(to)]) == 0 and (to / "table.csv").read_text() == table, "runs.csv says it all"


def test_runs_from_different_sft_models_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results(tmp_path, {"corrected": [0.7, 0.7], "dschat": [0.4, 0.4]})
    write(cell_list.run_folder(tmp_path, "dschat", 1), summary(0.4) | {"metrics": {"gold/ppo": 0.4, "gold/sft": 0.49}})
    assert report.main(["--out", str(tmp_path), "--to", str(tmp_path)]) == 2
    assert "seeds [1] hold runs from different SFT models" in capsys.readouterr().err


def test_the_page_gets_effects_where_a_cell_turns_a_key(tmp_path: Path) -> None:
    rows = results(tmp_path, GOLDS)
    page = report.filled(PAGE, rows)
    cell = {line.split("`")[1]: line.rsplit(" | ", 1)[1] for line in page.splitlines() if line.startswith("| `") and line.count(" | ") == 5}
    assert cell["greedy_rollouts"] == "corrected with `true`: -0.200 (-0.210 to -0.190), hurts |", "the riddle's cells are left out"
    assert cell["epochs"] == "dschat with `4`: -0.110, diverges |"
    assert cell["whiten_advantages"] == "not measured yet |"
    assert report.filled(page, []) == report.filled(PAGE, []), "what is filled can be filled again"
    other = [(a, b) for a, b in zip(PAGE.splitlines(), page.splitlines(), strict=True) if a.rsplit(" | ", 1)[0] != b.rsplit(" | ", 1)[0]]
    assert other == []


def test_keys_that_are_turned_together_say_so(tmp_path: Path) -> None:
    rows = results(tmp_path, {"dschat": [0.4] * 3, "dschat-own-pad-score-at-end": [0.5] * 3})
    said = report.effects(rows, report.keys_of(PAGE))
    assert said["pad_is_end"] == "dschat with `false` and `score_slot=end`: +0.100 (+0.100 to +0.100), helps"
    assert said["score_slot"].startswith("dschat with `end` and `pad_is_end=false`: ")


def test_table_and_page_say_what_the_runs_say(tmp_path: Path) -> None:
    """`python experiments/ablation_details/report.py --page docs/ppo_details.md` brings them up to date."""
    (tmp_path / "runs.csv").write_text((FOLDER / "runs.csv").read_text())
    assert report.main(["--to", str(tmp_path)]) == 0
    for name in ("runs.csv", "table.csv", "table.md"):
        assert (tmp_path / name).read_text() == (FOLDER / name).read_text(), name
    assert report.filled(PAGE, report.table(CELLS, record.read())) == PAGE
