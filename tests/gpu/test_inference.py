"""The decoder on a GPU: the kernels against their twins, whole answers with and without graphs, memory that comes and goes."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))

import decoders
from decoders import (
    FAMILIES,
    PAD,
    POSITIONS,
    PlainSource,
    fill,
    full_forward_logprobs,
    generator_of,
    greedy_of_transformers,
    mixed_prompts,
    noisy_model,
)
from kernel_checks import *  # noqa: F403
from kernel_checks import random, shape_of, slots_of
from kernel_properties import *  # noqa: F403
from torch import Tensor

from rlhf.inference.arena import make_arena
from rlhf.inference.build import decoder_of
from rlhf.inference.kernels.ops import TritonOps
from rlhf.inference.reference import Positions
from rlhf.inference.sampling import choose
from rlhf.inference.service import Request, Service
from rlhf.inference.weights import Layer

pytestmark = pytest.mark.gpu
CARD = torch.device("cuda", 0)
LENGTHS = [3, 17, 1, 20, 11]
NEW = 48
LIMITS = [NEW] * len(LENGTHS)
WIDE = {"hidden_size": 128}
"""Heads of 32."""


@pytest.fixture(autouse=True)
def no_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def prompts() -> list[Tensor]:
    return [prompt.to(CARD) for prompt in mixed_prompts(LENGTHS)]


def generate(generator: Any) -> Any:
    ids = [prompt.tolist() for prompt in mixed_prompts(LENGTHS)]
    return generator.generate(ids, samples=1, limits=LIMITS, sequences=list(range(len(LENGTHS))), seed=1)


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_greedy_answers_are_those_of_transformers(family: str, graphs: bool) -> None:
    """Fewer slots than prompts, so that sequences leave and others take their place; the second call replays what the first captured."""
    model = noisy_model(family, **WIDE)
    greedy = greedy_of_transformers(model, mixed_prompts(LENGTHS), end=None, new_tokens=NEW)
    exact = full_forward_logprobs(model, mixed_prompts(LENGTHS), greedy)
    generator = generator_of(model.to(CARD), slots=3, new_tokens=NEW, ops=TritonOps(), graphs=graphs)
    for _ in range(2):
        found = generate(generator)
        assert found.tokens.tolist() == greedy.tolist()
        assert (found.logprobs.cpu() - exact).abs().max() < 1e-3
    assert bool(generator.steps.graphs) == graphs


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("family", ["opt", "opt-350m", "gpt_neox", "bloom", "llama-gqa", "qwen3"])
def test_bf16_is_as_close_to_fp32_as_transformers_is(family: str, graphs: bool) -> None:
    model = noisy_model(family, **WIDE).to(CARD, torch.bfloat16)
    for module in model.modules():  # a cast rounds the frequencies, which the engine's networks never do
        if hasattr(module, "inv_freq"):
            module.inv_freq = type(module)(model.config).inv_freq.to(CARD)
    generator = generator_of(model, slots=8, new_tokens=NEW, ops=TritonOps(), graphs=graphs, temperature=1.0)
    found = generate(generator)
    peer = full_forward_logprobs(model, prompts(), found.tokens)
    exact = full_forward_logprobs(noisy_model_like(model, family), prompts(), found.tokens)
    ours, theirs = ((x - exact).abs().mean() for x in (found.logprobs, peer))
    assert ours <= 1.2 * theirs


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_alibi_in_16_bits_is_the_training_networks(graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As tests/inference/test_parity.py, by the kernels: with exact biases the log-probabilities are 0.05 to 0.2 away."""
    monkeypatch.setattr(decoders, "POSITIONS", 600)
    model = noisy_model("bloom", noise=0.3, hidden_size=128, n_head=8).to(CARD, torch.bfloat16)
    long = mixed_prompts([500, 330])
    generator = generator_of(model, slots=2, new_tokens=NEW, prefill_tokens=1024, ops=TritonOps(), graphs=graphs, temperature=1.0)
    found = generator.generate([ids.tolist() for ids in long], samples=1, limits=[NEW] * 2, sequences=[0, 1], seed=1)
    peer = full_forward_logprobs(model, [ids.to(CARD) for ids in long], found.tokens)
    assert (found.logprobs - peer).abs().mean() < 0.03


def noisy_model_like(model: Any, family: str) -> Any:
    """The same weights in fp32."""
    exact = noisy_model(family, **WIDE).to(CARD)
    for target, source in zip(exact.parameters(), model.parameters(), strict=True):
        target.copy_(source)
    return exact


