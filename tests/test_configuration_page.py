"""docs/configuration.md has every key that a command line can set, with what it is; the page itself is made by docs/make_configuration.py."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, open_dict
from page_makers import maker

from rlhf.cli.compose import conf_dir
from rlhf.cli.verbs import VERBS

ROOT = Path(__file__).parents[1]
FILES = sorted(path.stem for path in (ROOT / "conf").glob("*.yaml") if path.stem != "base")
"""Verbs, and options of verbs that start from files of their own."""
Row = list[str]
"""Key, type, value, meaning, note; of entries such as callbacks: key, value, option, note."""
KEY_COLUMNS = 4
"""Tables of verbs and options have fewer."""


def sections() -> dict[str, list[Row]]:
    """Rows of tables by group; under the empty name those outside the groups."""
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    parts = re.split(r"^### (.*)$", text, flags=re.MULTILINE)
    texts = {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))
    return {
        name: [re.split(r" ?(?<!\\)\| ?", line)[1:-1] for line in text.splitlines() if line.startswith("| `")]
        for name, text in texts.items()
    }


SECTIONS = sections()


def leaves(node: dict[str, Any], before: str = "") -> Iterator[str]:
    for name, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{before}{name}.")
        elif name != "_target_":
            yield before + name


def composed(verb: str) -> tuple[dict[str, str], list[str]]:
    """Places of the groups with the groups' names; all leaf keys."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose(verb, return_hydra_config=True)
    places = {}
    for choice in cfg.hydra.runtime.choices:
        group, _, place = choice.partition("@")
        if not group.startswith("hydra/"):
            places[place or group] = group
    with open_dict(cfg):
        del cfg["hydra"]
    return places, list(leaves(OmegaConf.to_container(cfg, resolve=False)))  # type: ignore[arg-type]


def documented(group: str, key: str) -> bool:
    """Whether the section has the key, or the mapping that it is in: the keys of `shape` are the network's own and in no settings class."""
    kinds = {row[0].strip("`"): row[1] for row in SECTIONS.get(group, []) if len(row) >= KEY_COLUMNS}
    parts = key.split(".")
    above = [".".join(parts[:n]) for n in range(1, len(parts))]
    return key in kinds or any(kinds.get(name, "").startswith("dict") for name in above)


def test_every_verb_is_there() -> None:
    assert set(VERBS) <= set(FILES)
    assert {name.replace("_", " ") for name in FILES} <= {row[0].strip("`") for row in SECTIONS[""]}


@pytest.mark.parametrize("verb", FILES)
def test_every_key_of_a_verb_is_on_the_page(verb: str) -> None:
    places, keys = composed(verb)
    missing = []
    for key in keys:
        place = max((place for place in places if key == place or key.startswith(f"{place}.")), key=len, default=None)
        if key == "verb" or (key == place and places[place] in SECTIONS):  # the latter: an option without any keys
            continue
        group, rest = ("", key) if place is None else (places[place], key[len(place) + 1 :])
        if not documented(group, rest):
            missing.append(f"{key} in the section {group or 'of the verbs'}")
    assert missing == []


def test_the_keys_of_a_sweep_are_there() -> None:
    """They are in no verb: `-m` adds them."""
    for file in (ROOT / "conf" / "sweep").glob("*.yaml"):
        keys = [key for key in yaml.safe_load(file.read_text()) if key not in ("defaults", "_target_")]
        assert [key for key in keys if not documented("sweep", key)] == [], file.name


def test_the_search_for_a_key_finds_none_that_is_not_there() -> None:
    assert documented("model", "shape.hidden_size") and documented("", "chat.server.port")
    assert not documented("", "chat.server.prot") and not documented("", "lr") and not documented("zero", "hidden_size")


@pytest.mark.parametrize("verb", ["report", "chat"])
def test_keys_outside_the_groups_have_type_default_and_meaning(verb: str) -> None:
    _, keys = composed(verb)
    rows = {row[0].strip("`"): row for row in SECTIONS[""]}
    for key in (key for key in keys if key != "verb"):
        _, kind, value, meaning, _ = rows[key]
        assert kind and value and meaning, f"{key} lacks something: {rows[key]}"


def test_the_maker_reads_types_and_comments(tmp_path: Path) -> None:
    made = maker("make_configuration")
    file = tmp_path / "a.yaml"
    file.write_text("one: # first\n  two: 1 # second\n  deep:\n    three: 3\n  four: 'a # b' # fourth\n# five: 5\nsix: 6 # last\n")
    assert made.line_comments(file) == {"one": "first", "one.two": "second", "one.four": "b' # fourth", "six": "last"}
    kinds = {field.name: field.kind for field in made.read_settings()["ReportConfig"]}
    assert kinds["direction"] == "higher or lower or null" and kinds["metric"] == "str | null"
