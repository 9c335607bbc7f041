"""The verb `bench` inside one rank: which of its measurements runs. Knows their settings; each measurement has a file of its own beside this one."""

from __future__ import annotations

from typing import Any

from rlhf.cli.assemble import Job
from rlhf.config import UserError
from rlhf.settings import CalibrateBenchConfig, ParityBenchConfig, StepBenchConfig


def bench(job: Job) -> dict[str, Any]:
    """`rlhf bench rollout`, `parity`, `step` or `calibrate`.

    Raises:
        UserError: an option that this verb does not read, or lengths that the model has no room for.
        ParityFailed: a combination does not agree.
        OutOfMemory: a whole step does not fit.
    """
    if isinstance(job.cfg.bench, StepBenchConfig):
        from rlhf.cli.bench.step import step

        return step(job)
    if isinstance(job.cfg.bench, CalibrateBenchConfig):
        from rlhf.cli.bench.calibrate import calibrate

        return calibrate(job)
    refuse_unread(job.cfg)
    if isinstance(job.cfg.bench, ParityBenchConfig):
        from rlhf.cli.bench.parity import parity

        return parity(job)
    from rlhf.cli.bench.rollout import rollout

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
