"""Runs as W&B and TensorBoard keep them: a pipeline that is a cell of a sweep, a run that fails and is resumed, one on two ranks, a report.

All records are offline ones, read back from their files. All jobs share one process, which pays for one start.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from tiny import write_pairs
from wandb_records import Offline, offline

HERE = Path(__file__).parent
DATA = ("data=pairs", "data.max_prompt_tokens=12", "data.max_answer_tokens=8", "trainer.threads=1", "~callbacks.progress")
SFT = ("sft", "model@actor.model=tiny", *DATA, "data.split=[1,0,0]", "sft.batch_size=4", "sft.micro_batch_size=2", "sft.max_steps=4")
PIPELINE = (
    "pipeline", "model@actor.model=tiny", "model@critic.model=tiny", "model@reward.model=tiny", *DATA, "data.split=[1,1,2]",
    "sft.batch_size=4", "sft.micro_batch_size=4", "sft.max_steps=2", "rm.batch_size=4", "rm.micro_batch_size=4", "rm.max_steps=2",
    "ppo.iterations=4", "ppo.batch_size=8", "ppo.minibatch_size=8", "ppo.micro_batch_size=8", "ppo.kl_coef=0.02", "trainer.log_every=2",
    "evaluation=default", "evaluation.names=[sft,ppo]", "evaluation.prompts=8", "evaluation.pairs=4", "evaluation.texts=0",
    "evaluation.batch_size=4", "evaluation.gold=mishaps.shorter_is_better", "callbacks.samples.every=3", "callbacks.samples.rows=2",
)  # fmt: skip
FAIL = ("+callbacks.fail._target_=mishaps.FailIn", "+callbacks.fail.name=torn")
CODE = """
import json, sys
from pathlib import Path
from rlhf.cli.main import main
jobs, sweep, node = json.loads(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
codes = [main(words) for words in jobs]
from rlhf.cli.sweep.wandb import log_report, log_status
log_report(sweep, node, sweep.name)
log_status(sweep.parent / "two", "pruned", "it was worse than the median")
log_status(sweep, "pruned", "no run of a job")
print(json.dumps(codes))
"""
STEPS = ("sft", "reward", "ppo", "evaluate")


def environment(home: Path) -> dict[str, str]:
    """A machine where nobody has logged in to W&B."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB") and name != "NETRC"}
    return kept | {"HOME": str(home), "PYTHONPATH": str(HERE)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("wandb")
    sweep = root / "kl"
    sweep.mkdir()
    cells = [{"folder": str(i), "overrides": {"ppo.kl_coef": coef, "seed": 0}} for i, coef in enumerate((0.02, 0.1))]
    about = {"verb": "pipeline", "words": ["experiment=dschat/ppo", "ppo.kl_coef=0.02,0.1"], "config_name": "kl_grid", "cells": cells}
    (sweep / "sweep.yaml").write_text(yaml.safe_dump(about))
    (sweep / "report.html").write_text("<h1>kl</h1>")
    (sweep / "table.csv").write_text("kl_coef,gold\n0.02,1\n")
    shared = ("logger=all", f"data.path={write_pairs(root / 'pairs.jsonl', 64)}", f"data.cache_dir={root / 'cache'}")
    torn = (*SFT, *shared, "trainer.checkpoint_every=1", "sft.max_steps=4", f"run_dir={root / 'torn'}")
    jobs = [
        [*PIPELINE, *shared, f"run_dir={sweep / '0'}"],
        [*torn, *FAIL],
        [*torn, "resume=true"],
        [*SFT, *shared, "trainer.devices=2", f"run_dir={root / 'two'}"],
        [
            *PIPELINE,
            *shared,
            "steps=[sft,reward]",
            "reward.lora.rank=2",
            "reward.lora.target_modules=[nowhere]",
            f"run_dir={root / 'half'}",
        ],
        [*PIPELINE, *shared, "steps=[reward]", "reward.lora.rank=2", "reward.lora.target_modules=[nowhere]", f"run_dir={root / 'refused'}"],
    ]
    node = {
        "_target_": "rlhf.callbacks.wandb_log.WandbLog", "project": "rlhf", "entity": None, "name": None, "group": None, "tags": [],
        "offline": None, "artifacts": "reference", "bins": 64, "upload_minutes": 1,
    }  # fmt: skip
    command = [sys.executable, "-c", CODE, json.dumps(jobs), str(sweep), json.dumps(node)]
    done = subprocess.run(command, env=environment(root), capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1:] == ["[0, 1, 0, 0, 2, 2]"], done.stderr[-4000:]
    (root / "stderr").write_text(done.stderr)
    return root


def one(run_dir: Path) -> Offline:
    (record,) = offline(run_dir)
    return record


def summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


def metrics(run_dir: Path) -> list[dict[str, float]]:
    with (run_dir / "metrics.csv").open(newline="") as f:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(f)]


