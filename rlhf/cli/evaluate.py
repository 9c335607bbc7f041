"""The verb `evaluate` inside one rank: judges policies and a reward model on held-out rows.

Knows which parts are asked for; the measures are `rlhf.modules.comparison`'s.
"""

from __future__ import annotations

import json
from typing import Any

import lightning as L
from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf.cli.assemble import Job
from rlhf.config import UserError
from rlhf.data.split import Phase
from rlhf.modules.comparison import Comparison
from rlhf.modules.scorers import load_scorer

SHOWN_SAMPLES = 16
"""Rows kept in samples.jsonl."""


class _Answering(Callback):
    """Gives the comparison the engine that the rollout callback builds."""

    def __init__(self, job: Job) -> None:
        self.rollout = job.rollout_callback(samples=1)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, Comparison)
        self.rollout.setup(trainer, pl_module, stage)
        pl_module.engine = self.rollout.engine


def evaluate(job: Job) -> dict[str, Any]:
    cfg, evaluation = job.cfg, job.cfg.evaluation
    gold = None if evaluation.gold is None else load_scorer("evaluation.gold", evaluation.gold, evaluation.gold_kwargs)
    before = cfg.ref.init is not None
    rewarded = cfg.reward.init is not None
    if cfg.actor.init is None and not cfg.actor.model.pretrained:
        raise UserError("actor.init is not set: name the run directory or export to evaluate")
    if before and cfg.ref.init == cfg.actor.init:
        raise UserError("ref.init and actor.init are the same: there is nothing to compare")
    job.tokenizer("actor")
    roles = {"actor": ("causal", "actor", cfg.actor.zero)}
    if before:
        roles["ref"] = ("causal", "actor", cfg.ref.zero)
    if rewarded:
        roles["reward"] = ("scalar", "reward", cfg.reward.zero)
    specs = {role: job.frozen_engine(zero) for role, (_, _, zero) in roles.items()}
    L.seed_everything(cfg.seed, verbose=False)
    blueprints = {role: job.blueprint(role, kind=kind, trained=False, like=like) for role, (kind, like, _) in roles.items()}
    module = Comparison(blueprints, names=evaluation.names, gold=gold, decode=job.decode, samples=evaluation.samples, seed=evaluation.seed)
    sizes: dict[Phase, int] = {"ppo": evaluation.prompts, "reward": evaluation.pairs if rewarded else 0, "sft": evaluation.texts}
    loaders = []
    for phase, limit in sizes.items():
        if limit:
            loaders += job.data(phase, evaluation.batch_size, eval_batches=-(-limit // evaluation.batch_size)).val_dataloader()
    trainer = job.trainer(job.strategy(specs), [_Answering(job)], max_steps=-1)
    trainer.validate(module, dataloaders=loaders, verbose=False)
    metrics = module.results()
    trainer.strategy.teardown()
    if trainer.is_global_zero:
        with (job.run_dir / "samples.jsonl").open("w", encoding="utf-8") as f:
            f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in module.rows[:SHOWN_SAMPLES])
        for logger in trainer.loggers:
            logger.log_metrics(metrics, 0)
    return {"metrics": metrics, "seconds": {}, "report": {}}
