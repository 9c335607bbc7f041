"""Each key of the ppo group, flipped alone: it changes the numbers it should, by the amount it should, and no others.

What the module computes of one rollout is taken apart into fields; FLIPS says which of them a key may touch, and all others must stay
equal to the last bit.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from typing import Any

import pytest
import torch
from on_ranks import ANSWER, PROMPT, ROWS, TEMPERATURE, answered, iterate, learner, networks, settings
from torch import Tensor

from rlhf.algorithms.answers import answer_masks
from rlhf.algorithms.kl import kl_estimate
from rlhf.modules.ppo import PPO
from rlhf.settings import PPOConfig
from rlhf.types import Experience, Rollout

LENGTHS = torch.arange(ROWS) % ANSWER + 1  # (B,) of `answered`


def rollout() -> Rollout:
    """Answers of all lengths with the sampler's log-probabilities; some end, some do not."""
    return answered(shift=torch.where(torch.arange(ROWS)[:, None] < 4, 0.7, -0.5))


def observed(**changes: Any) -> dict[str, Tensor]:
    """All that a learner makes of the rollout: the experience, the rewards, and losses and gradients after the actor has moved."""
    (module,) = learner(minibatch_size=ROWS, micro_batch_size=None, **changes)
    parts: dict[str, Tensor] = {}
    inner_shape, inner_rewards, inner_masks = module._shape_scores, module._rewards, module._masks

    def shape(scores: Tensor, answers: Rollout) -> Tensor:
        parts["raw"], parts["shaped"] = scores, inner_shape(scores, answers)
        return parts["shaped"]

    def rewards(*args: Any) -> Tensor:
        parts["rewards"] = inner_rewards(*args)
        return parts["rewards"]

    module._shape_scores, module._rewards = shape, rewards  # type: ignore[method-assign]
    experience, _ = module.score(rollout())
    parts["slots"] = inner_masks(rollout()).rewarded
    parts |= {
        "mask": experience.action_mask, "old_logprobs": experience.logprobs, "values": experience.values, "returns": experience.returns,
        "advantages": experience.advantages,
    }  # fmt: skip
    parts |= losses(module, experience)
    return {name: x.detach().clone() for name, x in parts.items()}


def losses(module: PPO, experience: Experience) -> dict[str, Tensor]:
    """Objective and gradient of both roles on the whole rollout, with old log-probabilities and values that are not today's."""
    seen: dict[str, Tensor] = {}

    def backward(role: str, loss: Tensor) -> None:
        seen[f"{role}_loss"] = seen.get(f"{role}_loss", 0) + loss.detach()
        loss.backward()

    module.descent.backward, module.descent.step = backward, lambda *roles: {}
    moved = dataclasses.replace(experience, logprobs=experience.logprobs - DRIFT, values=experience.values - 2 * DRIFT)
    module.actor.train()
    module.critic.train()
    module._minibatch(moved, {})
    for role in ("actor", "critic"):
        grads = [p.grad for p in getattr(module, role).parameters() if p.grad is not None]
        seen[f"{role}_grad"] = torch.cat([g.flatten() for g in grads]) if grads else torch.zeros(1)
    return seen


DRIFT = torch.randn(ROWS, ANSWER, generator=torch.Generator().manual_seed(9)) * 0.5
"""How far each token's old log-probability lies behind today's: some ratios are clipped, one is beyond e."""


@cache
def plain() -> dict[str, Tensor]:
    return observed()


ACTOR = {"actor_loss", "actor_grad"}
CRITIC = {"critic_loss", "critic_grad"}
LOSSES = ACTOR | CRITIC
FROM_ADVANTAGES = {"advantages", "returns"} | LOSSES
FROM_REWARDS = {"rewards"} | FROM_ADVANTAGES
FROM_SCORES = {"shaped"} | FROM_REWARDS
WITHOUT_WHITENING = {"whiten_advantages": False}
NO_CLIP = {"reward_clip": None}