def events(run_dir: Path) -> EventAccumulator:
    found = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0, "histograms": 0})
    return found.Reload()


# --- a pipeline in a sweep ---------------------------------------------------------------------------------------------------------


@pytest.mark.launch
@pytest.mark.parametrize("step", [*STEPS, "pipeline"])
def test_a_run_says_where_it_belongs_and_what_it_was(step: str, runs: Path) -> None:
    cell = runs / "kl" / "0"
    folder = cell if step == "pipeline" else cell / step
    record = one(folder)
    assert (record.run.run_group, record.run.job_type) == ("kl", step)
    assert record.run.display_name == f"{step} kl_coef=0.02 seed=0"
    assert list(record.run.tags) == ["dschat/ppo", "kl_grid"]
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert {key: record.config[key] for key in saved} == saved
    assert (record.config["commit"], record.config["machine"]) == (summary(folder)["commit"], summary(folder)["hardware"])
    assert record.config["machine"]["threads"] == 1  # Lightning's launcher would have all cores
    assert record.config["sweep"] == {"name": "kl", "cell": "0"}
    assert record.config.get("pipeline") == (None if step == "pipeline" else "0")
    assert record.exit_code == 0


@pytest.mark.launch
@pytest.mark.parametrize("step", STEPS)
def test_the_history_is_metrics_csv(step: str, runs: Path) -> None:
    folder = runs / "kl" / "0" / step
    record, rows = one(folder), metrics(folder)
    key = {"sft": "sft/", "reward": "reward/", "ppo": "rollout/", "evaluate": "gold/"}[step]
    history = [row for row in record.history if any(name.startswith(key) for name in row)]
    assert record.axes["*"] == "iteration"
    assert [row["iteration"] for row in history] == [row["step"] for row in rows] == [row["_step"] for row in history]
    assert len(rows) == {"sft": 2, "reward": 2, "ppo": 2, "evaluate": 1}[step]
    for logged, written in zip(history, rows, strict=True):
        assert {name: logged[name] for name in written if name != "step"} == pytest.approx(
            {name: value for name, value in written.items() if name != "step"}, rel=1e-6
        )
    assert any(name.startswith("time/") for name in history[-1]) == (step != "evaluate")


@pytest.mark.launch
@pytest.mark.parametrize("step", [*STEPS, "pipeline"])
def test_the_summary_is_summary_json(step: str, runs: Path) -> None:
    folder = runs / "kl" / "0" / ("" if step == "pipeline" else step)
    record, written = one(folder), summary(folder)
    assert record.summary["status"] == "done" and "error" not in record.summary
    assert {name: record.summary[name] for name in written["metrics"]} == pytest.approx(written["metrics"])
    if step in ("evaluate", "pipeline"):
        assert record.summary["gold/ppo"] == pytest.approx(written["metrics"]["gold/ppo"])
    if step != "evaluate":
        assert record.summary["seconds"].keys() == written["seconds"].keys() - ({"total"} if step != "pipeline" else set())


