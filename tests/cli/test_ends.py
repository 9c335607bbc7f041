"""How a run may end, and what one that goes on from there comes to: the numbers, the rows and the weights of a run that was never stopped.

All jobs of the first part share one process, which pays for one start.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import PPO, SFT
from safetensors.torch import load_file
from tiny import write_pairs

RUN = (
    *SFT, "sft.max_steps=4", "sft.micro_batch_size=2", "trainer.checkpoint_every=2", "trainer.keep_checkpoints=2", "trainer.eval_every=null",
)  # fmt: skip
CODE = """
import json, sys
from rlhf.cli.main import main
print(json.dumps([main(words) for words in json.loads(sys.argv[1])]))
"""


def run_all(*jobs: list[str]) -> tuple[list[int], str]:
    """Exit codes of commands run one after the other in a fresh process, and its stderr."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", CODE, json.dumps(jobs)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def rows(run_dir: Path) -> list[dict[str, str]]:
    """metrics.csv without what a clock measured."""
    with (run_dir / "metrics.csv").open(newline="") as f:
        return [{k: v for k, v in row.items() if not k.startswith("time/") and not k.endswith("per_s")} for row in csv.DictReader(f)]


def summary(run_dir: Path) -> dict[str, Any]:
    found = json.loads((run_dir / "summary.json").read_text())
    found["metrics"] = {k: v for k, v in found["metrics"].items() if not k.startswith("time/") and not k.endswith("per_s")}
    return found


