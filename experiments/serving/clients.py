"""Clients of the server that cost it as little as can be: each has a connection of its own, some of them share a process.

One process for all would measure itself: what 32 streams cost in Python takes as long as what the server takes to write them.
"""

from __future__ import annotations

import http.client
import json
import multiprocessing
import threading
import time
from multiprocessing.connection import Connection
from urllib.parse import urlsplit

PER_PROCESS = 4


def speeds(address: str, body: dict[str, object], *, clients: int, tokens: int, rounds: int) -> list[float]:
    """Tokens a second that all clients together get, a number for each round. In a round all ask at once.

    Raises:
        SystemExit: answers had fewer than `tokens` tokens, or a client failed.
    """
    context = multiprocessing.get_context("spawn")
    shares = [min(PER_PROCESS, clients - first) for first in range(0, clients, PER_PROCESS)]
    pipes = [context.Pipe() for _ in shares]
    processes = [
        context.Process(target=_crowd, args=(theirs, address, json.dumps(body), share), daemon=True)
        for (_, theirs), share in zip(pipes, shares, strict=True)
    ]
    for process in processes:
        process.start()
    try:
        for ours, _ in pipes:
            ours.recv()  # it is ready to ask
        found = []
        for _ in range(rounds):
            began = time.perf_counter()
            for ours, _ in pipes:
                ours.send("ask")
            counts = [count for ours, _ in pipes for count in ours.recv()]
            found.append(sum(counts) / (time.perf_counter() - began))
            if min(counts) < tokens:
                raise SystemExit(f"an answer has {min(counts)} tokens instead of {tokens}: answers that end early cannot be compared")
        return found
    finally:
        for process in processes:
            process.terminate()


def _crowd(pipe: Connection, address: str, body: str, clients: int) -> None:
    """A process with some clients: for every word that comes all of them ask, and how many tokens each got goes back."""
    connections = [http.client.HTTPConnection(urlsplit(address).netloc, timeout=600) for _ in range(clients)]
    counts = [0] * clients
    pipe.send("ready")
    while pipe.recv():
        threads = [threading.Thread(target=_ask, args=(connection, body, counts, i)) for i, connection in enumerate(connections)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        pipe.send(list(counts))


def _ask(connection: http.client.HTTPConnection, body: str, counts: list[int], index: int) -> None:
    """One streamed answer; its number of tokens, as the server counts them, goes into `counts`. 0: it failed."""
    counts[index] = 0
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    heard = b""
    while piece := answer.read1(1 << 16):
        heard += piece
    events = [event.removeprefix(b"data: ") for event in heard.split(b"\n\n") if event.startswith(b"data: {")]
    counts[index] = json.loads(events[-1])["usage"]["completion_tokens"]
