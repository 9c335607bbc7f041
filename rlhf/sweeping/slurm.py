"""A cell as a job of a SLURM cluster, through submitit: what is asked for, what each task does, and how the job is watched.

Knows submitit and SLURM's numbers; knows no configuration. submitit is imported when a sweep asks for a cluster.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config import UserError
from rlhf.settings import SlurmSweepConfig
from rlhf.sweeping.processes import spawn
from rlhf.sweeping.slurm_queue import Absence, Queue

LOOK = {"slurm": 2.0, "local": 0.1}
"""Seconds between two questions about a job; a cluster is asked through files, and rarely through its accounting."""
LATE = 15.0
"""Seconds in which a result may still appear behind a job that has ended: files of a cluster come late."""
FIRST_PORT, PORTS = 15000, 15000
"""Ports for the ranks of a job, below those that Linux gives away itself."""
ACCOUNTING = 60
"""Seconds between two questions to the cluster's accounting, which knows of jobs that left no result, and to its queue."""
JOB = "job"
"""File beside a cell's scripts: number and tasks of its latest job."""


@dataclass(frozen=True)
class Work:
    """What each task of a job does: runs a command whose output goes to the cell's log. Sent to the cluster as it is."""

    command: tuple[str, ...]
    stdin: str
    log: str
    ranks: bool
    """Every task is one rank of the job; otherwise there is one task, which starts its ranks itself."""

    def __call__(self) -> int:
        environment = task_environment() if self.ranks else {}
        with Path(self.log).open("ab") as out:
            process = spawn(self.command, stdin=self.stdin, out=out, environment=environment)
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                process.send_signal(signal.SIGINT)


def task_environment() -> dict[str, str]:
    """By which torch.distributed knows the rank that this task is. The port is the job's own, and the same in all of its tasks."""
    from submitit import JobEnvironment

    task = JobEnvironment()
    per_node = task.num_tasks // task.num_nodes
    number = int("".join(filter(str.isdigit, task.job_id)) or 0)
    return {
        "RANK": str(task.global_rank), "LOCAL_RANK": str(task.local_rank), "WORLD_SIZE": str(task.num_tasks),
        "LOCAL_WORLD_SIZE": str(per_node), "GROUP_RANK": str(task.node), "MASTER_ADDR": task.hostnames[0],
        "MASTER_PORT": str(FIRST_PORT + number % PORTS),
    }  # fmt: skip


def executor(folder: Path, settings: SlurmSweepConfig, *, name: str, nodes: int, devices: int, gpus: bool) -> Any:
    """An executor that asks for what one cell needs.

    Args:
        folder: for its scripts.
        nodes: several: a task for each rank. One: a single task, which starts its ranks itself.
        devices: ranks, and GPUs if it has some, of one node.

    Raises:
        UserError: submitit is not installed, or there is no SLURM.
    """
    try:
        import submitit
    except ImportError as error:
        raise UserError("sweep=slurm needs submitit: pip install -e '.[slurm]' in the checkout") from error
    try:
        found = submitit.AutoExecutor(folder=folder, cluster=settings.executor)
    except RuntimeError as error:
        raise UserError("sweep=slurm: there is no srun on this machine: call it from a login node of the cluster") from error
    request: dict[str, Any] = {
        "name": name, "timeout_min": settings.time_minutes, "nodes": nodes, "tasks_per_node": devices if nodes > 1 else 1,
        "stderr_to_stdout": True, **({"gpus_per_node": devices} if gpus else {}),
    }  # fmt: skip
    if settings.executor == "slurm":
        submitit.SlurmJob.watcher._delay_s = ACCOUNTING
        named = {"partition": settings.partition, "account": settings.account, "setup": settings.setup or None}
        request |= {f"slurm_{key}": value for key, value in named.items() if value is not None}
        request |= {"slurm_additional_parameters": settings.parameters} if settings.parameters else {}
    elif settings.setup:
        request["local_setup"] = settings.setup
    found.update_parameters(**request)
    return found


@dataclass(frozen=True)
class Watch:
    """How a cluster's jobs are looked for once they give no sign. The queue is asked for all of them at once."""

    queue: Queue
    minutes: int
    """`sweep.vanished_minutes`."""


def watch(settings: SlurmSweepConfig) -> Watch | None:
    """None: no SLURM, whose stand-in knows its processes."""
    if settings.executor != "slurm":
        return None
    clusters = settings.parameters.get("clusters")
    return Watch(Queue(None if clusters is None else str(clusters)), settings.vanished_minutes)


