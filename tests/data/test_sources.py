"""Every source of the table, on rows with the columns that the hub has."""

from __future__ import annotations

from typing import Any

import pytest
from data_fixtures import CHAT

from rlhf.config import UserError
from rlhf.data.examples import RowProblem, convert
from rlhf.data.sources import SOURCES, Source, resolve

HH_PROMPT = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Why?\n\nAssistant:"

# name, row, prompt, chosen, rejected: the strings of DeepSpeed-Chat's raw_datasets.py.
UPSTREAM: list[tuple[str, dict[str, Any], str, str, str | None]] = [
    ("rm_static", {"prompt": HH_PROMPT, "chosen": " Yes", "rejected": " No"}, HH_PROMPT, " Yes", " No"),
    ("full_hh_rlhf", {"prompt": HH_PROMPT, "chosen": " Yes", "rejected": " No"}, HH_PROMPT, " Yes", " No"),
    ("synthetic_instruct", {"prompt": "Why?", "chosen": "Yes", "rejected": "No"}, " Human: Why? Assistant:", " Yes", " No"),
    (
        "rlhf_reward_datasets",
        {"prompt": "\n\nHuman: Why?\n\n", "chosen": "Assistant: a Assistant: Yes", "rejected": "Assistant: No"},
        "\n\nHuman: Why?\n\nAssistant:", " Yes", " No",
    ),
    (
        "webgpt_comparisons",
        {"question": {"full_text": "Why?"}, "answer_0": "Bad [1]", "answer_1": "Good (2, 3) one [4].", "score_0": -0.5, "score_1": 0.5},
        " Human: Why? Assistant:", " Good one.", " Bad",
    ),
    ("shp", {"history": "Why?", "human_ref_A": "A", "human_ref_B": "B", "labels": 0}, " Human: Why? Assistant:", " B", " A"),
    ("sharegpt_alpaca_oa", {"prompt": "USER: Why? ASSISTANT:", "label": "Yes USER"}, "Human: Why? Assistant:", " Yes USER", None),
    ("zhihu_kol", {"INSTRUCTION": "为什么?", "RESPONSE": "因为"}, " Human: 为什么? Assistant:", " 因为", None),
    (
        "miracl_zh", {"query": "q", "positive_passages": [{"text": "p"}], "negative_passages": [{"text": "n"}, {"text": "m"}]},
        " Human: q Assistant:", " p", " n",
    ),
    ("hc3_chinese", {"question": "q", "human_answers": ["h", "i"]}, " Human: q Assistant:", " h", None),
    (
        "mkqa_zh", {"queries": {"zh_cn": "中", "ja": "日"}, "answers": {"zh_cn": [{"text": "z"}], "ja": [{"text": "j"}]}},
        " Human: 中 Assistant:", " z", None,
    ),
    (
        "mkqa_ja", {"queries": {"zh_cn": "中", "ja": "日"}, "answers": {"zh_cn": [{"text": "z"}], "ja": [{"text": "j"}]}},
        " Human: 日 Assistant:", " j", None,
    ),
    ("miracl_ja", {"query": "q", "positive_passages": [{"text": "p"}], "negative_passages": []}, " Human: q Assistant:", " p", None),
    ("qg_jaquad", {"question": "q", "sentence": "s"}, " Human: q Assistant:", " s", None),
    ("qag_jaquad", {"questions": ["q", "r"], "paragraph": "p"}, " Human: q Assistant:", " p", None),
    ("local_jsonfile", {"prompt": "Human: Why? Assistant:", "chosen": "Yes", "rejected": "No"}, " Human: Why? Assistant:", " Yes", " No"),
    ("hh_rlhf", {"chosen": HH_PROMPT + " Yes", "rejected": HH_PROMPT + " No"}, HH_PROMPT, " Yes", " No"),
    ("pairs", {"prompt": "Why?", "chosen": "Yes"}, " Human: Why? Assistant:", " Yes", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "prompt", "chosen", "rejected"), UPSTREAM, ids=[case[0] for case in UPSTREAM])
def test_a_row_of_each_source_gives_the_upstream_texts(
    name: str, row: dict[str, Any], prompt: str, chosen: str, rejected: str | None
) -> None:
    example = convert(row, source=SOURCES[name], chat=CHAT)
    assert example == {"prompt": prompt, "chosen": chosen, "rejected": rejected, "label": None, "between": None, "ranks": None}


