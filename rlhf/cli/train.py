"""The training verbs inside one rank: sft, reward, ppo, dpo.

Each names its roles, their engines and its module; everything else is `assemble`'s.
"""

from __future__ import annotations

import dataclasses

import lightning as L

from rlhf.callbacks.plain_text import PlainText
from rlhf.cli.assemble import Job
from rlhf.config import UserError
from rlhf.data.datamodule import RLHFData
from rlhf.data.split import Phase
from rlhf.engines.config import EngineSpec
from rlhf.logging import log
from rlhf.modules.critic_free import CriticFree
from rlhf.modules.dpo import DPO
from rlhf.modules.ppo import PPO
from rlhf.modules.reward import RewardModel
from rlhf.modules.scorers import RewardFunction, load_scorer
from rlhf.modules.sft import SFT
from rlhf.settings import RewardTrainingConfig, SFTConfig


def sft(job: Job) -> dict:
    """SFT of the actor."""
    return _supervised(job, "actor", "sft", job.cfg.sft)


def reward(job: Job) -> dict:
    """The reward model on pairs."""
    return _supervised(job, "reward", "reward", job.cfg.rm)


def _supervised(job: Job, role: str, phase: Phase, step: SFTConfig | RewardTrainingConfig) -> dict:
    job.tokenizer(role)
    options = {"loss_on": step.loss_on} if isinstance(step, SFTConfig) else {}
    data = job.data(phase, step.batch_size, step.epochs, steps=step.max_steps, eval_batches=job.cfg.trainer.eval_batches, **options)
    total = _steps(data, f"{'rm' if phase == 'reward' else phase}.batch_size")
    spec = job.trained_engine(
        role, step.optimizer, step.scheduler, total_steps=total, batch_size=step.batch_size, micro=step.micro_batch_size
    )
    L.seed_everything(job.cfg.seed, verbose=False)
    blueprints = {role: job.blueprint(role, kind="causal" if phase == "sft" else "scalar", trained=True)}
    module = SFT(step, blueprints) if isinstance(step, SFTConfig) else RewardModel(step, blueprints)
    return job.fit(module, job.strategy({role: spec}), data, total=total, extra=[])


def ppo(job: Job) -> dict:
    """PPO: actor and ref, a critic where the advantage needs one, a reward model where it is the reward's source."""
    cfg, ppo = job.cfg, job.cfg.ppo
    with_critic, with_model = ppo.advantage == "gae", ppo.reward_source != "function"
    job.tokenizer("actor")
    answers = job.rollout_callback(ppo.samples_per_prompt)
    for role in ("actor", "reward") if with_model else ("actor",):
        settings = getattr(cfg, role)
        if settings.init is None and not settings.model.pretrained:
            log.warning(
                "%s.init is not set: PPO starts from %s with random weights", role, "an actor" if role == "actor" else "a reward model"
            )
    data = job.data("ppo", ppo.batch_size, steps=ppo.iterations, eval_batches=0)
    callbacks: list[L.Callback] = [answers]
    if ppo.ptx_coef > 0:
        callbacks.append(PlainText(data, ppo.epochs * ppo.batch_size * ppo.samples_per_prompt))
    specs = _ppo_engines(job, data, with_critic=with_critic, with_model=with_model)
    L.seed_everything(cfg.seed, verbose=False)
    blueprints = {
        "actor": job.blueprint("actor", kind="causal", trained=True),
        "critic": job.blueprint("critic", kind="scalar", trained=True) if with_critic else None,
        "ref": None if cfg.ref.shared else job.blueprint("ref", kind="causal", trained=False, like="actor"),
        "reward": job.blueprint("reward", kind="scalar", trained=False) if with_model else None,
    }
    if ppo.greedy_rollouts:
        answers.rollout = dataclasses.replace(answers.rollout, temperature=0.0)
        log.warning("ppo.greedy_rollouts=true: every prompt gets its likeliest answer, so that PPO explores nothing")
    module = (PPO if with_critic else CriticFree)(
        ppo, {role: blueprint for role, blueprint in blueprints.items() if blueprint is not None}, temperature=cfg.rollout.temperature,
        seed=cfg.seed, function=_reward_function(job),
    )  # fmt: skip
    return job.fit(module, job.strategy(specs), data, total=data.total_steps, extra=callbacks)


def _ppo_engines(job: Job, data: RLHFData, *, with_critic: bool, with_model: bool) -> dict[str, EngineSpec]:
    cfg, ppo = job.cfg, job.cfg.ppo
    iterations = _steps(data, "ppo.batch_size")
    steps = iterations * ppo.epochs * (ppo.batch_size * ppo.samples_per_prompt // ppo.minibatch_size)
    sizes = {"batch_size": ppo.minibatch_size, "micro": ppo.micro_batch_size}
    actor_steps = max(1, steps - ppo.critic_warmup * steps // max(1, iterations))
    specs = {
        "actor": job.trained_engine(
            "actor", ppo.actor_optimizer, ppo.actor_scheduler, total_steps=actor_steps, passes=2 if ppo.ptx_coef > 0 else 1, **sizes
        )
    }
    if with_critic:
        specs["critic"] = job.trained_engine("critic", ppo.critic_optimizer, ppo.critic_scheduler, total_steps=steps, **sizes)
    if not cfg.ref.shared:
        specs["ref"] = job.frozen_engine(cfg.ref.zero)
    if with_model:
        specs["reward"] = job.frozen_engine(cfg.reward.zero)
    return specs


def _reward_function(job: Job) -> RewardFunction | None:
    ppo = job.cfg.ppo
    if ppo.reward_function is None:
        return None
    scorer = load_scorer("ppo.reward_function", ppo.reward_function, ppo.reward_function_kwargs)
    return RewardFunction(ppo.reward_function, scorer, job.decode)


def dpo(job: Job) -> dict:
    """The actor on the pairs of step 2, against a frozen ref: the weights it starts from, unless ref.init names others. With ref.shared they
    are held once."""
    cfg, step = job.cfg, job.cfg.dpo
    job.tokenizer("actor")
    if cfg.actor.init is None and not cfg.actor.model.pretrained:
        log.warning("actor.init is not set: DPO starts from an actor with random weights")
    data = job.data(
        "reward", step.batch_size, step.epochs, steps=step.max_steps, eval_batches=cfg.trainer.eval_batches, batch_key="dpo.batch_size"
    )
    total = _steps(data, "dpo.batch_size")
    specs = {
        "actor": job.trained_engine(
            "actor", step.optimizer, step.scheduler, total_steps=total, batch_size=step.batch_size, micro=step.micro_batch_size
        )
    }
    L.seed_everything(cfg.seed, verbose=False)
    blueprints = {"actor": job.blueprint("actor", kind="causal", trained=True)}
    if not cfg.ref.shared:
        specs["ref"] = job.frozen_engine(cfg.ref.zero)
        blueprints["ref"] = job.blueprint("ref", kind="causal", trained=False, like="actor")
    return job.fit(DPO(step, blueprints), job.strategy(specs), data, total=total, extra=[])


def _steps(data: RLHFData, key: str) -> int:
    if data.total_steps == 0:
        raise UserError(f"{key}={data.batch_size} is more than the rows of this step: lower it or add data")
    return data.total_steps
