"""Runs the ablation: `python run.py --out DIR --jobs N`. Runs that DIR or runs.csv has are skipped, so that the table grows over sittings.

SFT and reward model are trained once a seed and shared by all cells, but for those that turn a key of the reward model. A run is one process with one thread, PPO and its evaluation in it.
What a run leaves: runs/CELL/seed-S/summary.json and metrics.csv. Its weights are deleted.

A run that the guard ends, or whose gradients are not finite, is a result: its summary has the status `diverged` and the message. A run
that fails in another way leaves failed/CELL-seed-S.log, and the next sitting tries it again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cells import Cell, chosen, load, read_summary, run_folder
from record import FILE, Runs, read

ROOT = Path(__file__).resolve().parents[2]
THREAD = ("trainer=cpu", "trainer.threads=1")
DIVERGED = ("Collapsed: ", "FloatingPointError: ")
"""How the error of a run begins that went wrong by its own numbers (rlhf/callbacks/guard.py)."""


def environment() -> dict[str, str]:
    """One thread, no GPU, no network; this checkout's rlhf, installed or not."""
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
    single = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "HF_HUB_OFFLINE")}
    return os.environ | single | {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path}


def pipeline(steps: str, seed: int, run_dir: Path, overrides: Sequence[str], log: Path) -> int:
    """`rlhf pipeline` in a process of its own; returns its exit code."""
    command = [sys.executable, "-m", "rlhf", "pipeline", f"steps=[{steps}]", f"seed={seed}", *THREAD, *overrides, f"run_dir={run_dir}"]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as f:
        f.write(" ".join(command) + "\n")
        f.flush()
        return subprocess.run(command, env=environment(), stdout=f, stderr=subprocess.STDOUT, check=False).returncode


def train_base(out: Path, seed: int) -> str:
    """SFT and reward model of a seed, unless they are there; returns a line to print."""
    folder, log = out / "base" / f"seed-{seed}", out / "failed" / f"base-seed-{seed}.log"
    if base_is_there(out, seed):
        return f"seed {seed}: SFT and reward model are there"
    start = time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)
    code = pipeline("sft,reward", seed, folder, (), log)
    if code:
        return f"seed {seed}: SFT and reward model failed with exit code {code}, see {log}"
    log.unlink()
    return f"seed {seed}: SFT and reward model in {time.perf_counter() - start:.0f} s"


def base_is_there(out: Path, seed: int) -> bool:
    folder = out / "base" / f"seed-{seed}"
    return read_summary(folder) is not None and all((folder / step / "export").is_dir() for step in ("sft", "reward"))


def run_cell(out: Path, cell: Cell, seed: int) -> tuple[bool, str]:
    """One PPO run and its evaluation; returns whether a result came of it, and a line to print."""
    name, base = f"{cell.name} seed {seed}", out / "base" / f"seed-{seed}"
    work, log = out / "work" / cell.name / f"seed-{seed}", out / "failed" / f"{cell.name}-seed-{seed}.log"
    shutil.rmtree(work, ignore_errors=True)
    start = time.perf_counter()
    own_reward = any(flip.startswith("rm.") for flip in cell.overrides)  # it starts from the SFT model, as the shared one does
    overrides = [*cell.overrides, f"actor.init={base / 'sft'}", f"reward.init={base / ('sft' if own_reward else 'reward')}"]
    code = pipeline("reward,ppo,evaluate" if own_reward else "ppo,evaluate", seed, work, overrides, log)
    seconds = time.perf_counter() - start
    summary = outcome(work)
    if summary is None:
        shutil.rmtree(work, ignore_errors=True)
        return False, f"{name}: failed with exit code {code}, see {log}"
    summary |= {"cell": cell.name, "overrides": list(cell.overrides), "wall_seconds": seconds}
    keep(work, run_folder(out, cell.name, seed), summary)
    log.unlink()
    shown = f"gold {summary['metrics']['gold/ppo']:.3f}" if summary["status"] == "done" else summary["error"]
    return True, f"{name}: {summary['status']} in {seconds:.0f} s, {shown}"