FLIPS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "pad_is_end": ({"pad_is_end": True}, {"raw", "mask", "slots"} | FROM_SCORES),
    "min_answer_tokens": ({"min_answer_tokens": 3}, {"mask", "advantages"} | LOSSES),
    "score_slot": ({"score_slot": "past_end"}, {"slots", "values", "old_logprobs"} | FROM_REWARDS),
    "score_from": ({"score_from": "mean"}, {"raw"} | FROM_SCORES),
    "kl_coef": ({"kl_coef": 0.3}, FROM_REWARDS),
    "kl_in": ({"kl_in": "loss", "kl_estimator": "k2"}, FROM_REWARDS),
    "kl_estimator k2": ({"kl_estimator": "k2"}, FROM_REWARDS),
    "kl_estimator k3": ({"kl_estimator": "k3"}, FROM_REWARDS),
    "kl_clamp": ({"kl_clamp": 0.05}, FROM_REWARDS),
    "reward_scaling": ({"reward_scaling": True}, FROM_SCORES),
    "reward_centering": ({"reward_centering": True}, FROM_SCORES),
    "reward_clip": ({"reward_clip": 0.1}, FROM_SCORES),
    "missing_eos_penalty": ({"missing_eos_penalty": 1.0}, FROM_SCORES),
    "missing_eos_score": ({"missing_eos_score": -1.0}, FROM_SCORES),
    "length_penalty": ({"length_penalty": 0.1}, FROM_SCORES),
    "length_free": ({"length_penalty": 0.1, "length_free": 4}, FROM_SCORES),
    "whiten_rewards": ({"whiten_rewards": True}, FROM_REWARDS),
    "gamma": ({"gamma": 0.9}, FROM_ADVANTAGES),
    "gae_lambda": ({"gae_lambda": 0.5}, FROM_ADVANTAGES),
    "whiten_advantages": (WITHOUT_WHITENING, {"advantages"} | ACTOR),
    "whiten_unbiased": ({"whiten_unbiased": True}, {"advantages"} | ACTOR),
    "loss_mean sequence": ({"loss_mean": "sequence"}, LOSSES),
    "clip_range": ({"clip_range": 0.05}, ACTOR),
    "dual_clip": ({"dual_clip": 1.1}, ACTOR),
    "log_ratio_clamp": ({"log_ratio_clamp": 0.1}, ACTOR),
    "value_clip_range": ({"value_clip_range": None}, CRITIC),
    "value_loss_coef": ({"value_loss_coef": 0.1}, CRITIC),
    "entropy_coef": ({"entropy_coef": 0.1}, ACTOR),
    "old_logprobs": ({"old_logprobs": "rollout"}, {"old_logprobs"} | FROM_REWARDS),
    "importance_cap": ({"importance_cap": 1.5}, ACTOR),
    "critic_warmup": ({"critic_warmup": 1}, ACTOR),
}  # fmt: skip
"""Key -> how it is flipped, and every field that this changes."""
ELSEWHERE = {
    "iterations": "the number of batches, tests/engines",
    "batch_size": "the number of prompts, tests/engines",
    "samples_per_prompt": "the rollout's rows, tests/callbacks/test_rollout.py",
    "minibatch_size": "test_minibatches.py",
    "micro_batch_size": "changes nothing, tests/engines/test_invariance.py",
    "score_micro_batch_size": "changes nothing, tests/engines/test_invariance.py",
    "epochs": "test_ppo.py",
    "max_kl": "test_ppo.py",
    "shuffle": "below",
    "greedy_rollouts": "below",
    "kl_target": "below",
    "kl_horizon": "below",
    "reward_moments": "below",
    "loss_mean": "below, too",
    "score_in_train_mode": "below",
    "critic_init": "tests/engines",
    "critic_head": "test_heads.py",
    "advantage": "test_critic_free.py",
    "reward_source": "test_scorers.py",
    "reward_function": "test_scorers.py",
    "reward_function_kwargs": "test_scorers.py",
    "reward_function_coef": "test_scorers.py",
    "ptx_coef": "test_plain_text.py",
    "actor_optimizer": "a group of its own",
    "critic_optimizer": "a group of its own",
    "actor_scheduler": "a group of its own",
    "critic_scheduler": "a group of its own",
}


def test_every_key_is_flipped() -> None:
    named = {name.split()[0] for name in FLIPS} | set(ELSEWHERE)
    assert named == {field.name for field in dataclasses.fields(PPOConfig)}


@pytest.mark.parametrize(("changes", "touched"), FLIPS.values(), ids=FLIPS)
def test_a_key_changes_what_it_should_and_nothing_else(changes: dict[str, Any], touched: set[str]) -> None:
    before, after = plain(), observed(**changes)
    gone = before.keys() - after.keys()  # an actor that does not learn has no loss
    changed = gone | {name for name, x in after.items() if before[name].shape != x.shape or not torch.equal(before[name], x)}
    assert changed == touched, changes


# --- by how much -----------------------------------------------------------------------------------------------------------------