@pytest.mark.parametrize("rows", [1, 64])
def test_only_candidates_are_drawn_wherever_a_number_falls(rows: int) -> None:
    """Numbers that equal the running sum somewhere between two candidates, where the card's sums may go up and down by a rounding."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, 50_000, generator=generator).to(CARD)
    candidates = logits.masked_fill((torch.rand(rows, 50_000, generator=generator) < 0.99).to(CARD), -torch.inf)
    sums = candidates.softmax(dim=-1).cumsum(dim=-1)
    for at in range(0, 50_000, 250):
        tokens, _ = choose(logits, candidates, sums[:, at] / sums[:, -1], temperature=1.0)
        assert candidates.gather(1, tokens[:, None]).isfinite().all(), at


def test_a_cache_of_more_numbers_than_32_bits_count() -> None:
    """The third slot begins at number 2^31."""
    shape = shape_of(heads=32, kv_heads=32, head_dim=128, positions="learned")
    layer: Any = Layer(*[None] * 8)  # type: ignore[arg-type]
    slots, tokens = slots_of([5, 0, 33]), 1 << 18
    qkv = random(3, shape.qkv_width, dtype=torch.bfloat16)
    keys, values = (torch.zeros(4, 32, tokens, 128, dtype=torch.bfloat16, device=CARD) for _ in range(2))
    prompt = random(2, 40, 32, 128, dtype=torch.bfloat16).transpose(1, 2)
    at = torch.tensor([2, 0], device=CARD)
    TritonOps().keep(prompt, prompt, keys, values, at, torch.tensor([1, 0], device=CARD))
    assert torch.equal(keys[2, :, :40], prompt[1]) and torch.equal(values[0, :, :40], prompt[0]) and not keys[[1, 3]].any()
    copies = keys[:3, :, :48].clone(), values[:3, :, :48].clone()  # the same slots, close together
    found = TritonOps().attend(qkv, keys, values, slots, slots.rows, layer, Positions(), shape)
    near = TritonOps().attend(qkv, *copies, slots, slots.rows, layer, Positions(), shape)
    assert torch.equal(found, near) and torch.equal(keys[2, :, 33], copies[0][2, :, 33])


def test_an_arena_keeps_its_addresses_and_gives_its_memory_back() -> None:
    torch.cuda.synchronize()
    free = torch.cuda.mem_get_info(CARD)[0]
    arena = make_arena({"a": ((1 << 26,), torch.float32), "b": ((3, 5), torch.bfloat16)}, CARD)
    places = set()
    for value in range(1, 4):
        arena.map()
        assert free - torch.cuda.mem_get_info(CARD)[0] >= arena.bytes >= 1 << 28
        arena.tensors["a"].fill_(value)
        assert arena.tensors["a"].sum().item() == value * (1 << 26) and arena.tensors["b"].shape == (3, 5)
        places.add(arena.tensors["a"].data_ptr())
        arena.unmap()
        assert free - torch.cuda.mem_get_info(CARD)[0] < 1 << 25
    assert len(places) == 1
    arena.close()


@pytest.mark.parametrize("drops", [False, True], ids=["graphs kept", "graphs dropped"])
def test_captured_steps_run_again_after_the_memory_was_away(drops: bool) -> None:
    """With the weights as they are by then."""
    model = noisy_model("llama-gqa", **WIDE).to(CARD)
    generator = generator_of(model, slots=4, new_tokens=NEW, ops=TritonOps(), graphs=True)
    weights, first = generator.decoder.weights, generate(generator)
    for step in range(3):
        generator.cache.unmap()
        weights.release()
        blocker = torch.full((1 << 24,), float("nan"), device=CARD)  # takes what was given back
        if drops:
            generator.steps.drop()
        for parameter in model.parameters():
            parameter.mul_(0.9)
        del blocker
        generator.cache.map()
        weights.arena.map()
        fill(weights, PlainSource(model))
        found = generate(generator)
        plain = generate(generator_of(model, slots=4, new_tokens=NEW, ops=TritonOps()))
        assert found.tokens.tolist() == plain.tokens.tolist(), step
        assert found.counts.tolist() == LIMITS
    assert found.tokens.tolist() != first.tokens.tolist()


def test_a_capture_bears_what_other_threads_do() -> None:
    """As a loader with workers pins batches, and a server judges answers, while steps are captured."""
    model = noisy_model("llama-gqa", **WIDE).to(CARD)
    plain = generate(generator_of(model, slots=4, new_tokens=NEW, ops=TritonOps()))
    done, broken, kept = threading.Event(), [], []

    def busy() -> None:
        try:
            while not done.is_set() and len(kept) < 10_000:
                kept.append(torch.ones(1 << 16, dtype=torch.uint8).pin_memory())
                (torch.ones(len(kept) << 8, device=CARD) * 2).sum().item()
        except Exception as error:
            broken.append(error)

    threads = [threading.Thread(target=busy) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        generator = generator_of(model, slots=32, new_tokens=NEW, ops=TritonOps(), graphs=True)
        generator.state.rows.fill_(generator.slots)
        for size in generator.steps.sizes:
            generator.steps.capture(size)
        found = generate(generator)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not broken and found.tokens.tolist() == plain.tokens.tolist()


def test_requests_that_come_and_go_get_the_same_answers_with_graphs() -> None:
    """Greedy and sampled ones side by side on fewer slots; the greedy ones are transformers'."""
    model = noisy_model("llama-gqa", **WIDE)
    lengths = [3 + 5 * i % 17 for i in range(14)]
    greedy = greedy_of_transformers(model, mixed_prompts(lengths), end=None, new_tokens=24).tolist()
    model.to(CARD)
    answers = {}
    for graphs in (False, True):
        decoder = decoder_of(model, tokens=POSITIONS)
        service = Service(decoder, slots=5, tokens=POSITIONS, stop_ids=(), pad_id=PAD, prefill_tokens=64, graphs=graphs)
        heard: list[list[int]] = [[] for _ in lengths]
        for i, prompt in enumerate(mixed_prompts(lengths)):
            request = Request(prompt=tuple(prompt.tolist()), limit=24, temperature=0.8 * (i % 2), top_k=9 * (i % 4 == 1), top_p=1.0, seed=i)
            service.submit(request, lambda drawn, tokens=heard[i]: tokens.append(drawn.token))
            for _ in range(i % 4):
                service.step()
        while service.step():
            pass
        assert any(steps.graphs for steps in service.steps.values()) == graphs
        answers[graphs] = heard
    assert answers[True] == answers[False]
    assert answers[True][::2] == greedy[::2] and all(len(tokens) == 24 for tokens in answers[True])
