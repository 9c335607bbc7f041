"""Data sets as rows of a table: where the rows are, and which of their columns are prompt, better and worse answer.

Knows no tokenizer and no model, and reads no data: `rlhf.data.examples` does.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from types import SimpleNamespace
from typing import Any, Literal

from rlhf.config import UserError, fits, nearest

Operator = Literal[">=", ">", "==", "!=", "<", "<="]
FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
PARQUET_COPY = "refs/convert/parquet"
"""Revision under which the hub keeps a Parquet copy of data sets that were published as a loading script (which `datasets` 4 and later
refuses to run)."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data set. Templates are texts with columns of the row in braces, in the syntax of `str.format`, such as
    `{question[full_text]}` or `{answers[zh_cn][0][text]}`."""

    name: str
    path: str | tuple[str, ...] | None = None
    """Hub id, folder saved by `datasets`, or local file(s): .jsonl, .json, .csv, .parquet. None: `data.path` or `generate` gives the rows."""
    eval_path: str | tuple[str, ...] | None = None
    """Local file(s) with the evaluation rows. None: `eval`, or a held-out share of the rows."""
    config: str | None = None
    """Configuration name on the hub."""
    revision: str | None = None
    train: str = "train"
    eval: str | None = None
    """Evaluation split on the hub. None: `data.eval_fraction` of the rows is held out."""
    generate: str | None = None
    """Import path of `f(split) -> list of rows`, for sources that are made up rather than read."""
    prompt: str | None = "{prompt}"
    """None: the prompt is what comes before the answer in a `transcript`."""
    chosen: str | None = "{chosen}"
    rejected: str | None = None
    answers: str | None = None
    """Column with a list of answers to the prompt, best first; `chosen` and `rejected` are then not read."""
    ranks: str | None = None
    """Of such a list: column with a whole number for each answer, smaller is better. Equal numbers are a tie. None: no ties."""
    formatted: bool = False
    """True: prompt and answers hold their own turn markers and spaces. False: `data.chat` puts them around the plain texts."""
    optional: tuple[str, ...] = ()
    """Templates (chosen, rejected) whose column a row may lack; `ranks`, where it may lack that."""
    transcript: str | None = None
    """Answers are whole conversations: only what follows the last occurrence of this marker is the answer."""
    prefer: tuple[Any, ...] | None = None
    """`(column, operator, column or number)`: where it does not hold, chosen and rejected change places."""
    strip: tuple[str, ...] = ()
    """Regular expressions deleted from the answers, one after the other."""
    replace: Mapping[str, str] = field(default_factory=dict)
    """Words exchanged in the prompt."""
    where: Mapping[str, Any] = field(default_factory=dict)
    """Keeps only rows whose columns have these values."""
    share: tuple[float, float] | None = None
    """Keeps only this part of the rows, such as `[0, 0.7]`: a row's place in [0, 1) is a hash of its texts, so that two runs with
    parts that do not overlap share no row."""
    text: str | None = None
    """Template of a plain text; prompt and answers are then not read. SFT learns to write it."""
    label: str | None = None
    """Column with 1 for texts to prefer and 0 for the others: the reward model learns from random pairs of the two."""
    prompt_tokens: int | None = None
    """Of a plain text: PPO's prompt is so many of its first tokens."""
    languages: tuple[str, ...] = ("en",)

    def __post_init__(self) -> None:
        _check_kinds(self)
        for name in ("prompt", "chosen", "rejected", "text"):
            _check_template(self.name, name, getattr(self, name))
        if self.prefer is not None and not fits(self.prefer, tuple[str, Operator, str | float]):
            raise UserError(
                f"source {self.name!r}: prefer must be [column, operator, column or number] with one of {' '.join(typing.get_args(Operator))}, "
                f"got {list(self.prefer)}"
            )
        if self.share is not None and not 0 <= self.share[0] < self.share[1] <= 1:
            raise UserError(f"source {self.name!r}: share must be [from, to] with 0 <= from < to <= 1, got {list(self.share)}")
        for pattern in self.strip:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"source {self.name!r}: strip holds {pattern!r}, which is no regular expression ({error})") from error
        if self.label is not None and self.text is None:
            raise UserError(f"source {self.name!r}: label needs text, the template of the labelled text")
        _check_answers(self)
        if self.prompt is None and self.transcript is None and self.text is None:
            raise UserError(f"source {self.name!r}: without prompt there must be a transcript, the marker that ends a prompt, or a text")

    @property
    def files(self) -> tuple[str, ...]:
        """Local files with the rows; empty for the hub, a folder or a generated source."""
        return _files(self.path)

    @property
    def eval_files(self) -> tuple[str, ...]:
        """Local files with the held-out rows."""
        return _files(self.eval_path)

    @property
    def columns(self) -> set[str]:
        """Columns that every row must have."""
        if self.text is not None:
            templates = [self.text]
        elif self.answers is not None:
            templates = [self.prompt or ""]
        else:
            templates = [t for name in ("prompt", "chosen", "rejected") if name not in self.optional and (t := getattr(self, name))]
        names = {column for template in templates for column in template_columns(template)}
        names |= set(self.where) | {column for column in (self.label, self.answers) if column}
        names |= {self.ranks} if self.ranks and "ranks" not in self.optional else set()
        if self.prefer is not None:
            names |= {operand for operand in (self.prefer[0], self.prefer[2]) if isinstance(operand, str)}
        return names


