"""The Triton kernels against their twins in plain PyTorch: on a GPU, or under Triton's interpreter (TRITON_INTERPRET=1).

Collected by name only: test_kernels.py runs this file in a process of its own, because Triton reads that variable when it is imported;
tests/gpu runs it on the card. In 16 bits kernel and twin round differently, so both are measured against fp32.
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import pytest
import torch
from decoders import plain_sampling
from torch import Tensor

pytest.importorskip("triton")

from rlhf.inference.kernels import matmul
from rlhf.inference.kernels.matmul import Partial
from rlhf.inference.kernels.ops import TritonOps
from rlhf.inference.reference import Positions, TorchOps, alibi_slopes, rotary
from rlhf.inference.shape import DecoderShape
from rlhf.inference.slots import Slots
from rlhf.inference.weights import Layer, Linear, Norm

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = [torch.float32, torch.float16 if INTERPRETED else torch.bfloat16]  # the interpreter cuts bf16 off instead of rounding
TWIN = TorchOps()

if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)


@pytest.fixture(params=[False] if INTERPRETED else [False, None], ids=lambda pdl: "alone" if pdl is False else "as on this card")
def kernels(request: pytest.FixtureRequest) -> TritonOps:
    return TritonOps(pdl=request.param)


def shape_of(**changes: Any) -> DecoderShape:
    plain: dict[str, Any] = {
        "family": "llama", "layers": 1, "hidden": 48, "embed_width": 48, "heads": 4, "kv_heads": 2, "head_dim": 16, "intermediate": 64,
        "vocab": 100, "max_positions": 64, "window": 0, "positions": "rotary", "position_offset": 0, "norm": "rms", "norm_eps": 1e-5,
        "post_norm": False, "parallel_residual": False, "gated": True, "activation": "silu",
    }  # fmt: skip
    return DecoderShape(**(plain | changes))


def slots_of(lengths: list[int], *, counts: list[int] | None = None, finished: tuple[int, ...] = (), seed: int = 42) -> Slots:
    """A slot for each length; the rows of a step go through them backwards."""
    n = len(lengths)
    slots = Slots.empty(n, 8, DEVICE)
    slots.lengths[:n] = torch.tensor(lengths)
    slots.counts[:n] = torch.tensor(counts or [0] * n)
    slots.limits[:n], slots.finished[:n] = 8, False
    slots.sequences[:n] = torch.arange(n) * 3
    slots.finished[list(finished)] = True
    slots.seed.fill_(seed)
    slots.rows[:] = torch.arange(n - 1, -1, -1)
    return slots


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same numbers on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE, dtype)


def agrees(found: Tensor, twin: Tensor, exact: Tensor, *, tolerance: float = 2e-5) -> None:
    """fp32: equal to rounding. 16 bits: no further from fp32 than the twin is, but for a little."""
    assert found.dtype == twin.dtype and found.shape == twin.shape
    if found.dtype == torch.float32:
        torch.testing.assert_close(found, twin, rtol=tolerance, atol=tolerance)
        return
    ours, theirs = ((x.float() - exact).abs() for x in (found, twin))
    assert ours.mean() <= 1.2 * theirs.mean() + 1e-4 * exact.abs().mean()
    assert ours.max() <= 2 * theirs.max() + 0.01 * exact.abs().max()


# --- attention ---

ATTENTION = {
    "mha": {"heads": 4, "kv_heads": 4},
    "mha, normed heads": {"heads": 4, "kv_heads": 4, "normed": True},
    "mha, a part of the head turns": {"heads": 2, "kv_heads": 2, "head_dim": 32, "turned": 8},
    "mha, no power of two": {"heads": 2, "kv_heads": 2, "head_dim": 80},
    "mha, alibi": {"heads": 6, "kv_heads": 6, "positions": "alibi"},
    "mha, learned": {"heads": 3, "kv_heads": 3, "head_dim": 64, "positions": "learned"},
    "gqa": {"heads": 4, "kv_heads": 2},
    "gqa, a small head": {"heads": 4, "kv_heads": 2, "head_dim": 8},
    "gqa, normed heads": {"heads": 6, "kv_heads": 2, "head_dim": 32, "normed": True},
    "gqa, no power of two": {"heads": 6, "kv_heads": 2, "head_dim": 24},
    "mqa, alibi": {"heads": 5, "kv_heads": 1, "positions": "alibi"},
}  # fmt: skip
CACHED = [5, 0, 33, 64, 95, 1]
TOKENS = 96


def attention_of(name: str, dtype: torch.dtype) -> tuple[Layer, Positions, DecoderShape]:
    options: dict[str, Any] = dict(ATTENTION[name])
    normed, turned = options.pop("normed", False), options.pop("turned", None)
    shape = shape_of(**options)
    hd = shape.head_dim
    positions = Positions()
    if shape.positions == "rotary":
        positions = rotary(random((turned or hd) // 2).abs(), 1.0, tokens=TOKENS, head_dim=hd)
    elif shape.positions == "alibi":
        positions = Positions(slopes=alibi_slopes(shape.heads).to(DEVICE))
    layer: Any = Layer(*[None] * 8)  # type: ignore[arg-type]
    if normed:
        layer.q_norm, layer.k_norm = random(hd, seed=1, dtype=dtype) + 1, random(hd, seed=2, dtype=dtype) + 1
    return layer, positions, shape


def layer_in(layer: Layer, dtype: torch.dtype) -> Layer:
    norms = {name: None if x is None else x.to(dtype) for name, x in (("q_norm", layer.q_norm), ("k_norm", layer.k_norm))}
    return dataclasses.replace(layer, **norms)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ATTENTION)
def test_attend(name: str, dtype: torch.dtype, kernels: TritonOps) -> None:
    """Rows of several blocks, of one and of none; finished rows write nothing."""
    layer, positions, shape = attention_of(name, dtype)
    hd, kv = shape.head_dim, shape.kv_heads
    slots = slots_of(CACHED, finished=(0,))
    qkv = random(len(CACHED), shape.qkv_width, dtype=dtype)
    caches = [random(len(CACHED) + 1, kv, TOKENS, hd, seed=s, dtype=dtype) for s in (3, 4)]
    live = [row for row, slot in enumerate(slots.rows.tolist()) if slot != 0]

    def run(ops: TorchOps, kind: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = (cache.to(kind, copy=True) for cache in caches)
        return ops.attend(qkv.to(kind), keys, values, slots, slots.rows, layer_in(layer, kind), positions, shape), keys, values

    found, twin = run(kernels, dtype), run(TWIN, dtype)
    exact = run(TWIN, torch.float32)
    agrees(found[0][live], twin[0][live], exact[0][live])
    for cache, (ours, theirs) in enumerate(zip(found[1:], twin[1:], strict=True)):
        assert torch.equal(ours[0], caches[cache][0]), "a finished row wrote into the cache"
        torch.testing.assert_close(ours[1:].float(), theirs[1:].float(), rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)
        changed = (ours != caches[cache]).any(dim=3).any(dim=1).nonzero().tolist()
        assert changed == [[slot, CACHED[slot]] for slot in range(1, len(CACHED))], "other places than the new token's were written"


@pytest.mark.parametrize("kv_heads", [16, 1])
def test_alibi_far_from_the_beginning_is_rounded_as_the_twin_rounds(kv_heads: int, kernels: TritonOps) -> None:
    """In 16 bits neighbours' biases differ by less than what is rounded away."""
    dtype, tokens = DTYPES[1], 1500
    shape = shape_of(heads=16, kv_heads=kv_heads, positions="alibi")
    positions, layer = Positions(slopes=alibi_slopes(16).to(DEVICE)), Layer(*[None] * 8)  # type: ignore[arg-type]
    slots = slots_of([tokens - 1, 700])
    qkv = random(2, shape.qkv_width, dtype=dtype)
    caches = [random(3, kv_heads, tokens, 16, seed=s, dtype=dtype) for s in (3, 4)]
    found, twin = (
        ops.attend(qkv, *(cache.clone() for cache in caches), slots, slots.rows, layer, positions, shape).float() for ops in (kernels, TWIN)
    )
    assert (found - twin).abs().mean() < 0.01 * twin.abs().mean()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in ATTENTION if "alibi" not in name and "learned" not in name])
