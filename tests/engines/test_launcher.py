"""Starting ranks: what each is told, the scripts for several nodes, and that no rank outlives its starter.

SLURM, ssh and the ranks are stood in for by small shell scripts; one test starts real ranks in three ways and compares their losses.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from jobs import column, composed
from tiny import write_pairs

from rlhf.cli.rundir import claim
from rlhf.config import UserError, build
from rlhf.engines import launcher as launching
from rlhf.engines.launcher import (
    ALLOCATOR,
    RANK_VARIABLES,
    prepare_rank,
    rank_environment,
    read_hostfile,
    render_hostfile,
    render_slurm,
    run_ranks,
)
from rlhf.settings import LauncherConfig, TrainerConfig

Settings = tuple[TrainerConfig, LauncherConfig]


def settings(*overrides: str) -> Settings:
    cfg = build(composed("sft", "run_dir=x", *overrides))
    return cfg.trainer, cfg.launcher


@pytest.mark.parametrize(
    ("kind", "own", "expected"),
    [
        ("cuda", {}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        ("cuda", {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}),
        ("cpu", {}, {}),
    ],
)
def test_a_rank_on_a_gpu_has_segments_that_grow_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, kind: str, own: dict[str, str], expected: dict[str, str]
) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in ALLOCATOR}
    monkeypatch.setattr(os, "environ", kept | own)
    monkeypatch.setattr(launching, "accelerator", lambda _: kind)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    prepare_rank(settings()[0])
    assert {name: os.environ[name] for name in ALLOCATOR if name in os.environ} == expected


@pytest.mark.parametrize(("kind", "chosen"), [("cuda", [1]), ("cpu", [])])
def test_what_a_rank_loads_before_training_goes_to_its_own_gpu(monkeypatch: pytest.MonkeyPatch, kind: str, chosen: list[int]) -> None:
    """A scorer puts its model on "cuda" when it is built, which is before Lightning chooses the rank's device."""
    devices: list[int] = []
    rank = rank_environment(3, 4, local_rank=1, per_node=2, address="node-a", port=29500)
    monkeypatch.setattr(os, "environ", dict(os.environ) | rank)
    monkeypatch.setattr(launching, "accelerator", lambda _: kind)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    prepare_rank(settings()[0])
    assert devices == chosen


def script(file: Path, *lines: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(["#!/usr/bin/env bash", *lines, ""]))
    file.chmod(0o755)
    return file


def told(folder: Path) -> list[dict[str, str]]:
    """What ranks wrote with `env > FOLDER/rank-$RANK`, reduced to the variables of a rank, in rank order."""
    ranks = []
    for file in sorted(folder.glob("rank-*")):
        variables = dict(line.split("=", 1) for line in file.read_text().splitlines() if "=" in line)
        ranks.append({name: variables[name] for name in RANK_VARIABLES})
    return ranks


def two_nodes(port: int) -> list[dict[str, str]]:
    """Two nodes with two ranks each, rank by rank."""
    return [rank_environment(rank, 4, local_rank=rank % 2, per_node=2, address="node-a", port=port) for rank in range(4)]


def alive(pid: int) -> bool:
    """Zombies are dead: only their parent has not yet asked."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(folder: Path, pattern: str, count: int) -> list[Path]:
    deadline = time.monotonic() + 20
    while len(found := sorted(folder.glob(pattern))) < count or not all(file.read_text().strip() for file in found):
        assert time.monotonic() < deadline, f"{found} of {count}"
        time.sleep(0.01)
    return found


# --- what a rank is told -----------------------------------------------------------------------------------------------------------


def test_a_rank_knows_its_place() -> None:
    environment = rank_environment(5, 8, local_rank=1, per_node=4, address="node-a", port=29500)
    assert environment == {
        "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1", "MASTER_ADDR": "node-a",
        "MASTER_PORT": "29500",
    }  # fmt: skip


# --- several nodes -----------------------------------------------------------------------------------------------------------------


def checked(text: str, file: Path) -> Path:
    """The script in a file, after bash has read it."""
    script(file).write_text(text)
    subprocess.run(["bash", "-n", str(file)], check=True)
    return file


def test_the_slurm_script_asks_for_the_nodes() -> None:
    trainer, launcher = settings(
        "launcher=slurm", "trainer=gpu", "trainer.devices=8", "trainer.num_nodes=2", "+launcher.slurm.partition=long"
    )
    lines = render_slurm(Path("/runs/a/config.yaml"), trainer, launcher).splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert [line for line in lines if line.startswith("#SBATCH")] == [
        "#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=8", "#SBATCH --job-name=rlhf", "#SBATCH --time=24:00:00", "#SBATCH --partition=long",
        "#SBATCH --gpus-per-node=8",
    ]  # fmt: skip
    assert "gpus" not in render_slurm(Path("config.yaml"), *settings("launcher=slurm"))


SRUN = (  # every task at once, numbered as SLURM does; fails if one of them failed
    'while [[ "$1" == --* ]]; do shift; done', "pids=()",
    "for ((i = 0; i < NODES * TASKS; i++)); do",
    '  SLURM_PROCID=$i SLURM_LOCALID=$((i % TASKS)) SLURM_NODEID=$((i / TASKS)) SLURM_NTASKS=$((NODES * TASKS)) "$@" & pids+=($!)',
    "done", "code=0", 'for pid in "${pids[@]}"; do wait "$pid" || code=1; done', "exit $code",
)  # fmt: skip


def slurm(bin_dir: Path, *, hosts: str, nodes: int, tasks: int) -> dict[str, str]:
    """The environment of a batch job, with SLURM's programs in PATH."""
    script(bin_dir / "scontrol", '[[ "$1 $2" == "show hostnames" ]] || exit 1', f"printf '{hosts}'")
    script(bin_dir / "srun", *SRUN)
    path = f"{bin_dir}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    inherited = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    return inherited | {"PATH": path, "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_ID": "1", "NODES": str(nodes), "TASKS": str(tasks)}


