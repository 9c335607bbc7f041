"""The whole answer to `rlhf plan` for one step, as plain numbers that a page or a script reads.

Knows models of memory and time and what to ask of them; prints nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf.config import UserError
from rlhf.planning.fit import Machine, Words, batch_keys, largest_batch, remedies, rows, search
from rlhf.planning.memory import MemoryPlan, Reserve
from rlhf.planning.networks import check_count
from rlhf.planning.speed import TimePlan
from rlhf.planning.workload import Workload, workload
from rlhf.settings import PlanCheckConfig, PlanConfig


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Overrides, and what comes of them."""

    words: Words
    peak: float
    """Bytes of one GPU."""
    seconds: float
    """Of one iteration; 0: not known."""


TIGHT = 0.05
"""Share of a card that must stay free for a plan to be safe. The one planned run of experiments/planner_memory that filled its card lost this much
to PyTorch's allocator, in pieces that nothing fitted into."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one step needs, on one machine. Sizes in bytes, of the rank that needs most."""

    work: Workload
    machine: Machine
    memory: MemoryPlan
    time: TimePlan
    capacity: float
    """Bytes that one rank's device has."""
    short: float
    """Bytes that one GPU lacks; 0 or less: it fits."""
    host_short: float
    largest: Workload | None
    remedies: tuple[Advice, ...]
    """If it is short."""
    proposal: Advice | None
    """The fastest that fits, if it was looked for."""
    hours: float | None
    """Of the whole run; None: its length or the hardware's rates are not known."""
    dollars: float | None
    """None where the hours are, or the price is not known."""
    samples: int | None

    @property
    def fits(self) -> bool:
        """Neither a device nor a host is short of memory."""
        return max(self.short, self.host_short) <= 0

    @property
    def caution(self) -> str | None:
        """One sentence where it fits, but hardly."""
        return caution(self.machine, self.work) if self.fits else None

    @property
    def price_known(self) -> bool:
        """Whether `hardware` says what an hour costs."""
        return self.machine.hardware.price_per_hour > 0


def machine_of(cfg: Any) -> Machine:
    plan: PlanCheckConfig = cfg.plan
    reserve = Reserve(
        context=0.0 if cfg.hardware.name == "cpu" else plan.context_gb * 1e9,
        communication=0.0 if cfg.hardware.name == "cpu" else plan.communication_gb * 1e9,
        fragmentation=plan.fragmentation, process=plan.process_gb * 1e9,
    )  # fmt: skip
    return Machine(hardware=cfg.hardware, reserve=reserve, efficiency=plan.efficiency if isinstance(plan, PlanConfig) else None)


def caution(machine: Machine, work: Workload) -> str | None:
    """What to do about a job that fits into a GPU with less than `TIGHT` of it to spare; None: there is more, or it does not fit."""
    spare, capacity = -machine.short(work)[0], machine.capacity(work)
    if machine.on_cpu or not 0 <= spare < TIGHT * capacity:
        return None
    return (
        f"{spare / 1e9:.1f} of {capacity / 1e9:.1f} GB to spare is little, as PyTorch's allocator can lose {TIGHT:.0%} in pieces: "
        "smaller micro-batches leave more"
    )


def check_counts(cfg: Any) -> None:
    """
    Raises:
        UserError: devices, hardware and models contradict each other.
    """
    hardware, trainer = cfg.hardware, cfg.trainer
    if hardware.name == "cpu" and trainer.accelerator == "cuda":
        raise UserError("hardware=cpu, but trainer.accelerator=cuda: say which card, such as hardware=h100-80g")
    if hardware.name != "cpu" and trainer.accelerator == "cpu":
        raise UserError(f"hardware={hardware.name}, but trainer.accelerator=cpu: choose trainer=gpu, or hardware=cpu")
    if hardware.name != "cpu" and trainer.devices > hardware.devices_per_node:
        raise UserError(
            f"trainer.devices={trainer.devices} is more than a node of {hardware.name} has (hardware.devices_per_node="
            f"{hardware.devices_per_node}): raise trainer.num_nodes instead"
        )
    for name in ("actor", "critic", "reward"):
        if hasattr(cfg, name):
            check_count(getattr(cfg, name).model, name)


