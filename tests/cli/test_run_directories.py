"""A run directory belongs to one run: another one is refused and nothing of it is touched; what is resumed is the same run, whole."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from jobs import composed
from refusals import SFT, Refused, begun, contents, says

from rlhf.cli.job import JobFailed
from rlhf.cli.pipeline import run_pipeline
from rlhf.cli.rundir import claim, read_summary, write_summary
from rlhf.config import UserError
from rlhf.logging import log
from rlhf.sweeping.cells import held


@pytest.mark.parametrize("status", ["done", "failed", None], ids=["done", "failed", "killed"])
def test_another_run_is_not_touched(status: str | None, refused: Refused, pairs: Path, tmp_path: Path) -> None:
    run_dir = begun(tmp_path / "run", pairs, status=status)
    before = contents(run_dir)
    message = refused(*SFT, f"run_dir={run_dir}", f"data.path={pairs}", "seed=7")
    says(message, (f"run_dir={run_dir} already holds a run", "another run_dir", "resume=true"))
    assert contents(run_dir) == before


def test_a_run_that_goes_on_is_not_resumed_by_another_command(refused: Refused, pairs: Path, tmp_path: Path) -> None:
    run_dir = begun(tmp_path / "run", pairs, status=None)
    before = contents(run_dir)
    with held(run_dir):
        says(refused("sft", "resume=true", f"run_dir={run_dir}"), (f"run_dir={run_dir}: another command is at work there",))
    assert contents(run_dir) == before


def test_a_run_is_resumed_by_its_own_verb(refused: Refused, pairs: Path, tmp_path: Path) -> None:
    run_dir = begun(tmp_path / "run", pairs, status=None)
    says(refused("reward", "resume=true", f"run_dir={run_dir}"), (f"run_dir={run_dir} holds a run of rlhf sft", "resume it with that verb"))
    says(refused("sft", "resume=maybe", f"run_dir={run_dir}"), ("resume must be true or false, got 'maybe'",))


def test_a_refused_first_start_may_be_tried_again(refused: Refused, there: tuple[str, str], tmp_path: Path) -> None:
    for _ in range(2):
        says(refused(*SFT, *there, "data.sources=[piars]"), ("piars",))
    summary = read_summary(tmp_path / "run")
    assert summary is not None
    assert summary["status"] == "refused"
    assert "piars" in summary["error"]


def test_a_metric_that_is_no_number_is_null_in_the_summary(tmp_path: Path) -> None:
    written = write_summary({"verb": "sft", "seed": 0, "run_dir": str(tmp_path / "run")}, "done", metrics={"sft/loss": math.nan, "kl": 1.0})
    assert math.isnan(written["metrics"]["sft/loss"])
    text = (tmp_path / "run" / "summary.json").read_text()
    assert "NaN" not in text and '"sft/loss": null' in text and '"kl": 1.0' in text
    summary = read_summary(tmp_path / "run")
    assert summary is not None and math.isnan(summary["metrics"]["sft/loss"])


def test_a_run_that_was_refused_on_its_way_is_a_run(refused: Refused, pairs: Path, tmp_path: Path) -> None:
    """A reward function that fails in the middle is the user's error as well."""
    run_dir = begun(tmp_path / "run", pairs, status="refused")
    words = (*SFT, f"run_dir={run_dir}", f"data.path={pairs}", "seed=7")
    says(refused(*words), ("already holds a run",))
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "metrics.csv").write_text("step,sft/loss\n1,2.0\n")
    says(refused(*words), ("already holds a run",))
    (run_dir / "metrics.csv").unlink()
    says(refused(*words, "data.sources=[piars]"), ("piars",))


