"""The server: OpenAI's endpoints, health and metrics, and a page to chat and to compare two checkpoints.

Knows HTTP and who may ask; what an answer is stands in `answerer`, what a request may say in `protocol`.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable
from importlib.resources import files
from typing import Any
from weakref import WeakSet

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from rlhf.config import UserError
from rlhf.inference.service import Drawn
from rlhf.serving.answerer import Answerer, Piece, Speech
from rlhf.serving.compare import Comparisons
from rlhf.serving.conversation import Message
from rlhf.serving.protocol import Asked, ChatAsked, CompareAsked, Envelope, Refused, TextAsked, Vote, parse
from rlhf.settings import LOOPBACK, ReplyConfig, ServerConfig

Endpoint = Callable[[Request], Any]


class Mail:
    """Carries tokens from the threads that draw them to the server's. Those of one step go together: to wake the server for each of them
    would cost more than to draw them."""

    def __init__(self) -> None:
        self.letters: deque[tuple[asyncio.Queue[Drawn], Drawn]] = deque()
        self.on_its_way = False
        self.loop: asyncio.AbstractEventLoop | None = None

    def box(self, heard: asyncio.Queue[Drawn]) -> Callable[[Drawn], None]:
        """Where the tokens of one answer are to be dropped, from any thread. Called in the server's."""
        self.loop = asyncio.get_running_loop()

        def drop(drawn: Drawn) -> None:
            self.letters.append((heard, drawn))
            if not self.on_its_way and self.loop is not None:
                self.on_its_way = True
                try:
                    self.loop.call_soon_threadsafe(self._bring)
                except RuntimeError:  # the server has ended, maybe just now, and nobody listens: no reason for the model's thread to break
                    self.on_its_way = False

        return drop

    def _bring(self) -> None:
        self.on_its_way = False  # before the first letter: what is dropped from now on calls again
        while self.letters:
            heard, drawn = self.letters.popleft()
            heard.put_nowait(drawn)


class Answering:
    """One answer to one client, cut at the texts that stop it. Nothing is asked of the model before somebody listens, and nothing is left
    of it once he goes away."""

    def __init__(
        self, answerer: Answerer, ids: tuple[int, ...], options: ReplyConfig, stops: list[str], *, mail: Mail, pause: float, turn: bool
    ) -> None:
        """
        Args:
            mail: from the thread of the answerer to the server's.
            pause: seconds between two pieces at least.
            turn: the answer is a turn of a conversation, so that blanks before its first word are the chat format's.
        """
        self.answerer, self.ids, self.options, self.stops, self.mail = answerer, ids, options, stops, mail
        self.pause, self.turn = pause, turn
        self.asked = False
        """Whether the model has been."""

    async def pieces(self) -> AsyncGenerator[Piece]:
        """What has come since the last piece is one piece. To send each token alone would cost more than to draw it, and what takes the
        server's time takes the model's: both are threads of one Python.

        Raises:
            Refused: before the first piece: the model has stopped answering.
        """
        heard = asyncio.Queue[Drawn]()
        speech, held, begun, ended = Speech(self.answerer.tokenizer), "", False, False
        keep = max(map(len, self.stops), default=1) - 1
        self.asked = True
        try:
            ticket = self.answerer.submit(self.ids, self.options, self.mail.box(heard))
        except RuntimeError as error:
            raise _stopped() from error
        due = 0.0
        try:
            while not ended:
                drawn = [await heard.get()]
                if (early := due - time.monotonic()) > 0 and drawn[0].end is None:
                    await asyncio.sleep(early)
                drawn += [heard.get_nowait() for _ in range(heard.qsize())]
                due = time.monotonic() + self.pause
                piece = speech.hear(*drawn)
                held += piece.text
                ended = piece.end is not None
                if self.turn and not begun:
                    held = held.lstrip()
                    begun = bool(held)
                cuts = [at for stop in self.stops if (at := held.find(stop)) >= 0]
                if cuts:
                    yield Piece(held[: min(cuts)], "stop", piece.tokens)
                    return
                out = len(held) if ended else max(0, len(held) - keep)
                if out or ended:
                    yield Piece(held[:out], piece.end, piece.tokens)
                held = held[out:]
        finally:
            if not ended:
                self.answerer.worker.service.cancel(ticket)