def _check_kinds(source: Source) -> None:
    """Each field has a value of its kind, and none is empty that names something."""
    for name, kind in _kinds().items():
        value = getattr(source, name)
        if not fits(value, kind):
            written = list(value) if isinstance(value, tuple) else value
            raise UserError(f"source {source.name!r}: {name} must be {_in_yaml(Source.__annotations__[name])}, got {written!r}")
        if value == "" or (name in ("path", "eval_path") and isinstance(value, tuple) and not (value and all(value))):
            raise UserError(f"source {source.name!r}: {name} is empty: give it a value, or leave it out")


@functools.cache
def _kinds() -> dict[str, Any]:
    return typing.get_type_hints(Source)


def _in_yaml(annotation: str) -> str:
    """An annotation in the words of YAML: `str | list[str] | null`."""
    return annotation.replace("tuple", "list").replace(", ...]", "]").replace("None", "null").replace("Mapping", "mapping")


def template_columns(template: str) -> set[str]:
    """Columns that a template reads: `{answers[ja][0][text]}` reads `answers`."""
    return {name.split("[")[0].split(".")[0] for _, name, _, _ in Formatter().parse(template) if name is not None}


def _check_template(source: str, name: str, template: Any) -> None:
    if template is None:
        return
    try:
        columns = template_columns(template)
    except (ValueError, TypeError) as error:
        raise UserError(f"source {source!r}: {name} is no template ({error}), got {template!r}; write a column as {{column}}") from error
    if not columns or "" in columns or any(column.isdigit() for column in columns):
        raise UserError(f"source {source!r}: {name} must name its columns, as in {{question}}, got {template!r}")


def _check_answers(source: Source) -> None:
    """A list of answers stands for the other ways to name them."""
    if source.answers is None:
        if source.ranks is not None:
            raise UserError(f"source {source.name!r}: ranks needs answers, the column with the list that they rank")
        return
    for name in ("chosen", "rejected", "text", "prompt_tokens", "prefer", "transcript"):
        if getattr(source, name) != getattr(Source, name):
            raise UserError(f"source {source.name!r}: answers lists every answer, so that {name} would say nothing: leave it out")
    if source.prompt is None:
        raise UserError(f"source {source.name!r}: answers needs prompt, the template of what they answer")


def _files(path: str | tuple[str, ...] | None) -> tuple[str, ...]:
    paths = (path,) if isinstance(path, str) else path or ()
    return tuple(paths) if any(Path(p).suffix in FILE_SUFFIXES for p in paths) else ()


def _table(*sources: Source) -> dict[str, Source]:
    return {source.name: source for source in sources}


HH_MARKER = "\n\nAssistant:"

