"""Residual sum and norm in one pass. Twin: `TorchOps.add_norm`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf.inference.kernels.matmul import Partial
from rlhf.inference.shape import DecoderShape
from rlhf.inference.weights import Norm


@triton.jit
def _add_norm(
    x, delta, delta_bias, weight, bias, total, normed, eps, piece, D: tl.constexpr, D_PAD: tl.constexpr, PIECES: tl.constexpr,
    DELTA_BIAS: tl.constexpr, RMS: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A row a program. PIECES: 0 no delta, 1 a delta in x's type, more: partial sums of one, `piece` elements apart."""
    row = tl.program_id(0).to(tl.int64)
    dtype = x.dtype.element_ty
    d = tl.arange(0, D_PAD)
    inside = d < D
    if PDL:
        tl.extra.cuda.gdc_wait()
    f = tl.load(x + row * D + d, mask=inside, other=0.0).to(tl.float32)
    if PIECES > 0:
        change = tl.load(delta + row * D + d, mask=inside, other=0.0).to(tl.float32)
        for i in tl.static_range(1, PIECES):
            change += tl.load(delta + i * piece + row * D + d, mask=inside, other=0.0).to(tl.float32)
        if DELTA_BIAS:
            change += tl.load(delta_bias + d, mask=inside, other=0.0).to(tl.float32)
        # Rounded where the training network rounds: the layer's output, then the sum.
        f = (f + change.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
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
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(normed + row * D + d, y.to(dtype), mask=inside)


def add_norm(
    x: Tensor, delta: Tensor | Partial | None, norm: Norm, shape: DecoderShape, *, pdl: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(N, D), (N, D) or its pieces -> the sum and its norm, (N, D) each; without `delta`, x itself and its norm."""
    n, d = x.shape
    x = x.contiguous()
    partial = isinstance(delta, Partial)
    change = delta.sums if isinstance(delta, Partial) else delta
    total = x if change is None else torch.empty_like(x)
    normed = torch.empty_like(x)
    pad = triton.next_power_of_2(d)
    warps = 4 if pad <= 2048 else 8
    _add_norm[(n,)](
        x, None if change is None else change.contiguous(), delta.bias if isinstance(delta, Partial) else None, norm.weight, norm.bias, total,
        normed, shape.norm_eps, n * d, D=d, D_PAD=pad, PIECES=0 if change is None else len(change) if partial else 1,
        DELTA_BIAS=isinstance(delta, Partial) and delta.bias is not None, RMS=shape.norm == "rms", BIAS=norm.bias is not None, PDL=pdl,
        num_warps=warps, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return total, normed
