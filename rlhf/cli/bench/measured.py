"""What a measurement of the actor alone needs of a training: a module whose one step is the measurement, and a trainer around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from rlhf.callbacks.termination import Termination
from rlhf.cli.assemble import DTYPES, Job
from rlhf.config import UserError
from rlhf.engines.config import EngineSpec
from rlhf.engines.launcher import accelerator
from rlhf.logging import log
from rlhf.models.factory import Blueprint, check_buildable
from rlhf.models.source import network_config, weights_folder
from rlhf.modules.base import RoleModule
from rlhf.settings import ModelConfig

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


class Measured(RoleModule):
    """One step, which is the measurement. The actor is frozen."""

    def __init__(self, blueprint: Blueprint, measure: Callable[[Any], Any]) -> None:
        super().__init__({"actor": blueprint})
        self.measure = measure
        self.result: Any = None

    def configure_model(self) -> None:
        """Unsharded weights are made where they are used: nobody compares a benchmark's random weights, and a GPU draws them at once."""
        if self.strategy.specs["actor"].stage != 3:
            self.sharded = lambda role: self.strategy.root_device
        super().configure_model()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.result = self.measure(self.strategy)


class MeasuredTraining(Measured):
    """The same with an actor that an optimizer holds."""

    trained = ("actor",)


def run(job: Job, module: Measured, spec: EngineSpec) -> Any:
    """Builds the actor under its engine, measures in the one step of a training, and takes everything down again."""
    trainer = L.Trainer(
        accelerator=accelerator(job.cfg.trainer), devices=job.cfg.trainer.devices, num_nodes=job.cfg.trainer.num_nodes,
        strategy=job.strategy({"actor": spec}), callbacks=[Termination()], logger=False, max_epochs=1, limit_train_batches=1, use_distributed_sampler=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=str(job.run_dir),
    )  # fmt: skip
    L.seed_everything(job.cfg.seed, verbose=False)
    trainer.fit(module, train_dataloaders=DataLoader([0]))  # type: ignore[arg-type]
    return module.result


def actor_blueprint(job: Job, *, tokens: int) -> Blueprint:
    """The actor from its groups, without a tokenizer: special ids are those of its config.

    Args:
        tokens: what a sequence needs room for. Random weights get it; weights that were trained have what they have.

    Raises:
        UserError: the model's context is shorter, or its shape or adapters are none that can be.
    """
    settings = job.cfg.actor
    model: ModelConfig = settings.model
    folder = weights_folder(model, job.init_folder("actor"))
    ids = {} if folder else {name: model.shape.get(name) for name in SPECIAL}
    vocab_size = 1 if folder else model.shape["vocab_size"]
    config = network_config(model, folder, key="actor.model", dropout=settings.dropout, vocab_size=vocab_size, ids=ids)
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and context < tokens:
        if folder is not None:
            raise UserError(
                f"bench.prompt_tokens + bench.new_tokens = {tokens} passes the context of actor.model ({model.name}: {context} tokens): "
                "lower one of the two"
            )
        log.info("actor.model has random weights, so its context of %d tokens is stretched to %d", context, tokens)
        config.max_position_embeddings = tokens
    blueprint = Blueprint(
        kind="causal",
        config=config,
        folder=folder,
        lora=settings.lora,
        gradient_checkpointing=False,
        dtype=DTYPES[job.cfg.trainer.precision],
    )
    check_buildable(blueprint, "actor")
    return blueprint
