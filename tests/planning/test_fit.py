"""Verdict, largest batch, knobs and search: whatever is said is true of the same model of memory."""

from __future__ import annotations

import dataclasses

import pytest
from jobs import composed
from plans import BASE, job, machine, settings

from rlhf.cli.plan import step_settings
from rlhf.planning.fit import candidates, knobs, largest_batch, remedies, rows, search, with_batch
from rlhf.planning.report import batch_words
from rlhf.planning.workload import Workload, workload

LARGE = ("ppo.batch_size=256", "ppo.minibatch_size=256")


def again(words: tuple[str, ...], *overrides: str, step: str = "ppo", actor: str = "opt-1.3b") -> Workload:
    """The job that a command line with these words makes."""
    return workload(step_settings(composed("plan", *BASE, f"plan={step}", f"model@actor.model={actor}", *overrides, *words), step))


def test_what_fits_and_what_does_not() -> None:
    card = machine()
    assert card.fits(job())
    gpu, host = card.short(job(*LARGE))
    assert gpu == card.memory(job(*LARGE)).peak - 84.9e9 > 0
    assert host == card.memory(job(*LARGE)).host_peak - 2000e9 < 0
    small = machine(host_memory_gb=1)
    assert not small.fits(job()) and small.short(job())[1] > 0
    assert machine(host_memory_gb=0).short(job())[1] == 0, "unknown"


