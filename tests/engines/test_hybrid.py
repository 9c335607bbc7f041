"""The hybrid engine on one rank, called directly: what it keeps and gives back, and what it refuses, with the reason."""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from intruder import held_bytes
from jobs import composed
from tiny import COMMON, SHAPES, config
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.config import UserError, build
from rlhf.engines import room
from rlhf.engines.hybrid import HybridEngine
from rlhf.engines.tensor_parallel import tensor_parallel_group
from rlhf.inference.parallel import Parallel
from rlhf.models.networks import CausalLM
from rlhf.settings import RolloutConfig
from rlhf.types import PromptBatch, Rollout

END, PAD = 2, 3
PROMPTS = [[5, 6, 7], [9, 8], [20, 21, 22, 23, 24], [30]]


class Alone:
    """What the engine asks of a strategy, around networks of one rank."""

    root_device, world_size, global_rank = torch.device("cpu"), 1, 0

    def __init__(self, **networks: Any) -> None:
        self.networks = networks

    def network(self, role: str) -> Any:
        return self.networks[role]

    @contextmanager
    def whole(self, role: str) -> Iterator[Any]:
        yield self.networks[role]

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]

    def max_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        return values


def network(family: str = "llama", **changes: Any) -> CausalLM:
    torch.manual_seed(0)
    if family == "mistral":  # a LLaMA by another name
        shape = AutoConfig.for_model("mistral", **{**COMMON, **SHAPES["llama"], "initializer_range": 0.3, **changes})
    else:
        shape = config(family, initializer_range=0.3, **changes)
    return CausalLM(AutoModelForCausalLM.from_config(shape).eval())


def engine_of(strategy: Any, **options: Any) -> HybridEngine:
    plain: RolloutConfig = build(composed("ppo", "run_dir=x")).rollout
    return HybridEngine(strategy, dataclasses.replace(plain, **({"max_new_tokens": 6} | options)), end_id=END, pad_id=PAD)


def batch(prompts: list[list[int]] = PROMPTS) -> PromptBatch:
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts])
    return PromptBatch(ids=ids, mask=mask, index=torch.arange(len(prompts)), texts=[""] * len(prompts))


def answers(rollout: Rollout) -> list[list[int]]:
    width = rollout.action_mask.shape[1]
    return [ids[live].tolist() for ids, live in zip(rollout.ids[:, -width:], rollout.action_mask, strict=True)]


# --- what comes back ---


def test_a_rollout_holds_prompts_answers_and_where_they_ended() -> None:
    engine, prompts = engine_of(Alone(actor=network()), max_new_tokens=30), batch()
    torch.manual_seed(4)
    rollout = engine.generate("actor", prompts, samples=6)
    assert torch.equal(rollout.ids[:, :5], prompts.ids.repeat(6, 1)) and torch.equal(rollout.mask[:, :5], prompts.mask.repeat(6, 1))
    assert rollout.prompt_length == 5 and rollout.logprobs is not None and rollout.logprobs.shape == rollout.action_mask.shape
    found = answers(rollout)
    assert [answer[-1] == END for answer in found] == rollout.ended.tolist() and 0 < rollout.ended.sum() < 24
    assert not any(END in answer[:-1] for answer in found)
    assert (rollout.ids[:, 5:][~rollout.action_mask] == PAD).all() and (rollout.logprobs[~rollout.action_mask] == 0).all()
    assert max(map(len, found)) == rollout.action_mask.shape[1] == 30
    assert len({tuple(answer) for answer in found}) == 24


def test_limits_are_those_of_each_sequence() -> None:
    engine = engine_of(Alone(actor=network()), min_new_tokens=6)
    limits = torch.tensor([1, 6, 3, 2, 4, 6, 5, 1])
    assert engine.generate("actor", batch(), samples=2, limits=limits).lengths.tolist() == limits.tolist()


def test_a_seed_gives_an_answer_again_and_the_next_rollout_another() -> None:
    engine = engine_of(Alone(actor=network()))
    torch.manual_seed(7)
    first, second = (engine.generate("actor", batch(), samples=1) for _ in range(2))
    torch.manual_seed(7)
    again = engine.generate("actor", batch(), samples=1)
    assert answers(first) == answers(again) != answers(second)
    assert torch.equal(first.logprobs, again.logprobs)  # type: ignore[arg-type]


