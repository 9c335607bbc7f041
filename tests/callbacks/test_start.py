"""The random streams of ranks."""

from __future__ import annotations

import random

import numpy as np
import torch

from rlhf.callbacks.start import seed_rank


def draws(seed: int, rank: int) -> tuple[float, float, float]:
    """One number of each generator."""
    state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        seed_rank(seed, rank)
        return float(torch.rand(())), float(np.random.rand()), random.random()
    finally:
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])
        random.setstate(state[2])


def test_ranks_draw_different_numbers() -> None:
    """Also where two runs of a sweep differ by one in their seed."""
    streams = [draws(seed, rank) for seed in range(8) for rank in range(8)]
    for kind in zip(*streams, strict=True):
        assert len(set(kind)) == 64
    assert draws(3, 5) == draws(3, 5)