def test_prefill_turns_heads_and_keeps_them(name: str, dtype: torch.dtype, kernels: TritonOps) -> None:
    """Three prompts, of which one is answered twice; the slot in between is another's."""
    width = 5
    layer, positions, shape = attention_of(name, dtype)
    qkv = random(3 * width, shape.qkv_width, dtype=dtype)
    found, twin = kernels.heads(qkv, layer, positions, width, shape), TWIN.heads(qkv, layer, positions, width, shape)
    exact = TWIN.heads(qkv.float(), layer_in(layer, torch.float32), positions, width, shape)
    for ours, theirs, truth in zip(found, twin, exact, strict=True):
        agrees(ours, theirs, truth)
    slots, prompts = (torch.tensor(x, device=DEVICE) for x in ([4, 0, 3, 1], [2, 0, 1, 2]))
    for tokens in (width, 70):  # one block of tokens, and two
        caches = [[random(6, shape.kv_heads, TOKENS, shape.head_dim, seed=s, dtype=dtype) for s in (3, 4)] for _ in range(2)]
        k, v = (random(3, tokens, shape.kv_heads, shape.head_dim, seed=s, dtype=dtype).transpose(1, 2) for s in (5, 6))
        for ops, cache in zip((kernels, TWIN), caches, strict=True):
            ops.keep(k, v, *cache, slots, prompts)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*caches, strict=True))
        assert torch.equal(caches[0][0][4, :, :tokens], k[2])