def test_two_roles_answer_with_their_own_weights() -> None:
    strategy = Alone(actor=network(), ref=network("opt"))
    engine = engine_of(strategy, temperature=0.0)
    alone = engine_of(strategy, temperature=0.0).generate("ref", batch(), samples=1)
    actor, ref = (engine.generate(role, batch(), samples=1) for role in ("actor", "ref"))
    assert answers(ref) == answers(alone) != answers(actor)


# --- memory ---


@pytest.mark.parametrize(
    ("release", "pin"),
    [(True, False), (False, False), (True, True), (False, True)],
    ids=["give all back", "keep the cache", "pin", "keep both"],
)
def test_what_is_kept_between_rollouts_is_what_was_asked_for(release: bool, pin: bool) -> None:
    """Cache and copied weights, to the byte; at the same place where they are kept."""
    engine = engine_of(Alone(actor=network()), release_inference_cache=release, pin_parameters=pin)
    places = []
    alive: list[Any] = []
    for i in range(4):
        with engine.rollout_mode("actor", rows=4, longest=5) as generator:
            assert generator is not None
            weights, cache = generator.decoder.weights, generator.cache
            copies = [weights.tensors[key] for key in weights.tensors if key not in weights.shared]
            assert copies and cache.mapped and weights.arena.mapped
            places.append((cache.tensors["keys"].data_ptr(), copies[0].data_ptr()))
            alive += [[weakref.ref(t) for t in cache.tensors.values()], [weakref.ref(t) for t in copies]]
            del copies
        assert (cache.mapped, weights.arena.mapped) == (not release, pin)
        kept = [any(ref() is not None for ref in refs) for refs in alive[-2:]]
        assert kept == [not release, pin], i
    assert release or len({keys for keys, _ in places}) == 1
    assert not pin or len({copy for _, copy in places}) == 1
    engine.close()
    assert not any(ref() is not None for refs in alive for ref in refs)


def test_pinned_copies_still_follow_the_training_weights() -> None:
    model = network()
    for pin in (False, True):
        engine = engine_of(Alone(actor=model), pin_parameters=pin, temperature=0.0)
        before = answers(engine.generate("actor", batch(), samples=1))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.roll(1, 0))
        after = answers(engine.generate("actor", batch(), samples=1))
        assert after == answers(engine_of(Alone(actor=model), temperature=0.0).generate("actor", batch(), samples=1)) != before


def test_twenty_rollouts_leave_nothing_behind() -> None:
    engine = engine_of(Alone(actor=network()))
    engine.generate("actor", batch(), samples=2)
    held = held_bytes()
    for _ in range(20):
        engine.generate("actor", batch(), samples=2)
    assert held_bytes() == held


def test_memory_comes_back_after_an_error_too() -> None:
    engine = engine_of(Alone(actor=network()))
    with pytest.raises(ZeroDivisionError), engine.rollout_mode("actor", rows=4, longest=5) as generator:
        raise ZeroDivisionError
    assert generator is not None and not generator.cache.mapped and not generator.decoder.weights.arena.mapped
    assert len(answers(engine.generate("actor", batch(), samples=1))) == 4


def test_a_larger_batch_gets_more_slots_and_a_smaller_one_takes_what_is_there() -> None:
    engine = engine_of(Alone(actor=network()))

    def slots(count: int) -> tuple[int, int]:
        engine.generate("actor", batch(PROMPTS[:count]), samples=1)
        fast = engine._fast["actor"]
        assert fast is not None
        return fast.generator.slots, fast.generator.tokens

    assert [slots(2), slots(4), slots(1)] == [(2, 9), (4, 11), (4, 11)]


# --- refusals ---


def test_too_short_a_cache_says_by_how_much() -> None:
    engine = engine_of(Alone(actor=network()), max_out_tokens=9)
    with pytest.raises(
        UserError, match=r"rollout\.max_out_tokens=9 is 2 short of the longest prompt \(5 tokens\) and rollout\.max_new_tokens=6"
    ):
        engine.generate("actor", batch(), samples=1)
    assert engine_of(Alone(actor=network()), max_out_tokens=11).generate("actor", batch(), samples=1).lengths.max() <= 6


