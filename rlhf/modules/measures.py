"""From what was recorded of answers, pairs and texts to metrics: means and their intervals, win rates, accuracy, calibration, variety.

Knows numbers and policies by name; knows no tensor, no model and no file. Values of one prompt are not independent, so every interval
counts prompts (or texts, or prompts of pairs), never single answers or comparisons. An interval of fewer than two is left out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from rlhf.reporting.statistics import NORMAL, bootstrap, student

MOST_DRAWN = 2_000
"""Values from which on the mean is as good as normal: Student's interval, which needs no memory, takes the bootstrap's place."""
BINS = 10
"""Equal bins of the predicted probability, from 0.5 to 1."""
JUDGES = ("reward", "gold")
"""What can say which of two answers is better."""
MEANS = {"gold": "gold", "reward": "reward", "length": "length", "ended": "eos_rate"}
"""Number of an answer -> its metric, `METRIC/POLICY`."""
RATES = {"kl": "kl", "kl_k3": "kl_k3", "kl_base": "kl_base", "kl_base_k3": "kl_base_k3"}
"""The same for those that have an interval of their own. The first two are the second policy's alone and have no `/POLICY`."""
GRAMS = (1, 2, 3)
LARGEST_LOG = 700.0
"""Keeps a hopeless perplexity finite."""

Metrics = dict[str, float]
Record = TypeVar("Record")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer of one policy."""

    prompt: str
    sample: int
    """The n-th answer to the prompt, from 0 on."""
    text: str
    tokens: list[int]
    """End of turn included."""
    numbers: dict[str, float]
    """`length`, `ended`, and where somebody measures them `reward`, `gold`, `ref_nll`, `kl`, `kl_k3`, `kl_base`, `kl_base_k3`."""


@dataclass(frozen=True, kw_only=True)
class JudgedPrompt:
    """What the reward model says of the ranked answers to one prompt; a pair is one comparison."""

    source: str
    margins: list[float]
    """Score of the better answer less that of the worse one, for every comparison."""


@dataclass(frozen=True, kw_only=True)
class ReadText:
    """How surprised each policy is by one held-out text."""

    tokens: int
    nll: dict[str, float]
    """Policy -> negative log-likelihood of these tokens, nats."""


@dataclass(kw_only=True)
class Records:
    """All that an evaluation has seen, on one rank or on all of them."""

    answers: dict[str, list[Answer]] = field(default_factory=dict)
    """By policy; entry i of every policy answers the same prompt for the same time."""
    judged: list[JudgedPrompt] = field(default_factory=list)
    texts: list[ReadText] = field(default_factory=list)

    def add(self, other: Records) -> None:
        for name, answers in other.answers.items():
            self.answers.setdefault(name, []).extend(answers)
        self.judged += other.judged
        self.texts += other.texts


def interleaved(ranks: Sequence[Records]) -> Records:
    """Records of all ranks in the order that one rank would have them: rank r takes rows r, r + ranks, ... of every batch."""
    names = ranks[0].answers
    return Records(
        answers={name: _interleaved([records.answers[name] for records in ranks]) for name in names},
        judged=_interleaved([records.judged for records in ranks]),
        texts=_interleaved([records.texts for records in ranks]),
    )


def _interleaved(lists: Sequence[list[Record]]) -> list[Record]:
    return [record for row in zip(*lists, strict=True) for record in row]


# --- intervals -----------------------------------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of independent values: percentile bootstrap, or Student's where there are very many; nan for one value."""
    return bootstrap(values) if len(values) <= MOST_DRAWN else student(values)


def ratio_values(sums: Sequence[float], counts: Sequence[float]) -> list[float]:
    """Values whose mean is sum(sums) / sum(counts), and whose spread is that of this ratio: R + (s_i - R n_i) / mean(n).

    The linearised ratio estimator (Cochran 1977, "Sampling Techniques", chapter 6). Where all counts are equal it is s_i / n_i.
    """
    ratio, mean = sum(sums) / sum(counts), sum(counts) / len(counts)
    return [ratio + (s - ratio * n) / mean for s, n in zip(sums, counts, strict=True)]