class ClusterJob:
    """A job that has been submitted.

    Args:
        log: of the cell, for a last word about a job that left no result.
        lost: is told of a job that has vanished, in one line.
    """

    def __init__(self, job: Any, log: Path, kind: str, watch: Watch | None = None, lost: Callable[[str], None] | None = None) -> None:
        self.job, self.log, self.kind, self.lost = job, log, kind, lost
        self.looked, self.gone, self.killed = float("-inf"), float("inf"), False
        self.minutes = 0 if watch is None else watch.minutes
        self.absence = None if watch is None else Absence(watch.queue, str(job.job_id), 60.0 * watch.minutes, ACCOUNTING)

    def poll(self) -> int | None:
        now = time.monotonic()
        if now - self.looked < LOOK[self.kind]:
            return None
        self.looked = now
        if not self.job.done():
            return self._vanished(now)
        tasks = self.job._sub_jobs or [self.job]
        if not all(task.paths.result_pickle.exists() for task in tasks):
            self.gone = min(self.gone, now)
            return self._say(f"it is {self.job.state}, and left no result") if now - self.gone >= LATE else None
        try:
            codes = [int(code) for code in self.job.results()]
        except Exception as error:  # what the task raised, before it could start the cell
            return self._say(str(error))
        return next((code for code in codes if code), 0)

    def _vanished(self, now: float) -> int | None:
        """Neither queue nor accounting knows the job, and no result has come: nothing will end the wait for it but we."""
        looked_at = None if self.absence is None else self.absence.vanished(now, at_once=self.killed)
        if looked_at is None:
            return None
        how_long = "at the end" if self.killed else f"for {self.minutes} minute{'' if self.minutes == 1 else 's'} (sweep.vanished_minutes)"
        what = f"it has vanished: {how_long} {looked_at}, and there is no result at {self.job.paths.result_pickle}"
        if self.lost is not None:
            self.lost(f"job {self.job.job_id}: {what}")
        if self.absence is not None:
            self.absence.queue.cancel(self.absence.number)  # should it come back, it must not write beside the next attempt
        return self._say(what)

    def _say(self, what: str) -> int:
        """A last word in the log of a job that was cancelled, ran out of time, lost its node or could not begin; it has failed."""
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"rlhf: job {self.job.job_id}: {what}\n")
        return 1

    def interrupt(self) -> None:
        """Ctrl-C to all tasks of a job that runs; one that waits in the queue is taken out of it."""
        if self.kind == "local" or self.job.state == "PENDING":
            self.job.cancel()
        else:
            subprocess.run(["scancel", "--signal=INT", str(self.job.job_id)], check=False)

    def kill(self) -> None:
        if self.absence is not None and not self.killed:
            self.absence.looked = float("-inf")
        self.killed = True
        if not self.job.done():
            with contextlib.suppress(OSError):  # the command ends, whatever the cluster says
                self.job.cancel(check=False)
            self.looked = float("-inf")


def submit(
    cluster: Any, work: Work, kind: str, watch: Watch | None = None, lost: Callable[[str], None] | None = None
) -> ClusterJob:  # fmt: skip
    """
    Raises:
        UserError: the cluster refuses the job; says what it said.
    """
    try:
        job = cluster.submit(work)
    except Exception as error:
        raise UserError(f"sweep=slurm: the job was not accepted: {' '.join(str(error).split())}") from error
    if kind == "slurm":
        (Path(cluster.folder) / JOB).write_text(f"{job.job_id} {max(1, len(job._sub_jobs))}")
    return ClusterJob(job, Path(work.log), kind, watch, lost)


def still_there(folder: Path, log: Path, watch: Watch | None = None, lost: Callable[[str], None] | None = None) -> ClusterJob | None:
    """The job that an earlier command has submitted for a cell, if it still waits or runs."""
    file = folder / JOB
    if not file.is_file():
        return None
    import submitit

    number, tasks = file.read_text().split()
    job: Any = submitit.SlurmJob(folder, number, tasks=range(int(tasks)))
    job.watcher._delay_s = ACCOUNTING
    known = job.watcher.get_state(number, mode="force") != "UNKNOWN" or (watch is not None and watch.queue.has(number) is True)
    return ClusterJob(job, log, "slurm", watch, lost) if known and not job.done() else None
