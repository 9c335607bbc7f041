"""The verb `bench` inside one rank: which of its measurements runs, rollouts timed, and what all of them report.

Knows which network is measured and where the numbers go; the measures are `rlhf.engines`'.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from rlhf.callbacks.run_log import told
from rlhf.cli import rundir
from rlhf.cli.assemble import DTYPES, Job
from rlhf.cli.bench_page import print_rollout
from rlhf.config import UserError
from rlhf.engines.baselines import vocabulary
from rlhf.engines.bench_rollout import Rates, RolloutBench, Row
from rlhf.engines.config import EngineSpec
from rlhf.engines.floor import model_size
from rlhf.engines.launcher import accelerator
from rlhf.logging import log
from rlhf.models.factory import Blueprint
from rlhf.models.source import network_config, weights_folder
from rlhf.modules.base import RoleModule
from rlhf.settings import CalibrateBenchConfig, ModelConfig, ParityBenchConfig, RolloutBenchConfig, StepBenchConfig

PACKAGES = ("torch", "transformers", "deepspeed", "lightning", "triton")
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


def bench(job: Job) -> dict[str, Any]:
    """`rlhf bench rollout`, `parity`, `step` or `calibrate`.

    Raises:
        UserError: an option that this verb does not read, or lengths that the model has no room for.
        ParityFailed: a combination does not agree.
        OutOfMemory: a whole step does not fit.
    """
    if isinstance(job.cfg.bench, StepBenchConfig):
        from rlhf.cli.bench_step import step

        return step(job)
    if isinstance(job.cfg.bench, CalibrateBenchConfig):
        from rlhf.cli.bench_calibrate import calibrate

        return calibrate(job)
    refuse_unread(job.cfg)
    if isinstance(job.cfg.bench, ParityBenchConfig):
        from rlhf.cli.bench_parity import parity

        return parity(job)
    return rollout(job)


def refuse_unread(cfg: Any) -> None:
    """Keys that the measurement sets itself or has no use for.

    Raises:
        UserError: names the key of `bench` instead.
    """
    options = cfg.rollout
    if cfg.resume:
        raise UserError("resume=true: rlhf bench measures from the start each time; give it a run_dir of its own")
    if options.engine == "recorded":
        raise UserError("rollout=recorded generates nothing that rlhf bench could measure: choose rollout=hybrid_engine")
    if options.max_new_tokens != cfg.data.max_answer_tokens or options.min_new_tokens:
        raise UserError("rollout.max_new_tokens and rollout.min_new_tokens are not read by rlhf bench: set bench.new_tokens")
    if options.micro_batch_size is not None:
        raise UserError("rollout.micro_batch_size is not read by rlhf bench: bench.batch_sizes or bench.prompts says how many at once")
    if options.save_to is not None:
        raise UserError("rollout.save_to is not read by rlhf bench, whose answers to random prompts say nothing: leave it at null")


def rollout(job: Job) -> dict[str, Any]:
    """Speed of rollouts: a table, bench.json, metrics."""
    cfg: Any = job.cfg
    settings: RolloutBenchConfig = cfg.bench
    blueprint = actor_blueprint(job, tokens=settings.prompt_tokens + settings.new_tokens)
    words, dtype = vocabulary(blueprint.config), blueprint.dtype
    rates: list[Rates] = []

    def write(rows: list[Row], found: Rates) -> None:
        rates[:] = [found]
        note = f"batch {rows[-1].batch}, {rows[-1].engine}, {rows[-1].lengths} lengths"
        log.info("%s: %s", note, rows[-1].note or f"{rows[-1].tokens_per_s:,.0f} tok/s")
        write_json(
            job, "rollout", {"copy_bytes_per_s": found.bandwidth, "matmul_per_s": found.matmul, "rows": [as_dict(row) for row in rows]}
        )

    def measure(strategy: Any) -> list[Row]:
        size = model_size(strategy.network("actor").model, dtype)
        runs = RolloutBench(
            strategy, cfg.rollout, settings, size=size, words=words, dtype=dtype, tp=cfg.tp.size, on_row=write
        )  # fmt: skip
        return runs.run()

    module = Measured(blueprint, measure)
    rows: list[Row] = run(job, module, job.frozen_engine(cfg.actor.zero))
    metrics = rollout_metrics(rows, rates[0])
    if is_rank_zero():
        title = (
            f"{cfg.actor.model.name}, {cfg.trainer.precision}, prompt {settings.prompt_tokens}, {settings.new_tokens} new tokens, {card()}"
        )
        print_rollout(title, rows, rates[0])
    return finish(job, metrics)


def run(job: Job, module: Measured, spec: EngineSpec) -> Any:
    """Builds the actor under its engine, measures in the one step of a training, and takes everything down again."""
    trainer = L.Trainer(
        accelerator=accelerator(job.cfg.trainer), devices=job.cfg.trainer.devices, num_nodes=job.cfg.trainer.num_nodes,
        strategy=job.strategy({"actor": spec}), logger=False, max_epochs=1, limit_train_batches=1, use_distributed_sampler=False,
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
        UserError: the model's context is shorter.
    """
    settings = job.cfg.actor
    model: ModelConfig = settings.model
    folder = weights_folder(model, job.init_folder("actor"))
    ids = {} if folder else {name: model.shape.get(name) for name in SPECIAL}
    config = network_config(model, folder, dropout=settings.dropout, vocab_size=1 if folder else model.shape["vocab_size"], ids=ids)
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and context < tokens:
        if folder is not None:
            raise UserError(
                f"bench.prompt_tokens + bench.new_tokens = {tokens} passes the context of actor.model ({model.name}: {context} tokens): "
                "lower one of the two"
            )
        log.info("actor.model has random weights, so its context of %d tokens is stretched to %d", context, tokens)
        config.max_position_embeddings = tokens
    return Blueprint(
        kind="causal",
        config=config,
        folder=folder,
        lora=settings.lora,
        gradient_checkpointing=False,
        dtype=DTYPES[job.cfg.trainer.precision],
    )


