"""A sweep whose jobs train nothing: everything of the command is real, only the work of a rank is replaced, so that a job takes a second.

`light.py sweep VERB WORDS` is the command, `light.py cell` one cell, `light.py rank CONFIG` one rank. The "training" is a recurrence from the seed, with
checkpoints; `+callbacks.light.KEY` says how it behaves (it is a callback of no class, which nothing here builds).
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve()


def work(config: dict[str, Any]) -> None:
    """One rank: notes what it was told, then goes from step to step."""
    light, run_dir, rank = config["callbacks"]["light"], Path(config["run_dir"]), os.environ.get("RANK", "0")
    names = ("RANK", "WORLD_SIZE", "MASTER_PORT", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "RLHF_CORES", "RLHF_PARENT")
    told = {"pid": os.getpid(), "config": config, "environment": {name: os.environ.get(name) for name in names}}
    diary = run_dir / f"rank-{rank}.jsonl"
    with diary.open("a") as f:
        f.write(json.dumps(told) + "\n")
    checkpoints = sorted((run_dir / "checkpoints").glob("step-*/manifest.json")) if config["resume"] else []
    state = json.loads(checkpoints[-1].read_text()) if checkpoints else {"step": 0, "value": float(config["seed"])}
    rows = (run_dir / "metrics.csv").read_text().splitlines()[: state["step"] + 1] if checkpoints else ["step,value"]
    for step in range(state["step"] + 1, light.get("steps", 2) + 1):
        time.sleep(light.get("seconds", 0.0))
        state = {"step": step, "value": state["value"] / 2 + config["sft"]["optimizer"]["lr"]}
        if rank == "0":
            rows.append(f"{step},{state['value']}")
            (run_dir / "metrics.csv").write_text("\n".join([*rows, ""]))
        if rank == "0" and light.get("saves"):
            folder = run_dir / "checkpoints" / f"step-{step:06d}"
            folder.mkdir(parents=True)
            (folder / "manifest.json").write_text(json.dumps(state))
    if config["seed"] in light.get("fails", ()):
        raise RuntimeError("the disk is on fire")
    if rank == "0":
        from rlhf.cli import rundir

        rundir.write_summary(config, "done", metrics={"sft/perplexity": state["value"]}, seconds={"total": 1.0}, data={})


def as_rank(config: dict[str, Any]) -> int:
    from rlhf.cli.errors import report

    try:
        work(config)
    except Exception as error:
        return report(config, error)
    return 0


def replace_the_heavy_parts() -> None:
    from rlhf.cli import job, rundir

    rundir.hardware = dict
    job.accelerator_of_ranks = lambda trainer, launcher: "cpu"
    job._run_here = as_rank


def main(mode: str, *words: str) -> int:
    if mode == "sweep":
        from rlhf.cli.main import main as command
        from rlhf.cli.sweep import run as sweep_run

        sweep_run.CELL = (sys.executable, str(HERE), "cell")
        return command(list(words))
    replace_the_heavy_parts()
    if mode == "cell":
        from rlhf.cli.sweep import cell as sweep_cell

        starter = Path(os.environ["LIGHT_PYTHON"])  # `python -m rlhf.cli.rank FILE` of the launcher
        if not starter.exists():
            part = starter.with_name(f"{starter.name}-{os.getpid()}")
            part.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE} rank "$3"\n')
            part.chmod(0o755)
            part.rename(starter)
        sys.executable = str(starter)
        return sweep_cell.main()
    from rlhf.sweeping.orphans import end_with_parent

    end_with_parent()
    return as_rank(yaml.safe_load(Path(words[0]).read_text()))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
