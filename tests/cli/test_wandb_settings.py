"""What a run is called and where it belongs, from the directories around it; runs that are to be online and cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.cli.sweep.wandb import artifact_name, log_report
from rlhf.cli.wandb_settings import changes, facts, place
from rlhf.config import UserError


def config(folder: Path, verb: str, **more: Any) -> dict[str, Any]:
    """The config of a run, written as the run does."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {"verb": verb, "run_dir": str(folder), **more}
    (folder / "config.yaml").write_text(yaml.safe_dump(made))
    return made


def sweep(folder: Path, *words: str, config_name: str | None = None, **cells: dict[str, Any]) -> Path:
    folder.mkdir()
    listed = [{"folder": name.removeprefix("cell"), "overrides": overrides} for name, overrides in cells.items()]
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"words": list(words), "config_name": config_name, "cells": listed}))
    return folder


def test_a_run_on_its_own(tmp_path: Path) -> None:
    alone = config(tmp_path / "mine", "ppo")
    assert place(alone) == {"verb": "ppo", "group": None, "name": "ppo mine", "tags": ()}
    assert facts(alone) == {}


def test_a_pipeline_and_its_steps_are_a_group(tmp_path: Path) -> None:
    whole = config(tmp_path / "mine", "pipeline", experiment="imdb_sentiment")
    step = config(tmp_path / "mine" / "sft", "sft")  # a step's config says nothing of it
    assert place(whole) == {"verb": "pipeline", "group": "mine", "name": "pipeline mine", "tags": ("imdb_sentiment",)}
    assert place(step) == {"verb": "sft", "group": "mine", "name": "sft mine", "tags": ("imdb_sentiment",)}
    assert facts(step) == {"pipeline": "mine"}


def test_a_cell_of_a_sweep(tmp_path: Path) -> None:
    words = ("experiment=dschat/ppo", "ppo.kl_coef=0.02,0.1")
    folder = sweep(tmp_path / "kl", *words, config_name="kl_grid", cell0={"ppo.kl_coef": 0.02}, cell1={"ppo.kl_coef": 0.1, "seed": 3})
    cell = config(folder / "1", "ppo")
    assert place(cell) == {"verb": "ppo", "group": "kl", "name": "ppo kl_coef=0.1 seed=3", "tags": ("dschat/ppo", "kl_grid")}
    assert facts(cell) == {"sweep": {"name": "kl", "cell": "1"}}
    late = config(folder / "7", "ppo")  # of a search whose file does not list it yet
    assert (place(late)["group"], place(late)["name"]) == ("kl", "ppo 7")


def test_a_sweep_over_experiments_tags_each_with_its_own(tmp_path: Path) -> None:
    folder = sweep(tmp_path / "two", "experiment=a,b", cell0={"experiment": "a"}, cell1={"experiment": "b"})
    assert place(config(folder / "1", "sft"))["tags"] == ("b",)
    assert place(config(folder / "2", "sft"))["tags"] == ()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({}, ""),
        ({"seed": 1}, "seed=1"),
        ({"ppo.actor_optimizer.lr": 1e-5, "seed": 1}, "lr=1e-05 seed=1"),
        ({"ppo.actor_optimizer.lr": 1, "ppo.critic_optimizer.lr": 2}, "ppo.actor_optimizer.lr=1 ppo.critic_optimizer.lr=2"),
    ],
)
def test_changes_are_short_where_they_may_be(overrides: dict[str, Any], says: str) -> None:
    assert changes(overrides) == says


@pytest.mark.parametrize("verb", ["sft", "pipeline"])
def test_online_without_a_key_is_refused_before_anything_is_read(
    verb: str, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    line = refused(verb, f"run_dir={tmp_path / 'run'}", "logger=wandb", "logger.wandb.offline=false")
    assert line.startswith("logger.wandb.offline=false, but there is no W&B key: set WANDB_API_KEY")
    assert not (tmp_path / "run" / "wandb").exists() and not (tmp_path / "run" / "sft").exists()


def test_a_report_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no report\.html"):
        log_report(tmp_path, {}, "kl")
    assert artifact_name("my sweep/1") == "report-my-sweep-1"