# --- norms ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [48, 2560])
@pytest.mark.parametrize("kind", ["rms", "layer", "layer without bias"])
def test_add_norm(kind: str, width: int, dtype: torch.dtype, kernels: TritonOps) -> None:
    shape = shape_of(norm=kind.split()[0], hidden=width)
    x, delta = random(5, width, dtype=dtype), random(5, width, seed=1, dtype=dtype)
    norm = Norm(random(width, seed=2, dtype=dtype), random(width, seed=3, dtype=dtype) if kind == "layer" else None)
    wide = Norm(norm.weight.float(), None if norm.bias is None else norm.bias.float())
    found, twin = kernels.add_norm(x, delta, norm, shape), TWIN.add_norm(x, delta, norm, shape)
    assert torch.equal(found[0], twin[0])
    agrees(found[1], twin[1], TWIN.norm(twin[0].float(), wide, shape))
    agrees(kernels.norm(x, norm, shape), TWIN.norm(x, norm, shape), TWIN.norm(x.float(), wide, shape))


# --- products ---

PRODUCTS = {
    "small": (4, 130, 256),
    "one row": (1, 64, 100),
    "split": (20, 64, 2048),
    "split, uneven": (3, 96, 1100),
    "many rows": (64, 70, 300),
}


@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_and_the_norm_that_sums_their_pieces(name: str, biased: bool, dtype: torch.dtype, kernels: TritonOps) -> None:
    m, n, k = PRODUCTS[name]
    x = random(m, k, dtype=dtype)
    linear = Linear(random(n, k, seed=1, dtype=dtype) / k**0.5, random(n, seed=2, dtype=dtype) if biased else None)
    twin, exact = TWIN.linear(x, linear), x.float() @ linear.weight.float().t() + (0 if linear.bias is None else linear.bias.float())
    for relu in (False, True):
        found = matmul.product(x, linear, relu=relu, split=False, pdl=kernels.pdl)
        assert isinstance(found, Tensor)
        agrees(found, twin.relu() if relu else twin, exact.relu() if relu else exact)
    part = matmul.product(x, linear, relu=False, split=True, pdl=kernels.pdl)
    assert isinstance(part, Partial) == name.startswith("split")
    shape, norm = shape_of(hidden=n), Norm(random(n, seed=3, dtype=dtype), None)
    rest = random(m, n, seed=4, dtype=dtype)
    found, expected = kernels.add_norm(rest, part, norm, shape), TWIN.add_norm(rest, twin, norm, shape)
    total = rest.float() + exact
    agrees(found[0], expected[0], total)
    agrees(found[1], expected[1], TWIN.norm(total, Norm(norm.weight.float(), None), shape))
    if isinstance(part, Partial):
        rows = torch.tensor([0, m - 1], device=DEVICE)
        assert torch.equal(part[rows].sums, part.sums[:, rows])


