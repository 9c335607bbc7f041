"""Products of a few rows with a large matrix, bound by reading the matrix. Twin: `TorchOps.linear` and `TorchOps.project`.

A tile of rows of the matrix is read by one program, or by several that share its columns (split K); their partial sums are added by
the residual norm that follows, so that no kernel is spent on them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf.inference.weights import Linear

BM, BN, BK, STAGES, WARPS = 64, 64, 128, 4, 4
"""Rows of x, tile of the matrix and depth of the pipeline; measured on an H100 (experiments/hybrid_engine). Fewer rows take as long."""
PROGRAMS = 132
"""Programs that fill the card; an H100 has so many multiprocessors."""


@dataclass
class Partial:
    """A product in pieces: the sum over the first dimension plus the bias is what `linear` would give."""

    sums: Tensor  # (pieces, N, D) fp32
    bias: Tensor | None  # (D,)

    def __getitem__(self, rows: Tensor) -> Partial:
        return Partial(self.sums[:, rows], self.bias)


@triton.jit(do_not_specialize=["M"])
def _product(
    x, w, bias, out, M, N, K, w_row, w_column, PIECE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    piece = tl.program_id(1)
    m = tl.arange(0, BM)
    columns = tl.arange(0, BK)
    begin = piece * PIECE
    if PDL:
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for start in tl.range(0, PIECE, BK, num_stages=STAGES):
        k = begin + start + columns
        inside = (k < K) & (start + columns < PIECE)
        a = tl.load(x + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & inside[None, :], other=0.0)
        b = tl.load(w + n[:, None].to(tl.int64) * w_row + k[None, :] * w_column, mask=(n < N)[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(a, tl.trans(b), acc)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    live = (m < M)[:, None] & (n < N)[None, :]
    if SPLIT:
        tl.store(out + piece * M * N + m[:, None] * N + n[None, :], acc, mask=live)
    else:
        if BIAS:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if RELU:
            acc = tl.maximum(acc, 0.0)
        tl.store(out + m[:, None] * N + n[None, :], acc.to(out.dtype.element_ty), mask=live)


def pieces(n: int, k: int) -> int:
    """Into how many parts to split K so that an (n, k) matrix fills the card; a power of two, each of at least four tiles."""
    split = 1
    while split < 16 and split * 2 * -(-n // BN) <= PROGRAMS + BN and k // (split * 2) >= 4 * BK:
        split *= 2
    return split


def product(x: Tensor, linear: Linear, *, relu: bool, split: bool, pdl: bool) -> Tensor | Partial:
    """(M, K) times (N, K) transposed: (M, N) with bias and ReLU, or partial sums where `split` and it pays."""
    (m, k), w = x.shape, linear.weight
    n = w.shape[0]
    count = pieces(n, k) if split else 1
    piece = -(-k // (count * BK)) * BK
    out = torch.empty((count, m, n), dtype=torch.float32, device=x.device) if count > 1 else x.new_empty(m, n)
    _product[(-(-n // BN), count)](
        x.contiguous(), w, linear.bias, out, m, n, k, w.stride(0), w.stride(1), PIECE=piece, BM=BM, BN=BN, BK=BK,
        SPLIT=count > 1, BIAS=linear.bias is not None, RELU=relu, STAGES=STAGES, PDL=pdl,
        num_warps=WARPS, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return Partial(out, linear.bias) if count > 1 else out