def report(cfg: Any) -> Report:
    """Everything about one training step.

    Args:
        cfg: checked settings of sft, reward, ppo or dpo, with a PlanConfig as `plan`.

    Raises:
        UserError: counts that contradict each other, or a model whose shape is not known.
    """
    check_counts(cfg)
    work, machine = workload(cfg), machine_of(cfg)
    memory, time = machine.memory(work), machine.time(work)
    short, host_short = machine.short(work)
    help_ = remedies(work, machine) if max(short, host_short) > 0 else []
    found = search(work, machine) if cfg.plan.search else None
    samples = cfg.plan.samples or (work.iterations * work.global_batch if work.iterations else None)
    hours = samples / time.sequences_per_second / 3600 if samples and time.total else None
    price = machine.hardware.price_per_hour
    return Report(
        work=work, machine=machine, memory=memory, time=time, capacity=machine.capacity(work), short=short, host_short=host_short,
        largest=largest_batch(work, machine), remedies=tuple(_advice(words, changed, machine) for words, changed in help_),
        proposal=None if found is None else _advice(*found, machine), hours=hours,
        dollars=hours * work.ranks * price if hours is not None and price > 0 else None, samples=samples,
    )  # fmt: skip


def _advice(words: Words, work: Workload, machine: Machine) -> Advice:
    return Advice(words=words, peak=machine.memory(work).peak, seconds=machine.time(work).total)


def batch_words(work: Workload) -> Words:
    """The keys that make a job's batch what it is."""
    sizes = {"ppo": (work.global_batch // work.samples, work.minibatch * work.ranks)}.get(work.step, (work.global_batch,))
    return tuple(f"{key}={size}" for key, size in zip(batch_keys(work), sizes, strict=True))


def as_json(found: Report) -> dict[str, Any]:
    """Keys that scripts may rely on. Bytes, seconds, hours, dollars; null: not known, or not asked for."""
    hardware, work = found.machine.hardware, found.work
    return {
        "step": work.step,
        "hardware": hardware.name,
        "ranks": work.ranks,
        "fits": found.fits,
        "gpu": {"capacity": round(found.capacity), "peak": round(found.memory.peak), "allocated": round(found.memory.allocated),
                "phase": found.memory.worst.name, "short": max(0, round(found.short)), "spare": max(0, -round(found.short))},
        "host": {"capacity": round(hardware.host_memory_gb * 1e9) or None, "peak": round(found.memory.host_peak),
                 "short": max(0, round(found.host_short)), "parts": {k: round(v) for k, v in found.memory.host.items()}},
        "memory": {
            phase.name: {
                "total": round(phase.total), "allocated": round(phase.allocated),
                "roles": {role: {i.part: round(phase.of(role=role, part=i.part)) for i in phase.items if i.role == role}
                          for role in dict.fromkeys(i.role for i in phase.items)},
            }
            for phase in found.memory.phases
        },
        "largest_batch": None if found.largest is None else {"sequences": found.largest.global_batch,
                                                             "overrides": list(batch_words(found.largest))},
        "remedies": [_advice_json(advice) for advice in found.remedies],
        "search": None if found.proposal is None else _advice_json(found.proposal),
        "seconds": found.time.seconds or None,
        "seconds_per_iteration": found.time.total or None,
        "sequences": work.global_batch // rows(work) if work.step in ("reward", "dpo") else work.global_batch,
        "sequences_per_second": found.time.sequences_per_second or None,
        "samples": found.samples,
        "hours": found.hours,
        "dollars": found.dollars,
    }  # fmt: skip


def _advice_json(advice: Advice) -> dict[str, Any]:
    return {"overrides": list(advice.words), "peak": round(advice.peak), "seconds_per_iteration": advice.seconds or None}


def judged(cfg: Any) -> tuple[str | None, str | None]:
    """Why a training verb should not start, and otherwise why it may run out of memory all the same: one sentence or None each.

    Nothing is known of a CPU, nor of a model whose shape is not in the table of planning.
    """
    if cfg.hardware.name == "cpu" or cfg.hardware.memory_gb == 0:
        return None, None
    try:
        work = workload(cfg)
    except UserError:
        return None, None
    machine = machine_of(cfg)
    if machine.fits(work):
        return None, caution(machine, work)
    return _refusal(work, machine), None


def _refusal(work: Workload, machine: Machine) -> str:
    short, host_short = machine.short(work)
    memory, hardware = machine.memory(work), machine.hardware
    if short > 0:
        what = (
            f"a GPU is {short / 1e9:.1f} GB short of memory in the phase {memory.worst.name!r}: {memory.peak / 1e9:.1f} GB of the "
            f"{hardware.memory_gb:g} GB of hardware={hardware.name}"
        )
    else:
        what = (
            f"a node is {host_short / 1e9:.1f} GB short of main memory: {memory.host_peak / 1e9:.1f} GB of the {hardware.host_memory_gb:g} GB "
            f"of hardware={hardware.name} (hardware.host_memory_gb)"
        )
    help_ = remedies(work, machine, most=1)
    advice = f"{' '.join(help_[0][0])} would fit" if help_ else "no knob tried makes it fit: more GPUs or a smaller model would"
    return f"{what}; {advice}, and plan.enforce=false goes on"
