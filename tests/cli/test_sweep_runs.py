"""A sweep ends as it should whatever happens to its jobs. Most of them train nothing (`light.py`); one does."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from sweeps_of_tests import HERE, LIGHT, LOCAL, SMALL, all_end, command, diaries, statuses, summary, wait_until, without_report
from tiny import write_pairs

from rlhf.cli.main import main
from rlhf.sweeping import scheduler


@pytest.mark.launch
def test_every_rank_of_a_cell_gets_the_config_of_its_cell(light: Path) -> None:
    """Nine cells of two ranks, three at a time: two ranks of one group with different values have been seen where each read the command line."""
    words = ("sft.optimizer.lr=0.1,0.2,0.3", "seed=0,1,2", "trainer.devices=2", *LIGHT, "sweep.jobs=3", f"run_dir={light}")
    assert main(["sft", "-m", *words]) == 0
    assert statuses(light) == ["done"] * 9
    told, asked = diaries(light), yaml.safe_load((light / "sweep.yaml").read_text())["cells"]
    assert len(told) == 18 and all(len(starts) == 1 for starts in told.values())
    for cell in asked:
        first, second = (told[f"{cell['folder']}/rank-{rank}"][0] for rank in (0, 1))
        assert first["config"] == second["config"] == yaml.safe_load((light / cell["folder"] / "config.yaml").read_text())
        assert {"sft.optimizer.lr": first["config"]["sft"]["optimizer"]["lr"], "seed": first["config"]["seed"]} == cell["overrides"]
        assert first["config"]["run_dir"] == str(light / cell["folder"])
        assert "sweep" not in first["config"]
        assert first["environment"]["MASTER_PORT"] == second["environment"]["MASTER_PORT"]
        assert summary(light / cell["folder"])["seed"] == cell["overrides"]["seed"]
    cores = max(1, len(os.sched_getaffinity(0)) // 3)
    assert {(one[0]["environment"]["RLHF_CORES"], one[0]["environment"]["OMP_NUM_THREADS"]) for one in told.values()} == {
        (str(cores), str(max(1, cores // 2)))
    }
    # nothing is left: no process, no port, no file beside the runs
    all_end(one[0]["pid"] for one in told.values())
    for port in {int(one[0]["environment"]["MASTER_PORT"]) for one in told.values()}:
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind(("127.0.0.1", port))
    assert without_report(light) == {"sweep.yaml", *(cell["folder"] for cell in asked)}
    ours = {"config.yaml", "log.txt", "metrics.csv", "summary.json", "rank-0.jsonl", "rank-1.jsonl"}
    assert all({path.name for path in (light / cell["folder"]).iterdir()} == ours for cell in asked)


@pytest.mark.launch
def test_cells_share_pretended_gpus(
    light: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nfor i in 0 1 2 3; do echo "$i, Pretended"; done\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    words = ("trainer.devices=1,2,3", "sft.batch_size=12", "trainer=auto", "sweep.gpus=[1,3]", *LIGHT[:6], *LIGHT[7:], f"run_dir={light}")
    assert main(["sft", "-m", *words]) == 0
    visible = {name: starts[0]["environment"]["CUDA_VISIBLE_DEVICES"] for name, starts in diaries(light).items()}
    assert visible == {"0/rank-0": "1", "1/rank-0": "1,3", "1/rank-1": "1,3"}
    assert statuses(light) == ["done", "done", "refused"]
    assert summary(light / "2")["error"] == "UserError: trainer.devices=3 on GPUs, but the sweep has 2"
    assert summary(light / "2")["hardware"]["gpus"] == ["Pretended", "Pretended"]
    assert "rlhf: 1 trainer.devices=2 starts on GPU 1,3" in capfd.readouterr().err


@pytest.mark.launch
def test_killed_in_the_middle_and_gone_on_with_is_as_never_stopped(light: Path, tmp_path: Path) -> None:
    """The third of five cells is running when the command is killed, and the fourth has not yet saved."""
    slow = ("seed=0,1,2,3,4", *LIGHT, "+callbacks.light.steps=6", "+callbacks.light.saves=true", "trainer.devices=2", "sweep.jobs=2")
    assert main(["sft", "-m", *slow, f"run_dir={tmp_path / 'whole'}"]) == 0

    cut = command(light, *slow, "+callbacks.light.seconds=0.3")
    wait_until(
        lambda: len(list(light.glob("*/summary.json"))) >= 2 and any((light / "2" / "checkpoints").glob("step-000002/manifest.json"))
    )
    cut.kill()
    cut.communicate(timeout=30)
    before = diaries(light)
    all_end(start["pid"] for starts in before.values() for start in starts)
    assert not (light / "2" / "summary.json").exists() and (light / "0" / "summary.json").exists()
    written = (light / "0" / "summary.json").stat().st_mtime_ns
    done = [folder for folder in "01234" if (light / folder / "summary.json").exists()]

    assert main(["sft", "-m", f"run_dir={light}", "sweep.resume=true"]) == 0
    told = diaries(light)
    assert all(told[f"{folder}/rank-0"] == before[f"{folder}/rank-0"] for folder in done), "what is done is not run again"
    assert (light / "0" / "summary.json").stat().st_mtime_ns == written
    assert told["2/rank-0"][-1]["config"]["resume"] is True and told["4/rank-0"][-1]["config"]["resume"] is False
    for folder in "01234":
        one, other = summary(light / folder), summary(tmp_path / "whole" / folder)
        assert (one["status"], one["metrics"], one["seed"]) == (other["status"], other["metrics"], other["seed"])
        assert (light / folder / "metrics.csv").read_text() == (tmp_path / "whole" / folder / "metrics.csv").read_text()
    assert without_report(light) == {"sweep.yaml", *"01234"}
    all_end(start["pid"] for starts in told.values() for start in starts)


@pytest.mark.launch
def test_what_a_resumed_sweep_runs_again(light: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ("seed=0,1", "sft.batch_size=4,3", *LIGHT[:6], *LIGHT[7:], "+callbacks.light.fails=[1]", f"run_dir={light}")
    assert main(["sft", "-m", *words]) == 0
    assert statuses(light) == ["done", "refused", "failed", "refused"]
    out, err = capfd.readouterr()
    assert "rlhf: 2 seed=1 sft.batch_size=4 failed: RuntimeError: the disk is on fire" in err
    assert f"rlhf: 1 of 4 cells done, 1 failed, 2 refused; why is in {light}/N/log.txt" in err
    assert "1 refused: UserError: sft.batch_size=3 does not divide by" in out
    assert "rlhf: the disk is on fire" in (light / "2" / "log.txt").read_text()

    # the failed one runs again, in a folder of its own; with strict it counts
    assert main(["sft", "-m", *words, "sweep.resume=true", "sweep.strict=true"]) == 1
    assert statuses(light) == ["done", "refused", "failed", "refused"]
    assert summary(light / "2.failed-1")["error"] == "RuntimeError: the disk is on fire"
    assert [len(starts) for starts in diaries(light).values()] == [1, 1, 1], "cells 0, 2 and 2.failed-1"

    # values may be added, anything else may not change
    err = capfd.readouterr().err
    more = [word.replace("seed=0,1", "seed=0,1,2") for word in words]
    assert main(["sft", "-m", *more, "sweep.resume=true"]) == 0
    assert statuses(light) == ["done", "refused", "failed", "refused", "done", "refused"]
    assert yaml.safe_load((light / "sweep.yaml").read_text())["words"][0] == "seed=0,1,2"
    for changed, message in (
        ([*more, "sft.epochs=2"], "sft.epochs=2 is not what the sweep began with"),
        ([word for word in more if "split" not in word], "data.split=[1,0,0], which the sweep began with, is missing"),
        (
            [word.replace("seed=0,1,2", "seed=0,2") for word in more],
            "the sweep holds cell 2 seed=1 sft.batch_size=4, which these words leave out",
        ),
    ):
        capfd.readouterr()
        assert main(["sft", "-m", *changed, "sweep.resume=true"]) == 2
        assert message in capfd.readouterr().err
    assert main(["reward", "-m", f"run_dir={light}", "sweep.resume=true"]) == 2
    assert "holds a sweep of rlhf sft, not of rlhf reward" in capfd.readouterr().err


@pytest.mark.launch
def test_a_cell_whose_summary_is_damaged_runs_again(light: Path) -> None:
    assert main(["sft", "-m", "seed=0,1", *LIGHT, f"run_dir={light}"]) == 0
    (light / "1" / "summary.json").write_text("")
    assert main(["sft", "-m", f"run_dir={light}", "sweep.resume=true"]) == 0
    assert statuses(light) == ["done", "done"]


@pytest.mark.parametrize(("words", "code"), [(("sft.batch_size=3,5",), 2), (("seed=1,2", "sft.batch_size=4", "launcher=slurm"), 2)])
def test_a_sweep_of_refused_cells_only_is_refused(words: tuple[str, ...], code: int, light: Path) -> None:
    assert main(["sft", "-m", *words, *LIGHT[:6], *LIGHT[7:], f"run_dir={light}"]) == code
    assert statuses(light) == ["refused", "refused"]
    assert not list(light.glob("*/log.txt")), "no process was started"


@pytest.mark.launch
def test_a_sweep_of_failed_cells_only_has_failed(light: Path) -> None:
    assert main(["sft", "-m", "seed=0,1", *LIGHT, "+callbacks.light.fails=[0,1]", "sweep.jobs=2", f"run_dir={light}"]) == 1
    assert statuses(light) == ["failed", "failed"]


@pytest.mark.launch
def test_a_killed_cell_is_recorded_as_failed(light: Path) -> None:
    sweep = command(light, "seed=0", *LIGHT, "+callbacks.light.seconds=60")
    wait_until(lambda: diaries(light))
    os.kill(diaries(light)["0/rank-0"][0]["pid"], signal.SIGKILL)
    _, err = sweep.communicate(timeout=60)
    assert sweep.returncode == 1, err
    assert summary(light / "0")["error"] == "RuntimeError: the process was ended by SIGKILL without a summary: see log.txt"


@pytest.mark.launch
def test_ctrl_c_ends_a_sweep_that_can_go_on(light: Path) -> None:
    light = light.with_name("my sweep")
    slow = ("seed=0,1", *LIGHT, "+callbacks.light.seconds=0.5", "+callbacks.light.steps=4", "+callbacks.light.saves=true")
    sweep = command(light, *slow)
    wait_until(lambda: any((light / "0" / "checkpoints").glob("*/manifest.json")))
    sweep.send_signal(signal.SIGINT)
    _, err = sweep.communicate(timeout=60)
    assert sweep.returncode == 1, err
    assert "Traceback" not in err
    assert f"stopped by Ctrl-C; go on with: rlhf sft -m 'run_dir={light}' sweep.resume=true" in err
    assert summary(light / "0")["error"].startswith("Interrupted: ") and not (light / "1").exists()
    all_end(start["pid"] for starts in diaries(light).values() for start in starts)
    assert main(["sft", "-m", f"run_dir={light}", "sweep.resume=true"]) == 0
    assert [start["config"]["resume"] for start in diaries(light)["0/rank-0"]] == [False, True]
    assert statuses(light) == ["done", "done"]


# --- a search --------------------------------------------------------------------------------------------------------------------

SEARCH = ("sft.optimizer.lr=tag(log, interval(1e-4,1e-1))", "sweep=optuna", "sweep.metric=sft/perplexity", "sweep.direction=minimize")


@pytest.mark.launch
def test_a_search_goes_on_as_if_never_stopped(light: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = (*SEARCH, *LIGHT, "sweep.seeds=[0,1]", "sweep.trials=2")
    assert main(["sft", "-m", *words, f"run_dir={tmp_path / 'whole'}"]) == 0
    whole = yaml.safe_load((tmp_path / "whole" / "sweep.yaml").read_text())["cells"]
    assert [(cell["trial"], cell["overrides"]["seed"]) for cell in whole] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    values = {cell["folder"]: summary(tmp_path / "whole" / cell["folder"])["metrics"]["sft/perplexity"] for cell in whole}
    means = [(values[str(2 * trial)] + values[str(2 * trial + 1)]) / 2 for trial in range(2)]
    best = min(range(2), key=means.__getitem__)
    err = capfd.readouterr().err
    assert f"rlhf: best: trial {best}, sft/perplexity={means[best]:.6g}" in err
    assert f"sft.optimizer.lr={whole[2 * best]['overrides']['sft.optimizer.lr']!r}" in err.splitlines()[-1]

    cut = command(light, *words, "+callbacks.light.seconds=0.4")
    wait_until(lambda: (light / "1" / "rank-0.jsonl").exists())
    cut.kill()
    cut.communicate(timeout=30)
    assert main(["sft", "-m", f"run_dir={light}", "sweep.resume=true"]) == 0
    assert yaml.safe_load((light / "sweep.yaml").read_text())["cells"] == whole
    assert {cell["folder"]: summary(light / cell["folder"])["metrics"]["sft/perplexity"] for cell in whole} == values
    assert main(["sft", "-m", f"run_dir={light}", "sweep.resume=true", "sweep.metric=x"]) == 2
    assert "sweep.resume=true cannot change sweep.metric (was 'sft/perplexity', now 'x')" in capfd.readouterr().err


@pytest.mark.launch
def test_a_hopeless_trial_is_pruned(light: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is minimised grows with the learning rate."""
    monkeypatch.setattr(scheduler, "WATCH", 0.1)
    prune = (
        "sweep.pruner=median",
        "sweep.prune_on=value",
        "sweep.prune_after=1",
        "sweep.prune_trials=1",
        "sweep.sampler=random",
        "sweep.sampler_seed=1",
    )
    slow = ("+callbacks.light.steps=8", "+callbacks.light.seconds=0.15")
    rates = ("sft.optimizer.lr=interval(0.001,0.9)", *SEARCH[1:])
    assert main(["sft", "-m", *rates, *LIGHT, *prune, *slow, "sweep.trials=3", f"run_dir={light}"]) == 0
    cells = yaml.safe_load((light / "sweep.yaml").read_text())["cells"]
    rates_drawn = [cell["overrides"]["sft.optimizer.lr"] for cell in cells]
    assert rates_drawn[0] < min(rates_drawn[1:]), "the first one is the best"
    found = statuses(light)
    assert found == ["done", "pruned", "pruned"]
    pruned = summary(light / "1")
    assert pruned["error"].startswith("value=") and pruned["error"].endswith("is worse than the median of the finished trials")
    assert pruned["verb"] == "sft" and pruned["metrics"] == {}
    all_end(start["pid"] for starts in diaries(light).values() for start in starts)
    assert "1 of 3 cells done, 2 pruned" in capfd.readouterr().err


