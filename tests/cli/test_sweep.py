"""`rlhf VERB -m`: which cells there are, and what is refused before anything starts."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sweeps_of_tests import HERE, LOCAL, composer

from rlhf.cli.main import main
from rlhf.cli.sweep.words import plain, read_line
from rlhf.config import UserError, build
from rlhf.rules import check
from rlhf.settings import SearchSweepConfig

# --- cells -----------------------------------------------------------------------------------------------------------------------


def test_a_grid_is_the_product_of_its_values_in_order() -> None:
    cells = composer("sft.optimizer.lr=1e-3,0.1", "seed=range(0,3)", "data=quickstart").grid()
    assert [cell.overrides for cell in cells] == [{"sft.optimizer.lr": lr, "seed": seed} for lr in (1e-3, 0.1) for seed in range(3)]
    assert cells[4].words == ("sft.optimizer.lr=0.1", "seed=1", "data=quickstart")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("sft.loss_on=choice(answer,all)", ["answer", "all"]),
        ("zero@actor.zero=glob(z3*)", ["z3", "z3_offload", "z3_offload_optimizer", "z3_offload_params"]),
        ("+data.note='a, b','c'", ["a, b", "c"]),
        ("data.split=[1,0,0],[2,0,0]", [[1, 0, 0], [2, 0, 0]]),
        ("trainer.threads=null,1", [None, 1]),
        ("trainer.align_overflow=true,false", [True, False]),
        ("seed=7", [7]),
    ],
)
def test_values_are_those_of_hydra_s_grammar(word: str, expected: list[Any]) -> None:
    cells = composer(word).grid()
    key = word.partition("=")[0].lstrip("+")
    assert [cell.overrides for cell in cells] == ([{key: value} for value in expected] if len(expected) > 1 else [{}])
    json.dumps([dict(cell.overrides) for cell in cells])


def test_the_command_line_stands_above_the_config_of_a_sweep(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text(
        "defaults: [sft, _self_]\nhydra:\n  sweeper:\n    params:\n      seed: 0,1\n      sft.optimizer.lr: 1e-3,1e-4\n"
    )
    named = ("--config-dir", str(tmp_path), "-cn", "two")
    assert len(composer(*named).grid()) == 4
    cells = composer(*named, "seed=5").grid()
    assert [cell.overrides for cell in cells] == [{"sft.optimizer.lr": 1e-3}, {"sft.optimizer.lr": 1e-4}]
    config, error = composer(*named, "seed=5").config(cells[1].words, tmp_path / "1")
    assert error is None
    assert (config["seed"], config["sft"]["optimizer"]["lr"], config["run_dir"]) == (5, 1e-4, str(tmp_path / "1"))
    assert "sweep" not in config and "hydra" not in config


def test_a_value_as_yaml_has_it() -> None:
    parsed = composer("+x={a: ['b c', 1e-3], d: null}").overrides[0].value()
    assert plain(parsed) == {"a": ["b c", 1e-3], "d": None}


# --- refusals of the whole -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("-m", "sft.batch_sze=1,2"), ("sft.batch_sze", "'sft.batch_size'")),
        (("-m", "data=quickstrt,pairs"), ("data=quickstrt", "did you mean 'quickstart'")),
        (("-m", "seed=1,"), ("cannot read",)),
        (("-m", "seed=1,2", "--what"), ("--what: a sweep takes -m, -cn NAME and -cd DIR",)),
        (("-m", "seed=1,2", "-cn"), ("-cn needs a value",)),
        (("-m", "seed=1,2", "hydra/launcher=joblib"), ("hydra/launcher=joblib: sweeps are run by this project",)),
        (("-m", "seed=1,2", "hydra.sweeper.params.x=1"), ("sweeps are run by this project",)),
        (("-m", "seed=1,2", "-cd", "nowhere", "-cn", "x"), ("--config-dir nowhere: there is no such folder",)),
        (("-m", "-cn", "sfft"), ("-cn sfft: no such config (did you mean 'sft'?)",)),
        (("-m", "seed=1,2", "sweep.jbs=2"), ("sweep.jbs", "'jobs'")),
        (("-m", "seed=1,2", "sweep.jobs=0"), ("sweep.jobs must be at least 1",)),
        (("-m", "seed=1,2", "sweep=slrm"), ("sweep=slrm", "did you mean 'slurm'")),
        (("-m", "seed=1,1"), ("cells 0 and 1 are the same (seed=1)",)),
        (("-m", "seed=interval(1,2)"), ("seed=interval(1,2): an interval is for a search",)),
        (("-m", "sft.optimizer.lr=glob(z*)"), ("glob",)),
        (("-m", "seed=1,2", "sweep.jobs=1,2"), ("sweep.jobs=1,2: the sweep section says", "is not swept itself: give one value", "sweep.gpus=[0,1]")),
        (("-m", "seed=1,2", "sweep=local,slurm"), ("sweep=local,slurm: the sweep section says",)),
        (("-m", "seed=1,2", "~sweep.jobs"), ("~sweep.jobs: every sweep has this: leave the word out",)),
        (("-m", "seed=1,2", "run_dir="), ("run_dir= names no directory",)),
        (("-m", "sweep.resume=true"), ("sweep.resume=true needs run_dir=DIR",)),
        (("-m", "sweep.resume=true", "run_dir=nowhere"), ("holds no sweep (no sweep.yaml)",)),
        (("-m", "seed=1,2", "sweep.gpus=[0]"), ("sweep.gpus=[0], but trainer.accelerator=cpu",)),
        (("-m", "seed=1,2", "sweep=optuna"), ("sweep", "metric")),
        (("-m", "seed=1,2", *LOCAL, "sweep.gpus=[0]"), ("sweep.gpus and sweep.jobs_per_gpu are for GPUs of this machine",)),
        (("-m", "seed=1,2", *LOCAL, "sweep.partition=long"), ("sweep.executor=local has no partition",)),
        (("-m", "sweep=optuna", "sweep.metric=x"), ("sweep=optuna has nothing to search",)),
        (("-m", "seed=1,2", "sweep=optuna", "sweep.metric=x"), ("seed is no dimension of a search", "sweep.seeds=[0,1]")),
        (("seed=1", "sweep.jobs=2"), ("sweep.jobs=2 says how a sweep is run, and this is none: add -m",)),
        (("seed=1", "sweep=slurm"), ("sweep=slurm says how a sweep is run",)),
    ],
)  # fmt: skip
def test_a_sweep_is_refused_at_once(
    words: tuple[str, ...], parts: tuple[str, ...], refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = refused("sft", *words)
    assert all(part in line for part in parts), line
    assert list(tmp_path.iterdir()) == [], "it left something behind"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("defaults: [ppo, _self_]", "is no config of rlhf sft: its verb is ppo"),
        ("defaults: [sft, _self_, {override /hydra/launcher: submitit_slurm}]", "hydra/launcher"),
    ],
)
def test_a_config_of_a_sweep_that_does_not_go(text: str, message: str, refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    assert message in refused("sft", "-m", "-cd", str(tmp_path), "-cn", "mine", "seed=1,2")


def test_a_config_of_a_sweep_is_not_run_as_one_job(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [sft, _self_]\nhydra:\n  sweeper:\n    params:\n      seed: 0,1\n")
    assert "mine is a sweep, as it names values to go through: add -m" in refused(
        "sft", "-cd", str(tmp_path), "-cn", "mine", f"run_dir={tmp_path}/x"
    )


def test_a_directory_that_is_taken(refused: Callable[..., str], tmp_path: Path) -> None:
    for name, message in (("sweep.yaml", "already holds a sweep"), ("config.yaml", "already holds a run")):
        (tmp_path / name).write_text("")
        assert message in refused("sft", "-m", "seed=1,2", f"run_dir={tmp_path}")
        (tmp_path / name).unlink()


# --- the page --------------------------------------------------------------------------------------------------------------------

COMMANDS = [
    line.removeprefix("$ rlhf ") for line in (HERE.parents[1] / "docs" / "sweeps.md").read_text().splitlines() if line.startswith("$ rlhf ") and " -m" in line
]  # fmt: skip


def test_there_are_commands_on_the_page() -> None:
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("text", [text for text in COMMANDS if "sweep.resume" not in text])
def test_a_command_of_the_page_composes(text: str) -> None:
    """Every section, and of a grid the first and the last cell, pass the rules."""
    verb, *words = shlex.split(text)
    sweep = composer(*words, verb=verb)
    section = build(sweep.settings(read_line(verb, words).sweep), "sweep")
    if isinstance(section, SearchSweepConfig):
        assert sweep.space()
        return
    cells = sweep.grid()
    assert len(cells) > 1
    for cell in (cells[0], cells[-1]):
        config, error = sweep.config(cell.words, Path("runs/x/0"))
        assert error is None
        if config["trainer"]["num_nodes"] > 1:
            config["launcher"]["name"] = "external"
        check(build(config))


# --- verbs that print ------------------------------------------------------------------------------------------------------------


def test_plans_are_printed_one_after_the_other(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "ppo", "-m", "ppo.batch_size=64,63", "hardware=a100-40g", "trainer=gpu", "plan.json=true"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["step"] == "ppo"
    assert err.count("rlhf: error: ppo.minibatch_size must divide batch_size") == 1
    assert main(["plan", "-m", "seed=0,1", "sweep.jobs=2"]) == 2
    assert "rlhf plan runs no jobs" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_word_is_sorted_by_its_key() -> None:
    line = read_line(
        "ppo", ["-m", "run_dir=x", "sweep.jobs=2", "+a.b=1", "seed=1,2", "--config-name=kl", "sweep.jobs=3", "sweep.resume=true"]
    )
    assert (line.run_dir, line.config_name, line.sweep, line.task) == (
        "x",
        "kl",
        ("sweep.jobs=3", "sweep.resume=true"),
        ("+a.b=1", "seed=1,2"),
    )
    assert line.words == ["+a.b=1", "seed=1,2", "sweep.jobs=3"]
    with pytest.raises(UserError):
        read_line("ppo", ["-m", "hydra.sweep.dir=x"])


@pytest.mark.parametrize(
    ("value", "directory"),
    [("größe/lr=0.1 (1)", "größe/lr=0.1 (1)"), ('"a b/lr=0.1"', "a b/lr=0.1"), ("'it\\'s'", "it's"), ("'a' b 'c'", "'a' b 'c'")],
)
def test_a_directory_may_have_any_name_and_quotes_are_none_of_it(value: str, directory: str) -> None:
    assert read_line("ppo", ["-m", f"run_dir={value}"]).run_dir == directory
