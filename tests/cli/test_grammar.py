"""What is printed for people to type means what it says, in a shell and to Hydra."""

from __future__ import annotations

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from rlhf.cli.grammar import quoted, typed

VALUES = ["runs/a", "a b", "lr=0.1", "it's", 'a "b"', "a\\b", "a\\", "$HOME", "7", "null", "größe (1)", "[1,2]"]


@pytest.mark.parametrize("value", VALUES)
def test_a_value_comes_back_as_it_was(value: str) -> None:
    (word,) = shlex.split(typed("checkpoint", value))
    assert OverridesParser.create().parse_override(word).value() == value
    assert OverridesParser.create().parse_override(f"k={quoted(value)}").value() == value


def test_what_needs_no_quotes_has_none() -> None:
    assert typed("checkpoint", "runs/my-ppo") == "checkpoint=runs/my-ppo"
    assert typed("checkpoint", "my runs/ppo") == "'checkpoint=my runs/ppo'"
    assert typed("checkpoint", "lr=0.1/ppo") == """'checkpoint="lr=0.1/ppo"'"""
