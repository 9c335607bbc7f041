"""What one role's engine holds: weights, gradients, optimizer state, buffers, on the GPU and on the host.

Follows DeepSpeed 0.19 as rlhf/engines configures it (runtime/zero/stage_1_and_2.py, stage3.py, runtime/fp16/fused_optimizer.py). Exact but
for padding and parameters below the persistence threshold, unless a line says estimate. Bytes of one rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf.planning.workload import Role, Workload

SUB_GROUP = 10**9
"""Elements that the ZeRO-3 optimizer steps at once (DeepSpeed's default of sub_group_size)."""
MASTER, MOMENTS = 4, 8
"""Bytes a trained parameter: the fp32 master, Adam's two moments."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Held in every phase."""

    weights: float
    gradients: float
    optimizer: float
    ema: float
    buffers: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.ema + self.buffers


def sharded(role: Role, work: Workload) -> int:
    """Ranks over which optimizer state and reduced gradients are split."""
    return work.ranks if role.stage >= 1 else 1


def weights(role: Role, work: Workload) -> float:
    """Parameters and adapters on the GPU. MixZ++ keeps frozen weights in 8 bits (estimate: without scales), and with a secondary
    partition another 8-bit copy split within a node."""
    if role.zero.offload_params or role.shared:
        return 0.0
    ranks = work.ranks if role.stage == 3 else 1
    total = role.parameters + role.adapters
    if not role.zero.quantized_weights or not role.trained:
        return total * work.element / ranks
    learning = min(role.trainable, total)
    secondary = (total - learning) / role.zero.hpz_partition_size if role.zero.hpz_partition_size > 1 else 0.0
    return learning * work.element / ranks + (total - learning) / ranks + secondary


def standing(role: Role, work: Workload) -> Standing:
    gradients = optimizer = ema = buffers = 0.0
    trained, ranks = role.trainable, sharded(role, work)
    if role.trained:
        if not role.zero.offload_optimizer:
            optimizer = trained * (MOMENTS + (MASTER if has_master(role, work) else 0)) / ranks
        if role.stage == 3:
            buffers = float(role.zero.reduce_bucket_size * work.element)
            gradients = 0.0 if role.zero.offload_optimizer else trained * work.element / ranks
        if role.averaged and not role.zero.offload_optimizer:
            ema = trained * 4 / ranks
    return Standing(weights=weights(role, work), gradients=gradients, optimizer=optimizer, ema=ema, buffers=buffers)


def has_master(role: Role, work: Workload) -> bool:
    """An fp32 copy of what is trained: always at 16 bits, and at stages 1 and 2 in fp32 as well."""
    return work.element == 2 or role.stage in (1, 2)


def buckets(role: Role, work: Workload) -> float:
    """Buffers that gradients are reduced in, during the role's own backward pass at stages 1 and 2: two where communication overlaps."""
    if role.stage not in (1, 2):
        return 0.0
    return role.zero.reduce_bucket_size * work.element * (2 if role.zero.overlap_comm else 1)


def keeps_buckets(role: Role, work: Workload) -> bool:
    """Stage 1 reduces in the last micro-batch alone, and holds its buckets from the first one until then."""
    return role.trained and role.stage == 1 and work.accumulates


def gradients_at(role: Role, work: Workload, *, end: bool) -> float:
    """Beside the standing ones, at the start and at the end of the last backward pass of a step.

    Stage 0 and, until the last micro-batch, stage 1 keep whole gradients; stage 2 adds each micro-batch's part to the sum of those before.
    """
    trained, accumulates = role.trainable * work.element, work.accumulates
    if role.stage == 3:
        return 0.0
    if role.stage == 0:
        return trained if end or accumulates else 0.0
    if role.zero.offload_optimizer:
        return trained if role.stage == 1 and accumulates else 0.0
    part = trained / work.ranks
    if role.stage == 1:
        return (trained if accumulates else 0.0) + (part if end else 0.0)
    return part * ((2 if end else 1) if accumulates else (1 if end else 0))


def waiting_gradients(role: Role, work: Workload, *, reduced: bool) -> float:
    """Gradients that wait for the step while other roles train, beside the standing ones.

    Args:
        reduced: after the last micro-batch; before it stage 1 keeps them whole.
    """
    if role.stage == 3:
        return 0.0
    if role.stage == 1 and not reduced and work.accumulates:
        return float(role.trainable * work.element)
    if role.zero.offload_optimizer:
        return 0.0
    return role.trainable * work.element / sharded(role, work)


def step_workspace(role: Role, work: Workload) -> float:
    """What the optimizer step adds to gradients and state: a flat copy of the gradients, the same in fp32, and for torch's AdamW, which
    works on all tensors at once, one fp32 temporary."""
    if role.zero.offload_optimizer:
        return 0.0
    trained = role.trainable / sharded(role, work)
    temporary = 0 if role.optimizer == "fused_adam" else 4
    if role.stage == 0 and work.element == 4:
        return trained * temporary
    if role.stage == 0:  # fp16: every gradient in fp32, then flat
        return trained * max(8, 4 + temporary)
    if role.stage == 3:
        trained = min(trained, float(SUB_GROUP))
    flat = work.element + (0 if work.element == 4 else 4)
    return trained * max(flat, 4 + temporary)


def gather_buffer(role: Role, work: Workload) -> float:
    """Whole parameters at once in a pass under ZeRO-3: as many as may be live, and the largest tensor or a layer on top. Nothing on one rank,
    whose shard is the whole. An estimate: what is prefetched depends on the order of modules."""
    if role.stage != 3 or (work.ranks == 1 and not role.zero.offload_params):
        return 0.0
    net, piece = role.network, float(role.network.largest_tensor)
    if role.zero.gather_layers:
        piece = max(piece, net.layer + role.adapters / net.layers)
    return work.element * min(float(role.parameters + role.adapters), role.zero.max_live_parameters + piece)


def pinned(size: float) -> float:
    """Pinned host memory comes in powers of two (PyTorch's caching host allocator)."""
    return 2.0 ** math.ceil(math.log2(size)) if size > 0 else 0.0


def host(role: Role, work: Workload) -> float:
    """Host memory of one rank in training."""
    size = 0.0
    if role.shared:
        return size
    total = role.parameters + role.adapters
    if role.zero.offload_params:
        size += pinned(total * work.element / work.ranks)
    if role.trained and role.zero.offload_optimizer:
        trained = role.trainable / work.ranks
        size += trained * MOMENTS + pinned(trained * 4)  # moments; fp32 gradients
        if role.stage == 3:
            size += trained * MASTER + pinned(trained * work.element)
        else:
            size += pinned(trained * MASTER) + pinned(trained * work.element)
        if role.averaged:
            size += trained * 4
    return size


def building(role: Role, work: Workload) -> float:
    """Host memory of one rank before training: a network that ZeRO-3 does not shard is built on the host, all of them before the first
    one moves to its GPU."""
    return 0.0 if role.stage == 3 or role.shared else float(role.parameters + role.adapters) * work.element
