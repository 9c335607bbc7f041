"""Small kernels that replace several of PyTorch's: the embedding of a step and the gate of an MLP. Twins: `TorchOps.embed`, `TorchOps.gate`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf.inference.slots import Slots


@triton.jit
def _embed(rows, tokens, lengths, table, positions, out, offset, D: tl.constexpr, BLOCK: tl.constexpr, POSITIONS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(rows + row)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    x = tl.load(table + tl.load(tokens + slot) * D + d, mask=inside, other=0.0)
    if POSITIONS:
        x += tl.load(positions + (tl.load(lengths + slot) + offset) * D + d, mask=inside, other=0.0)
    tl.store(out + row * D + d, x, mask=inside)


def embed(table: Tensor, positions: Tensor | None, offset: int, slots: Slots, rows: Tensor) -> Tensor:
    """(V, D), (positions, D) or None -> (B, D): the last token of each row, at its position."""
    d = table.shape[1]
    out = table.new_empty(len(rows), d)
    _embed[(len(rows), -(-d // 1024))](
        rows, slots.tokens, slots.lengths, table, positions, out, offset, D=d, BLOCK=1024, POSITIONS=positions is not None, num_warps=4
    )
    return out


@triton.jit
def _gate(x, out, F, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    gate = tl.load(x + row * 2 * F + c, mask=c < F, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * F + F + c, mask=c < F, other=0.0).to(tl.float32)
    dtype = x.dtype.element_ty
    acted = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)  # rounded where the training network rounds
    tl.store(out + row * F + c, (acted * up).to(dtype), mask=c < F)


def gate(x: Tensor, *, pdl: bool) -> Tensor:
    """(N, 2F) -> (N, F): silu(gate) * up, gate first."""
    n, f = x.shape[0], x.shape[1] // 2
    out = torch.empty(n, f, dtype=x.dtype, device=x.device)
    _gate[(n, -(-f // 1024))](x, out, f, BLOCK=1024, PDL=pdl, num_warps=4, **({"launch_pdl": True} if pdl else {}))
    return out