SOURCES: dict[str, Source] = _table(
    # The sixteen of DeepSpeed-Chat (dschat/utils/data/raw_datasets.py), with its texts under chat.human " Human: {text}" and
    # chat.assistant " Assistant:".
    Source(name="rm_static", path="Dahoas/rm-static", eval="test", rejected="{rejected}", formatted=True),
    Source(name="full_hh_rlhf", path="Dahoas/full-hh-rlhf", eval="test", rejected="{rejected}", formatted=True),
    Source(name="synthetic_instruct", path="Dahoas/synthetic-instruct-gptj-pairwise", rejected="{rejected}"),
    Source(
        name="rlhf_reward_datasets", path="yitingxie/rlhf-reward-datasets", eval="test", formatted=True,
        prompt="{prompt}Assistant:", rejected="{rejected}", transcript="Assistant:",
    ),
    Source(
        name="webgpt_comparisons", path="openai/webgpt_comparisons", revision=PARQUET_COPY, prompt="{question[full_text]}",
        chosen="{answer_0}", rejected="{answer_1}", prefer=("score_0", ">=", "score_1"),
        strip=(r" [\(\[].*?[\)\]]", r"[\(\[].*?[\)\]]"),
    ),
    Source(
        name="shp", path="stanfordnlp/SHP", eval="validation", prompt="{history}", chosen="{human_ref_A}",
        rejected="{human_ref_B}", prefer=("labels", "==", 1),
    ),
    Source(
        name="sharegpt_alpaca_oa", path="pvduy/sharegpt_alpaca_oa_vicuna_format", eval="test", formatted=True,
        chosen=" {label}", replace={"USER": "Human", "ASSISTANT": "Assistant"},
    ),
    Source(name="zhihu_kol", path="wangrui6/Zhihu-KOL", prompt="{INSTRUCTION}", chosen="{RESPONSE}", languages=("zh",)),
    Source(
        name="miracl_zh", path="Cohere/miracl-zh-queries-22-12", eval="dev", prompt="{query}", languages=("zh",),
        chosen="{positive_passages[0][text]}", rejected="{negative_passages[0][text]}",
    ),
    Source(
        name="hc3_chinese", path="Hello-SimpleAI/HC3-Chinese", config="all", revision=PARQUET_COPY, prompt="{question}",
        chosen="{human_answers[0]}", languages=("zh",),
    ),
    Source(
        name="mkqa_zh", path="apple/mkqa", revision=PARQUET_COPY, prompt="{queries[zh_cn]}", chosen="{answers[zh_cn][0][text]}",
        languages=("zh",),
    ),
    Source(
        name="mkqa_ja", path="apple/mkqa", revision=PARQUET_COPY, prompt="{queries[ja]}", chosen="{answers[ja][0][text]}",
        languages=("ja",),
    ),
    Source(
        name="miracl_ja", path="Cohere/miracl-ja-queries-22-12", eval="dev", prompt="{query}", languages=("ja",),
        chosen="{positive_passages[0][text]}", rejected="{negative_passages[0][text]}",
    ),
    Source(
        name="qg_jaquad", path="lmqg/qg_jaquad", revision=PARQUET_COPY, eval="validation", prompt="{question}", chosen="{sentence}",
        languages=("ja",),
    ),
    Source(
        name="qag_jaquad", path="lmqg/qag_jaquad", revision=PARQUET_COPY, eval="validation", prompt="{questions[0]}",
        chosen="{paragraph}", languages=("ja",),
    ),
    Source(name="local_jsonfile", formatted=True, prompt=" {prompt}", chosen=" {chosen}", rejected=" {rejected}", optional=("rejected",)),
    # Beyond DeepSpeed-Chat.
    Source(name="hh_rlhf", path="Anthropic/hh-rlhf", eval="test", formatted=True, prompt=None, rejected="{rejected}", transcript=HH_MARKER),
    Source(name="wikitext", path="Salesforce/wikitext", config="wikitext-2-raw-v1", eval="validation", text="{text}"),
    Source(name="quickstart", generate="rlhf.data.quickstart.generate", rejected="{rejected}"),
    Source(name="quickstart_demonstrations", generate="rlhf.data.quickstart.demonstrations"),
    # Generic kinds: the file is `data.path`, or `path` where the source is written out.
    Source(name="pairs", rejected="{rejected}", optional=("rejected",)),
    Source(name="ranked", answers="answers", ranks="ranks", optional=("ranks",)),
    Source(name="prompts", chosen=None),
    Source(name="text", text="{text}"),
    Source(name="labelled", text="{text}", label="label"),
)  # fmt: skip


