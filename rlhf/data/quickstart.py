"""The quickstart's made-up task: a request for N items of a kind, noisy demonstrations, pairs of answers, and the true score.

Knows no tokenizer, no chat format and no training. Everything is drawn from SEED, so the task is the same everywhere.

A request such as `please name 4 fruits for me` is answered by `apple plum fig kiwi`. Held-out requests are
worded, counted and aimed at a kind in a way that no training row is, although each part is trained on. Both answers of a pair have the
faults of the demonstrations, so the worse one is something a policy trained on them would say.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence

import numpy as np

from rlhf.data.split import generator

SEED = 20230802
DEMONSTRATIONS = {"train": 2400, "eval": 240}
PAIRS = {"train": 20000, "eval": 800}
"""Rows a split. A pair's row serves either the reward model (as a pair) or PPO (as a prompt)."""

RIGHT = 0.45
"""Chance that the writer makes no fault."""
SECOND_FAULT = 0.3
"""Chance that a faulty answer has one more fault."""
FAULTS = {"too few": 0.3, "too many": 0.3, "repeated": 0.1, "wrong kind": 0.3}
MOST_EXTRA = 2
"""Items too many that one fault adds at most."""

MARGIN = 0.25
"""Least difference in score between the two answers of a pair: what a careful judge would see."""

PARTIAL_CREDIT = 0.5
"""Best score of an answer that is not exactly right."""
CUT_OFF = 0.5
"""Factor on the score of an answer that did not end by itself."""

COUNTS = range(1, 5)
KINDS: dict[str, tuple[str, ...]] = {
    kind: tuple(items.split())
    for kind, items in {
        "fruits": "apple plum fig kiwi pear mango grape lemon cherry peach melon banana",
        "animals": "dog cat horse cow sheep goat lion tiger bear wolf rabbit mouse",
        "colors": "red blue green yellow white black brown pink purple gray beige violet",
        "tools": "hammer saw drill wrench chisel file axe shovel rake pliers clamp ladder",
        "clothes": "shirt coat hat scarf glove sock shoe belt dress skirt jacket sweater",
        "metals": "iron copper silver gold tin zinc lead nickel cobalt chrome titanium platinum",
        "countries": "france spain italy greece norway sweden poland japan china india brazil kenya",
        "instruments": "piano violin cello flute harp drum trumpet guitar oboe organ banjo tuba",
    }.items()
}
TEMPLATES = tuple(
    " ".join(part for part in parts if part)
    for parts in itertools.product(
        ("", "please", "hello ,", "now"),
        ("name", "list", "give me", "tell me", "write"),
        ("{n} {kind}",),
        ("", ".", "for me", "if you can"),
    )
)
HELD_OUT = 0.1
"""Share of the requests (template, count and kind together) that no training row makes."""

_REQUEST = re.compile(rf"\b([{COUNTS[0]}-{COUNTS[-1]}]) ({'|'.join(KINDS)})\b")

Answer = list[str]


@functools.cache
def demonstrations(split: str) -> list[dict[str, str]]:
    """Rows `prompt`, `chosen` for SFT: about half of the answers are right."""
    rng = generator("quickstart demonstrations", SEED, split)
    rows = []
    for _ in range(DEMONSTRATIONS[split]):
        prompt, n, kind = _request(rng, split)
        rows.append({"prompt": prompt, "chosen": _text(_write(rng, n, kind))})
    return rows


@functools.cache
def generate(split: str) -> list[dict[str, str]]:
    """Rows `prompt`, `chosen`, `rejected`: an answer of the noisy writer and the same with one more fault, the better one chosen."""
    rng = generator("quickstart pairs", SEED, split)
    rows: list[dict[str, str]] = []
    while len(rows) < PAIRS[split]:
        prompt, n, kind = _request(rng, split)
        answer = _write(rng, n, kind)
        one, other = _text(answer), _text(_spoil(rng, answer, kind))
        score, other_score = gold([prompt] * 2, [one, other], [True] * 2)
        if abs(score - other_score) >= MARGIN:
            chosen, rejected = (one, other) if score > other_score else (other, one)
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def gold(prompts: Sequence[str], answers: Sequence[str], ended: Sequence[bool]) -> list[float]:
    """The true score of each answer, in [0, 1].

    1 for exactly N different items of the kind, parted by spaces, if the answer ended by itself. Otherwise PARTIAL_CREDIT times the
    share of right items: different items of the kind (N at most), over the larger of N and the number of items written. An answer that
    was cut off scores CUT_OFF times that of a whole one.

    Args:
        prompts: with or without the marks of a chat format; the last request in it counts.
        ended: whether the answer closed with an end-of-turn token.

    Raises:
        ValueError: a prompt holds no request of this task.
    """
    return [_gold(prompt, answer, end) for prompt, answer, end in zip(prompts, answers, ended, strict=True)]


def _gold(prompt: str, answer: str, ended: bool) -> float:
    requests = _REQUEST.findall(prompt)
    if not requests:
        raise ValueError(f"the quickstart's score needs a request for items of a kind it knows, got the prompt {prompt!r}")
    n, kind = int(requests[-1][0]), requests[-1][1]
    written = answer.split()
    right = set(written) & set(KINDS[kind])
    exact = len(written) == n == len(right)
    share = min(len(right), n) / max(n, len(written))
    return (1.0 if exact else PARTIAL_CREDIT * share) * (1.0 if ended else CUT_OFF)


@functools.cache
def requests(split: str) -> list[tuple[str, int, str]]:
    """Every request of a split as text, count and kind; the two splits have none in common."""
    every = [(template.format(n=n, kind=kind), n, kind) for template in TEMPLATES for n in COUNTS for kind in KINDS]
    order = generator("quickstart requests", SEED).permutation(len(every))
    held_out = int(HELD_OUT * len(every))
    return [every[i] for i in (order[:held_out] if split == "eval" else order[held_out:])]


def _request(rng: np.random.Generator, split: str) -> tuple[str, int, str]:
    """A request of this split with its count and kind."""
    choices = requests(split)
    return choices[rng.integers(len(choices))]


def _write(rng: np.random.Generator, n: int, kind: str) -> Answer:
    """An answer as the noisy writer gives it: right, or with one or two faults."""
    items = [str(item) for item in rng.choice(KINDS[kind], n, replace=False)]
    if rng.random() < RIGHT:
        return items
    for _ in range(2 if rng.random() < SECOND_FAULT else 1):
        items = _spoil(rng, items, kind)
    return items


def _spoil(rng: np.random.Generator, items: Answer, kind: str) -> Answer:
    """The answer with one more fault; a single item can neither lose nor repeat one, so that it grows."""
    fault = str(rng.choice(list(FAULTS), p=list(FAULTS.values())))
    place = int(rng.integers(len(items)))
    if fault == "too few" and len(items) > 1:
        return items[: int(rng.integers(1, len(items)))]
    if fault == "wrong kind":
        other = str(rng.choice([name for name in KINDS if name != kind]))  # the list drifts to another kind and stays there
        return items[:place] + [str(item) for item in rng.choice(KINDS[other], min(len(items) - place, len(KINDS[other])), replace=False)]
    if fault == "repeated" and len(items) > 1:
        place = max(1, place)  # from here on the list is stuck on one item
        return items[:place] + [items[place - 1]] * (len(items) - place)
    fresh = [item for item in KINDS[kind] if item not in items]
    extra = [str(item) for item in rng.choice(fresh, min(len(fresh), int(rng.integers(1, MOST_EXTRA + 1))), replace=False)]
    return items + extra


def _text(answer: Answer) -> str:
    return " ".join(answer)
