"""What an evaluation's records come to, against arithmetic written out here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.modules.measures import (
    Answer,
    JudgedPrompt,
    ReadText,
    Records,
    all_metrics,
    answer_metrics,
    calibration,
    calibration_error,
    differences,
    distinct,
    interval,
    pair_metrics,
    per_prompt,
    ratio_values,
    text_metrics,
    wilson,
    win_rates,
    win_values,
)
from rlhf.reporting.statistics import bootstrap, student


def answers(scores: dict[str, Sequence[float]], judge: str = "reward", **more: float) -> list[Answer]:
    """One answer for each score of each prompt."""
    return [
        Answer(prompt=prompt, sample=i, text="", tokens=[], numbers={judge: score, "length": 1.0, "ended": 1.0, **more})
        for prompt, own in scores.items()
        for i, score in enumerate(own)
    ]


# --- win rates -------------------------------------------------------------------------------------------------------------------


def test_a_win_rate_by_hand() -> None:
    """Two answers of each policy to each of three prompts.

    p: 3 > 1, 3 > 2, 1 = 1, 1 < 2: 2.5 of 4 = 0.625. q: 5 beats 0 and 4 twice: 1. r: 0 = 0 in all four: 0.5.
    Mean: (0.625 + 1 + 0.5) / 3 = 2.125 / 3.
    """
    after = answers({"p": [3, 1], "q": [5, 5], "r": [0, 0]})
    before = answers({"p": [1, 2], "q": [0, 4], "r": [0, 0]})
    assert win_values(after, before, "reward") == pytest.approx([0.625, 1.0, 0.5])
    found = win_rates(before, after, ("reward", "gold"))
    low, high = bootstrap([0.625, 1.0, 0.5])
    assert found == pytest.approx({"win_rate/reward": 2.125 / 3, "win_rate/reward_low": low, "win_rate/reward_high": high})
    # 27 resamples of three prompts, each as likely. 1 of them, 3.7 %, has the smallest mean 0.5 and 1 the largest, 1: both ends pass 2.5 %.
    assert (found["win_rate/reward_low"], found["win_rate/reward_high"]) == (0.5, 1.0)


def test_two_prompts_are_resampled_and_not_their_answers() -> None:
    """p is won 4 times of 4 and q lost 4 times of 4: the resamples are pp, pq, qp, qq with means 1, 0.5, 0.5, 0, so the interval is all of
    [0, 1]. Eight answers taken for independent would give about [0.2, 0.8]."""
    after, before = answers({"p": [2, 2], "q": [0, 0]}), answers({"p": [1, 1], "q": [1, 1]})
    found = win_rates(before, after, ("reward",))
    assert found == {"win_rate/reward": 0.5, "win_rate/reward_low": 0.0, "win_rate/reward_high": 1.0}


def test_ties_count_half_and_the_two_sides_add_up_to_one() -> None:
    same = answers({"p": [1, 1], "q": [2, 0]})
    assert win_rates(same, same, ("reward",))["win_rate/reward"] == 0.5
    ours, theirs = answers({"p": [1, 2, 2], "q": [0, 0, 1]}), answers({"p": [2, 2, 0], "q": [0, 1, 3]})
    one, other = (win_rates(a, b, ("reward",))["win_rate/reward"] for a, b in ((theirs, ours), (ours, theirs)))
    assert one + other == pytest.approx(1)


def test_a_prompt_drawn_twice_from_the_data_is_one_prompt_of_twice_the_weight() -> None:
    after = [*answers({"p": [1]}), *answers({"p": [1], "q": [0]})]
    before = [*answers({"p": [0]}), *answers({"p": [0], "q": [1]})]
    values = win_values(after, before, "reward")
    assert len(values) == 2 and np.mean(values) == pytest.approx(2 / 3)


def test_one_prompt_has_no_interval() -> None:
    assert win_rates(answers({"p": [0, 1]}), answers({"p": [2, 2]}), ("reward",)) == {"win_rate/reward": 1.0}


SCORES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=30)


@given(SCORES)
def test_the_interval_contains_the_win_rate(scores: list[tuple[int, int]]) -> None:
    after, before = (answers({str(i): [pair[side]] for i, pair in enumerate(scores)}) for side in (0, 1))
    found = win_rates(before, after, ("reward",))
    assert 0 <= found["win_rate/reward_low"] <= found["win_rate/reward"] + 1e-12
    assert found["win_rate/reward"] <= found["win_rate/reward_high"] + 1e-12 and found["win_rate/reward_high"] <= 1


@given(SCORES.filter(lambda scores: len({(a > b) - (a < b) for a, b in scores}) > 1))
def test_more_prompts_make_it_narrower_and_more_answers_of_the_same_kind_do_not(scores: list[tuple[int, int]]) -> None:
    def width(prompts: int, samples: int) -> float:
        after, before = (
            answers({f"{copy} {i}": [pair[side]] * samples for copy in range(prompts) for i, pair in enumerate(scores)}) for side in (0, 1)
        )
        found = win_rates(before, after, ("reward",))
        return found["win_rate/reward_high"] - found["win_rate/reward_low"]

    assert width(9, 1) < width(1, 1)
    assert width(1, 3) == pytest.approx(width(1, 1))


# --- intervals -------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(1, 9)), min_size=1, max_size=20))
def test_values_of_a_ratio_have_the_ratio_as_their_mean(rows: list[tuple[float, int]]) -> None:
    sums, counts = zip(*rows, strict=True)
    assert np.mean(ratio_values(sums, counts)) == pytest.approx(sum(sums) / sum(counts), abs=1e-9)
    assert ratio_values(sums, [3] * len(sums)) == pytest.approx([s / 3 for s in sums], abs=1e-9)


def test_the_spread_of_a_ratio_is_that_of_resampled_ratios() -> None:
    rng = np.random.default_rng(1)
    counts = rng.integers(1, 30, 300)
    sums = counts * 2.0 + rng.normal(0, 3, 300)
    draws = rng.integers(0, 300, (4000, 300))
    ratios = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    low, high = interval(ratio_values(sums.tolist(), counts.tolist()))
    assert (low, high) == pytest.approx(tuple(np.percentile(ratios, [2.5, 97.5])), abs=0.005)


def test_very_many_values_take_students_interval() -> None:
    values = np.random.default_rng(0).normal(size=2001).tolist()
    assert interval(values) == student(values) and interval(values[:50]) == bootstrap(values[:50])


def test_wilsons_interval() -> None:
    """8 of 10: centre (0.8 + 1.96^2 / 20) / (1 + 1.96^2 / 10) = 0.99208 / 1.38416, half 1.96 sqrt(0.016 + 0.009604) / 1.38416."""
    half = 1.96 * math.sqrt(0.8 * 0.2 / 10 + 1.96**2 / 400) / 1.38416
    assert wilson(0.8, 10) == pytest.approx((0.99208 / 1.38416 - half, 0.99208 / 1.38416 + half))
    low, high = wilson(1.0, 20)
    assert high == pytest.approx(1) and low == pytest.approx(20 / (20 + 1.96**2))


# --- answers ---------------------------------------------------------------------------------------------------------------------


def said(*texts: list[int], sample: int = 0) -> list[Answer]:
    return [
        Answer(prompt=str(i), sample=sample, text="", tokens=tokens, numbers={"length": float(len(tokens)), "ended": 1.0})
        for i, tokens in enumerate(texts)
    ]


def test_distinct_n_by_hand() -> None:
    """Tokens 1 2 1 2 and 2 1: six single ones of which two differ; pairs 12 21 12, 21: two of four; triples 121 212: two of two."""
    texts = said([1, 2, 1, 2], [2, 1])
    assert [distinct(texts, n) for n in (1, 2, 3)] == [pytest.approx(2 / 6), 0.5, 1.0]
    assert distinct([*texts, *said([7, 8, 9], sample=1)], 1) == pytest.approx(2 / 6), "the first answer to each prompt alone"
    assert distinct(said([5]), 2) == 0.0


def test_means_and_differences_by_hand() -> None:
    before = answers({"p": [1, 3], "q": [5, 5]}, ref_nll=2.0)
    after = answers({"p": [2, 4], "q": [9, 9]}, ref_nll=1.0, kl=0.5, kl_k3=0.25)
    found = answer_metrics({"before": before, "after": after})
    assert (found["reward/before"], found["reward/after"], found["length/after"], found["eos_rate/after"]) == (3.5, 6.0, 1.0, 1.0)
    assert found["ref_perplexity/before"] == pytest.approx(math.exp(2)), "nats over tokens: eight over four"
    assert (found["kl"], found["kl_low"], found["kl_k3"]) == (0.5, 0.5, 0.25)
    gained = differences(before, after)
    assert gained["difference/reward"] == 2.5, "1 on p and 4 on q"
    assert (gained["difference/reward_low"], gained["difference/reward_high"]) == (1.0, 4.0)
    assert gained["difference/length"] == gained["difference/length_high"] == 0.0


def test_prompts_are_grouped_whatever_the_order_of_the_answers() -> None:
    own = answers({"p": [1, 3], "q": [5, 7]})
    assert per_prompt([own[0], own[2], own[1], own[3]], "reward") == [2.0, 6.0]


# --- pairs -----------------------------------------------------------------------------------------------------------------------


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_calibration_by_hand() -> None:
    """Four comparisons at p = 0.62, of which three are right, and two at p = 0.92, of which one is: error (4 * 0.13 + 2 * 0.42) / 6."""
    margins = [logit(0.62), logit(0.62), logit(0.62), -logit(0.62), logit(0.92), -logit(0.92)]
    low, high = calibration(margins)
    assert (low.name, low.count, low.right) == ("60-65", 4, 0.75) and low.predicted == pytest.approx(0.62)
    assert (high.name, high.count, high.right) == ("90-95", 2, 0.5) and high.predicted == pytest.approx(0.92)
    assert calibration_error([low, high]) == pytest.approx((4 * 0.13 + 2 * 0.42) / 6)


def test_a_sure_one_and_a_toss_have_a_bin() -> None:
    low, high = calibration([0.0, 1000.0])
    assert (low.name, low.predicted, low.right) == ("50-55", 0.5, 0.5)
    assert (high.name, high.predicted, high.right) == ("95-100", 1.0, 1.0)
    assert calibration_error([low, high]) == 0


def test_a_model_that_draws_by_its_own_probabilities_is_calibrated() -> None:
    rng = np.random.default_rng(0)
    p = rng.uniform(0.5, 1, 20_000)
    margins = [logit(x) if hit else -logit(x) for x, hit in zip(p, rng.uniform(size=len(p)) < p, strict=True)]
    table = calibration(margins)
    assert len(table) == 10 and sum(row.count for row in table) == 20_000
    assert calibration_error(table) < 0.02
    assert calibration_error(calibration([5 * margin for margin in margins])) > 0.1, "five times as sure and no more often right"


def test_accuracy_by_source() -> None:
    judged = [
        JudgedPrompt(source="web", margins=[1.0]),
        JudgedPrompt(source="web", margins=[-1.0]),
        JudgedPrompt(source="books", margins=[2.0, 1.0, 0.0]),  # a ranking of three; a margin of 0 is not right
    ]
    found = pair_metrics(judged)
    assert found["reward/accuracy"] == pytest.approx(3 / 5) and found["reward/margin"] == pytest.approx(3 / 5)
    assert found["reward/accuracy/web"] == 0.5 and found["reward/accuracy/books"] == pytest.approx(2 / 3)
    assert (found["reward/accuracy/web_low"], found["reward/accuracy/web_high"]) == wilson(0.5, 2)
    assert (found["reward/accuracy/books_low"], found["reward/accuracy/books_high"]) == wilson(2 / 3, 1), "one prompt, not three"
    assert pair_metrics([]) == {}


# --- texts -----------------------------------------------------------------------------------------------------------------------


def test_perplexity_by_hand() -> None:
    """6 nats over 3 tokens before, 3 nats after: e^2 and e^1, whatever the texts' lengths."""
    texts = [ReadText(tokens=1, nll={"a": 3.0, "b": 1.0}), ReadText(tokens=2, nll={"a": 3.0, "b": 2.0})]
    found = text_metrics(texts, ["a", "b"])
    assert (found["perplexity/a"], found["perplexity/b"]) == pytest.approx((math.exp(2), math.exp(1)))
    assert found["difference/perplexity"] == pytest.approx(math.exp(1) - math.exp(2)) and found["perplexity_tokens"] == 3
    assert found["perplexity/a_low"] < math.exp(2) < found["perplexity/a_high"]
    assert found["perplexity/b_low"] == pytest.approx(math.e), "one nat a token in every text"


