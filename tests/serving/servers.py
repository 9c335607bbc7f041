"""A server in a thread of the test, and what a checkpoint says to one question when nobody else asks."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from checkpoints import WORDS, save_policy

from rlhf.serving.answerer import Answerer
from rlhf.serving.app import Server
from rlhf.settings import ReplyConfig, ServerConfig

SOME_WORDS = ["name", "four", "fruits", "and", "three", "animals", "what", "is", "red", "plum"]
PLAIN = ReplyConfig(temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=16, seed=None)


def settings(**changes: Any) -> ServerConfig:
    plain: dict[str, Any] = {
        "host": "127.0.0.1", "port": 0, "token": None, "slots": 8, "queue": 256, "body_kb": 64, "pause_ms": 0, "patience": 5, "votes": "unused",
    }  # fmt: skip
    return ServerConfig(**(plain | changes))


@contextmanager
def serving(server: Server) -> Iterator[str]:
    """The address of a server in a thread of its own."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        running = uvicorn.Server(uvicorn.Config(server.app(), log_level="error", lifespan="off", timeout_graceful_shutdown=5))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        deadline = time.monotonic() + 20
        while not running.started:
            assert time.monotonic() < deadline and thread.is_alive()
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            running.should_exit = True
            thread.join(timeout=20)
        assert not thread.is_alive()


def alone(answerer: Answerer, question: str, limit: int = 16) -> str:
    """The greedy reply to one question, with nothing beside it."""
    options = ReplyConfig(temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=limit, seed=None)
    return "".join(piece.text for piece in answerer.reply([{"role": "user", "content": question}], options)).lstrip()


def questions(answerers: dict[str, Answerer], count: int) -> list[str]:
    """Some that the checkpoints answer differently, and none with silence."""
    drawn, found = random.Random(1), []
    while len(found) < count:
        question = " ".join(drawn.choices(SOME_WORDS, k=4))
        replies = {alone(answerer, question).strip() for answerer in answerers.values()}
        if len(replies) == len(answerers) and all(replies):
            found.append(question)
    return found


def loaded(folder: Path, *names: str, slots: int) -> Iterator[dict[str, Answerer]]:
    """Checkpoints that differ, in memory while a test module runs."""
    found = {}
    for seed, name in enumerate(names):
        save_policy(folder / name, seed=seed, tokenizer=WORDS)
        found[name] = Answerer(str(folder / name), context=None, slots=slots, device="cpu", dtype="fp32")
    yield found
    for answerer in found.values():
        answerer.close()
