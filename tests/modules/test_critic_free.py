"""Advantages without a critic, in the module and on two ranks."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from on_ranks import ANSWER, ROWS, Descent, Meeting, OnRank, answered, iterate, networks, settings
from torch import Tensor

from rlhf.algorithms.advantages import group_normalized, leave_one_out, rewards_to_go
from rlhf.algorithms.kl import kl_controller
from rlhf.modules.critic_free import CriticFree

SAMPLES = 2
VARIANTS = {
    "rloo": {"samples_per_prompt": SAMPLES, "batch_size": ROWS // SAMPLES},
    "grpo": {"samples_per_prompt": SAMPLES, "batch_size": ROWS // SAMPLES, "kl_in": "loss", "kl_estimator": "k3"},
    "reinforce_pp": {},
}


class Free(OnRank, CriticFree):
    """The critic is left out of the networks, so that whoever asks for it fails."""


def learners(advantage: str, ranks: int = 1, **changes: Any) -> list[Free]:
    meeting, modules = Meeting(ranks), []
    plain = {"whiten_advantages": False, "advantage": advantage}
    for rank in range(ranks):
        whole = copy.deepcopy(networks())
        module = Free(dataclasses.replace(settings(), **(plain | VARIANTS[advantage] | changes)), {}, temperature=whole.temperature, seed=5)
        for role in ("actor", "ref", "reward"):
            setattr(module, role, getattr(whole, role))
        module.kl = kl_controller(module.ppo.kl_coef, None, 1)
        module.rank = rank
        share = module.ppo.minibatch_size // ranks
        module.descent = Descent(module, rank, meeting, rate=0.05, micro_batches=share // (module.ppo.micro_batch_size or share))
        modules.append(module)
    return modules


def rewards_of(module: Free) -> Tensor:
    """(B, A): what the module rewards each token with."""
    seen: list[Tensor] = []
    inner = module._rewards
    module._rewards = lambda *args: seen.append(inner(*args)) or seen[-1]  # type: ignore[method-assign, func-returns-value]
    module.score(answered())
    return seen[0]


@pytest.mark.parametrize("advantage", VARIANTS)
def test_advantages_of_a_rollout(advantage: str) -> None:
    (module,) = learners(advantage)
    rewards, mask = rewards_of(module), answered().action_mask
    experience, _ = module.score(answered())
    if advantage == "reinforce_pp":
        expected = torch.stack([rewards[:, t:].sum(dim=1) for t in range(ANSWER)], dim=1)
    else:
        groups = rewards.sum(dim=1).view(SAMPLES, -1)  # row s * prompts + b answers prompt b
        others = groups.flip(0)  # of two answers, the other one
        apart = groups - others if advantage == "rloo" else (groups - others) / 2 / ((groups - others).abs() / 2 + 1e-6)
        expected = apart.flatten()[:, None].expand(-1, ANSWER)
    torch.testing.assert_close(experience.advantages, torch.where(mask, expected, 0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("score_slot", ["end", "past_end"])
def test_an_answer_that_is_its_end_alone_counts_in_its_group(score_slot: str) -> None:
    """Where the end of turn is padding such an answer is not trained on, but the others are compared with what it scored."""
    (module,) = learners("rloo", pad_is_end=True, score_slot=score_slot, kl_coef=0.0)
    seen: list[Tensor] = []
    inner = module._rewards
    module._rewards = lambda shaped, *rest: seen.append(shaped) or inner(shaped, *rest)  # type: ignore[method-assign, func-returns-value]
    experience, _ = module.score(answered())
    alone = answered().ended & (answered().action_mask.sum(dim=1) == 1)
    assert alone.tolist() == [row in (0, 6) for row in range(ROWS)] and not experience.action_mask[alone].any()
    expected = seen[0] - seen[0].view(SAMPLES, -1).flip(0).flatten()  # of two answers, the other one's score
    for row in (4, 2):
        found = experience.advantages[row][experience.action_mask[row]]
        torch.testing.assert_close(found, expected[row].expand_as(found), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("advantage", VARIANTS)
def test_an_iteration_learns_the_same_on_one_rank_and_two(advantage: str) -> None:
    before = learners(advantage)[0]
    one, two = learners(advantage), learners(advantage, ranks=2, micro_batch_size=1)
    found, again = iterate(one, answered()), iterate(two, answered())
    assert again == pytest.approx(found, rel=1e-4, abs=1e-5)
    assert not [name for name in found if name.startswith("critic/")], "there is no critic to report of"
    for name, parameter in one[0].actor.named_parameters():
        torch.testing.assert_close(parameter, two[1].actor.get_parameter(name), atol=1e-5, rtol=1e-4)
    assert any(not torch.equal(p, q) for p, q in zip(one[0].actor.parameters(), before.actor.parameters(), strict=True))


def test_formulas_against_loops() -> None:
    returns = torch.randn(12, generator=torch.Generator().manual_seed(0))
    by_prompt = [[returns[s * 3 + b].item() for s in range(4)] for b in range(3)]
    for b, group in enumerate(by_prompt):
        for s, own in enumerate(group):
            others = [x for i, x in enumerate(group) if i != s]
            assert leave_one_out(returns, 4)[s * 3 + b].item() == pytest.approx(own - sum(others) / 3, abs=1e-6)
            for unbiased in (False, True):
                mean = sum(group) / 4
                deviation = (sum((x - mean) ** 2 for x in group) / (3 if unbiased else 4)) ** 0.5
                found = group_normalized(returns, 4, unbiased=unbiased)[s * 3 + b].item()
                assert found == pytest.approx((own - mean) / deviation, abs=1e-4)
    rewards, mask = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[True, True, False]])
    assert rewards_to_go(rewards, mask, gamma=0.5).tolist() == [[2.0, 2.0, 0.0]]


@pytest.mark.parametrize("samples", [3, 8])
def test_equal_returns_teach_nothing(samples: int) -> None:
    """Whatever they are: the mean of equal fp32 numbers is not always the number."""
    returns = 3 * torch.randn(500, generator=torch.Generator().manual_seed(1))
    found = group_normalized(returns.repeat(samples), samples, unbiased=True)
    assert found.dtype == torch.float32 and found.abs().max() < 1e-6


def test_prompts_are_not_mixed() -> None:
    """A constant added to all answers of one prompt changes no advantage of a group."""
    returns, shift = torch.randn(8), torch.tensor([5.0, 0.0, 0.0, 0.0]).repeat(2)
    torch.testing.assert_close(leave_one_out(returns + shift, 2), leave_one_out(returns, 2), atol=1e-5, rtol=1e-5)