def test_a_stopped_pipeline_says_how_the_whole_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its step has said how the step does, which is another directory and another verb."""
    run_dir = tmp_path / "my run"

    def stopped(config: Mapping[str, Any]) -> dict[str, Any]:
        write_summary(config, "failed", error=f"Interrupted: stopped; go on with resume=true run_dir={config['run_dir']}")
        raise JobFailed(1)

    monkeypatch.setattr("rlhf.cli.pipeline._run_step", stopped)
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level("INFO", log.name)
    with pytest.raises(JobFailed):
        run_pipeline(composed("pipeline", "steps=[sft,reward]", "logger=csv", f"run_dir={run_dir}"))
    assert caplog.messages[-1] == f"the pipeline goes on with rlhf pipeline resume=true 'run_dir={run_dir}'"


def test_a_pipeline_whose_first_step_was_refused_on_its_way_is_a_run(tmp_path: Path) -> None:
    config = {"verb": "pipeline", "seed": 0, "run_dir": str(tmp_path), "resume": False, "trainer": {}}
    claim(tmp_path, config)
    write_summary(config, "refused")
    claim(tmp_path, config)
    (tmp_path / "ppo" / "checkpoints" / "step-000400").mkdir(parents=True)
    with pytest.raises(UserError, match="already holds a run"):
        claim(tmp_path, config)


@pytest.mark.parametrize("name", ["lr=0.1", "größe", "a b (1)", "'quoted b/lr=0.1'", "it's"])
def test_a_directory_may_have_any_name(name: str, refused: Refused, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(*SFT, f"data.path={pairs}", "data.sources=[piars]", f"run_dir={name}")
    assert (tmp_path / (name[1:-1] if name.startswith("'") else name) / "summary.json").is_file()


@pytest.mark.parametrize("more", [(), ("-m", "seed=0,1")], ids=["run", "sweep"])
def test_a_directory_that_cannot_be_made(more: tuple[str, ...], refused: Refused, pairs: Path, tmp_path: Path) -> None:
    for run_dir in (pairs, pairs / "x", tmp_path / ("x" * 300)):
        says(refused(*SFT, *more, f"data.path={pairs}", f"run_dir={run_dir}"), ("cannot be made: ", str(run_dir), "where you may write"))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"verb": "sft"}'])
def test_a_damaged_summary(text: str, refused: Refused, pairs: Path, tmp_path: Path) -> None:
    run_dir = begun(tmp_path / "run", pairs, status=None)
    (run_dir / "summary.json").write_text(text)
    for words in ((*SFT, f"run_dir={run_dir}", f"data.path={pairs}"), ("sft", f"run_dir={run_dir}", "resume=true")):
        says(refused(*words), (f"{run_dir}/summary.json: this is no summary of a run: remove it",))


@pytest.mark.parametrize("text", ["", "words", "{", "verb: sft"])
def test_a_damaged_config(text: str, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    for words in ((), ("seed=7",)):
        says(refused("sft", f"run_dir={tmp_path}", "resume=true", *words), (f"{tmp_path}/config.yaml: this is no configuration of a run",))


def test_resume_where_there_is_no_run(refused: Refused, there: tuple[str, str], tmp_path: Path) -> None:
    says(refused(*SFT, *there, "resume=true"), ("resume=true", str(tmp_path / "run"), "holds no run", "give the directory"))


def test_resume_cannot_change_what_is_trained(refused: Refused, pairs: Path, tmp_path: Path) -> None:
    run_dir = begun(tmp_path / "run", pairs, status="failed")
    before = contents(run_dir)
    again = (f"run_dir={run_dir}", f"data.path={pairs}", "resume=true")
    says(refused(*SFT, *again, "model@actor.model=tiny-opt"), ("cannot change actor.model.family", "'llama'", "'opt'", "new run_dir"))
    says(refused(*SFT, *again, "sft.optimizer.lr=0.5"), ("cannot change sft.optimizer.lr", "0.002", "0.5"))
    assert contents(run_dir) == before


@pytest.mark.parametrize("status", ["failed", None], ids=["failed", "killed"])
def test_a_damaged_checkpoint_is_named_and_the_run_stays_a_run(status: str | None, refused: Refused, pairs: Path, tmp_path: Path) -> None:
    run_dir = begun(tmp_path / "run", pairs, status=status, file_size=5)
    before = contents(run_dir)
    for _ in range(2):
        message = refused("sft", f"run_dir={run_dir}", "resume=true")
        says(message, ("step-000002", "module.pt has 5 bytes instead of 8", "damaged", "remove the folder"))
    after = contents(run_dir)
    config = yaml.safe_load(after.pop("config.yaml")[0])
    assert config == {**yaml.safe_load(before.pop("config.yaml")[0]), "resume": True}
    assert after == before
    says(refused(*SFT, f"run_dir={run_dir}", f"data.path={pairs}"), ("already holds a run",))


def test_a_checkpoint_of_another_number_of_ranks(refused: Refused, pairs: Path, tmp_path: Path) -> None:
    run_dir = begun(tmp_path / "run", pairs, status="failed", ranks=2)
    says(refused("sft", f"run_dir={run_dir}", "resume=true"), ("written by 2 ranks, this run has 1", "trainer.devices"))
