"""Sampling and its bookkeeping, one program a row. Twin: `TorchOps.draw`.

Two passes over a row of logits: the first finds the largest and the sum of exponentials, the second the token at which the running sum
passes the row's uniform number.
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
def _draw(
    logits, candidates, rows, seed, sequences, counts, limits, finished, tokens, lengths, answers, logprobs, stops,
    V, A, inverse_temperature, min_new, STOPS: tl.constexpr, GREEDY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(rows + row)
    if tl.load(finished + slot) != 0:
        return
    count = tl.load(counts + slot)
    early = count < min_new
    logits += row * V
    candidates += row * V
    top, total = float("-inf"), 0.0  # of all logits
    best, mass = float("-inf"), 0.0  # of the candidates
    token = tl.full((), 0, dtype=tl.int64)
    for start in range(0, V, BLOCK):
        c = start + tl.arange(0, BLOCK)
        x = tl.load(logits + c, mask=c < V, other=float("-inf")).to(tl.float32) * inverse_temperature
        new_top = tl.maximum(top, tl.max(x))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(x - new_top))
        top = new_top
        y = _block(candidates, c, V, stops, early, STOPS) * inverse_temperature
        high = tl.max(y)
        if GREEDY:
            first = tl.min(tl.where(y == high, c, V))
            token = tl.where(high > best, first.to(tl.int64), token)
            best = tl.maximum(best, high)
        else:
            new_best = tl.maximum(best, high)
            scale = tl.where(best == float("-inf"), 0.0, tl.exp(best - new_best))
            mass = mass * scale + tl.sum(tl.where(y == float("-inf"), 0.0, tl.exp(y - new_best)))
            best = new_best
    if not GREEDY:
        target = _uniform(tl.load(seed), tl.load(sequences + slot), count) * mass
        token = tl.full((), -1, dtype=tl.int64)
        last = tl.full((), 0, dtype=tl.int64)  # rounding may carry the target past the sum: then the last one with any mass
        before = 0.0
        for start in range(0, V, BLOCK):
            c = start + tl.arange(0, BLOCK)
            y = _block(candidates, c, V, stops, early, STOPS) * inverse_temperature
            p = tl.where(y == float("-inf"), 0.0, tl.exp(y - best))
            hit = tl.min(tl.where((before + tl.cumsum(p) > target) & (p > 0), c, V))
            token = tl.where((token < 0) & (hit < V), hit.to(tl.int64), token)
            last = tl.maximum(last, tl.max(tl.where(p > 0, c, 0)).to(tl.int64))
            before += tl.sum(p)
        token = tl.where(token < 0, last, token)
    chosen = tl.load(logits + token).to(tl.float32) * inverse_temperature
    tl.store(answers + slot * A + count, token)
    tl.store(logprobs + slot * A + count, chosen - top - tl.log(total))
    tl.store(tokens + slot, token)
    tl.store(counts + slot, count + 1)
    tl.store(lengths + slot, tl.load(lengths + slot) + 1)
    ended = count + 1 >= tl.load(limits + slot)
    for i in tl.static_range(STOPS):
        ended = ended | (token == tl.load(stops + i))
    tl.store(finished + slot, ended.to(tl.int8))


def draw(logits: Tensor, candidates: Tensor, slots: Slots, rows: Tensor, sampling: Sampling, stops: Tensor) -> None:
    """As `TorchOps.draw`, with (B, V) candidates already filtered; stops: (number of stop ids,) int64 on the device."""
    b, v = logits.shape
    _draw[(b,)](
        logits, candidates, rows, slots.seed, slots.sequences, slots.counts, slots.limits, slots.finished.view(torch.int8), slots.tokens,
        slots.lengths, slots.answers, slots.logprobs, stops, v, slots.answers.shape[1], 1.0 / (sampling.temperature or 1.0), sampling.min_new_tokens,
        STOPS=len(sampling.stop_ids), GREEDY=sampling.temperature == 0, BLOCK=min(16384, triton.next_power_of_2(v)), num_warps=32,
    )  # fmt: skip