def test_ranks_of_a_slurm_job_find_each_other(tmp_path: Path) -> None:
    config = tmp_path / "a run" / "config.yaml"  # a space is no reason to fail
    trainer, launcher = settings("launcher=slurm", "trainer.devices=2", "trainer.num_nodes=2")
    file = checked(render_slurm(config, trainer, launcher), tmp_path / "job.sbatch")
    environment = slurm(tmp_path / "bin", hosts=r"node-a\nnode-b\n", nodes=2, tasks=2)
    script(tmp_path / "bin" / "python", f'[[ "$*" == "-m rlhf.cli.rank {config}" ]] || exit 3', f"env > {tmp_path}/rank-$RANK")
    subprocess.run(["bash", str(file)], env=environment, check=True, timeout=30)
    assert told(tmp_path) == two_nodes(29500)


def test_a_failing_rank_fails_the_slurm_job(tmp_path: Path) -> None:
    file = checked(render_slurm(Path("config.yaml"), *settings("launcher=slurm", "trainer.devices=2")), tmp_path / "job.sbatch")
    environment = slurm(tmp_path / "bin", hosts=r"node-a\n", nodes=1, tasks=2)
    script(tmp_path / "bin" / "python", "exit $RANK")
    assert subprocess.run(["bash", str(file)], env=environment, check=False, timeout=30).returncode == 1


def test_the_hostfile_script_starts_torchrun_on_every_host(tmp_path: Path) -> None:
    config = tmp_path / "it's a run" / "config.yaml"
    trainer, launcher = settings("launcher=hostfile", "launcher.master_port=4242", "trainer.devices=2", "trainer.num_nodes=2")
    file = checked(render_hostfile(config, ["node-a", "node-b"], trainer, launcher), tmp_path / "launch.sh")
    script(tmp_path / "bin" / "ssh", "host=$1; shift", f'exec env SSH_HOST=$host OUT={tmp_path} bash -c "$*"')
    script(tmp_path / "bin" / "torchrun", 'printf "%s\\n" "$PWD" "$@" > "$OUT/$SSH_HOST"')
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    subprocess.run(["bash", str(file)], env=environment, check=True, timeout=30)
    for node, host in enumerate(("node-a", "node-b")):
        assert (tmp_path / host).read_text().splitlines() == [
            str(Path.cwd()), "--nnodes=2", f"--node-rank={node}", "--nproc-per-node=2", "--master-addr=node-a", "--master-port=4242", "-m",
            "rlhf.cli.rank", str(config),
        ]  # fmt: skip
    script(tmp_path / "bin" / "torchrun", "[[ $SSH_HOST == node-a ]]")
    assert subprocess.run(["bash", str(file)], env=environment, check=False, timeout=30).returncode != 0


