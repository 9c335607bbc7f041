"""From the rows of a source to examples: one prompt, a better and perhaps worse answers, as text.

Knows no tokenizer, no phase and no limits. Files of the user are refused at their first bad row; rows of the hub, which no user can
mend, are dropped and counted.
"""

from __future__ import annotations

import functools
import hashlib
import json
import operator
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from string import Formatter
from typing import Any, Literal

import datasets
from datasets import Dataset, Features, List, Value

from rlhf.config import UserError, locate
from rlhf.data.chat import format_answer, format_prompt
from rlhf.data.files import checked, hash_files, read_rows
from rlhf.data.sources import Source
from rlhf.data.split import hold_out
from rlhf.settings import ChatFormat

Split = Literal["train", "eval"]

RANKING = {"between": List(Value("string")), "ranks": List(Value("int32"))}
"""Columns that are set for rows with a list of answers only: those between `chosen`, the best, and `rejected`, the worst; and the ranks of
all of them, best first: 0, 1, ..., where equal ranks are a tie."""
FEATURES = Features({"prompt": Value("string"), "chosen": Value("string"), "rejected": Value("string"), "label": Value("int8"), **RANKING})
"""Columns of an example. `prompt` is empty for a plain text, which stands in `chosen`; `label` is set for labelled texts only."""

NOT_WANTED = "does not match where"
CONTENT_BATCH = 1000


class RowProblem(Exception):
    """A row cannot become an example; the message is the reason under which it is counted."""


def examples(source: Source, split: Split, *, chat: ChatFormat, eval_fraction: float, seed: int) -> tuple[Dataset, dict[str, int]]:
    """The examples of one split, in the order of the source, and how many rows were dropped for which reason.

    A source without evaluation rows of its own holds `eval_fraction` of its rows out, drawn with `seed`; the dropped rows are then those of
    both splits.

    Returns:
        Dataset with the columns of FEATURES; prompts and answers are written in the chat format unless the source is `formatted`.

    Raises:
        UserError: the source cannot be read, lacks a column, or (local files) has an empty or malformed row.
    """
    own_eval = source.eval is not None or bool(source.eval_path) or source.generate is not None
    rows, dropped = _convert_all(source, "eval" if own_eval and split == "eval" else "train", chat)
    if source.share is not None:
        low, high = source.share
        rows = rows.select([i for i, row in enumerate(rows) if low <= _place(row) < high])
    if not own_eval:
        kept, held = hold_out(len(rows), eval_fraction, seed, source.name, content_hash(rows))
        rows = rows.select(held if split == "eval" else kept)
    return rows, dropped


def identity(source: Source) -> str:
    """A hash of where the rows come from and what they are: equal exactly when `examples` would give the same rows."""
    fields = {key: dict(value) if isinstance(value, Mapping) else value for key, value in vars(source).items()}
    if source.files:
        fields |= {"path": hash_files(source.files), "eval_path": hash_files(source.eval_files)}
    elif source.generate is not None:
        fields |= {split: _sha256(json.dumps([row for _, row in _generated(source, split)])) for split in ("train", "eval")}
    else:
        fields |= {"fingerprints": [_load_hub(source, split)._fingerprint for split in (source.train, source.eval) if split]}
    return _sha256(json.dumps(fields, sort_keys=True, default=list))


def content_hash(rows: Dataset) -> str:
    """sha256 over the texts of all rows, the same on every machine."""
    digest = hashlib.sha256()
    ranked = len(rows) > 0 and rows[0]["ranks"] is not None
    for batch in rows.iter(CONTENT_BATCH):
        digest.update(_content(batch, ranked).encode())
    return digest.hexdigest()


def _place(row: Mapping[str, Any]) -> float:
    """A row's place in [0, 1), from its texts alone."""
    return int(_sha256(_content(row, row["ranks"] is not None))[:13], 16) / 16**13


def _content(columns: Mapping[str, Any], ranked: bool) -> str:
    """What decides the draws of a row or of several. Without the columns of a ranking where they are empty: so the draws of all other
    sources stay as they were before there were rankings."""
    return json.dumps([columns[name] for name in FEATURES if ranked or name not in RANKING])


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _convert_all(source: Source, split: Split, chat: ChatFormat) -> tuple[Dataset, dict[str, int]]:
    if source.files:
        return _from_places(source, read_rows((source.eval_files or source.files) if split == "eval" else source.files), chat)
    if source.generate is not None:
        made = _generated(source, split)
        if not made:
            raise UserError(f"source {source.name!r}: generate={source.generate} returned no row for the split {split!r}")
        return _from_places(source, made, chat)
    hub = _load_hub(source, source.eval or source.train if split == "eval" else source.train)
    missing = source.columns - set(hub.column_names)
    if missing:
        raise UserError(f"source {source.name!r}: column {min(missing)!r} is missing (columns: {', '.join(hub.column_names)})")
    convert = functools.partial(_convert_or_reason, source=source, chat=chat)
    features = Features({**FEATURES, "problem": Value("string")})
    rows = hub.map(convert, remove_columns=hub.column_names, features=features, desc=f"reading {source.name}")
    problems = rows["problem"]
    good = [i for i, problem in enumerate(problems) if problem is None]
    counts = Counter(p for p in problems if p is not None)
    return rows.select(good).remove_columns("problem"), _without_unwanted(counts)


