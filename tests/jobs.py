"""Running real jobs from tests: compose a verb's config, run it here or on several gloo ranks.

As a script, `python jobs.py CONFIG [CONFIG ...]` is one rank that runs several jobs after each other in one process group, so that a
test pays for one start only.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from rlhf.cli.compose import conf_dir
from rlhf.engines.launcher import RANK_VARIABLES, free_port, rank_environment


def composed(verb: str, *overrides: str) -> dict[str, Any]:
    """The resolved config of a verb; `run_dir=` must be among the overrides."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return OmegaConf.to_container(compose(verb, list(overrides)), resolve=True, throw_on_missing=True)  # type: ignore[return-value]


def written(config: dict[str, Any]) -> Path:
    """Writes a job's config into its run directory, as the command does."""
    run_dir = Path(config["run_dir"])
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    return run_dir / "config.yaml"


def run_together(configs: list[dict[str, Any]], *, world: int) -> None:
    """Runs jobs one after the other on `world` fresh ranks; raises if a rank fails, with its output."""
    start_ranks(Path(__file__), *(str(written(config)) for config in configs), world=world)


def start_ranks(script: Path, *words: str, world: int) -> list[str]:
    """What each of `world` ranks of a script says; raises if one fails, with its output."""
    port = free_port()
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).rstrip(
        os.pathsep
    )  # scripts import what tests do
    ranks = []
    for rank in range(world):
        environment = os.environ | rank_environment(rank, world, local_rank=rank, per_node=world, address="127.0.0.1", port=port)
        environment["PYTHONPATH"] = paths
        command = [sys.executable, str(script), *words]
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    with ThreadPoolExecutor(world) as pool:  # all at once: a rank whose pipe is full would wait, and the others for it in a collective
        outputs = list(pool.map(lambda rank: rank.communicate(timeout=600)[0], ranks))
    for rank, output in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, output[-4000:]
    return outputs


@contextmanager
def one_rank() -> Iterator[None]:
    """This process as the only rank of a process group, none of which is left behind."""
    import deepspeed
    from deepspeed.utils import groups

    before = {name: os.environ.get(name) for name in RANK_VARIABLES}
    os.environ |= rank_environment(0, 1, local_rank=0, per_node=1, address="127.0.0.1", port=free_port())
    compiled = deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"]
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled
    deepspeed.init_distributed("gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
        for name, value in list(vars(groups).items()):  # DeepSpeed keeps groups for later engines, and asks nobody whether they still are
            if isinstance(value, torch.distributed.ProcessGroup):
                setattr(groups, name, None)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = compiled
        for name, known in before.items():
            if known is None:
                del os.environ[name]
            else:
                os.environ[name] = known


def column(run_dir: Path | str, name: str) -> list[float]:
    """One metric of a run, step by step."""
    with (Path(run_dir) / "metrics.csv").open(newline="") as f:
        return [float(row[name]) for row in csv.DictReader(f) if row.get(name)]


if __name__ == "__main__":
    from rlhf.cli.rank import run_rank

    for path in sys.argv[1:]:
        run_rank(yaml.safe_load(Path(path).read_text()))
    sys.stdout.flush()
    os._exit(0)
