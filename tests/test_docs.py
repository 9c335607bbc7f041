"""README, docs/ and the pages of experiments/ say what is so: commands compose, scripts and their options exist, links resolve, the page of
options is up to date.

Knows Markdown and Hydra; runs no command.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from omegaconf import OmegaConf
from page_makers import maker

from rlhf.cli.compose import primary_config, with_own_group
from rlhf.cli.sweep.words import Composer, read_line
from rlhf.cli.verbs import VERBS
from rlhf.config import build
from rlhf.rules import check

ROOT = Path(__file__).parents[1]
INDEX = ROOT / "experiments" / "README.md"
FOLDERS = sorted((ROOT / "experiments").glob("*/README.md"))
EXPERIMENTS = [INDEX, *FOLDERS]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *EXPERIMENTS]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
NUMBERS = {"N": "2", "SEED": "0"}
"""Placeholders that stand for a number. Those of a path (RUN, DIR, HOSTS) compose as they are."""


def command_lines(page: Path) -> list[str]:
    """Lines of all blocks of code, fenced or indented by four spaces, continuations joined; of experiments/ commands within the text as well."""
    text = page.read_text(encoding="utf-8")
    fence = re.compile(r"^```[a-z]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^ {4}(.*)$", fence.sub("", text), re.MULTILINE)
    joined = "\n".join([*fence.findall(text), *indented]).replace("\\\n", " ")
    if page in EXPERIMENTS:  # with a prompt: those of docs/ are run by test_own_pipeline.py, and composed by cli/test_sweep.py
        within = re.findall(r"`((?:rlhf [^`]*=|python experiments/)[^`]*)`", fence.sub("", text))
        joined = "\n".join([re.sub(r"^\$ ", "", joined, flags=re.MULTILINE), *(command.replace("\n", " ") for command in within)])
    return [line.strip() for line in joined.splitlines() if line.strip()]


def words_of(line: str) -> list[str]:
    """Words of a command, comments gone, with a number for each placeholder of one."""
    pairs = (word.partition("=") for word in shlex.split(line, comments=True))
    return [key + equals + NUMBERS.get(value, value) for key, equals, value in pairs]


def rlhf_commands(page: Path) -> list[list[str]]:
    """Words behind `rlhf` of every line that calls it, by name or as a module under torchrun."""
    lines = (line for line in command_lines(page) if re.match(r"(rlhf|torchrun .*-m rlhf|python -m rlhf) ", line))
    return [words[words.index("rlhf") + 1 :] for words in map(words_of, lines)]


def script_commands(page: Path) -> list[list[str]]:
    """Words of every line that calls a script of experiments/, from its path on."""
    lines = (line for line in command_lines(page) if re.match(r"((python3?|bash) )?experiments/", line))
    return [words[0 if words[0].startswith("experiments/") else 1 :] for words in map(words_of, lines)]


def first_pages(commands: Callable[[Path], list[list[str]]]) -> list[tuple[str, list[str]]]:
    """Each distinct command of all pages, with the first page that has it."""
    found: dict[tuple[str, ...], str] = {}
    for page, name in zip(PAGES, NAMES, strict=True):
        for words in commands(page):
            found.setdefault(tuple(words), name)
    return [(name, list(words)) for words, name in found.items()]


def as_ids(commands: list[tuple[str, list[str]]]) -> list[str]:
    return [f"{page}: {' '.join(words)[:60]}" for page, words in commands]


COMMANDS = first_pages(rlhf_commands)
SCRIPTS = first_pages(script_commands)


def compose_all(verb: str, words: list[str]) -> list[Any]:
    """One resolved config for each value of a sweep."""
    first, others = [], []
    for override in OverridesParser.create().parse_overrides(words):
        if isinstance(value := override.value(), IntervalSweep):  # the range of a search
            first.append(f"{override.get_key_element()}={value.start}")
        elif override.is_sweep_override():
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


def without_sweep(verb: str, words: list[str]) -> list[str]:
    """Words of the cells of a sweep; those of its own section pass its rules here."""
    if "-m" in words and any(re.match(r"sweep[.=]", word) for word in words):
        line = read_line(verb, words)
        build(Composer(line).settings(line.sweep), "sweep")
        GlobalHydra.instance().clear()
        words = [word for word in words if not re.match(r"sweep[.=]", word)]
    return [word for word in words if word != "-m"]


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 20
    assert {words[0] for _, words in COMMANDS} >= {"pipeline", "sft", "reward", "ppo", "evaluate"}
    assert len(SCRIPTS) > 20
    assert {Path(words[0]).suffix for _, words in SCRIPTS} == {".py", ".sh"}


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=as_ids(COMMANDS))
def test_a_command_composes_and_passes_the_rules(page: str, words: list[str]) -> None:
    if words == ["--help"]:
        return
    assert words[0] in VERBS
    verb, rest = words[0], without_sweep(words[0], [word for word in words[1:] if word != "--help"])
    if "--cfg" in rest:
        del rest[rest.index("--cfg") : rest.index("--cfg") + 2]
    rest = with_own_group(verb, rest)
    for config in compose_all(primary_config(verb, rest), rest):
        check(build(config))


@pytest.mark.parametrize(("page", "words"), SCRIPTS, ids=as_ids(SCRIPTS))
def test_a_script_knows_the_options_it_is_called_with(page: str, words: list[str]) -> None:
    script = ROOT / words[0]
    assert script.is_file()
    known, needed = options(script)
    named = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert named <= known and needed <= named
    files = [word for word in words if re.match(r"(conf|docs|experiments|sweeps)/", word)]
    assert [file for file in files if not (ROOT / file).exists()] == []


@cache
def options(script: Path) -> tuple[set[str], set[str]]:
    """Options that a script knows and those it cannot do without, by its source: argparse's, and texts that it compares its words with."""
    known, needed = {"--help"}, set[str]()
    tree = ast.walk(ast.parse(script.read_text(encoding="utf-8"))) if script.suffix == ".py" else ()
    for node in tree:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            names = {str(name.value) for name in node.args if isinstance(name, ast.Constant)}
            required = any(keyword.arg == "required" and ast.literal_eval(keyword.value) for keyword in node.keywords)
            known |= names
            needed |= names if required else set()
        elif isinstance(node, ast.Compare) and isinstance(node.left, ast.Constant):
            known.add(str(node.left.value))
    return known, needed


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
    named = set(re.findall(r"`make ([a-z]+)`", text)) | {line.split()[1] for line in command_lines(page) if line.startswith("make ")}
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_a_path_in_the_text_exists(page: Path) -> None:
    paths = re.findall(r"`((?:rlhf|conf|docs|tests|experiments|sweeps)/[\w./-]+)`", page.read_text(encoding="utf-8"))
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", FOLDERS, ids=[page.parent.name for page in FOLDERS])
def test_a_file_that_an_experiment_names_lies_in_its_folder(page: Path) -> None:
    files = re.findall(r"`([\w-]+\.(?:csv|md|png|py|sh|yaml))`", page.read_text(encoding="utf-8"))
    assert [file for file in files if not (page.parent / file).exists()] == []


def test_the_index_of_experiments_has_all_of_them() -> None:
    linked = re.findall(r"^\| \[[\w-]+\]\(([\w-]+)/README\.md\)", INDEX.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(linked) == [page.parent.name for page in FOLDERS]


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
