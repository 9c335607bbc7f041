"""`rlhf chat chat.serve=true`: loads the checkpoints and serves them until it is told to stop.

Knows the web server's process; what is served is rlhf/serving's.
"""

from __future__ import annotations

import logging
import signal
import socket
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from rlhf.config import UserError
from rlhf.logging import log
from rlhf.serving.answerer import Answerer, export_of
from rlhf.serving.judge import Judge
from rlhf.settings import LOOPBACK

KEYS = ("checkpoint", "chat.compare")
SWITCH = 0.0005
"""Seconds that the server's thread may hold Python while the model's waits for it. Python's own 5 ms are longer than a step of a small model."""


def run_server(cfg: Any) -> None:
    """Serves `cfg.checkpoint`, and `cfg.chat.compare` beside it. SIGTERM and Ctrl-C let answers on their way end.

    Raises:
        UserError: the server's libraries are missing, an address is taken, or a checkpoint cannot be used.
    """
    try:
        import uvicorn

        from rlhf.serving.app import Server
        from rlhf.serving.compare import Comparisons
        from rlhf.serving.votes import Votes
    except ImportError as error:
        raise UserError(f"chat.serve=true needs {error.name}: pip install -e '.[serve]' in the checkout") from error
    chat, server = cfg.chat, cfg.chat.server
    names = _names(cfg.checkpoint, chat.compare)
    for checkpoint, key in zip(names.values(), KEYS, strict=False):
        export_of(checkpoint, key)  # the second one too, before the first one loads
    votes = None if chat.compare is None else _votes(Votes, server.votes)
    listener = _listen(server.host, server.port)
    answerers: dict[str, Answerer] = {}
    try:
        for (name, checkpoint), key in zip(names.items(), KEYS, strict=False):
            answerers[name] = Answerer(checkpoint, context=chat.context, slots=server.slots, device=chat.device, dtype=chat.dtype, key=key)
        first = next(iter(answerers.values()))
        judge = None if chat.reward is None else Judge(chat.reward, device=first.device, dtype=first.dtype)
        comparisons = None
        if votes is not None:
            a, b = answerers
            comparisons = Comparisons((a, b), votes, judge)
        app = Server(answerers, chat.reply, server, comparisons).app()
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=server.patience, lifespan="off")
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        shown = f"[{server.host}]" if ":" in server.host else server.host
        log.info(
            "serving %s on http://%s:%d (the page) and /v1 (OpenAI's protocol); Ctrl-C ends it",
            " and ".join(names),
            shown,
            listener.getsockname()[1],
        )
        if server.host not in LOOPBACK:
            log.warning("other machines can reach this server, and it does not encrypt: put it behind a proxy with TLS")
        signal.signal(signal.SIGTERM, _end)  # uvicorn raises the signal again once answers on their way have ended
        sys.setswitchinterval(SWITCH)
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        log.info("stopped")
    finally:
        listener.close()
        for answerer in answerers.values():
            answerer.close()


def _end(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _listen(host: str, port: int) -> socket.socket:
    """Taken before any model loads."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # an address is taken by listening: two servers may be bound to it
    except OSError as error:
        listener.close()
        raise UserError(f"chat.server.host={host} chat.server.port={port} cannot be listened on: {error.strerror}") from error
    return listener


def _names(checkpoint: str, other: str | None) -> dict[str, str]:
    """What clients call the checkpoints by: the last parts of their paths that differ."""
    paths = {path: Path(path).resolve() for path in (checkpoint, other) if path is not None}
    if other is not None and len(set(paths.values())) == 1:
        raise UserError("chat.compare and checkpoint are the same: there is nothing to compare")
    for depth in range(1, 1 + max(len(path.parts) for path in paths.values())):
        names = {"/".join(path.parts[-depth:]): given for given, path in paths.items()}
        if len(names) == len(paths):
            return names
    raise AssertionError("different paths differ somewhere")


def _votes(kind: Any, name: str) -> Any:
    try:
        return kind(Path(name))
    except OSError as error:
        raise UserError(f"chat.server.votes={name} cannot be written: {error.strerror}") from error
