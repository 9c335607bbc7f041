"""The kernels against their twins for shapes and numbers that nobody chose: one row, odd widths, -inf and NaN, the end of the cache.

Collected by name only, as kernel_checks.py, which says why.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoders import plain_sampling
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, DTYPES, INTERPRETED, TWIN, agrees, attention_of, layer_in, random, shape_of, slots_of
from torch import Tensor

from rlhf.inference.kernels import matmul
from rlhf.inference.kernels.ops import TritonOps
from rlhf.inference.reference import Positions, rotary
from rlhf.inference.weights import Layer, Linear, Norm

KERNELS = [TritonOps(pdl=False)] if INTERPRETED else [TritonOps(pdl=False), TritonOps()]
some = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def near(found: Tensor, twin: Tensor, exact: Tensor, **options: float) -> None:
    """As `agrees`, which compares means; of a few numbers in 16 bits one that falls on the other side would be the mean."""
    if found.dtype == torch.float32 or found.numel() > 100:
        agrees(found, twin, exact, **options)
    else:
        assert (found.float() - exact).abs().max() <= 0.02 * exact.abs().max() + 0.002


@some
@given(
    heads=st.sampled_from([(1, 1), (3, 3), (7, 1), (6, 3), (20, 1), (12, 2)]), head_dim=st.sampled_from([2, 16, 40, 80, 96, 128, 160, 256]),
    lengths=st.lists(st.sampled_from([0, 1, 31, 32, 63, 64, 65, 127]), min_size=1, max_size=3), dtype=st.sampled_from(DTYPES),
    turns=st.booleans(), data=st.data(),
)  # fmt: skip
def test_attention_of_any_shape(
    heads: tuple[int, int], head_dim: int, lengths: list[int], dtype: torch.dtype, turns: bool, data: st.DataObject
) -> None:
    """Up to the last place of the cache; what lies behind a sequence is NaN, as memory may be, and so is a finished row's input."""
    tokens = max(lengths) + 1
    finished = tuple(data.draw(st.sets(st.integers(0, len(lengths) - 1), max_size=len(lengths) - 1)))
    shape = shape_of(heads=heads[0], kv_heads=heads[1], head_dim=head_dim, positions="rotary" if turns else "learned")
    positions = rotary(random(head_dim // 2).abs(), 1.0, tokens=tokens, head_dim=head_dim) if turns else Positions()
    layer: Any = Layer(*[None] * 8)  # type: ignore[arg-type]
    slots = slots_of(lengths, finished=finished)
    order = slots.rows.tolist()
    live = [row for row, slot in enumerate(order) if slot not in finished]
    qkv = random(len(lengths), shape.qkv_width, dtype=dtype)
    caches = [random(len(lengths) + 1, heads[1], tokens, head_dim, seed=s, dtype=dtype) for s in (3, 4)]
    behind = torch.arange(tokens, device=DEVICE) >= torch.tensor([*lengths, 0], device=DEVICE)[:, None]  # (S + 1, tokens)

    def run(ops: Any, kind: torch.dtype, hole: float) -> Tensor:
        keys, values = (c.to(kind, copy=True).masked_fill_(behind[:, None, :, None], hole) for c in caches)
        given_ = qkv.to(kind, copy=True)
        given_[[row for row in range(len(order)) if row not in live]] = hole
        return ops.attend(given_, keys, values, slots, slots.rows, layer, positions, shape)[live]

    twin, exact = run(TWIN, dtype, 0.0), run(TWIN, torch.float32, 0.0)
    for kernels in KERNELS:
        near(run(kernels, dtype, float("nan")), twin, exact)


@some
@given(
    vocabulary=st.sampled_from([1, 2, 3, 127, 8191, 8192, 8193, 16385]), rows=st.integers(1, 4), temperature=st.sampled_from([0.0, 0.3, 1.0]),
    top_k=st.sampled_from([0, 1, 4]), seed=st.integers(0, 2**31), dtype=st.sampled_from([torch.float32, torch.float16]),
    allowed=st.sampled_from([1, 2, 1000]),
)  # fmt: skip
def test_draws_from_any_row(
    vocabulary: int, rows: int, temperature: float, top_k: int, seed: int, dtype: torch.dtype, allowed: int
) -> None:
    """Logits of -inf are never drawn, however few are left; a finished row's may be anything."""
    logits = (random(rows + 1, vocabulary, seed=seed % 1000) * 4).to(dtype)
    few = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(seed))[allowed:].to(DEVICE)
    logits[:, few] = -torch.inf
    slots = [slots_of([5] * (rows + 1), finished=(rows,), seed=seed) for _ in range(1 + len(KERNELS))]
    logits[0] = torch.nan  # rows go through the slots backwards, so that this one idles
    sampling = plain_sampling(temperature=temperature, top_k=top_k, stop_ids=(0,))
    for ops, state in zip([TWIN, *KERNELS], slots, strict=True):
        ops.draw(logits, state, state.rows, sampling)
    twin = slots[0]
    assert logits.flip(0)[torch.arange(rows), twin.tokens[:rows]].isfinite().all()
    for ours in slots[1:]:
        assert torch.equal(ours.tokens, twin.tokens) and torch.equal(ours.finished, twin.finished) and torch.equal(ours.counts, twin.counts)
        torch.testing.assert_close(ours.logprobs, twin.logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("vocabulary", [3, 9000])
def test_whatever_logits_are_some_token_is_drawn(vocabulary: int, value: float, temperature: float) -> None:
    """Of a network that broke: not one that does not exist, which would be read out of the embedding's bounds."""
    for whole in (True, False):
        logits = torch.full((2, vocabulary), value, device=DEVICE) if whole else random(2, vocabulary)
        logits[:, 1] = value
        for kernels in KERNELS:
            state = slots_of([5, 6])
            kernels.draw(logits, state, state.rows, plain_sampling(temperature=temperature))
            assert ((state.tokens >= 0) & (state.tokens < vocabulary)).all() and (state.counts[:2] == 1).all()


@some
@given(
    rows=st.sampled_from([1, 2, 63, 64]), n=st.sampled_from([1, 63, 65, 200]), k=st.sampled_from([1, 127, 129, 1024, 1025]), biased=st.booleans(),
    turned=st.booleans(),
)  # fmt: skip
def test_products_of_any_shape(rows: int, n: int, k: int, biased: bool, turned: bool) -> None:
    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    weight = random(k, n, seed=1, dtype=dtype).t() if turned else random(n, k, seed=1, dtype=dtype)
    x, linear = random(rows, k, dtype=dtype), Linear(weight / k**0.5, random(n, seed=2, dtype=dtype) if biased else None)
    exact = x.float() @ linear.weight.float().t() + (0 if linear.bias is None else linear.bias.float())
    norm, shape, rest = Norm(random(n, seed=3, dtype=dtype), None), shape_of(hidden=n), random(rows, n, seed=4, dtype=dtype)
    twin = TWIN.linear(x, linear)
    for kernels in KERNELS:
        found = matmul.product(x, linear, relu=False, split=False, pdl=kernels.pdl)
        assert isinstance(found, Tensor)
        near(found, twin, exact)
        part = matmul.product(x, linear, relu=False, split=True, pdl=kernels.pdl)
        near(kernels.add_norm(rest, part, norm, shape)[0], rest + twin, rest.float() + exact)


@some
@given(
    rows=st.sampled_from([1, 5]),
    width=st.sampled_from([1, 3, 127, 1023, 1025, 4097]),
    kind=st.sampled_from(["rms", "layer"]),
    dtype=st.sampled_from(DTYPES),
)
def test_norms_gates_and_embeddings_of_any_width(rows: int, width: int, kind: str, dtype: torch.dtype) -> None:
    shape = shape_of(norm=kind, hidden=width)
    x, delta = random(rows, width, dtype=dtype), random(rows, width, seed=1, dtype=dtype)
    norm = Norm(random(width, seed=2, dtype=dtype), random(width, seed=3, dtype=dtype) if kind == "layer" else None)
    wide = Norm(norm.weight.float(), None if norm.bias is None else norm.bias.float())
    both = random(rows, 2 * width, dtype=dtype)
    table = random(9, width, dtype=dtype)
    slots = slots_of([1] * rows)
    slots.tokens[:rows] = 8
    for kernels in KERNELS:
        found, twin = kernels.add_norm(x, delta, norm, shape), TWIN.add_norm(x, delta, norm, shape)
        assert torch.equal(found[0], twin[0])
        if width > 1 or kind == "rms":  # of one number the layer norm is 0 / eps
            near(found[1], twin[1], TWIN.norm(twin[0].float(), wide, shape), tolerance=1e-4)
        near(kernels.gate(both, "silu"), TWIN.gate(both, "silu"), TWIN.gate(both.float(), "silu"))
        assert torch.equal(kernels.embed(table, table, 2, slots, slots.rows), TWIN.embed(table, table, 2, slots, slots.rows))


@some
@given(
    prompts=st.integers(1, 3),
    width=st.sampled_from([1, 2, 63, 65]),
    name=st.sampled_from(["gqa, no power of two", "mha, a part of the head turns"]),
    dtype=st.sampled_from(DTYPES),
)
def test_heads_of_prompts(prompts: int, width: int, name: str, dtype: torch.dtype) -> None:
    layer, positions, shape = attention_of(name, dtype)
    qkv = random(prompts * width, shape.qkv_width, dtype=dtype)
    twin = TWIN.heads(qkv, layer, positions, width, shape)
    exact = TWIN.heads(qkv.float(), layer_in(layer, torch.float32), positions, width, shape)
    for kernels in KERNELS:
        for ours, theirs, truth in zip(kernels.heads(qkv, layer, positions, width, shape), twin, exact, strict=True):
            near(ours, theirs, truth)
