"""Peak memory of a job by phase, role and part, on one GPU and on one node's host.

A phase's peak is the sum of what stands through the whole run and what the phase adds at its worst moment. Knows no hardware but its size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from rlhf.planning import activations, rollouts, states
from rlhf.planning.workload import Role, Workload

PARTS = (
    "weights", "gradients", "optimizer", "EMA", "activations", "logits", "KV cache", "inference copy", "gather buffers", "reduce buffers",
    "step", "workspace", "reserve",
)  # fmt: skip
OUTSIDE_TORCH = ("KV cache", "inference copy", "reserve")
"""Parts that PyTorch's allocator does not see: the hybrid engine maps them by the driver (rlhf/inference/arena.py)."""


@dataclass(frozen=True)
class Item:
    role: str
    part: str
    size: float
    """Bytes."""


@dataclass(frozen=True)
class Phase:
    """One phase at its worst moment."""

    name: str
    items: tuple[Item, ...]

    @property
    def total(self) -> float:
        return sum(item.size for item in self.items)

    @property
    def allocated(self) -> float:
        """What torch.cuda.max_memory_allocated counts of it."""
        return sum(item.size for item in self.items if item.part not in OUTSIDE_TORCH or (item.part == "KV cache" and item.role == "hf"))

    def of(self, *, role: str | None = None, part: str | None = None) -> float:
        return sum(item.size for item in self.items if role in (None, item.role) and part in (None, item.part))


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one GPU by phase, and of one node's host."""

    phases: tuple[Phase, ...]
    host: dict[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> float:
        return self.worst.total

    @property
    def allocated(self) -> float:
        """The largest torch.cuda.max_memory_allocated of any phase (metrics.csv: memory/peak_gb)."""
        return max(phase.allocated for phase in self.phases)

    @property
    def host_peak(self) -> float:
        return sum(self.host.values())


@dataclass(frozen=True, kw_only=True)
class Reserve:
    """What no formula gives."""

    context: float
    """CUDA context, libraries' workspaces and captured graphs, bytes."""
    communication: float
    """NCCL's buffers where there is more than one rank, bytes."""
    fragmentation: float
    """Share of what PyTorch allocates that it holds beside it."""
    process: float
    """Host memory of one rank's process, bytes."""


def memory_plan(work: Workload, reserve: Reserve) -> MemoryPlan:
    """The whole: every phase of the job with what stands beside it."""
    phases = [_closed(name, list(items), work, reserve) for name, items in _phases(work)]
    return MemoryPlan(tuple(phases), host_memory(work, reserve))


def _closed(name: str, items: list[Item], work: Workload, reserve: Reserve) -> Phase:
    items = [item for item in items if item.size > 0]
    allocated = Phase(name, tuple(items)).allocated
    beside = reserve.context + (reserve.communication if work.ranks > 1 else 0.0) + reserve.fragmentation * allocated
    return Phase(name, (*items, Item("all", "reserve", beside)))


def _phases(work: Workload) -> Iterator[tuple[str, list[Item]]]:
    standing = list(_standing(work))
    if work.rollout is not None and work.rollout.engine != "recorded":
        yield "generate", standing + list(_generate(work))
    standing += list(_kept_between_rollouts(work))
    if work.step == "ppo":
        yield "score", standing + _scoring(work)
    trained = [role for role in work.roles.values() if role.trained]
    for index, role in enumerate(trained):
        waiting = [r for r in trained if r is not role and (work.accumulates or trained.index(r) < index)]
        pending = [Item(r.name, "gradients", states.waiting_gradients(r, work, reduced=False)) for r in waiting]
        pending += [Item(r.name, "reduce buffers", states.buckets(r, work)) for r in waiting if states.keeps_buckets(r, work)]
        yield f"train {role.name}", standing + pending + _training(role, work)
    everybody = [Item(r.name, "gradients", states.waiting_gradients(r, work, reduced=True)) for r in trained]
    worst = max(trained, key=lambda role: states.step_workspace(role, work))
    yield "update", standing + everybody + [Item(worst.name, "step", states.step_workspace(worst, work))]


def _standing(work: Workload) -> Iterator[Item]:
    for role in work.roles.values():
        held = states.standing(role, work)
        yield Item(role.name, "weights", held.weights)
        yield Item(role.name, "gradients", held.gradients)
        yield Item(role.name, "optimizer", held.optimizer)
        yield Item(role.name, "EMA", held.ema)
        yield Item(role.name, "reduce buffers", held.buffers)


def _generate(work: Workload) -> Iterator[Item]:
    # transformers' generate allocates its cache through PyTorch, the hybrid engine through the driver.
    yield Item("actor" if rollouts.fast(work) else "hf", "KV cache", rollouts.cache(work))
    yield Item("actor", "inference copy", rollouts.copies(work))
    yield Item("actor", "gather buffers", rollouts.gathered(work))
    yield Item("actor", "workspace", rollouts.workspace(work))


def _kept_between_rollouts(work: Workload) -> Iterator[Item]:
    if work.rollout is None or not rollouts.fast(work):
        return
    if not work.rollout.release_inference_cache:
        yield Item("actor", "KV cache", rollouts.cache(work))
    if work.rollout.pin_parameters:
        yield Item("actor", "inference copy", rollouts.copies(work))


def _scoring(work: Workload) -> list[Item]:
    """The role whose forward pass needs most; logits of one causal model at a time."""
    scoring = [role for role in work.roles.values() if role.name != "actor" or work.old_logprobs == "actor"]
    return max((_forward(role, work) for role in scoring), key=lambda items: sum(item.size for item in items))


def _forward(role: Role, work: Workload) -> list[Item]:
    """The worse of two moments: in a layer, or at the head, where a layer's tensors are gone and the last norm's input and output are there."""
    rows, element = work.score_micro, work.element
    layer = activations.forward_workspace(role.network, element, rows, work.length, adapted=role.lora is not None)
    last, logits = 2.0 * element * role.network.hidden * rows * work.length, _logits(role, work, rows, backward=False)
    moment = (layer, 0.0) if layer > last + logits else (last, logits)
    return [
        Item(role.name, "activations", moment[0]),
        Item(role.name, "logits", moment[1]),
        Item(role.name, "gather buffers", states.gather_buffer(role, work)),
    ]


def _logits(role: Role, work: Workload, rows: int, *, backward: bool) -> float:
    if role.kind == "scalar":
        return 0.0
    scored = max(work.scored, work.length) if work.ptx and role.trained else work.scored
    return activations.logits(role.network, work.element, rows, scored, backward=backward)


def _training(role: Role, work: Workload) -> list[Item]:
    """The worst of three moments of a backward pass: at the head, when the first bucket of gradients is full, and at the end.

    Activations shrink as the pass goes, gradients grow. At stages 1 and 2 the memory of all reduced gradients is taken at once, when the first
    bucket has been reduced. The buckets come with the first gradient, behind the head.
    """
    element, rows = work.element, work.micro
    at_head = activations.kept_at_head(role, element, rows, work.length)
    kept = activations.kept(role, element, rows, work.length)
    buckets = states.buckets(role, work)
    workspace = activations.backward_workspace(role, element, rows, work.length)
    logits = _logits(role, work, rows, backward=True)
    start, end = (states.gradients_at(role, work, end=flag) for flag in (False, True))
    full = min(1.0, role.zero.reduce_bucket_size / max(1, role.trainable)) if role.stage in (1, 2) else 1.0
    tied = element * role.network.tables[0] if role.kind == "causal" and role.network.head is None and role.trainable > role.adapters else 0
    moments = [
        {
            "activations": at_head,
            "logits": logits,
            "gradients": start,
            "reduce buffers": buckets if states.keeps_buckets(role, work) else 0.0,
        },
        {"activations": kept, "workspace": workspace, "gradients": start + tied, "reduce buffers": buckets},
        {"activations": kept * (1 - full), "workspace": workspace, "gradients": end + tied, "reduce buffers": buckets},
    ]
    other = _reference(work) if work.step == "dpo" else []
    moment = max(moments, key=lambda parts: sum(parts.values()))
    items = [Item(role.name, part, size) for part, size in moment.items()]
    items.append(Item(role.name, "gather buffers", states.gather_buffer(role, work)))
    return items + other


def _reference(work: Workload) -> list[Item]:
    """DPO runs the reference before the actor; what it gathers is gone by then, but may be cached."""
    ref = work.roles["ref"]
    return [] if ref.shared else [Item("ref", "gather buffers", states.gather_buffer(ref, work))]


def host_memory(work: Workload, reserve: Reserve) -> dict[str, float]:
    """Bytes of one node's host at its worst: networks are built there, then move to the GPUs one by one while offloaded state appears."""
    roles = list(work.roles.values())
    worst, built, offloaded = -1.0, 0.0, 0.0
    for i in range(len(roles)):
        waiting = sum(states.building(role, work) for role in roles[i:])
        moved = sum(states.host(role, work) for role in roles[: i + 1])
        if waiting + moved > worst:
            worst, built, offloaded = waiting + moved, waiting, moved
    final = sum(states.host(role, work) for role in roles)
    if final > worst:
        built, offloaded = 0.0, final
    return {
        "processes": reserve.process * work.per_node,
        "networks being built": built * work.per_node,
        "offloaded": offloaded * work.per_node,
    }
