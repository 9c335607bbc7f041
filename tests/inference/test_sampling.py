"""Sampled tokens follow the softmax under every option, and depend on seed, sequence and position alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from decoders import CPU, generator_of, mixed_prompts, noisy_model, plain_sampling
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rlhf.inference.reference import TorchOps
from rlhf.inference.sampling import choose, filtered, uniforms
from rlhf.inference.slots import Slots

DRAWS = 20_000
VOCAB = 12
LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.8, 0.0, -0.5, 1.2, 0.9, -2.0, 0.2, 1.0, -0.2])
ROWS = torch.arange(DRAWS)


# --- frequencies ---


def draws(*, count: int = 0, limit: int = 9, seed: int = 1, logits: Tensor = LOGITS, **options: Any) -> Slots:
    """One draw for each of many sequences, all from the same logits (V,), as token number `count` of the answer."""
    slots = Slots.empty(DRAWS, 9, CPU)
    slots.sequences[:DRAWS], slots.counts[:], slots.limits[:], slots.finished[:DRAWS] = ROWS, count, limit, False
    slots.seed.fill_(seed)
    TorchOps().draw(logits.expand(DRAWS, -1), slots, ROWS, plain_sampling(**({"temperature": 1.0} | options)))
    return slots


def expected(*, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, without: tuple[int, ...] = ()) -> list[float]:
    """Probabilities, one by one from the definition."""
    weights = [0.0 if i in without else math.exp(x / temperature) for i, x in enumerate(LOGITS.tolist())]
    ranked = sorted(range(VOCAB), key=lambda i: -weights[i])
    if top_k:
        weights = [w if i in ranked[:top_k] else 0.0 for i, w in enumerate(weights)]
    kept: list[int] = []
    while sum(weights[i] for i in kept) < top_p * sum(weights) * (1 - 1e-9):
        kept.append(ranked[len(kept)])
    return [w / sum(weights[i] for i in kept) if i in kept else 0.0 for i, w in enumerate(weights)]


def chi_square(seen: Tensor, probabilities: list[float]) -> tuple[float, float]:
    """Pearson's statistic of counts (V,), and the value it passes once in 30,000 times (Wilson and Hilferty 1931)."""
    total = int(seen.sum())
    live = [i for i, p in enumerate(probabilities) if p > 0]
    statistic = sum((int(seen[i]) - total * probabilities[i]) ** 2 / (total * probabilities[i]) for i in live)
    freedom = max(1, len(live) - 1)
    return statistic, freedom * (1 - 2 / (9 * freedom) + 4 * math.sqrt(2 / (9 * freedom))) ** 3


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.6},
    "hot": {"temperature": 1.7},
    "top k": {"top_k": 4},
    "top k past the vocabulary": {"top_k": 100},
    "top p": {"top_p": 0.7},
    "a small top p leaves one": {"top_p": 0.01},
    "all": {"temperature": 1.4, "top_k": 7, "top_p": 0.8},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_frequencies_match_the_softmax(name: str) -> None:
    slots = draws(**OPTIONS[name])
    seen, truth = slots.tokens[:DRAWS].bincount(minlength=VOCAB), expected(**OPTIONS[name])
    assert [int(seen[i]) for i in range(VOCAB) if truth[i] == 0] == [0] * truth.count(0.0)
    statistic, limit = chi_square(seen, truth)
    assert statistic < limit
    if name not in ("plain", "top k past the vocabulary"):
        statistic, limit = chi_square(seen, expected())
        assert statistic > limit, "the test cannot tell this option from none"
    temperature = OPTIONS[name].get("temperature", 1.0)
    logprobs = (LOGITS / temperature).log_softmax(-1)[slots.tokens[:DRAWS]]  # of the whole softmax, whatever was filtered
    at = slots.counts[0] - 1
    torch.testing.assert_close(slots.logprobs[:DRAWS, at], logprobs)


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.7}], ids=["plain", "top p"])
def test_stop_tokens_wait_for_the_shortest_answer(filters: dict[str, Any]) -> None:
    """Several of them; before `min_new_tokens` the others share their probability, from then on they are drawn and end the sequence."""
    options = {"min_new_tokens": 3, "stop_ids": (0, 6), **filters}
    for count in range(5):
        slots = draws(count=count, **options)
        tokens = slots.tokens[:DRAWS]
        statistic, limit = chi_square(tokens.bincount(minlength=VOCAB), expected(without=(0, 6) if count < 3 else (), **filters))
        assert statistic < limit, count
        assert torch.equal(slots.finished[:DRAWS], (tokens == 0) | (tokens == 6))
        torch.testing.assert_close(slots.logprobs[:DRAWS, count], LOGITS.log_softmax(-1)[tokens])
    assert slots.finished[:DRAWS].any()


