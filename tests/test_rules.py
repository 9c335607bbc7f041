"""Rules that several verbs ask for."""

from __future__ import annotations

import pytest
from jobs import composed

from rlhf.config import build
from rlhf.rules import check, critic_start


@pytest.mark.parametrize(
    ("words", "start"),
    [
        ((), "reward"),
        (("ppo.critic_init=actor",), "actor"),
        (("critic.init=x",), "critic"),
        (("ppo.critic_init=actor", "critic.init=x"), "critic"),
        (("ppo.advantage=reinforce_pp",), None),
    ],
)
def test_what_the_critic_starts_from(words: tuple[str, ...], start: str | None) -> None:
    assert critic_start(build(composed("ppo", "run_dir=x", *words))) == start


def test_a_critic_with_weights_of_its_own_may_be_another_network() -> None:
    check(build(composed("ppo", "run_dir=x", "model@critic.model=tiny-opt", "ppo.critic_init=actor", "critic.init=x")))
