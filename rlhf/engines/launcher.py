"""Starting the ranks of one job, and the environment each of them needs before DeepSpeed is imported.

Every rank replays the job's resolved config from a file; none reads the command line again. The process that starts them stays
outside their process group, so the next job of a sweep begins with fresh ranks. Knows no config beyond launcher and trainer.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rlhf.config import UserError
from rlhf.settings import LauncherConfig, TrainerConfig
from rlhf.sweeping.orphans import child_environment

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
CORES = "RLHF_CORES"
"""Environment variable: how many cores the ranks of a job share, where it is not all of them."""
SCRIPTED = ("slurm", "hostfile")
"""Launchers for which the command only writes a script: the job finds its devices on other machines."""
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Environment variables that set PyTorch's allocator; only the second is known to all versions."""
GRACE = 10.0
"""Seconds in which the other ranks may still end by themselves, with a message of their own, once one has failed."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rank_environment(rank: int, world: int, *, local_rank: int, per_node: int, address: str, port: int) -> dict[str, str]:
    """The variables by which torch.distributed, Lightning and DeepSpeed know a rank."""
    values = (rank, local_rank, world, per_node, rank // per_node, address, port)
    return dict(zip(RANK_VARIABLES, map(str, values), strict=True))


def accelerator(trainer: TrainerConfig) -> str:
    """cpu or cuda.

    Raises:
        UserError: cuda is asked for and not there, or has too few devices.
    """
    import torch

    devices = torch.cuda.device_count()
    if trainer.accelerator == "cuda" and devices == 0:
        raise UserError("trainer.accelerator=cuda, but no CUDA device is visible: use trainer=cpu")
    kind = "cpu" if trainer.accelerator == "cpu" or devices == 0 else "cuda"
    if kind == "cuda" and trainer.devices > devices:
        raise UserError(f"trainer.devices={trainer.devices}, but {devices} CUDA devices are visible")
    if kind == "cpu" and trainer.precision == "fp16":
        raise UserError("trainer.precision=fp16 does not run on a CPU: use fp32 or bf16")
    return kind


def accelerator_of_ranks(trainer: TrainerConfig, launcher: LauncherConfig) -> str:
    """cpu or cuda, as `accelerator` of the machine that runs the job. Of a job that another machine runs, what it asks for: this one may be
    a login node, and each rank looks for its device itself.

    Raises:
        UserError: as `accelerator`.
    """
    if launcher.name in SCRIPTED:
        return "cpu" if trainer.accelerator == "cpu" else "cuda"
    return accelerator(trainer)


def prepare_rank(trainer: TrainerConfig) -> None:
    """Sets what must be set before the first import of deepspeed. Without rank variables this process becomes the only rank.

    On GPUs "cuda" means this rank's own from now on: a reward function may load its model long before Lightning chooses the device.
    """
    kind = accelerator(trainer)
    if kind == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    elif not os.environ.keys() & set(ALLOCATOR):
        # Phases of PPO want pieces of very different sizes: with fixed segments what they leave over adds up (experiments/planner_memory).
        os.environ[ALLOCATOR[1]] = "expandable_segments:True"
    if "RANK" not in os.environ:
        os.environ |= rank_environment(0, 1, local_rank=0, per_node=1, address="127.0.0.1", port=free_port())
    if kind == "cuda":
        import torch

        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import deepspeed.ops

    # The CPU's shared-memory collective needs a compiler at start-up, ignores groups, and crashes in tensor parallelism.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def run_ranks(config: Path, trainer: TrainerConfig, launcher: LauncherConfig) -> int:
    """Starts this node's ranks and waits. Returns the exit code: the first one that is not 0.

    Ctrl-C is passed on to the ranks, which save and end, and so is SIGTERM, as Ctrl-C. When a rank fails the others are stopped: they would wait for it in a
    collective. However this process ends, KILL included, it leaves no rank behind. Call it from the main thread.
    """
    world, port = trainer.devices, launcher.master_port or free_port()
    cores = int(os.environ.get(CORES) or len(os.sched_getaffinity(0)))
    command = [sys.executable, "-m", "rlhf.cli.rank", str(config)]
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        with ended_by_sigterm():
            for rank in range(world):
                environment = rank_environment(rank, world, local_rank=rank, per_node=world, address=launcher.master_addr, port=port)
                environment |= {"OMP_NUM_THREADS": str(trainer.threads or max(1, cores // world)), **child_environment()}
                # A session of their own: Ctrl-C in the terminal reaches them once, through us.
                ranks.append(subprocess.Popen(command, env=os.environ | environment, start_new_session=True))
            return _wait(ranks)
    finally:
        _stop(ranks, grace=0.0)


def end_at_once(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM, by which `timeout` and clusters end a job, raises KeyboardInterrupt inside. Does nothing outside the main thread, where no
    handler can be set."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, end_at_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    while True:
        try:
            codes = [rank.poll() for rank in ranks]
            failed = next((code for code in codes if code), None)
            if failed is not None:
                _stop(ranks, grace=GRACE)
                return failed if failed > 0 else 1
            if all(code == 0 for code in codes):
                return 0
            time.sleep(0.05)
        except KeyboardInterrupt:
            for rank in ranks:
                if rank.poll() is None:
                    rank.send_signal(signal.SIGINT)


def _stop(ranks: list[subprocess.Popen[bytes]], *, grace: float) -> None:
    """Lets ranks that are about to end do so, then ends the rest."""
    deadline = time.monotonic() + grace  # seconds
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
            rank.wait()


def render_slurm(config: Path, trainer: TrainerConfig, launcher: LauncherConfig) -> str:
    """A batch script that starts every rank with srun; the rank's variables come from SLURM's."""
    options = {"nodes": trainer.num_nodes, "ntasks-per-node": trainer.devices, **launcher.slurm}
    if trainer.accelerator != "cpu":
        options.setdefault("gpus-per-node", trainer.devices)
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items()]
    port = launcher.master_port or 29500
    return "\n".join([
        "#!/usr/bin/env bash", *lines, "set -euo pipefail",
        'export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"', f"export MASTER_PORT={port}",
        "srun --kill-on-bad-exit=1 bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS "
        f"LOCAL_WORLD_SIZE={trainer.devices} GROUP_RANK=$SLURM_NODEID exec python -m rlhf.cli.rank \"$0\"' {shlex.quote(str(config))}", "",
    ])  # fmt: skip


def read_hostfile(path: Path, trainer: TrainerConfig) -> list[str]:
    """Host names of a DeepSpeed hostfile (`name slots=8`), as many as `trainer.num_nodes`.

    Raises:
        UserError: the file is missing or malformed, or offers too few hosts or slots.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(f"launcher.hostfile={path} cannot be read: {error.strerror}") from error
    hosts = []
    for number, line in enumerate(lines, start=1):
        words = line.split("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not words[1].startswith("slots=") or not words[1][6:].isdigit():
            raise UserError(f"{path}:{number}: expected `host slots=N`, got {line.strip()!r}")
        if int(words[1][6:]) < trainer.devices:
            raise UserError(f"{path}:{number}: {words[0]} offers {words[1][6:]} slots, but trainer.devices={trainer.devices}")
        hosts.append(words[0])
    if len(hosts) < trainer.num_nodes:
        raise UserError(f"{path} names {len(hosts)} hosts, but trainer.num_nodes={trainer.num_nodes}")
    return hosts[: trainer.num_nodes]


def render_hostfile(config: Path, hosts: list[str], trainer: TrainerConfig, launcher: LauncherConfig) -> str:
    """A script that starts one torchrun on every host over ssh, and waits for all of them."""
    port = launcher.master_port or 29500
    lines = ["#!/usr/bin/env bash", "set -euo pipefail", "pids=()"]
    for node, host in enumerate(hosts):
        torchrun = (
            f"torchrun --nnodes={len(hosts)} --node-rank={node} --nproc-per-node={trainer.devices} "
            f"--master-addr={hosts[0]} --master-port={port} -m rlhf.cli.rank {shlex.quote(str(config))}"
        )
        lines.append(f"ssh {host} {shlex.quote(f'cd {shlex.quote(str(Path.cwd()))} && {torchrun}')} & pids+=($!)")
    lines += ['for pid in "${pids[@]}"; do wait "$pid"; done', ""]
    return "\n".join(lines)
