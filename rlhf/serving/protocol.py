"""OpenAI's protocol as far as it is spoken here: what a request may say, and what is answered.

Knows JSON; knows no model and no server. Fields that would change the answer and are not supported are refused rather than ignored.
"""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

ENDS = {"stop": "stop", "length": "length", "cancelled": "stop", "failed": "stop"}
"""How a reply ended here -> `finish_reason`."""


class Refused(Exception):
    """A request that is not served: status, one sentence, and the field it is about."""

    def __init__(self, status: int, message: str, *, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.field, self.code = status, message, field, code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.field, "code": self.code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(_Strict):
    include_usage: bool = False


class Asked(_Strict):
    """What both kinds of request have."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0)] | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    user: str | None = None
    """For the caller's own records; nothing depends on it."""

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def most(self) -> int | None:
        """Tokens of the answer at most."""
        return self.max_tokens

    @model_validator(mode="after")
    def _stops_say_something(self) -> Asked:
        if len(self.stops) > 4 or any(not stop for stop in self.stops):
            raise ValueError("stop must be up to four texts, none of them empty")
        return self


class ChatAsked(Asked):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def most(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class TextAsked(Asked):
    prompt: Annotated[str, Field(min_length=1)]


class CompareAsked(_Strict):
    """One prompt for two checkpoints."""

    prompt: Annotated[str, Field(min_length=1)]


class Vote(_Strict):
    choice: Literal["a", "b", "tie"]


def parse(kind: type[Any], body: bytes) -> Any:
    """
    Raises:
        Refused: not JSON, or a field is missing, unknown, of another type or out of range; one sentence that names the first.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("list[", "str")))
        if first["type"] == "json_invalid":
            raise Refused(400, f"the body is not JSON: {first['ctx']['error']}") from error
        if first["type"] == "extra_forbidden":
            raise Refused(400, f"{field} is not supported here: leave it out", field=field) from error
        said = first["msg"].removeprefix("Value error, ")
        raise Refused(400, f"{field}: {said}" if field else said, field=field or None) from error


def new_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"


def usage(prompt: int, answer: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


class Envelope:
    """One answer's wrapping, for a chat or for plain text, whole or in pieces."""

    def __init__(self, *, chat: bool, model: str) -> None:
        self.chat, self.model = chat, model
        self.id, self.created = new_id("chatcmpl" if chat else "cmpl"), int(time.time())

    def _around(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices, **more}

    def whole(self, text: str, end: str, *, prompt: int, answer: int) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": ENDS[end]}
        return self._around("chat.completion" if self.chat else "text_completion", [choice], usage=usage(prompt, answer))

    def piece(self, text: str, end: str | None, *, first: bool) -> dict[str, Any]:
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        said = {"delta": {**delta, "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": None if end is None else ENDS[end]}
        return self._around("chat.completion.chunk" if self.chat else "text_completion", [choice])

    def counts(self, *, prompt: int, answer: int) -> dict[str, Any]:
        """The last piece of a stream that was asked for its usage."""
        return self._around("chat.completion.chunk" if self.chat else "text_completion", [], usage=usage(prompt, answer))
