"""The operations of a decode step in plain PyTorch: what runs on the CPU, and the twin that every kernel is tested against.

N tokens, B rows of a step, D hidden, H heads, K key/value heads, hd head dimension, V vocabulary, S slots (see slots.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.inference.sampling import Sampling, choose, filtered, uniforms
from rlhf.inference.shape import DecoderShape
from rlhf.inference.slots import Slots
from rlhf.inference.weights import Layer, Linear, Norm


@dataclass
class Positions:
    """What positions do to queries, keys and scores."""

    cos: Tensor | None = None  # (tokens, hd) fp32; 1 where a dimension does not turn
    sin: Tensor | None = None  # (tokens, hd) fp32, with the sign of the partner; 0 where a dimension does not turn
    partner: Tensor | None = None  # (hd,) int64, the dimension that turns with this one
    slopes: Tensor | None = None  # (H,) fp32, ALiBi's


class TorchOps:
    """Stateless; the kernels' class overrides what it does better."""

    def embed(self, table: Tensor, positions: Tensor | None, offset: int, slots: Slots, rows: Tensor) -> Tensor:
        """(V, D), (positions, D) or None -> (B, D): the last token of each row, at its position."""
        x = F.embedding(slots.tokens[rows], table)
        return x if positions is None else x + F.embedding(slots.lengths[rows] + offset, positions)

    def linear(self, x: Tensor, linear: Linear, activation: str | None = None) -> Tensor:
        """(N, in) -> (N, out)."""
        return activate(F.linear(x, linear.weight, linear.bias), activation)

    def project(self, x: Tensor, linear: Linear) -> Any:
        """(N, in) -> (N, D), or what this class's `add_norm` takes instead of it."""
        return self.linear(x, linear)

    def gate(self, x: Tensor, activation: str) -> Tensor:
        """(N, 2F) -> (N, F): act(gate) * up, gate first."""
        gate, up = x.chunk(2, dim=-1)
        return activate(gate, activation) * up

    def norm(self, x: Tensor, norm: Norm, shape: DecoderShape) -> Tensor:  # (N, D) -> (N, D)
        if shape.norm == "layer":
            return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, shape.norm_eps)
        return rms_norm(x, norm.weight, shape.norm_eps)

    def add_norm(self, x: Tensor, delta: Any, norm: Norm, shape: DecoderShape) -> tuple[Tensor, Tensor]:
        """(N, D), (N, D) -> the sum and the norm of the sum, (N, D) each."""
        total = x + delta
        return total, self.norm(total, norm, shape)

    def heads(self, qkv: Tensor, layer: Layer, positions: Positions, width: int, shape: DecoderShape) -> tuple[Tensor, Tensor, Tensor]:
        """(M P, (H + 2K) hd) of M prompts of P = `width` tokens -> queries (M, H, P, hd), keys and values (M, K, P, hd)."""
        at = torch.arange(width, device=qkv.device).repeat(len(qkv) // width)  # (M P,)
        q, k, v = (x.unflatten(0, (-1, width)).transpose(1, 2) for x in heads_of(qkv, layer, positions, at, shape))
        return q, k, v

    def attend_prompts(self, q: Tensor, k: Tensor, v: Tensor, positions: Positions) -> Tensor:
        """Queries (M, H, P, hd), keys and values (M, K, P, hd) of whole prompts, padded on the right -> (M, H, P, hd)."""
        if positions.slopes is not None:
            return alibi_attention(q, k, v, positions.slopes)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] > k.shape[1])

    def keep(self, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor, prompts: Tensor) -> None:
        """Puts prompts' keys and values (M, K, P, hd) into the cache (S + 1, K, tokens, hd): slots[i] gets those of prompts[i]."""
        keys[slots, :, : k.shape[2]] = k[prompts]
        values[slots, :, : v.shape[2]] = v[prompts]

    def attend(
        self, qkv: Tensor, keys: Tensor, values: Tensor, slots: Slots, rows: Tensor, layer: Layer, positions: Positions, shape: DecoderShape
    ) -> Tensor:
        """One token of each row against all before it; its key and value go into the cache.

        Args:
            qkv: (B, (H + 2K) hd)
            keys, values: (S + 1, K, tokens, hd) of this layer, written at each row's length.
            rows: (B,) the slot of each row.

        Returns:
            (B, H hd)
        """
        at = slots.lengths[rows]  # (B,)
        q, k, v = heads_of(qkv, layer, positions, at, shape)  # (B, H, hd), (B, K, hd), (B, K, hd)
        keys[rows, :, at] = k
        values[rows, :, at] = v
        longest = int(at.max()) + 1
        unseen = (torch.arange(longest, device=q.device) > at[:, None])[:, None, None]  # (B, 1, 1, longest)
        q, k, v = q.unsqueeze(2), keys[rows, :, :longest], values[rows, :, :longest]
        if positions.slopes is not None:
            return _alibi(q, k, v, positions.slopes, unseen).flatten(1)
        mask = torch.zeros_like(unseen, dtype=q.dtype).masked_fill(unseen, -torch.inf)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=shape.group > 1).flatten(1)

    def draw(self, logits: Tensor, slots: Slots, rows: Tensor, sampling: Sampling) -> None:
        """(B, V): draws each row's next token and writes it, its log-probability and what follows from it into the slots.

        The token that the logits came from is counted as read: it is in the cache now.
        """
        counts = slots.counts[rows]
        candidates = logits
        if sampling.min_new_tokens > 0:
            early = (counts < sampling.min_new_tokens).unsqueeze(1)
            stops = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
            stops[list(sampling.stop_ids)] = True
            candidates = logits.masked_fill(early & stops, -torch.inf)
        if sampling.filters:
            candidates = filtered(candidates, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
        uniform = uniforms(slots.seed, slots.sequences[rows], counts) if sampling.temperature > 0 else None
        tokens, logprobs = choose(logits, candidates, uniform, temperature=sampling.temperature)
        record(tokens, logprobs, slots, rows, sampling)


def record(tokens: Tensor, logprobs: Tensor, slots: Slots, rows: Tensor, sampling: Sampling) -> None:
    """(B,), (B,): one more answer token of every row that is not finished."""
    running = ~slots.finished[rows]
    counts = slots.counts[rows]
    at = counts.clamp(max=slots.answers.shape[1] - 1)
    slots.answers[rows, at] = torch.where(running, tokens, slots.answers[rows, at])
    slots.logprobs[rows, at] = torch.where(running, logprobs, slots.logprobs[rows, at])
    counts = counts + running
    stopped = torch.zeros_like(running)
    for stop in sampling.stop_ids:
        stopped |= tokens == stop
    slots.finished[rows] = ~running | stopped | (counts >= slots.limits[rows])
    slots.counts[rows] = counts
    slots.lengths[rows] += running
    slots.tokens[rows] = torch.where(running, tokens, slots.tokens[rows])


def heads_of(qkv: Tensor, layer: Layer, positions: Positions, at: Tensor, shape: DecoderShape) -> tuple[Tensor, Tensor, Tensor]:
    """(N, (H + 2K) hd), positions (N,) -> queries (N, H, hd), keys (N, K, hd), values (N, K, hd), normed and turned."""
    hd = shape.head_dim
    kv = qkv.shape[-1] // (hd * (shape.group + 2))  # this rank's share
    q, k, v = qkv.view(-1, (shape.group + 2) * kv, hd).split([shape.group * kv, kv, kv], dim=1)
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = rms_norm(q, layer.q_norm, shape.norm_eps), rms_norm(k, layer.k_norm, shape.norm_eps)
    if positions.cos is not None:
        q, k = turn(q, positions, at), turn(k, positions, at)
    return q, k, v


def turn(x: Tensor, positions: Positions, at: Tensor) -> Tensor:
    """(N, heads, hd) at positions (N,) -> rotated, same shape (Su et al. 2021, eq. 34)."""
    assert positions.cos is not None and positions.sin is not None and positions.partner is not None
    cos, sin = positions.cos[at].unsqueeze(1), positions.sin[at].unsqueeze(1)  # (N, 1, hd)
    wide = x.float()
    return (wide * cos + wide[..., positions.partner] * sin).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # (..., D)
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)).to(x.dtype)