def test_the_end_that_is_padding() -> None:
    before, after = plain(), observed(pad_is_end=True)
    ended = rollout().ended
    assert torch.equal(after["mask"].sum(dim=1), LENGTHS - ended.long())
    at_once = ended & (LENGTHS == 1)
    assert torch.equal(after["slots"][~at_once], after["mask"][~at_once]), "without past_end the score moves one token forward"
    assert torch.equal(after["slots"][at_once], before["slots"][at_once]) and at_once.any(), "unless there is none"
    faithful = observed(pad_is_end=True, score_slot="past_end")
    assert torch.equal(faithful["slots"][ended], plain()["slots"][ended]), "past the last counted token is the end of turn"
    assert torch.equal(faithful["mask"], after["mask"])
    assert torch.equal(faithful["raw"], after["raw"]), "read one token before the end"
    assert (after["raw"] != before["raw"]).tolist() == ended.tolist()


@pytest.mark.parametrize("pad_is_end", [False, True])
def test_masks_of_one_answer_each(pad_is_end: bool) -> None:
    """Full without an end, ended, and ended at once."""
    action_mask, ended = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool(), torch.tensor([False, True, True])
    counted = [[1, 1, 1], [1, 0, 0], [0, 0, 0]] if pad_is_end else action_mask.int().tolist()
    past = [[1, 1, 1], [1, 1, 0], [1, 0, 0]] if pad_is_end else [[1, 1, 1], [1, 1, 1], [1, 1, 0]]
    trained = [row if sum(row) >= 2 else [0, 0, 0] for row in counted]
    for slot, rewarded in (("past_end", past), ("end", [*counted[:2], [1, 0, 0]])):
        masks = answer_masks(action_mask, ended, pad_is_end=pad_is_end, score_slot=slot, min_answer_tokens=2)
        assert [mask.int().tolist() for mask in masks] == [counted, rewarded, trained]


def test_short_answers_are_left_out() -> None:
    mask = observed(min_answer_tokens=3)["mask"]
    assert torch.equal(mask.any(dim=1), LENGTHS >= 3) and torch.equal(mask[LENGTHS >= 3], plain()["mask"][LENGTHS >= 3])


def test_the_slot_past_the_end() -> None:
    """The score moves one slot on where there is one, and that slot has the KL of what stands there, as in the original."""
    rewards, slots = observed(score_slot="past_end", kl_coef=0.0)["rewards"], LENGTHS.clamp(max=ANSWER - 1)
    expected = torch.zeros(ROWS, ANSWER)
    expected[torch.arange(ROWS), slots] = plain()["shaped"]
    assert torch.equal(rewards, expected)
    with_kl, mask = observed(score_slot="past_end")["rewards"], rollout().action_mask
    inside = mask & (torch.arange(ANSWER) != slots[:, None])
    assert torch.equal(with_kl[inside], observed(kl_coef=0.1, score_slot="past_end", reward_clip=1e-9)["rewards"][inside])
    assert (with_kl != rewards)[torch.arange(ROWS), slots].all()


def test_the_mean_of_the_reward_models_outputs() -> None:
    answers = rollout()
    with torch.no_grad():
        values = networks().reward(answers.ids, answers.mask)[:, PROMPT:]
    expected = [row[:n].mean().item() for row, n in zip(values, LENGTHS.tolist(), strict=True)]
    assert observed(score_from="mean")["raw"].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("key", "value"), [("kl_estimator", "k1"), ("kl_estimator", "k2"), ("kl_estimator", "k3"), ("kl_clamp", 0.05)])
def test_the_penalty_in_the_reward(key: str, value: Any) -> None:
    penalty = observed(**{key: value, "kl_coef": 1.0})["rewards"] - observed(kl_coef=0.0)["rewards"]
    difference = log_ratio_to_ref()
    expected = difference.clamp(-value, value) if key == "kl_clamp" else kl_estimate(difference, torch.zeros(()), value)
    torch.testing.assert_close(penalty, torch.where(rollout().action_mask, -expected, 0), atol=1e-5, rtol=1e-5)