def outcome(work: Path) -> dict[str, Any] | None:
    """The summary of a run that ended with a result, good or bad; None: it was stopped or something broke."""
    summary = read_summary(work)
    if summary is not None and summary["status"] == "done":
        return summary
    ppo = read_summary(work / "ppo")
    if ppo is not None and ppo["status"] == "failed" and str(ppo["error"]).startswith(DIVERGED):
        return ppo | {"status": "diverged"}
    return None


def keep(work: Path, folder: Path, summary: dict[str, Any]) -> None:
    """Moves what is kept to its place, the summary last, and deletes the rest."""
    folder.mkdir(parents=True, exist_ok=True)
    if (work / "ppo" / "metrics.csv").is_file():
        shutil.copyfile(work / "ppo" / "metrics.csv", folder / "metrics.csv")
    part = folder / "summary.json.part"
    part.write_text(json.dumps(summary, indent=1, ensure_ascii=False), encoding="utf-8")
    part.rename(folder / "summary.json")
    shutil.rmtree(work)


def is_done(out: Path, cell: Cell, seed: int, recorded: Runs) -> bool:
    """
    Raises:
        ValueError: the run there had other overrides.
    """
    folder = run_folder(out, cell.name, seed)
    summary, line = read_summary(folder), recorded.get(cell.name, {}).get(seed)
    was = {} if summary is None else {str(folder): " ".join(summary["overrides"])}
    was |= {} if line is None else {f"runs.csv, seed {seed}": line["overrides"]}
    for where, overrides in was.items():
        if overrides != " ".join(cell.overrides):
            raise ValueError(
                f"{where}: {cell.name} was run with {overrides}, which is not what it is now: delete it, or choose another --out or --record"
            )
    return bool(was)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--record", type=Path, default=FILE, help="runs that are known already")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with one thread")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--cells", default="", help="names with commas between; all without")
    parser.add_argument("--hours", type=float, default=None, help="starts nothing after so many hours")
    parser.add_argument("--list", action="store_true", help="prints what is left to run, and runs nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 all is done; 1 some runs failed; 2 refused; 3 time was up before all had started."""
    options = arguments(argv)
    out, seeds = options.out.resolve(), [int(seed) for seed in options.seeds.split(",")]
    try:
        cells = chosen(load(), [name for name in options.cells.split(",") if name])
        recorded = read(options.record)
        left = [(cell, seed) for cell in cells for seed in seeds if not is_done(out, cell, seed, recorded)]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(left)} of {len(cells) * len(seeds)} runs are left", flush=True)
    if options.list:
        print("\n".join(f"{cell.name} seed {seed}" for cell, seed in left))
        return 0
    start = time.perf_counter()

    def one(task: tuple[Cell, int]) -> bool | None:
        """Whether a result came of it; None: not started."""
        cell, seed = task
        if options.hours is not None and time.perf_counter() - start > 3600 * options.hours:
            return None
        there = base_is_there(out, seed)
        done, line = run_cell(out, cell, seed) if there else (False, f"{cell.name} seed {seed}: no SFT or reward model")
        print(f"[{time.perf_counter() - start:6.0f} s] {line}", flush=True)
        return done

    with ThreadPoolExecutor(options.jobs) as pool:
        for line in pool.map(lambda seed: train_base(out, seed), sorted({seed for _, seed in left})):
            print(f"[{time.perf_counter() - start:6.0f} s] {line}", flush=True)
        results = list(pool.map(one, left))
    print(f"{results.count(True)} runs done, {results.count(False)} failed, {results.count(None)} not started for want of time")
    return 1 if False in results else 3 if None in results else 0


if __name__ == "__main__":
    sys.exit(main())
