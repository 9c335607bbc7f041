"""docs/ppo_details.md says what the presets say, and names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jobs import composed

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "ppo_details.md").read_text(encoding="utf-8")
PRESETS = ("dschat", "corrected", "n_details")
SIZES = {"iterations", "batch_size", "minibatch_size", "micro_batch_size", "score_micro_batch_size"}


def rows(columns: int) -> list[list[str]]:
    """Rows of the tables with so many columns, without heading and rule."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("|")]
    return [row for row in cells if len(row) == columns and not row[0].startswith("---") and row[0] not in ("key", "detail")]


def leaves(node: dict[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in node.items():
        found |= leaves(value, f"{before}{name}.") if isinstance(value, dict) and value else {before + name: value}
    return {name: value for name, value in found.items() if not name.endswith("_target_")}


@pytest.mark.parametrize("preset", PRESETS)
def test_the_table_has_every_key_with_the_value_of_the_preset(preset: str) -> None:
    column = 1 + PRESETS.index(preset)
    said = {row[0].strip("`"): yaml.safe_load(row[column].strip("`")) for row in rows(6)}
    values = leaves(composed("ppo", "run_dir=x", f"ppo={preset}")["ppo"])
    assert len(said) == len(rows(6)), "each key once"
    assert said == {name: value for name, value in values.items() if name not in SIZES}


def test_the_reward_models_table() -> None:
    for row in rows(5):
        for preset, cell in zip(("dschat", "default"), row[1:3], strict=True):
            assert composed("reward", "run_dir=x", f"rm={preset}")["rm"][row[0].strip("`")] == cell.strip("`")
    assert {row[0] for row in rows(5)} == {"`loss`", "`head_init`"}


def test_every_row_has_a_source_and_what_it_is_worth() -> None:
    assert all(row[-2] and row[-1] and "not measured" not in row[-1] for row in rows(6) + rows(5))


def differences(preset: str) -> set[str]:
    """Keys that a file of conf/ppo sets, nested ones with a dot."""
    text = (ROOT / "conf" / "ppo" / f"{preset}.yaml").read_text(encoding="utf-8")
    return leaves({name: value for name, value in yaml.safe_load(text).items() if name != "defaults"}).keys()


@pytest.mark.parametrize("preset", ["dschat", "n_details"])
def test_a_preset_says_only_what_differs_and_where_it_comes_from(preset: str) -> None:
    own, default = (leaves(composed("ppo", "run_dir=x", f"ppo={name}")["ppo"]) for name in (preset, "corrected"))
    assert differences(preset) == {name for name in own if own[name] != default[name]}
    lines = (ROOT / "conf" / "ppo" / f"{preset}.yaml").read_text(encoding="utf-8").splitlines()
    named = [line for line in lines if re.match(r"\s*\w+: \S", line)]
    assert [line for line in named if "# " not in line] == []


def test_every_fact_has_a_test() -> None:
    facts = rows(3)
    assert len(facts) > 10
    for row in facts:
        file, _, name = row[2].strip("`").partition("::")
        assert (ROOT / file).is_file(), row
        names = {node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.FunctionDef)}
        assert not name or name in names, row
