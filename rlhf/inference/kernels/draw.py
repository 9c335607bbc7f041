"""Sampling and its bookkeeping, one program a row. Twin: `TorchOps.draw`.

Two passes over a row of logits find the largest and the sums of exponentials of each block; the block in which the running sum passes the
row's uniform number is then looked at once more for the token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf.inference.sampling import Sampling
from rlhf.inference.slots import Slots


@triton.jit
def _mix(h):
    h = h ^ (h >> 16)
    h = (h * 0x85EBCA6B) & 0xFFFFFFFF
    h = h ^ (h >> 13)
    h = (h * 0xC2B2AE35) & 0xFFFFFFFF
    return h ^ (h >> 16)


@triton.jit
def _uniform(seed, sequence, position):
    """As `sampling.uniforms`."""
    h = _mix((seed & 0xFFFFFFFF) ^ 0x9E3779B9)
    h = _mix(h ^ (sequence & 0xFFFFFFFF))
    h = _mix((h + 0x9E3779B9 * (position & 0xFFFFFFFF)) & 0xFFFFFFFF)
    return (h >> 8).to(tl.float32) * (1.0 / 16777216.0)


@triton.jit
def _block(pointer, c, V, stops, early, STOPS: tl.constexpr):
    """Candidates of one block of columns, fp32; what may not be drawn is -inf."""
    x = tl.load(pointer + c, mask=c < V, other=float("-inf")).to(tl.float32)
    for i in tl.static_range(STOPS):
        x = tl.where(early & (c == tl.load(stops + i)), float("-inf"), x)
    return x


@triton.jit
def _record(token, logprob, slot, count, A, counts, limits, finished, tokens, lengths, answers, logprobs, stops, STOPS: tl.constexpr):
    """As `reference.record`, for a row that runs."""
    tl.store(answers + slot * A + count, token)
    tl.store(logprobs + slot * A + count, logprob)
    tl.store(tokens + slot, token)
    tl.store(counts + slot, count + 1)
    tl.store(lengths + slot, tl.load(lengths + slot) + 1)
    ended = count + 1 >= tl.load(limits + slot)
    for i in tl.static_range(STOPS):
        ended = ended | (token == tl.load(stops + i))
    tl.store(finished + slot, ended.to(tl.int8))


@triton.jit
def _draw(
    logits, candidates, rows, seed, sequences, counts, limits, finished, tokens, lengths, answers, logprobs, stops,
    V, A, inverse_temperature, min_new, STOPS: tl.constexpr, SAME: tl.constexpr, GREEDY: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(rows + row)
    if tl.load(finished + slot) != 0:
        return
    count = tl.load(counts + slot)
    early = count < min_new
    logits += row * V
    candidates += row * V
    columns = tl.arange(0, BLOCK)
    # The largest of all logits and of the candidates. Each thread keeps its own until the end: a reduction a block would cost more.
    tops = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    bests = tops
    for start in range(0, V, BLOCK):
        c = start + columns
        tops = tl.maximum(tops, tl.load(logits + c, mask=c < V, other=float("-inf")).to(tl.float32))
        if not SAME:
            bests = tl.maximum(bests, _block(candidates, c, V, stops, early, STOPS))
    top = tl.max(tops) * inverse_temperature
    best = top if SAME else tl.max(bests) * inverse_temperature
    # Sums of exponentials: of all logits, and of the candidates block by block; or the first of the best.
    totals = tl.zeros((BLOCK,), dtype=tl.float32)
    masses = tl.zeros((BLOCKS,), dtype=tl.float32)
    firsts = tl.full((BLOCK,), V, dtype=tl.int32)
    index = tl.arange(0, BLOCKS)
    for start in range(0, V, BLOCK):
        c = start + columns
        x = tl.load(logits + c, mask=c < V, other=float("-inf")).to(tl.float32) * inverse_temperature
        totals += tl.exp(x - top)
        y = x if SAME else _block(candidates, c, V, stops, early, STOPS) * inverse_temperature
        if GREEDY:
            firsts = tl.where((y == best) & (c < V), tl.minimum(firsts, c), firsts)
        else:
            masses += tl.where(index == start // BLOCK, tl.sum(tl.exp(y - best)), 0.0)
    if GREEDY:
        token = tl.minimum(tl.min(firsts), V - 1).to(tl.int64)  # V only where a logit is NaN
    else:
        mass = tl.sum(masses)
        target = _uniform(tl.load(seed), tl.load(sequences + slot), count) * mass
        until = tl.cumsum(masses)
        # The block in which the running sum passes the target; should rounding carry the target past the sum, the last one with any mass.
        passed = tl.min(tl.where((until > target) & (masses > 0), index, BLOCKS))
        block = tl.where(passed < BLOCKS, passed, tl.max(tl.where(masses > 0, index, 0)))
        skipped = tl.sum(tl.where(index < block, masses, 0.0))
        c = block * BLOCK + columns
        y = tl.load(logits + c, mask=c < V, other=float("-inf")).to(tl.float32) if SAME else _block(candidates, c, V, stops, early, STOPS)
        p = tl.exp(y * inverse_temperature - best)
        hit = tl.min(tl.where((skipped + tl.cumsum(p) > target) & (p > 0), c, V))
        token = tl.where(hit < V, hit, tl.max(tl.where(p > 0, c, 0))).to(tl.int64)
    total = tl.sum(totals)
    chosen = tl.load(logits + token).to(tl.float32) * inverse_temperature
    logprob = chosen - top - tl.log(total)
    _record(token, logprob, slot, count, A, counts, limits, finished, tokens, lengths, answers, logprobs, stops, STOPS)


def draw(logits: Tensor, candidates: Tensor, slots: Slots, rows: Tensor, sampling: Sampling, stops: Tensor) -> None:
    """As `TorchOps.draw`, with (B, V) candidates already filtered; stops: (number of stop ids,) int64 on the device."""
    b, v = logits.shape
    block = min(8192, triton.next_power_of_2(v))
    _draw[(b,)](
        logits, candidates, rows, slots.seed, slots.sequences, slots.counts, slots.limits, slots.finished.view(torch.int8), slots.tokens,
        slots.lengths, slots.answers, slots.logprobs, stops, v, slots.answers.shape[1], 1.0 / (sampling.temperature or 1.0),
        sampling.min_new_tokens, STOPS=len(sampling.stop_ids), SAME=candidates is logits and sampling.min_new_tokens == 0,
        GREEDY=sampling.temperature == 0, BLOCK=block, BLOCKS=max(2, triton.next_power_of_2(-(-v // block))), num_warps=16,
    )  # fmt: skip
