"""A conversation as token ids, and token ids as text while they come.

Knows the chat format and the length of the context; knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

from rlhf.config import UserError
from rlhf.data.chat import jinja_template
from rlhf.data.tokenizer import encode_prompts
from rlhf.settings import ChatFormat

PLAIN = ChatFormat(human=" Human: {text}", assistant=" Assistant:", end_of_turn=None)
"""DeepSpeed-Chat's, for a model that has no chat format of its own: a base model has never seen any."""


class Message(TypedDict):
    role: str
    """system, user or assistant."""
    content: str


@dataclass(frozen=True)
class Prompt:
    """What a model is asked."""

    ids: tuple[int, ...]
    notice: str | None
    """What had to be left out, in one sentence."""


class ChatTemplate:
    """The chat format of a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.native = bool(tokenizer.chat_template)
        """False: the model brings no format, so DeepSpeed-Chat's is used."""
        self.template = tokenizer.chat_template or jinja_template(PLAIN)

    def ids(self, messages: list[Message], *, opened: bool = True) -> list[int]:
        """
        Args:
            opened: what opens the assistant's turn follows. False: the last message is the assistant's, and its end of turn is there.

        Raises:
            UserError: the format refuses the roles or their order.
        """
        try:
            text = self.tokenizer.apply_chat_template(messages, chat_template=self.template, tokenize=False, add_generation_prompt=opened)
        except Exception as error:
            raise UserError(f"the model's chat format refuses this conversation: {str(error).splitlines()[0]}") from error
        return encode_prompts(self.tokenizer, [text])[0]

    def fit(self, messages: list[Message], room: int) -> Prompt:
        """The conversation as at most `room` tokens: the oldest turns go first, the system message stays, and the newest message is
        cut from its front where it alone is too long.

        Raises:
            UserError: the format refuses the conversation, or there is none.
        """
        if not messages:
            raise UserError("there is no message to answer")
        system = [messages[0]] if messages[0]["role"] == "system" else []
        turns = messages[len(system) :]
        dropped = 0
        ids = self.ids(messages)
        while len(ids) > room and len(turns) > 1:
            step = next((i for i, turn in enumerate(turns) if i > 0 and turn["role"] == "user"), len(turns) - 1)
            dropped += step
            turns = turns[step:]
            ids = self.ids([*system, *turns])
        if len(ids) > room:
            left = f"the first {len(ids) - room} of {len(ids)} tokens do not fit into the context and are left out"
            return Prompt(tuple(ids[-room:]), left)
        return Prompt(tuple(ids), f"the oldest {dropped} messages do not fit into the context and are left out" if dropped else None)


class TextStream:
    """Turns token ids into text piece by piece. A piece is given out once it cannot change any more: a letter of several bytes may be
    spread over tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.start = 0
        """Tokens before it are done; a few of them are decoded again, as spaces depend on what comes before."""
        self.read = 0
        """Tokens before it have been given out."""

    def push(self, *tokens: int) -> str:
        """The text that these tokens make certain; may be empty."""
        self.ids += tokens
        text = self._decode(self.start, len(self.ids))
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        return self._give(text)

    def rest(self) -> str:
        """What is left at the end of the answer."""
        return self._give(self._decode(self.start, len(self.ids)))

    def _give(self, text: str) -> str:
        known = self._decode(self.start, self.read)
        self.start, self.read = self.read, len(self.ids)
        return text[len(known) :]

    def _decode(self, start: int, end: int) -> str:
        return self.tokenizer.decode(self.ids[start:end], skip_special_tokens=True)