def as_if_killed(whole: Path, run_dir: Path, *, without: tuple[str, ...]) -> Path:
    """A copy of a run that ended before its summary and its export, and before some of its checkpoints."""
    shutil.copytree(whole, run_dir)
    (run_dir / "summary.json").unlink()
    shutil.rmtree(run_dir / "export")
    for step in without:
        shutil.rmtree(run_dir / "checkpoints" / step)
    return run_dir


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole run, and those resumed from its end, its middle and its beginning."""
    root = tmp_path_factory.mktemp("ends")
    data = (f"data.path={write_pairs(root / 'pairs.jsonl', 64)}", f"data.cache_dir={root / 'cache'}")
    codes, errors = run_all(
        [*RUN, *data, f"run_dir={root / 'whole'}"],
        [*RUN, *data, "+callbacks.stop={_target_: mishaps.StopAt, iteration: 3}", f"run_dir={root / 'early'}"],
        [*RUN, *data, "+callbacks.press._target_=mishaps.PressTwice", f"run_dir={root / 'twice'}"],
    )
    assert codes == [0, 0, 1], errors[-4000:]
    (root / "stderr").write_text(errors)
    both = ("step-000002", "step-000004")
    parts = {"end": (), "middle": both[1:], "beginning": both}
    again = [as_if_killed(root / "whole", root / name, without=gone) for name, gone in parts.items()]
    codes, errors = run_all(*(["sft", "resume=true", f"run_dir={run_dir}"] for run_dir in again))
    assert codes == [0, 0, 0], errors[-4000:]
    return root


@pytest.mark.launch
@pytest.mark.parametrize("where", ["end", "middle", "beginning"])
def test_a_resumed_run_is_the_whole_run(where: str, runs: Path) -> None:
    whole, resumed = summary(runs / "whole"), summary(runs / where)
    assert resumed["status"] == "done" and resumed["metrics"] == whole["metrics"]
    assert {"sft/perplexity_before", "sft/perplexity", "sft/loss"} <= whole["metrics"].keys()
    assert rows(runs / where) == rows(runs / "whole") and [row["step"] for row in rows(runs / where)] == ["0", "1", "2", "3", "4"]
    first, second = (load_file(runs / name / "export" / "actor" / "model.safetensors") for name in ("whole", where))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.launch
def test_a_callback_may_end_a_run(runs: Path) -> None:
    """It is judged and exported where it stands, and the log says where that is."""
    assert summary(runs / "early")["status"] == "done" and "sft/perplexity" in summary(runs / "early")["metrics"]
    assert (runs / "early" / "export" / "actor" / "model.safetensors").is_file()
    assert rows(runs / "early") == rows(runs / "whole")[:3] + rows(runs / "early")[3:]
    assert "a callback stopped the training at iteration 3 of 4" in (runs / "stderr").read_text()


@pytest.mark.launch
def test_a_second_ctrl_c_is_said_and_recorded(runs: Path) -> None:
    assert summary(runs / "twice")["status"] == "failed" and "stopped at once by Ctrl-C" in summary(runs / "twice")["error"]
    assert "rlhf: stopped at once by Ctrl-C or SIGTERM; the last checkpoint, if there is one, is kept" in (runs / "stderr").read_text()
    assert not (runs / "twice" / "export").exists()


@pytest.mark.launch
def test_a_resumed_run_whose_function_fails_has_failed(tmp_path: Path) -> None:
    words = (
        "ppo.reward_source=function",
        "ppo.critic_init=actor",
        "ppo.reward_function=mishaps.refuses_later",
        "trainer.checkpoint_every=1",
    )
    data = (f"data.path={write_pairs(tmp_path / 'pairs.jsonl', 32)}", f"data.cache_dir={tmp_path / 'cache'}", f"run_dir={tmp_path / 'run'}")
    codes, errors = run_all([*PPO, *words, *data, "ppo.iterations=3"])
    assert codes == [1], errors[-4000:]
    file = tmp_path / "run" / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"error": "Interrupted: stopped at iteration 1"}))
    again = ["ppo", "resume=true", data[-1]]
    codes, errors = run_all(again, again)  # the function is good for one iteration more, then for none
    assert codes == [1, 1], errors[-4000:]
    assert summary(tmp_path / "run")["status"] == "failed" and "mishaps.refuses_later returned nan" in summary(tmp_path / "run")["error"]
    before = file.read_bytes()
    (tmp_path / "run" / "checkpoints" / "step-000002" / "module.pt").unlink()
    codes, errors = run_all(again)
    assert codes == [2] and file.read_bytes() == before, "refused before it went on"


@pytest.mark.launch
def test_what_one_rank_refuses_is_said_once_and_ends_all(tmp_path: Path) -> None:
    words = ("ppo.reward_source=function", "ppo.critic_init=actor", "ppo.reward_function=mishaps.refuses_elsewhere", "ppo.iterations=1")
    data = (f"data.path={write_pairs(tmp_path / 'pairs.jsonl', 32)}", f"data.cache_dir={tmp_path / 'cache'}")
    micro = ("ppo.micro_batch_size=2", "trainer.devices=2")
    codes, errors = run_all([*PPO, *words, *data, *micro, f"run_dir={tmp_path / 'run'}"])
    assert codes == [2], errors[-4000:]
    assert errors.count("ppo.reward_function=mishaps.refuses_elsewhere raised KeyError: 'no answer like that', for the prompt") == 1
    assert "mishaps.refuses_elsewhere raised" in summary(tmp_path / "run")["error"]


@pytest.mark.launch
@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_saves_and_ends(ranks: int, tmp_path: Path) -> None:
    """As clusters end a job; it goes on from there."""
    run_dir = tmp_path / "my run"
    data = (f"data.path={write_pairs(tmp_path / 'pairs.jsonl', 64)}", f"data.cache_dir={tmp_path / 'cache'}", f"run_dir={run_dir}")
    slow = ("+callbacks.slow={_target_: mishaps.Slow, seconds: 0.5}", "sft.max_steps=40", "trainer.checkpoint_every=null")
    words = [*RUN, *slow, *data, f"trainer.devices={ranks}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen([sys.executable, "-m", "rlhf", *words], env=environment, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: (run_dir / "metrics.csv").is_file() and len(rows(run_dir)) > 2)
        process.terminate()
        errors = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert process.returncode == 1, errors[-4000:]
    (saved,) = (run_dir / "checkpoints").iterdir()
    assert "finishing this step, then saving" in errors
    assert summary(run_dir)["status"] == "failed"
    assert f"saved {saved}; go on with resume=true 'run_dir={run_dir}'" in summary(run_dir)["error"]


@pytest.mark.launch
def test_sigterm_ends_what_saves_nothing(tmp_path: Path) -> None:
    words = (
        "bench",
        "rollout",
        "model@actor.model=tiny",
        "bench.batch_sizes=[1]",
        "bench.prompt_tokens=8",
        "bench.new_tokens=8",
        "bench.repeats=100000",
    )
    process = subprocess.Popen([sys.executable, "-m", "rlhf", *words, f"run_dir={tmp_path / 'run'}"], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        wait_until(lambda: (tmp_path / "run" / "config.yaml").is_file())
        time.sleep(8)  # into the measurement, which is one long step of training
        process.terminate()
        assert process.wait(timeout=60) == 1
    finally:
        process.kill()
        process.wait()
    assert "stopped at once by Ctrl-C or SIGTERM" in summary(tmp_path / "run")["error"]


def wait_until(true: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)