def with_interval(name: str, values: Sequence[float]) -> Metrics:
    """The mean as `name`, its interval as `name_low` and `name_high` where there is one."""
    low, high = interval(values)
    ends = {} if math.isnan(low) else {f"{name}_low": low, f"{name}_high": high}
    return {name: float(np.mean(values)), **ends}


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of n independent trials (Wilson 1927, JASA 22, p. 209). It does not shrink to nothing at 0 and at 1.

    With z = 1.96: (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n).
    """
    z = NORMAL
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


# --- answers -------------------------------------------------------------------------------------------------------------------


def answer_metrics(answers: Mapping[str, Sequence[Answer]]) -> Metrics:
    """Of each policy alone: scores, lengths, variety, surprise under the reference, KL."""
    metrics: Metrics = {}
    for name, own in answers.items():
        known = own[0].numbers if own else {}
        metrics |= {f"{metric}/{name}": _mean(own, key) for key, metric in MEANS.items() if key in known}
        if "ref_nll" in known:
            tokens = max(1.0, sum(answer.numbers["length"] for answer in own))
            metrics[f"ref_perplexity/{name}"] = _exp(sum(answer.numbers["ref_nll"] for answer in own) / tokens)
        metrics |= {f"distinct_{n}/{name}": distinct(own, n) for n in GRAMS if own}
        for key, metric in RATES.items():
            if key in known:
                where = f"{metric}/{name}" if key.startswith("kl_base") else metric
                metrics |= with_interval(where, per_prompt(own, key))
    return metrics


def _mean(answers: Sequence[Answer], key: str) -> float:
    return sum(answer.numbers[key] for answer in answers) / len(answers)


def _exp(value: float) -> float:
    return math.exp(min(LARGEST_LOG, value))


def by_prompt(answers: Iterable[Answer]) -> dict[str, list[Answer]]:
    """The answers to each prompt. The same text drawn twice from the data is one prompt."""
    found: dict[str, list[Answer]] = {}
    for answer in answers:
        found.setdefault(answer.prompt, []).append(answer)
    return found


def per_prompt(answers: Sequence[Answer], key: str) -> list[float]:
    """One value a prompt; their mean is that of all answers."""
    groups = by_prompt(answers).values()
    return ratio_values([sum(answer.numbers[key] for answer in group) for group in groups], [len(group) for group in groups])


def distinct(answers: Sequence[Answer], n: int) -> float:
    """Different runs of n tokens over all runs of n tokens, over the first answer to each prompt (Li et al. 2016, "A Diversity-Promoting
    Objective Function for Neural Conversation Models"). One answer a prompt, as the share falls with the number of answers."""
    runs = [run for answer in answers if answer.sample == 0 for run in zip(*(answer.tokens[i:] for i in range(n)), strict=False)]
    return len(set(runs)) / max(1, len(runs))


def differences(before: Sequence[Answer], after: Sequence[Answer]) -> Metrics:
    """After less before in the measures of MEANS, prompt by prompt."""
    metrics: Metrics = {}
    for key, metric in MEANS.items():
        if before and key in before[0].numbers:
            pairs = zip(per_prompt(after, key), per_prompt(before, key), strict=True)
            metrics |= with_interval(f"difference/{metric}", [mine - base for mine, base in pairs])
    return metrics


def win_values(ours: Sequence[Answer], theirs: Sequence[Answer], judge: str) -> list[float]:
    """One value a prompt, whose mean is the share of comparisons that we win; a tie is half a win.

    Every answer of ours is compared with every answer of theirs to the same prompt. A prompt weighs as much as it has answers.
    """
    other, mine = by_prompt(theirs), by_prompt(ours)
    shares = [
        _win_share([a.numbers[judge] for a in answers], [b.numbers[judge] for b in other[prompt]]) for prompt, answers in mine.items()
    ]
    counts = [len(answers) for answers in mine.values()]
    return ratio_values([share * count for share, count in zip(shares, counts, strict=True)], counts)


def _win_share(ours: Sequence[float], theirs: Sequence[float]) -> float:
    points = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in itertools.product(ours, theirs)]
    return sum(points) / len(points)


def win_rates(before: Sequence[Answer], after: Sequence[Answer], judges: Iterable[str]) -> Metrics:
    """`win_rate/JUDGE` of the policy after over the one before."""
    metrics: Metrics = {}
    for judge in judges:
        if after and judge in after[0].numbers:
            metrics |= with_interval(f"win_rate/{judge}", win_values(after, before, judge))
    return metrics


# --- pairs ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Comparisons of which the reward model is about equally sure."""

    low: float
    high: float
    count: int
    predicted: float
    """Mean probability, by the model, that its choice is right."""
    right: float
    """Share where it is."""

    @property
    def name(self) -> str:
        """In percent: 50-55."""
        return f"{100 * self.low:.0f}-{100 * self.high:.0f}"


