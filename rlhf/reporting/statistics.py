"""Means over seeds with their intervals, and differences seed by seed. Knows numbers; knows no runs and no files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

DRAWS = 10_000
BAND_DRAWS = 1_000
"""Of a curve's band: there are hundreds of them on a page, and a pixel is coarse."""
FEW = 5
"""Seeds below which a bootstrap interval is called too narrow."""
STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""0.975 quantiles of Student's t for 1 to 30 degrees of freedom; the last is kept beyond, which is on the safe side."""
NORMAL = 1.96


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds, or a mean difference. What cannot be said is nan: all without values, spread and intervals with one."""

    values: Mapping[int, float]
    """Seed -> value."""
    mean: float
    sd: float
    """Of the values, with n - 1."""
    low: float
    high: float
    """95 % percentile bootstrap interval of the mean."""
    student_low: float
    student_high: float
    """95 % interval of the mean by Student's t."""

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def too_narrow(self) -> bool:
        """Whether the bootstrap interval rests on so few seeds that it cannot be taken at its word."""
        return 2 <= self.n < FEW

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    @property
    def excludes_zero_by_student(self) -> bool:
        return self.student_low > 0 or self.student_high < 0


def estimate(values: Mapping[int, float]) -> Estimate:
    numbers = list(values.values())
    low, high = bootstrap(numbers)
    student_low, student_high = student(numbers)
    return Estimate(
        values=dict(values), mean=float(np.mean(numbers)) if numbers else math.nan, low=low, high=high, student_low=student_low,
        student_high=student_high, sd=float(np.std(numbers, ddof=1)) if len(numbers) > 1 else math.nan,
    )  # fmt: skip


def paired(mine: Mapping[int, float], base: Mapping[int, float]) -> dict[int, float]:
    """Mine less the base's, for the seeds that both have."""
    return {seed: value - base[seed] for seed, value in mine.items() if seed in base}


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """95 % percentile interval of the mean; nan for fewer than two values. The draws are the same in every call."""
    if len(values) < 2:
        return math.nan, math.nan
    means = np.asarray(values, dtype=float)[_draws(len(values))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def student(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean by Student's t; nan for fewer than two values."""
    if len(values) < 2:
        return math.nan, math.nan
    half = _quantile(len(values)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def width_beside_student(n: int) -> float:
    """About how wide the bootstrap interval of n seeds is, as a share of Student's: 0.37 for 3, 0.63 for 5, 0.82 for 10."""
    return NORMAL * math.sqrt((n - 1) / n) / _quantile(n)


def verdict(low: float, high: float, *, lower_is_better: bool = False) -> str:
    """Of the interval of a difference: helps, hurts, no difference seen, too few seeds."""
    if math.isnan(low):
        return "too few seeds"
    if low <= 0 <= high:
        return "no difference seen"
    return "helps" if (low > 0) != lower_is_better else "hurts"


def band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and bootstrap interval of every column.

    Args:
        values: (seeds, points); nan where a seed has no value. Every column has at least one.

    Returns:
        Mean, low and high, (points,); where only one seed has a value, low and high are nan.
    """
    there = ~np.isnan(values)
    mean, low, high = (np.full(values.shape[1], np.nan) for _ in range(3))
    for pattern in np.unique(there, axis=1).T:
        columns = (there == pattern[:, None]).all(axis=0)
        part = values[np.ix_(pattern, columns)]
        mean[columns] = part.mean(axis=0)
        if len(part) > 1:
            means = part[_draws(len(part))[:BAND_DRAWS]].mean(axis=1)  # (draws, points)
            low[columns], high[columns] = np.percentile(means, [2.5, 97.5], axis=0)
    return mean, low, high


def _quantile(n: int) -> float:
    return STUDENT[min(n - 2, len(STUDENT) - 1)]


@lru_cache(maxsize=16)
def _draws(n: int) -> np.ndarray:
    """Which of n values each draw takes, (DRAWS, n)."""
    return np.random.default_rng(0).integers(0, n, size=(DRAWS, n))
