"""The made-up task: its true score, and rows that are what they claim."""

from __future__ import annotations

import pytest

from rlhf.data.quickstart import COUNTS, KINDS, MOST_EXTRA, demonstrations, generate, gold, requests

REQUEST = " Human: please name 3 fruits . Assistant:"


@pytest.mark.parametrize(
    ("answer", "ended", "score"),
    [
        (" apple plum fig", True, 1.0),
        (" plum apple kiwi ", True, 1.0),
        (" apple plum fig", False, 0.5),
        (" apple plum", True, 0.5 * 2 / 3),
        (" apple plum fig kiwi", True, 0.5 * 3 / 4),
        (" apple plum plum", True, 0.5 * 2 / 3),
        (" apple plum dog", True, 0.5 * 2 / 3),
        (" apple plum fig ,", True, 0.5 * 3 / 4),
        (" applet plums figs", True, 0.0),
        (" apple plum , fig", True, 0.5 * 3 / 4),
        ("", True, 0.0),
        (" dog cat cow", True, 0.0),
    ],
)
def test_gold_is_one_for_exactly_the_right_list_alone(answer: str, ended: bool, score: float) -> None:
    assert gold([REQUEST], [answer], [ended]) == [pytest.approx(score)]


def test_gold_reads_the_last_request_and_refuses_other_prompts() -> None:
    assert gold(["name 2 tools " + REQUEST], ["fig pear plum"], [True]) == [1.0]
    with pytest.raises(ValueError, match="needs a request"):
        gold(["what is love ?"], ["fig"], [True])


@pytest.mark.parametrize("split", ["train", "eval"])
def test_the_chosen_answer_of_a_pair_scores_strictly_higher(split: str) -> None:
    rows = generate(split)
    scores = [gold([row["prompt"]] * 2, [row["chosen"], row["rejected"]], [True, True]) for row in rows]
    assert all(better > worse for better, worse in scores)
    assert any(better < 1.0 for better, _ in scores)  # of two faulty answers the reward model learns which is worse


def test_about_half_of_the_demonstrations_are_right() -> None:
    rows = demonstrations("train")
    scores = gold([row["prompt"] for row in rows], [row["chosen"] for row in rows], [True] * len(rows))
    assert 0.45 < scores.count(1.0) / len(scores) < 0.57
    assert max(len(row["chosen"].split()) for row in rows) <= 5 + 2 * MOST_EXTRA


def test_held_out_requests_are_never_trained_on() -> None:
    def prompts(split: str) -> set[str]:
        return {row["prompt"] for rows in (generate(split), demonstrations(split)) for row in rows}

    assert prompts("eval") <= {text for text, _, _ in requests("eval")} and not prompts("train") & prompts("eval")
    assert {n for _, n, _ in requests("eval")} == set(COUNTS) and {kind for _, _, kind in requests("eval")} == set(KINDS)


def test_no_item_belongs_to_two_kinds() -> None:
    items = [item for kind in KINDS.values() for item in kind]
    assert len(items) == len(set(items)) == 96
