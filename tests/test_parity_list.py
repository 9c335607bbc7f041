"""docs/parity.md has every feature of DeepSpeed-Chat once, and names nothing that does not exist.

The ids are written out here: they number what was found by reading the original at DeepSpeedExamples 45b4b715.
"""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "parity.md"

COUNTS = {"P": 10, "S": 25, "D": 13, "A": 5, "R": 8, "O": 3, "K": 22, "I": 5}
"""Driver, shared parts, data, SFT, reward model, DPO, PPO, inference: features are numbered from 1."""
DATA_SETS = [
    "Dahoas/rm-static", "Dahoas/full-hh-rlhf", "Dahoas/synthetic-instruct-gptj-pairwise", "yitingxie/rlhf-reward-datasets",
    "openai/webgpt_comparisons", "stanfordnlp/SHP", "pvduy/sharegpt_alpaca_oa_vicuna_format", "wangrui6/Zhihu-KOL",
    "Cohere/miracl-zh-queries-22-12", "Hello-SimpleAI/HC3-Chinese", "mkqa-Chinese", "mkqa-Japanese", "Cohere/miracl-ja-queries-22-12",
    "lmqg/qg_jaquad", "lmqg/qag_jaquad", "local/jsonfile",
]  # fmt: skip
IDS = [f"{letter}{number}" for letter, count in COUNTS.items() for number in range(1, count + 1)] + DATA_SETS

STATUSES = ("here", "partly", "left out")
FOLDERS = ("rlhf", "conf", "tests", "docs")


def rows() -> list[list[str]]:
    """The cells (id, original, status, here) of every row of every table, without the headings."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] != "id" and set(row[0]) != {"-"}]


ROWS = rows()
CODE = sorted({word for row in ROWS for word in re.findall(r"`([^`]+)`", row[3])})
"""Everything the last column sets in code style."""
PATHS = [word for word in CODE if word.split("/")[0] in FOLDERS and "/" in word]
KEYS = [word for word in CODE if re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)+", word)]
OVERRIDES = [word for word in CODE if "=" in word and "/" not in word]


@functools.cache
def pipeline(*overrides: str) -> Any:
    """The widest verb's composed config: it has every group."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("pipeline", list(overrides))


def test_every_feature_has_one_row() -> None:
    assert len(IDS) == 107
    assert Counter(row[0] for row in ROWS) == Counter(IDS)


def test_every_row_says_what_became_of_it() -> None:
    for number, original, status, here in ROWS:
        assert status in STATUSES and original and here, number
        assert status == "left out" or "`" in here, f"{number} names no place"


@pytest.mark.parametrize("path", PATHS)
def test_a_path_exists(path: str) -> None:
    file, _, test = path.partition("::")
    assert (ROOT / file).exists()
    if test:
        names = {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}
        assert test in names


@pytest.mark.parametrize("key", KEYS)
def test_a_key_exists(key: str) -> None:
    missing = object()
    assert OmegaConf.select(pipeline(), key, default=missing, throw_on_missing=False, throw_on_resolution_failure=False) is not missing


@pytest.mark.parametrize("override", OVERRIDES)
def test_an_override_composes(override: str) -> None:
    assert pipeline(override) is not None
