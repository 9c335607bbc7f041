"""The whole answer: its JSON, what is refused, and when a training verb is refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from plans import settings

from rlhf.config import UserError
from rlhf.planning.report import TIGHT, Report, as_json, judged, report

ACTOR = "model@actor.model=opt-1.3b"
TOO_MUCH = ("ppo.batch_size=512", "ppo.minibatch_size=512")


def asked(*overrides: str, step: str = "ppo") -> Report:
    return report(settings(step, ACTOR, *overrides))


def test_json_adds_up() -> None:
    answer = json.loads(json.dumps(as_json(asked("hardware=a100-80g", "plan.samples=264292"))))
    assert answer["fits"] and answer["gpu"]["short"] == 0 and answer["remedies"] == [] and answer["search"] is None
    for phase in answer["memory"].values():
        parts = sum(size for role in phase["roles"].values() for size in role.values())
        assert phase["total"] == pytest.approx(parts, abs=50) and phase["allocated"] <= phase["total"]
    worst = answer["gpu"]["phase"]
    assert answer["gpu"]["peak"] == answer["memory"][worst]["total"] == max(phase["total"] for phase in answer["memory"].values())
    assert answer["seconds_per_iteration"] == pytest.approx(sum(answer["seconds"].values()))
    assert answer["sequences_per_second"] == pytest.approx(64 / answer["seconds_per_iteration"])
    assert answer["hours"] == pytest.approx(264292 / answer["sequences_per_second"] / 3600)
    assert answer["dollars"] == pytest.approx(answer["hours"] * 4.0)


def test_the_length_of_the_run_comes_from_the_config_if_it_says_it() -> None:
    assert asked("ppo.iterations=10").samples == 640
    assert asked().samples is None and asked().hours is None
    assert asked("sft.max_steps=5", "sft.batch_size=8", step="sft").samples == 40


def test_a_missing_price_gives_no_dollars() -> None:
    found = asked("plan.samples=1000", "hardware=h100-80g")
    assert found.hours is not None and found.dollars is None and not found.price_known


def test_what_is_short_is_in_the_json() -> None:
    answer = as_json(asked(*TOO_MUCH))
    assert not answer["fits"] and answer["gpu"]["short"] == answer["gpu"]["peak"] - answer["gpu"]["capacity"] > 0
    assert answer["remedies"] and all(one["peak"] <= answer["gpu"]["capacity"] for one in answer["remedies"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("trainer.devices=16", "hardware=a100-40g"), r"trainer.devices=16 .* \(hardware.devices_per_node=8\)"),
        (("hardware=cpu",), "hardware=cpu, but trainer.accelerator=cuda"),
        (("trainer=cpu",), "hardware=h100-80g, but trainer.accelerator=cpu"),
        (("actor.model.parameters=1",), "actor.model.parameters=1 contradicts"),
        (("critic.model.family=strange",), "critic.model.family=strange has no known shape"),
    ],
)
def test_contradictions_are_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        asked(*overrides)


# --- what a training verb does ------------------------------------------------------------------------------------------------------


def test_a_run_that_fits_is_not_refused() -> None:
    assert judged(settings("ppo", ACTOR)) == (None, None)


def test_a_run_that_hardly_fits_is_warned_of() -> None:
    """Cards of the size of the job, and of that and a twentieth."""
    peak = asked().memory.peak / 1e9
    for factor, careful in ((1.001, True), (1.04, True), (1 / (1 - TIGHT) + 0.001, False)):
        words = f"hardware.memory_gb={peak * factor}"
        refusal, caution = judged(settings("ppo", ACTOR, words))
        found = asked(words)
        assert refusal is None and found.fits and found.caution == caution and (caution is not None) == careful
        assert as_json(found)["gpu"]["spare"] == pytest.approx(found.capacity - found.memory.peak, abs=1)
    assert asked("hardware.memory_gb=1").caution is None, "it does not fit at all"


def test_a_run_that_cannot_fit_is_refused_with_the_way_out() -> None:
    message, _ = judged(settings("ppo", ACTOR, *TOO_MUCH))
    assert message is not None and "\n" not in message
    assert message.startswith("a GPU is ") and "GB short of memory in the phase 'train actor'" in message
    assert "hardware=h100-80g" in message and message.endswith("and plan.enforce=false goes on")


def test_a_host_that_is_too_small_is_named() -> None:
    message, _ = judged(settings("ppo", ACTOR, "hardware.host_memory_gb=8"))
    assert message is not None and "short of main memory" in message and "hardware.host_memory_gb" in message


def test_nothing_is_refused_where_nothing_is_known() -> None:
    def changed(**hardware: Any) -> Any:
        cfg = settings("ppo", ACTOR, *TOO_MUCH)
        return type(cfg)(**(vars(cfg) | {"hardware": dataclasses.replace(cfg.hardware, **hardware)}))

    assert judged(changed(name="cpu")) == (None, None)
    assert judged(changed(memory_gb=0.0)) == (None, None)
    assert judged(settings("ppo", ACTOR, *TOO_MUCH, "actor.model.family=strange")) == (None, None)
