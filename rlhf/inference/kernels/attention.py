"""Decode attention: one token of each row against the live part of its cache. Twin: `TorchOps.attend`.

One program per row and key/value head turns the new query and key, writes the new key and value into the cache, and reads what came
before block by block with a running softmax (Milakov and Gimelshein 2018). So a step reads the cache once and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf.inference.reference import Positions
from rlhf.inference.shape import DecoderShape
from rlhf.inference.slots import Slots
from rlhf.inference.weights import Layer


@triton.jit
def _turned(pointer, d, inside, norm, at, cos, sin, partner, eps, HD: tl.constexpr, ROTARY: tl.constexpr, NORM: tl.constexpr):
    """A head's vector, normed and rotated: (HD_PAD,) fp32, rounded to the stored type where the reference rounds."""
    dtype = pointer.dtype.element_ty
    x = tl.load(pointer + d, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x) / HD + eps)
        x = (x * scale).to(dtype).to(tl.float32) * tl.load(norm + d, mask=inside, other=0.0).to(tl.float32)
        x = x.to(dtype).to(tl.float32)
    if ROTARY:
        p = tl.load(partner + d, mask=inside, other=0)
        y = tl.load(pointer + p, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            y = (y * scale).to(dtype).to(tl.float32) * tl.load(norm + p, mask=inside, other=0.0).to(tl.float32)
            y = y.to(dtype).to(tl.float32)
        c = tl.load(cos + at * HD + d, mask=inside, other=0.0)
        s = tl.load(sin + at * HD + d, mask=inside, other=0.0)
        x = (x * c + y * s).to(dtype).to(tl.float32)
    return x


@triton.jit
def _appended(
    key, value, keys, values, d, inside, k_norm, at, cos, sin, partner, eps, HD: tl.constexpr, ROTARY: tl.constexpr, NORM: tl.constexpr
):
    """The new token's key (turned, fp32) and value, (HD_PAD,) each, which now stand in the cache as well."""
    k = _turned(key, d, inside, k_norm, at, cos, sin, partner, eps, HD, ROTARY, NORM)
    v = tl.load(value + d, mask=inside, other=0.0)
    tl.store(keys + at * HD + d, k.to(keys.dtype.element_ty), mask=inside)
    tl.store(values + at * HD + d, v, mask=inside)
    return k, v


@triton.jit
def _with_alibi(scores, slope, t, pointer):
    """Scores with ALiBi's bias, each rounded to the stored type where the reference rounds."""
    dtype = pointer.dtype.element_ty
    bias = (slope * t).to(dtype).to(tl.float32)
    return (scores + bias).to(dtype).to(tl.float32)


@triton.jit
def _one_head(
    qkv, keys, values, out, rows, lengths, finished, cos, sin, partner, slopes, q_norm, k_norm,
    width, slot_stride, head_stride, scale, eps,
    KV: tl.constexpr, HD: tl.constexpr, HD_PAD: tl.constexpr, BLOCK: tl.constexpr,
    ROTARY: tl.constexpr, ALIBI: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A key/value head with a single query head: sums instead of matrix products."""
    row, h = tl.program_id(0), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
    slot = tl.load(rows + row)
    if tl.load(finished + slot) != 0:
        return
    at = tl.load(lengths + slot)
    dtype = keys.dtype.element_ty
    d = tl.arange(0, HD_PAD)
    inside = d < HD
    cache = slot * slot_stride + h * head_stride
    base = qkv + row * width
    q = _turned(base + h * HD, d, inside, q_norm, at, cos, sin, partner, eps, HD, ROTARY, NORM)
    key, value = base + (KV + h) * HD, base + (2 * KV + h) * HD
    k, v = _appended(key, value, keys + cache, values + cache, d, inside, k_norm, at, cos, sin, partner, eps, HD, ROTARY, NORM)
    top = tl.sum(q * k) * scale
    if ALIBI:
        slope = tl.load(slopes + h)
        top = _with_alibi(top, slope, at, keys)
    total = 1.0
    acc = v.to(tl.float32)
    for start in range(0, at, BLOCK):
        t = start + tl.arange(0, BLOCK)
        live = t < at
        both = live[:, None] & inside[None, :]
        block = cache + t[:, None] * HD + d[None, :]
        kb = tl.load(keys + block, mask=both, other=0.0).to(tl.float32)
        vb = tl.load(values + block, mask=both, other=0.0).to(tl.float32)
        scores = tl.sum(kb * q[None, :], axis=1) * scale
        if ALIBI:
            scores = _with_alibi(scores, slope, t, keys)
        scores = tl.where(live, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores))
        fade = tl.exp(top - new_top)
        p = tl.exp(scores - new_top)
        total = total * fade + tl.sum(p)
        acc = acc * fade + tl.sum(vb * p[:, None], axis=0)
        top = new_top
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(out + row * (KV * HD) + h * HD + d, (acc / total).to(dtype), mask=inside)


@triton.jit
def _head_group(
    qkv, keys, values, out, rows, lengths, finished, cos, sin, partner, slopes, q_norm, k_norm,
    width, slot_stride, head_stride, scale, eps,
    KV: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HD: tl.constexpr, HD_PAD: tl.constexpr, BLOCK: tl.constexpr,
    ROTARY: tl.constexpr, ALIBI: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A key/value head that several query heads share: they read the cache together, by matrix products."""
    row, h = tl.program_id(0), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
    slot = tl.load(rows + row)
    if tl.load(finished + slot) != 0:
        return
    at = tl.load(lengths + slot)
    dtype = keys.dtype.element_ty
    d = tl.arange(0, HD_PAD)
    inside = d < HD
    base = qkv + row * width
    cache = slot * slot_stride + h * head_stride
    key, value = base + (KV * GROUP + h) * HD, base + (KV * GROUP + KV + h) * HD
    k, v = _appended(key, value, keys + cache, values + cache, d, inside, k_norm, at, cos, sin, partner, eps, HD, ROTARY, NORM)
    g = tl.arange(0, GROUP_PAD)
    q = tl.zeros((GROUP_PAD, HD_PAD), dtype=tl.float32)
    for i in tl.static_range(GROUP):
        one = _turned(base + (h * GROUP + i) * HD, d, inside, q_norm, at, cos, sin, partner, eps, HD, ROTARY, NORM)
        q = tl.where((g == i)[:, None], one[None, :], q)
    top = tl.sum(q * k[None, :], axis=1) * scale
    if ALIBI:
        slope = tl.load(slopes + h * GROUP + g, mask=g < GROUP, other=0.0)
        top = _with_alibi(top, slope, at, keys)
    total = tl.full((GROUP_PAD,), 1.0, dtype=tl.float32)
    acc = tl.zeros((GROUP_PAD, HD_PAD), dtype=tl.float32) + v.to(tl.float32)[None, :]
    qs = q.to(dtype)
    for start in range(0, at, BLOCK):
        t = start + tl.arange(0, BLOCK)
        live = t < at
        both = live[:, None] & inside[None, :]
        block = cache + t[:, None] * HD + d[None, :]
        kb = tl.load(keys + block, mask=both, other=0.0)
        vb = tl.load(values + block, mask=both, other=0.0)
        scores = tl.dot(qs, tl.trans(kb), input_precision="ieee") * scale
        if ALIBI:
            scores = _with_alibi(scores, slope[:, None], t[None, :], keys)
        scores = tl.where(live[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        fade = tl.exp(top - new_top)
        p = tl.exp(scores - new_top[:, None])
        total = total * fade + tl.sum(p, axis=1)
        acc = acc * fade[:, None] + tl.dot(p.to(dtype), vb, input_precision="ieee")
        top = new_top
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    heads = out + row * (KV * GROUP * HD) + (h * GROUP + g)[:, None] * HD + d[None, :]
    tl.store(heads, (acc / total[:, None]).to(dtype), mask=(g < GROUP)[:, None] & inside[None, :])


def attend(
    qkv: Tensor, keys: Tensor, values: Tensor, slots: Slots, rows: Tensor, layer: Layer, positions: Positions, shape: DecoderShape,
    *, pdl: bool,
) -> Tensor:  # fmt: skip
    """As `TorchOps.attend`; rows that have finished get no value."""
    kv, hd = keys.shape[1], shape.head_dim
    out = torch.empty(len(rows), kv * shape.group * hd, dtype=qkv.dtype, device=qkv.device)
    hd_pad = triton.next_power_of_2(hd)
    arguments = (
        qkv, keys, values, out, rows, slots.lengths, slots.finished.view(torch.int8), positions.cos, positions.sin, positions.partner,
        positions.slopes, layer.q_norm, layer.k_norm, qkv.shape[1], keys.stride(0), keys.stride(1), hd**-0.5, shape.norm_eps, 
    )  # fmt: skip
    options: dict[str, Any] = {
        "KV": kv, "HD": hd, "HD_PAD": hd_pad, "ROTARY": positions.cos is not None, "ALIBI": positions.slopes is not None,
        "NORM": layer.q_norm is not None, "PDL": pdl, 
    }  # fmt: skip
    if pdl:
        options["launch_pdl"] = True
    if shape.group == 1:
        warps = 1 if hd_pad > 64 else 2
        _one_head[(len(rows), kv)](*arguments, **options, BLOCK=32, num_warps=warps)
    else:
        warps = 2 if hd_pad <= 64 else 4
        group_pad = max(16, triton.next_power_of_2(shape.group))
        options["HD_PAD"] = max(16, hd_pad)  # the least that a matrix product takes
        _head_group[(len(rows), kv)](*arguments, **options, GROUP=shape.group, GROUP_PAD=group_pad, BLOCK=64, num_warps=warps)
    return out