@pytest.mark.launch
def test_histograms_come_with_the_metrics(runs: Path) -> None:
    record = one(runs / "kl" / "0" / "ppo")
    rows = record.rows_with("histogram/reward.values")
    assert [row["iteration"] for row in rows] == [2, 4]
    for row, written in zip(rows, metrics(runs / "kl" / "0" / "ppo"), strict=True):
        counts, edges = row["histogram/reward.values"], row["histogram/reward.bins"]
        assert sum(counts) == 8 and len(counts) == 64
        middle = sum(n * (a + b) / 2 for n, a, b in zip(counts, edges, edges[1:], strict=False)) / 8
        assert middle == pytest.approx(written["rollout/reward"], abs=(edges[-1] - edges[0]) / 64)
        assert row["histogram/length.bins"][-1] <= 8.5
    answers = len((runs / "kl" / "0" / "evaluate" / "samples.jsonl").read_text().splitlines())
    gold = one(runs / "kl" / "0" / "evaluate").history[0]
    assert sum(gold["histogram/gold/ppo.values"]) == sum(gold["histogram/gold/sft.values"]) == answers > 0


@pytest.mark.launch
def test_samples_are_one_growing_table(runs: Path) -> None:
    folder = runs / "kl" / "0" / "ppo"
    written = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    logged = one(folder).rows_with("samples.nrows")
    assert [(row["iteration"], row["samples.nrows"], row["samples.increment_num"]) for row in logged] == [(1, 2, 0), (4, 4, 1)]
    (files,) = (folder / "wandb").glob("offline-run-*/files")
    tables = [json.loads((files / row["samples.path"]).read_text()) for row in logged]
    assert tables[0]["columns"] == list(written[0]) == ["step", "prompt", "answer", "ended", "length", "reward"]
    assert [row for table in tables for row in table["data"]] == [list(row.values()) for row in written]


@pytest.mark.launch
def test_models_are_linked_from_step_to_step(runs: Path) -> None:
    record = {step: one(runs / "kl" / "0" / step) for step in STEPS}
    made = {step: record[step].models(used=False) for step in STEPS}
    used = {step: record[step].models(used=True) for step in STEPS}
    assert [sorted(made[step]) for step in STEPS] == [["sft-actor"], ["reward-reward"], ["ppo-actor", "ppo-critic"], []]
    digests = {name: digest for step in STEPS for name, digest in made[step].items()}
    assert len(set(digests.values())) == 4
    expected = {
        "sft": [], "reward": ["sft-actor"], "ppo": ["reward-reward", "sft-actor"], "evaluate": ["ppo-actor", "reward-reward", "sft-actor"],
    }  # fmt: skip
    for step in STEPS:
        assert used[step] == {name: digests[name] for name in expected[step]}, "known by its contents, as `wandb sync` will find it"
    assert record["ppo"].config["lineage"] == {
        "actor": {"artifact": "sft-actor", "run": record["sft"].run.run_id},
        "reward": {"artifact": "reward-reward", "run": record["reward"].run.run_id},
    }
    (weights,) = [
        entry for a in record["sft"].artifacts if a.type == "model" for entry in a.manifest.contents if entry.path.endswith(".safetensors")
    ]
    assert weights.ref == (runs / "kl" / "0" / "sft" / "export" / "actor" / "model.safetensors").as_uri() and not weights.local_path


@pytest.mark.launch
def test_the_pipeline_shows_its_table_and_curves(runs: Path) -> None:
    folder = runs / "kl" / "0"
    (row,) = one(folder).history
    (files,) = (folder / "wandb").glob("offline-run-*/files")
    table = json.loads((files / row["comparison.path"]).read_text())
    found = summary(folder)["metrics"]
    assert table["columns"] == ["measure", "sft", "ppo"]
    assert ["gold score", found["gold/sft"], found["gold/ppo"]] in table["data"]
    assert (files / row["curves.path"]).read_bytes() == (folder / "curves.png").read_bytes()


@pytest.mark.launch
def test_a_report_is_a_run_of_the_sweeps_group(runs: Path) -> None:
    record = one(runs / "kl")
    assert (record.run.run_group, record.run.job_type, record.run.display_name) == ("kl", "report", "report kl")
    (artifact,) = record.artifacts
    assert (artifact.type, artifact.name) == ("report", "report-kl")
    assert sorted(entry.path for entry in artifact.manifest.contents) == ["report.html", "table.csv"]
    (files,) = (runs / "kl" / "wandb").glob("offline-run-*/files")
    assert (files / record.history[0]["report.path"]).read_text() == "<h1>kl</h1>"