# --- all of it -------------------------------------------------------------------------------------------------------------------


def test_nothing_measured_gives_no_metric_and_one_policy_no_difference() -> None:
    assert all_metrics(Records(), names=["after"], judges=("reward", "gold")) == {}
    alone = all_metrics(Records(answers={"after": answers({"p": [1], "q": [2]})}), names=["after"], judges=("reward",))
    assert not [name for name in alone if name.startswith(("difference", "win_rate"))] and alone["evaluated/prompts"] == 2


@given(st.data())
def test_every_metric_is_a_finite_number(data: Any) -> None:
    scores = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=3)
    prompts = data.draw(st.lists(scores, min_size=1, max_size=4))
    mine = {str(i): own for i, own in enumerate(prompts)}
    records = Records(
        answers={"a": answers(mine, ref_nll=0.1), "b": answers({key: [-s for s in own] for key, own in mine.items()}, ref_nll=0.2)},
        judged=[JudgedPrompt(source="s", margins=own) for own in prompts],
        texts=[ReadText(tokens=len(own), nll={"a": abs(own[0]), "b": 1.0}) for own in prompts],
    )
    found = all_metrics(records, names=["a", "b"], judges=("reward",))
    assert all(math.isfinite(value) for value in found.values()) and found["win_rate/reward"] >= 0
