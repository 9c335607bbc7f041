"""The fixed prompts of an evaluation: read from a file, checked, and written as the batches that the comparison takes.

Knows files and the chat format; knows no model. A file is YAML with a list `prompts`, or rows (.jsonl, .json, .csv, .parquet) with a column
`prompt`. An entry may have a good and a bad answer, columns `good` and `bad`, which the reward model should tell apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import rlhf.data
from rlhf.config import UserError, nearest
from rlhf.data.chat import format_answer, format_prompt
from rlhf.data.encode import Limits
from rlhf.data.files import read_rows
from rlhf.data.tokenizer import PreTrainedTokenizerBase, encode_answers, encode_prompts, end_of_turn_id
from rlhf.settings import ChatFormat

KEY = "evaluation.fixed_prompts"
FIELDS = ("prompt", "good", "bad")
YAML = (".yaml", ".yml")
BUILT_IN = Path(rlhf.data.__file__).parent / "prompts"
"""A file for each language."""


@dataclass(frozen=True, kw_only=True)
class FixedPrompt:
    place: str
    """File and line."""
    prompt: str
    good: str | None
    bad: str | None


def read_prompts(name: str) -> list[FixedPrompt]:
    """The prompts of a built-in language or of a file.

    Raises:
        UserError: there is no such language or file, or an entry is malformed; the message names file and line.
    """
    languages = {file.stem: file for file in sorted(BUILT_IN.glob("*.yaml"))}
    path = languages.get(name, Path(name))
    if name not in languages and not path.suffix:
        raise UserError(f"{KEY}={name}: there are {', '.join(languages)}{nearest(name, languages)}, or name a file of your own")
    try:
        entries = list(_yaml_entries(path) if path.suffix in YAML else read_rows([str(path)]))
    except UserError as error:
        raise UserError(f"{KEY}: {error}") from error
    return [_checked(place, entry) for place, entry in entries]


def _yaml_entries(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, entry) of the list `prompts`."""
    if not path.is_file():
        raise UserError(f"{path}: the file does not exist (a relative path starts at {Path.cwd()})")
    try:
        text = path.read_text(encoding="utf-8")
        root, values = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: save the file as UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f":{mark.line + 1}"
        raise UserError(f"{path}{line}: not YAML ({getattr(error, 'problem', None) or error})") from error
    if not isinstance(values, dict) or list(values) != ["prompts"] or not isinstance(values["prompts"], list):
        raise UserError(f"{path}:1: expected `prompts:` with a list of prompts below it, and nothing else")
    if not values["prompts"]:
        raise UserError(f"{path}:1: the list of prompts is empty")
    assert isinstance(root, yaml.MappingNode)  # as the values are a mapping with one key
    ((_, items),) = root.value
    for node, value in zip(items.value, values["prompts"], strict=True):
        yield f"{path}:{node.start_mark.line + 1}", value


def _checked(place: str, entry: Any) -> FixedPrompt:
    row = entry if isinstance(entry, Mapping) else {"prompt": entry}
    unknown = [str(field) for field in row if field not in FIELDS]
    if unknown:
        raise UserError(f"{KEY}: {place}: a prompt has no field {unknown[0]!r}{nearest(unknown[0], FIELDS)}; there are {', '.join(FIELDS)}")
    texts = {field: row.get(field) or None for field in FIELDS}
    for field, text in texts.items():
        if text is not None and (not isinstance(text, str) or not text.strip()):
            raise UserError(f"{KEY}: {place}: {field} must be a text, got {text!r}")
    if texts["prompt"] is None:
        raise UserError(f"{KEY}: {place}: the prompt is missing or empty")
    if (texts["good"] is None) != (texts["bad"] is None):
        raise UserError(f"{KEY}: {place}: good and bad go together: give both or neither")
    return FixedPrompt(place=place, prompt=texts["prompt"], good=texts["good"], bad=texts["bad"])


def prompt_rows(prompts: list[FixedPrompt], tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, limits: Limits) -> list[dict[str, Any]]:
    """Rows as `CollatePrompts` takes them.

    Raises:
        UserError: a prompt is longer than data.max_prompt_tokens.
    """
    texts = [format_prompt(chat, entry.prompt) for entry in prompts]
    rows: list[dict[str, Any]] = [
        {"ids": ids, "text": text, "index": i} for i, (ids, text) in enumerate(zip(encode_prompts(tokenizer, texts), texts, strict=True))
    ]
    for entry, row in zip(prompts, rows, strict=True):
        _require_room(entry, "the prompt", len(row["ids"]), limits.prompt, "data.max_prompt_tokens")
    return rows


def pair_rows(prompts: list[FixedPrompt], tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, limits: Limits) -> list[dict[str, Any]]:
    """Rows as `CollateSourced` takes them, of the prompts that have a good and a bad answer.

    Raises:
        UserError: an answer is longer than data.max_answer_tokens, or both are the same tokens.
    """
    pairs = [entry for entry in prompts if entry.good is not None]
    starts = [row["ids"] for row in prompt_rows(pairs, tokenizer, chat, limits)]
    sides = []
    for side in ("good", "bad"):
        ids = encode_answers(tokenizer, [format_answer(chat, getattr(entry, side)) for entry in pairs])
        sides.append([[*answer, end_of_turn_id(tokenizer)] for answer in ids])
        for entry, answer in zip(pairs, sides[-1], strict=True):
            _require_room(entry, f"the {side} answer", len(answer), limits.answer, "data.max_answer_tokens")
    for entry, good, bad in zip(pairs, *sides, strict=True):
        if good == bad:
            raise UserError(f"{KEY}: {entry.place}: good and bad are the same tokens to this tokenizer: there is nothing to tell apart")
    return [
        {"chosen": start + good, "between": [], "rejected": start + bad, "ranks": [0, 1], "source": entry.place}
        for entry, start, good, bad in zip(pairs, starts, *sides, strict=True)
    ]


def _require_room(entry: FixedPrompt, what: str, tokens: int, limit: int, key: str) -> None:
    if tokens > limit:
        raise UserError(f"{KEY}: {entry.place}: {what} has {tokens} tokens, more than {key}={limit}: raise it or shorten the text")
