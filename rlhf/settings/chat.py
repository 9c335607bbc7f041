"""How one talks to a checkpoint. Types and ranges only: the values live in conf/chat.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf.settings.ranges import require, require_at_least_one, require_in


@dataclass(frozen=True, kw_only=True)
class ReplyConfig:
    """How replies are drawn. In a chat, `/set` changes them."""

    temperature: float
    """0: the likeliest token."""
    top_k: int
    """0: off."""
    top_p: float
    """1: off."""
    max_new_tokens: int
    """Of one reply."""
    seed: int | None
    """The same conversation gets the same reply. None: another one each time."""

    def __post_init__(self) -> None:
        require_in("temperature", self.temperature, 0, 10)
        require_in("top_k", self.top_k, 0)
        require(0 < self.top_p <= 1, f"top_p must lie in (0, 1], got {self.top_p}")
        require_at_least_one(max_new_tokens=self.max_new_tokens)
        require(self.seed is None or self.seed >= 0, f"seed must be null or at least 0, got {self.seed}")


LOOPBACK = ("127.0.0.1", "::1", "localhost")
"""Addresses that no other machine reaches."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """A server with OpenAI's protocol and a page to chat, compare and vote on."""

    host: str
    port: int
    """0: a free one."""
    token: str | None
    """What a client has to bring. It must be set where other machines reach the server."""
    slots: int
    """Requests answered at once by each checkpoint; others wait."""
    queue: int
    """Requests that wait at most; more are refused."""
    body_kb: int
    """Of one request, 1024 bytes."""
    pause_ms: float
    """Milliseconds between two pieces of a streamed answer at least: tokens that come faster go together. 0: as fast as the server can."""
    patience: int
    """Seconds that answers on their way get to end once the server is told to stop."""
    votes: str
    """File that votes are appended to, one pair a line; ties go to a file beside it."""

    def __post_init__(self) -> None:
        require(0 <= self.port <= 65535, f"port must lie in [0, 65535], got {self.port}")
        require_at_least_one(slots=self.slots, queue=self.queue, body_kb=self.body_kb)
        require(bool(self.votes), "votes must name a file")
        require_in("patience", self.patience, 0)
        require_in("pause_ms", self.pause_ms, 0)
        require(self.token is None or len(self.token) >= 8, "token must have at least 8 characters")
        require(self.token is None or self.token.isascii(), "token must be ASCII: clients send other letters in different ways")
        require(
            self.token is not None or self.host in LOOPBACK,
            f"host={self.host} can be reached from other machines, so token must be set: anyone could use the model otherwise",
        )


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """A conversation in the terminal, or a server for many."""

    serve: bool
    """Serves instead of asking in the terminal."""
    server: ServerConfig
    compare: str | None
    """A second checkpoint. On the server's page both answer, blind, and one votes."""
    reply: ReplyConfig
    reward: str | None
    """A reward model (a run directory or a folder in HF layout), whose score stands beside each reply."""
    system: str | None
    """The first message, where the model's chat format has one."""
    context: int | None
    """Tokens of a conversation and its reply; older turns are left out. None: as many as the model has positions for, at most 4096."""
    device: Literal["auto", "cpu", "cuda"]
    dtype: Literal["auto", "fp32", "bf16", "fp16"]
    """auto: bf16 on a GPU, fp32 on a CPU."""

    def __post_init__(self) -> None:
        require(self.context is None or self.context >= 2, f"context must be null or at least 2, got {self.context}")
        require(self.serve or self.compare is None, "compare is for the server's page: add chat.serve=true")
        scored = not self.serve or self.reward is None or self.compare is not None
        require(scored, "reward beside serve=true scores the two answers of a comparison: add chat.compare=DIR")
        require(not self.serve or self.system is None, "system is for the terminal: clients of the server send their own system message")
