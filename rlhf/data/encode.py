"""From examples as text to rows of token ids, one shape of row for each step.

Knows no source and no batch. Prompt and answer are tokenised apart and then joined, so a prompt has the same tokens in every step, and
every whole answer ends with the end-of-turn token in every step.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import datasets
from datasets import Dataset, Features, List, Value

from rlhf.data.split import Phase
from rlhf.data.tokenizer import PreTrainedTokenizerBase, encode_answers, encode_prompts, end_of_turn_id

IDS = List(Value("int32"))
COLUMNS: dict[Phase, Features] = {
    "sft": Features({"ids": IDS, "prompt": Value("int32"), "length": Value("int32")}),
    "reward": Features({"chosen": IDS, "between": List(IDS), "rejected": IDS, "ranks": List(Value("int32")), "length": Value("int32")}),
    "ppo": Features({"ids": IDS, "text": Value("string"), "length": Value("int32")}),
}
"""Rows of each step. `prompt` counts the prompt's tokens among `ids`; `length` is the longest row of ids, for grouping by length. `ranks`
are those of chosen, between and rejected; a pair has none between and the ranks 0 and 1."""

PROMPT_TOO_LONG, ANSWER_TOO_LONG = "prompt too long", "answer too long"
IDENTICAL, NO_ANSWER, NO_REJECTED = "identical pair", "no answer", "no rejected answer"
EMPTY_PROMPT = "empty prompt"
SOURCE = "source"
"""A column that is kept as it is, where the examples have it."""

FEW_ROWS = 20_000
"""Up to here tokenising takes a second or two and needs no progress bar."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    prompt: int
    """Tokens of a prompt, BOS included."""
    answer: int
    """Tokens of an answer, end of turn included."""
    overlong: Literal["drop", "cut"]
    """cut: a prompt loses its beginning (BOS stays), an answer its end, and then has no end-of-turn token."""


Batch = dict[str, list[Any]]
Encoded = list[dict[str, Any] | str]
"""For each row, its columns or the reason why it is dropped."""


