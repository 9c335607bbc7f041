"""What is a run and what is not, and what is said of files that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from experiment_folder import config, run, sweep

from rlhf.config import UserError
from rlhf.reporting.runs import UNFINISHED, UNREADABLE, find_runs, read_run, read_sweep


def names(folder: Path) -> list[str]:
    return [one.folder.relative_to(folder).as_posix() for one in find_runs([folder]).runs]


def test_runs_lie_anywhere_below_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("b/10", "b/9", "a", ".hidden/1"):
        run(tmp_path / name)
    assert names(tmp_path) == ["a", "b/9", "b/10"]
    assert [one.name for one in find_runs([tmp_path / "a", tmp_path, tmp_path / "b"]).runs] == [
        str(tmp_path / n) for n in ("a", "b/9", "b/10")
    ]


def test_a_run_is_named_from_the_working_directory_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "a" / "b")
    monkeypatch.chdir(tmp_path / "a")
    assert [one.name for one in find_runs([tmp_path / "a"]).runs] == ["b"]
    (tmp_path / "c").mkdir()
    monkeypatch.chdir(tmp_path / "c")
    assert [one.name for one in find_runs([tmp_path / "a"]).runs] == [str(tmp_path / "a" / "b")]


def test_a_pipeline_counts_and_not_its_steps(tmp_path: Path) -> None:
    run(tmp_path / "p")
    for step in ("sft", "ppo"):
        run(tmp_path / "p" / step)
    assert names(tmp_path) == ["p"]


def test_a_pipeline_without_a_summary_fails_with_its_step(tmp_path: Path) -> None:
    run(tmp_path / "sft")
    run(tmp_path / "ppo", None)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config() | {"verb": "pipeline"}))
    (one,) = find_runs([tmp_path]).runs
    assert (one.status, one.reason, one.verb) == ("failed", "ppo: RuntimeError: no space left", "pipeline")


def test_a_run_that_goes_on_has_a_config_and_no_summary(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config(seed=4)))
    (one,) = find_runs([tmp_path]).runs
    assert (one.status, one.seed, one.reason) == (UNFINISHED, 4, "no summary.json yet")


def test_another_programs_config_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").write_text("model: x\n")
    run(tmp_path / "a" / "b")
    assert names(tmp_path) == ["a/b"]


def test_a_link_is_followed_and_one_that_leads_back_is_not(tmp_path: Path) -> None:
    run(tmp_path / "elsewhere" / "b")
    run(tmp_path / "here" / "a")
    (tmp_path / "here" / "back").symlink_to(tmp_path / "here")
    (tmp_path / "here" / "c").symlink_to(tmp_path / "elsewhere")
    assert names(tmp_path / "here") == ["a", "c/b"]


def test_cells_of_a_sweep_are_there_before_they_begin(tmp_path: Path) -> None:
    folder = sweep(tmp_path / "s", [{"ppo.kl_coef": 0.02, "seed": 0}, {"+ppo.x": 1, "seed": 1}])
    run(folder / "0")
    run(folder / "left-over")
    found = find_runs([folder])
    assert [(one.status, one.seed) for one in found.runs] == [("done", 0), (UNFINISHED, 1)]
    assert found.runs[1].overrides == {"ppo.x": 1, "seed": 1} and found.runs[1].reason == "no run directory yet"
    assert found.sweeps[0].command == "rlhf ppo -m ppo.kl_coef=0.02,0.1 seed=0,1"
    (folder / "sweep.yaml").write_text("{verb: ppo, words: [a=1], config_dir: sweeps, config_name: grid, cells: []}")
    assert read_sweep(folder).command == "rlhf ppo -m --config-dir sweeps -cn grid a=1"


def test_times_are_metrics_and_what_is_no_number_is_none(tmp_path: Path) -> None:
    gpus = {"gpus": ["H100", "H100"]}
    place = run(tmp_path, 0.5, metrics={"kl": float("nan")}, seconds={"total": 7200.0, "ppo": 60}, hardware=gpus)
    summary = json.loads((place / "summary.json").read_text())
    summary["config"]["trainer"]["devices"] = 2
    (place / "summary.json").write_text(json.dumps(summary))
    one = read_run(place)
    assert one.metrics == {"gold/ppo": 0.5, "seconds/total": 7200.0, "seconds/ppo": 60.0, "hours": 2.0, "gpu_hours": 4.0}
    assert list(one.uncounted) == ["kl"] and one.hardware == "2 x H100"


ODD = '{"status": "done", "metrics": {}, "seed": 0, %s}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"status": "done",\n "metr', "summary.json:2: not JSON: "),
        ("[]", "summary.json: not a mapping"),
        ('{"metrics": {}, "seed": 0}', "summary.json: no key 'status'"),
        ('{"status": "done", "metrics": [], "seed": 0}', "summary.json: metrics must be a mapping, got []"),
        ('{"status": "done", "metrics": {"kl": "low"}, "seed": 0}', "summary.json: metrics: kl must be a number, got 'low'"),
        (
            '{"status": "done", "metrics": {}, "seconds": {"total": true}, "seed": 0}',
            "summary.json: seconds: total must be a number, got True",
        ),
        ('{"status": "done", "metrics": {}, "seed": 1.5}', "summary.json: seed must be a whole number, got 1.5"),
        ('{"status": "done", "metrics": {}}', "summary.json: seed must be a whole number, got None"),
        (b"\xff\xfe", "summary.json: 'utf-8' codec can't decode"),
        (ODD % '"config": {"trainer": "x"}', "summary.json: config.trainer must be a mapping, got 'x'"),
        (ODD % '"config": {"ref": 5}', "summary.json: config.ref must be a mapping, got 5"),
        (ODD % '"config": {"trainer": {"devices": [0]}}', "summary.json: config.trainer.devices must be a whole number, got [0]"),
        (ODD % '"config": {"evaluation": {"names": 5}}', "summary.json: config.evaluation.names must be a list of names, got 5"),
        (ODD % '"hardware": {"gpus": 3}', "summary.json: hardware.gpus must be a list of names, got 3"),
        (ODD % '"hardware": {"gpus": [{}]}', "summary.json: hardware.gpus must be a list of names, got [{}]"),
        (ODD % f'"seconds": {{"total": 1{"0" * 400}}}', "summary.json: seconds: total is too large a number, of 401 digits"),
        (ODD % f'"error": {"[" * 100_000}{"]" * 100_000}', "summary.json: nested too deeply"),
    ],
    ids=lambda part: part[:60] if isinstance(part, str) else None,
)
def test_a_summary_that_cannot_be_read_is_a_run_that_says_why(text: str | bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    (one,) = find_runs([tmp_path]).runs
    assert one.status == UNREADABLE and message in one.reason


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: b: c", r"sweep\.yaml:1: not YAML"),
        ("a: 1", r"sweep\.yaml: there must be a list of cells"),
        ("cells: [{overrides: {}}]", r"sweep\.yaml: cells\[0\] must have a folder"),
        ("cells: [{folder: 0, overrides: [a]}]", r"sweep\.yaml: cells\[0\] must have a folder and a mapping of overrides"),
    ],
)
def test_a_malformed_sweep_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        find_runs([tmp_path])


def test_folders_without_runs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "sweeps").mkdir()
    with pytest.raises(UserError, match=r"there is no folder .*sweps \(did you mean 'sweeps'\?\)"):
        find_runs([tmp_path / "sweps"])
    with pytest.raises(UserError, match=r"sweeps holds no run \(no summary\.json, config\.yaml or sweep\.yaml in it or below\)"):
        find_runs([tmp_path / "sweeps"])