def activate(x: Tensor, activation: str | None) -> Tensor:
    if activation is None:
        return x
    if activation == "relu":
        return F.relu(x)
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def alibi_slopes(heads: int) -> Tensor:
    """(heads,) fp32: 2^(-8 i / n) for a power of two n; the others lie between (Press et al. 2022, arXiv 2108.12409, section 3)."""
    power = 2 ** (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * i / power) for i in range(1, power + 1)]
    slopes += [2.0 ** (-8.0 * i / (2 * power)) for i in range(1, 2 * (heads - power), 2)]
    return torch.tensor(slopes)


ALIBI_SCORES = 2**27
"""Scores of one layer in memory at once, at most."""


def alibi_attention(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    """Causal attention of whole prompts with ALiBi, as `TorchOps.attend_prompts`; some prompts at a time, as it writes all scores down."""
    columns = torch.arange(q.shape[2], device=q.device)
    unseen = columns > columns[:, None]  # (P, P)
    step = max(1, ALIBI_SCORES // (q.shape[1] * q.shape[2] ** 2))
    some = [slice(i, i + step) for i in range(0, len(q), step)]
    return torch.cat([_alibi(q[at], k[at], v[at], slopes, unseen) for at in some])


def _alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, unseen: Tensor) -> Tensor:
    """(B, H, Q, hd), (B, K, T, hd) twice, and what a query does not see, (..., Q, T) -> (B, H, Q, hd).

    In 16 bits BLOOM's training network rounds the bias, and then the score: at position 500 by up to 1 in bf16. Answers that were drawn without
    would be another policy's.
    """
    if (group := q.shape[1] // k.shape[1]) > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    bias = (slopes[:, None] * torch.arange(k.shape[2], device=q.device)).to(q.dtype)  # (H, T): a shift of a whole row changes no softmax
    b, h, width, hd = q.shape
    flat = bias.repeat(b, 1).unsqueeze(1).expand(-1, width, -1)  # (B H, Q, T)
    scores = torch.baddbmm(flat, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=hd**-0.5).unflatten(0, (b, h))
    return scores.masked_fill_(unseen, -torch.inf).softmax(dim=-1) @ v


def rotary(inv_freq: Tensor, scaling: float, *, tokens: int, head_dim: int) -> Positions:
    """Tables of the rotation: inv_freq (r / 2,) turns the first r dimensions of a head, dimension i with i + r / 2."""
    half = len(inv_freq)
    angles = torch.arange(tokens, device=inv_freq.device, dtype=torch.float32)[:, None] * inv_freq.float()  # (tokens, r / 2)
    cos = torch.ones(tokens, head_dim, device=inv_freq.device)
    sin = torch.zeros(tokens, head_dim, device=inv_freq.device)
    cos[:, : 2 * half] = (angles.cos() * scaling).repeat(1, 2)
    sin[:, : 2 * half] = torch.cat([-angles.sin(), angles.sin()], dim=1) * scaling
    partner = torch.arange(head_dim, device=inv_freq.device)
    partner[: 2 * half] = partner[: 2 * half].roll(half)
    return Positions(cos=cos, sin=sin, partner=partner)
