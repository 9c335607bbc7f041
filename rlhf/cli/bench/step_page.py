"""Figures of `rlhf bench step`: measured iterations beside the floor of the machine and the planner's prediction; as JSON, metrics and a table.

Knows phases and formulas of others; measures nothing. A part of a phase is named PHASE/PART, and the parts of a phase add up to it.
"""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from rlhf.cli.bench.page import GB, console, number, significant
from rlhf.config import UserError
from rlhf.engines.bench_rollout import Rates
from rlhf.planning.memory import MemoryPlan, Phase
from rlhf.planning.paper import ANSWER, PROMPT, effective_operations
from rlhf.planning.report import machine_of
from rlhf.planning.speed import TimePlan, time_plan
from rlhf.planning.workload import Workload, workload

PHASES = ("generate", "score", "train")
WHOLE = "iteration"


@dataclass(frozen=True)
class Lap:
    """One iteration of the slowest rank."""

    seconds: dict[str, float]
    """By phase and part, `iteration` being the wall time of all."""
    peaks: dict[str, int] = field(default_factory=dict)
    """Bytes at most by phase and part: PyTorch's tensors and what the hybrid engine maps; the largest of all ranks, CUDA only."""


def complete(seconds: dict[str, float]) -> dict[str, float]:
    """Adds what is left of each phase as its `rest`, and of the iteration as `other`."""
    full: dict[str, float] = {}
    for phase in PHASES:
        parts = {name: value for name, value in seconds.items() if name.startswith(f"{phase}/")}
        full[phase] = seconds[phase]
        full |= parts | ({f"{phase}/rest": seconds[phase] - sum(parts.values())} if parts else {})
    full["other"] = seconds[WHOLE] - sum(seconds[phase] for phase in PHASES)
    return full | {WHOLE: seconds[WHOLE]}


