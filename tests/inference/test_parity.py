"""fp32 on the CPU: the decoder says what transformers says, for every family.

The oracle is transformers' `generate` on one left-padded batch, and a full forward pass without cache for the log-probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import decoders
import pytest
import torch
from decoders import FAMILIES, NEW, PAD, full_forward_logprobs, generator_of, greedy_of_transformers, mixed_prompts, noisy_model
from torch import Tensor

from rlhf.inference.generate import Answers

LENGTHS = [3, 17, 1, 20, 11]
FULL = [NEW] * len(LENGTHS)


@dataclass
class Oracle:
    model: Any
    prompts: list[Tensor]
    greedy: Tensor  # (B, A), no token ends it
    end: int
    """A token that ends some of the answers early, at different places."""
    stopped: Tensor  # (B, A), PAD behind `end`

    @property
    def ids(self) -> list[list[int]]:
        return [prompt.tolist() for prompt in self.prompts]


@pytest.fixture(scope="module", params=FAMILIES)
def oracle(request: pytest.FixtureRequest) -> Iterator[Oracle]:
    model = noisy_model(request.param)
    prompts = mixed_prompts(LENGTHS)
    greedy = greedy_of_transformers(model, prompts, end=None)
    end = most_spread(greedy)
    yield Oracle(model, prompts, greedy, end, greedy_of_transformers(model, prompts, end=end))


def most_spread(answers: Tensor) -> int:
    """The token that, as an end, leaves the most different lengths."""
    ends = [torch.where((answers == token).any(1), (answers == token).int().argmax(1), NEW) for token in range(4, 64)]
    return 4 + max(range(60), key=lambda i: len(set(ends[i].tolist())))


def counts_of(answers: Tensor, end: int) -> list[int]:
    return [row.index(end) + 1 if end in row else len(row) for row in answers.tolist()]


def judged(found: Answers, oracle: Oracle, prompts: list[Tensor], *, temperature: float = 1.0) -> None:
    """Log-probabilities of the engine's own tokens agree with a full forward pass, and are 0 behind the answer."""
    live = torch.arange(found.tokens.shape[1]) < found.counts[:, None]
    exact = full_forward_logprobs(oracle.model, prompts, found.tokens, temperature=temperature)
    assert (found.logprobs - exact)[live].abs().max() < 1e-4
    assert (found.logprobs[~live] == 0).all() and (found.tokens[~live] == PAD).all()


def test_greedy_answers_are_those_of_transformers(oracle: Oracle) -> None:
    assert len(oracle.greedy.unique()) > 5 and len(oracle.greedy.unique(dim=0)) == len(LENGTHS), "the answers say too little"
    generator = generator_of(oracle.model, slots=8)
    found = generator.generate(oracle.ids, samples=1, limits=FULL, sequences=[0] * 5, seed=0)
    assert found.tokens.tolist() == oracle.greedy.tolist()
    assert found.counts.tolist() == FULL
    judged(found, oracle, oracle.prompts)


@pytest.mark.parametrize("slots", [2, 5])
def test_answers_end_where_transformers_ends_them(oracle: Oracle, slots: int) -> None:
    """With fewer slots than sequences the waiting prompts take the place of those that ended."""
    counts = counts_of(oracle.stopped, oracle.end)
    assert len(set(counts)) > 1, "the lengths say too little"
    generator = generator_of(oracle.model, slots=slots, prefill_tokens=24, stop_ids=(oracle.end,))
    found = generator.generate(oracle.ids, samples=1, limits=FULL, sequences=[0] * 5, seed=0)
    assert found.tokens.tolist() == oracle.stopped.tolist()
    assert found.counts.tolist() == counts
    judged(found, oracle, oracle.prompts)
    assert generator.decoded < sum(counts), "the slots did not work side by side"
    again = generator.generate(oracle.ids, samples=1, limits=FULL, sequences=[0] * 5, seed=0)
    assert torch.equal(again.tokens, found.tokens) and torch.equal(again.logprobs, found.logprobs), "something of the first call is left"


def test_several_answers_share_a_prefill(oracle: Oracle) -> None:
    generator = generator_of(oracle.model, slots=20, prefill_tokens=1000)
    found = generator.generate(oracle.ids, samples=4, limits=FULL * 4, sequences=list(range(20)), seed=0)
    assert found.tokens.tolist() == oracle.greedy.tolist() * 4
    assert generator.prefilled == len(LENGTHS) * max(LENGTHS)
    judged(found, oracle, oracle.prompts * 4)


def test_sampled_answers_come_with_their_logprobs(oracle: Oracle) -> None:
    generator = generator_of(oracle.model, slots=7, temperature=1.3, stop_ids=(oracle.end,))
    found = generator.generate(oracle.ids, samples=4, limits=FULL * 4, sequences=list(range(20)), seed=5)
    assert len(found.tokens.unique(dim=0)) == 20
    judged(found, oracle, oracle.prompts * 4, temperature=1.3)


def test_alibi_in_16_bits_is_the_training_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """BLOOM rounds its biases and scores: at position 300 neighbours' biases in bf16 are equal, or two apart. Answers drawn with exact ones
    are another policy's."""
    monkeypatch.setattr(decoders, "POSITIONS", 400)
    model = noisy_model("bloom", noise=0.3, hidden_size=128, n_head=8).bfloat16()
    prompts = mixed_prompts([330, 300])
    generator = generator_of(model, slots=2, new_tokens=32, prefill_tokens=1024, temperature=1.0)
    found = generator.generate([ids.tolist() for ids in prompts], samples=1, limits=[32] * 2, sequences=[0, 1], seed=1)
    assert (found.logprobs - full_forward_logprobs(model, prompts, found.tokens)).abs().mean() < 0.025