def _generated(source: Source, split: str) -> list[tuple[str, dict[str, Any]]]:
    """(place, row) of the rows that a source makes up for a split.

    Raises:
        UserError: its function cannot be called, or does not return rows that JSON can hold.
    """
    what = f"source {source.name!r}: generate={source.generate}"
    try:
        rows = locate(source.generate or "")(split)
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    except Exception as error:
        raise UserError(f"{what} raised {type(error).__name__}: {error}, for the split {split!r}") from error
    if not isinstance(rows, list | tuple):
        raise UserError(f"{what} returned a {type(rows).__name__} for the split {split!r}: it must return a list of rows")
    return [checked(f"{source.name}: row {i}", row) for i, row in enumerate(rows, start=1)]


def _from_places(source: Source, places: Iterable[tuple[str, Mapping[str, Any]]], chat: ChatFormat) -> tuple[Dataset, dict[str, int]]:
    """Rows that the user can mend: the first that is no example is refused."""
    columns: dict[str, list[Any]] = {name: [] for name in FEATURES}
    for place, row in places:
        missing = source.columns - set(row)
        if missing:
            raise UserError(f"{place}: column {min(missing)!r} is missing (the row has: {', '.join(map(str, row))})")
        try:
            example = convert(row, source=source, chat=chat)
        except RowProblem as problem:
            if str(problem) == NOT_WANTED:
                continue
            raise UserError(f"{place}: {problem}; mend or delete the row") from None
        for name, values in columns.items():
            values.append(example[name])
    if not columns["prompt"]:
        raise UserError(f"source {source.name!r}: no row is left, as none has {dict(source.where)} (field where)")
    return Dataset.from_dict(columns, features=FEATURES), {}


def _without_unwanted(counts: Counter[str]) -> dict[str, int]:
    counts.pop(NOT_WANTED, None)
    return dict(counts)


def _load_hub(source: Source, split: str) -> Dataset:
    assert isinstance(source.path, str), f"{source.name}: a hub id is one name"
    folder = Path(source.path)
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(source.path)
            return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        return datasets.load_dataset(source.path, source.config, split=split, revision=source.revision)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise UserError(
            f"source {source.name!r}: {source.path!r} (split {split!r}) cannot be read: {type(error).__name__}: {reason}; "
            "without a network, write the source out with a local file as path"
        ) from error


def _convert_or_reason(row: Mapping[str, Any], source: Source, chat: ChatFormat) -> dict[str, Any]:
    try:
        return {**convert(row, source=source, chat=chat), "problem": None}
    except RowProblem as problem:
        return {**dict.fromkeys(FEATURES), "problem": str(problem)}


def convert(row: Mapping[str, Any], *, source: Source, chat: ChatFormat) -> dict[str, Any]:
    """One row of a source as an example.

    Raises:
        RowProblem: the row has no prompt or no answer, or is not wanted.
    """
    if any(row[column] != value and str(row[column]) != str(value) for column, value in source.where.items()):
        raise RowProblem(NOT_WANTED)
    if source.text is not None:
        text = _required(source.text, row, "text")
        return {**dict.fromkeys(FEATURES), "prompt": "", "chosen": text, "label": _label(row, source)}
    answers, ranks = _pair(row, source) if source.answers is None else _ranking(row, source)
    prompt = _prompt(row, source, answers[0], answers[-1])
    for word, other in source.replace.items():
        prompt = prompt.replace(word, other)
    answers = [_clean(answer, source) for answer in answers]
    for i, answer in enumerate(answers):
        if answer is not None and not answer.strip():
            raise RowProblem(f"answer {i + 1} is empty" if ranks else f"the {('chosen', 'rejected')[i]} answer is empty")
    if not source.formatted:
        prompt = format_prompt(chat, prompt)
        answers = [None if answer is None else format_answer(chat, answer) for answer in answers]
    example = {**dict.fromkeys(FEATURES), "prompt": prompt, "chosen": answers[0], "rejected": answers[-1]}
    return example | ({"between": answers[1:-1], "ranks": ranks} if ranks else {})


