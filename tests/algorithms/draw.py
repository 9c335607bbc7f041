"""What hypothesis draws for the algorithms: small batches of answers with any lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Answers:
    action_mask: Tensor  # (B, A) bool, true on the first tokens of each row; rows may be empty
    numbers: Callable[..., Tensor]  # normal numbers of a shape, (B, A) when none is given


@st.composite
def answers(draw: st.DrawFn, *, min_length: int = 0) -> Answers:
    rows, width = draw(st.integers(1, 4)), draw(st.integers(max(1, min_length), 7))
    lengths = draw(st.lists(st.integers(min_length, width), min_size=rows, max_size=rows))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return Answers(action_mask=mask, numbers=lambda *shape: torch.randn(shape or mask.shape, generator=generator))


def poisoned(x: Tensor, mask: Tensor, poison: float) -> Tensor:
    """x with `poison` (an inf or a NaN) wherever the mask is false."""
    return torch.where(mask, x, poison)
