"""Reward functions: what reaches them, and what they may not return."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from on_ranks import answered, learner
from torch import Tensor

from rlhf.config import UserError
from rlhf.modules.scorers import RewardFunction, load_scorer
from rlhf.types import Rollout

TEXTS = ["first prompt", "second prompt"]


def rollout() -> Rollout:
    return answered().rows(torch.tensor([0, 1, 2, 3]))


def decode(ids: Tensor) -> list[str]:
    return [" ".join(map(str, row)) for row in ids.tolist()]


def reward(scorer: Callable[..., Any]) -> RewardFunction:
    return RewardFunction("my.reward", scorer, decode)


def test_it_sees_each_prompt_beside_its_answers() -> None:
    seen: list[Any] = []

    def scorer(prompts: list[str], answers: list[str], ended: list[bool]) -> list[float]:
        seen.extend(zip(prompts, answers, ended, strict=True))
        return [float(i) for i in range(len(prompts))]

    answers = rollout()
    scores = reward(scorer)(TEXTS, answers)
    assert scores.tolist() == [0, 1, 2, 3] and scores.dtype == torch.float32
    assert seen == list(zip(TEXTS * 2, decode(answers.ids[:, answers.prompt_length :]), answers.ended.tolist(), strict=True))


def fails_on_the_second(prompts: list[str], answers: list[str], ended: list[bool]) -> list[float]:
    if "second prompt" in prompts:
        raise ZeroDivisionError("nothing to divide")
    return [0.0] * len(prompts)


BAD: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "raises": (fails_on_the_second, ("raised ZeroDivisionError: nothing to divide", "'second prompt'")),
    "too few": (lambda prompts, answers, ended: [1.0], ("returned 1 scores for 4 answers", "'first prompt'")),
    "a number": (lambda prompts, answers, ended: 1.0, ("returned a float for 4 answers", "'first prompt'", "must return a list")),
    "nothing": (lambda prompts, answers, ended: None, ("returned a NoneType for 4 answers",)),
    "a text": (lambda prompts, answers, ended: "1234", ("returned a str for 4 answers",)),
    "a score by answer": (lambda prompts, answers, ended: {i: 0.0 for i in range(4)}, ("returned a dict for 4 answers",)),
    "texts of digits": (lambda prompts, answers, ended: ["1"] * 4, ("returned '1' for the prompt 'first prompt'",)),
    "infinite in fp32": (lambda prompts, answers, ended: [0.0, 1e39, 0.0, 0.0], ("returned 1e+39", "'second prompt'")),
    "a table": (lambda prompts, answers, ended: [[1.0, 2.0]] * 4, ("returned [1.0, 2.0] for the prompt 'first prompt'", "finite number")),
    "not a number": (lambda prompts, answers, ended: [1.0, float("nan"), 0.0, 0.0], ("returned nan", "'second prompt'")),
    "none": (lambda prompts, answers, ended: [0.0, None, 0.0, 0.0], ("returned None", "'second prompt'")),
}


@pytest.mark.parametrize(("scorer", "words"), BAD.values(), ids=BAD)
def test_what_cannot_be_a_reward_is_refused(scorer: Callable[..., Any], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as refusal:
        reward(scorer)(TEXTS, rollout())
    assert all(word in str(refusal.value) for word in ("ppo.reward_function=my.reward", *words)), refusal.value


@pytest.mark.parametrize("returned", [(0.0, 1.0, 2.0, 3.0), torch.arange(4.0), range(4)], ids=["tuple", "tensor", "range"])
def test_other_rows_of_numbers_are_taken(returned: Any) -> None:
    assert reward(lambda *_: returned)(TEXTS, rollout()).tolist() == [0, 1, 2, 3]


def test_sources_of_the_reward() -> None:
    """function: the function's score alone. both: the model's, and so many times the function's."""
    answers, texts = answered(), [f"prompt {i}" for i in range(8)]
    function = RewardFunction("f", lambda prompts, *_: [float(p[-1]) for p in prompts], decode)

    def shaped(**changes: Any) -> Tensor:
        (module,) = learner(reward_clip=None, **changes)
        module.function = None if changes.get("reward_source", "model") == "model" else function
        if changes.get("reward_source") == "function":
            del module.reward
        seen: list[Tensor] = []
        inner = module._shape_scores
        module._shape_scores = lambda scores, rows: seen.append(inner(scores, rows)) or seen[-1]  # type: ignore[method-assign, func-returns-value]
        module.score(answers, texts)
        return seen[0]

    own = torch.arange(8.0)
    by_path = {"reward_function": "f"}
    assert torch.equal(shaped(reward_source="function", **by_path), own)
    both = shaped(reward_source="both", reward_function_coef=0.5, **by_path)
    torch.testing.assert_close(both, shaped() + 0.5 * own)


class Threshold:
    def __init__(self, at: float) -> None:
        self.at = at

    def __call__(self, prompts: list[str], answers: list[str], ended: list[bool]) -> list[float]:
        return [float(len(answer) > self.at) for answer in answers]


def test_a_class_is_built_with_its_keywords() -> None:
    scorer = load_scorer("ppo.reward_function", f"{__name__}.Threshold", {"at": 3})
    assert scorer([""], ["1234"], [True]) == [1.0]
    with pytest.raises(UserError, match=r"ppo\.reward_function_kwargs do not fit"):
        load_scorer("ppo.reward_function", f"{__name__}.Threshold", {"above": 3})
    with pytest.raises(UserError, match=r"ppo\.reward_function: cannot import"):
        load_scorer("ppo.reward_function", "rlhf.nowhere.f", {})
    with pytest.raises(UserError, match=r"ppo\.reward_function=builtins\.object is a class whose objects cannot be called"):
        load_scorer("ppo.reward_function", "builtins.object", {})
    with pytest.raises(UserError, match=r"cannot import 'score': an import path is module\.name"):
        load_scorer("ppo.reward_function", "score", {})
    with pytest.raises(UserError, match="is a list, not a function"):
        load_scorer("ppo.reward_function", f"{__name__}.TEXTS", {})


def test_a_module_that_raises_on_import_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_reward.py").write_text("raise RuntimeError('no licence')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"cannot import 'broken_reward\.f': broken_reward raised RuntimeError: no licence"):
        load_scorer("ppo.reward_function", "broken_reward.f", {})
