"""Step 3: PPO against the reward model.

Names the four networks and holds the arithmetic of one iteration; knows no engine beyond `backward` and `step`, does not say when or
how answers are generated, and has no data set. B sequences of this rank, P prompt tokens, A answer tokens.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from rlhf.algorithms.advantages import RunningMoments, gae, shape_rewards
from rlhf.algorithms.kl import kl_controller, kl_estimate
from rlhf.algorithms.logprobs import logprobs_and_entropy, token_logprobs
from rlhf.algorithms.losses import end_scores, policy_loss, value_loss
from rlhf.algorithms.masked import masked_sum, masked_sums, whiten
from rlhf.algorithms.mismatch import importance_weights, mismatch
from rlhf.config import UserError
from rlhf.models.factory import Blueprint
from rlhf.modules.base import RoleModule, as_scalars, step_metrics
from rlhf.modules.minibatches import minibatch_rows
from rlhf.settings import PPOConfig
from rlhf.types import Experience, PromptBatch, Rollout


class PPO(RoleModule):
    """KL-shaped rewards, GAE and clipped losses. Every mean is over the global minibatch, so that ranks and micro-batches change nothing."""

    trained: ClassVar[tuple[str, ...]] = ("actor", "critic")

    def __init__(self, ppo: PPOConfig, blueprints: dict[str, Blueprint], *, temperature: float, seed: int) -> None:
        """
        Args:
            temperature: of the rollouts; logprobs are those of the distribution that was sampled from.
            seed: of the order of minibatches, the same on every rank.
        """
        super().__init__(blueprints)
        self.ppo = ppo
        self.temperature = temperature
        self.seed = seed
        self.kl = kl_controller(ppo.kl_coef, ppo.kl_target, ppo.kl_horizon)
        self.score_moments = RunningMoments()
        self.stop_requested = False

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        rollout = batch.rollout
        assert rollout is not None, "a rollout callback fills the batch before the step"
        with self.clock("score"):
            experience, seen = self.score(rollout)
        with self.clock("train"):
            learned = self.learn(experience)
        self.iteration += 1
        self.tokens = {"generate": int(rollout.lengths.sum()), "train": int(rollout.mask.sum()) * self.ppo.epochs}
        self.metrics = seen | learned

    # --- experience ---

    @torch.no_grad()
    def score(self, rollout: Rollout) -> tuple[Experience, dict[str, float]]:
        """Turns answers into experience: logprobs of actor and ref, values, scores, KL-shaped rewards and advantages, once.

        Raises:
            UserError: the sampler's logprobs are asked for, and the rollout has none.
        """
        self._require_logprobs(rollout)
        self.actor.eval()
        self.critic.eval()
        parts = [self._judge(micro) for micro in rollout.micro_batches(self.ppo.score_micro_batch_size or len(rollout))]
        logprobs, ref_logprobs, values, scores = (torch.cat(column) for column in zip(*parts, strict=True))
        mask = rollout.action_mask
        kl = kl_estimate(logprobs, ref_logprobs, self.ppo.kl_estimator)  # (B, A)
        shaped = self._shape_scores(scores, rollout.ended)  # (B,)
        rewards = shape_rewards(shaped, kl, mask, kl_coef=self.kl.value)  # (B, A)
        advantages, returns = gae(rewards, values, mask, gamma=self.ppo.gamma, gae_lambda=self.ppo.gae_lambda)
        sums = {
            "rows": torch.tensor(float(len(mask)), device=mask.device),
            "tokens": mask.sum(),
            "score": scores.sum(),
            "shaped": shaped.sum(),
            "k1": masked_sum(logprobs - ref_logprobs, mask),
            "k3": masked_sum(kl_estimate(logprobs, ref_logprobs, "k3"), mask),
            "ended": rollout.ended.sum(),
            "reward": masked_sum(rewards, mask),
        }
        moments = {
            "advantage": masked_sums(advantages, mask),
            "return": masked_sums(returns, mask),
            "error": masked_sums(returns - values, mask),
        }
        importance, apart, largest = self._compare_with_sampler(rollout, logprobs)
        seen = self._describe(sums | apart, moments) | largest
        if self.ppo.whiten_advantages:
            advantages = whiten(advantages, mask, moments["advantage"])
        experience = Experience(
            ids=rollout.ids, mask=rollout.mask, action_mask=mask, logprobs=logprobs, values=values, advantages=advantages, returns=returns,
            importance=importance,
        )  # fmt: skip
        self.kl.update(seen["rollout/kl"], self.ppo.batch_size * self.ppo.samples_per_prompt)
        return experience, seen

    def _require_logprobs(self, rollout: Rollout) -> None:
        key = "old_logprobs=rollout" if self.ppo.old_logprobs == "rollout" else "importance_cap"
        if rollout.logprobs is None and (self.ppo.old_logprobs == "rollout" or self.ppo.importance_cap is not None):
            raise UserError(
                f"ppo.{key} needs the sampler's log-probabilities, but these answers came without: choose ppo.old_logprobs=actor and "
                "ppo.importance_cap=null, or a model whose family the hybrid engine has a map of weights for"
            )

    def _compare_with_sampler(self, rollout: Rollout, logprobs: Tensor) -> tuple[Tensor | None, dict[str, Tensor], dict[str, float]]:
        """The engine that sampled against the actor's forward pass, logprobs (B, A), where both were computed.

        Returns:
            Importance weights (B, A) where they are asked for, sums over this rank's tokens, metrics over all ranks.
        """
        if rollout.logprobs is None or self.ppo.old_logprobs == "rollout":
            return None, {}, {}
        mask, importance = rollout.action_mask, None
        apart = mismatch(logprobs, rollout.logprobs, mask)
        sums = {"mismatch_abs": apart.absolute, "mismatch_kl": apart.kl}
        if self.ppo.importance_cap is not None:
            importance = importance_weights(logprobs, rollout.logprobs, mask, cap=self.ppo.importance_cap)
            sums["importance"] = masked_sum(importance, mask)
        return importance, sums, {"rollout/mismatch_max": float(self.strategy.max_over_ranks(apart.largest))}

    def _judge(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Old logprobs and those of ref (B, A), values (B, A) and the reward model's score of the finished answer (B,)."""
        answers = rollout.ids[:, rollout.prompt_length :]  # (B, A)
        width = answers.shape[1] + 1  # row P - 1 of the logits predicts the first answer token
        mask = rollout.action_mask
        if self.ppo.old_logprobs == "rollout":
            assert rollout.logprobs is not None, "refused before"
            logprobs = rollout.logprobs.float()
        else:
            logprobs = token_logprobs(self.actor(rollout.ids, rollout.mask, last=width)[:, :-1], answers, temperature=self.temperature)
        ref_logprobs = token_logprobs(self.ref(rollout.ids, rollout.mask, last=width)[:, :-1], answers, temperature=self.temperature)
        values = self.critic(rollout.ids, rollout.mask)[:, -width:-1]
        score = end_scores(self.reward(rollout.ids, rollout.mask), rollout.mask)
        return logprobs.where(mask, 0), ref_logprobs.where(mask, 0), values.where(mask, 0), score

    def _shape_scores(self, scores: Tensor, ended: Tensor) -> Tensor:  # (B,), (B,) -> (B,)
        if self.ppo.reward_scaling:
            self.score_moments.update(self.strategy.sum_over_ranks(masked_sums(scores, torch.ones_like(ended))))
            scores = scores / max(self.score_moments.std, 1e-8)
        if self.ppo.missing_eos_penalty is not None:
            scores = scores - self.ppo.missing_eos_penalty * (~ended).float()
        if self.ppo.reward_clip is not None:
            scores = scores.clamp(-self.ppo.reward_clip, self.ppo.reward_clip)
        return scores

    def _describe(self, sums: dict[str, Tensor], moments: dict[str, Tensor]) -> dict[str, float]:
        """Metrics of an iteration's answers over all ranks; `moments` are replaced by their global sums."""
        flat = torch.cat([torch.stack([v.double() for v in sums.values()]), *moments.values()])
        flat = self.strategy.sum_over_ranks(flat)
        for i, name in enumerate(moments):
            moments[name] = flat[len(sums) + 3 * i : len(sums) + 3 * i + 3]
        total = as_scalars(dict(zip(sums, flat, strict=False)))
        rows, tokens = total["rows"], max(1.0, total["tokens"])
        advantage, returns, error = (_mean_and_variance(m.tolist()) for m in moments.values())
        apart = {"mismatch_abs": "rollout/mismatch_abs", "mismatch_kl": "rollout/mismatch_kl", "importance": "actor/importance_weight"}
        return {
            "rollout/reward": total["score"] / rows,
            "rollout/shaped_reward": total["shaped"] / rows,
            "rollout/return": total["reward"] / rows,
            "rollout/kl": total["k1"] / rows,
            "rollout/kl_k3": total["k3"] / rows,
            "rollout/kl_per_token": total["k1"] / tokens,
            "rollout/length": total["tokens"] / rows,
            "rollout/eos_rate": total["ended"] / rows,
            "ppo/kl_coef": self.kl.value,
            "ppo/advantage_mean": advantage[0],
            "ppo/advantage_std": advantage[1] ** 0.5,
            "ppo/return_mean": returns[0],
            "ppo/return_std": returns[1] ** 0.5,
            "critic/explained_variance": 1 - error[1] / max(returns[1], 1e-12),
        } | {name: total[key] / tokens for key, name in apart.items() if key in total}

    # --- learning ---

    def learn(self, experience: Experience) -> dict[str, float]:
        """Several passes over one iteration's experience, minibatch by minibatch; actor and critic step together."""
        self.actor.train()
        self.critic.train()
        totals: dict[str, Tensor] = {}
        results: dict[str, Any] = {}
        largest = torch.zeros(2, device=self.device)
        first: tuple[dict[str, Tensor], Tensor] | None = None
        for epoch in range(self.ppo.epochs):
            for rows in self._minibatches(len(experience), epoch):
                sums, peaks = self._minibatch(experience.rows(rows.to(self.device)), results)
                first = first or (sums, peaks)
                largest = torch.maximum(largest, peaks)
                totals = {name: totals.get(name, 0) + value for name, value in sums.items()}
                if self.ppo.max_kl is not None and "approx_kl" in sums and float(sums["approx_kl"] / sums["tokens"]) > self.ppo.max_kl:
                    totals["stopped_early"] = torch.ones((), device=self.device)
                    break
            if "stopped_early" in totals:
                break
        assert first is not None
        sums, peaks = first
        ratio_max, _, ratio_first, mismatch_max = self.strategy.max_over_ranks(torch.cat([largest, peaks])).unbind()
        totals |= {"ratio_max": ratio_max, "ratio_first": ratio_first, "mismatch_max": mismatch_max}
        # Only the first minibatch meets the weights that sampled.
        totals |= {name: sums[name] / sums["tokens"].clamp(min=1) for name in ("mismatch_abs", "mismatch_kl") if name in sums}
        return self._report(as_scalars(totals)) | step_metrics(results)

    def _minibatches(self, rows: int, epoch: int) -> list[Tensor]:
        world, rank = self.strategy.world_size, self.global_rank
        seed = (self.seed * 1_000_003 + self.iteration) * 1_009 + epoch
        return minibatch_rows(rows * world, self.ppo.minibatch_size, rank=rank, world_size=world, seed=seed)

    def _minibatch(self, batch: Experience, results: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
        """One optimizer step of actor and critic. Returns sums over all ranks, and (2,) the largest ratio and mismatch of this rank."""
        tokens = self.strategy.sum_over_ranks(batch.action_mask.sum().double())
        actor_learns = self.iteration >= self.ppo.critic_warmup
        sums: dict[str, Tensor] = {}
        largest = torch.zeros(2, device=self.device)
        for micro in batch.micro_batches(self.ppo.micro_batch_size or len(batch)):
            part: dict[str, Tensor] = {}
            if actor_learns:
                loss, policy, peaks = self._policy_loss(micro)
                self.strategy.backward("actor", loss / tokens)
                part |= policy
                largest = torch.maximum(largest, peaks)
            loss, value = self._value_loss(micro)
            self.strategy.backward("critic", self.ppo.value_loss_coef * loss / tokens)
            part |= value
            results.update(self.strategy.step("actor", "critic") if actor_learns else self.strategy.step("critic"))
            sums = {name: sums.get(name, 0) + x.detach().double() for name, x in part.items()}
        flat = self.strategy.sum_over_ranks(torch.stack(list(sums.values())))
        return dict(zip(sums, flat, strict=True)) | {"tokens": tokens, "steps": torch.ones_like(tokens)}, largest

    def _policy_loss(self, batch: Experience) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Summed over tokens: clipped surrogate minus the entropy bonus (Schulman et al. 2017, eq. 7 and 9).

        Returns:
            The loss, what else was summed, and (2,) the largest ratio and the largest mismatch with the sampler.
        """
        mask, width = batch.action_mask, batch.action_mask.shape[1]
        logits = self.actor(batch.ids, batch.mask, last=width + 1)[:, :-1]  # (B, A, V)
        logprobs, entropy = logprobs_and_entropy(logits, batch.ids[:, -width:], temperature=self.temperature)
        policy = policy_loss(
            logprobs, batch.logprobs, batch.advantages, mask, clip_range=self.ppo.clip_range, log_ratio_clamp=self.ppo.log_ratio_clamp,
            importance=batch.importance,
        )  # fmt: skip
        loss, entropies = masked_sum(policy.loss, mask), masked_sum(entropy, mask)
        sums = {
            "policy_loss": loss,
            "entropy": entropies,
            "clipped": masked_sum(policy.clipped.float(), mask),
            "approx_kl": masked_sum(batch.logprobs - logprobs.detach(), mask),
        }
        peaks = torch.stack([policy.ratio.where(mask, 0).max(), torch.zeros_like(loss.detach())])
        if self.ppo.old_logprobs == "rollout":
            apart = mismatch(logprobs, batch.logprobs, mask)
            sums |= {"mismatch_abs": apart.absolute, "mismatch_kl": apart.kl}
            peaks[1] = apart.largest
        return loss - self.ppo.entropy_coef * entropies, sums, peaks

    def _value_loss(self, batch: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        mask, width = batch.action_mask, batch.action_mask.shape[1]
        values = self.critic(batch.ids, batch.mask)[:, -width - 1 : -1]  # (B, A)
        value = value_loss(values, batch.values, batch.returns, mask, value_clip_range=self.ppo.value_clip_range)
        loss = masked_sum(value.loss, mask)
        return loss, {"value_loss": loss, "value_clipped": masked_sum(value.clipped.float(), mask)}

    def _report(self, totals: dict[str, float]) -> dict[str, float]:
        tokens = max(1.0, totals["tokens"])
        metrics = {
            "critic/loss": totals["value_loss"] / tokens,
            "critic/clip_fraction": totals["value_clipped"] / tokens,
            "ppo/optimizer_steps": totals["steps"],
        }
        if "policy_loss" in totals:
            metrics |= {
                "actor/loss": totals["policy_loss"] / tokens,
                "actor/entropy": totals["entropy"] / tokens,
                "actor/clip_fraction": totals["clipped"] / tokens,
                "actor/approx_kl": totals["approx_kl"] / tokens,
                "actor/ratio_max": totals["ratio_max"],
                "actor/ratio_first": totals["ratio_first"],
            }
        if "mismatch_abs" in totals:
            metrics |= {f"rollout/{name}": totals[name] for name in ("mismatch_abs", "mismatch_max", "mismatch_kl")}
        return metrics

    # --- resume ---

    def state(self) -> dict[str, Any]:
        return super().state() | {"kl": self.kl.state_dict(), "score_moments": self.score_moments.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.kl.load_state_dict(state["kl"])
        self.score_moments.load_state_dict(state["score_moments"])


def _mean_and_variance(sums: list[float]) -> tuple[float, float]:
    """From count, sum and sum of squares."""
    count, total, squares = max(1.0, sums[0]), sums[1], sums[2]
    mean = total / count
    return mean, max(0.0, squares / count - mean * mean)
