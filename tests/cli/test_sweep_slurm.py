"""A sweep on a cluster whose jobs vanish: the whole command, with SLURM's programs played by shell scripts."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf.cli.main import main
from rlhf.sweeping import slurm, slurm_queue

PROGRAMS = {
    "sbatch": 'echo "Submitted batch job 4242"',
    "srun": "true",
    "squeue": "true",
    "sacct": 'case "$*" in *--noheader*) true;; *) echo "JobID|State|NodeList"; esac',
    "scancel": "true",
}
"""A cluster that takes a job and has never heard of it afterwards."""


def test_a_sweep_ends_although_its_jobs_have_vanished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a hundred times its pace."""
    (tmp_path / "bin").mkdir()
    for name, body in PROGRAMS.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    fast = SimpleNamespace(monotonic=lambda: 100 * time.monotonic())
    monkeypatch.setattr(slurm, "time", fast)
    monkeypatch.setattr(slurm_queue, "time", fast)
    small = (
        "model@actor.model=tiny",
        "data=pairs",
        "data.path=rows.jsonl",
        "data.max_prompt_tokens=12",
        "data.max_answer_tokens=8",
        "sft.batch_size=4",
        "callbacks=none",
    )
    words = ["sft", "-m", "seed=1,2", *small, "sweep=slurm", "sweep.vanished_minutes=1", f"run_dir={tmp_path / 'sweep'}"]
    assert main(words) == 1
    for cell in ("0", "1"):
        ended = json.loads((tmp_path / "sweep" / cell / "summary.json").read_text())
        assert ended["status"] == "failed" and ended["config"]["seed"] == int(cell) + 1
        assert "job 4242: it has vanished: for 1 minute (sweep.vanished_minutes) `squeue" in ended["error"]
        assert "it has vanished" in (tmp_path / "sweep" / cell / "log.txt").read_text()
    assert "it has vanished" in "".join(capsys.readouterr())