@pytest.mark.launch
def test_a_search_after_what_no_run_has_ends(light: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [word.replace("sft/perplexity", "sft/perplexty") for word in SEARCH]
    assert main(["sft", "-m", *words, *LIGHT, f"run_dir={light}"]) == 2
    err = capfd.readouterr().err
    assert "sweep.metric=sft/perplexty is no metric of cell 0 (did you mean 'sft/perplexity'?)" in err
    assert not (light / "1").exists()


# --- a cluster -------------------------------------------------------------------------------------------------------------------


@pytest.mark.launch
def test_a_sweep_through_submitit(light: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ("seed=0,1,2", "trainer.devices=2", *LIGHT, "+callbacks.light.fails=[1]", *LOCAL, "sweep.jobs=3", f"run_dir={light}")
    assert main(["sft", "-m", *words]) == 0
    assert statuses(light) == ["done", "failed", "done"]
    told = diaries(light)
    assert sorted(told) == [f"{cell}/rank-{rank}" for cell in range(3) for rank in range(2)]
    assert all(starts[0]["config"]["seed"] == int(name[0]) for name, starts in told.items())
    assert "rlhf: the disk is on fire" in (light / "1" / "log.txt").read_text()
    all_end(start["pid"] for starts in told.values() for start in starts)
    assert main(["sft", "-m", f"run_dir={light}", "sweep.resume=true"]) == 0
    assert [len(starts) for starts in diaries(light).values()] == [1] * 8, "the failed cell alone ran again"
    assert "rlhf: 2 of 3 cells done, 1 failed" in capfd.readouterr().err


SRUN = """until [[ "$1" == */bin/python* ]]; do shift; done
for ((i = 0; i < 4; i++)); do SLURM_PROCID=$i SLURM_LOCALID=$((i % 2)) SLURM_NODEID=$((i / 2)) "$@" & pids+=($!); done
code=0; for pid in "${pids[@]}"; do wait "$pid" || code=1; done; exit $code"""
SBATCH = """export SLURM_JOB_ID=77 SLURM_JOB_NUM_NODES=2 SLURM_NTASKS=4 SLURM_JOB_NODELIST=node-[1-2]
grep -q -- --nodes=2 "$1" && grep -q -- --ntasks-per-node=2 "$1" || exit 1
bash "$1" > /dev/null 2>&1 & echo Submitted batch job 77"""


@pytest.mark.launch
def test_a_cell_on_two_nodes_is_a_rank_in_each_task(light: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cluster is played by shell scripts, which start all tasks here."""
    (tmp_path / "bin").mkdir()
    for name, body in {"sbatch": SBATCH, "srun": SRUN, "sacct": "true"}.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    words = (
        "seed=3",
        "trainer.devices=2",
        "trainer.num_nodes=2",
        "sft.batch_size=8",
        *LIGHT[:6],
        *LIGHT[7:],
        "sweep=slurm",
        f"run_dir={light}",
    )
    assert main(["sft", "-m", *words]) == 0
    told = diaries(light)
    assert sorted(told) == [f"0/rank-{rank}" for rank in range(4)]
    assert {starts[0]["environment"]["MASTER_PORT"] for starts in told.values()} == {"15077"}
    assert all(starts[0]["config"] == told["0/rank-0"][0]["config"] for starts in told.values())
    assert summary(light / "0")["status"] == "done"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("pipeline", "-m", "trainer.num_nodes=2", *LOCAL),
            "trainer.num_nodes=2 is more than this sweep has: rlhf pipeline starts its steps on one node",
        ),
        (("sft", "-m", "trainer.num_nodes=2"), "trainer.num_nodes=2 is more than this sweep has: choose sweep=slurm"),
        (("sft", "-m", "launcher=hostfile"), "launcher=hostfile is for a single run"),
        (("sft", "-m", "resume=true"), "a sweep goes on with sweep.resume=true"),
        (("sft", "-m", "launcher.master_port=4242", "sweep.jobs=2"), "launcher.master_port=4242 would be that of all cells"),
    ],
)
def test_what_a_sweep_cannot_start(words: tuple[str, ...], message: str, light: Path) -> None:
    assert main([*words, f"run_dir={light}"]) == 2
    assert message in summary(light / "0")["error"]


# --- one that trains -------------------------------------------------------------------------------------------------------------


@pytest.mark.launch
def test_a_crash_a_refusal_and_a_nan_leave_the_others_alone(tmp_path: Path) -> None:
    directory = tmp_path / "sweep"
    words = (
        "sft.optimizer.lr=1e-3,1e30,2e-3", "sft.batch_size=4,3", *SMALL[:2], f"data.path={write_pairs(tmp_path / 'pairs.jsonl', 32)}", *SMALL[3:6],
        "sft.micro_batch_size=4", "sft.max_steps=4", "callbacks=default", "+callbacks.fail._target_=mishaps.FailIn", "+callbacks.fail.name='0'",
        "sweep.jobs=2", f"run_dir={directory}",
    )  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    done = subprocess.run(
        [sys.executable, "-m", "rlhf", "sft", "-m", *words], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert statuses(directory) == ["failed", "refused", "failed", "refused", "done", "refused"]
    assert summary(directory / "0")["error"] == "RuntimeError: the disk is on fire"
    assert "not finite" in summary(directory / "2")["error"] or "nan" in summary(directory / "2")["error"].lower()
    assert summary(directory / "1")["error"].startswith("UserError: sft.batch_size=3 does not divide")
    assert "Traceback" not in done.stderr and "Traceback" in (directory / "0" / "log.txt").read_text()
    assert (directory / "4" / "export" / "actor" / "model.safetensors").is_file() and not (directory / "0" / "export").exists()
    assert without_report(directory) == {"0", "1", "2", "3", "4", "5", "sweep.yaml"}
    page = (directory / "report.html").read_text()
    assert all(
        reason in page
        for reason in ("the disk is on fire", "sft.batch_size=3 does not divide", summary(directory / "2")["error"].split(": ", 1)[1][:60])
    )
    shutil.rmtree(directory)
