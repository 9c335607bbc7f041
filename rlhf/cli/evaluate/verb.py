"""The verb `evaluate` inside one rank: judges policies and a reward model on held-out rows.

Knows which parts are asked for; the measures are `rlhf.modules.measures`', the rules `rlhf.cli.evaluate.rules`', the pages
`rlhf.cli.evaluate.page`'s.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import lightning as L
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from rlhf.callbacks.run_log import run_logs, told
from rlhf.cli.assemble import Job
from rlhf.cli.evaluate.page import plot_calibration, print_page, sample_rows, write_samples, write_side_by_side
from rlhf.cli.evaluate.prompts import FixedPrompt, pair_rows, prompt_rows, read_prompts
from rlhf.cli.evaluate.rules import require_no_contradiction
from rlhf.config import UserError
from rlhf.data.collate import CollatePairs, CollatePrompts, CollateSourced, Padding
from rlhf.data.encode import Limits
from rlhf.data.split import Phase
from rlhf.data.tokenizer import load_tokenizer
from rlhf.logging import log
from rlhf.models.factory import Blueprint
from rlhf.models.source import find_export, network_config
from rlhf.modules.comparison import Comparison, Part
from rlhf.modules.measures import JUDGES, calibration
from rlhf.modules.scorers import load_scorer

PHASES: dict[Part, Phase] = {"prompts": "ppo", "pairs": "reward", "texts": "sft"}
"""The step whose held-out rows a part takes."""


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
    require_no_contradiction(cfg)
    prompts = [] if evaluation.fixed_prompts is None else read_prompts(evaluation.fixed_prompts)
    job.tokenizer("actor")
    roles = {"actor": ("causal", "actor", cfg.actor.zero)}
    if cfg.ref.init is not None:
        roles["ref"] = ("causal", "actor", cfg.ref.zero)
    if cfg.reward.init is not None:
        roles["reward"] = ("scalar", "reward", cfg.reward.zero)
    specs = {role: job.frozen_engine(zero) for role, (_, _, zero) in roles.items()}
    L.seed_everything(cfg.seed, verbose=False)
    blueprints = {role: job.blueprint(role, kind=kind, trained=False, like=like) for role, (kind, like, _) in roles.items()}
    if evaluation.base is not None:
        specs["base"], blueprints["base"] = job.frozen_engine(cfg.ref.zero), _base(job, blueprints["actor"])
    loaders = _loaders(job, prompts)
    module = Comparison(
        blueprints, names=evaluation.names, gold=gold, decode=job.decode, samples=evaluation.samples, seed=evaluation.seed,
        parts=list(loaders), judges=JUDGES if evaluation.win_rate is None else evaluation.win_rate,
    )  # fmt: skip
    trainer = job.trainer(job.strategy(specs), [_Answering(job)], max_steps=-1)
    with told(trainer.loggers) as ending:
        trainer.validate(module, dataloaders=list(loaders.values()), verbose=False)
        ending.metrics = module.results()
        trainer.strategy.teardown()
        if trainer.is_global_zero:
            _write(job, trainer.loggers, module, ending.metrics, prompts)
    return {"metrics": ending.metrics, "seconds": {}, "report": {}}


def _base(job: Job, actor: Blueprint) -> Blueprint:
    """The policy that `evaluation.base` names: the actor's kind of network with its weights.

    Raises:
        UserError: it holds no model, or one with another vocabulary.
    """
    init, tokenizer = job.cfg.evaluation.base, job.tokenizer("actor")
    folder = find_export(init, "actor", "ref", key="evaluation.base")
    model = dataclasses.replace(job.cfg.actor.model, tokenizer=str(folder))
    if load_tokenizer(model, job.cfg.data.chat).get_vocab() != tokenizer.get_vocab():
        raise UserError(f"evaluation.base={init} and actor.init have different tokenizers: a KL needs one vocabulary")
    ids = {name: getattr(actor.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = network_config(
        job.cfg.actor.model, folder, key="actor.model", dropout=job.cfg.actor.dropout, vocab_size=len(tokenizer), ids=ids
    )
    return dataclasses.replace(actor, folder=folder, config=config)


def _loaders(job: Job, prompts: list[FixedPrompt]) -> dict[Part, DataLoader[Any]]:
    """Every part that is asked for and has rows.

    Raises:
        UserError: none has.
    """
    evaluation, rewarded = job.cfg.evaluation, job.cfg.reward.init is not None
    fixed = _fixed_loaders(job, prompts, rewarded=rewarded)  # first: what is too long is refused before any data is read
    loaders: dict[Part, DataLoader[Any]] = {}
    for part, phase in PHASES.items():
        limit = getattr(evaluation, part)
        if not limit or (part == "pairs" and not rewarded):
            continue
        data = job.data(phase, evaluation.batch_size, with_sources=True)
        data.eval_rows = data.heldout(limit=limit)
        if len(data.eval_rows) < limit:
            log.info("evaluation.%s=%d, but %d rows are held out: all of them are taken", part, limit, len(data.eval_rows))
        for loader in data.val_dataloader():  # one, or none where no row is held out
            loaders[part] = loader
    loaders |= fixed
    if not loaders:
        raise UserError("no row is held out for what is asked for: raise data.eval_fraction, or name sources with rows for evaluation")
    return loaders


def _fixed_loaders(job: Job, prompts: list[FixedPrompt], *, rewarded: bool) -> dict[Part, DataLoader[Any]]:
    """The same batches on every rank: ZeRO-3 needs all of them, and few prompts do not divide."""
    data, tokenizer, batch_size = job.cfg.data, job.tokenizer("actor"), job.cfg.evaluation.batch_size
    limits = Limits(prompt=data.max_prompt_tokens, answer=data.max_answer_tokens, overlong="drop")
    padding = Padding(pad_id=tokenizer.pad_token_id, bucket=data.length_bucket, limit=limits.prompt)
    found: dict[Part, DataLoader[Any]] = {}
    if prompts:
        rows = prompt_rows(prompts, tokenizer, data.chat, limits)
        found["fixed prompts"] = DataLoader(rows, batch_size, collate_fn=CollatePrompts(padding=padding))  # type: ignore[arg-type]
    pairs = pair_rows(prompts, tokenizer, data.chat, limits) if rewarded else []
    if pairs:
        whole = dataclasses.replace(padding, limit=limits.prompt + limits.answer)
        collate = CollateSourced(pairs=CollatePairs(padding=whole))
        found["fixed pairs"] = DataLoader(pairs, batch_size, collate_fn=collate)  # type: ignore[arg-type]
    return found


def _write(job: Job, loggers: list[Any], module: Comparison, metrics: dict[str, float], prompts: list[FixedPrompt]) -> None:
    """The files of the run directory and the terminal; to the loggers the metrics, the same samples as tables, the plot, and how the gold
    scores of all answers are distributed."""
    evaluation, names = job.cfg.evaluation, list(module.policies.values())
    held_out, fixed = sample_rows(module.records), sample_rows(module.fixed, prompts)
    write_samples(job.run_dir, [*held_out, *fixed])
    if fixed:
        judged = {prompt.source: prompt for prompt in module.fixed.judged}
        write_side_by_side(job.run_dir, fixed, names, title=evaluation.fixed_prompts, judged=judged, prompts=prompts)
    table = calibration([margin for prompt in module.records.judged for margin in prompt.margins])
    plot = plot_calibration(job.run_dir, table, metrics["reward/calibration_error"]) if table else None
    if evaluation.show is not None:
        print_page(job.run_dir, metrics, names, (fixed or held_out)[: evaluation.show])
    for logger in loggers:
        logger.log_metrics(metrics, 0)
    gold = {
        f"histogram/gold/{name}": [a.numbers["gold"] for a in answers] for name, answers in module.records.answers.items() if module.gold
    }
    for logger in run_logs(loggers):
        logger.log_histograms({name: scores for name, scores in gold.items() if scores}, 0)
        for name, rows in (("samples", held_out), ("fixed_prompts", fixed)):
            if rows:
                logger.log_rows(name, rows, 0)
        if plot is not None:
            logger.log_picture("calibration", plot)