def pair_metrics(judged: Sequence[JudgedPrompt]) -> Metrics:
    """Accuracy over all and by source with Wilson's interval, margin, and how far the model's probabilities are from what happens."""
    if not judged:
        return {}
    margins = [margin for prompt in judged for margin in prompt.margins]
    table = calibration(margins)
    metrics = {**_accuracy("reward/accuracy", judged), "reward/margin": sum(margins) / len(margins)}
    for source in sorted({prompt.source for prompt in judged}):
        metrics |= _accuracy(f"reward/accuracy/{source}", [prompt for prompt in judged if prompt.source == source])
    metrics["reward/calibration_error"] = calibration_error(table)
    for row in table:
        metrics |= {f"calibration/{row.name}/{key}": float(getattr(row, key)) for key in ("count", "predicted", "right")}
    return metrics


def _accuracy(name: str, judged: Sequence[JudgedPrompt]) -> Metrics:
    """Share of comparisons. The interval counts prompts, as the comparisons of one prompt hang together: for pairs that is the same."""
    margins = [margin for prompt in judged for margin in prompt.margins]
    share = sum(margin > 0 for margin in margins) / len(margins)
    low, high = wilson(share, len(judged))
    return {name: share, f"{name}_low": low, f"{name}_high": high}


def calibration(margins: Sequence[float]) -> list[Bin]:
    """The reliability table of a reward model; bins without a comparison are left out.

    By Bradley-Terry the better answer wins with probability sigmoid(margin), so the model is sure of its own choice with
    p = sigmoid(abs(margin)), and is right where the margin is above 0. A margin of 0 is a toss: p is 0.5, and half of it is right.
    """
    sure = np.array([1 / (1 + math.exp(-min(abs(margin), LARGEST_LOG))) for margin in margins])
    right = np.array([0.5 * (1 + np.sign(margin)) for margin in margins])
    places = np.minimum((sure - 0.5) * 2 * BINS, BINS - 1).astype(int)
    edges = [0.5 + 0.5 * i / BINS for i in range(BINS + 1)]
    return [
        Bin(low=edges[i], high=edges[i + 1], count=int(there.sum()), predicted=float(sure[there].mean()), right=float(right[there].mean()))
        for i in range(BINS)
        if (there := places == i).any()
    ]


def calibration_error(table: Sequence[Bin]) -> float:
    """Mean of abs(right - predicted) over all comparisons, bin by bin (Guo et al. 2017, "On Calibration of Modern Neural Networks", eq. 3)."""
    return sum(row.count * abs(row.right - row.predicted) for row in table) / sum(row.count for row in table)


# --- texts ---------------------------------------------------------------------------------------------------------------------


def text_metrics(texts: Sequence[ReadText], names: Sequence[str]) -> Metrics:
    """Perplexity of each policy, exp of the mean over all tokens, and their difference."""
    tokens = [text.tokens for text in texts]
    if not sum(tokens):
        return {}
    metrics: Metrics = {"perplexity_tokens": float(sum(tokens))}
    values: dict[str, list[float]] = {}
    for name in names:
        logs = ratio_values([text.nll[name] for text in texts], tokens)
        mean = float(np.mean(logs))
        metrics[f"perplexity/{name}"] = _exp(mean)
        low, high = interval(logs)
        if not math.isnan(low):
            metrics |= {f"perplexity/{name}_low": _exp(low), f"perplexity/{name}_high": _exp(high)}
        values[name] = [_exp(mean) * (1 + log - mean) for log in logs]  # exp, linearised around the mean
    if len(names) == 2:
        pairs = zip(values[names[1]], values[names[0]], strict=True)
        metrics |= with_interval("difference/perplexity", [mine - base for mine, base in pairs])
    return metrics


def all_metrics(records: Records, *, names: Sequence[str], judges: Iterable[str]) -> Metrics:
    """Every metric of an evaluation.

    Args:
        names: of the policies that there are, the one before first.
        judges: by which win rates are counted, where they have scored the answers.
    """
    metrics = {**pair_metrics(records.judged), **answer_metrics(records.answers), **text_metrics(records.texts, names)}
    if len(names) == 2 and records.answers:
        before, after = (records.answers[name] for name in names)
        metrics |= {**differences(before, after), **win_rates(before, after, judges)}
    if records.answers:
        own = records.answers[names[-1]]
        metrics |= {"evaluated/prompts": float(len(by_prompt(own))), "evaluated/answers": float(len(own))}
    if records.judged:
        metrics["evaluated/pairs"] = float(sum(len(prompt.margins) for prompt in records.judged))
    if records.texts:
        metrics["evaluated/texts"] = float(len(records.texts))
    return metrics