def encode(examples: Dataset, phase: Phase, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> tuple[Dataset, dict[str, int]]:
    """Tokenises the examples of one step.

    Args:
        examples: columns prompt, chosen, rejected; between and ranks, null for pairs; and `opening`: PPO's prompt is so many of the first
            tokens of `chosen` (0: `prompt`). `source`, if it is there, goes along.

    Returns:
        Rows with COLUMNS[phase], in order, and the report: `rows` kept, and how many were dropped for each reason.
    """
    if len(examples) == 0:  # Dataset.map would lose the columns
        return Dataset.from_dict({name: [] for name in COLUMNS[phase]}, features=COLUMNS[phase]), {"rows": 0}
    encoder: Callable[..., Encoded] = {"sft": _encode_texts, "reward": _encode_pairs, "ppo": _encode_prompts}[phase]
    datasets.disable_progress_bars()
    kept = {SOURCE: Value("string")} if SOURCE in examples.column_names else {}
    features = Features({**COLUMNS[phase], **kept, "problem": Value("string")})
    convert = functools.partial(_columns, encoder=encoder, names=list(features), tokenizer=tokenizer, limits=limits)
    if len(examples) > FEW_ROWS:
        datasets.enable_progress_bars()
    rows = examples.map(
        convert,
        batched=True,
        remove_columns=examples.column_names,
        features=features,
        load_from_cache_file=False,
        desc=f"tokenising {phase}",
    )
    datasets.disable_progress_bars()
    problems = rows["problem"]
    good = [i for i, problem in enumerate(problems) if problem is None]
    dropped = Counter(problem for problem in problems if problem is not None)
    return rows.select(good).remove_columns("problem"), {"rows": len(good), **dict(sorted(dropped.items()))}


def _columns(
    batch: Batch, *, encoder: Callable[..., Encoded], names: list[str], tokenizer: PreTrainedTokenizerBase, limits: Limits
) -> Batch:
    rows = [{"problem": row} if isinstance(row, str) else row for row in encoder(batch, tokenizer, limits)]
    return {name: batch[name] if name == SOURCE else [row.get(name) for row in rows] for name in names}


def _encode_texts(batch: Batch, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> Encoded:
    prompts = _limited_prompts(tokenizer, batch["prompt"], limits)
    answers = _limited_answers(tokenizer, batch["chosen"], limits)
    rows: Encoded = []
    for prompt, answer in zip(prompts, answers, strict=True):
        problem = _first_problem(prompt, answer)
        rows.append(problem or {"ids": prompt + answer, "prompt": len(prompt), "length": len(prompt) + len(answer)})  # type: ignore[operator, arg-type]
    return rows


def _encode_pairs(batch: Batch, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> Encoded:
    prompts = _limited_prompts(tokenizer, batch["prompt"], limits)
    better = _limited_answers(tokenizer, batch["chosen"], limits)
    worse = _limited_answers(tokenizer, batch["rejected"], limits, NO_REJECTED)
    others = iter(_limited_answers(tokenizer, [text for texts in batch["between"] for text in texts or ()], limits))
    rows: Encoded = []
    for prompt, chosen, between, rejected, given in zip(prompts, better, batch["between"], worse, batch["ranks"], strict=True):
        answers = [chosen, *itertools.islice(others, len(between or ())), rejected]
        ranks = given or [0, 1]
        problem = _first_problem(prompt, *answers) or (IDENTICAL if _ranked_twice(answers, ranks) else None)
        texts = [] if problem else [prompt + answer for answer in answers]  # type: ignore[operator]
        rows.append(problem or _ranked_row(texts, ranks))  # type: ignore[arg-type]
    return rows


def _ranked_row(texts: list[list[int]], ranks: list[int]) -> dict[str, Any]:
    return {"chosen": texts[0], "between": texts[1:-1], "rejected": texts[-1], "ranks": ranks, "length": max(map(len, texts))}


def _ranked_twice(answers: list[Any], ranks: list[int]) -> bool:
    """Whether the same tokens have two ranks, so that they would have to be better than themselves."""
    first: dict[tuple[int, ...], int] = {}
    return any(first.setdefault(tuple(answer), rank) != rank for answer, rank in zip(answers, ranks, strict=True))


def _encode_prompts(batch: Batch, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> Encoded:
    openings = encode_answers(tokenizer, [text if opening else "" for text, opening in zip(batch["chosen"], batch["opening"], strict=True)])
    starts = encode_prompts(tokenizer, [""])[0]
    rows: Encoded = []
    for ids, opening, text, prompt in zip(
        openings, batch["opening"], batch["prompt"], _limited_prompts(tokenizer, batch["prompt"], limits), strict=True
    ):
        if opening:
            cut = ids[: min(opening, limits.prompt - len(starts))]
            rows.append({"ids": starts + cut, "text": tokenizer.decode(cut), "length": len(starts) + len(cut)})
        elif isinstance(prompt, str) or not text:
            rows.append(prompt if isinstance(prompt, str) else EMPTY_PROMPT)
        else:
            rows.append({"ids": prompt, "text": text, "length": len(prompt)})
    return rows


def _first_problem(*parts: list[int] | str) -> str | None:
    return next((part for part in parts if isinstance(part, str)), None)


def _limited_prompts(tokenizer: PreTrainedTokenizerBase, texts: list[str], limits: Limits) -> list[list[int] | str]:
    """Prompt ids a row, or the reason to drop it."""
    rows: list[list[int] | str] = []
    for ids in encode_prompts(tokenizer, texts):
        if len(ids) <= limits.prompt:
            rows.append(ids)
        elif limits.overlong == "drop":
            rows.append(PROMPT_TOO_LONG)
        else:
            start = ids[:1] if ids[0] == tokenizer.bos_token_id else []
            rows.append(start + ids[len(ids) - limits.prompt + len(start) :])
    return rows


def _limited_answers(
    tokenizer: PreTrainedTokenizerBase, texts: list[str | None], limits: Limits, missing: str = NO_ANSWER
) -> list[list[int] | str]:
    """Answer ids a row with the end of turn, or the reason to drop it."""
    end = end_of_turn_id(tokenizer)
    rows: list[list[int] | str] = []
    for text, ids in zip(texts, encode_answers(tokenizer, [text or "" for text in texts]), strict=True):
        if text is None:
            rows.append(missing)
        elif len(ids) < limits.answer:
            rows.append([*ids, end])
        else:
            rows.append(ANSWER_TOO_LONG if limits.overlong == "drop" else ids[: limits.answer])
    return rows


def chunk_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """Plain texts for the pre-training loss: joined with the end of turn between them, cut into rows of `length` tokens.

    The remainder shorter than a row is dropped (DeepSpeed-Chat, `get_unsupervised_data`).
    """
    end = end_of_turn_id(tokenizer)
    stream = [token for ids in encode_answers(tokenizer, texts) for token in (*ids, end)]
    rows = [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]
    columns = {"ids": rows, "prompt": [0] * len(rows), "length": [length] * len(rows)}
    return Dataset.from_dict(columns, features=COLUMNS["sft"])
