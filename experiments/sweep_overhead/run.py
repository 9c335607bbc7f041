"""What a sweep costs beside its jobs: `python run.py` times a sweep of eight one-second jobs, and one such job alone.

A job is a process start (Python, torch, DeepSpeed, Lightning) and a few steps of a network of 0.1 million parameters. A sweep should cost no
more than the starts it cannot do without.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SMALL = (
    "model@actor.model=tiny", "data=quickstart", "data.max_rows=96", "data.split=[1,0,0]", "data.sft_only=[]", "sft.batch_size=8",
    "sft.micro_batch_size=8", "sft.max_steps=3", "callbacks=none", "trainer.threads=1",
)  # fmt: skip


def timed(*words: str) -> float:
    """Seconds of one command; its output is left out."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "rlhf", "sft", *words, *SMALL], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=8)
    cells = parser.parse_args().cells
    seeds = "seed=" + ",".join(map(str, range(cells)))
    with tempfile.TemporaryDirectory() as folder:
        timed(f"run_dir={folder}/warm")  # fills the cache of rows, and the machine's of files
        singles, sweeps = [], {}
        for jobs in (1, 2):  # commands alone before, between and behind the sweeps: other work on the machine slows all of them
            singles.append(timed("seed=0", f"run_dir={folder}/before-{jobs}"))
            sweeps[jobs] = timed("-m", seeds, f"sweep.jobs={jobs}", f"run_dir={folder}/sweep-{jobs}")
        singles.append(timed("seed=0", f"run_dir={folder}/behind"))
        summary = json.loads((Path(folder) / "behind" / "summary.json").read_text())
    single = sum(singles) / len(singles)
    print(f"one command alone: {', '.join(f'{one:.1f}' for one in singles)} s, its training {summary['seconds']['total']:.1f} s")
    for jobs, whole in sweeps.items():
        print(
            f"{cells} cells, {jobs} at a time: {whole:.1f} s, {whole / cells:.2f} s a cell: {whole / cells / single:.2f} of a command alone"
        )
    print(f"commit {summary['commit']}, torch {summary['hardware']['torch']}")


if __name__ == "__main__":
    main()