def test_a_hostfile_is_read(tmp_path: Path) -> None:
    file = tmp_path / "hostfile"
    file.write_text("# our machines\nnode-a slots=8\n\nnode-b slots=4 # the old one\nnode-c slots=4\n")
    trainer, _ = settings("trainer.num_nodes=2", "trainer.devices=4")
    assert read_hostfile(file, trainer) == ["node-a", "node-b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node-a slots=4\nnode-b\n", ":2: expected `host slots=N`, got 'node-b'"),
        ("node-a slots=many\n", ":1: expected `host slots=N`"),
        ("node-a slots=4 gpus=4\n", ":1: expected `host slots=N`"),
        ("\nnode-a slots=2\n", ":2: node-a offers 2 slots, but trainer.devices=4"),
        ("node-a slots=4\n", " names 1 hosts, but trainer.num_nodes=2"),
    ],
)
def test_a_hostfile_that_does_not_fit(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "hostfile"
    file.write_text(text)
    trainer, _ = settings("trainer.num_nodes=2", "trainer.devices=4")
    with pytest.raises(UserError) as caught:
        read_hostfile(file, trainer)
    assert str(caught.value).startswith(f"{file}{message}")


def test_no_hostfile(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"launcher\.hostfile=.*nowhere cannot be read: No such file"):
        read_hostfile(tmp_path / "nowhere", settings()[0])


# --- one node ----------------------------------------------------------------------------------------------------------------------

FAKE_RANK = 'exec bash "$3"'
"""Stands in for Python: `python -m rlhf.cli.rank FILE` runs FILE as a shell script."""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Two ranks on this node, played by shell scripts; a rank that hangs is stopped at once."""
    monkeypatch.setattr(sys, "executable", str(script(tmp_path / "python", FAKE_RANK)))
    monkeypatch.setattr(launching, "GRACE", 0.2)
    return settings("trainer.devices=2")


def test_local_ranks_know_their_places(start: Settings, tmp_path: Path) -> None:
    assert run_ranks(script(tmp_path / "rank.sh", f"env > {tmp_path}/rank-$RANK"), *start) == 0
    ranks = told(tmp_path)
    port = int(ranks[0]["MASTER_PORT"])
    assert ranks == [rank_environment(rank, 2, local_rank=rank, per_node=2, address="127.0.0.1", port=port) for rank in range(2)]


@pytest.mark.parametrize(("ending", "code"), [("exit 2", 2), ("exit 1", 1), ("kill -9 $$", 1)], ids=["refused", "failed", "killed"])
def test_the_rank_that_fails_gives_the_exit_code_and_the_others_stop(ending: str, code: int, start: Settings, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    waits = f"if [[ $RANK == 0 ]]; then echo $$ > {pid}; exec sleep 300; fi"
    file = script(tmp_path / "rank.sh", waits, f"while [[ ! -s {pid} ]]; do sleep 0.01; done", ending)
    before = time.monotonic()
    assert run_ranks(file, *start) == code
    assert time.monotonic() - before < 10
    assert not alive(int(pid.read_text()))


def test_a_rank_about_to_end_may_do_so(start: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "GRACE", 10.0)
    file = script(tmp_path / "rank.sh", "[[ $RANK == 0 ]] && exit 1", "sleep 0.3", f"touch {tmp_path}/last-words", "exit 1")
    assert run_ranks(file, *start) == 1
    assert (tmp_path / "last-words").exists()


def hear_ctrl_c() -> None:
    """A shell starts what it runs in the background deaf to SIGINT, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


STARTER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_launcher import run_ranks, settings
chosen = settings("trainer.devices=2")
sys.executable = sys.argv[1]
sys.exit(run_ranks(Path(sys.argv[2]), *chosen))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "TERM"])
def test_ranks_end_with_the_command(number: signal.Signals, tmp_path: Path) -> None:
    """Either is passed on as Ctrl-C, and the ranks end by themselves."""
    python = script(tmp_path / "python", FAKE_RANK)
    rank = script(
        tmp_path / "rank.sh", f"trap 'touch {tmp_path}/saved-$RANK; exit 1' INT", f"echo $$ > {tmp_path}/pid-$RANK",
        "while true; do sleep 0.05; done",
    )  # fmt: skip
    command = [sys.executable, "-c", STARTER, str(python), str(rank), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    starter = subprocess.Popen(command, env=environment, preexec_fn=hear_ctrl_c)
    pids = [int(file.read_text()) for file in wait_for(tmp_path, "pid-*", 2)]
    starter.send_signal(number)
    assert starter.wait(timeout=30) == 1
    assert not any(alive(pid) for pid in pids)
    assert len(list(tmp_path.glob("saved-*"))) == 2


# --- real ranks --------------------------------------------------------------------------------------------------------------------


@pytest.mark.launch
def test_every_way_to_start_two_ranks_gives_the_same_losses(tmp_path: Path) -> None:
    words = [
        "model@actor.model=tiny", "data=pairs", f"data.path={write_pairs(tmp_path / 'pairs.jsonl', 32)}", "data.max_prompt_tokens=12",
        "data.max_answer_tokens=8", "data.split=[1,0,0]", f"data.cache_dir={tmp_path / 'cache'}", "sft.batch_size=8", "sft.micro_batch_size=2",
        "sft.max_steps=3", "trainer.devices=2", "callbacks=none",
    ]  # fmt: skip
    environment = slurm(tmp_path / "bin", hosts=r"127.0.0.1\n", nodes=1, tasks=2)
    port = launching.free_port()

    def run(*command: str) -> None:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr[-4000:]

    run(sys.executable, "-m", "rlhf", "sft", *words, f"run_dir={tmp_path / 'local'}")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}")
    run(*torchrun, "-m", "rlhf", "sft", *words, "launcher=external", f"run_dir={tmp_path / 'torchrun'}")
    config = composed("sft", *words, "launcher=slurm", f"launcher.master_port={port}", f"run_dir={tmp_path / 'slurm'}")
    claim(tmp_path / "slurm", config)
    cfg = build(config)
    run("bash", str(checked(render_slurm(tmp_path / "slurm" / "config.yaml", cfg.trainer, cfg.launcher), tmp_path / "job.sbatch")))

    losses = {name: column(tmp_path / name, "sft/loss") for name in ("local", "torchrun", "slurm")}
    assert len(losses["local"]) == 3
    assert losses["torchrun"] == losses["local"]
    assert losses["slurm"] == losses["local"]
