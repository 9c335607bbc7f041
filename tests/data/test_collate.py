"""Padding: side, width, masks from lengths, and which tokens are predicted."""

from __future__ import annotations

import pytest

from rlhf.data.collate import CollatePairs, CollatePrompts, CollateTexts, Padding
from rlhf.types import RankedBatch

PADDING = Padding(pad_id=1, bucket=4, limit=10)


def test_texts_are_padded_right_and_the_loss_is_on_the_answer() -> None:
    rows = [{"ids": [5, 6, 7], "prompt": 2}, {"ids": [8, 1], "prompt": 0}]  # a pad id inside a text is a token like any other
    batch = CollateTexts(padding=PADDING, loss_on="answer")(rows)
    assert batch.ids.tolist() == [[5, 6, 7, 1], [8, 1, 1, 1]]
    assert batch.mask.tolist() == [[True, True, True, False], [True, True, False, False]]
    assert batch.loss_mask.tolist() == [[False, False, True, False], [False, True, False, False]]
    every = CollateTexts(padding=PADDING, loss_on="all")(rows)
    assert every.loss_mask.tolist() == [[False, True, True, False], [False, True, False, False]]


def test_both_sides_of_a_pair_have_one_width() -> None:
    rows = [{"chosen": [5], "rejected": [6] * 5}, {"chosen": [7, 8], "rejected": [9]}]
    batch = CollatePairs(padding=PADDING)([{**row, "between": [], "ranks": [0, 1]} for row in rows])
    assert not isinstance(batch, RankedBatch)
    assert batch.chosen_ids.shape == batch.rejected_ids.shape == (2, 8)
    assert batch.chosen_mask.sum(1).tolist() == [1, 2] and batch.rejected_mask.sum(1).tolist() == [5, 1]


def test_prompts_are_padded_left() -> None:
    batch = CollatePrompts(padding=PADDING)([{"ids": [5, 6], "text": "a", "index": 3}, {"ids": [7] * 4, "text": "b", "index": 9}])
    assert batch.ids.tolist() == [[1, 1, 5, 6], [7, 7, 7, 7]] and batch.mask.tolist() == [[False, False, True, True], [True] * 4]
    assert (batch.texts, batch.index.tolist(), batch.rollout) == (["a", "b"], [3, 9], None)


@pytest.mark.parametrize(("longest", "width"), [(1, 4), (4, 4), (5, 8), (9, 10), (10, 10)])
def test_the_width_is_rounded_up_but_never_above_the_limit(longest: int, width: int) -> None:
    assert PADDING.width(longest) == width