def log_ratio_to_ref() -> Tensor:
    """(B, A) log p_actor - log p_ref, zero where no token is."""
    answers = rollout()
    with torch.no_grad():
        both = [
            (getattr(networks(), role)(answers.ids, answers.mask)[:, PROMPT - 1 : -1] / TEMPERATURE).log_softmax(-1)
            for role in ("actor", "ref")
        ]
    actor, ref = (x.gather(-1, answers.ids[:, PROMPT:].unsqueeze(-1)).squeeze(-1) for x in both)
    return torch.where(answers.action_mask, actor - ref, 0)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_penalty_in_the_loss(estimator: str) -> None:
    """It leaves the rewards, and adds coef times its mean to the actor's loss, with a gradient that pulls towards ref."""
    inside, without = observed(kl_in="loss", kl_estimator=estimator, kl_coef=0.3), observed(kl_coef=0.0)
    assert torch.equal(inside["rewards"], without["rewards"])
    mask = rollout().action_mask
    expected = 0.3 * kl_estimate(log_ratio_to_ref(), torch.zeros(()), estimator)[mask].mean()
    torch.testing.assert_close((inside["actor_loss"] - without["actor_loss"]).float(), expected, atol=1e-5, rtol=1e-4)
    (module,) = learner(kl_in="loss", kl_estimator=estimator, kl_coef=20.0, rate=1e-3, minibatch_size=ROWS, micro_batch_size=None, epochs=1)
    first = iterate([module], answered(with_logprobs=False))
    second = iterate([module], answered(with_logprobs=False))
    assert 0 < second["actor/kl_loss"] < first["actor/kl_loss"]


def test_the_adaptive_controller_steers() -> None:
    (module,) = learner(kl_target=1e-6, kl_horizon=80)
    first = iterate([module], rollout())
    second = iterate([module], rollout())
    assert first["ppo/kl_coef"] == settings().kl_coef
    assert second["ppo/kl_coef"] == pytest.approx(settings().kl_coef * (1 + math.copysign(0.2, first["rollout/kl"]) * ROWS / 80))


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("moments", ["running", "reference"])
def test_scores_are_normalized(center: bool, scale: bool, moments: str) -> None:
    """In the second iteration the reward model says 3 more: running moments take these scores in, the reference's stay."""
    if moments == "reference" and not (center or scale):
        return
    (module,) = learner(reward_centering=center, reward_scaling=scale, reward_moments=moments, reward_clip=None)
    answers, raw = rollout(), plain()["raw"]
    first, second = module._shape_scores(raw, answers), module._shape_scores(raw + 3, answers)
    for found, scores, seen in ((first, raw, raw), (second, raw + 3, raw if moments == "reference" else torch.cat([raw, raw + 3]))):
        expected = (scores - (seen.mean() if center else 0)) / (seen.std(correction=0) if scale else 1)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    (resumed,) = learner(reward_centering=center, reward_scaling=scale, reward_moments=moments, reward_clip=None)
    resumed.load_state(module.state())
    assert torch.equal(resumed._shape_scores(raw, answers), module._shape_scores(raw, answers))


SHAPES: dict[str, tuple[dict[str, Any], Any]] = {
    "missing_eos_penalty": ({"missing_eos_penalty": 0.5}, lambda raw, ended: raw - 0.5 * (~ended).float()),
    "missing_eos_score": ({"missing_eos_score": -0.25}, lambda raw, ended: torch.where(ended, raw, -0.25)),
    "length_penalty": ({"length_penalty": 0.1, "length_free": 2}, lambda raw, _: raw - 0.1 * (LENGTHS - 2).clamp(min=0)),
    "reward_clip": ({"reward_clip": 0.2}, lambda raw, _: raw.clamp(-0.2, 0.2)),
    "the clip comes last": ({"reward_clip": 0.2, "missing_eos_score": -9.0}, lambda raw, ended: torch.where(ended, raw.clamp(-0.2, 0.2), -0.2)),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "expected"), SHAPES.values(), ids=SHAPES)
def test_what_is_done_to_scores(changes: dict[str, Any], expected: Any) -> None:
    seen = observed(**{**NO_CLIP, **changes})
    torch.testing.assert_close(seen["shaped"], expected(seen["raw"], rollout().ended))


def test_whitening() -> None:
    mask = rollout().action_mask
    rewards, whitened = plain()["rewards"][mask], observed(whiten_rewards=True)["rewards"][mask]
    assert whitened.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert whitened.mean().item() == pytest.approx(rewards.mean().item(), abs=1e-5), "the mean stays"
    advantages = observed(**WITHOUT_WHITENING)["advantages"][mask]
    for unbiased in (False, True):
        expected = (advantages - advantages.mean()) / advantages.std(correction=int(unbiased))
        torch.testing.assert_close(observed(whiten_unbiased=unbiased)["advantages"][mask], expected, atol=1e-4, rtol=1e-4)