class Server:
    """The endpoints over some checkpoints, by the names that clients call them by."""

    def __init__(
        self, answerers: dict[str, Answerer], options: ReplyConfig, settings: ServerConfig, comparisons: Comparisons | None
    ) -> None:
        self.answerers, self.options, self.settings, self.comparisons = answerers, options, settings, comparisons
        self.counts: Counter[str] = Counter()
        self.mail = Mail()
        self.begun: WeakSet[Answering] = WeakSet()
        """Answers that a client is about to hear, or hears; one that went away before leaves nothing."""

    def app(self) -> Starlette:
        routes = [
            Route("/v1/chat/completions", self.guarded(self.chat), methods=["POST"]),
            Route("/v1/completions", self.guarded(self.complete), methods=["POST"]),
            Route("/v1/models", self.guarded(self.models)),
            Route("/metrics", self.guarded(self.metrics)),
            Route("/compare", self.guarded(self.compare), methods=["POST"]),
            Route("/compare/{id}/vote", self.guarded(self.vote), methods=["POST"]),
            Route("/health", self.health),
            Route("/", self.page),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: _plain_refusal, Exception: _failure})

    # --- who may ask, and how much ---

    def guarded(self, endpoint: Endpoint) -> Endpoint:
        async def ask(request: Request) -> Response:
            self.counts["requests"] += 1
            try:
                self._admit(request)
                return await endpoint(request)
            except Refused as refusal:
                self.counts["refused"] += 1
                return JSONResponse(refusal.body(), status_code=refusal.status)

        return ask

    def _admit(self, request: Request) -> None:
        """
        Raises:
            Refused: the token is missing or wrong; without a token, the request was not addressed to this machine by its own name
                (a web page elsewhere could send it through the user's browser).
        """
        if self.settings.token is not None:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not secrets.compare_digest(given.encode(), self.settings.token.encode()):
                raise Refused(401, "the token is missing or wrong: send it as `Authorization: Bearer TOKEN`", code="invalid_api_key")
        elif request.url.hostname not in LOOPBACK:
            raise Refused(403, f"this server has no token, so that it answers to {', '.join(LOOPBACK)} only", code="forbidden_host")
        if request.method == "POST" and request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "the body must be JSON: send `Content-Type: application/json`")

    async def _body(self, request: Request) -> bytes:
        most, body = self.settings.body_kb * 1024, b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                raise Refused(413, f"the body is larger than {self.settings.body_kb} KB (chat.server.body_kb)")
        return body

    def _answerer(self, name: str) -> Answerer:
        if name not in self.answerers:
            raise Refused(404, f"there is no model {name!r}: there are {', '.join(self.answerers)}", field="model", code="model_not_found")
        return self.answerers[name]

    def _begin(self, answerer: Answerer, ids: tuple[int, ...], options: ReplyConfig, stops: list[str], *, turn: bool) -> Answering:
        service = answerer.worker.service
        coming = sum(one.answerer is answerer and not one.asked for one in self.begun)
        if len(service.waiting) + coming >= self.settings.queue + len(service.free):
            raise Refused(429, f"{self.settings.queue} requests wait already: try again later", code="overloaded")
        if len(ids) >= answerer.context:
            said = f"the prompt has {len(ids)} tokens, and the context holds {answerer.context} with the answer: shorten it"
            raise Refused(400, said, field="messages", code="context_length_exceeded")
        if answerer.worker.service.closed:
            raise _stopped()
        answering = Answering(answerer, ids, options, stops, mail=self.mail, pause=self.settings.pause_ms / 1000, turn=turn)
        self.begun.add(answering)
        return answering

    # --- answers ---

    async def chat(self, request: Request) -> Response:
        asked = parse(ChatAsked, await self._body(request))
        answerer = self._answerer(asked.model)
        roles = {"developer": "system"}
        messages: list[Message] = [{"role": roles.get(said.role, said.role), "content": said.text} for said in asked.messages]
        try:
            ids = await asyncio.to_thread(answerer.template.ids, messages)
        except UserError as error:
            raise Refused(400, str(error), field="messages") from error
        return await self._answer(request, asked, answerer, tuple(ids), Envelope(chat=True, model=asked.model))

    async def complete(self, request: Request) -> Response:
        asked = parse(TextAsked, await self._body(request))
        answerer = self._answerer(asked.model)
        ids = await asyncio.to_thread(answerer.text_ids, asked.prompt)
        return await self._answer(request, asked, answerer, tuple(ids), Envelope(chat=False, model=asked.model))

    def _options(self, asked: Asked) -> ReplyConfig:
        """What the request says, and the server's settings where it says nothing."""
        named = {
            "temperature": asked.temperature,
            "top_k": asked.top_k,
            "top_p": asked.top_p,
            "max_new_tokens": asked.most,
            "seed": asked.seed,
        }
        plain = {name: getattr(self.options, name) for name in named}
        return ReplyConfig(**(plain | {name: value for name, value in named.items() if value is not None}))

    async def _answer(self, request: Request, asked: Asked, answerer: Answerer, ids: tuple[int, ...], envelope: Envelope) -> Response:
        answering = self._begin(answerer, ids, self._options(asked), asked.stops, turn=envelope.chat)
        if asked.stream:
            counts = asked.stream_options is not None and asked.stream_options.include_usage
            events = self._events(answering, envelope, prompt=len(ids), counts=counts)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        text, last = "", None
        pieces = answering.pieces()
        gone = asyncio.create_task(_gone(request))
        try:
            while last is None or last.end is None:
                coming = asyncio.ensure_future(anext(pieces))
                await asyncio.wait((coming, gone), return_when=asyncio.FIRST_COMPLETED)
                if not coming.done():
                    coming.cancel()
                    await asyncio.gather(coming, return_exceptions=True)
                    return Response(status_code=499)  # nobody hears it
                last = coming.result()
                text += last.text
        finally:
            gone.cancel()
            await pieces.aclose()
        if last.end == "failed":
            raise Refused(500, "the model failed while it answered: see the server's log")
        self.counts["tokens"] += last.tokens
        return JSONResponse(envelope.whole(text, str(last.end), prompt=len(ids), answer=last.tokens))

    async def _events(self, answering: Answering, envelope: Envelope, *, prompt: int, counts: bool) -> AsyncGenerator[str]:
        pieces, first, tokens = answering.pieces(), True, 0
        try:
            async for piece in pieces:
                self.counts["tokens"] += piece.tokens - tokens
                tokens = piece.tokens
                if piece.end == "failed":
                    yield _event(Refused(500, "the model failed while it answered: see the server's log").body())
                    return
                yield _event(envelope.piece(piece.text, piece.end, first=first))
                first = False
            if counts:
                yield _event(envelope.counts(prompt=prompt, answer=tokens))
            yield "data: [DONE]\n\n"
        except Refused as refusal:  # too late for a status
            yield _event(refusal.body())
        finally:
            await pieces.aclose()

    # --- two answers, and a vote ---

    async def compare(self, request: Request) -> Response:
        if self.comparisons is None:
            raise Refused(404, "there is one checkpoint only: start the server with chat.compare=DIR")
        asked = parse(CompareAsked, await self._body(request))
        begun: dict[str, Answering] = {}
        for name in self.comparisons.models:
            answerer = self.answerers[name]
            try:
                prompt = answerer.prompt([{"role": "user", "content": asked.prompt}], self.options)
            except UserError as error:
                raise Refused(400, str(error), field="prompt") from error
            if prompt.notice is not None:  # a vote on answers to the prompt's end would become a pair with all of it
                raise Refused(400, f"{prompt.notice}: shorten the prompt", field="prompt", code="context_length_exceeded")
            begun[name] = self._begin(answerer, prompt.ids, self.options, [], turn=True)
        pair = self.comparisons.open(asked.prompt)
        answers = {side: begun[name] for side, name in pair.sides.items()}
        return StreamingResponse(self._duel(pair.id, answers), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def _duel(self, pair: str, answers: dict[str, Answering]) -> AsyncGenerator[str]:
        """Both answers as they come. Only once both are whole may one vote."""
        assert self.comparisons is not None
        said: dict[str, str] = dict.fromkeys(answers, "")
        heard: asyncio.Queue[tuple[str, Piece]] = asyncio.Queue()

        async def listen(side: str, answering: Answering) -> None:
            try:
                async for piece in answering.pieces():
                    await heard.put((side, piece))
            except Refused:  # the model broke before it began
                await heard.put((side, Piece("", "failed", 0)))

        tasks = [asyncio.create_task(listen(side, answering)) for side, answering in answers.items()]
        try:
            yield _event({"id": pair})
            open_sides = set(answers)
            while open_sides:
                side, piece = await heard.get()
                said[side] += piece.text
                yield _event({"side": side, "text": piece.text, "end": piece.end})
                if piece.end == "failed":
                    return  # there is nothing to vote on
                if piece.end is not None:
                    open_sides.discard(side)
            self.comparisons.answered(pair, said)
            yield _event({"ready": True})
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def vote(self, request: Request) -> Response:
        if self.comparisons is None:
            raise Refused(404, "there is one checkpoint only: start the server with chat.compare=DIR")
        vote = parse(Vote, await self._body(request))
        try:
            verdict = await asyncio.to_thread(self.comparisons.vote, request.path_params["id"], vote.choice)
        except KeyError as error:
            raise Refused(404, "there is no such pair of answers, or it has been voted on") from error
        except OSError as error:
            raise Refused(
                507, f"the vote could not be written ({error.strerror}); earlier votes are kept, and this one can be cast again"
            ) from error
        self.counts["votes"] += 1
        return JSONResponse(verdict)

    # --- the rest ---

    async def models(self, request: Request) -> Response:
        cards = [{"id": name, "object": "model", "created": 0, "owned_by": "rlhf"} for name in self.answerers]
        return JSONResponse({"object": "list", "data": cards})

    async def health(self, request: Request) -> Response:
        broken = [name for name, answerer in self.answerers.items() if answerer.worker.service.closed]
        return JSONResponse({"status": "failed" if broken else "ok", "models": list(self.answerers)}, status_code=503 if broken else 200)

    async def metrics(self, request: Request) -> Response:
        """In Prometheus's text format."""
        lines = [f"rlhf_{name}_total {self.counts[name]}" for name in ("requests", "refused", "tokens", "votes")]
        for name, answerer in self.answerers.items():
            service = answerer.worker.service
            for what, count in (("active", len(service.active)), ("waiting", len(service.waiting)), ("slots", service.slots)):
                lines.append(f"rlhf_{what}{{model={json.dumps(name)}}} {count}")
        return PlainTextResponse("\n".join(lines) + "\n")

    async def page(self, request: Request) -> Response:
        text = files("rlhf.serving").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-store"})


POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
"""The page loads nothing from elsewhere and talks to this server only."""


def _stopped() -> Refused:
    return Refused(503, "the model has stopped answering: see the server's log")


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _gone(request: Request) -> None:
    """Returns when the client has hung up. The body has been read, so that nothing else can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _plain_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = {404: f"there is nothing at {request.url.path}", 405: f"{request.url.path} does not take {request.method}"}
    return JSONResponse(Refused(error.status_code, said.get(error.status_code, str(error.detail))).body(), status_code=error.status_code)


async def _failure(request: Request, error: Exception) -> Response:
    return JSONResponse(Refused(500, "the server failed: see its log").body(), status_code=500)