def _ranking(row: Mapping[str, Any], source: Source) -> tuple[list[str | None], list[int]]:
    """All answers of a row, best first, and their ranks from 0 on without gaps."""
    answers = row[source.answers or ""]
    if not isinstance(answers, list):
        raise RowProblem(f"{source.answers} must be a list of texts, best first, got {type(answers).__name__}")
    wrong = [i for i, answer in enumerate(answers) if not isinstance(answer, str)]
    if wrong:
        raise RowProblem(f"answer {wrong[0] + 1} of {source.answers} must be a text, got {type(answers[wrong[0]]).__name__}")
    if len(answers) < 2:
        raise RowProblem(f"{source.answers} must hold two answers or more to rank, got {len(answers)}")
    ranks = row.get(source.ranks) if source.ranks else None
    if ranks is None:
        if source.ranks and "ranks" not in source.optional:
            raise RowProblem(f"no value for {source.ranks}")
        return answers, list(range(len(answers)))
    if not isinstance(ranks, list) or len(ranks) != len(answers) or any(type(rank) is not int for rank in ranks):
        raise RowProblem(f"{source.ranks} must be a list with a whole number for each of the {len(answers)} answers, got {ranks!r}")
    if ranks != sorted(ranks):
        raise RowProblem(f"{source.ranks} must not fall, as {source.answers} go from the best to the worst, got {ranks}")
    if ranks[0] == ranks[-1]:
        raise RowProblem(f"{source.ranks} says that all answers are tied, which leaves nothing to compare, got {ranks}")
    places = sorted(set(ranks))
    return answers, [places.index(rank) for rank in ranks]


def _pair(row: Mapping[str, Any], source: Source) -> tuple[list[str | None], None]:
    """Chosen and rejected, in the order of preference, still as the row has them; a pair needs no ranks."""
    better, worse = source.chosen, source.rejected
    if source.prefer is not None and not _prefers(row, source.prefer):
        better, worse = worse, better
    if better is None:
        return [None, None], None
    chosen = _optional(better, row) if "chosen" in source.optional else _required(better, row, "chosen")
    return [chosen, None if worse is None else _optional(worse, row)], None


def _prompt(row: Mapping[str, Any], source: Source, chosen: str | None, rejected: str | None) -> str:
    if source.prompt is not None:
        return _required(source.prompt, row, "prompt")
    assert source.transcript is not None, f"{source.name}: without a prompt there must be a transcript"
    before, marker, _ = (chosen or "").rpartition(source.transcript)
    if not marker:
        raise RowProblem(f"the chosen transcript has no {source.transcript!r}")
    if rejected is not None and rejected.rpartition(source.transcript)[0] != before:
        raise RowProblem("the two transcripts answer different prompts")
    return before + marker


def _clean(answer: str | None, source: Source) -> str | None:
    if answer is None:
        return None
    if source.transcript is not None:
        answer = answer.rpartition(source.transcript)[2]
    for pattern in source.strip:
        answer = re.sub(pattern, "", answer)
    return answer


def _label(row: Mapping[str, Any], source: Source) -> int | None:
    if source.label is None:
        return None
    try:
        label = float(row[source.label])
    except (TypeError, ValueError):
        label = -1.0
    if label not in (0, 1):
        raise RowProblem(f"{source.label} must be 0 or 1, got {row[source.label]!r}")
    return int(label)


_COMPARE = {">=": operator.ge, ">": operator.gt, "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le}


def _prefers(row: Mapping[str, Any], rule: tuple[Any, ...]) -> bool:
    left, comparison, right = rule
    operands = [row[left], row[right] if isinstance(right, str) else right]
    try:
        return _COMPARE[comparison](*(float(value) for value in operands))
    except (TypeError, ValueError):
        raise RowProblem(f"{left} and {right} must be numbers, got {operands[0]!r} and {operands[1]!r}") from None


_parse = functools.cache(lambda template: [(literal, column) for literal, column, _, _ in Formatter().parse(template)])


def _value(column: str, row: Mapping[str, Any]) -> str:
    """One `{...}` of a template. A null, a lacking entry or an empty list is refused, where `str.format` would write `None` or fail."""
    try:
        value = row[column] if column in row else Formatter().get_field(column, (), row)[0]
    except (KeyError, IndexError, TypeError, AttributeError):
        value = None
    if value is None:
        raise RowProblem(f"no value for {{{column}}}")
    return str(value)


def _fill(template: str, row: Mapping[str, Any]) -> tuple[str, bool]:
    """The filled template, and whether any of its columns has more than blanks."""
    pieces = [(literal, None if column is None else _value(column, row)) for literal, column in _parse(template)]
    return "".join(literal + (value or "") for literal, value in pieces), any(value and not value.isspace() for _, value in pieces)


def _required(template: str, row: Mapping[str, Any], name: str) -> str:
    filled, has_text = _fill(template, row)
    if not has_text:
        raise RowProblem(f"the {name} is empty")
    return filled


def _optional(template: str, row: Mapping[str, Any]) -> str | None:
    """None where the row has no such answer; an answer that is there but blank is for the caller to refuse."""
    try:
        return _fill(template, row)[0]
    except RowProblem:
        return None
