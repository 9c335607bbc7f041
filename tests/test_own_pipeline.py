"""docs/own_pipeline.md is true: its files are written, its Python and its commands are run as they stand, with sizes of a test.

Everything runs in a process and a folder of its own: `python test_own_pipeline.py` runs the page in the current folder. Engines keep process
groups in globals, so that a process in which other tests have run is no place to try what a user's would do.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

from rlhf.callbacks.rollout import load_rollout
from rlhf.cli.main import main
from rlhf.engines.launcher import RANK_VARIABLES
from rlhf.logging import log

PAGE = Path(__file__).parents[1] / "docs" / "own_pipeline.md"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
TINY = ("model@actor.model=tiny", "data.max_prompt_tokens=40", "data.max_answer_tokens=24", "callbacks=none")
SIZES: dict[str, tuple[str, ...]] = {
    "runs/polite": (
        *TINY,
        "rollout.max_new_tokens=8",
        "ppo.iterations=1",
        "rollout.save_to=runs/polite/answers",
        "ppo.batch_size=4",
        "ppo.minibatch_size=16",
    ),
    "runs/median": (
        *TINY,
        "rollout.max_new_tokens=8",
        "ppo.iterations=2",
        "ppo.batch_size=4",
        "ppo.minibatch_size=16",
        "model@reward.model=tiny",
    ),
    "runs/sums": ("model@actor.model=tiny", "callbacks=none", "sft.max_steps=2", "sft.batch_size=8", "sft.micro_batch_size=8"),
    "runs/smooth": (*TINY, "smooth.steps=3", "smooth.batch_size=4", "trainer.checkpoint_every=2"),
}
"""What is added to the page's command with this run directory."""


def file_of(block: str) -> str | None:
    """The name in the first line of a block that is a file."""
    found = re.match(r"# ([\w/]+\.(?:py|yaml))\n", block)
    return found and found.group(1)


