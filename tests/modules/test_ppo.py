"""Old log-probabilities from the actor or from the sampler, their mismatch and its correction, on one rank and on two."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from on_ranks import ANSWER, ROWS, answered, iterate, learner, networks, same, weights

from rlhf.config import UserError

MISMATCH = ("rollout/mismatch_abs", "rollout/mismatch_max", "rollout/mismatch_kl")


def test_a_sampler_that_agrees_changes_nothing_and_saves_the_pass() -> None:
    calls = {}
    metrics, moved = {}, {}
    for source in ("actor", "rollout"):
        (module,) = learner(old_logprobs=source)
        seen: list[int] = []
        module.actor.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        metrics[source] = iterate([module], answered())
        calls[source], moved[source] = len(seen), weights(module)
    same(metrics["rollout"], metrics["actor"])
    torch.testing.assert_close(moved["rollout"], moved["actor"])
    assert (moved["actor"] - weights(networks())).abs().max() > 1e-4, "it learned"
    assert metrics["actor"]["actor/ratio_max"] > 1.01
    assert all(abs(metrics[source][name]) < 1e-5 for source in metrics for name in MISMATCH)
    assert calls == {"actor": 3 + 2 * 4, "rollout": 2 * 4}, "three scoring passes, then two passes of four micro-batches"


@pytest.mark.parametrize("source", ["actor", "rollout"])
def test_one_wrong_logprob_shows(source: str) -> None:
    shift = torch.zeros(ROWS, ANSWER)
    shift[4, 2] = -0.5  # the sampler thought the token likelier than the trainer does: d = trainer - sampler = -0.5
    metrics = iterate(learner(old_logprobs=source, minibatch_size=ROWS), answered(shift=shift))
    tokens = int(answered().action_mask.sum())
    assert metrics["rollout/mismatch_max"] == pytest.approx(0.5, abs=1e-5)
    assert metrics["rollout/mismatch_abs"] == pytest.approx(0.5 / tokens, abs=1e-5)
    assert metrics["rollout/mismatch_kl"] == pytest.approx((math.exp(-0.5) - 1 + 0.5) / tokens, abs=1e-5)


def test_the_mismatch_is_taken_before_the_policy_moves() -> None:
    """Against the sampler's own logprobs every later minibatch would count what was learned, too."""
    metrics = iterate(learner(old_logprobs="rollout", rate=1.0), answered(shift=0.25))
    assert metrics["actor/ratio_max"] > 2, "it moved far"
    assert metrics["rollout/mismatch_max"] == pytest.approx(0.25, abs=1e-5)
    assert metrics["rollout/mismatch_abs"] == pytest.approx(0.25, abs=1e-5)
    assert metrics["rollout/mismatch_kl"] == pytest.approx(math.exp(0.25) - 1 - 0.25, abs=1e-5)
    assert metrics["actor/ratio_first"] == pytest.approx(math.exp(0.25), abs=1e-5)


def test_the_cap_truncates() -> None:
    """Half of the rows get the weight exp(0.7) = 2.01, above the cap, the other half exp(-0.5)."""
    high = torch.arange(ROWS).unsqueeze(1) < 4  # (B, 1)
    rollout = answered(shift=torch.where(high, 0.7, -0.5))
    (module,) = learner(importance_cap=1.5, minibatch_size=ROWS, epochs=1)
    experience, seen = module.score(rollout)
    mask = rollout.action_mask
    expected = torch.where(high, 1.5, math.exp(-0.5)).expand_as(mask)
    assert experience.importance is not None
    torch.testing.assert_close(experience.importance[mask], expected[mask])
    assert seen["actor/importance_weight"] == pytest.approx(expected[mask].mean().item(), abs=1e-5)
    learned = module.learn(experience)
    # At the old policy the ratio is 1, so that each token's loss is minus its weight times its advantage.
    assert learned["actor/loss"] == pytest.approx(-(expected * experience.advantages)[mask].mean().item(), abs=1e-5)


def test_the_correction_is_off_unless_asked_for() -> None:
    plain, shifted = (iterate(learner(), rollout) for rollout in (answered(with_logprobs=False), answered(shift=0.7)))
    same(shifted, plain, without=MISMATCH)
    assert "actor/importance_weight" not in shifted and not set(MISMATCH) & plain.keys()


@pytest.mark.parametrize("changes", [{"old_logprobs": "rollout"}, {"importance_cap": 1.2}], ids=["rollout", "capped"])
def test_two_ranks_measure_what_one_does(changes: dict[str, Any]) -> None:
    shift = torch.randn(ROWS, ANSWER, generator=torch.Generator().manual_seed(2)) * 0.3
    one, two = (iterate(learner(ranks, micro_batch_size=1, **changes), answered(shift=shift)) for ranks in (1, 2))
    assert set(MISMATCH) <= one.keys()
    same(two, one)


@pytest.mark.parametrize(
    ("changes", "key"), [({"old_logprobs": "rollout"}, "ppo.old_logprobs=rollout"), ({"importance_cap": 2.0}, "ppo.importance_cap")]
)
def test_answers_without_logprobs_are_refused(changes: dict[str, Any], key: str) -> None:
    (module,) = learner(**changes)
    with pytest.raises(UserError, match=f"{key} needs the sampler's log-probabilities"):
        module.score(answered(with_logprobs=False))


def test_while_the_critic_warms_up_the_actor_is_not_asked() -> None:
    modules = learner(old_logprobs="rollout", critic_warmup=1, max_kl=1e-6)
    warming = iterate(modules, answered())
    assert not set(MISMATCH) & warming.keys() and "actor/loss" not in warming and warming["ppo/optimizer_steps"] == 4
    learning = iterate(modules, answered())
    assert set(MISMATCH) <= learning.keys() and learning["ppo/optimizer_steps"] < 4, "the bound on the KL ends the iteration"
