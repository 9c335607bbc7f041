"""Cells on a cluster: the batch script, what each task is told, and how a job is watched. SLURM's programs are small shell scripts."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli.sweep.slurm import record_lost
from rlhf.config import UserError, build
from rlhf.sweeping import slurm, slurm_queue
from rlhf.sweeping.slurm import JOB, LATE, ClusterJob, Work, executor, still_there, submit, task_environment, watch
from rlhf.sweeping.slurm_queue import ask

SACCT = 'echo "JobID|State|NodeList"; for word in "$@"; do case $word in [0-9]*) echo "$word|$STATE|node-a";; esac; done'


def settings(**changes: Any) -> Any:
    node = {
        "_target_": "rlhf.settings.SlurmSweepConfig", "jobs": None, "gpus": "auto", "jobs_per_gpu": 1, "strict": False, "resume": False, "report": True,
        "executor": "slurm", "partition": None, "account": None, "time_minutes": 60, "vanished_minutes": 15, "setup": [], "parameters": {},
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


# --- jobs that vanish ------------------------------------------------------------------------------------------------------------

SILENT = 'case "$*" in *--noheader*) echo -n "$RECORD";; *) echo "JobID|State|NodeList"; esac'
"""sacct that has no record of any job, but what RECORD says once it is asked about one that is missing."""


def program(cluster: Path, name: str, body: str) -> None:
    """A program of the cluster, from now on."""
    (cluster / "bin" / name).write_text(f'#!/usr/bin/env bash\necho "$@" >> {cluster}/{name}.calls\n{body}\n')
    (cluster / "bin" / name).chmod(0o755)


def calls(cluster: Path, name: str) -> list[str]:
    file = cluster / f"{name}.calls"
    return file.read_text().splitlines() if file.is_file() else []


@pytest.fixture
def job(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ClusterJob]:
    """Submits a job that nobody has heard of since; every look asks anew."""
    program(cluster, "squeue", "echo 4241")
    program(cluster, "sacct", SILENT)
    monkeypatch.setattr(slurm, "ACCOUNTING", 0.0)
    monkeypatch.setattr(slurm, "LOOK", {"slurm": 0.0})
    monkeypatch.setattr(slurm_queue, "FRESH", 0.0)

    def start(lost: Callable[[str], None] | None = None, **changes: Any) -> ClusterJob:
        asked = settings(**changes)
        made = executor(cluster / "slurm", asked, name="a", nodes=1, devices=1, gpus=False)
        found = submit(made, work(cluster), "slurm", watch(asked), lost)
        found.job.watcher.clear()
        return found

    return start


def wait(job: ClusterJob, minutes: float) -> int | None:
    """What a look says that much later."""
    assert job.absence is not None
    job.absence.since -= 60 * minutes
    return job.poll()


def test_a_job_that_nobody_knows_has_failed_after_a_while(cluster: Path, job: Callable[..., ClusterJob]) -> None:
    said: list[str] = []
    lost = job(said.append)
    assert lost.poll() is None and wait(lost, 14.9) is None, "a controller may restart"
    assert not [call for call in calls(cluster, "sacct") if "--allocations" in call], "the accounting is asked once it matters"
    assert wait(lost, 0.2) == 1
    (last,) = (cluster / "log.txt").read_text().splitlines()
    user = os.getuid()
    assert last.startswith("rlhf: job 4242: it has vanished: for 15 minutes (sweep.vanished_minutes) ")
    assert f"`squeue --noheader --user={user} --states=all --format=%A` does not list it" in last
    assert "`sacct --allocations --noheader --parsable2 --format=State --jobs=4242` has no record of it" in last
    assert last.endswith(f"there is no result at {cluster}/slurm/4242_0_result.pkl")
    assert said == [last.removeprefix("rlhf: ")]
    assert (cluster / "scancel").read_text().split() == ["4242"], "it must not come back"


def test_a_job_in_the_queue_is_waited_for_however_long_it_takes(cluster: Path, job: Callable[..., ClusterJob]) -> None:
    found = job()
    assert found.poll() is None and wait(found, 10) is None
    program(cluster, "squeue", "echo 4241; echo 4242")
    assert wait(found, 100) is None
    program(cluster, "squeue", "echo 4241")
    assert found.poll() is None and wait(found, 14) is None, "it was there in between: the time begins again"
    assert wait(found, 2) == 1


def test_what_the_accounting_knows_is_believed(cluster: Path, job: Callable[..., ClusterJob], monkeypatch: pytest.MonkeyPatch) -> None:
    found = job()
    monkeypatch.setenv("RECORD", "RUNNING")
    assert found.poll() is None and wait(found, 16) is None and wait(found, 14) is None
    monkeypatch.setenv("RECORD", "")
    assert wait(found, 16) == 1


def test_a_cluster_that_does_not_answer_has_lost_nothing(cluster: Path, job: Callable[..., ClusterJob]) -> None:
    found = job()
    assert found.poll() is None
    for body in ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", "exit 3"):
        program(cluster, "squeue", body)
        assert wait(found, 100) is None
    (cluster / "bin" / "squeue").unlink()
    assert wait(found, 100) is None


def test_without_accounting_the_queue_alone_is_asked(cluster: Path, job: Callable[..., ClusterJob]) -> None:
    program(cluster, "sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    found = job()
    assert found.poll() is None and wait(found, 16) == 1
    assert "--jobs=4242` does not answer (Slurm accounting storage is disabled)" in (cluster / "log.txt").read_text()


def test_a_result_that_came_is_the_end_whatever_the_cluster_says(cluster: Path, job: Callable[..., ClusterJob]) -> None:
    found = job()
    assert found.poll() is None
    found.job.paths.folder.mkdir(exist_ok=True)
    import cloudpickle

    found.job.paths.result_pickle.write_bytes(cloudpickle.dumps(("success", 0)))
    assert wait(found, 100) == 0


def test_another_cluster_is_asked_where_the_job_was_sent(cluster: Path, job: Callable[..., ClusterJob]) -> None:
    found = job(parameters={"clusters": "big"})
    assert found.poll() is None and wait(found, 16) == 1
    assert all(call.startswith("--clusters=big ") for call in calls(cluster, "squeue"))
    assert (cluster / "scancel").read_text().split() == ["--clusters=big", "4242"]


def test_a_second_ctrl_c_does_not_wait_for_a_job_that_is_missing(cluster: Path, job: Callable[..., ClusterJob]) -> None:
    found = job()
    assert found.poll() is None
    found.kill()
    assert found.poll() == 1
    program(cluster, "squeue", "echo 4242")
    there = job()
    there.kill()
    assert there.poll() is None, "it ends when the cluster has ended it"


def test_all_jobs_share_one_question_to_the_queue(cluster: Path, job: Callable[..., ClusterJob], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_queue, "FRESH", 60.0)
    shared = watch(settings())
    assert shared is not None
    assert [shared.queue.has(str(number)) for number in (4240, 4241, 4242)] == [False, True, False]
    assert len(calls(cluster, "squeue")) == 1
    assert watch(settings(executor="local")) is None


def test_a_resumed_sweep_finds_a_job_that_the_accounting_does_not_know(cluster: Path, job: Callable[..., ClusterJob]) -> None:
    job()
    folder, shared = cluster / "slurm", watch(settings())
    assert still_there(folder, cluster / "log.txt", shared) is None
    program(cluster, "squeue", "echo 4242")
    found = still_there(folder, cluster / "log.txt", shared)
    assert found is not None and found.poll() is None


def test_a_program_that_hangs_is_no_answer(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_queue, "ANSWER", 0.2)
    program(cluster, "squeue", "exec sleep 20")
    answer = ask("squeue")
    assert not answer.ok and answer.text.startswith("no answer in")


def test_the_key_has_a_range() -> None:
    with pytest.raises(UserError, match="vanished_minutes must be at least 1"):
        settings(vanished_minutes=0)


def test_the_summary_of_a_lost_cell_gives_way_to_one_of_the_job(tmp_path: Path) -> None:
    record_lost(tmp_path / "0", {"verb": "sft", "seed": 3}, "job 4242: it has vanished")
    written = json.loads((tmp_path / "0" / "summary.json").read_text())
    assert (written["status"], written["seed"], written["error"]) == ("failed", 3, "RuntimeError: job 4242: it has vanished")
    (tmp_path / "0" / "summary.json").write_text('{"status": "done"}')
    record_lost(tmp_path / "0", {"verb": "sft", "seed": 3}, "job 4242: it has vanished")
    assert json.loads((tmp_path / "0" / "summary.json").read_text()) == {"status": "done"}
    record_lost(tmp_path / "1", None, "nothing is known of its settings")
    assert not (tmp_path / "1").exists()
