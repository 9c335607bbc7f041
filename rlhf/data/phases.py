"""The rows of one step of the recipe: read, divided, blended, tokenised, and kept in the cache.

Knows no batches and no ranks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from datasets import Dataset, Features, Value

from rlhf.config import UserError
from rlhf.data.cache import cache_folder, cached
from rlhf.data.encode import SOURCE, Limits, chunk_texts, encode
from rlhf.data.examples import FEATURES, RANKING, Split, content_hash, examples, identity
from rlhf.data.sources import Source, check_path, resolve
from rlhf.data.split import PHASES, Phase, blend, divide, generator
from rlhf.data.tokenizer import PreTrainedTokenizerBase
from rlhf.settings import DataConfig

CODE_VERSION = 3
"""Part of every cache key: raise it whenever the same inputs should give other rows."""

ALL_TO_SFT = [1.0, 0.0, 0.0]
EXAMPLES = Features(
    {"prompt": Value("string"), "chosen": Value("string"), "rejected": Value("string"), **RANKING, "opening": Value("int32")}
)
SEEN = "prompt seen in training"
NO_TEXT = "data.ptx is empty, but a pre-training loss is asked for: name a source of plain text"


def phase_rows(data: DataConfig, tokenizer: PreTrainedTokenizerBase, phase: Phase, split: Split) -> tuple[Dataset, dict[str, int]]:
    """Tokenised rows of one step, from the cache where they are there, and the report of `encode`. Rows of the reward step know the name of
    their source.

    Held-out rows of the ppo step are prompts that no step trains on, not even as a copy in another row.

    Raises:
        UserError: a source cannot be read, or no row is left to train on.
    """
    sources = _sources(data)
    key = _key(data, tokenizer, phase, split, [identity(source) for source, _ in sources])

    def build() -> tuple[Dataset, dict[str, int]]:
        texts, dropped = _phase_examples(data, sources, phase, split)
        limits = Limits(prompt=data.max_prompt_tokens, answer=data.max_answer_tokens, overlong=data.overlong)
        rows, report = encode(texts, phase, tokenizer, limits)
        if phase == "ppo":
            rows = rows.add_column("index", list(range(len(rows))), feature=Value("int64"))
        return rows, {**report, **{reason: report.get(reason, 0) + count for reason, count in dropped.items()}}

    rows, report = cached(cache_folder(data.cache_dir), key, build)
    if split == "train" and len(rows) == 0:
        lost = ", ".join(f"{count} {reason}" for reason, count in report.items() if reason != "rows") or f"data.split={data.split}"
        raise UserError(f"data.sources: no row is left for the {phase} step ({lost}): change data.split, the limits or the sources")
    return rows, report


def ptx_rows(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, dict[str, int]]:
    """Rows of max_prompt_tokens + max_answer_tokens tokens of plain text for the pre-training loss.

    Raises:
        UserError: `data.ptx` is empty or a source has less text than one row.
    """
    if not data.ptx:
        raise UserError(NO_TEXT)
    _check_path(data)
    sources = [resolve(item, data.path, key="data.ptx") for item in data.ptx]
    key = _key(data, tokenizer, "ptx", "train", [identity(source) for source in sources])

    def build() -> tuple[Dataset, dict[str, int]]:
        parts = []
        for source in sources:
            rows, _, content = _read(data, source, "train")
            parts.append(rows.select(generator("ptx", data.split_seed, source.name, content).permutation(len(rows))[: data.max_rows]))
        texts = [(row["prompt"] or "") + row["chosen"] for part in parts for row in part if row["chosen"] is not None]
        chunks = chunk_texts(texts, tokenizer, data.max_prompt_tokens + data.max_answer_tokens)
        return chunks, {"rows": len(chunks)}

    rows, report = cached(cache_folder(data.cache_dir), key, build)
    if len(rows) == 0:
        raise UserError(f"data.ptx: {len(data.ptx)} sources give less than one row of text: add text or lower data.max_answer_tokens")
    return rows, report


def require_rows(data: DataConfig, phase: Phase, *, at_least: int, key: str) -> None:
    """Reads the texts of a step, and tokenises none.

    Args:
        at_least: rows of the step's batch.
        key: what the user named them by.

    Raises:
        UserError: a source cannot be read, or the step has fewer rows, even if none is too long.
    """
    rows, _ = _phase_examples(data, _sources(data), phase, "train")
    usable = sum(text is not None for text in rows["rejected"]) if phase == "reward" else len(rows)
    if usable < at_least:
        kind = "pairs (rows with a rejected answer)" if phase == "reward" else "rows"
        raise UserError(f"{key}={at_least} is more than the {usable} {kind} of the {phase} step: lower it, add data, or change data.split")


def require_text(data: DataConfig) -> None:
    """
    Raises:
        UserError: `data.ptx` is empty, or names a source that cannot be read.
    """
    if not data.ptx:
        raise UserError(NO_TEXT)
    for item in data.ptx:
        _read(data, resolve(item, data.path, key="data.ptx"), "train")


def sft_corpus(data: DataConfig) -> Iterator[str]:
    """The text that SFT trains on, for training a tokenizer."""
    rows, _ = _phase_examples(data, _sources(data), "sft", "train")
    for row in rows:
        yield row["prompt"] + (row["chosen"] or "")


def _sources(data: DataConfig) -> list[tuple[Source, list[float]]]:
    """Every source of the blend with its shares for the three steps."""
    _check_path(data)
    mixed = [(resolve(item, data.path), data.split) for item in data.sources]
    single = [(resolve(item, data.path, key="data.sft_only"), ALL_TO_SFT) for item in data.sft_only]
    names = Counter(source.name for source, _ in mixed + single)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise UserError(f"data.sources: {twice[0]!r} is named twice; give each source a name of its own")
    return mixed + single


def _check_path(data: DataConfig) -> None:
    """All lists at once: the steps of a pipeline share their settings, and its SFT reads no `data.ptx`."""
    check_path(data.path, {"data.sources": data.sources, "data.sft_only": data.sft_only, "data.ptx": data.ptx})


def _read(data: DataConfig, source: Source, split: Split) -> tuple[Dataset, dict[str, int], str]:
    rows, dropped = examples(source, split, chat=data.chat, eval_fraction=data.eval_fraction, seed=data.split_seed)
    return rows, dropped, content_hash(rows)


def _phase_examples(
    data: DataConfig, sources: list[tuple[Source, list[float]]], phase: Phase, split: Split
) -> tuple[Dataset, dict[str, int]]:
    """Examples of one step over all sources, and the rows dropped so far by reason."""
    parts: list[Dataset] = []
    dropped: Counter[str] = Counter()
    trained: set[str] = set()
    for source, shares in sources:
        rows, reasons, content = _read(data, source, split)
        dropped.update(reasons)
        part = divide(len(rows), shares, data.split_seed, source.name, content, max_rows=data.max_rows)[phase]
        swap = data.shuffle_preferences and phase == "reward" and split == "train"
        rows = _for_phase(rows.select(part), source, phase, (data.split_seed, source.name) if swap else None)
        parts.append(rows.add_column(SOURCE, [source.name] * len(rows), feature=Value("string")) if phase == "reward" else rows)
        if phase == "ppo" and split == "eval":
            trained |= _trained_prompts(data, source, shares)
    texts = blend(parts, data.split_seed)
    if trained:
        fresh = [i for i, row in enumerate(texts) if (row["prompt"] or row["chosen"]) not in trained]
        dropped[SEEN] += len(texts) - len(fresh)
        texts = texts.select(fresh)
    return texts, {reason: count for reason, count in dropped.items() if count}


def _trained_prompts(data: DataConfig, source: Source, shares: list[float]) -> set[str]:
    """What any step may train on: its prompts, or whole texts where there are none."""
    rows, _, content = _read(data, source, "train")
    parts = divide(len(rows), shares, data.split_seed, source.name, content, max_rows=data.max_rows)
    return {row["prompt"] or row["chosen"] for phase in PHASES for row in rows.select(parts[phase])}


def _for_phase(rows: Dataset, source: Source, phase: Phase, swap: tuple[int, str] | None) -> Dataset:
    """Examples as one step wants them, with the columns of EXAMPLES.

    A labelled text is an answer to the empty prompt in SFT, one side of a pair for the reward model, and the opening of an answer in PPO.
    """
    columns: dict[str, list[Any]] = {name: rows[name][:] for name in FEATURES}
    opening = 0
    if source.text is not None and phase == "ppo":
        if source.prompt_tokens is None and len(rows):
            raise UserError(f"source {source.name!r}: prompt_tokens is missing; PPO begins its answers with so many tokens of a text")
        opening = source.prompt_tokens or 0
    if source.label is not None and phase == "reward":
        labelled = list(zip(columns["chosen"], columns["label"], strict=True))
        good, bad = ([text for text, label in labelled if label == wanted] for wanted in (1, 0))
        pairs = list(zip(good, bad, strict=False))  # each text once; the surplus of one label is left
        columns = {"prompt": [""] * len(pairs), "chosen": [better for better, _ in pairs], "rejected": [worse for _, worse in pairs]}
        columns |= {name: [None] * len(pairs) for name in RANKING}
    if swap is not None:
        coins = generator("swap", *swap).integers(0, 2, len(columns["chosen"]))
        for i in coins.nonzero()[0]:
            if columns["rejected"][i] is not None:
                columns["chosen"][i], columns["rejected"][i] = columns["rejected"][i], columns["chosen"][i]
            if columns["ranks"][i] is not None:
                columns["between"][i].reverse()
                columns["ranks"][i] = [columns["ranks"][i][-1] - rank for rank in reversed(columns["ranks"][i])]
    columns["opening"] = [opening] * len(columns["prompt"])
    return Dataset.from_dict({name: columns[name] for name in EXAMPLES}, features=EXAMPLES)


def _key(data: DataConfig, tokenizer: PreTrainedTokenizerBase, phase: str, split: Split, identities: list[str]) -> str:
    ignored = ("sources", "sft_only", "ptx", "path", "cache_dir", "workers", "length_bucket")  # by content, or without effect on rows
    settings = {name: value for name, value in dataclasses.asdict(data).items() if name not in ignored}
    shares = len(data.sources), len(data.sft_only)  # which of the identities are for SFT only
    parts = [CODE_VERSION, phase, split, identities, shares, settings, _tokenizer_hash(tokenizer)]
    return f"{phase}-{split}-{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]}"


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Everything that decides token ids; not the padding state, which a call of the tokenizer changes."""
    if tokenizer.is_fast:
        state = {
            key: value for key, value in json.loads(tokenizer.backend_tokenizer.to_str()).items() if key not in ("padding", "truncation")
        }
    else:
        state = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer("a")["input_ids"]]
    return hashlib.sha256(json.dumps([state, ids], sort_keys=True).encode()).hexdigest()
