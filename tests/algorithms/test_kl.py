"""KL estimators against their formulas and expectations; the controllers' direction, bounds and memory."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.algorithms.kl import AdaptiveKL, FixedKL, kl_controller, kl_estimate

FORMULAS = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: math.exp(-d) - 1 + d}


@pytest.mark.parametrize("estimator", FORMULAS)
@given(logprob=st.floats(-10, 0), ref=st.floats(-10, 0))
def test_formula(estimator: str, logprob: float, ref: float) -> None:
    value = kl_estimate(torch.tensor([[logprob]], dtype=torch.float64), torch.tensor([[ref]], dtype=torch.float64), estimator)
    assert value.item() == pytest.approx(FORMULAS[estimator](logprob - ref), abs=1e-9)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased(estimator: str) -> None:
    """The average over all tokens, each as likely as the policy makes it, is the KL divergence."""
    policy, ref = torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    exact = sum(math.exp(p) * (p - r) for p, r in zip(policy.tolist(), ref.tolist(), strict=True))
    assert (policy.exp() * kl_estimate(policy, ref, estimator)).sum().item() == pytest.approx(exact)


def test_k3_is_accurate_next_to_zero() -> None:
    value = kl_estimate(torch.tensor([[1e-4]]), torch.tensor([[0.0]]), "k3")
    assert value.item() == pytest.approx(0.5e-8, rel=0.5)


def test_unknown_estimator() -> None:
    with pytest.raises(ValueError, match="kl_estimator must be k1, k2 or k3, got k4"):
        kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), "k4")


def test_the_paper_update() -> None:
    controller = AdaptiveKL(0.15, target=6, horizon=10_000)
    controller.update(6.6, 256)
    assert controller.value == pytest.approx(0.15 * (1 + 0.1 * 256 / 10_000))
    controller.update(60, 256)  # the error stops at 0.2
    assert controller.value == pytest.approx(0.15 * (1 + 0.1 * 256 / 10_000) * (1 + 0.2 * 256 / 10_000))


@given(kl=st.floats(-100, 1e6), sequences=st.integers(1, 10**6))
def test_direction_and_bounds(kl: float, sequences: int) -> None:
    controller = AdaptiveKL(0.1, target=6.0, horizon=1000)
    controller.update(kl, sequences)
    assert math.copysign(1, kl - 6.0) * (controller.value - 0.1) >= 0
    assert 0.08 * 0.999 <= controller.value <= 0.12 * 1.001


def test_it_settles_where_the_kl_meets_the_target() -> None:
    controller = AdaptiveKL(1.0, target=2.0, horizon=100)
    for _ in range(500):
        controller.update(1.0 / controller.value, 50)  # a policy whose KL is the inverse of the coefficient
    assert controller.value == pytest.approx(0.5, rel=1e-3)


def test_controllers_resume() -> None:
    adaptive = kl_controller(0.1, 6.0, 100)
    assert isinstance(adaptive, AdaptiveKL)
    adaptive.update(60, 50)
    resumed = AdaptiveKL(0.1, target=6.0, horizon=100)
    resumed.load_state_dict(adaptive.state_dict())
    assert resumed.value == adaptive.value != 0.1
    fixed = kl_controller(0.05, None, 100)
    assert isinstance(fixed, FixedKL)
    fixed.update(60, 50)
    fixed.load_state_dict(adaptive.state_dict())
    assert fixed.value == 0.05