def test_temperature_zero_takes_the_most_likely_that_is_allowed() -> None:
    assert (draws(temperature=0.0, stop_ids=(0,)).tokens[:DRAWS] == 0).all()
    slots = draws(temperature=0.0, stop_ids=(0,), min_new_tokens=1)
    assert (slots.tokens[:DRAWS] == 3).all()
    torch.testing.assert_close(slots.logprobs[:DRAWS, 0], LOGITS.log_softmax(-1)[3].expand(DRAWS))


def test_a_token_without_probability_is_never_drawn() -> None:
    """Also where the largest uniform number meets a sum that rounding left short of it."""
    logits = torch.full((VOCAB,), -torch.inf)
    logits[[2, 5]] = torch.tensor([0.0, 0.1])
    for seed in range(5):
        assert set(draws(logits=logits, seed=seed).tokens[:DRAWS].tolist()) == {2, 5}


def test_no_rounding_of_a_sum_draws_what_may_not_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's running sums may fall by a rounding between two candidates, and end below their largest."""
    candidates = torch.tensor([[0.3, 0.0, 0.0, 0.7, 0.0]]).log()
    sums = torch.tensor([[0.3, 0.3, 0.3 + 9e-8, 1.0, 1.0 - 1e-7]])
    monkeypatch.setattr(Tensor, "cumsum", lambda *_, **__: sums.clone())
    for step in range(-20, 20):
        for uniform in (0.3 + step * 3e-8, 1 - 2.0**-24 * (20 + step)):
            tokens, _ = choose(candidates, candidates, torch.tensor([uniform]), temperature=1.0)
            assert tokens.item() in (0, 3), uniform


def test_the_last_token_of_an_answer_finishes_it_and_later_draws_change_nothing() -> None:
    slots = draws(count=3, limit=4)
    assert slots.finished[:DRAWS].all() and (slots.counts[:DRAWS] == 4).all() and (slots.lengths[:DRAWS] == 1).all()
    before = {name: getattr(slots, name).clone() for name in ("tokens", "counts", "lengths", "answers", "logprobs", "finished")}
    TorchOps().draw(-LOGITS.expand(DRAWS, -1), slots, ROWS, plain_sampling(temperature=1.0))
    assert all(torch.equal(getattr(slots, name), value) for name, value in before.items())


# --- what is kept ---

scores = st.lists(st.integers(-40, 40).map(lambda x: x / 8), min_size=1, max_size=24)


