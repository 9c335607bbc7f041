"""Queries, keys and values of whole prompts: turned in one pass, and put into the cache in another. Twins: `TorchOps.heads`, `TorchOps.keep`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rlhf.inference.reference import Positions
from rlhf.inference.shape import DecoderShape
from rlhf.inference.weights import Layer

HEADS = 8
"""Heads of a program."""
TOKENS = 64
"""Tokens of a program that fills the cache."""


@triton.jit
def _turn(
    qkv, q_out, k_out, v_out, cos, sin, partner, q_norm, k_norm, width, P, eps, H: tl.constexpr, KV: tl.constexpr, HD: tl.constexpr,
    HD_PAD: tl.constexpr, HEADS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """A program takes some heads of one kind (queries, keys or values) of one token."""
    Q_PARTS: tl.constexpr = (H + HEADS - 1) // HEADS
    KV_PARTS: tl.constexpr = (KV + HEADS - 1) // HEADS
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dtype = qkv.dtype.element_ty
    is_query, is_value = part < Q_PARTS, part >= Q_PARTS + KV_PARTS
    first = tl.where(is_query, part, tl.where(is_value, part - Q_PARTS - KV_PARTS, part - Q_PARTS)) * HEADS
    count = tl.where(is_query, H, KV)
    h = first + tl.arange(0, HEADS)
    d = tl.arange(0, HD_PAD)
    live = (h < count)[:, None] & (d < HD)[None, :]
    row = qkv + token * width + (h + tl.where(is_query, 0, tl.where(is_value, H + KV, H)))[:, None] * HD
    x = tl.load(row + d[None, :], mask=live, other=0.0).to(tl.float32)
    at = token % P
    if part < Q_PARTS + KV_PARTS:
        p = tl.load(partner + d, mask=d < HD, other=0)
        y = tl.load(row + p[None, :], mask=live, other=0.0).to(tl.float32)
        if NORM:
            scale = tl.rsqrt(tl.sum(x * x, axis=1) / HD + eps)[:, None]
            norm = tl.where(is_query, q_norm.to(tl.int64), k_norm.to(tl.int64)).to(q_norm.dtype)
            x = (x * scale).to(dtype).to(tl.float32) * tl.load(norm + d, mask=d < HD, other=0.0).to(tl.float32)[None, :]
            y = (y * scale).to(dtype).to(tl.float32) * tl.load(norm + p, mask=d < HD, other=0.0).to(tl.float32)[None, :]
            x, y = x.to(dtype).to(tl.float32), y.to(dtype).to(tl.float32)
        c = tl.load(cos + at * HD + d, mask=d < HD, other=0.0)[None, :]
        s = tl.load(sin + at * HD + d, mask=d < HD, other=0.0)[None, :]
        x = x * c + y * s
    # (M, heads, P, hd)
    place = (((token // P) * count + h)[:, None] * P + at) * HD + d[None, :]
    if is_query:
        tl.store(q_out + place, x.to(dtype), mask=live)
    elif is_value:
        tl.store(v_out + place, x.to(dtype), mask=live)
    else:
        tl.store(k_out + place, x.to(dtype), mask=live)


def heads(qkv: Tensor, layer: Layer, positions: Positions, width: int, shape: DecoderShape) -> tuple[Tensor, Tensor, Tensor]:
    """As `TorchOps.heads`, for rotary positions."""
    n, hd = len(qkv), shape.head_dim
    kv = qkv.shape[1] // (hd * (shape.group + 2))
    h, m = kv * shape.group, n // width
    q, k, v = (qkv.new_empty(m, count, width, hd) for count in (h, kv, kv))
    parts = triton.cdiv(h, HEADS) + 2 * triton.cdiv(kv, HEADS)
    _turn[(n, parts)](
        qkv, q, k, v, positions.cos, positions.sin, positions.partner, layer.q_norm, layer.k_norm, qkv.shape[1], width, shape.norm_eps,
        H=h, KV=kv, HD=hd, HD_PAD=triton.next_power_of_2(hd), HEADS=HEADS, NORM=layer.q_norm is not None, num_warps=4,
    )  # fmt: skip
    return q, k, v


@triton.jit
def _keep(
    k, v, keys, values, slots, prompts, P, k_m, k_h, k_p, v_m, v_h, v_p, slot_stride, head_stride, HD: tl.constexpr, HD_PAD: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    sequence, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot, m = tl.load(slots + sequence), tl.load(prompts + sequence)
    t = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS).to(tl.int64)
    d = tl.arange(0, HD_PAD)
    live = (t < P)[:, None] & (d < HD)[None, :]
    place = slot * slot_stride + h * head_stride + t[:, None] * HD + d[None, :]
    tl.store(keys + place, tl.load(k + m * k_m + h * k_h + t[:, None] * k_p + d[None, :], mask=live), mask=live)
    tl.store(values + place, tl.load(v + m * v_m + h * v_h + t[:, None] * v_p + d[None, :], mask=live), mask=live)


def keep(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor, prompts: Tensor) -> None:
    """As `TorchOps.keep`."""
    _, kv, width, hd = k.shape
    _keep[(len(slots), kv, triton.cdiv(width, TOKENS))](
        k, v, keys, values, slots, prompts, width, *k.stride()[:3], *v.stride()[:3], keys.stride(0), keys.stride(1), HD=hd,
        HD_PAD=triton.next_power_of_2(hd), TOKENS=TOKENS, num_warps=4,
    )  # fmt: skip
