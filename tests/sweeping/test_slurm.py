"""Cells on a cluster: the batch script, what each task is told, and how a job is watched. SLURM's programs are small shell scripts."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import UserError, build
from rlhf.sweeping.slurm import JOB, LATE, Work, executor, still_there, submit, task_environment

SACCT = 'echo "JobID|State|NodeList"; for word in "$@"; do case $word in [0-9]*) echo "$word|$STATE|node-a";; esac; done'


def settings(**changes: Any) -> Any:
    node = {
        "_target_": "rlhf.settings.SlurmSweepConfig", "jobs": None, "gpus": "auto", "jobs_per_gpu": 1, "strict": False, "resume": False, "report": True,
        "executor": "slurm", "partition": None, "account": None, "time_minutes": 60, "setup": [], "parameters": {},
    }  # fmt: skip
    return build({**node, **changes}, "sweep")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SLURM's programs, which note what they were called with; the folder of the notes."""
    programs = {
        "sbatch": f'cp "$1" {tmp_path}/job.sbatch; echo "Submitted batch job 4242"', "srun": "true", "sacct": SACCT,
        "scancel": f'echo "$@" >> {tmp_path}/scancel',
    }  # fmt: skip
    (tmp_path / "bin").mkdir()
    for name, body in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("STATE", "RUNNING")
    return tmp_path


def work(folder: Path, *, ranks: bool = False) -> Work:
    return Work((sys.executable, "-c", "pass"), "", str(folder / "log.txt"), ranks=ranks)


def script(folder: Path, *, nodes: int, devices: int, gpus: bool, **changes: Any) -> tuple[dict[str, str], list[str]]:
    """The options and the commands of the batch script of a cell."""
    submit(executor(folder / "slurm", settings(**changes), name="mine-3", nodes=nodes, devices=devices, gpus=gpus), work(folder), "slurm")
    lines = (folder / "job.sbatch").read_text().splitlines()
    options = dict(line.removeprefix("#SBATCH --").split("=", 1) for line in lines if line.startswith("#SBATCH --") and "=" in line)
    return options, [line for line in lines if line and not line.startswith("#")]


def test_two_nodes_of_eight_gpus(cluster: Path) -> None:
    options, commands = script(
        cluster, nodes=2, devices=8, gpus=True, partition="long", account="us", time_minutes=90, setup=["module load cuda", "export A=1"],
        parameters={"mem": "200G", "exclusive": True},
    )  # fmt: skip
    asked = {
        "nodes": "2",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "partition": "long",
        "account": "us",
        "time": "90",
        "mem": "200G",
        "job-name": "mine-3",
    }
    assert {key: options.get(key) for key in asked} == asked
    assert "#SBATCH --exclusive" in (cluster / "job.sbatch").read_text()
    assert (
        commands.index("module load cuda")
        < commands.index("export A=1")
        < next(i for i, line in enumerate(commands) if line.startswith("srun"))
    )
    assert (cluster / "slurm" / JOB).read_text() == "4242 16"


def test_one_node_has_one_task_that_starts_its_ranks(cluster: Path) -> None:
    options, _ = script(cluster, nodes=1, devices=4, gpus=True)
    assert (options["nodes"], options["ntasks-per-node"], options["gpus-per-node"]) == ("1", "1", "4")
    options, _ = script(cluster, nodes=1, devices=4, gpus=False)
    assert not any("gpu" in name for name in options)
    assert "partition" not in options and "account" not in options


def told(monkeypatch: pytest.MonkeyPatch, task: int, job: str) -> dict[str, str]:
    """What a task of a job on two nodes of eight is told by SLURM, and makes of it."""
    slurm = {
        "SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": job, "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "16", "SLURM_JOB_NODELIST": "node-[07-08]",
        "SLURM_NODEID": str(task // 8), "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task % 8),
    }  # fmt: skip
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    return task_environment()


def test_every_task_of_two_nodes_is_the_rank_it_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [told(monkeypatch, task, "1234567") for task in range(16)]
    port = tasks[0]["MASTER_PORT"]
    for rank, environment in enumerate(tasks):
        assert environment == {
            "RANK": str(rank), "LOCAL_RANK": str(rank % 8), "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "GROUP_RANK": str(rank // 8),
            "MASTER_ADDR": "node-07", "MASTER_PORT": port,
        }  # fmt: skip
    assert 1024 < int(port) < 32768, "Linux gives away the ports above"
    assert len({told(monkeypatch, 0, str(job))["MASTER_PORT"] for job in range(1234500, 1234600)}) == 100


def test_without_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sweep=slurm: there is no srun on this machine"):
        executor(tmp_path / "slurm", settings(), name="", nodes=1, devices=1, gpus=False)


def test_a_job_that_is_not_accepted(cluster: Path) -> None:
    (cluster / "bin" / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: lng' >&2; exit 1\n")
    with pytest.raises(UserError, match=r"sweep=slurm: the job was not accepted: .*invalid partition specified: lng"):
        script(cluster, nodes=1, devices=1, gpus=False, partition="lng")


def test_ctrl_c_reaches_a_job_that_runs_and_takes_one_that_waits_out_of_the_queue(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for state, call in (("RUNNING", "--signal=INT 4242"), ("PENDING", "4242")):
        monkeypatch.setenv("STATE", state)
        job = submit(executor(cluster / state, settings(), name="a", nodes=1, devices=1, gpus=False), work(cluster), "slurm")
        job.job.watcher.clear()
        job.interrupt()
        assert (cluster / "scancel").read_text().splitlines()[-1] == call


def test_a_job_of_an_earlier_command_is_found_while_it_is_there(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cluster / "slurm"
    assert still_there(folder, cluster / "log.txt") is None
    submit(executor(folder, settings(), name="a", nodes=1, devices=1, gpus=False), work(cluster), "slurm").job.watcher.clear()
    found = still_there(folder, cluster / "log.txt")
    assert found is not None and found.job.job_id == "4242" and found.poll() is None
    monkeypatch.setenv("STATE", "TIMEOUT")
    found.job.watcher.clear()
    assert still_there(folder, cluster / "log.txt") is None


def test_a_job_that_ran_out_of_time_has_failed_and_says_so(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE", "TIMEOUT")
    job = submit(executor(cluster / "slurm", settings(), name="a", nodes=1, devices=1, gpus=False), work(cluster), "slurm")
    job.job.watcher.clear()
    job.job.watcher.register_job("4242")
    assert job.poll() is None, "its result may come late"
    job.looked, job.gone = float("-inf"), job.gone - LATE
    assert job.poll() == 1
    assert "rlhf: job 4242: it is TIMEOUT, and left no result" in (cluster / "log.txt").read_text()
