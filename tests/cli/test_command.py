"""The command as a user meets it: help, printing a configuration, Ctrl-C and going on. Sweeps: test_sweep.py."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import write_pairs

from rlhf.cli.main import main
from rlhf.cli.verbs import VERBS

HERE = Path(__file__).parent
SMALL = (
    "model@actor.model=tiny", "data=pairs", "data.max_prompt_tokens=12", "data.max_answer_tokens=8", "data.split=[1,0,0]", "sft.batch_size=4",
    "sft.micro_batch_size=4", "callbacks=none",
)  # fmt: skip


def start(*words: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    command = [sys.executable, "-m", "rlhf", *words]
    # A shell starts what it runs in the background deaf to SIGINT, and children inherit that.
    hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear)


def summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


def steps(run_dir: Path) -> list[int]:
    """Steps with a row in metrics.csv, in the order of the file."""
    file = run_dir / "metrics.csv"
    if not file.is_file():
        return []
    with file.open(newline="") as f:
        return [int(row["step"]) for row in csv.DictReader(f) if row.get("step") and row.get("sft/loss")]


# --- without a run -----------------------------------------------------------------------------------------------------------------


def test_help_lists_the_verbs_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from rlhf.cli.main import main; code = main(['--help']);"
        "print('heavy:', sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'hydra', 'lightning', 'transformers', 'deepspeed', 'numpy'}));"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "heavy: []" in done.stdout
    for verb, what in VERBS.items():
        assert re.search(rf"^  {verb} +{re.escape(what)}$", done.stdout, re.MULTILINE)


def test_the_parent_of_ranks_leaves_deepspeed_to_them() -> None:
    """It reads the device from the environment at the moment that it is imported, and says so on stderr."""
    code = "import sys, rlhf.cli.pipeline; print('deepspeed' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("words", [[], ["-h"], ["help"], ["--help"]])
def test_no_verb_is_a_call_for_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("usage: rlhf <verb>")


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize("verb", VERBS)
def test_a_configuration_is_printed(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [] if verb in ("report", "chat") else ["seed=3"]  # they draw nothing of a run
    assert main([verb, "--cfg", "job", *words]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["verb"] == verb
    assert config.get("seed") == (3 if words else None)


def test_ctrl_c_before_a_job_listens_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def pressed(words: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf.cli.main._main", pressed)
    assert main(["sft"]) == 1
    assert capsys.readouterr().err == "rlhf: stopped at once by Ctrl-C\n"


# --- runs --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.launch
def test_ctrl_c_saves_says_how_to_go_on_and_resume_finishes(tmp_path: Path) -> None:
    run_dir, total = tmp_path / "run", 14
    data = f"data.path={write_pairs(tmp_path / 'pairs.jsonl', 64)}"
    slow = ("+callbacks.slow._target_=mishaps.Slow", "+callbacks.slow.seconds=0.25")
    run = start("sft", *SMALL, data, f"sft.max_steps={total}", "sft.epochs=4", *slow, f"run_dir={run_dir}")
    while len(steps(run_dir)) < 2:
        assert run.poll() is None, run.communicate()
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 1, err
    assert "Traceback" not in err
    done = len(steps(run_dir))
    assert 2 <= done < total
    checkpoint = run_dir / "checkpoints" / f"step-{done:06d}"
    line = f"rlhf: stopped at iteration {done} and saved {checkpoint}; go on with resume=true run_dir={run_dir}"
    assert err.splitlines()[-1] == line
    assert (checkpoint / "manifest.json").is_file()
    assert summary(run_dir)["status"] == "failed"
    assert not (run_dir / "export").exists()

    again = start("sft", "resume=true", f"run_dir={run_dir}")
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert steps(run_dir) == list(range(1, total + 1))
    assert summary(run_dir)["status"] == "done"
    assert (run_dir / "export" / "actor" / "model.safetensors").is_file()