@pytest.mark.parametrize("overrides", [(), ("ppo.micro_batch_size=8", "ppo.score_micro_batch_size=8"), ("ppo.minibatch_size=32",)])
def test_the_largest_batch_fits_and_the_next_does_not(overrides: tuple[str, ...]) -> None:
    work, card = job(*overrides), machine()
    most = largest_batch(work, card)
    assert most is not None and card.fits(most)
    unit = (work.micro if work.micro < work.minibatch else 1) * (work.batch // work.minibatch)
    assert not card.fits(with_batch(work, most.batch + unit))
    made = again(batch_words(most), *(word for word in overrides if "minibatch" not in word))
    assert (made.global_batch, made.minibatch, made.micro) == (most.global_batch, most.minibatch, most.micro)


def test_several_answers_to_a_prompt_keep_the_batch_whole() -> None:
    most = largest_batch(job("ppo.samples_per_prompt=4", "ppo.batch_size=16"), machine())
    assert most is not None and most.global_batch % 4 == 0
    assert again(batch_words(most), "ppo.samples_per_prompt=4").global_batch == most.global_batch


def test_nothing_fits_on_a_card_without_memory() -> None:
    assert largest_batch(job(), machine(memory_gb=1)) is None
    assert remedies(job(), machine(memory_gb=1)) == []


@pytest.mark.parametrize(
    ("step", "actor", "overrides"),
    [
        ("ppo", "opt-1.3b", LARGE),
        ("ppo", "opt-2.7b", ("callbacks=ema",)),
        ("ppo", "opt-6.7b", ()),
        ("ppo", "opt-13b", ("trainer.devices=8",)),
        ("sft", "opt-1.3b", ("sft.batch_size=256",)),
        ("dpo", "opt-2.7b", ("dpo.batch_size=64",)),
    ],
)
def test_remedies_fit_when_they_are_typed(step: str, actor: str, overrides: tuple[str, ...]) -> None:
    work, card = job(*overrides, step=step, actor=actor), machine()
    found = remedies(work, card)
    assert not card.fits(work) and found
    for words, changed in found:
        typed = again(words, *overrides, step=step, actor=actor)
        assert card.fits(typed), words
        assert card.memory(typed).peak == pytest.approx(card.memory(changed).peak), words


def test_every_knob_says_what_it_does() -> None:
    """The words of a knob, typed, give the job that the knob makes."""
    work, card = job("trainer.devices=4", "rollout.pin_parameters=true"), machine()
    seen = set()
    for knob in knobs(work, card):
        made = again(knob.words, "trainer.devices=4", "rollout.pin_parameters=true")
        assert made == knob.apply(work), knob.words
        seen |= {word.partition("=")[0] for word in knob.words}
    assert {"ppo.micro_batch_size", "actor.gradient_checkpointing", "zero@actor.zero", "tp", "rollout.pin_parameters"} <= seen


def test_a_shared_reference_follows_the_actor() -> None:
    """It costs no memory of its own, is offered where it may be, and is gathered as the actor is, however that ends up."""
    lora = ("lora@actor.lora=r128_only", "trainer.devices=2")
    work, card = job(*lora, "zero@ref.zero=z3", actor="opt-13b"), machine()
    offered = [knob for knob in knobs(work, card) if "ref.shared=true" in knob.words]
    assert [knob.words for knob in offered] == [("ref.shared=true", "zero@ref.zero=z0")]
    shared = again(offered[0].words, *lora, actor="opt-13b")
    assert shared == offered[0].apply(work)
    assert all(
        item.role != "ref" or item.part in ("activations", "logits", "gather buffers")
        for phase in card.memory(shared).phases
        for item in phase.items
    )
    saved = card.memory(work).peak - card.memory(shared).peak
    assert saved > 0.9 * work.roles["ref"].parameters * 2 / 2, "half of its weights, in two bytes each, lay on each of two cards"
    for knob in knobs(shared, card):
        assert again(knob.words, *lora, "ref.shared=true", actor="opt-13b") == knob.apply(shared), knob.words
        assert not any(word.startswith("zero@ref") for word in knob.words)
    pairs = [job(*lora, "zero@actor.zero=z3", *more, step="dpo", actor="opt-13b") for more in (("zero@ref.zero=z3",), ("ref.shared=true",))]
    gathered = [
        [item for phase in card.memory(one).phases for item in phase.items if (item.role, item.part) == ("ref", "gather buffers")]
        for one in pairs
    ]
    assert gathered[0] and not gathered[1], "the actor's are there before and after"
    assert not [knob for knob in knobs(job("lora@actor.lora=r128"), card) if "ref.shared=true" in knob.words], "all of the actor learns"
    assert not [knob for knob in knobs(job(*lora, "ref.init=elsewhere"), card) if "ref.shared=true" in knob.words]


def test_search_finds_the_fastest_that_fits() -> None:
    work, card = job(*LARGE, "actor.gradient_checkpointing=true"), machine()
    found = search(work, card)
    assert found is not None
    words, best = found
    assert card.fits(best) and again(words, *LARGE) == best
    for _, other in candidates(work, card):
        assert not card.fits(other) or card.time(other).total >= card.time(best).total
    assert search(work, machine(memory_gb=5)) is None


def test_search_finds_that_the_reference_need_not_be_held() -> None:
    lora = ("lora@actor.lora=r128_only",)
    found = search(job(*lora, actor="opt-13b"), machine())
    assert found is not None and "ref.shared=true" in found[0]
    assert again(found[0], *lora, actor="opt-13b") == found[1]


def test_search_keeps_batch_and_adapters() -> None:
    work = job("lora@actor.lora=r128", "trainer.devices=8")
    found = search(work, machine())
    assert found is not None
    assert found[1].global_batch == work.global_batch and found[1].roles["actor"].lora == work.roles["actor"].lora


def test_pairs_go_in_twos() -> None:
    work = job("dpo.batch_size=8", step="dpo")
    assert rows(work) == 2
    assert all(other.micro % 2 == 0 for _, other in candidates(work, machine()))
    assert dataclasses.replace(with_batch(work, 32), roles={}).global_batch == 16


def test_a_cpu_shares_its_memory_among_ranks() -> None:
    cfg = settings("ppo", "trainer=cpu", "hardware=cpu", "trainer.devices=2", "model@actor.model=opt-125m")
    card = dataclasses.replace(machine(), hardware=cfg.hardware)
    assert card.capacity(workload(cfg)) == 8e9
