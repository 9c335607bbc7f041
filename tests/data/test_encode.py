"""Token rows of each step: the joint, the limits and what is dropped for which reason."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf.data.encode import Limits, chunk_texts, encode
from rlhf.data.phases import EXAMPLES
from rlhf.data.split import Phase
from rlhf.data.tokenizer import encode_answers

PROMPT = " Human: question1 Assistant:"  # 5 tokens


def table(*rows: tuple[str, str | None, str | None], opening: int = 0) -> Dataset:
    columns = {
        "prompt": [r[0] for r in rows],
        "chosen": [r[1] for r in rows],
        "rejected": [r[2] for r in rows],
        "between": [None] * len(rows),
        "ranks": [None] * len(rows),
        "opening": [opening] * len(rows),
    }
    return Dataset.from_dict(columns, features=EXAMPLES)


def encoded(
    rows: Dataset, phase: Phase, tokenizer: PreTrainedTokenizerBase, prompt: int = 8, answer: int = 4, overlong: Any = "drop"
) -> Any:
    result, report = encode(rows, phase, tokenizer, Limits(prompt=prompt, answer=answer, overlong=overlong))
    return result[:], report


def test_a_prompt_has_the_same_tokens_in_every_step_and_answers_end(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = table((PROMPT, " good1 answer", " bad1"))
    prompt = encoded(rows, "ppo", tokenizer)[0]["ids"][0]
    text, pair = encoded(rows, "sft", tokenizer)[0], encoded(rows, "reward", tokenizer)[0]
    end = tokenizer.eos_token_id
    assert prompt == encode_answers(tokenizer, [PROMPT])[0] and text["prompt"] == [len(prompt)]
    assert text["ids"][0] == pair["chosen"][0] == [*prompt, *encode_answers(tokenizer, [" good1 answer"])[0], end]
    assert pair["rejected"][0] == [*prompt, *encode_answers(tokenizer, [" bad1"])[0], end]


def test_long_rows_are_dropped_and_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    long = " good1" * 4  # 4 tokens and the end of turn
    rows = table(
        (PROMPT, " good1" * 3, " bad1"),
        (PROMPT * 2, " good1", " bad1"),
        (PROMPT, long, " bad1"),
        (PROMPT, " good1", long),
        (PROMPT, " x", " y"),
    )
    kept, report = encoded(rows, "reward", tokenizer)
    assert len(kept["chosen"]) == 1
    assert report == {"rows": 1, "answer too long": 2, "prompt too long": 1, "identical pair": 1}  # " x" and " y" are both unknown
    assert encoded(rows, "ppo", tokenizer)[1] == {"rows": 4, "prompt too long": 1}  # PPO reads no answers


def test_long_rows_are_cut_on_the_far_side(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = encoded(table((PROMPT * 2, " good1 answer" * 3, None)), "sft", tokenizer, overlong="cut")[0]["ids"][0]
    assert ids == encode_answers(tokenizer, [PROMPT * 2])[0][-8:] + encode_answers(tokenizer, [" good1 answer" * 2])[0]
    pair = table((PROMPT, " good1" * 5, " good1" * 4))  # equal once they are cut
    assert encoded(pair, "reward", tokenizer, overlong="cut")[1] == {"rows": 0, "identical pair": 1}


def test_rows_without_an_answer_have_a_reason(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = table((PROMPT, None, None), (PROMPT, " good1", None))
    assert encoded(rows, "sft", tokenizer)[1] == {"rows": 1, "no answer": 1}
    assert encoded(rows, "reward", tokenizer)[1] == {"rows": 0, "no answer": 1, "no rejected answer": 1}
    assert encoded(table(("", "text", None)), "ppo", tokenizer)[1] == {"rows": 0, "empty prompt": 1}


def test_the_opening_of_a_text_is_a_prompt_that_sft_has_seen(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = table(("", " good1 bad1 good2 bad2", None), opening=2)
    prompt, text = encoded(rows, "ppo", tokenizer)[0], encoded(rows, "sft", tokenizer, answer=8)[0]
    assert prompt["text"] == [" good1 bad1"] and prompt["ids"][0] == text["ids"][0][:2] and text["prompt"] == [0]


def test_plain_text_is_joined_by_the_end_of_turn_and_its_remainder_dropped(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = chunk_texts([" good1 good2", " bad1", " bad2"], tokenizer, 3)
    good1, good2, bad1, _ = encode_answers(tokenizer, [" good1 good2 bad1 bad2"])[0]
    assert rows["ids"][:] == [
        [good1, good2, tokenizer.eos_token_id],
        [bad1, tokenizer.eos_token_id, encode_answers(tokenizer, [" bad2"])[0][0]],
    ]


@pytest.mark.parametrize("phase", ["sft", "reward", "ppo"])
def test_no_rows_are_no_error_here(tokenizer: PreTrainedTokenizerBase, phase: Phase) -> None:
    assert encoded(table(), phase, tokenizer)[1] == {"rows": 0}
