"""Which rows belong to which step, and how sources are mixed.

Knows no texts and no tokenizer: rows are numbers. Every draw depends on a seed, the name and the content of one source, so it is the
same in every process and on every machine, and stays when another source joins the blend.
"""

from __future__ import annotations

import hashlib
import json
from typing import Literal

import datasets
import numpy as np
from datasets import Dataset

Phase = Literal["sft", "reward", "ppo"]
PHASES: tuple[Phase, ...] = ("sft", "reward", "ppo")


def generator(*key: str | int) -> np.random.Generator:
    """A random generator that is a function of the key alone."""
    return np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(json.dumps(key).encode()).digest())))


def hold_out(rows: int, fraction: float, seed: int, name: str, content: str) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers to train on and to hold out, each in ascending order; at least one row of two or more is held out if fraction > 0."""
    held = min(max(round(rows * fraction), int(fraction > 0)), max(rows - 1, 0))
    order = generator("hold out", seed, name, content).permutation(rows)
    return np.sort(order[held:]), np.sort(order[:held])


def divide(rows: int, shares: list[float], seed: int, name: str, content: str, *, max_rows: int | None = None) -> dict[Phase, np.ndarray]:
    """Divides rows 0..rows-1 into disjoint parts for the three steps (DeepSpeed-Chat's three-way split).

    Args:
        shares: proportions for sft, reward, ppo; they need not add up to one.
        max_rows: uses the first so many rows of the permutation only.

    Returns:
        Row numbers (int64) a phase, in the order of the permutation. Together they are all rows used, each once.
    """
    order = generator("divide", seed, name, content).permutation(rows)[:max_rows]
    ends = np.rint(np.cumsum(shares) / np.sum(shares) * len(order)).astype(int)
    parts = np.split(order, ends[:-1])
    return dict(zip(PHASES, parts, strict=True))


def blend(parts: list[Dataset], seed: int) -> Dataset:
    """All parts behind one another, shuffled once."""
    rows = datasets.concatenate_datasets(parts)
    return rows.select(generator("blend", seed).permutation(len(rows)))