@given(scores, st.integers(0, 30), st.floats(0.01, 1.0), st.sampled_from([0.3, 1.0, 2.5]))
@hypothesis_settings(max_examples=150, deadline=None)
def test_filtered_against_the_definition(row: list[float], top_k: int, top_p: float, temperature: float) -> None:
    """Values may be equal: top k keeps all that equal its last one, top p may keep any of them."""
    found = filtered(torch.tensor([row]), temperature=temperature, top_k=top_k, top_p=top_p)[0]
    kept = found > -torch.inf
    assert found[kept].tolist() == torch.tensor(row)[kept].tolist()
    least = sorted(row)[-min(top_k, len(row))] if top_k else -math.inf
    allowed = sorted((x for x in row if x >= least), reverse=True)
    survivors = sorted(found[kept].tolist(), reverse=True)
    assert survivors == allowed[: len(survivors)], "not the most likely ones"
    weights = [math.exp((x - allowed[0]) / temperature) for x in allowed]
    mass = [w / sum(weights) for w in weights]
    if top_p == 1.0:
        assert survivors == allowed
    else:
        assert sum(mass[: len(survivors) - 1]) < top_p + 1e-5, "one less would do"
        assert sum(mass[: len(survivors)]) >= top_p - 1e-5, "too few"


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 5, 1.0), (0.7, 0, 0.9), (1.5, 20, 0.6), (1.0, 0, 0.3)])
def test_filtered_keeps_what_transformers_keeps(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)) * 2
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    ours = filtered(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    assert torch.equal(ours > -torch.inf, warpers(torch.zeros(64, 1).long(), logits) > -torch.inf)  # type: ignore[arg-type]


# --- random numbers ---


def plain_uniform(seed: int, sequence: int, position: int) -> float:
    """The same in Python's integers."""

    def mix(h: int) -> int:
        h ^= h >> 16
        h = h * 0x85EBCA6B % 2**32
        h ^= h >> 13
        h = h * 0xC2B2AE35 % 2**32
        return h ^ (h >> 16)

    h = mix(seed % 2**32 ^ 0x9E3779B9)
    h = mix(h ^ sequence % 2**32)
    return (mix((h + 0x9E3779B9 * position) % 2**32) >> 8) / 2**24


numbers = st.integers(0, 2**33)


@given(st.lists(st.tuples(numbers, numbers, st.integers(0, 2**16)), min_size=1, max_size=20))
@hypothesis_settings(max_examples=50, deadline=None)
def test_uniforms_are_a_hash_of_seed_sequence_and_position(keys: list[tuple[int, int, int]]) -> None:
    seed, sequence, position = torch.tensor(keys).unbind(1)
    assert uniforms(seed, sequence, position).tolist() == [plain_uniform(*key) for key in keys]


def grid(seed: int, sequences: int = 256, positions: int = 256) -> Tensor:  # (sequences, positions)
    sequence, position = torch.meshgrid(torch.arange(sequences), torch.arange(positions), indexing="ij")
    return uniforms(torch.tensor([seed]), sequence.flatten(), position.flatten()).view(sequences, positions)


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_uniforms_are_uniform_and_neighbours_know_nothing_of_each_other(seed: int) -> None:
    u = grid(seed)
    assert u.min() >= 0 and u.max() < 1
    pairs = {
        "alone": (u, torch.zeros_like(u)),
        "next position": (u[:, :-1], u[:, 1:]),
        "next sequence": (u[:-1], u[1:]),
        "next seed": (u, grid(seed + 1)),
    }
    for name, (a, b) in pairs.items():
        bins = (a * 16).long() * 16 + (b * 16).long()
        live = 16 if name == "alone" else 256
        seen = bins.flatten().bincount(minlength=256)
        seen = seen[::16] if name == "alone" else seen
        statistic, limit = chi_square(seen, [1 / live] * live)
        assert statistic < limit, name


# --- whole answers ---

LENGTHS = [4, 9, 1, 6, 12, 2]
LIMITS = [24, 5, 1, 24, 17, 24]


@pytest.fixture(scope="module")
def model() -> Any:
    return noisy_model("llama-gqa")


def answers(
    model: Any, *, slots: int, which: list[int] | None = None, seed: int = 3, limits: list[int] = LIMITS, **sampling: Any
) -> list[list[int]]:
    """Of some of the prompts, under the numbers that they have in the whole batch."""
    which = list(range(len(LENGTHS))) if which is None else which
    prompts = mixed_prompts(LENGTHS)
    generator = generator_of(model, slots=slots, new_tokens=24, **({"temperature": 1.0, "top_k": 40, "stop_ids": (7, 11)} | sampling))
    found = generator.generate(
        [prompts[i].tolist() for i in which], samples=1, limits=[limits[i] for i in which], sequences=[100 + i for i in which], seed=seed
    )
    return [row[:count].tolist() for row, count in zip(found.tokens, found.counts.tolist(), strict=True)]


def test_an_answer_does_not_depend_on_its_slot_or_its_batch(model: Any) -> None:
    whole = answers(model, slots=len(LENGTHS))
    assert len({tuple(answer) for answer in whole}) == len(LENGTHS)
    for slots in (1, 3):
        assert answers(model, slots=slots) == whole
    assert answers(model, slots=2, which=[4, 0]) == [whole[4], whole[0]]
    assert answers(model, slots=6, seed=4) != whole


def test_each_sequence_keeps_to_its_own_limit(model: Any) -> None:
    """And up to it, it is the answer that it would be with a higher one."""
    free = answers(model, slots=3, limits=[24] * 6, stop_ids=())
    assert [len(answer) for answer in free] == [24] * 6
    cut = answers(model, slots=3, stop_ids=())
    assert cut == [answer[:limit] for answer, limit in zip(free, LIMITS, strict=True)]


def test_stop_tokens_end_an_answer_but_not_before_the_least_length(model: Any) -> None:
    free = answers(model, slots=6, limits=[24] * 6, stop_ids=())
    stopped = answers(model, slots=6, limits=[24] * 6)
    for whole, answer in zip(free, stopped, strict=True):
        ends = [i for i, token in enumerate(whole) if token in (7, 11)]
        assert answer == whole[: ends[0] + 1 if ends else 24]
    assert any(len(answer) < 12 for answer in stopped)
    long = answers(model, slots=6, limits=[24] * 6, min_new_tokens=12)
    assert all(len(answer) >= 12 and not {7, 11} & set(answer[:12]) for answer in long)
