"""What a forward pass of transformers' layers keeps for the backward pass, and what it needs while it runs.

The count follows Korthikanti et al. 2022 (arXiv 2205.05198, section 4.1: 34 s b h + 5 a s^2 b bytes a layer at 16 bits), taken apart and put
together again for the layers that transformers 5 has: no T x T matrix where attention is fused, no dropout masks where dropout is off, the
output of a ReLU kept once, RMSNorm's fp32 copies. tests/planning/test_activations.py counts what real forward passes keep: the formula is within
2 % for OPT, GPT-2, GPT-NeoX, LLaMA and Qwen2, within 8 % for families with eager attention. Workspaces are estimates. All sizes are bytes;
`element` is the width of an activation.
"""

from __future__ import annotations

from rlhf.planning.networks import Network
from rlhf.planning.workload import Role

PIECE = 2**24
"""Logits that are in fp32 at a time (rlhf/algorithms/logprobs.py)."""
KEPT_BY_ACTIVATION = {"relu": 1, "gelu": 2, "gelu_fused": 2, "gelu_new": 5, "gated": 4}
"""Tensors of the MLP's width: ReLU keeps its output, which the next product reads, too; GELU its input as well; the tanh GELU that is
written out in Python all its factors; a gated MLP gate, activated gate, up and their product."""


def kept_in_layer(role: Role, element: int, length: int) -> float:
    """Of one token in one layer, beside the layer's own input.

    Args:
        length: tokens of the row: what attention without a fused kernel keeps T x T of.
    """
    net = role.network
    norms = _norms(net, element)
    queries, keys = net.heads * net.head_dim, net.kv_width
    attention = element * (2 * queries + keys) + 4 * net.heads  # q, k, v, what comes out, and fp32 sums
    if net.rotates_fused:
        attention += element * (queries + keys // 2)  # v is a view, and keeps the whole product beside the rotated q and k
    if not net.fused_attention:
        attention += (4 + (element if element == 2 else 0)) * net.heads * length  # softmax in fp32, and its cast
    mlp = element * KEPT_BY_ACTIVATION[net.activation] * net.intermediate
    masks = net.dropouts * net.hidden if role.drops else 0  # one byte each
    adapters = 0.0
    if role.lora is not None:
        adapters = element * role.lora.rank * sum(role.adapts(m) for m in net.matrices)
    return norms + attention + mlp + masks + adapters


def _norms(net: Network, element: int) -> float:
    """Two norms a layer: their outputs, which the products read; the second one's input (the first one's is the layer's own). In 16 bits
    RMSNorm goes through fp32: it keeps an fp32 copy of its input instead of the input, and the normalised value in 16 bits."""
    if not net.rms:
        return element * 3 * net.hidden + 16
    return (2 * (4 + 2 * element) - element) * net.hidden if element == 2 else element * 5 * net.hidden


def kept(role: Role, element: int, rows: int, length: int) -> float:
    """Of a whole training forward pass over (rows, length) tokens, without logits; with checkpointing, the one layer that is made again."""
    return kept_at_head(role, element, rows, length) + (remade(role, element, rows, length) if role.checkpointing else 0.0)


def kept_at_head(role: Role, element: int, rows: int, length: int) -> float:
    """The same when the head has been reached: with checkpointing the layers' inputs alone."""
    net = role.network
    inner = 0.0 if role.checkpointing else kept_in_layer(role, element, length)
    return rows * length * ((element * net.hidden + inner) * net.layers + outside(role, element))


def remade(role: Role, element: int, rows: int, length: int) -> float:
    """One layer that checkpointing runs again in the backward pass."""
    return rows * length * kept_in_layer(role, element, length)


def outside(role: Role, element: int) -> float:
    """Of one token: the last norm's input and output, and the columns that the head reads (rlhf/models/networks.py: hidden)."""
    net = role.network
    norm = 4 * net.hidden if net.rms else 0
    projected = net.embed_width if net.projections else 0  # what the table gives, before it is projected
    return element * (net.hidden + 2 * net.embed_width + projected) + norm


def backward_workspace(role: Role, element: int, rows: int, length: int) -> float:
    """Gradients of activations that exist at once in one layer. An estimate: the MLP's gradient and what it is made into, and four hidden
    states."""
    net = role.network
    wide = ((4 if net.activation == "gated" else 2) + (1 if role.lora is not None else 0)) * net.intermediate
    square = 2 * (4 + element) * net.heads * length if not net.fused_attention else 0
    return rows * length * (element * (wide + 4 * net.hidden) + square)


def forward_workspace(net: Network, element: int, rows: int, length: int, *, adapted: bool = False) -> float:
    """Of a forward pass without gradients: one layer's tensors. An estimate.

    Args:
        adapted: a layer's product, its adapter's and their sum exist at once.
    """
    wide = ((3 if net.activation == "gated" else 2) + (1 if adapted else 0)) * net.intermediate
    square = (4 + 2 * element) * net.heads * length if not net.fused_attention else 0
    return rows * length * (element * (wide + 4 * net.hidden) + (8 * net.hidden if net.rms else 0) + square)


def logits(net: Network, element: int, rows: int, scored: int, *, backward: bool) -> float:
    """Logits of `scored` positions a row: once in a forward pass, with their gradient in a backward pass, and the fp32 pieces."""
    count = rows * scored * net.vocab
    pieces = 4 * min(count, max(PIECE, net.vocab)) * 3
    return count * element * (2 if backward else 1) + pieces
