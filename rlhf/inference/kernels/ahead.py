"""Asking for the beginning of the next matrix while this kernel ends.

Decoding is bound by reading weights, and between two kernels nothing is read. So a kernel asks for the first columns of the matrix that
the next product reads; they are in the L2 cache when it starts.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

BYTES = 8 << 20
"""Asked for at once: what the memory delivers in the few microseconds between two products, and little enough to stay in the cache."""


@dataclass(frozen=True)
class Ahead:
    """The beginnings of `pieces` equal parts of every row of a matrix."""

    weight: Tensor | None = None
    segments: int = 0
    pieces: int = 1
    row_bytes: int = 0
    piece_bytes: int = 0
    size: int = 0

    @classmethod
    def of(cls, weight: Tensor | None, pieces: int) -> Ahead:
        """Nothing for a matrix that is not stored row by row, or not in 16-byte steps."""
        if weight is None or weight.stride(1) != 1:
            return cls()
        row, segments = weight.stride(0) * weight.element_size(), len(weight) * pieces
        part = weight.shape[1] * weight.element_size() // pieces
        size = min(part, max(256, BYTES // segments // 256 * 256)) // 16 * 16
        if row % 16 or part % 16 or size == 0 or weight.data_ptr() % 16:
            return cls()
        return cls(weight, segments, pieces, row, part, size)

    @property
    def arguments(self) -> tuple[Tensor | None, int, int, int, int, int]:
        return self.weight, self.segments, self.pieces, self.row_bytes, self.piece_bytes, self.size


@triton.jit
def ask(weight, segments, pieces, row_bytes, piece_bytes, size, program, THREADS: tl.constexpr):
    """Program `program` of the kernel asks for its share: one segment a thread."""
    if program * THREADS < segments:
        i = tl.minimum(program * THREADS + tl.arange(0, THREADS), segments - 1)
        address = weight.to(tl.int64) + (i // pieces).to(tl.int64) * row_bytes + (i % pieces) * piece_bytes
        sizes = tl.zeros((THREADS,), dtype=tl.int32) + size
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r", [address, sizes], dtype=tl.int32, is_pure=False, pack=1
        )