def test_a_product_with_a_matrix_that_is_stored_the_other_way_round(kernels: TritonOps) -> None:
    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    x, linear = random(5, 64, dtype=dtype), Linear(random(64, 40, seed=1, dtype=dtype).t(), None)
    exact = x.float() @ linear.weight.float().t()
    found = matmul.product(x, linear, relu=False, split=False, pdl=kernels.pdl)
    assert isinstance(found, Tensor)
    agrees(found, TWIN.linear(x, linear), exact)


# --- small ones ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_and_embed(dtype: torch.dtype, kernels: TritonOps) -> None:
    for width in (70, 1500):
        x = random(3, 2 * width, dtype=dtype)
        agrees(kernels.gate(x, "silu"), TWIN.gate(x, "silu"), TWIN.gate(x.float(), "silu"))
        assert torch.equal(kernels.gate(x, "gelu"), TWIN.gate(x, "gelu"))
        table, positions = random(100, width, dtype=dtype), random(64, width, seed=1, dtype=dtype)
        slots = slots_of([5, 0, 33, 61])
        slots.tokens[:4] = torch.tensor([3, 0, 99, 7])
        for places in (None, positions):
            ours, theirs = (ops.embed(table, places, 2, slots, slots.rows) for ops in (kernels, TWIN))
            assert torch.equal(ours, theirs)


# --- sampling ---

DRAWN: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0},
    "greedy": {"temperature": 0.0},
    "greedy, at least 3": {"temperature": 0.0, "min_new_tokens": 3},
    "top k": {"temperature": 0.7, "top_k": 5},
    "top p, at least 2": {"temperature": 1.3, "top_p": 0.8, "min_new_tokens": 2},
    "at least 3": {"temperature": 0.5, "min_new_tokens": 3},
    "no stop tokens": {"temperature": 1.0, "stop_ids": ()},
}


@pytest.mark.parametrize(("name", "vocabulary"), [*((name, n) for name in DRAWN for n in (100, 9000)), ("plain", 50272), ("top k", 50272)])
def test_draw(name: str, vocabulary: int, kernels: TritonOps) -> None:
    """The same tokens, stops and counts, from one block of logits or many; stop tokens are likely, so that they matter."""
    sampling = plain_sampling(**({"stop_ids": (7, 60)} | DRAWN[name]))
    seen = set()
    for seed in range(4):
        logits = random(6, vocabulary, seed=seed) * 3
        logits[:, [7, 60]] += 3 + math.log(vocabulary)
        slots = [slots_of([5, 0, 33, 17, 9, 2], counts=[0, 1, 2, 7, 3, 4], finished=(5,), seed=seed) for _ in range(2)]
        for ops, state in zip((kernels, TWIN), slots, strict=True):
            ops.draw(logits, state, state.rows, sampling)
        ours, theirs = slots
        for field in ("tokens", "counts", "lengths", "answers", "finished"):
            assert torch.equal(getattr(ours, field), getattr(theirs, field)), field
        torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=1e-4, atol=1e-4)
        seen |= set(ours.tokens[:5].tolist())
    if name != "no stop tokens":
        assert seen & {7, 60} and seen - {7, 60}, "the draws say too little"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_draw_from_16_bit_logits(dtype: torch.dtype, kernels: TritonOps) -> None:
    logits = (random(4, 300) * 3).to(dtype)
    slots = [slots_of([1, 2, 3, 4]) for _ in range(2)]
    for ops, state in zip((kernels, TWIN), slots, strict=True):
        ops.draw(logits, state, state.rows, plain_sampling(temperature=0.9))
    assert torch.equal(slots[0].tokens, slots[1].tokens)
    torch.testing.assert_close(slots[0].logprobs, slots[1].logprobs, rtol=1e-4, atol=1e-4)
