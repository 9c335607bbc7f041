"""Residual sum and norm in one pass. Twin: `TorchOps.add_norm`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf.inference.shape import DecoderShape
from rlhf.inference.weights import Norm


@triton.jit
def _add_norm(
    x, delta, weight, bias, total, normed, eps, D: tl.constexpr, D_PAD: tl.constexpr, RMS: tl.constexpr, BIAS: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    dtype = x.dtype.element_ty
    d = tl.arange(0, D_PAD)
    inside = d < D
    f = tl.load(x + row * D + d, mask=inside, other=0.0).to(tl.float32)
    if SUM:
        f += tl.load(delta + row * D + d, mask=inside, other=0.0).to(tl.float32)
        f = f.to(dtype).to(tl.float32)
        tl.store(total + row * D + d, f.to(dtype), mask=inside)
    w = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    if RMS:
        y = (f * tl.rsqrt(tl.sum(f * f) / D + eps)).to(dtype).to(tl.float32) * w
    else:
        mean = tl.sum(f) / D
        centred = tl.where(inside, f - mean, 0.0)
        y = centred * tl.rsqrt(tl.sum(centred * centred) / D + eps) * w
        if BIAS:
            y += tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * D + d, y.to(dtype), mask=inside)


def add_norm(x: Tensor, delta: Tensor | None, norm: Norm, shape: DecoderShape) -> tuple[Tensor, Tensor]:
    """(N, D), (N, D) -> the sum and its norm, (N, D) each; without `delta`, x itself and its norm."""
    n, d = x.shape
    x = x.contiguous()
    total = x if delta is None else torch.empty_like(x)
    normed = torch.empty_like(x)
    pad = triton.next_power_of_2(d)
    _add_norm[(n,)](
        x, None if delta is None else delta.contiguous(), norm.weight, norm.bias, total, normed, shape.norm_eps, D=d, D_PAD=pad,
        RMS=shape.norm == "rms", BIAS=norm.bias is not None, SUM=delta is not None, num_warps=4 if pad <= 2048 else 8,
    )  # fmt: skip
    return total, normed
