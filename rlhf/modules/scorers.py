"""Python functions that score answers: a task's true score in evaluation, a verifiable reward in PPO.

Knows texts; knows no network. B answers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any, cast

import torch
from torch import Tensor

from rlhf.config import UserError, locate
from rlhf.types import Rollout

Scorer = Callable[[list[str], list[str], list[bool]], list[float]]
"""Prompts, answers, whether each ended -> scores."""

SHOWN = 80
"""Characters of a prompt that a message quotes."""


def load_scorer(key: str, path: str, kwargs: dict[str, Any]) -> Scorer:
    """The function at an import path, or an object of the class there, built with `kwargs`.

    Args:
        key: the configuration key that holds the path, for messages; `<key>_kwargs` holds the keywords.

    Raises:
        UserError: it cannot be imported, built or called.
    """
    scorer = require_scorer(key, path, kwargs)
    if inspect.isclass(scorer):
        try:
            built = scorer(**kwargs)
        except TypeError as error:
            raise UserError(f"{key}_kwargs do not fit {path}: {error}") from error
        if not callable(built):
            raise UserError(f"{key}={path} is a class whose objects cannot be called: give it __call__(prompts, answers, ended) -> scores")
        return cast(Scorer, built)
    return cast(Scorer, scorer)


def require_scorer(key: str, path: str, kwargs: dict[str, Any], *, files: bool = True) -> Any:
    """What `load_scorer` loads, before the object of a class is built, which may read a model.

    Args:
        files: a class with a static method `check(**kwargs)` is asked whether what it would read is there; it raises a ValueError
            that begins with the keyword.

    Raises:
        UserError: it cannot be imported, takes other keywords, or is neither a class nor a function; its `check` refuses.
    """
    try:
        scorer: Any = locate(path)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    if inspect.isclass(scorer):
        try:
            inspect.signature(scorer).bind(**kwargs)
        except TypeError as error:
            raise UserError(f"{key}_kwargs do not fit {path}: {error}") from error
        except ValueError:
            pass  # a class of C that does not say what it takes
        if files and hasattr(scorer, "check"):
            try:
                scorer.check(**kwargs)
            except ValueError as error:
                raise UserError(f"{key}_kwargs.{error}") from error
        return scorer
    if kwargs:
        raise UserError(f"{key}_kwargs are for a class, but {path} is a function")
    if not callable(scorer):
        raise UserError(f"{key}={path} is a {type(scorer).__name__}, not a function f(prompts, answers, ended) -> scores")
    return scorer


class RewardFunction:
    """Calls a scorer on a rollout and refuses what cannot be a reward, naming the function and the prompt."""

    def __init__(self, path: str, scorer: Scorer, decode: Callable[[Tensor], list[str]]) -> None:
        """
        Args:
            path: of the scorer, for messages.
            decode: (B, A) token ids -> B texts.
        """
        self.path, self.scorer, self.decode = path, scorer, decode

    def __call__(self, texts: list[str], rollout: Rollout) -> Tensor:
        """Scores of a rollout's answers to these prompts. (B,) fp32

        Raises:
            UserError: the scorer raises, or returns anything but one finite number for each answer.
        """
        answers = self.decode(rollout.ids[:, rollout.prompt_length :])
        prompts, ended = texts * (len(answers) // len(texts)), rollout.ended.tolist()  # sample-major, as the rollout
        try:
            returned: Any = self.scorer(prompts, answers, ended)
            scores = list(returned) if isinstance(returned, Iterable) and not isinstance(returned, str | bytes | Mapping | Set) else None
        except Exception as error:
            where = self._culprit(prompts, answers, ended)
            raise UserError(f"ppo.reward_function={self.path} raised {type(error).__name__}: {error}, for {where}") from error
        if scores is None:
            raise UserError(
                f"ppo.reward_function={self.path} returned a {type(returned).__name__} for {len(answers)} answers, the first to the prompt "
                f"{shown(prompts[0])}: it must return a list with one number for each"
            )
        if len(scores) != len(answers):
            raise UserError(
                f"ppo.reward_function={self.path} returned {len(scores)} scores for {len(answers)} answers, the first to the prompt "
                f"{shown(prompts[0])}: it must return one number for each"
            )
        for prompt, answer, score in zip(prompts, answers, scores, strict=True):
            if not is_finite_number(score):
                raise UserError(
                    f"ppo.reward_function={self.path} returned {score!r} for the prompt {shown(prompt)} and the answer {shown(answer)}: it "
                    "must be a finite number"
                )
        return torch.tensor([float(score) for score in scores], device=rollout.ids.device)

    def _culprit(self, prompts: list[str], answers: list[str], ended: list[bool]) -> str:
        """The first prompt that fails alone, or the first of all."""
        for row in zip(prompts, answers, ended, strict=True):
            try:
                self.scorer(*([part] for part in row))  # type: ignore[arg-type]
            except Exception:
                return f"the prompt {shown(row[0])} and the answer {shown(row[1])}"
        return f"{len(prompts)} prompts together, the first of them {shown(prompts[0])}"


def is_finite_number(value: Any) -> bool:
    """Whether it stands for a number that is finite in fp32, too; a text of digits does not."""
    if isinstance(value, str | bytes):
        return False
    try:
        return abs(float(value)) <= torch.finfo(torch.float32).max
    except (TypeError, ValueError, OverflowError):
        return False


def shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN else text[: SHOWN - 3] + "...")