# --- results -----------------------------------------------------------------------------------------------------------------


def as_dict(row: Row) -> dict[str, Any]:
    """A row for bench.json; what is not known is null."""
    rates = {} if not row.tokens else {"tokens_per_s": row.tokens_per_s}
    known = {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in vars(row).items()}
    return known | rates


def rollout_metrics(rows: list[Row], rates: Rates) -> dict[str, float]:
    """Flat numbers for summary.json: `bench/ENGINE/BATCH/NAME`, with `/geometric` behind the batch where lengths are drawn."""
    metrics = {"bench/copy_gbs": rates.bandwidth / 1e9, "bench/matmul_tflops": rates.matmul / 1e12}
    for row in rows:
        if row.tokens:
            place = f"bench/{row.engine}/{row.batch}" + ("" if row.lengths == "fixed" else f"/{row.lengths}")
            numbers: dict[str, float | None] = {"seconds": row.seconds, "tokens_per_s": row.tokens_per_s, **row.ratios}
            numbers |= {f"time_{part}": seconds for part, seconds in row.parts.items()}
            numbers |= {"peak_bytes": row.peak_bytes, "free_bytes": row.free_bytes, "capture_seconds": row.capture_seconds}
            metrics |= {f"{place}/{name}": float(value) for name, value in numbers.items() if value is not None}
    return metrics


def write_json(job: Job, kind: str, content: dict[str, Any], *, every_rank: bool = False) -> None:
    """`bench.json` of the run directory, whole or not at all; rank zero's alone, unless a rank speaks for itself."""
    if is_rank_zero() or every_rank:
        model = {"name": job.cfg.actor.model.name, "precision": job.cfg.trainer.precision, "tp": job.cfg.tp.size, "ranks": job.world}
        write_report(job, kind, {"actor": model, **content})


def write_report(job: Job, kind: str, content: dict[str, Any]) -> None:
    """bench.json with what every measurement says of its machine."""
    about = {"bench": kind, "card": card(), "versions": versions(), "commit": rundir.commit()}
    rundir.write_atomically(Path(job.run_dir) / "bench.json", json.dumps(about | content, indent=1))


def finish(job: Job, metrics: dict[str, float]) -> dict[str, Any]:
    """The verb's result; the loggers hear it once."""
    loggers = job.loggers()
    with told(loggers) as ending:
        ending.metrics = metrics
        for logger in loggers:
            logger.log_metrics(metrics, 0)
    return {"metrics": metrics, "seconds": {}, "report": {}}


def is_rank_zero() -> bool:
    return os.environ["RANK"] == "0"


def card() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else str(rundir.hardware()["cpu"])


def versions() -> dict[str, str]:
    """Of the libraries that decide the speed; `cuda` is the one torch was built with."""
    found = {} if torch.version.cuda is None else {"cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