def test_equal_scores_keep_the_first_answer() -> None:
    row = {"question": {"full_text": "q"}, "answer_0": "first", "answer_1": "second", "score_0": 0.0, "score_1": 0.0}
    assert convert(row, source=SOURCES["webgpt_comparisons"], chat=CHAT)["chosen"] == " first"


def test_hh_transcripts_of_different_prompts_are_no_pair() -> None:
    with pytest.raises(RowProblem, match="different prompts"):
        convert({"chosen": HH_PROMPT + " Yes", "rejected": "\n\nHuman: Other\n\nAssistant: No"}, source=SOURCES["hh_rlhf"], chat=CHAT)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "  ", "chosen": "a"}, "the prompt is empty"),
        ({"prompt": "q", "chosen": ""}, "the chosen is empty"),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, "the rejected answer is empty"),
        ({"prompt": None, "chosen": "a"}, "no value for {prompt}"),
    ],
)
def test_empty_rows_have_a_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowProblem, match=reason):
        convert(row, source=SOURCES["pairs"], chat=CHAT)


def test_a_written_out_source_changes_a_row_of_the_table_or_is_new() -> None:
    assert resolve({"name": "labelled", "prompt_tokens": 8}, "x.jsonl").label == "label"
    mine = resolve({"name": "mine", "path": "my.jsonl", "prompt": "{question}", "chosen": "{good}", "rejected": "{bad}"}, None)
    assert mine == Source(name="mine", path="my.jsonl", prompt="{question}", chosen="{good}", rejected="{bad}")
    assert mine.columns == {"question", "good", "bad"}


MINE = {"name": "mine", "path": "a.jsonl"}


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("rm_statik", "did you mean 'rm_static'"),
        ({"name": "mine", "path": "a.jsonl", "promt": "{q}"}, "no field 'promt'.*did you mean 'prompt'"),
        ({"path": "a.jsonl"}, "needs a name"),
        ({"name": "mine", "path": "a.jsonl", "prompt": "{q"}, "prompt is no template"),
        ({"name": "mine", "path": "a.jsonl", "prompt": "{}"}, "must name its columns"),
        ({"name": "mine", "path": "a.jsonl", "prefer": ["a", "=>", "b"]}, "prefer must be"),
        ({"name": "mine", "path": "a.jsonl", "eval": "test"}, "eval_path"),
        (MINE | {"prefer": [1, ">=", "b"]}, "prefer must be"),
        (MINE | {"prefer": ["a", ">=", ["b"]]}, "prefer must be"),
        (MINE | {"formatted": "no"}, "source 'mine': formatted must be bool, got 'no'"),
        (MINE | {"prompt": 5}, r"prompt must be str \| null, got 5"),
        (MINE | {"prompt_tokens": "8"}, r"prompt_tokens must be int \| null, got '8'"),
        (MINE | {"where": {1: 2}}, r"where must be mapping\[str, Any\], got {1: 2}"),
        (MINE | {"replace": {"a": 5}}, r"replace must be mapping\[str, str\], got"),
        (MINE | {"replace": "a"}, r"replace must be mapping\[str, str\], got 'a'"),
        (MINE | {"share": [0, "a"]}, r"share must be list\[float, float\] \| null, got \[0, 'a'\]"),
        (MINE | {"share": [0.5]}, r"share must be list\[float, float\] \| null, got \[0.5\]"),
        (MINE | {"strip": [5]}, r"strip must be list\[str\], got \[5\]"),
        (MINE | {"strip": "("}, r"strip holds '\(', which is no regular expression"),
        (MINE | {"path": 5}, r"path must be str \| list\[str\] \| null, got 5"),
        (MINE | {"path": []}, "path is empty"),
        (MINE | {"path": ["a.jsonl", ""]}, "path is empty"),
        (MINE | {"path": ["hub/id"]}, "path 'hub/id' is no .jsonl"),
        (MINE | {"prompt": None, "transcript": ""}, "transcript is empty"),
        (MINE | {"prompt": None}, "without prompt there must be a transcript"),
        ({"name": "quickstart", "path": "hub/id"}, "generate makes its rows, so that path 'hub/id' would say nothing"),
        ("pairs", "data.path is missing"),
        (3, "a name or a mapping"),
    ],
)
def test_mistakes_in_a_source_are_named(item: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(item, None)