def median(laps: list[Lap]) -> Lap:
    """The iteration of median length (the shorter of two), so that its parts add up."""
    return sorted(laps, key=lambda lap: lap.seconds[WHOLE])[(len(laps) - 1) // 2]


def peaks(laps: list[Lap]) -> dict[str, int]:
    return {name: max(lap.peaks.get(name, 0) for lap in laps) for lap in laps for name in lap.peaks}


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What formulas say of this config; empty where they do not know it."""

    floor: dict[str, float] = field(default_factory=dict)
    """Seconds by phase and part at the rates measured here, with nothing lost."""
    seconds: dict[str, float] = field(default_factory=dict)
    """The planner's prediction for `hardware`."""
    peaks: dict[str, float] = field(default_factory=dict)
    """Its bytes by phase and part, without the reserve that no tensor takes."""
    memory: MemoryPlan | None = None
    time: TimePlan | None = None
    work: Workload | None = None


def expected(cfg: Any, rates: Rates) -> Expected:
    """Floor and prediction of the settings of an `rlhf ppo` job, with a StepBenchConfig as `bench`. Nothing is predicted for hardware=cpu, and
    nothing at all is known of a family that planning has no table for."""
    try:
        work = workload(cfg)
    except UserError:
        return Expected()
    floor = by_phase(floor_plan(work, cfg, rates), work)
    if cfg.hardware.name == "cpu":
        return Expected(floor=floor, work=work)
    machine = dataclasses.replace(machine_of(cfg), efficiency=cfg.bench.efficiency)
    time, memory = machine.time(work), machine.memory(work)
    return Expected(floor=floor, seconds=by_phase(time, work), peaks=memory_by_phase(memory), memory=memory, time=time, work=work)


def floor_plan(work: Workload, cfg: Any, rates: Rates) -> TimePlan:
    """The planner's count of operations and bytes at measured rates, every one of them reached, and nothing computed twice."""
    perfect = dataclasses.replace(
        cfg.bench.efficiency, training=1.0, forward=1.0, memory=1.0, decode_layer_us=0.0, decode_cache_passes=1.0, eager_layer_us=0.0, adapter_moves=0.0,
        hf_layer_us=0.0, hf_adapter_us=0.0, hf_cache_passes=1.0, logit_bytes=0.0, logit_training_bytes=0.0, gradient_tensor_us=0.0,
        optimizer_tensor_us=0.0, optimizer_extra_bytes=0.0, pads_heads=False, zero3_tensor_us=0.0, zero3_layer_tensor_us=0.0,
        link=1.0, network=1.0, overlap=1.0, collective_us=0.0, host_link=1.0, iteration_ms=0.0,
    )  # fmt: skip
    # The matrix rate was measured in the run's precision; the planner takes a 16-bit rate and derives that of fp32.
    sixteen_bit = rates.matmul * (1 if work.element == 2 else FP32_SLOWER)
    links = {name: getattr(cfg.hardware, name) or FREE for name in ("link_gbs", "network_gbs", "host_link_gbs")}
    hardware = dataclasses.replace(cfg.hardware, bandwidth_gbs=rates.bandwidth / 1e9, tflops_16bit=sixteen_bit / 1e12, **links)
    once = {name: dataclasses.replace(role, checkpointing=False) for name, role in work.roles.items()}
    return time_plan(dataclasses.replace(work, roles=once), hardware, perfect)


FREE = 1e9
"""A link that `hardware` does not know, such as that of hardware=cpu, costs nothing at best, 10^9 bytes/s."""
FP32_SLOWER = 4
"""rlhf/planning/speed.py: fp32 products run at a quarter of the 16-bit rate."""


def by_phase(plan: TimePlan, work: Workload) -> dict[str, float]:
    """The planner's phases under our names. Its `gather` holds the copies of the swap, too."""
    if not plan.seconds:
        return {}
    swap = "gather" if work.roles["actor"].stage == 3 else "swap"
    names = {"gather": f"generate/{swap}", "prefill": "generate/prefill", "decode": "generate/decode", "score": "score", "other": "other",
             "optimizer": "train/optimizer", "communication": "train/communication"}  # fmt: skip
    named = {names.get(name, name.replace(" ", "/")): value for name, value in plan.seconds.items()}
    sums = {phase: sum(v for name, v in named.items() if name.startswith(f"{phase}/")) for phase in ("generate", "train")}
    return named | sums | {WHOLE: plan.total}


def memory_by_phase(plan: MemoryPlan) -> dict[str, float]:
    names = {"update": "train/optimizer"}
    found = {names.get(phase.name, phase.name.replace(" ", "/")): tensors(phase) for phase in plan.phases}
    found["train"] = max((size for name, size in found.items() if name.startswith("train/")), default=0.0)
    return found | {WHOLE: max(found.values())}


def tensors(phase: Phase) -> float:
    """What a meter of tensors sees: no context, no library, no fragmentation."""
    return phase.total - phase.of(part="reserve")


# --- results -----------------------------------------------------------------------------------------------------------------


def phase_figures(laps: dict[str, list[Lap]], expect: Expected) -> dict[str, dict[str, Any]]:
    """Of each phase and part: times of all iterations, the median one's, floor, prediction, peaks. The first engine is the one that is
    measured, the others are what it is compared with. What is not known is null."""
    ours, *others = laps
    middle, most = median(laps[ours]).seconds, peaks(laps[ours])
    figures: dict[str, dict[str, Any]] = {}
    for name, seconds in middle.items():
        floor, predicted = expect.floor.get(name), expect.seconds.get(name)
        figures[name] = {
            "seconds": [lap.seconds[name] for lap in laps[ours]],
            "median_seconds": seconds,
            "floor_seconds": floor,
            "of_floor": floor / seconds if floor and seconds > 0 else None,
            "predicted_seconds": predicted,
            "predicted_over_measured": predicted / seconds if predicted and seconds > 0 else None,
            "peak_bytes": most.get(name),
            "predicted_peak_bytes": expect.peaks.get(name),
            "faster_than": {engine: median(laps[engine]).seconds[name] / seconds for engine in others
                            if laps[engine] and name in laps[engine][0].seconds and seconds > 0},
        }  # fmt: skip
    return figures


def speeds(seconds: float, expect: Expected, *, sequences: int, new_tokens: int, ranks: int, prompt_tokens: int) -> dict[str, float]:
    """Rates of a whole iteration. TFLOP/s are those of the original's formula, which is for 256 + 256 tokens."""
    found = {"sequences_per_s": sequences / seconds, "answer_tokens_per_s": sequences * new_tokens / seconds}
    if expect.work is not None and (prompt_tokens, new_tokens) == (PROMPT, ANSWER):
        operations = effective_operations(expect.work.roles["actor"].network, sequences)
        found["paper_tflops_per_gpu"] = operations / seconds / ranks / 1e12
    return found


def step_metrics(figures: dict[str, dict[str, Any]], rates: dict[str, float], measured: Rates) -> dict[str, float]:
    """Flat numbers for summary.json: `bench/PHASE/NAME`."""
    metrics = {"bench/copy_gbs": measured.bandwidth / 1e9, "bench/matmul_tflops": measured.matmul / 1e12}
    metrics |= {f"bench/{name}": value for name, value in rates.items()}
    for phase, values in figures.items():
        numbers = {**values, "seconds": values["median_seconds"], **{f"vs_{name}": v for name, v in values["faster_than"].items()}}
        del numbers["faster_than"], numbers["median_seconds"]
        metrics |= {f"bench/{phase}/{name}": float(value) for name, value in numbers.items() if value is not None}
    return metrics


def print_step(title: str, figures: dict[str, dict[str, Any]], rates: dict[str, float], measured: Rates, remarks: list[str]) -> None:
    """A line for each phase, its parts below it."""
    table = Table(title=title)
    table.add_column("phase")
    baselines = list(figures[WHOLE]["faster_than"])
    predicted, on_card = (any(f[key] is not None for f in figures.values()) for key in ("predicted_seconds", "peak_bytes"))
    columns = ["seconds", "from", "to", "floor s", "of floor", *(f"x {name}" for name in baselines)]
    columns += ["predicted s", "pred / meas"] if predicted else []
    columns += ["peak GB"] if on_card else []
    columns += ["predicted GB"] if predicted else []
    for name in columns:
        table.add_column(name, justify="right")
    for name, f in figures.items():
        if "/" not in name:
            table.add_section()
        cells = [f"  {name.partition('/')[2]}" if "/" in name else name, significant(f["median_seconds"])]
        cells += [significant(min(f["seconds"])), significant(max(f["seconds"])), significant(f["floor_seconds"]), number(f["of_floor"], 2)]
        cells += [number(f["faster_than"].get(engine), 2) for engine in baselines]
        cells += [significant(f["predicted_seconds"]), number(f["predicted_over_measured"], 2)] if predicted else []
        cells += [number(f["peak_bytes"], 2, GB)] if on_card else []
        cells += [number(f["predicted_peak_bytes"], 2, GB)] if predicted else []
        table.add_row(*cells)
    out = console()
    out.print(table)
    tflops = f", {rates['paper_tflops_per_gpu']:.1f} TFLOP/s a GPU by DeepSpeed-Chat's formula" if "paper_tflops_per_gpu" in rates else ""
    out.print(f"{rates['sequences_per_s']:,.2f} sequences/s, {rates['answer_tokens_per_s']:,.0f} answer tokens/s{tflops}")
    out.print(f"measured: copy {measured.bandwidth / 1e9:,.0f} GB/s (read and write), matrix product {measured.matmul / 1e12:,.2f} TFLOP/s")
    for remark in remarks:
        out.print(remark, markup=False, soft_wrap=True)


def spread(laps: list[Lap]) -> float:
    """Standard deviation of the iterations as a share of their mean; 0 of one."""
    times = [lap.seconds[WHOLE] for lap in laps]
    return statistics.stdev(times) / statistics.mean(times) if len(times) > 1 else 0.0
