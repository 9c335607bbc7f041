"""A training verb without a trainer: its module, engines and data, for a loop that somebody else writes.

Knows how Lightning sets a module up, and does the same by hand; knows no verb's parts. Those come from the verb's own function, which is asked
to assemble them and not to train.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch

from rlhf.callbacks.export import Export
from rlhf.callbacks.rollout import RolloutCallback
from rlhf.callbacks.run_log import told
from rlhf.callbacks.start import Start
from rlhf.cli.assemble import Job
from rlhf.cli.train import dpo, ppo, reward, sft
from rlhf.config import UserError
from rlhf.data.datamodule import RLHFData
from rlhf.engines.strategy import RoleStrategy
from rlhf.modules.base import RoleModule
from rlhf.types import PromptBatch, Rollout

Recipe = Callable[[Job], dict[str, Any]]
"""What a verb runs: it assembles a module, engines and data, and returns what `job.fit` makes of them."""
RECIPES: dict[str, Recipe] = {"sft": sft, "reward": reward, "ppo": ppo, "dpo": dpo}


def recipe(cfg: Any) -> Recipe:
    """
    Raises:
        UserError: the verb trains nothing.
    """
    if cfg.verb in RECIPES:
        return RECIPES[cfg.verb]
    raise UserError(f"rlhf {cfg.verb} has no loop to write: those that train are {', '.join(RECIPES)}")


class Unfitted(Job):
    """A job that hands its parts over where it would train."""

    def fit(self, module: RoleModule, strategy: RoleStrategy, data: RLHFData, *, total: int, extra: list[L.Callback]) -> dict[str, Any]:
        return {"job": self, "module": module, "strategy": strategy, "data": data, "total": total, "extra": extra}


class Loop:
    """The parts of a training verb, ready to be called.

    Attributes:
        job: what they were assembled by.
        module: what is learned: an `SFT`, `RewardModel`, `PPO`, `CriticFree` or `DPO`. Networks stand in it under their role's names.
        strategy: the engines: `backward`, `step`, `network`, sums over ranks.
        data: the rows.
        total: iterations that the learning-rate schedules are made for.
        metrics: those of the last iteration that was recorded.
        seconds: of each phase, over all iterations.
    """

    def __init__(self, job: Job, module: RoleModule, strategy: RoleStrategy, data: RLHFData, total: int, extra: list[L.Callback]) -> None:
        self.job, self.module, self.strategy, self.data, self.total = job, module, strategy, data, total
        self.trainer = job.trainer(strategy, [], max_steps=total)
        self.metrics: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self._told: dict[str, float] = {}
        self._rollouts = next((one for one in extra if isinstance(one, RolloutCallback)), None)
        self._others = [one for one in extra if one is not self._rollouts]

    def set_up(self) -> None:
        """What Lightning does before the first step, in its order: process group, networks, engines, random streams."""
        self.strategy.connect(self.module)
        self.module.trainer = self.trainer
        self.strategy.setup_environment()
        self.module.to(self.strategy.root_device)  # there is no network yet: it only learns of its device
        for callback in self._callbacks:
            callback.setup(self.trainer, self.module, "fit")
        self.module.configure_model()
        self.strategy.setup(self.trainer)
        for callback in [Start(self.job.cfg.seed, resume_from=None), *self._callbacks]:
            callback.on_train_start(self.trainer, self.module)
        self.module.train()

    @property
    def _callbacks(self) -> list[L.Callback]:
        return [*([] if self._rollouts is None else [self._rollouts]), *self._others]

    # --- what a loop is made of ---

    def batches(self) -> Iterator[Any]:
        """This rank's share of every global batch, on its device, in the order of the verb. Each counts as one iteration, which ends when the
        next batch is asked for."""
        with torch.random.fork_rng(devices=[]):  # a loader draws a seed, which would make answers other than those of a trainer's run
            loaded = iter(self.data.train_dataloader())
        for number, batch in enumerate(loaded):
            batch = batch.to(self.strategy.root_device)
            for callback in self._others:
                callback.on_train_batch_start(self.trainer, self.module, batch, number)
            yield batch
            self.module.iteration = number + 1

    def generate(self, batch: PromptBatch) -> Rollout:
        """Lets the actor answer a batch of prompts with `rollout.engine`. The answers are in `batch.rollout` as well.

        Raises:
            UserError: the verb answers no prompts; or the engine cannot.
        """
        if self._rollouts is None:
            raise UserError(f"rlhf {self.job.cfg.verb} answers no prompts, so that there is nothing to generate")
        self.module.metrics = {}
        self._rollouts.on_train_batch_start(self.trainer, self.module, batch, self.module.iteration)
        self._rollouts.on_train_batch_end(self.trainer, self.module, None, batch, self.module.iteration)
        self._told = self.module.metrics
        assert batch.rollout is not None, "filled by the callback"
        return batch.rollout

    def record(self, metrics: Mapping[str, float], step: int) -> None:
        """Hands numbers to metrics.csv and the other loggers, with what the rollout engine says of its last answers and the seconds of the
        phases since the last call.

        Args:
            step: the number of the iteration, from 1; every `trainer.log_every`-th is written.
        """
        seconds, _ = self.module.clock.drain()
        for phase, value in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + value
        row = {**self._told, **metrics, **{f"time/{phase}": value for phase, value in seconds.items()}}
        self.metrics = {name: value for name, value in row.items() if math.isfinite(value)}
        if step % self.job.cfg.trainer.log_every == 0:
            for logger in self.trainer.loggers:
                logger.log_metrics(row, step)

    def export(self) -> None:
        """Writes every trained role to `export/ROLE` of the run directory, in HF layout. All ranks must call it."""
        Export(self.job.run_dir / "export", self.job._tokenizer).on_train_end(self.trainer, self.module)


@contextmanager
def loop(job: Job, recipe: Recipe) -> Iterator[Loop]:
    """The parts that a recipe assembles for a job, set up; the engines are released on leaving.

    Raises:
        UserError: a key asks for what only a trainer does; or as the recipe.
    """
    _require_no_trainer(job)
    one = Loop(**recipe(Unfitted(job.config, job.cfg)))
    try:
        with told(one.trainer.loggers) as ending:
            one.set_up()
            yield one
            ending.metrics, ending.seconds = one.metrics, one.seconds
    finally:
        one.strategy.teardown()


def _require_no_trainer(job: Job) -> None:
    trainer = job.cfg.trainer
    asked = {
        "callbacks": ",".join(job.config["callbacks"]) or None,
        "resume": "true" if job.cfg.resume else None,
        "trainer.checkpoint_every": trainer.checkpoint_every,
        "trainer.eval_every": trainer.eval_every,
    }
    for key, value in asked.items():
        if value is not None:
            raise UserError(f"{key}={value} is the trainer's, which does not run in a loop of your own: leave it out, or use job.fit")
