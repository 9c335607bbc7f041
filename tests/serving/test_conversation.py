"""Conversations as tokens that fit, and tokens as text that never changes once it is shown."""

from __future__ import annotations

from typing import Any

import pytest
from checkpoints import CHAT, tokenizer_of_tests
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from rlhf.config import UserError
from rlhf.data.chat import format_answer, format_prompt
from rlhf.data.tokenizer import encode_answers, encode_prompts
from rlhf.serving.conversation import ChatTemplate, Message, TextStream

TOKENIZER = tokenizer_of_tests()


def talk(*texts: str, system: str | None = None) -> list[Message]:
    """User and assistant in turn."""
    roles = ("user", "assistant")
    head: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def test_a_question_is_what_training_makes_of_a_prompt() -> None:
    asked = ChatTemplate(TOKENIZER).ids(talk("name four fruits"))
    assert asked == encode_prompts(TOKENIZER, [format_prompt(CHAT, "name four fruits")])[0]


def test_an_answered_question_ends_as_in_training() -> None:
    ids = ChatTemplate(TOKENIZER).ids(talk("name", "plum"), opened=False)
    prompt, answer = (
        encode_prompts(TOKENIZER, [format_prompt(CHAT, "name")])[0],
        encode_answers(TOKENIZER, [format_answer(CHAT, "plum")])[0],
    )
    assert ids == [*prompt, *answer, TOKENIZER.eos_token_id]


def test_a_model_without_a_format_is_spoken_to_in_ours() -> None:
    base = tokenizer_of_tests()
    base.chat_template = None
    template = ChatTemplate(base)
    assert not template.native and ChatTemplate(TOKENIZER).native
    assert template.ids(talk("a", "b", "c")) == ChatTemplate(TOKENIZER).ids(talk("a", "b", "c"))


def test_the_oldest_turns_go_first() -> None:
    template = ChatTemplate(TOKENIZER)
    whole = talk("first question", "first answer", "second question", "second answer", "third question")
    newest = template.ids(whole[-1:])
    assert template.fit(whole, len(template.ids(whole))).notice is None
    two = template.fit(whole, len(template.ids(whole)) - 1)
    assert two.ids == tuple(template.ids(whole[2:])) and two.notice is not None and "oldest 2 messages" in two.notice
    one = template.fit(whole, len(newest))
    assert one.ids == tuple(newest) and one.notice is not None and "oldest 4 messages" in one.notice
    cut = template.fit(whole, len(newest) - 3)
    assert cut.ids == tuple(newest[3:]) and cut.notice is not None and f"first 3 of {len(newest)} tokens" in cut.notice


def test_the_system_message_stays() -> None:
    tokenizer = tokenizer_of_tests()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    template = ChatTemplate(tokenizer)
    whole = talk("one", "two", "three", system="be brief")
    fitted = template.fit(whole, len(template.ids(whole)) - 1)
    assert fitted.ids == tuple(template.ids([whole[0], whole[-1]]))


def test_what_the_format_refuses_is_said_in_one_line() -> None:
    with pytest.raises(UserError, match="refuses this conversation: this chat format knows the roles user and assistant only"):
        ChatTemplate(TOKENIZER).ids(talk("hello", system="be brief"))
    with pytest.raises(UserError, match="no message"):
        ChatTemplate(TOKENIZER).fit([], 10)


@examples(max_examples=80, deadline=None)
@given(st.lists(st.integers(min_value=0, max_value=len(TOKENIZER) - 1), max_size=40))
def test_pieces_put_together_are_the_whole_text(ids: list[int]) -> None:
    """Any tokens, letters torn apart and special ones among them."""
    stream = TextStream(TOKENIZER)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.rest() == TOKENIZER.decode(ids, skip_special_tokens=True)


def test_a_letter_of_several_tokens_comes_whole() -> None:
    ids = TOKENIZER("größer 🙂 ok", add_special_tokens=False)["input_ids"]
    stream: Any = TextStream(TOKENIZER)
    pieces = [stream.push(i) for i in ids]
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces) and "" in pieces, "some tokens are no letters yet"
    assert "".join(pieces) == "größer 🙂 ok" and stream.rest() == ""