def test_the_mean_of_a_loss() -> None:
    """global: tokens count alike. sequence: sequences do. local: so do micro-batches, which then change the loss."""
    found = {}
    for how in ("global", "sequence", "local"):
        for micro in (1, 4, ROWS):
            (module,) = learner(loss_mean=how, minibatch_size=ROWS, micro_batch_size=micro)
            experience, _ = module.score(rollout())
            found[how, micro] = losses(module, experience)["critic_loss"].item()
    tokens = critic_losses()
    mask = rollout().action_mask
    by_row = torch.stack([row[inside].mean() for row, inside in zip(tokens, mask, strict=True)])
    halves = torch.stack([tokens[rows][mask[rows]].mean() for rows in (slice(0, 4), slice(4, 8))])
    everything = tokens[mask].mean().item()
    assert [found["global", micro] for micro in (1, 4, ROWS)] == pytest.approx([everything] * 3, rel=1e-5)
    assert [found["sequence", micro] for micro in (1, 4, ROWS)] == pytest.approx([by_row.mean().item()] * 3, rel=1e-5)
    expected = [by_row.mean().item(), halves.mean().item(), everything]
    assert [found["local", micro] for micro in (1, 4, ROWS)] == pytest.approx(expected, rel=1e-5)
    assert len({round(x, 4) for x in expected}) == 3


def critic_losses() -> Tensor:
    """(B, A) of `losses`, by the formula."""
    (module,) = learner()
    answers = rollout()
    experience, _ = module.score(answers)
    with torch.no_grad():
        values = module.critic(answers.ids, answers.mask)[:, PROMPT - 1 : -1]
    old = experience.values - 2 * DRIFT
    clipped = old + (values - old).clamp(-0.2, 0.2)
    return 0.5 * torch.maximum((values - experience.returns) ** 2, (clipped - experience.returns) ** 2)


@pytest.mark.parametrize("how", ["global", "sequence"])
def test_ranks_do_not_change_a_global_mean(how: str) -> None:
    one, two = (iterate(learner(ranks, loss_mean=how, micro_batch_size=1), rollout()) for ranks in (1, 2))
    assert two == pytest.approx(one, rel=1e-4, abs=1e-5)


def test_a_short_answer_counts_in_no_mean() -> None:
    """A step of which nothing is left is a step of nothing, not 0 / 0."""
    for how in ("global", "local", "sequence"):
        metrics = iterate(learner(loss_mean=how, min_answer_tokens=ANSWER + 1), rollout())
        assert metrics["critic/loss"] == metrics["actor/loss"] == 0


def test_the_order_of_rows_and_minibatches() -> None:
    def passes(how: str) -> list[list[list[int]]]:
        (module,) = learner(shuffle=how, minibatch_size=2)
        return [[rows.tolist() for rows in module._minibatches(ROWS, epoch)] for epoch in range(6)]

    fixed = [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert passes("none") == [fixed] * 6
    first, *later = passes("minibatches")
    assert first == fixed and all(sorted(order) == fixed for order in later) and any(order != fixed for order in later)
    drawn = passes("rows")
    assert all(sorted(row for rows in order for row in rows) == list(range(ROWS)) for order in drawn)
    assert len({frozenset(map(frozenset, order)) for order in drawn}) > 3, "each pass pairs the rows anew"


def test_dropout_acts_where_old_logprobs_are_computed() -> None:
    """With it the first ratio is not 1 in train mode, and is without; so is the reference's, which is frozen, at all times."""
    firsts = {}
    for in_train_mode in (False, True):
        (module,) = learner(score_in_train_mode=in_train_mode, minibatch_size=ROWS, micro_batch_size=None)
        modes: dict[str, bool] = {}
        hooks = [
            getattr(module, role).register_forward_pre_hook(lambda net, _, role=role, modes=modes: modes.update({role: net.training}))
            for role in ("actor", "critic", "ref", "reward")
        ]
        module.score(rollout())
        assert modes == {"actor": in_train_mode, "critic": in_train_mode, "ref": False, "reward": False}
        for hook in hooks:
            hook.remove()
        with_dropout(module)
        torch.manual_seed(0)
        old = module.score(rollout())[0].logprobs
        firsts[in_train_mode] = (old - plain()["old_logprobs"]).abs().max().item()
    assert firsts[False] == 0 and firsts[True] > 1e-3


def with_dropout(module: PPO) -> None:
    """LLaMA has dropout in its attention only."""
    for layer in module.actor.model.base_model.layers:
        layer.self_attn.attention_dropout = 0.5
