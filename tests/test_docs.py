"""README and docs/ say what is so: commands compose, links resolve, the page of options is up to date.

Knows Markdown and Hydra; runs no command.
"""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from page_makers import maker

from rlhf.cli.hydra_app import primary_config, with_own_group
from rlhf.cli.main import VERBS
from rlhf.config import build, check

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.name for page in PAGES]


def fenced_lines(page: Path) -> list[str]:
    """Command lines of all fenced blocks, continuations joined, comments gone."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip()]


def rlhf_commands(page: Path) -> list[list[str]]:
    """Words behind `rlhf` of every line that calls it, by name or as a module under torchrun."""
    found = []
    for line in fenced_lines(page):
        if not re.match(r"(rlhf|torchrun .*-m rlhf|python -m rlhf) ", line):
            continue
        words = shlex.split(line, comments=True)
        found.append(words[words.index("rlhf") + 1 :])
    return found


COMMANDS = [(page.name, words) for page in PAGES for words in rlhf_commands(page)]


def compose_all(verb: str, words: list[str]) -> list[Any]:
    """One resolved config for each value of a sweep."""
    first, others = [], []
    for override in OverridesParser.create().parse_overrides(words):
        if override.is_sweep_override():
            choices = [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
            first.append(choices[0])
            others += choices[1:]
        else:
            first.append(str(override.input_line))
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        settings = [compose(verb, first), *[compose(verb, [*first, other]) for other in others]]
    for cfg in settings:
        if "run_dir" in cfg and OmegaConf.is_interpolation(cfg, "run_dir"):
            cfg.run_dir = "unused"
    return [OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True) for cfg in settings]


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 20
    assert {words[0] for _, words in COMMANDS} >= {"pipeline", "sft", "reward", "ppo", "evaluate"}


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[f"{page}: {' '.join(words)[:60]}" for page, words in COMMANDS])
def test_a_command_composes_and_passes_the_rules(page: str, words: list[str]) -> None:
    verb, rest = words[0], [word for word in words[1:] if word not in ("-m", "--help")]
    if words == ["--help"]:
        return
    assert verb in VERBS
    if "--cfg" in rest:
        del rest[rest.index("--cfg") : rest.index("--cfg") + 2]
    rest = with_own_group(verb, rest)
    for config in compose_all(primary_config(verb, rest), rest):
        check(build(config))


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_a_link_resolves(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            file, _, heading = target.partition("#")
            linked = page.parent / file if file else page
            assert linked.exists(), f"{page.name} links to {target}"
            assert not heading or heading in anchors(linked), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    """Headings as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_a_make_target_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"`make ([a-z]+)`", text)) | {line.split()[1] for line in fenced_lines(page) if line.startswith("make ")}
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_a_path_in_the_text_exists(page: Path) -> None:
    paths = re.findall(r"`((?:rlhf|conf|docs|tests|experiments)/[\w./-]+)`", page.read_text(encoding="utf-8"))
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_page_of_options_is_up_to_date() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == maker("make_configuration").render(), "run: python docs/make_configuration.py"


def test_the_messages_explained_are_those_of_the_code() -> None:
    """Each message in the first column of docs/troubleshooting.md, `…` standing for what varies, is a message of rlhf/."""
    texts = [text for path in sorted((ROOT / "rlhf").rglob("*.py")) for text in messages(path)]
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    quoted = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    assert len(quoted) > 80
    unknown = [m for m in quoted if not any(all(piece in text for piece in m.split("…")) for text in texts)]
    assert unknown == []


def messages(path: Path) -> list[str]:
    """The fixed parts of every text in a file, those of an f-string or a chain of literals joined."""
    trees = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    strings = [node for node in trees if isinstance(node, ast.JoinedStr | ast.Constant)]
    found = []
    for node in strings:
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        found.append("\0".join(str(part.value) for part in parts if isinstance(part, ast.Constant)))
    return found
