"""Ask and tell: a search learns, goes on as if it had never stopped, stops the hopeless, and counts failures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import UserError, build
from rlhf.sweeping.search import JOURNAL, Choice, Dimension, Number, Study, Words

SPACE: dict[str, Dimension] = {
    "lr": Number(1e-5, 1e-1, whole=False, log=True),
    "n": Number(2, 10, whole=True, step=2),
    "kind": Choice(("a", "'b c'")),
}


def settings(**changes: Any) -> Any:
    node = {
        "_target_": "rlhf.settings.SearchSweepConfig", "jobs": None, "gpus": "auto", "jobs_per_gpu": 1, "strict": False, "resume": False, "report": True,
        "metric": "gold/ppo", "direction": "maximize", "trials": 20, "seeds": [], "sampler": "tpe", "sampler_seed": 0, "pruner": "none",
        "prune_on": None, "prune_after": 2, "prune_trials": 1, "storage": None,
    }  # fmt: skip
    return build({**node, **changes}, "sweep")


def study(folder: Path, *, resume: bool = False, space: dict[str, Dimension] = SPACE, **changes: Any) -> Study:
    return Study(folder, settings(**changes), space, parallel=False, resume=resume)


def value(words: Words) -> float:
    """Best at lr=1e-3, n=6, kind=a."""
    return -abs(math.log10(float(words["lr"])) + 3) - abs(int(words["n"]) - 6) / 4 - (words["kind"] != "a")


def advance(one: Study, trials: int) -> list[Words]:
    asked = []
    for _ in range(trials):
        number, words = one.ask()
        one.tell(number, value(words))
        asked.append(words)
    return asked


def test_proposals_stay_in_the_space_and_improve(tmp_path: Path) -> None:
    asked = advance(one := study(tmp_path), 30)
    assert all(1e-5 <= float(words["lr"]) <= 1e-1 and int(words["n"]) in (2, 4, 6, 8, 10) for words in asked)
    assert {words["kind"] for words in asked} == {"a", "'b c'"}
    values = [value(words) for words in asked]
    assert sum(values[-10:]) / 10 > sum(values[:10]) / 10 + 0.3
    best = one.best()
    assert best is not None and best.value == max(values) and value(best.words) == best.value


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_search_that_goes_on_asks_what_it_would_have_asked(sampler: str, tmp_path: Path) -> None:
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = advance(study(tmp_path / "whole", sampler=sampler), 16)
    first = advance(study(tmp_path / "cut", sampler=sampler), 11)
    with (tmp_path / "cut" / JOURNAL).open("a") as f:
        f.write('{"op_code": 4, "wor')  # the command was killed in the middle of a line
    assert first + advance(study(tmp_path / "cut", sampler=sampler, resume=True), 5) == whole


def test_another_seed_searches_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert advance(study(tmp_path / "a"), 3) != advance(study(tmp_path / "b", sampler_seed=7), 3)


def test_trials_that_were_not_told_about_are_known(tmp_path: Path) -> None:
    one = study(tmp_path)
    number, words = one.ask()
    other, _ = one.ask()
    one.tell(other, 1.0)
    again = study(tmp_path, resume=True)
    assert again.unfinished() == [(number, words)]
    again.tell(number, 2.0)
    assert again.unfinished() == [] and again.begun == 2


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
def test_a_failed_trial_is_never_the_best(bad: float | None, tmp_path: Path) -> None:
    one = study(tmp_path, direction="minimize")
    assert one.best() is None
    one.tell(one.ask()[0], bad)
    assert one.best() is None
    one.tell(one.ask()[0], 5.0)
    best = one.best()
    assert best is not None and (best.trial, best.value) == (1, 5.0)


def test_the_hopeless_are_stopped(tmp_path: Path) -> None:
    one = study(tmp_path, pruner="median", prune_on="rollout/reward")
    good, _ = one.ask()
    assert one.watch(good, [(step, float(step)) for step in range(1, 7)]) is None, "the first one has nothing to be compared with"
    one.tell(good, 6.0)
    fair, _ = one.ask()
    assert one.watch(fair, [(1, 2.0), (2, 3.0), (3, 4.0)]) is None
    poor, _ = one.ask()
    assert one.watch(poor, [(1, 0.1)]) is None, "prune_after leaves it some steps"
    reason = one.watch(poor, [(1, 0.1), (2, 0.1), (3, 0.1)])
    assert reason == "rollout/reward=0.1 at step 3 is worse than the median of the finished trials"
    one.tell(poor, None, pruned=True)
    again = study(tmp_path, resume=True, pruner="median", prune_on="rollout/reward")
    assert again.watch(fair, [(1, 2.0), (2, 3.0), (3, 4.0), (4, 0.2)]) is None, "its best was 4.0, no worse than the other's at step 4"


@pytest.mark.parametrize(
    ("dimension", "message"),
    [
        (Number(0.0, 1.0, whole=False, log=True), "the search space is refused"),
        (Number(2.0, 1.0, whole=False), "the search space is refused"),
        (Number(1, 9, whole=True, log=True, step=2), "the search space is refused"),
    ],
)
def test_a_space_that_cannot_be_searched(dimension: Dimension, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        study(tmp_path, space={"x": dimension})


def test_a_database_holds_one_study_for_each_directory(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/studies.db"
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        assert study(tmp_path / name, storage=storage).ask()[0] == 0
    with pytest.raises(UserError, match=r"holds a study of .*/a already"):
        study(tmp_path / "a", storage=storage)
    assert study(tmp_path / "a", storage=storage, resume=True).begun == 1
    with pytest.raises(UserError, match=r"sweep\.storage=nosuch://x cannot be opened"):
        study(tmp_path / "a", storage="nosuch://x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": 0}, "sweep.trials must be at least 1"),
        ({"pruner": "median"}, "sweep.prune_on, a column of metrics.csv, goes with pruner=median"),
        ({"prune_on": "loss"}, "sweep.prune_on, a column of metrics.csv, goes with pruner=median"),
        ({"seeds": [1, 1]}, "sweep.seeds names a seed twice"),
        ({"gpus": []}, "sweep.gpus names no GPU"),
        ({"gpus": [0, 0]}, "sweep.gpus names a GPU twice"),
        ({"jobs": 0}, "sweep.jobs must be at least 1 or null"),
        ({"prune_after": -1}, "sweep.prune_after must be at least 0"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        settings(**changes)
    assert message in str(caught.value)
