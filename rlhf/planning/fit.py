"""From a plan to an answer: does it fit, by how much is it short, what is the largest batch, which knobs help, what would be fastest.

Knobs are tried, one after the other, on the same model of memory; none is advised unseen. Knows the words that a command line takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rlhf.planning.memory import MemoryPlan, Reserve, memory_plan
from rlhf.planning.speed import TimePlan, time_plan
from rlhf.planning.workload import Role, Workload
from rlhf.settings import EfficiencyConfig, HardwareConfig

LARGEST_BATCH = 2**16

Words = tuple[str, ...]
"""Overrides of a command line."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a plan is held against."""

    hardware: HardwareConfig
    reserve: Reserve
    efficiency: EfficiencyConfig | None = None

    @property
    def on_cpu(self) -> bool:
        return self.hardware.name == "cpu"

    def capacity(self, work: Workload) -> float:
        """Bytes of one rank's device; the ranks of a CPU share it."""
        return self.hardware.memory_gb * 1e9 / (work.per_node if self.on_cpu else 1)

    def short(self, work: Workload) -> tuple[float, float]:
        """Bytes by which GPU and host are short; at most 0 where it fits."""
        plan = memory_plan(work, self.reserve)
        host = plan.host_peak - self.hardware.host_memory_gb * 1e9 if self.hardware.host_memory_gb and not self.on_cpu else 0.0
        return plan.peak - self.capacity(work), host

    def fits(self, work: Workload) -> bool:
        return max(self.short(work)) <= 0

    def time(self, work: Workload) -> TimePlan:
        assert self.efficiency is not None
        return time_plan(work, self.hardware, self.efficiency)

    def memory(self, work: Workload) -> MemoryPlan:
        return memory_plan(work, self.reserve)


def batch_keys(work: Workload) -> tuple[str, ...]:
    return {"ppo": ("ppo.batch_size", "ppo.minibatch_size"), "sft": ("sft.batch_size",), "reward": ("rm.batch_size",),
            "dpo": ("dpo.batch_size",)}[work.step]  # fmt: skip


def section(work: Workload) -> str:
    return {"reward": "rm"}.get(work.step, work.step)


def rows(work: Workload) -> int:
    """Rows of an example: a pair is two."""
    return 2 if work.step in ("reward", "dpo") else 1


# --- batch ----------------------------------------------------------------------------------------------------------------------


def with_batch(work: Workload, per_rank: int) -> Workload:
    """The same job with so many rows of a rank in each iteration, in as many minibatches as before. A micro-batch that was smaller than the
    minibatch stays; one that was the whole of it grows."""
    parts = work.batch // work.minibatch
    whole, scored_whole = work.micro == work.minibatch, work.score_micro == work.batch
    minibatch = per_rank // parts
    return dataclasses.replace(
        work, global_batch=per_rank // rows(work) * work.ranks, batch=per_rank, minibatch=minibatch,
        micro=minibatch if whole else min(work.micro, minibatch), score_micro=per_rank if scored_whole else min(work.score_micro, per_rank),
    )  # fmt: skip