def resolve(item: str | Mapping[str, Any] | SimpleNamespace, path: str | None, *, key: str = "data.sources") -> Source:
    """The source that an entry of `data.sources`, or of another list of sources, means.

    Args:
        item: a name of the table, or a mapping (or namespace) with the fields of `Source`; one with a name of the table changes that row.
        path: `data.path`, for the generic kinds.
        key: of the list, for messages.

    Raises:
        UserError: unknown name or field, a field of the wrong kind, or no file for a generic kind.
    """
    source = _entry(item, key)
    if _reads_data_path(source):
        if path is None:
            raise UserError(f"data.path is missing: source {source.name!r} reads a local file, so set data.path=FILE.jsonl")
        source = dataclasses.replace(source, path=path)
    _check_files(source)
    return source


def check_path(path: str | None, lists: Mapping[str, Iterable[Any]]) -> None:
    """
    Args:
        path: `data.path`.
        lists: key -> entries, of every list of sources.

    Raises:
        UserError: there is a path that no source reads, or an entry is no source.
    """
    if path is not None and not any(_reads_data_path(_entry(item, key)) for key, items in lists.items() for item in items):
        raise UserError(
            f"data.path={path}, but no source of {' or '.join(lists)} reads it: add data=pairs (or data=ranked, labelled, text), or leave "
            "data.path out"
        )


def _reads_data_path(source: Source) -> bool:
    return source.path is None and source.generate is None


def _entry(item: str | Mapping[str, Any] | SimpleNamespace, key: str) -> Source:
    """As `resolve`, but for the file that `data.path` names."""
    item = _plain(item)
    if isinstance(item, str):
        if item not in SOURCES:
            raise UserError(f"{key}: no source is called {item!r}{nearest(item, SOURCES)}; known: {', '.join(SOURCES)}")
        return SOURCES[item]
    if isinstance(item, Mapping):
        return _from_mapping(item)
    raise UserError(f"{key}: an entry is a name or a mapping with the fields of a source, got {item!r}")


def _plain(item: Any) -> Any:
    """Namespaces, which `rlhf.config.build` makes of mappings, as mappings again."""
    return {key: _plain(value) for key, value in vars(item).items()} if isinstance(item, SimpleNamespace) else item


def _check_files(source: Source) -> None:
    paths = (source.path,) if isinstance(source.path, str) else source.path or ()
    odd = [p for p in paths if Path(p).suffix not in FILE_SUFFIXES]
    if odd and (isinstance(source.path, tuple) or Path(odd[0]).is_file()):  # a list is of files; one text may be a folder or an id
        raise UserError(f"source {source.name!r}: path {odd[0]!r} is no {', '.join(FILE_SUFFIXES)} file")
    flat = [p for p in (*source.files, *source.eval_files) if Path(p).suffix == ".csv"]
    if source.answers is not None and flat:
        raise UserError(f"source {source.name!r}: a cell of {flat[0]!r} holds no list of answers: write .jsonl, .json or .parquet")
    if source.generate is not None and source.path is not None and not source.files:
        raise UserError(
            f"source {source.name!r}: generate makes its rows, so that path {source.path!r} would say nothing: set generate: null"
        )
    if source.files and source.eval is not None:
        raise UserError(f"source {source.name!r}: eval names a split of the hub; for a local file give the evaluation rows by eval_path")
    if source.eval_path and not (source.files and source.eval_files):
        raise UserError(f"source {source.name!r}: eval_path goes with a path of local files, and must name local files itself")


def _from_mapping(item: Mapping[str, Any]) -> Source:
    fields = {f.name for f in dataclasses.fields(Source)}
    for key in item:
        if key not in fields:
            raise UserError(f"data.sources: a source has no field {key!r}{nearest(key, fields)}; fields: {', '.join(sorted(fields))}")
    if not isinstance(item.get("name"), str):
        raise UserError(f"data.sources: a source written out needs a name, got {dict(item)}")
    values = {key: _frozen(key, value) for key, value in item.items()}
    base = SOURCES.get(item["name"])
    return dataclasses.replace(base, **values) if base else Source(**values)


def _frozen(key: str, value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return (value,) if key in ("optional", "strip", "languages") and isinstance(value, str) else value
