"""Learning from pairs without a reward model.

Types and ranges only: the values live in conf/.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf.settings.ranges import require
from rlhf.settings.steps import StepConfig


@dataclass(frozen=True, kw_only=True)
class DPOConfig(StepConfig):
    """Sizes are in pairs: `batch_size` pairs are one optimizer step."""

    loss: Literal["sigmoid", "ipo"]
    """sigmoid: DPO on the log-probabilities of whole answers. ipo: squared distance to a margin of 1 / (2 beta), on means over tokens."""
    beta: float
    """How strongly the policy is held to the reference; tau in IPO."""
    label_smoothing: float
    """Share of labels taken to be wrong (conservative DPO), for loss=sigmoid; 0: off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.loss in ("sigmoid", "ipo"), f"loss must be sigmoid or ipo, got {self.loss}")
        require(self.beta > 0, f"beta must be positive, got {self.beta}")
        require(
            0 <= self.label_smoothing < 0.5,
            f"label_smoothing must lie in [0, 0.5), got {self.label_smoothing}: at 0.5 a label says nothing",
        )
        require(
            self.label_smoothing == 0 or self.loss == "sigmoid",
            f"label_smoothing={self.label_smoothing} acts with loss=sigmoid only, got loss={self.loss}: set it to 0",
        )
