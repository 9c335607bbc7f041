"""PPO: every detail that published code does one way or another is a key.

Types and ranges only: the values live in conf/ppo, one file a preset, each with its source.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rlhf.settings.ranges import require, require_at_least_one, require_in, require_one_of
from rlhf.settings.roles import OptimizerConfig, SchedulerConfig

ESTIMATORS = ("gae", "rloo", "grpo", "reinforce_pp")
"""Advantages of this package; any other is the import path of the user's own."""


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Hyperparameters of one PPO run. docs/ppo_details.md compares the presets."""

    # sizes
    iterations: int | None
    """PPO iterations. None: one pass over the prompts."""
    batch_size: int
    """Prompts of one iteration, over all ranks."""
    samples_per_prompt: int
    minibatch_size: int
    """Sequences of one optimizer step, over all ranks."""
    micro_batch_size: int | None
    """Sequences of one training forward pass on one rank. None: the rank's whole share of the minibatch."""
    score_micro_batch_size: int | None
    """Sequences of one scoring forward pass on one rank. None: all of them."""
    epochs: int
    """Passes over one iteration's experience."""
    shuffle: Literal["rows", "minibatches", "none"]
    """Each pass draws new minibatches; or keeps the minibatches and changes their order, after the first pass; or changes nothing."""

    # answers
    greedy_rollouts: bool
    """The actor answers with its likeliest tokens, so that nothing is explored; log-probabilities are still those at temperature 1."""
    pad_is_end: bool
    """The end-of-turn token counts as padding, as where a tokenizer has one token for both: no loss looks at it, and the reward model
    reads its score one token earlier."""
    min_answer_tokens: int
    """Answers with fewer tokens (those that count, see pad_is_end) are left out of both losses."""

    # KL
    kl_coef: float
    kl_in: Literal["reward", "loss"]
    """The penalty is taken off the reward of each token, or added to the actor's loss."""
    kl_estimator: Literal["k1", "k2", "k3"]
    kl_clamp: float | None
    """Bound on |log p_actor - log p_ref| of a token before the estimate. None: off."""
    kl_target: float | None
    """Adaptive KL controller: mean KL of a sequence it steers to. None: `kl_coef` stays fixed."""
    kl_horizon: int
    """Sequences over which the adaptive controller reacts."""

    # reward
    reward_source: Literal["model", "function", "both"]
    """What scores an answer: the reward model, a Python function (then no reward model is loaded), or their sum."""
    reward_function: str | None
    """Import path of f(prompts, answers, ended) -> a score for each answer, texts in lists; or of a class whose objects are called so."""
    reward_function_kwargs: dict[str, Any]
    """Keywords for `reward_function` where it is a class."""
    reward_function_coef: float
    """reward_source=both: weight of the function's score beside the model's."""
    score_from: Literal["end", "mean"]
    """What the reward model says of an answer: its output at the last token, or the mean of its outputs over the answer's tokens."""
    score_slot: Literal["end", "past_end"]
    """The token that is rewarded with the score: the last that counts (of an answer without any, its end of turn), or the one after it,
    where there is one. Advantages run through that one too, but no loss looks at it."""
    reward_scaling: bool
    """Divides scores by a standard deviation of scores, see reward_moments."""
    reward_centering: bool
    """Takes a mean of scores off the scores, see reward_moments."""
    reward_moments: Literal["running", "reference"]
    """Whose mean and standard deviation: all scores so far, or those of the first iteration's answers, which the reference gave."""
    reward_clip: float | None
    """Bound on |score|, after all else that is done to it."""
    missing_eos_penalty: float | None
    """Subtracted from the score of an answer that did not end. None: off."""
    missing_eos_score: float | None
    """Replaces the score of an answer that did not end. None: off."""
    length_penalty: float
    """Subtracted from the score for each answer token beyond `length_free`."""
    length_free: int
    whiten_rewards: bool
    """Scales the rewards of all tokens, KL penalty included, to variance 1 over the global batch, around their mean, which stays."""

    # advantages
    advantage: str
    """gae, rloo, grpo, reinforce_pp, or the import path of an estimator f(rewards, mask, samples) -> advantages of your own
    (docs/own_pipeline.md). gae needs a critic; the others have none, so that keys of the critic and its losses say nothing. rloo: an
    answer's return less the mean return of the prompt's other answers. grpo: less the mean of them all, over their standard deviation.
    reinforce_pp: the rewards from a token on."""
    gamma: float
    """gae, reinforce_pp: discount of a reward one token later."""
    gae_lambda: float
    """gae: 0 trusts the critic after one token, 1 sums the rewards to the end."""
    whiten_advantages: bool
    """Mean 0 and variance 1 over the tokens of the global batch."""
    whiten_unbiased: bool
    """Variances (of whitening, of a group's returns under grpo) are divided by the count less one instead of the count."""

    # losses
    loss_mean: Literal["global", "local", "sequence"]
    """What a loss is averaged over: the tokens of the global minibatch; those of each micro-batch on each rank, then over these (so that
    ranks and micro-batches change the gradient); or the tokens of each sequence, then over sequences."""
    clip_range: float
    dual_clip: float | None
    """Bounds the loss of a token with negative advantage by this many times |advantage|. None: off."""
    log_ratio_clamp: float | None
    """Bound on |log ratio| before the exponential, so that it stays finite. None: off."""
    value_clip_range: float | None
    value_loss_coef: float
    """Factor of the value loss, which is half the squared error."""
    entropy_coef: float
    ptx_coef: float
    """Weight of the next-token loss on the plain text of data.ptx, as many rows of it as sequences in each optimizer step. 0: off."""
    max_kl: float | None
    """Skips the rest of an iteration's minibatches once the mean k1 KL to the old policy passes this. None: off."""
    old_logprobs: Literal["actor", "rollout"]
    """Log-probabilities that the policy's ratio is taken against: the actor's, from a forward pass over the finished answers, or those
    that the rollout engine computed while it sampled, which saves that pass. `rollout` needs rollout.engine=hybrid_engine."""
    score_in_train_mode: bool
    """Dropout acts where old log-probabilities and values are computed, so that ratios do not start at 1."""
    importance_cap: float | None
    """Truncated importance sampling, for old_logprobs=actor: the policy loss of a token is multiplied by min(p_actor / p_rollout,
    this cap), both before the first update. Needs rollout.engine=hybrid_engine. None: off."""

    # critic
    critic_warmup: int
    """Iterations in which only the critic learns."""
    critic_init: Literal["reward", "actor"]
    critic_head: Literal["init", "zeros"]
    """The critic's head before the first step: that of the weights it starts from (random for critic_init=actor), or zeros."""

    actor_optimizer: OptimizerConfig
    actor_scheduler: SchedulerConfig
    critic_optimizer: OptimizerConfig
    critic_scheduler: SchedulerConfig

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_pairs()
        total = self.batch_size * self.samples_per_prompt
        require(
            total % self.minibatch_size == 0,
            f"minibatch_size must divide batch_size x samples_per_prompt = {total}, got {self.minibatch_size}",
        )

    def _check_ranges(self) -> None:
        """Each key by itself."""
        require_at_least_one(
            batch_size=self.batch_size, samples_per_prompt=self.samples_per_prompt, minibatch_size=self.minibatch_size,
            epochs=self.epochs, kl_horizon=self.kl_horizon,
        )  # fmt: skip
        for name in ("micro_batch_size", "score_micro_batch_size", "importance_cap"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1 or null, got {value}")
        for name in (
            "kl_coef", "value_loss_coef", "ptx_coef", "critic_warmup", "clip_range", "min_answer_tokens", "length_free", "length_penalty",
        ):  # fmt: skip
            require_in(name, getattr(self, name), 0)
        require_in("gamma", self.gamma, 0, 1)
        require_in("gae_lambda", self.gae_lambda, 0, 1)
        for name in ("kl_target", "kl_clamp", "reward_clip", "value_clip_range", "max_kl", "log_ratio_clamp"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} must be positive or null, got {value}")
        require(self.dual_clip is None or self.dual_clip > 1, f"dual_clip must be above 1 or null, got {self.dual_clip}")
        require(self.iterations is None or self.iterations >= 1, f"iterations must be at least 1 or null, got {self.iterations}")
        require_one_of("shuffle", self.shuffle, ("rows", "minibatches", "none"))
        require_one_of("kl_in", self.kl_in, ("reward", "loss"))
        require_one_of("kl_estimator", self.kl_estimator, ("k1", "k2", "k3"))
        require(
            self.advantage in ESTIMATORS or "." in self.advantage,
            f"advantage must be one of {', '.join(ESTIMATORS)}, or the import path module.name of an estimator, got {self.advantage!r}",
        )
        require_one_of("reward_source", self.reward_source, ("model", "function", "both"))
        require_one_of("score_from", self.score_from, ("end", "mean"))
        require_one_of("score_slot", self.score_slot, ("end", "past_end"))
        require_one_of("reward_moments", self.reward_moments, ("running", "reference"))
        require_one_of("loss_mean", self.loss_mean, ("global", "local", "sequence"))
        require_one_of("old_logprobs", self.old_logprobs, ("actor", "rollout"))
        require_one_of("critic_init", self.critic_init, ("reward", "actor"))
        require_one_of("critic_head", self.critic_head, ("init", "zeros"))

    def _check_pairs(self) -> None:
        """Keys that contradict each other, or of which one would say nothing."""
        require(
            self.importance_cap is None or self.old_logprobs == "actor",
            f"importance_cap={self.importance_cap} goes with old_logprobs=actor only: with old_logprobs=rollout the ratio already is against "
            "the sampler",
        )
        require(
            self.score_slot == "end" or self.pad_is_end or self.old_logprobs == "actor",
            "score_slot=past_end with pad_is_end=false rewards a slot behind the answer, of which old_logprobs=rollout knows no "
            "log-probability: choose old_logprobs=actor",
        )
        require(
            self.kl_in == "reward" or self.kl_target is None,
            f"kl_target={self.kl_target} steers the penalty in the reward, but kl_in=loss: set kl_target to null or kl_in to reward",
        )
        require(
            self.kl_in == "reward" or self.kl_estimator != "k1",
            "kl_in=loss needs kl_estimator k2 or k3: the gradient of k1 is zero on average, so that it would hold nothing back",
        )
        require(
            self.kl_target is None or self.kl_coef > 0,
            f"kl_target={self.kl_target} multiplies kl_coef, which stays 0 for ever: give kl_coef a value above 0",
        )
        require(
            self.missing_eos_penalty is None or self.missing_eos_score is None,
            "missing_eos_penalty and missing_eos_score exclude each other: the one lowers a score that the other replaces",
        )
        require(
            self.length_free == 0 or self.length_penalty > 0,
            f"length_free={self.length_free} acts with length_penalty above 0 only: set it to 0",
        )
        require(
            self.reward_moments == "running" or self.reward_scaling or self.reward_centering,
            "reward_moments=reference acts with reward_scaling or reward_centering only: turn one of them on",
        )
        require(
            not self.whiten_unbiased or self.whiten_advantages or self.whiten_rewards or self.advantage == "grpo",
            "whiten_unbiased=true acts with whiten_advantages, whiten_rewards or advantage=grpo only: set it to false",
        )
        require(
            not self.greedy_rollouts or self.samples_per_prompt == 1,
            f"greedy_rollouts=true gives samples_per_prompt={self.samples_per_prompt} times the same answer: set samples_per_prompt to 1",
        )
        self._check_reward_function()
        self._check_critic_free()

    def _check_reward_function(self) -> None:
        if self.reward_source == "model":
            require(
                self.reward_function is None,
                f"reward_function={self.reward_function} is called with reward_source=function or both only: set reward_source, or the "
                "function to null",
            )
        else:
            require(
                self.reward_function is not None,
                f"reward_source={self.reward_source} needs reward_function, the import path of f(prompts, answers, ended) -> scores",
            )
        require(
            self.reward_function is not None or not self.reward_function_kwargs,
            "reward_function_kwargs are for a class that reward_function names: set it",
        )
        require(
            self.reward_function_coef == 1 or self.reward_source == "both",
            f"reward_function_coef={self.reward_function_coef:g} weighs the function against the model: set reward_source=both",
        )

    def _check_critic_free(self) -> None:
        if self.advantage == "gae":
            return
        require(
            self.advantage not in ("rloo", "grpo") or self.samples_per_prompt > 1,
            f"advantage={self.advantage} compares the answers to one prompt, but samples_per_prompt=1: raise it to 2 or more",
        )
        takes = "an answer's rewards as one sum" if self.advantage in ESTIMATORS else "no discount"
        require(
            self.advantage == "reinforce_pp" or self.gamma == 1,
            f"gamma={self.gamma:g} discounts later rewards, but advantage={self.advantage} takes {takes}: set it to 1",
        )
        without = f"advantage={self.advantage} has no critic"
        require(self.critic_warmup == 0, f"critic_warmup={self.critic_warmup}, but {without}: set it to 0")
        require(self.critic_init == "reward", f"critic_init={self.critic_init}, but {without}: leave it at reward")
        require(self.critic_head == "init", f"critic_head={self.critic_head}, but {without}: leave it at init")
