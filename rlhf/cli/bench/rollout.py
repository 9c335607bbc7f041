"""`rlhf bench rollout` inside one rank: rollouts timed by engine and batch, beside their floor; the measure is rlhf.engines.bench_rollout's."""

from __future__ import annotations

import math
from typing import Any

from rlhf.cli.assemble import Job
from rlhf.cli.bench.measured import Measured, actor_blueprint, run
from rlhf.cli.bench.page import print_rollout
from rlhf.cli.bench.results import card, finish, is_rank_zero, write_json
from rlhf.engines.baselines import vocabulary
from rlhf.engines.bench_rollout import Rates, RolloutBench, Row
from rlhf.engines.floor import model_size
from rlhf.logging import log
from rlhf.settings import RolloutBenchConfig


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
