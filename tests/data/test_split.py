"""The three-way split: disjoint, exhaustive, stable; and its exact draw, which no version may change silently."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.data.split import PHASES, blend, divide, hold_out

shares = st.lists(st.floats(0, 10), min_size=3, max_size=3).filter(lambda three: sum(three) > 0.01)


@given(rows=st.integers(0, 300), shares=shares, seed=st.integers(0, 2**31), name=st.text(max_size=8))
@settings(max_examples=60, deadline=None)
def test_parts_are_disjoint_exhaustive_and_of_the_asked_size(rows: int, shares: list[float], seed: int, name: str) -> None:
    parts = divide(rows, shares, seed, name, "content")
    assert sorted(np.concatenate([parts[phase] for phase in PHASES]).tolist()) == list(range(rows))
    for phase, share in zip(PHASES, shares, strict=True):
        assert abs(len(parts[phase]) - rows * share / sum(shares)) <= 1
    again = divide(rows, shares, seed, name, "content")
    assert all(np.array_equal(parts[phase], again[phase]) for phase in PHASES)


@given(rows=st.integers(2, 200), fraction=st.floats(0.001, 0.9))
@settings(max_examples=40, deadline=None)
def test_held_out_rows_are_disjoint_from_the_rest(rows: int, fraction: float) -> None:
    kept, held = hold_out(rows, fraction, 1, "a", "content")
    assert sorted([*kept, *held]) == list(range(rows)) and 1 <= len(held) < rows


def test_the_draw_depends_on_seed_name_and_content() -> None:
    draws = [
        tuple(divide(100, [1, 0, 0], seed, name, content)["sft"])
        for seed, name, content in [(1, "a", "x"), (2, "a", "x"), (1, "b", "x"), (1, "a", "y")]
    ]
    assert len(set(draws)) == 4


def test_the_draw_is_the_same_in_another_process() -> None:
    code = "from rlhf.data.split import divide; print(divide(12, [2, 4, 4], 1234, 'rm_static', 'c')['ppo'].tolist())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(divide(12, [2, 4, 4], 1234, "rm_static", "c")["ppo"].tolist())


def test_max_rows_takes_the_beginning_of_the_same_permutation() -> None:
    few = divide(100, [1, 0, 0], 1, "a", "c", max_rows=10)["sft"]
    assert few.tolist() == divide(100, [1, 0, 0], 1, "a", "c")["sft"][:10].tolist()


@pytest.mark.parametrize("seed", [1, 2])
def test_a_blend_has_every_row_once_and_is_mixed(seed: int) -> None:
    mixed = blend([Dataset.from_dict({"x": list(range(20))}), Dataset.from_dict({"x": list(range(20, 30))})], seed)["x"][:]
    assert sorted(mixed) == list(range(30)) and mixed != list(range(30))
