"""Memory of a rollout: KV cache, the decoder's copies of weights, what prefill needs.

Cache and copies are exact (rlhf/inference/slots.py, weights.py); workspaces are estimates. Bytes of one rank.
"""

from __future__ import annotations

from rlhf.planning.activations import forward_workspace
from rlhf.planning.networks import Matrix
from rlhf.planning.workload import Workload

FOLDING = 12
"""Bytes an element of a weight while its adapter is folded in: base, change and sum in fp32 (rlhf/models/lora.py)."""


def fast(work: Workload) -> bool:
    """The hybrid engine answers; another family falls back on transformers' generate."""
    return work.rollout is not None and work.rollout.engine == "hybrid_engine" and work.roles["actor"].network.fast_rollout


def slots(work: Workload) -> int:
    """Sequences that one rank's decoder holds at once; the ranks of a tensor-parallel group put theirs together."""
    rows = work.batch * work.tp if fast(work) else work.batch
    most = work.rollout.micro_batch_size if work.rollout is not None else None
    return min(rows, (most or rows) * (work.tp if fast(work) else 1))


def cached_tokens(work: Workload) -> int:
    assert work.rollout is not None
    longest = work.prompt + work.rollout.max_new_tokens
    return (work.rollout.max_out_tokens or longest) if fast(work) else longest


def cache(work: Workload) -> float:
    """Keys and values of every slot, and of the one that idle rows write to."""
    net, n = work.roles["actor"].network, slots(work)
    if not fast(work):
        return float(net.layers * n * net.kv_width * cached_tokens(work) * work.element)
    return float(net.layers * (n + 1) * (net.kv_width // work.tp) * cached_tokens(work) * work.element)


def copies(work: Workload) -> float:
    """The decoder's own weights: all of them under ZeRO-3 or tensor parallelism, and what is fused or adapted otherwise. A tied head is
    shared with the token table, or copied beside it."""
    actor = work.roles["actor"]
    if not fast(work):
        return 0.0
    net, shared = actor.network, actor.stage != 3 and not actor.zero.offload_params

    def linear(matrix: Matrix) -> float:
        if work.tp > 1:
            weight = matrix.weights / work.tp
            whole_bias = matrix.name in ("out", "down")
            return weight + (matrix.rows / (1 if whole_bias else work.tp) if matrix.bias else 0)
        if matrix.copied or not shared:
            return float(matrix.count)
        return float(matrix.weights) if actor.adapts(matrix) else 0.0

    elements = net.layers * sum(linear(m) for m in net.matrices)
    elements += sum((0.0 if shared and not actor.adapts(m) else m.weights) for m in net.projections)
    if not shared:
        head = net.head.count if net.head is not None else net.tables[0]
        elements += net.layers * net.norms + net.outside + sum(net.tables) + head
    return elements * work.element


def workspace(work: Workload) -> float:
    """Prefill of one pass, logits of a step, and a weight while its adapter is folded in."""
    actor, element = work.roles["actor"], work.element
    net, n = actor.network, slots(work)
    if not fast(work):
        return forward_workspace(net, element, n, work.prompt) + n * net.vocab * (element + 8)
    assert work.rollout is not None
    rows = min(n, max(1, work.rollout.prefill_tokens // work.prompt))
    prefill = forward_workspace(net, element, rows, work.prompt) / work.tp
    folding = max((FOLDING * m.weights for m, _ in net.adapted if actor.adapts(m)), default=0.0)
    return max(prefill, folding) + n * net.vocab * (element + 4)


def gathered(work: Workload) -> float:
    """Whole parameters while the decoder fills: some layers, or what stands outside them; all of them for transformers' generate. One
    rank copies, too."""
    actor = work.roles["actor"]
    if actor.stage != 3:
        return 0.0
    if not fast(work):
        return float(actor.parameters * work.element)
    assert work.rollout is not None
    net = actor.network
    layers = min(work.rollout.tp_gather_partition_size, net.layers) * (net.layer + actor.adapters / net.layers)
    return work.element * max(layers, float(actor.parameters - net.layers * net.layer))
