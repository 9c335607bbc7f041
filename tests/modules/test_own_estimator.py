"""`ppo.advantage` as an import path: what the estimator is given, what becomes of what it returns, and what is refused."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jobs import composed
from torch import Tensor

from rlhf.algorithms.advantages import leave_one_out
from rlhf.config import UserError, build
from rlhf.modules.critic_free import estimated
from rlhf.rules import check

PATH = "test_own_estimator.leave_out"
PPO = ("ppo=rloo", "run_dir=unused")


def leave_out(rewards: Tensor, mask: Tensor, samples: int) -> Tensor:
    """RLOO, as a user would write it."""
    returns = rewards.sum(dim=1).view(samples, -1)
    others = (returns.sum(dim=0) - returns) / (samples - 1)
    return (returns - others).flatten()[:, None].expand_as(rewards)


def spoils(rewards: Tensor, mask: Tensor, samples: int) -> Tensor:
    rewards.zero_()
    mask.zero_()
    return rewards + 1


NUMBER = 3


@given(st.integers(2, 4), st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**16))
def test_an_estimator_that_is_rloo_gives_what_rloo_gives(samples: int, prompts: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(width) < torch.randint(0, width + 1, (samples * prompts, 1), generator=generator)  # (B, A)
    rewards = torch.where(mask, torch.randn(samples * prompts, width, generator=generator), 0)
    expected = torch.where(mask, leave_one_out(rewards.sum(dim=1), samples)[:, None], 0)
    torch.testing.assert_close(estimated(PATH, leave_out, rewards, mask, samples), expected, atol=1e-5, rtol=1e-4)


def test_an_estimator_cannot_spoil_what_it_is_given() -> None:
    rewards, mask = torch.ones(2, 3), torch.tensor([[True, True, False], [True, False, False]])
    assert estimated(PATH, spoils, rewards, mask, 1).tolist() == [[1, 1, 0], [1, 0, 0]]
    assert rewards.sum() == 6 and mask.sum() == 3


RETURNED: dict[str, tuple[Any, str]] = {
    "a list": (lambda r, m, s: r.tolist(), "returned a list: it must return a tensor like the rewards, (2, 3)"),
    "one number an answer": (lambda r, m, s: r.sum(dim=1), "returned shape (2,): it must return a tensor like the rewards, (2, 3)"),
    "no number": (lambda r, m, s: r / 0, "returned advantages that are not finite"),
    "an error": (lambda r, m, s: r @ r, "raised RuntimeError: "),
}


@pytest.mark.parametrize("case", RETURNED)
def test_what_is_no_advantage_is_refused(case: str) -> None:
    function, message = RETURNED[case]
    with pytest.raises(UserError, match=re.escape(f"ppo.advantage={PATH} {message}")):
        estimated(PATH, function, torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), 1)


def test_what_is_not_finite_beyond_an_answer_does_not_matter() -> None:
    mask = torch.tensor([[True, False]])
    assert estimated(PATH, lambda r, m, s: r / m.float(), torch.ones(1, 2), mask, 1).tolist() == [[1, 0]]


CONFIGS: dict[str, tuple[tuple[str, ...], str]] = {
    "no name": (("ppo.advantage=rlo",), "ppo.advantage must be one of gae, rloo, grpo, reinforce_pp, or the import path module.name"),
    "no module": (("ppo.advantage=nowhere.f",), "ppo.advantage: cannot import 'nowhere.f': No module named 'nowhere'"),
    "no function": (("ppo.advantage=test_own_estimator.NUMBER",), "ppo.advantage=test_own_estimator.NUMBER is no function f(rewards, mask, samples)"),
    "a discount": ((f"ppo.advantage={PATH}", "ppo.gamma=0.9"), f"ppo.gamma=0.9 discounts later rewards, but advantage={PATH} takes no discount"),
    "a critic": ((f"ppo.advantage={PATH}", "ppo.critic_warmup=2"), f"ppo.critic_warmup=2, but advantage={PATH} has no critic: set it to 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_is_refused(case: str) -> None:
    words, message = CONFIGS[case]
    with pytest.raises(UserError, match=re.escape(message)):
        check(build(composed("ppo", *PPO, *words)))


def test_one_answer_a_prompt_is_enough_for_an_estimator() -> None:
    cfg = build(composed("ppo", *PPO, f"ppo.advantage={PATH}", "ppo.samples_per_prompt=1", "ppo.batch_size=64"))
    check(cfg)
    with pytest.raises(ValueError, match="compares the answers to one prompt"):
        dataclasses.replace(cfg.ppo, advantage="rloo")
