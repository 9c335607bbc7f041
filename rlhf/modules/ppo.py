"""Step 3: PPO against the reward.

Names the networks and holds the arithmetic of one iteration; knows no engine beyond `backward` and `step`, does not say when or
how answers are generated, and has no data set. B sequences of this rank, P prompt tokens, A answer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from rlhf.algorithms.advantages import RunningMoments, gae, shape_rewards
from rlhf.algorithms.answers import AnswerMasks, answer_masks, answer_scores, shape_scores
from rlhf.algorithms.kl import kl_controller, kl_estimate
from rlhf.algorithms.logprobs import logprobs_and_entropy, token_logprobs
from rlhf.algorithms.losses import policy_loss, sft_loss, value_loss
from rlhf.algorithms.masked import masked_sum, masked_sums, mean_weights, whiten
from rlhf.algorithms.mismatch import importance_weights, mismatch
from rlhf.config import UserError
from rlhf.models.factory import Blueprint
from rlhf.modules.base import RoleModule, as_scalars, step_metrics
from rlhf.modules.heads import restart_head
from rlhf.modules.minibatches import minibatch_rows
from rlhf.modules.ppo_metrics import answer_metrics, learning_metrics
from rlhf.modules.scorers import RewardFunction
from rlhf.settings import PPOConfig
from rlhf.types import Experience, PromptBatch, Rollout, TextBatch


class Judged(NamedTuple):
    """What the networks say of an answer; zero where no token counts."""

    logprobs: Tensor  # (B, A) that the ratio is taken against: the actor's, or the sampler's
    ref_logprobs: Tensor  # (B, A)
    values: Tensor  # (B, A)
    scores: Tensor  # (B,) of the whole answer


class PPO(RoleModule):
    """KL-shaped rewards, GAE and clipped losses. Every mean is over the global minibatch, so that ranks and micro-batches change nothing,
    unless `ppo.loss_mean` is local."""

    trained: ClassVar[tuple[str, ...]] = ("actor", "critic")

    def __init__(
        self, ppo: PPOConfig, blueprints: dict[str, Blueprint], *, temperature: float, seed: int, function: RewardFunction | None = None
    ) -> None:  # fmt: skip
        """
        Args:
            temperature: of the rollouts; logprobs are those of the distribution that was sampled from (greedy rollouts: above 0, too).
            seed: of the order of minibatches, the same on every rank.
            function: `ppo.reward_function`, where `ppo.reward_source` asks for it.
        """
        super().__init__(blueprints)
        self.ppo = ppo
        self.temperature = temperature
        self.seed = seed
        self.function = function
        self.kl = kl_controller(ppo.kl_coef, ppo.kl_target, ppo.kl_horizon)
        self.score_moments = RunningMoments()
        self.stop_requested = False

    def configure_model(self) -> None:
        super().configure_model()
        if self.ppo.critic_head == "zeros":
            restart_head(self, "critic", "zeros")

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        rollout = batch.rollout
        assert rollout is not None, "a rollout callback fills the batch before the step"
        with self.clock("score"):
            experience, seen = self.score(rollout, batch.texts)
        self.metrics = seen  # there to be looked at, should learning fail
        with self.clock("train"):
            learned = self.learn(experience, batch.plain)
        self.iteration += 1
        self.tokens = {"generate": int(rollout.lengths.sum()), "train": int(rollout.mask.sum()) * self.ppo.epochs}
        self.metrics = seen | learned

    # --- experience ---

    @torch.no_grad()
    def score(self, rollout: Rollout, texts: Sequence[str] = ()) -> tuple[Experience, dict[str, float]]:
        """Turns answers into experience: logprobs of actor and ref, values, scores, KL-shaped rewards and advantages, once.

        Args:
            texts: the prompts, for a reward function.

        Raises:
            UserError: the sampler's logprobs are asked for, and the rollout has none; the reward function fails.
        """
        self._require_logprobs(rollout)
        for role in self.trained:
            getattr(self, role).train(self.ppo.score_in_train_mode)
        parts = [self._judge(micro) for micro in rollout.micro_batches(self.ppo.score_micro_batch_size or len(rollout))]
        judged = Judged(*(torch.cat(column) for column in zip(*parts, strict=True)))
        if self.function is not None:
            weight = self.ppo.reward_function_coef
            with self.strategy.together():
                judged = judged._replace(scores=judged.scores + weight * self.function(list(texts), rollout))
        self.scores = judged.scores
        tokens, masks = rollout.action_mask, self._masks(rollout)
        shaped = self._shape_scores(judged.scores, rollout)  # (B,)
        rewards = self._rewards(shaped, judged, masks.rewarded)  # (B, A)
        advantages, returns = self._advantages(rewards, judged.values, masks.rewarded)  # (B, A) each
        sums = {
            "rows": torch.tensor(float(len(tokens)), device=tokens.device),
            "tokens": tokens.sum(),
            "shaped": shaped.sum(),
            "k1": masked_sum(judged.logprobs - judged.ref_logprobs, tokens),
            "k3": masked_sum(kl_estimate(judged.logprobs, judged.ref_logprobs, "k3"), tokens),
            "ended": rollout.ended.sum(),
            "reward": masked_sum(rewards, masks.rewarded),
        }
        moments = {
            "score": masked_sums(judged.scores, torch.ones_like(rollout.ended)),
            "advantage": masked_sums(advantages, masks.trained),
            "return": masked_sums(returns, masks.trained),
        }
        if "critic" in self.trained:
            moments["error"] = masked_sums(returns - judged.values, masks.trained)
        importance, apart, largest = self._compare_with_sampler(rollout, judged.logprobs)
        seen = self._describe(sums | apart, moments) | largest
        if self.ppo.whiten_advantages:
            advantages = whiten(advantages, masks.trained, moments["advantage"], unbiased=self.ppo.whiten_unbiased)
        experience = Experience(
            ids=rollout.ids, mask=rollout.mask, action_mask=masks.trained, logprobs=judged.logprobs, values=judged.values,
            advantages=advantages, returns=returns, importance=importance,
            ref_logprobs=judged.ref_logprobs if self.ppo.kl_in == "loss" else None,
        )  # fmt: skip
        self.kl.update(seen["rollout/kl"], self.ppo.batch_size * self.ppo.samples_per_prompt)
        return experience, seen

    def _masks(self, rollout: Rollout) -> AnswerMasks:
        return answer_masks(
            rollout.action_mask, rollout.ended, pad_is_end=self.ppo.pad_is_end, score_slot=self.ppo.score_slot,
            min_answer_tokens=self.ppo.min_answer_tokens,
        )  # fmt: skip

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

    def _judge(self, rollout: Rollout) -> Judged:
        answers = rollout.ids[:, rollout.prompt_length :]  # (B, A)
        width = answers.shape[1] + 1  # row P - 1 of the logits predicts the first answer token
        masks = self._masks(rollout)
        used = rollout.action_mask | masks.rewarded  # (B, A)
        if self.ppo.old_logprobs == "rollout":
            assert rollout.logprobs is not None, "refused before"
            logprobs = rollout.logprobs.float()
        else:
            logprobs = token_logprobs(self.actor(rollout.ids, rollout.mask, last=width)[:, :-1], answers, temperature=self.temperature)
        ref_logprobs = token_logprobs(self.reference(rollout.ids, rollout.mask, last=width)[:, :-1], answers, temperature=self.temperature)
        values = self._values(rollout.ids, rollout.mask, answers.shape[1])
        scores = torch.zeros(len(answers), device=answers.device)  # (B,)
        if self.ppo.reward_source != "function":
            judged = self.reward(rollout.ids, rollout.mask)  # (B, P + A)
            scores = answer_scores(judged, rollout.mask[:, : rollout.prompt_length], masks.counted, score_from=self.ppo.score_from)
        return Judged(logprobs.where(used, 0), ref_logprobs.where(used, 0), values.where(used, 0), scores)

    def _values(self, ids: Tensor, mask: Tensor, width: int) -> Tensor:
        """(B, P + A) twice -> (B, A), A = width: what the critic expects before each answer token."""
        return self.critic(ids, mask)[:, -width - 1 : -1]

    def _advantages(self, rewards: Tensor, values: Tensor, rewarded: Tensor) -> tuple[Tensor, Tensor]:
        """(B, A) each -> advantages and returns, (B, A) each."""
        return gae(rewards, values, rewarded, gamma=self.ppo.gamma, gae_lambda=self.ppo.gae_lambda)

    def _shape_scores(self, scores: Tensor, rollout: Rollout) -> Tensor:  # (B,) -> (B,)
        ppo = self.ppo
        if ppo.reward_scaling or ppo.reward_centering:
            if ppo.reward_moments == "running" or self.score_moments.count == 0:
                self.score_moments.update(self.strategy.sum_over_ranks(masked_sums(scores, torch.ones_like(rollout.ended))))
            scores = self.score_moments.normalize(scores, center=ppo.reward_centering, scale=ppo.reward_scaling)
        return shape_scores(
            scores, rollout.ended, rollout.lengths, missing_eos_penalty=ppo.missing_eos_penalty, missing_eos_score=ppo.missing_eos_score,
            length_penalty=ppo.length_penalty, length_free=ppo.length_free, clip=ppo.reward_clip,
        )  # fmt: skip

    def _rewards(self, shaped: Tensor, judged: Judged, rewarded: Tensor) -> Tensor:
        """(B,) scores, (B, A) bool slots -> (B, A) the reward of each slot."""
        kl = kl_estimate(judged.logprobs, judged.ref_logprobs, self.ppo.kl_estimator, clamp=self.ppo.kl_clamp)  # (B, A)
        rewards = shape_rewards(shaped, kl, rewarded, kl_coef=self.kl.value if self.ppo.kl_in == "reward" else 0.0)  # (B, A)
        if not self.ppo.whiten_rewards:
            return rewards
        sums = self.strategy.sum_over_ranks(masked_sums(rewards, rewarded))
        return whiten(rewards, rewarded, sums, shift_mean=False, unbiased=self.ppo.whiten_unbiased)

    def _describe(self, sums: dict[str, Tensor], moments: dict[str, Tensor]) -> dict[str, float]:
        """Metrics of an iteration's answers over all ranks; `moments` are replaced by their global sums."""
        flat = torch.cat([torch.stack([v.double() for v in sums.values()]), *moments.values()])
        flat = self.strategy.sum_over_ranks(flat)
        for i, name in enumerate(moments):
            moments[name] = flat[len(sums) + 3 * i : len(sums) + 3 * i + 3]
        total = as_scalars(dict(zip(sums, flat, strict=False)))
        return answer_metrics(total, {name: m.tolist() for name, m in moments.items()}, kl_coef=self.kl.value)

    # --- learning ---

    def learn(self, experience: Experience, plain: TextBatch | None = None) -> dict[str, float]:
        """Several passes over one iteration's experience, minibatch by minibatch; actor and critic step together.

        Args:
            plain: text for the pre-training loss, as many rows as all passes together have.
        """
        for role in self.trained:
            getattr(self, role).train()
        texts = [None] * self._steps if plain is None else list(plain.micro_batches(len(plain) // self._steps))
        totals: dict[str, Tensor] = {}
        results: dict[str, Any] = {}
        largest = torch.zeros(2, device=self.device)
        first: tuple[dict[str, Tensor], Tensor] | None = None
        for epoch in range(self.ppo.epochs):
            for rows in self._minibatches(len(experience), epoch):
                sums, peaks = self._minibatch(experience.rows(rows.to(self.device)), results, texts.pop(0))
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
        return learning_metrics(as_scalars(totals)) | step_metrics(results)

    @property
    def _steps(self) -> int:
        """Optimizer steps of an iteration that is not stopped early."""
        return self.ppo.epochs * (self.ppo.batch_size * self.ppo.samples_per_prompt // self.ppo.minibatch_size)

    def _minibatches(self, rows: int, epoch: int) -> list[Tensor]:
        world, rank = self.strategy.world_size, self.global_rank
        seed = (self.seed * 1_000_003 + self.iteration) * 1_009 + epoch
        return minibatch_rows(
            rows * world, self.ppo.minibatch_size, rank=rank, world_size=world, seed=seed, shuffle=self.ppo.shuffle, first_pass=epoch == 0
        )

    def _minibatch(self, batch: Experience, results: dict[str, Any], plain: TextBatch | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """One optimizer step of actor and critic. Returns sums over all ranks, and (2,) the largest ratio and mismatch of this rank."""
        mask = batch.action_mask
        tokens, sequences = self.strategy.sum_over_ranks(torch.stack([mask.sum(), mask.any(dim=1).sum()]).double()).unbind()
        actor_learns = self.iteration >= self.ppo.critic_warmup
        learners = self.trained if actor_learns else ("critic",)
        sums: dict[str, Tensor] = {}
        largest = torch.zeros(2, device=self.device)
        micros = list(batch.micro_batches(self.ppo.micro_batch_size or len(batch)))
        words = self._plain_micro_batches(plain, len(micros)) if actor_learns else []
        for i, micro in enumerate(micros):
            weights = mean_weights(
                micro.action_mask, self.ppo.loss_mean, tokens=tokens, sequences=sequences, parts=len(micros) * self.strategy.world_size
            )  # (B, A)
            part: dict[str, Tensor] = self._learn_plain(*words[i]) if words else {}
            if actor_learns:
                losses, policy, peaks = self._policy_loss(micro)
                self.strategy.backward("actor", (losses * weights).sum())
                part |= policy
                largest = torch.maximum(largest, peaks)
            part |= self._learn_values(micro, weights)
            results.update(self.strategy.step(*learners))
            sums = {name: sums.get(name, 0) + x.detach().double() for name, x in part.items()}
        flat = self.strategy.sum_over_ranks(torch.stack(list(sums.values())))
        return dict(zip(sums, flat, strict=True)) | {"tokens": tokens, "steps": torch.ones_like(tokens)}, largest

    def _policy_loss(self, batch: Experience) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Clipped surrogate (Schulman et al. 2017, eq. 7) less the entropy bonus (eq. 9), plus the KL penalty where it is in the loss.

        Returns:
            The loss of each token (B, A), zero where masked; sums over tokens; and (2,) the largest ratio and mismatch with the sampler.
        """
        mask, width = batch.action_mask, batch.action_mask.shape[1]
        logits = self.actor(batch.ids, batch.mask, last=width + 1)[:, :-1]  # (B, A, V)
        logprobs, entropy = logprobs_and_entropy(logits, batch.ids[:, -width:], temperature=self.temperature)
        policy = policy_loss(
            logprobs, batch.logprobs, batch.advantages, mask, clip_range=self.ppo.clip_range, log_ratio_clamp=self.ppo.log_ratio_clamp,
            dual_clip=self.ppo.dual_clip, importance=batch.importance,
        )  # fmt: skip
        sums = {
            "policy_loss": masked_sum(policy.loss, mask),
            "entropy": masked_sum(entropy, mask),
            "clipped": masked_sum(policy.clipped.float(), mask),
            "approx_kl": masked_sum(batch.logprobs - logprobs.detach(), mask),
            "approx_kl_k3": masked_sum(kl_estimate(batch.logprobs, logprobs.detach(), "k3"), mask),
        }
        losses = policy.loss - self.ppo.entropy_coef * torch.where(mask, entropy, 0)  # (B, A)
        if batch.ref_logprobs is not None:
            # Masked slots are replaced before the estimate, as in the ratio.
            logprobs_or_zero, ref_or_zero = (torch.where(mask, x, 0) for x in (logprobs, batch.ref_logprobs))
            kl = kl_estimate(logprobs_or_zero, ref_or_zero, self.ppo.kl_estimator, clamp=self.ppo.kl_clamp)  # (B, A)
            sums["ref_kl"] = kl.sum()
            losses = losses + self.kl.value * kl
        peaks = torch.stack([policy.ratio.where(mask, 0).max(), torch.zeros_like(sums["entropy"].detach())])
        if self.ppo.old_logprobs == "rollout":
            apart = mismatch(logprobs, batch.logprobs, mask)
            sums |= {"mismatch_abs": apart.absolute, "mismatch_kl": apart.kl}
            peaks[1] = apart.largest
        return losses, sums, peaks

    def _learn_values(self, batch: Experience, weights: Tensor) -> dict[str, Tensor]:
        """The critic's gradients, each token's loss times its weight (B, A). Returns sums over tokens."""
        mask = batch.action_mask
        values = self._values(batch.ids, batch.mask, mask.shape[1])  # (B, A)
        value = value_loss(values, batch.values, batch.returns, mask, value_clip_range=self.ppo.value_clip_range)
        self.strategy.backward("critic", self.ppo.value_loss_coef * (value.loss * weights).sum())
        return {"value_loss": masked_sum(value.loss, mask), "value_clipped": masked_sum(value.clipped.float(), mask)}

    def _plain_micro_batches(self, plain: TextBatch | None, parts: int) -> list[tuple[TextBatch, Tensor]]:
        """Plain text in as many parts as the minibatch has, each with the tokens of all parts and ranks."""
        if plain is None:
            return []
        plain = plain.to(self.device)
        tokens = self.strategy.sum_over_ranks(plain.loss_mask[:, 1:].sum().double())
        return [(micro, tokens) for micro in plain.micro_batches(len(plain) // parts)]

    def _learn_plain(self, plain: TextBatch, tokens: Tensor) -> dict[str, Tensor]:
        """PPO-ptx (Ouyang et al. 2022, eq. 2): the mean next-token loss of the text, with a pass of its own that ends no optimizer step.

        The engine counts it as one more micro-batch, and losses are sums already: PPO's gradient stays what it is without.
        """
        loss = sft_loss(self.actor(plain.ids, plain.mask), plain.ids, plain.loss_mask).sum()
        self.strategy.backward("actor", self.ppo.ptx_coef * loss / tokens)
        self.strategy.step("actor")
        return {"plain_loss": loss, "plain_tokens": plain.loss_mask[:, 1:].sum()}

    # --- resume ---

    def state(self) -> dict[str, Any]:
        return super().state() | {"kl": self.kl.state_dict(), "score_moments": self.score_moments.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.kl.load_state_dict(state["kl"])
        self.score_moments.load_state_dict(state["score_moments"])
