"""From checked settings to the objects of one job: tokenizer, data, networks, engines, callbacks, trainer.

Knows which parts a verb needs and how they fit; every part knows only itself.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import shlex
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loops.fit_loop import _FitLoop as FitLoop

from rlhf.callbacks.checkpoint import Checkpoint
from rlhf.callbacks.evaluation import Evaluate
from rlhf.callbacks.export import Export
from rlhf.callbacks.metrics import WriteMetrics
from rlhf.callbacks.rollout import RolloutCallback
from rlhf.callbacks.run_log import told
from rlhf.callbacks.start import Start
from rlhf.callbacks.termination import Termination
from rlhf.callbacks.wandb_log import WandbLog
from rlhf.cli import rundir
from rlhf.cli.errors import Interrupted
from rlhf.cli.folders import require_folders
from rlhf.cli.loggers import build_loggers, with_context
from rlhf.cli.wandb_settings import require_key
from rlhf.config import UserError, locate, nearest
from rlhf.data.datamodule import RLHFData
from rlhf.data.phases import sft_corpus
from rlhf.data.split import Phase
from rlhf.data.tokenizer import end_of_turn_id, load_tokenizer
from rlhf.engines.checkpoint import checkpoints, verify
from rlhf.engines.config import EngineSpec, Training
from rlhf.engines.launcher import accelerator
from rlhf.engines.strategy import RoleStrategy
from rlhf.logging import log
from rlhf.models.factory import Blueprint, check_buildable
from rlhf.models.source import EXPORTS, find_export, network_config, weights_folder
from rlhf.modules.base import RoleModule
from rlhf.rules import critic_start
from rlhf.settings import OptimizerConfig, RoleConfig, SchedulerConfig, ZeroConfig

ROLES = ("actor", "critic", "ref", "reward")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Job:
    """The parts of one job, built on first use from its settings."""

    def __init__(self, config: Mapping[str, Any], cfg: Any) -> None:
        check_targets(config)
        require_key(config)
        self.config = config
        self.cfg = cfg
        self.run_dir = Path(cfg.run_dir)
        self.world = cfg.trainer.devices * cfg.trainer.num_nodes
        self._tokenizer: Any = None

    # --- tokenizer and data ---

    def tokenizer(self, role: str) -> Any:
        """The one tokenizer of the run: that of the weights the role starts from, or of its model.

        Raises:
            UserError: another role starts from weights with another vocabulary.
        """
        if self._tokenizer is None:
            self._tokenizer = self._load_tokenizer(role)
            for other in ("actor", "critic", "reward"):
                starts = other != role and getattr(getattr(self.cfg, other, None), "init", None) is not None
                if starts and self._load_tokenizer(other).get_vocab() != self._tokenizer.get_vocab():
                    raise UserError(f"{other}.init and {role} have different tokenizers: train both from models with one vocabulary")
        return self._tokenizer

    def _load_tokenizer(self, role: str) -> Any:
        settings: RoleConfig = getattr(self.cfg, role)
        model, chat = settings.model, self.cfg.data.chat
        folder = self.init_folder(role)
        if folder is not None:
            model = dataclasses.replace(model, tokenizer=str(folder))
        trains = model.tokenizer is not None and model.tokenizer.startswith("train:")
        return load_tokenizer(model, chat, sft_corpus(self.cfg.data) if trains else None)

    def decode(self, ids: torch.Tensor) -> list[str]:  # (B, A) -> B texts
        """(B, A) token ids -> B texts, special tokens left out. Call `tokenizer` first."""
        return self._tokenizer.batch_decode(ids.tolist(), skip_special_tokens=True)

    def data(self, phase: Phase, batch_size: int, epochs: float = 1.0, **options: Any) -> RLHFData:
        """The rows of a step, read or built, as this rank's share. Call `tokenizer` first.

        Args:
            phase: sft, reward or ppo: whose rows, in which form.
            options: as for `RLHFData`: `steps`, `eval_batches`, `batch_key`, ...

        Raises:
            UserError: a source cannot be read, no row is left, or the batch does not divide by the ranks.
        """
        data = RLHFData(
            self.cfg.data, self._tokenizer, phase, batch_size=batch_size, epochs=epochs, seed=self.cfg.seed,
            rank=int(os.environ["RANK"]), world=self.world, **options,
        )  # fmt: skip
        return data.prepare()

    # --- networks and engines ---

    def init_folder(self, role: str) -> Path | None:
        """The export a role starts from, if it has one."""
        init = getattr(self.cfg, role).init
        if init is None and role == "ref":
            init = self.cfg.actor.init
        if init is None and role == "critic" and (first := critic_start(self.cfg)) is not None:
            init = getattr(self.cfg, first).init
        return None if init is None else find_export(init, *EXPORTS[role], key=f"{role}.init")

    def blueprint(self, role: str, *, kind: str, trained: bool, like: str | None = None) -> Blueprint:
        """What a role's network is built of. Call `tokenizer` first.

        Args:
            like: the role whose model, dropout and so on are taken, for a role that only copies it.

        Raises:
            UserError: its shape makes no network, or its adapters cannot be put where they are asked for.
        """
        settings: RoleConfig = getattr(self.cfg, like or role)
        folder = weights_folder(settings.model, self.init_folder(role))
        tokenizer = self._tokenizer
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": end_of_turn_id(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        config = network_config(
            settings.model, folder, key=f"{like or role}.model", dropout=settings.dropout, vocab_size=len(tokenizer), ids=ids
        )
        blueprint = Blueprint(
            kind=kind, config=config, folder=folder, lora=settings.lora if trained else None,  # type: ignore[arg-type]
            gradient_checkpointing=settings.gradient_checkpointing and trained, dtype=DTYPES[self.cfg.trainer.precision],
        )  # fmt: skip
        check_buildable(blueprint, like or role)
        return blueprint

    def frozen_engine(self, zero: ZeroConfig) -> EngineSpec:
        """A role that only answers is sharded if its options say stage 3, and whole otherwise."""
        plain = dataclasses.replace(
            zero, stage=3 if zero.stage == 3 else 0, offload_optimizer=False, quantized_weights=False, offload_params=zero.offload_params
        )
        return EngineSpec(zero=plain, precision=self.cfg.trainer.precision, training=None, reloadable=True)

    def trained_engine(
        self, role: str, optimizer: OptimizerConfig, scheduler: SchedulerConfig, *, total_steps: int, batch_size: int, micro: int | None,
        passes: int = 1,
    ) -> EngineSpec:  # fmt: skip
        """The engine of a role that learns: its ZeRO stage, its optimizer, and how many backward passes a step has.

        Args:
            batch_size: rows of one optimizer step, over all ranks.
            micro: rows of one backward pass on one rank; None: the rank's whole share.
            passes: backward passes for each of them.
        """
        settings: RoleConfig = getattr(self.cfg, role)
        share = batch_size // self.world
        training = Training(
            optimizer=optimizer, scheduler=scheduler, total_steps=total_steps, lora=settings.lora, micro_batch_size=micro or share,
            accumulation=passes * (share // (micro or share)),
        )  # fmt: skip
        reloadable = settings.lora.rank > 0 and (self.init_folder(role) is not None or settings.model.pretrained)
        return EngineSpec(zero=settings.zero, precision=self.cfg.trainer.precision, training=training, reloadable=reloadable)

    def strategy(self, specs: dict[str, EngineSpec]) -> RoleStrategy:
        """The strategy that puts these roles into their engines."""
        trainer = self.cfg.trainer
        timeout = timedelta(minutes=self.cfg.launcher.timeout_minutes)
        return RoleStrategy(specs=specs, align_overflow=trainer.align_overflow, timeout=timeout, threads=trainer.threads)

    # --- trainer ---

    def resume_from(self) -> Path | None:
        """The newest checkpoint to go on from, verified; None: the run starts from its beginning."""
        found = checkpoints(self.run_dir / "checkpoints") if self.cfg.resume else []
        if not found:
            return None
        verify(found[-1], world_size=self.world)
        return found[-1]

    def rollout_callback(self, samples: int) -> RolloutCallback:
        """What answers the prompts of a batch before its step, `samples` times each, by `cfg.rollout`.

        Raises:
            UserError: the folder that it reads answers from, or saves them to, cannot be.
        """
        tokenizer, rollout = self._tokenizer, self.cfg.rollout
        require_folders(rollout, make=True)
        if rollout.max_out_tokens is None:
            rollout = dataclasses.replace(rollout, max_out_tokens=self.cfg.data.max_prompt_tokens + rollout.max_new_tokens)
        end, pad = end_of_turn_id(tokenizer), tokenizer.pad_token_id
        return RolloutCallback(rollout, samples=samples, end_id=end, pad_id=pad, tp=self.cfg.tp.size)

    def fit(self, module: RoleModule, strategy: RoleStrategy, data: RLHFData, *, total: int, extra: list[L.Callback]) -> dict[str, Any]:
        """Trains for `total` iterations and returns the summary's metrics and seconds."""
        resume_from = self.resume_from()
        if resume_from is not None:
            data.start = step_of(resume_from)
        write = WriteMetrics(self.cfg.trainer.log_every)
        held_out = data.val_dataloader() if module.judges_batches else []
        evaluate = [Evaluate(loader, every=self.cfg.trainer.eval_every) for loader in held_out]
        checkpoint = Checkpoint(
            self.run_dir / "checkpoints", every=self.cfg.trainer.checkpoint_every, keep=self.cfg.trainer.keep_checkpoints
        )
        early, late = self._user_callbacks(total)
        callbacks = [
            Start(self.cfg.seed, resume_from=resume_from), *extra, *early, write, *late,
            *evaluate, checkpoint, Export(self.run_dir / "export", self._tokenizer),
        ]  # fmt: skip
        trainer = self.trainer(strategy, callbacks, max_steps=total - data.start)
        if data.start == total:
            trainer.fit_loop = NothingLeft(trainer, max_epochs=1)
        with told(trainer.loggers) as ending:
            try:
                trainer.fit(module, datamodule=data)
            except SystemExit as error:  # what Lightning makes of a KeyboardInterrupt, once it has taken everything down
                raise KeyboardInterrupt from error
            if checkpoint.saved is not None:
                run_dir = shlex.quote(f"run_dir={self.run_dir}")
                raise Interrupted(f"stopped at iteration {module.iteration} and saved {checkpoint.saved}; go on with resume=true {run_dir}")
            if module.iteration < total:
                log.warning("a callback stopped the training at iteration %d of %d", module.iteration, total)
            ending.metrics, ending.seconds = dict(write.last), dict(write.seconds)
            for judged in evaluate:
                ending.metrics |= {f"{name}_before": value for name, value in judged.first.items()} | judged.last
            self._log_models(trainer.loggers, ending.metrics)
        return {"metrics": ending.metrics, "seconds": ending.seconds, "report": data.report}

    def _log_models(self, loggers: list[Any], metrics: Mapping[str, float]) -> None:
        for logger in loggers:
            if isinstance(logger, WandbLog):
                logger.log_models(self.run_dir / "export", {"seed": self.cfg.seed, "commit": rundir.commit(), "metrics": dict(metrics)})

    def trainer(self, strategy: RoleStrategy, callbacks: list[L.Callback], *, max_steps: int) -> L.Trainer:
        """Lightning's trainer with the loggers of the run; a negative `max_steps` lets it validate everything."""
        return L.Trainer(
            accelerator=accelerator(self.cfg.trainer), devices=self.cfg.trainer.devices, num_nodes=self.cfg.trainer.num_nodes,
            strategy=strategy, callbacks=[Termination(), *callbacks], logger=self.loggers(), max_epochs=1, limit_train_batches=max(0, max_steps),
            limit_val_batches=1.0 if max_steps < 0 else 0, num_sanity_val_steps=0, use_distributed_sampler=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=str(self.run_dir), log_every_n_steps=1,
        )  # fmt: skip

    def loggers(self) -> list[Any]:
        """metrics.csv and those of the logger group. W&B hears which exports the run starts from."""
        checkpoint = self.resume_from()
        again = 0 if self.cfg.resume else None  # resumed before its first checkpoint
        loggers = build_loggers(self.config, first_step=again if checkpoint is None else step_of(checkpoint) + 1)
        inits = {role: self.init_folder(role) for role in ROLES if getattr(getattr(self.cfg, role, None), "init", None) is not None}
        for logger in loggers:
            if isinstance(logger, WandbLog):
                logger.use_models({role: folder for role, folder in inits.items() if folder is not None})
        return loggers

    def _user_callbacks(self, total: int) -> tuple[list[L.Callback], list[L.Callback]]:
        """The callbacks group: those that measure come before metrics are written, those that show come after."""
        context = {
            "folder": self.run_dir, "decode": self.decode, "tokenizer": self._tokenizer, "title": self.cfg.verb, "total": total,
            "hardware": self.cfg.hardware, "log_every": self.cfg.trainer.log_every,
        }  # fmt: skip
        early: list[L.Callback] = []
        late: list[L.Callback] = []
        for node in self.config["callbacks"].values():
            callback = with_context(node, context)
            (early if getattr(callback, "measures", False) else late).append(callback)
        return early, late


class NothingLeft(FitLoop):
    """For a run that is resumed behind its last iteration: without a step, Lightning would neither begin nor end it, so that nothing would be
    restored, judged or exported."""

    skip = False
    done = True


def step_of(checkpoint: Path) -> int:
    """Iterations done when it was written."""
    return int(checkpoint.name.split("-")[1])


def check_targets(config: Mapping[str, Any]) -> None:
    """Refuses a misspelt argument of a callback or logger before anything is built.

    Raises:
        UserError: the constructor has no such argument.
    """
    for group in ("callbacks", "logger"):
        for name, node in config[group].items():
            target: Callable[..., Any] = locate(node["_target_"])
            parameters = inspect.signature(target).parameters
            open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
            for key in node:
                if not key.startswith("_") and key not in parameters and not open_ended:
                    raise UserError(f"{group}.{name}.{key}: {node['_target_']} has no such argument{nearest(key, parameters)}")