def commands() -> list[list[str]]:
    lines = [line for _, block in BLOCKS for line in block.splitlines() if line.startswith("$ rlhf ")]
    return [shlex.split(line)[2:] for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the page's files, the current one as long as these tests run; the process is as before afterwards."""
    folder = tmp_path_factory.mktemp("own")
    for _, block in BLOCKS:
        if (name := file_of(block)) is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(block)
    before, environment, words, path = Path.cwd(), dict(os.environ), sys.argv, list(sys.path)
    handlers, propagate = list(log.handlers), log.propagate
    os.chdir(folder)
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)
    os.environ["RLHF_CACHE"] = str(folder / "cache")
    yield folder
    os.chdir(before)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.path[:] = words, path
    log.handlers[:], log.propagate = handlers, propagate
    for name in {Path(name).stem for _, block in BLOCKS if (name := file_of(block)) is not None}:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def runs(folder: Path) -> Path:
    """The run directories of the page, made by a process of their own."""
    done = subprocess.run([sys.executable, str(Path(__file__).resolve())], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return folder / "runs"


def run_the_page() -> None:
    """The page's commands first, each where it stands, then its Python in one namespace; then what the Python is compared with."""
    for words in commands():
        if "--cfg" in words:
            continue
        directory = next(word.removeprefix("run_dir=") for word in words if word.startswith("run_dir="))
        goes_on = "resume=true" in words
        if goes_on:
            (Path(directory) / "summary.json").unlink()  # as if it had been stopped after its checkpoint
        assert main([*words, *(() if goes_on else SIZES[directory])]) == 0, words
    namespace: dict[str, Any] = {"__name__": "page"}
    for language, block in BLOCKS:
        if language == "python" and file_of(block) is None:
            exec(compile(block, str(PAGE), "exec"), namespace)
    assert main(["ppo", *words_of_the_loop(), "callbacks=none", "run_dir=runs/by-command"]) == 0


def words_of_the_loop() -> list[str]:
    source = next(block for language, block in BLOCKS if language == "python" and "with opened" in block)
    return re.findall(r'"([\w@.=/-]+=[\w./-]+)"', source)


def summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


def rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open(newline="") as f:
        return list(csv.DictReader(f))


def test_the_page_has_what_it_promises() -> None:
    assert {name for _, block in BLOCKS if (name := file_of(block))} == {
        "my_reward.py", "my_data.py", "my_advantage.py", "my_verb.py", "conf/data/sums.yaml", "conf/smooth.yaml"
    }  # fmt: skip
    assert {word for words in commands() for word in words if word.startswith("run_dir=")} == {f"run_dir={name}" for name in SIZES}


def test_every_run_is_done(runs: Path) -> None:
    assert {path.name: summary(path)["status"] for path in runs.iterdir() if path.name != "py-load"} == dict.fromkeys(
        ("py-sft", "py-loop", "by-command", "polite", "sums", "median", "smooth"), "done"
    )
    assert (runs / "py-load" / "config.yaml").is_file() and not (runs / "py-load" / "summary.json").exists()


def test_a_loop_of_ones_own_learns_what_the_command_does(runs: Path) -> None:
    """The page's loop against `rlhf ppo` with its words: the same numbers, but for times, and the same weights."""
    assert "run_dir=runs/py-loop" in words_of_the_loop()
    theirs, ours = rows(runs / "by-command"), rows(runs / "py-loop")
    assert len(theirs) == len(ours) == 3
    for one, other in zip(theirs, ours, strict=True):
        same = {name for name in one if not name.startswith("time/")}
        assert len(same) > 20 and {name: one[name] for name in same} == {name: other.get(name) for name in same}
    weights, others = (load_file(runs / name / "export" / "actor" / "model.safetensors") for name in ("by-command", "py-loop"))
    before = load_file(runs / "py-sft" / "export" / "actor" / "model.safetensors")
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert any(not torch.equal(weights[name], before[name]) for name in weights)


def test_the_reward_is_the_page_s(runs: Path) -> None:
    sys.path.insert(0, str(runs.parent))
    from my_reward import polite  # type: ignore[import-not-found]

    (row,) = rows(runs / "polite")
    rollout = load_rollout(runs / "polite" / "answers", 0)
    tokenizer = AutoTokenizer.from_pretrained(runs / "polite" / "export" / "actor")
    answers = tokenizer.batch_decode(rollout.ids[:, rollout.prompt_length :], skip_special_tokens=True)
    scores = polite([], answers, rollout.ended.tolist())
    assert len(set(scores)) > 1
    assert float(row["rollout/reward"]) == pytest.approx(sum(scores) / len(scores), abs=1e-5)


def test_the_data_are_the_page_s(runs: Path) -> None:
    """A tokenizer trained on the rows knows numbers and the words of the chat format."""
    assert 0 < summary(runs / "sums")["data"]["rows"] <= 400
    vocabulary = AutoTokenizer.from_pretrained(runs / "sums" / "export" / "actor").get_vocab()
    words = {word for word in vocabulary if word.isalpha()}
    assert "+" in "".join(vocabulary) and "42" in "".join(vocabulary) and words <= {"Human", "Assistant"}, words


def test_the_estimator_takes_the_median(folder: Path) -> None:
    sys.path.insert(0, str(folder))
    from my_advantage import median_baseline  # type: ignore[import-not-found]

    rewards = torch.tensor([[0.0, 1.0], [5.0, 0.0], [0.0, 3.0], [4.0, 0.0], [2.0, 0.0], [0.0, 9.0]])  # 3 answers to 2 prompts
    expected = torch.tensor([-1.0, 0.0, 1.0, -1.0, 0.0, 4.0])
    torch.testing.assert_close(median_baseline(rewards, rewards > 0, 3), expected[:, None].expand(6, 2))


def test_the_verb_learns_and_is_written_like_any_other(runs: Path) -> None:
    """The page's verb ran to its end, and was gone on with from the checkpoint after step 2."""
    losses = [float(row["smooth/loss"]) for row in rows(runs / "smooth")]
    assert [row["step"] for row in rows(runs / "smooth")] == ["1", "2", "3"]
    assert losses[-1] < losses[0]
    done = summary(runs / "smooth")
    assert (done["verb"], done["config"]["smooth"]["smoothing"]) == ("smooth", 0.2)
    assert done["metrics"]["smooth/loss"] == pytest.approx(losses[-1])
    assert (runs / "smooth" / "export" / "actor" / "model.safetensors").is_file()


def test_the_verb_s_configuration_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (words,) = [words for words in commands() if "--cfg" in words]
    assert main(words) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["verb"], config["smooth"]["optimizer"]["lr"]) == ("smooth", 1.0e-3)


if __name__ == "__main__":
    run_the_page()