@pytest.mark.launch
def test_without_a_key_one_line_says_where_the_record_lies(runs: Path) -> None:
    lines = [line for line in (runs / "stderr").read_text().splitlines() if line.startswith("rlhf: W&B:")]
    assert len(lines) == 13
    (folder,) = (runs / "kl" / "0" / "ppo" / "wandb").glob("offline-run-*")
    why = "no key (WANDB_API_KEY, wandb login), so this run is kept offline"
    assert f"rlhf: W&B: {why}; send it later with: wandb sync {folder}" in lines
    assert not [line for line in (runs / "stderr").read_text().splitlines() if line.startswith("wandb:")]


# --- runs that fail, go on, have several ranks --------------------------------------------------------------------------------------


@pytest.mark.launch
def test_a_failed_run_says_why_and_goes_on_under_its_id(runs: Path) -> None:
    failed, resumed = offline(runs / "torn")
    assert (failed.summary["status"], failed.summary["error"]) == ("failed", "RuntimeError: the disk is on fire")
    assert (failed.exit_code, resumed.exit_code) == (1, 0)
    assert failed.run.run_id == resumed.run.run_id and resumed.run.resume
    assert [row["iteration"] for row in failed.rows_with("sft/loss")] == [1, 2]
    assert [row["iteration"] for row in resumed.rows_with("sft/loss")] == [2, 3, 4], "from the checkpoint of step 1 on"
    assert (resumed.summary["status"], resumed.summary["error"]) == ("done", None), "what the first part died of is over"
    assert [row["step"] for row in metrics(runs / "torn") if "sft/loss" in row] == [1, 2, 3, 4]
    seen = {event.step for event in events(runs / "torn").Scalars("sft/loss")}
    assert seen == {1, 2, 3, 4}, "two files of events; those that begin within one second are read in any order"


@pytest.mark.launch
@pytest.mark.parametrize(("name", "status", "code"), [("half", "failed", 1), ("refused", "refused", 2)])
def test_a_pipeline_whose_step_is_refused_says_so_itself(name: str, status: str, code: int, runs: Path) -> None:
    said, record = summary(runs / name), one(runs / name)
    assert said["status"] == status
    assert said["error"].startswith("UserError: reward: reward.lora.target_modules")
    assert ("sft/perplexity" in said["metrics"]) == (name == "half")
    assert (record.summary["status"], record.summary["error"], record.exit_code) == (status, said["error"], code)
    assert not (runs / name / "reward" / "wandb").exists(), "refused before it was a run"


@pytest.mark.launch
def test_of_two_ranks_one_logs(runs: Path) -> None:
    assert offline(runs / "two")[0].summary["status"] == "done"
    files = [list((folder / "tensorboard").glob("events.*")) for folder in (runs / "two", runs / "kl" / "0" / "sft")]
    assert len(files[0]) == len(files[1])


@pytest.mark.launch
def test_how_a_run_ended_may_be_corrected(runs: Path) -> None:
    first, second = offline(runs / "two")
    assert first.run.run_id == second.run.run_id and second.run.display_name == "sft two"
    assert (second.summary["status"], second.summary["error"], second.exit_code) == ("pruned", "it was worse than the median", 0)
    assert second.history == []


# --- TensorBoard -------------------------------------------------------------------------------------------------------------------


@pytest.mark.launch
def test_tensorboard_has_the_same(runs: Path) -> None:
    folder = runs / "kl" / "0" / "ppo"
    found, rows = events(folder), metrics(folder)
    for name in ("rollout/reward", "time/generate", "actor/loss"):
        scalars = found.Scalars(name)
        assert [(event.step, pytest.approx(event.value)) for event in scalars] == [(row["step"], row[name]) for row in rows]
    assert [event.step for event in found.Histograms("histogram/reward")] == [2, 4]
    texts = found.Tensors("samples/text_summary")
    assert [event.step for event in texts] == [1, 4]
    written = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert written[0]["prompt"] in texts[0].tensor_proto.string_val[0].decode()
    assert found.Scalars("final/rollout/reward")[0].value == pytest.approx(summary(folder)["metrics"]["rollout/reward"])
    start = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hparams = plugin_data_pb2.HParamsPluginData.FromString(start).session_start_info.hparams
    assert hparams["ppo/kl_coef"].number_value == 0.02
    assert events(runs / "kl" / "0").Images("curves")[0].width > 100
