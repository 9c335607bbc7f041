"""`rlhf bench parity` inside one rank: every combination of family, precision, ZeRO stage, TP, LoRA and CUDA graphs, one after the other.

Knows what is combined and what counts as agreement; the comparison is `rlhf.engines.bench_parity`'s.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.cli.assemble import DTYPES, Job
from rlhf.cli.bench.measured import Measured, MeasuredTraining, actor_blueprint, run
from rlhf.cli.bench.page import print_parity
from rlhf.cli.bench.results import finish, is_rank_zero, write_json
from rlhf.cli.errors import Interrupted
from rlhf.config import UserError
from rlhf.engines.baselines import vocabulary
from rlhf.engines.bench_parity import Agreement, compare, mixed_prompts, small_config, train
from rlhf.engines.bench_rollout import hybrid_engine
from rlhf.engines.config import EngineSpec, Training
from rlhf.engines.launcher import accelerator
from rlhf.logging import log
from rlhf.models.factory import Blueprint
from rlhf.settings import LoraConfig, ParityBenchConfig


class ParityFailed(Interrupted):
    """Some combinations do not agree. Like a run that was stopped it ends with one line and exit code 1."""


@dataclass(frozen=True, kw_only=True)
class Case:
    family: str
    dtype: str
    zero: int
    tp: int
    lora: int
    graphs: bool


@dataclass(kw_only=True)
class Outcome:
    case: Case
    result: str
    """pass, fail or skipped."""
    reason: str = ""
    agreement: Agreement | None = None


def cases(settings: ParityBenchConfig, model: str) -> Iterator[Case]:
    """Every combination, families outermost; `model` is the name of the one model where no families are listed."""
    lists = (settings.families or [model], settings.dtypes, settings.lora_ranks, settings.zero_stages, settings.tp_sizes, settings.graphs)
    for family, dtype, lora, zero, tp, graphs in itertools.product(*lists):
        yield Case(family=family, dtype=dtype, zero=zero, tp=tp, lora=lora, graphs=graphs)


def parity(job: Job) -> dict[str, Any]:
    """Runs all combinations, prints the table, writes bench.json.

    Raises:
        UserError: an option that the lists of `bench` set.
        ParityFailed: a combination fails; bench.json has been written.
    """
    cfg: Any = job.cfg
    settings: ParityBenchConfig = cfg.bench
    refuse_groups(cfg)
    for family in settings.families:
        small_config(family, settings.shapes[family])
    for library in (r"torch\.distributed", "peft"):  # they would say the same again for every combination
        warnings.filterwarnings("ignore", module=library)
    outcomes: list[Outcome] = []
    for case in cases(settings, cfg.actor.model.name):
        outcomes.append(attempt(job, case))
        if outcomes[-1].result != "skipped":
            log.info("%s: %s", label(case), outcomes[-1].result + (f" ({outcomes[-1].reason})" if outcomes[-1].reason else ""))
        write_json(job, "parity", {"outcomes": [dataclasses.asdict(outcome) for outcome in outcomes]})
    if is_rank_zero():
        print_parity(f"hybrid engine against transformers, ranks: {job.world}", *page(outcomes))
    metrics = parity_metrics(outcomes)
    result = finish(job, metrics)
    failed = sum(outcome.result == "fail" for outcome in outcomes)
    if failed:
        raise ParityFailed(f"{failed} of {len(outcomes)} combinations fail; bench.json in {job.run_dir} has them all")
    return result


def refuse_groups(cfg: Any) -> None:
    """Groups whose place a list of the parity run takes.

    Raises:
        UserError: names both keys.
    """
    settings: ParityBenchConfig = cfg.bench
    if cfg.tp.size != 1:
        raise UserError(f"tp.size={cfg.tp.size}: rlhf bench parity goes through bench.tp_sizes instead; leave tp=tp1")
    zero = cfg.actor.zero
    if zero.stage != 0:
        raise UserError(
            f"actor.zero.stage={zero.stage}: rlhf bench parity goes through bench.zero_stages instead; leave zero@actor.zero=z0"
        )
    if cfg.actor.lora.rank and cfg.actor.lora.rank not in settings.lora_ranks:
        raise UserError(f"actor.lora.rank={cfg.actor.lora.rank} is not among bench.lora_ranks={settings.lora_ranks}: add it there")
    offload = settings.optimizer.name == "cpu_adam"
    if offload or (settings.optimizer.name == "fused_adam" and accelerator(cfg.trainer) == "cpu"):
        raise UserError(f"bench.optimizer.name={settings.optimizer.name} does not run here: use adamw")


def attempt(job: Job, case: Case) -> Outcome:
    """One combination: skipped, or built, trained a little, compared and torn down."""
    reason = why_not(job, case)
    if reason:
        return Outcome(case=case, result="skipped", reason=reason)
    settings: ParityBenchConfig = job.cfg.bench
    try:
        agreement: Agreement = measure(job, case)
    except Exception as error:
        refused = isinstance(error, UserError)
        if job.world > 1 and not refused:
            raise  # the other ranks wait in a collective; what a user can get wrong is refused on all of them
        if not refused:
            log.error("%s: %s", label(case), traceback.format_exc())
        return Outcome(case=case, result="fail", reason=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    reason = disagreement(agreement, case.dtype, settings)
    return Outcome(case=case, result="fail" if reason else "pass", reason=reason, agreement=agreement)


def why_not(job: Job, case: Case) -> str:
    """Why a combination cannot run here; empty: it can."""
    on_cpu = accelerator(job.cfg.trainer) == "cpu"
    if on_cpu and (case.dtype == "fp16" or case.graphs):
        return f"{'fp16' if case.dtype == 'fp16' else 'graphs'}: needs a GPU"
    if job.world % case.tp:
        return f"tp {case.tp}: needs {case.tp} ranks" if job.world < case.tp else f"tp {case.tp}: does not divide {job.world} ranks"
    shape = shape_of(job, case.family)
    heads = shape["num_attention_heads"]
    if heads % case.tp or (shape.get("num_key_value_heads") or heads) % case.tp:
        return f"{case.family}, tp {case.tp}: does not divide its heads"
    if case.zero in (1, 2) and job.cfg.bench.train_steps == 0:
        return f"zero {case.zero}: needs an optimizer (bench.train_steps above 0)"
    return ""


def shape_of(job: Job, family: str) -> dict[str, Any]:
    return job.cfg.bench.shapes[family] if job.cfg.bench.families else job.cfg.actor.model.shape


def blueprint_of(job: Job, case: Case) -> Blueprint:
    settings: ParityBenchConfig = job.cfg.bench
    lora: LoraConfig = dataclasses.replace(job.cfg.actor.lora, rank=case.lora)
    if settings.families:
        config = small_config(case.family, settings.shapes[case.family])
        return Blueprint(kind="causal", config=config, folder=None, lora=lora, gradient_checkpointing=False, dtype=DTYPES[case.dtype])
    plain = actor_blueprint(job, tokens=settings.prompt_tokens + settings.new_tokens)
    return dataclasses.replace(plain, lora=lora, dtype=DTYPES[case.dtype])


def measure(job: Job, case: Case) -> Agreement:
    cfg: Any = job.cfg
    settings: ParityBenchConfig = cfg.bench
    blueprint = blueprint_of(job, case)
    words = vocabulary(blueprint.config)
    learns = settings.train_steps > 0
    training = Training(
        optimizer=settings.optimizer, scheduler=settings.scheduler, total_steps=max(1, settings.train_steps), lora=blueprint.lora,  # type: ignore[arg-type]
        micro_batch_size=settings.prompts, accumulation=1,
    )  # fmt: skip
    zero = dataclasses.replace(cfg.actor.zero, stage=case.zero)
    spec = EngineSpec(zero=zero, precision=case.dtype, training=training if learns else None, reloadable=True)
    rollout = dataclasses.replace(
        cfg.rollout, engine="hybrid_engine", temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=settings.new_tokens, min_new_tokens=0,
        max_out_tokens=settings.prompt_tokens + settings.new_tokens, cuda_graphs=case.graphs,
    )  # fmt: skip

    def seen(strategy: Any) -> Agreement:
        train(strategy, words, steps=settings.train_steps, rows=settings.prompts, tokens=settings.prompt_tokens, seed=settings.seed)
        seed = settings.seed + 100_003 * strategy.global_rank
        prompts = mixed_prompts(
            words, count=settings.prompts, longest=settings.prompt_tokens, seed=seed, device=strategy.root_device
        )  # fmt: skip
        engine = hybrid_engine(strategy, rollout, words, tp=case.tp)
        return compare(strategy, engine, blueprint, rollout, prompts, words)

    return run(job, (MeasuredTraining if learns else Measured)(blueprint, seen), spec)


def disagreement(seen: Agreement, dtype: str, settings: ParityBenchConfig) -> str:
    """What is wrong with an agreement; empty: nothing.

    In fp32 every token and, to the tolerance, every log-probability has to be that of transformers. In 16 bits two right programs
    choose differently where two tokens are nearly even, so only the error counts, against that of transformers in the same precision.
    """
    if not all(map(math.isfinite, (seen.largest, seen.error))):
        return "a log-probability is not finite"
    if dtype != "fp32":
        allowed = settings.error_ratio * seen.peer_error
        return "" if seen.error <= allowed else f"error {seen.error:.2e} passes {settings.error_ratio:g} x {seen.peer_error:.2e}"
    if seen.equal != seen.tokens:
        return f"{seen.tokens - seen.equal} of {seen.tokens} tokens differ"
    over = seen.largest > settings.logprob_tolerance
    return f"log-probabilities differ by {seen.largest:.2e}, more than {settings.logprob_tolerance:g}" if over else ""


def label(case: Case) -> str:
    return f"{case.family} {case.dtype} {column(case)} lora {case.lora}"


def column(case: Case) -> str:
    return f"zero {case.zero}" + (f", tp {case.tp}" if case.tp > 1 else "") + (", graphs" if case.graphs else "")


def page(outcomes: list[Outcome]) -> tuple[list[list[str]], list[str], list[str]]:
    """Rows, column names and remarks of the table. Ways to run that were skipped for every model have a remark and no column."""
    run_columns = list(dict.fromkeys(column(o.case) for o in outcomes if o.result != "skipped"))
    cells: dict[tuple[str, str, int], dict[str, str]] = {}
    for outcome in outcomes:
        case, seen = outcome.case, outcome.agreement
        text = outcome.result
        if seen is not None and seen.peer_error and case.dtype != "fp32":
            text += f" {seen.error / seen.peer_error:.2f}x"
        elif seen is not None:
            text += f" {seen.largest:.0e}"
        cells.setdefault((case.family, case.dtype, case.lora), {})[column(case)] = text
    rows = [
        [family, dtype, str(lora), *(found.get(name, "") for name in run_columns)]
        for (family, dtype, lora), found in cells.items()
        if any(found.get(name, "skipped") != "skipped" for name in run_columns)
    ]
    skipped = Counter(o.reason for o in outcomes if o.result == "skipped")
    remarks = ["fp32: largest difference of a log-probability. 16 bits: mean error over that of transformers in the same precision."]
    remarks += [f"skipped {count}: {reason}" for reason, count in skipped.items()]
    remarks += [f"fail: {label(o.case)}: {o.reason}" for o in outcomes if o.result == "fail"]
    return rows, ["model", "dtype", "lora", *run_columns], remarks


def parity_metrics(outcomes: list[Outcome]) -> dict[str, float]:
    """Counts, the largest fp32 difference, and the largest 16-bit error as a multiple of that of transformers."""
    metrics = {f"bench/parity/{name}": float(sum(o.result == result for o in outcomes)) for name, result in
               (("passed", "pass"), ("failed", "fail"), ("skipped", "skipped"))}  # fmt: skip
    exact = [o.agreement.largest for o in outcomes if o.agreement and o.case.dtype == "fp32"]
    half = [
        o.agreement.error / o.agreement.peer_error for o in outcomes if o.agreement and o.case.dtype != "fp32" and o.agreement.peer_error
    ]
    if exact:
        metrics["bench/parity/fp32_logprob_difference"] = max(exact)
    if half:
        metrics["bench/parity/error_ratio"] = max(half)
    return metrics