@pytest.mark.parametrize(
    ("sequences", "advice"), [(2.5, r"set rollout\.micro_batch_size=1 or lower"), (0.5, r"not even one sequence fits: raise tp\.size")]
)
def test_memory_that_does_not_fit_says_what_is_short_and_what_helps(monkeypatch: pytest.MonkeyPatch, sequences: float, advice: str) -> None:
    engine = engine_of(Alone(actor=network()))
    engine.generate("actor", batch(), samples=1)
    fast = engine._fast["actor"]
    assert fast is not None
    cache, copies = fast.generator.cache.bytes, fast.weights.arena.bytes
    free = copies + int(cache / 5 * sequences)  # 4 slots and the idle one
    monkeypatch.setattr(room, "free_bytes", lambda device: free)
    with pytest.raises(UserError, match=advice) as refused:
        engine.generate("actor", batch(), samples=1)
    said = str(refused.value)
    assert f"the rollout is {(cache + copies - free) / 1e9:.2f} GB short" in said and "4 sequences of 11 tokens" in said
    assert "rollout.max_out_tokens" in said and "tp.size (now 1)" in said
    assert not fast.generator.cache.mapped and not fast.weights.arena.mapped
    monkeypatch.setattr(room, "free_bytes", lambda device: cache + copies)
    engine.generate("actor", batch(), samples=1)
    fewer = engine_of(Alone(actor=network()), micro_batch_size=1)
    fewer.generate("actor", batch(), samples=1)
    monkeypatch.setattr(room, "free_bytes", lambda device: free)
    if sequences > 1:
        fewer.generate("actor", batch(), samples=1)  # the advice helps


def test_memory_that_is_kept_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(Alone(actor=network()), release_inference_cache=False, pin_parameters=True)
    engine.generate("actor", batch(), samples=1)
    monkeypatch.setattr(room, "free_bytes", lambda device: 0)
    assert len(engine.generate("actor", batch(), samples=1)) == 4


@pytest.mark.parametrize(
    ("size", "shape", "reason"),
    [
        (3, {}, r"tp\.size=3 does not divide the 4 attention heads of actor: choose a divisor of 4"),
        (4, {}, r"tp\.size=4 does not divide the 2 key/value heads of actor: choose a divisor of 2"),
        (2, {"intermediate_size": 63}, r"tp\.size=2 does not divide the 63 MLP columns of actor"),
    ],
)
def test_ranks_that_do_not_divide_the_network(size: int, shape: dict[str, Any], reason: str) -> None:
    engine = engine_of(Alone(actor=network(**shape)))
    engine.parallel = Parallel(0, size)
    with pytest.raises(UserError, match=reason), engine.rollout_mode("actor", rows=4, longest=5):
        pass


def test_groups_that_do_not_divide_the_ranks() -> None:
    ranks: Any = SimpleNamespace(global_rank=0, world_size=4)
    with pytest.raises(UserError, match=r"tp\.size=3 does not divide the number of ranks = 4: choose a divisor of 4"):
        tensor_parallel_group(ranks, 3)


FALLBACKS = {
    "no entry": ("gptj", {}, "family 'gptj' has no entry in the table of families"),
    "an option": ("opt", {"enable_bias": False}, "'opt' with enable_bias=False computes something else than the decoder"),
    "a window": ("mistral", {"sliding_window": 8}, "attention slides over 8 tokens, but sequences may have 11"),
}


def odd(name: str) -> CausalLM:
    family, changes, _ = FALLBACKS[name]
    return network(family, **changes)


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_has_no_fast_form_falls_back_with_a_warning_that_says_why(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    strategy = Alone(actor=odd(name))
    engine = engine_of(strategy)
    monkeypatch.setattr(logging.getLogger("rlhf"), "propagate", True)
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING, logger="rlhf"):
        found = [engine.generate("actor", batch(), samples=2) for _ in range(2)]
    warnings = [record.getMessage() for record in caplog.records if record.name == "rlhf"]
    assert warnings == [f"actor has no fast rollout and answers with transformers' generate: {FALLBACKS[name][2]}"], "once, with the reason"
    assert all(len(rollout) == 8 and rollout.logprobs is None for rollout in found)


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_has_no_fast_form_is_an_error_under_strict(name: str) -> None:
    engine = engine_of(Alone(actor=odd(name)), strict=True)
    with pytest.raises(UserError) as refused:
        engine.generate("actor", batch(), samples=1)
    assert str(refused.value) == f"rollout.strict=true and actor has no fast rollout: {FALLBACKS[name][2]}; take rollout=hf_generate"


def test_a_window_that_sees_everything_is_no_window() -> None:
    engine = engine_of(Alone(actor=network("mistral", sliding_window=11)), strict=True)
    assert engine.generate("actor", batch(), samples=1).logprobs is not None
