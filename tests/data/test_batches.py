"""Batches: the same for every world size, exactly resumable, every row once an epoch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.config import UserError
from rlhf.data.batches import EvalBatches, GlobalBatches

cases = given(
    rows=st.integers(1, 90), per_rank=st.integers(1, 3), world=st.sampled_from([1, 2, 4]), epochs=st.sampled_from([1.0, 1.5, 3.0, 2.3]),
    seed=st.integers(0, 1000), grouped=st.booleans(), start=st.integers(0, 5),
)  # fmt: skip


@cases
@settings(max_examples=80, deadline=None)
def test_world_size_epochs_and_resume(rows: int, per_rank: int, world: int, epochs: float, seed: int, grouped: bool, start: int) -> None:
    size = per_rank * world
    if int(epochs * rows) < size:
        return
    options: dict[str, Any] = {"epochs": epochs, "seed": seed, "lengths": [7 * i % 13 for i in range(rows)] if grouped else None}
    whole = list(GlobalBatches(rows, size, **options))
    assert all(len(batch) == size for batch in whole)

    ranks = [list(GlobalBatches(rows, size, rank=rank, world=world, **options)) for rank in range(world)]
    for k, batch in enumerate(whole):
        assert [row for group in zip(*(rank[k] for rank in ranks), strict=True) for row in group] == batch

    resumed = GlobalBatches(rows, size, **options)
    resumed.start = start
    assert list(resumed) == whole[start:] and len(resumed) == len(whole)

    counts = np.bincount(np.concatenate(whole), minlength=rows)
    assert counts.max() <= np.ceil(epochs) and counts.sum() == len(whole) * size
    if not grouped:  # every epoch that fits is complete, and the next one begins inside the batch where it ended
        complete = len(whole) * size // rows
        assert counts.min() >= complete
        for epoch in range(complete):
            assert sorted(np.concatenate(whole)[epoch * rows : (epoch + 1) * rows].tolist()) == list(range(rows))


def test_epochs_differ_and_seeds_differ() -> None:
    first, second = (np.concatenate(list(GlobalBatches(40, 8, epochs=2, seed=seed))).tolist() for seed in (1, 2))
    assert first[:40] != first[40:] and first != second


def test_grouping_brings_equal_lengths_together_without_sorting_the_epoch() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 4000)
    batches = list(GlobalBatches(4000, 8, epochs=1, seed=0, lengths=lengths.tolist()))
    assert np.mean([np.ptp(lengths[batch]) for batch in batches]) < 8
    assert abs(np.corrcoef(range(len(batches)), [lengths[batch].mean() for batch in batches])[0, 1]) < 0.2
    assert sorted(np.concatenate(batches).tolist()) == list(range(4000))


def test_steps_overrules_epochs() -> None:
    assert len(list(GlobalBatches(5, 4, epochs=1, seed=0, steps=7))) == 7


def test_what_cannot_be_batched_names_the_key() -> None:
    with pytest.raises(UserError, match=r"rm\.batch_size=6 does not divide by the number of ranks = 4"):
        GlobalBatches(100, 6, epochs=1, seed=0, world=4, key="rm.batch_size")
    with pytest.raises(UserError, match=r"batch_size=8 passes the 7 rows"):
        GlobalBatches(7, 8, epochs=1, seed=0)


def test_evaluation_sees_each_row_once() -> None:
    assert [row for batch in EvalBatches(10, 4) for row in batch] == list(range(10))
    ranks = [list(EvalBatches(10, 4, rank=rank, world=4)) for rank in range(4)]
    assert {len(batches) for batches in ranks} == {2} and sorted(row for batches in ranks for batch in batches for row in batch) == list(
        range(8)
    )
    assert len(EvalBatches(100, 4, max_batches=3)) == 3
