"""Two checkpoints answer one prompt, unnamed and in random order; a vote becomes a pair for the next reward model.

Knows pairs and votes; knows no network.
"""

from __future__ import annotations

import random
import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf.serving.judge import Judge
from rlhf.serving.votes import Votes

REMEMBERED = 1000
"""Pairs that wait for their vote; older ones are forgotten."""


@dataclass
class Pair:
    id: str
    prompt: str
    sides: dict[str, str]
    """a and b -> the model that answers there."""
    answers: dict[str, str] = field(default_factory=dict)
    """a and b -> what was said; empty until both are whole."""


class Comparisons:
    """The pairs that are open. Safe to use from several threads."""

    def __init__(self, models: tuple[str, str], votes: Votes, judge: Judge | None) -> None:
        self.models, self.votes, self.judge = models, votes, judge
        self.pairs: OrderedDict[str, Pair] = OrderedDict()
        self.lock = threading.Lock()

    def open(self, prompt: str) -> Pair:
        """A new pair; which model is a and which is b is drawn."""
        order = random.sample(self.models, 2)
        pair = Pair(secrets.token_urlsafe(12), prompt, {"a": order[0], "b": order[1]})
        with self.lock:
            self.pairs[pair.id] = pair
            while len(self.pairs) > REMEMBERED:
                self.pairs.popitem(last=False)
        return pair

    def answered(self, id: str, answers: dict[str, str]) -> None:
        """Both answers are whole, so that one may vote."""
        with self.lock:
            if id in self.pairs:
                self.pairs[id].answers = {side: text.strip() for side, text in answers.items()}

    def vote(self, id: str, choice: Literal["a", "b", "tie"]) -> dict[str, Any]:
        """Writes a vote and reveals who was who, the reward model's scores if there is one, and whether it made a pair to train on.

        Raises:
            KeyError: there is no such pair, it is not whole yet, or it has been voted on.
            OSError: the vote could not be written; the pair stays open.
        """
        with self.lock:
            pair = self.pairs[id]
            if not pair.answers:
                raise KeyError(id)
            del self.pairs[id]  # two votes at once must not both count
        a, b = pair.answers["a"], pair.answers["b"]
        is_pair = choice != "tie" and bool(a) and bool(b) and a != b
        try:
            rewards = {side: self._reward(pair.prompt, text) for side, text in pair.answers.items()}
            self.votes.add(_row(pair, choice, rewards), pair=is_pair)
        except Exception:
            with self.lock:
                self.pairs[id] = pair
            raise
        return {"models": pair.sides, "rewards": rewards, "pair": is_pair}

    def _reward(self, prompt: str, answer: str) -> float | None:
        if self.judge is None:
            return None
        return self.judge.score([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}])


def _row(pair: Pair, choice: str, rewards: dict[str, float | None]) -> dict[str, Any]:
    """Of a tie, chosen and rejected are a and b as they stood."""
    better, worse = ("b", "a") if choice == "b" else ("a", "b")
    return {
        "prompt": pair.prompt, "chosen": pair.answers[better], "rejected": pair.answers[worse], "chosen_model": pair.sides[better],
        "rejected_model": pair.sides[worse], "chosen_reward": rewards[better], "rejected_reward": rewards[worse], "choice": choice,
        "time": int(time.time()),
    }  # fmt: skip