def largest_batch(work: Workload, machine: Machine) -> Workload | None:
    """With the largest batch that fits and that ranks, minibatches and micro-batches divide; None: not even the smallest does."""
    parts = work.batch // work.minibatch
    fixed = work.micro < work.minibatch
    unit = (work.micro if fixed else rows(work)) * parts
    if work.step == "ppo" and unit % work.samples:
        unit *= work.samples

    def fits(count: int) -> bool:
        return machine.fits(with_batch(work, count * unit))

    if not fits(1):
        return None
    low, high = 1, 2
    while high * unit * work.ranks <= LARGEST_BATCH and fits(high):
        low, high = high, high * 2
    high = min(high, LARGEST_BATCH // (unit * work.ranks) + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return with_batch(work, low * unit)


# --- knobs ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Knob:
    """A change that leaves the learning as it is, unless `changes` says what it changes."""

    words: Words
    """Overrides for the command line."""
    apply: Callable[[Workload], Workload]
    changes: str = ""


def with_role(work: Workload, name: str, **values: Any) -> Workload:
    roles = work.roles | {name: dataclasses.replace(work.roles[name], **values)}
    # Whatever changed may be the actor's sharding, which is that of a reference that it answers for.
    if "ref" in roles and roles["ref"].shared:
        roles["ref"] = dataclasses.replace(roles["ref"], zero=roles["actor"].zero, stage=roles["actor"].stage)
    return dataclasses.replace(work, roles=roles)


def owners(work: Workload) -> list[Role]:
    """Roles with weights of their own, which can be sharded."""
    return [role for role in work.roles.values() if not role.shared]


def shareable(work: Workload) -> bool:
    return "ref" in work.roles and work.roles["ref"].shareable


def share_words(work: Workload) -> Words:
    return ("ref.shared=true", *(["zero@ref.zero=z0"] if work.roles["ref"].zero.stage else []))


def share(work: Workload) -> Workload:
    """The same job without a second copy of the actor's frozen weights."""
    return with_role(work, "ref", shared=True, shareable=False)


def _sharded(work: Workload, role: Role, stage: int, *, offload: bool = False) -> Workload:
    zero = dataclasses.replace(
        role.zero, stage=stage,  # type: ignore[arg-type]
        offload_optimizer=offload and role.trained, offload_params=offload and stage == 3, quantized_weights=False,
        hpz_partition_size=1,
    )  # fmt: skip
    runs = (max(1, stage) if work.precision == "bf16" else stage) if role.trained else (3 if stage == 3 else 0)
    optimizer = role.optimizer
    if role.trained and offload:
        optimizer = "cpu_adam"
    elif role.trained and optimizer == "cpu_adam":
        optimizer = "fused_adam"
    return with_role(work, role.name, zero=zero, stage=runs, optimizer=optimizer)


def optimizer_key(work: Workload, role: Role) -> str:
    return f"ppo.{role.name}_optimizer" if work.step == "ppo" else f"{section(work)}.optimizer"


def zero_words(work: Workload, role: Role, stage: int, *, offload: bool = False) -> list[str]:
    name = f"z{stage}" + (("_offload" if role.trained else "_offload_params") if offload else "")
    words = [f"zero@{role.name}.zero={name}"]
    if role.trained and offload:
        words.append(f"optimizer@{optimizer_key(work, role)}=cpu_adam")
    elif role.trained and role.optimizer == "cpu_adam":
        words.append(f"optimizer@{optimizer_key(work, role)}=fused_adam")
    return words


def shard_all(work: Workload, stage: int, *, offload: bool = False) -> tuple[Words, Workload]:
    """Every role at a stage. A frozen role knows 0 and 3 only, and offloads parameters at 3."""
    words: list[str] = []
    for role in owners(work):
        if not role.trained and stage != 3:
            continue
        words += zero_words(work, role, stage, offload=offload)
        work = _sharded(work, role, stage, offload=offload)
    return tuple(words), work


def micro_sizes(work: Workload) -> list[int]:
    """Rows of a forward pass that divide the minibatch, from large to small."""
    step = rows(work)
    return [n for n in range(work.minibatch, 0, -1) if work.minibatch % n == 0 and n % step == 0]


def knobs(work: Workload, machine: Machine) -> Iterator[Knob]:
    """In the order in which they are worth trying: what costs least time first, what changes the learning last."""
    trained = [role for role in work.roles.values() if role.trained]
    name = section(work)
    plain = [role for role in trained if not role.checkpointing]
    if any(role.optimizer == "adamw" for role in trained) and not machine.on_cpu:
        words = tuple(f"optimizer@{optimizer_key(work, r)}=fused_adam" for r in trained if r.optimizer == "adamw")
        yield Knob(words, _each([r.name for r in trained if r.optimizer == "adamw"], optimizer="fused_adam"))
    smaller = [n for n in micro_sizes(work) if n < work.micro]
    for size in smaller[:1] + smaller[1::2][:4] + smaller[-1:]:
        sizes = [f"{name}.micro_batch_size={size // rows(work)}"]
        score = size if work.step == "ppo" and work.batch % size == 0 else work.score_micro
        if score < work.score_micro:
            sizes.append(f"ppo.score_micro_batch_size={score}")
        yield Knob(tuple(sizes), _sizes(size, min(score, work.score_micro) if work.step == "ppo" else size))
    if plain:
        yield Knob(tuple(f"{r.name}.gradient_checkpointing=true" for r in plain), _each([r.name for r in plain], checkpointing=True))
    if shareable(work):
        yield Knob(share_words(work), share)
    yield from _rollout_knobs(work)
    if work.ranks > 1:
        for stage in (2, 3):
            words, changed = shard_all(work, stage)
            if changed != work:
                yield Knob(words, _to_stage(stage))
    for stage in (2, 3):
        if machine.hardware.host_link_gbs > 0:
            yield Knob(shard_all(work, stage, offload=True)[0], _to_stage(stage, offload=True))


def _each(names: list[str], **values: Any) -> Callable[[Workload], Workload]:
    def apply(work: Workload) -> Workload:
        for name in names:
            work = with_role(work, name, **values)
        return work

    return apply


def _sizes(micro: int, score: int) -> Callable[[Workload], Workload]:
    return lambda work: dataclasses.replace(work, micro=min(work.micro, micro), score_micro=min(work.score_micro, score))


def _to_stage(stage: int, *, offload: bool = False) -> Callable[[Workload], Workload]:
    return lambda work: shard_all(work, stage, offload=offload)[1]


def _rollout_knobs(work: Workload) -> Iterator[Knob]:
    if work.rollout is None or work.rollout.engine == "recorded":
        return
    rollout = work.rollout
    keeps = {"release_inference_cache": True, "pin_parameters": False}
    changed = {key: value for key, value in keeps.items() if rollout.engine == "hybrid_engine" and getattr(rollout, key) != value}
    if changed:
        yield Knob(tuple(f"rollout.{key}={str(value).lower()}" for key, value in changed.items()), _rollout(**changed))
    slots = rollout.micro_batch_size or work.batch
    for size in (slots // 2, slots // 4, slots // 8):
        if size >= 1:
            yield Knob((f"rollout.micro_batch_size={size}",), _rollout(micro_batch_size=size))
    net = work.roles["actor"].network
    for size in (2, 4, 8):
        if size > work.tp and work.per_node % size == 0 and net.heads % size == 0 and net.kv_heads % size == 0 and net.fast_rollout:
            yield Knob((f"tp=tp{size}",), lambda w, n=size: dataclasses.replace(w, tp=n))  # type: ignore[misc]


def _rollout(**values: Any) -> Callable[[Workload], Workload]:
    return lambda work: dataclasses.replace(work, rollout=dataclasses.replace(work.rollout, **values))  # type: ignore[type-var]


def remedies(work: Workload, machine: Machine, *, most: int = 4) -> list[tuple[Words, Workload]]:
    """The first knobs that make it fit alone, the fastest first; where none does, the shortest row of them found by always taking the one
    that saves most. Empty: nothing here helps."""
    tried = [(knob.words, knob.apply(work)) for knob in knobs(work, machine)]
    alone = [(words, changed) for words, changed in tried if machine.fits(changed)]
    if alone:
        if machine.efficiency is not None:
            alone.sort(key=lambda pair: machine.time(pair[1]).total)
        return alone[:most]
    words: Words = ()
    short = sum(max(0.0, x) for x in machine.short(work))
    for _ in range(6):
        options = [(sum(max(0.0, x) for x in machine.short(k.apply(work))), k) for k in knobs(work, machine)]
        if not options or min(options, key=lambda o: o[0])[0] >= short:
            return []
        short, knob = min(options, key=lambda o: o[0])
        words, work = _merged(words, knob.words), knob.apply(work)
        if short <= 0:
            return [(words, work)]
    return []


def _merged(words: Words, more: Words) -> Words:
    """The later of two words for one key wins."""
    by_key = {word.partition("=")[0]: word for word in (*words, *more)}
    return tuple(by_key.values())


# --- search ---------------------------------------------------------------------------------------------------------------------


def search(work: Workload, machine: Machine) -> tuple[Words, Workload] | None:
    """The fastest of sharding x offload x checkpointing x micro-batch x tensor parallelism that fits, and of a reference with and without weights
    of its own where it may do without; batch, LoRA and precision stay."""
    best: tuple[float, Words, Workload] | None = None
    tried = list(candidates(work, machine))
    if shareable(work):
        tried += [((*share_words(work), *words), candidate) for words, candidate in candidates(share(work), machine)]
    for words, candidate in tried:
        if not machine.fits(candidate):
            continue
        seconds = machine.time(candidate).total
        if best is None or seconds < best[0]:
            best = (seconds, words, candidate)
    return None if best is None else best[1:]


def candidates(work: Workload, machine: Machine) -> Iterator[tuple[Words, Workload]]:
    """Ways to lay a job out, with the overrides that say so."""
    options: list[tuple[int, bool]] = [(0, False)] if work.ranks == 1 else [(0, False), (2, False), (3, False)]
    if machine.hardware.host_link_gbs > 0:
        options += [(2, True), (3, True)]
    micros = [n for n in micro_sizes(work) if n & (n - 1) == 0 or n == work.minibatch]
    sizes = [1, 2, 4, 8] if work.rollout is not None and work.rollout.engine == "hybrid_engine" else [work.tp]
    net = work.roles["actor"].network if "actor" in work.roles else None
    trained = [role.name for role in work.roles.values() if role.trained]
    for stage, offload in options:
        sharding, at_stage = _whole(work, stage, offload)
        for tp in sizes:
            if tp > 1 and (net is None or work.per_node % tp or net.heads % tp or net.kv_heads % tp or not net.fast_rollout):
                continue
            parallel = (f"tp=tp{tp}",) if work.rollout is not None else ()
            for checkpointing in (False, True):
                setting = tuple(f"{name}.gradient_checkpointing={str(checkpointing).lower()}" for name in trained)
                for micro in micros:
                    words, changed = _micro_words(dataclasses.replace(at_stage, tp=tp), micro)
                    yield (*sharding, *parallel, *setting, *words), _each(trained, checkpointing=checkpointing)(changed)


def _whole(work: Workload, stage: int, offload: bool) -> tuple[Words, Workload]:
    """Every role at a stage, and frozen ones whole below 3."""
    words: list[str] = []
    for role in owners(work):
        runs = stage if role.trained or stage == 3 else 0
        away = offload and (role.trained or stage == 3)
        words += zero_words(work, role, runs, offload=away)
        work = _sharded(work, role, runs, offload=away)
        if role.trained and not offload and role.optimizer == "adamw":
            words.append(f"optimizer@{optimizer_key(work, role)}=fused_adam")
            work = with_role(work, role.name, optimizer="fused_adam")
    return tuple(words), work


def _micro_words(work: Workload, micro: int) -> tuple[Words, Workload]:
    name = section(work)
    words = [f"{name}.micro_batch_size={micro // rows(work)}"]
    score = micro
    if work.step == "ppo":
        score = max(n for n in range(1, work.batch + 1) if work.batch % n == 0 and n <= max(micro, 1) * 4)
        words.append(f"ppo.score_micro_batch_size={score}")
    return tuple(words), dataclasses.replace(work, micro=micro, score_micro=score)
