"""Answers requests as they come: each joins the batch that runs, at the next step, and leaves it when it ends.

Knows slots, threads and the order of work; knows no text and no network protocol. Requests have their own sampling, so that, unlike in a
rollout, settings are tensors with an entry a slot. S slots, B rows of a step, V vocabulary.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf.inference.arena import make_arena
from rlhf.inference.decoder import Decoder
from rlhf.inference.generate import REFILL, upload
from rlhf.inference.graphs import Steps
from rlhf.inference.reference import record
from rlhf.inference.sampling import Sampling, choose_each, uniforms
from rlhf.inference.slots import Slots, cache_specs
from rlhf.logging import log

End = Literal["stop", "length", "cancelled", "failed"]

Draw = Literal["greedy", "sampled", "filtered"]
"""What a step must be able to do for its requests: each costs more than the one before, the last one a sort of the vocabulary."""

GATHER = 0.01
"""Seconds that a request may wait for others while answers are drawn: each pass over prompts stops all answers for about as long."""
QUIET, PATIENCE = 0.004, 0.05
"""While no answer is drawn: seconds without another request until those that wait are let in, and seconds after which they are in any case.
A pass over prompts is hundreds of small calls, each of which lets go of Python: beside a thread that takes requests it lasts several times as long."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and how it is to be answered."""

    prompt: tuple[int, ...]
    limit: int
    """Tokens of the answer at most; prompt and answer have to fit into the cache."""
    temperature: float
    """0: the most likely token."""
    top_k: int
    """0: off."""
    top_p: float
    """1: off."""
    seed: int
    """The same request with the same seed gets the same answer, whatever else is answered beside it."""


@dataclass(frozen=True)
class Drawn:
    """One more token of an answer, or its end."""

    token: int | None
    """None: the answer ended otherwise than by a token (cancelled, failed)."""
    logprob: float
    """Under the request's temperature, before top k and top p."""
    end: End | None


Deliver = Callable[[Drawn], None]
"""Called for every token in the thread that runs the steps: it must be quick and must not raise."""


class Ticket:
    """A request on its way. Its slot is the service's business."""

    def __init__(self, request: Request, deliver: Deliver) -> None:
        self.request, self.deliver = request, deliver
        self.cancelled = False
        self.since = time.monotonic()
        self.steps = 0
        """That were begun for it; each draws a token."""


@dataclass(frozen=True)
class Begun:
    """A step that the device runs or has run, and that nobody has heard of yet."""

    rows: list[tuple[int, Ticket]]
    """Slot and request of each."""
    drawn: Tensor  # (B, 3) on the host
    ready: torch.cuda.Event | None
    """Passed once `drawn` is there."""


class Service:
    """Owns the cache and the slots of one decoder. `submit` and `cancel` may come from any thread, `step` from one."""

    def __init__(
        self, decoder: Decoder, *, slots: int, tokens: int, stop_ids: tuple[int, ...], pad_id: int, prefill_tokens: int = 8192, graphs: bool,
    ) -> None:  # fmt: skip
        """
        Args:
            tokens: prompt and answer tokens that the cache holds for a request.
            prefill_tokens: of one prefill pass, padding included; a longer prompt goes alone.
            graphs: on a GPU, steps are captured and replayed. All are captured here, so that no request waits for it.
        """
        embedding = decoder.weights.tensors["0.embed.weight"]
        self.decoder, self.slots, self.tokens, self.prefill_tokens, self.device = decoder, slots, tokens, prefill_tokens, embedding.device
        shape = decoder.shape
        self.cache = make_arena(
            cache_specs(
                slots=slots, tokens=tokens, layers=shape.layers, kv_heads=shape.kv_heads, head_dim=shape.head_dim, dtype=embedding.dtype
            ),
            self.device,
        )
        self.cache.map()
        self.state = Slots.empty(slots, tokens, self.device)
        self.sampling = Sampling(temperature=0.0, top_k=0, top_p=1.0, min_new_tokens=0, stop_ids=stop_ids, pad_id=pad_id)
        """Of steps in which no request is sampled; what it says of stopping holds for all."""
        self.temperature = torch.zeros(slots + 1, device=self.device)
        self.top_k = torch.zeros(slots + 1, dtype=torch.int64, device=self.device)
        self.top_p = torch.ones(slots + 1, device=self.device)
        self.seeds = torch.zeros(slots + 1, dtype=torch.int64, device=self.device)
        self.drawn = torch.zeros(slots, 3, dtype=torch.float64, device=self.device)
        """What the last step drew for each of its rows, in one tensor that is fetched at once: token, log-probability, whether the answer ended."""
        self.fetched = [torch.zeros(slots, 3, dtype=torch.float64, pin_memory=self.device.type == "cuda") for _ in range(2)]
        """`drawn` on the host, for one step and the one before in turn."""
        self.ahead = self.device.type == "cuda"
        """A step begins before the last one's tokens are delivered, so that the device does not wait for Python. On a CPU it would only come later."""
        self.begun: Begun | None = None
        self.placed: list[int] = []
        """The slot of each row of a step."""
        captures = graphs and self.device.type == "cuda"
        self.steps = {draw: Steps(partial(self._decode, draw=draw), slots, graphs=captures) for draw in get_args(Draw)}
        self.state.rows.fill_(slots)  # capturing runs a step, which must touch no request
        for steps in self.steps.values():
            for size in steps.sizes if captures else ():
                steps.capture(size)
        self.waiting: deque[Ticket] = deque()
        self.active: dict[int, Ticket] = {}
        """Slot -> what is answered in it. Only the stepping thread touches it."""
        self.free = list(range(slots))
        self.changed = threading.Condition()
        self.closed = False
        """Nothing more is taken: whoever ran the steps has ended, or ends once what is on its way is answered. Set under `changed`."""
        if captures:  # what reads prompts is compiled at its first use, which took 2.3 s on an H100
            nobody = Request(prompt=(0,) * min(64, tokens - 1), limit=1, temperature=0.0, top_k=0, top_p=1.0, seed=0)
            self.submit(nobody, lambda drawn: None)
            self.step()

    # --- from any thread ---

    def submit(self, request: Request, deliver: Deliver) -> Ticket:
        """Lets a request join at the next step.

        Raises:
            ValueError: the prompt is empty, or prompt and answer do not fit into the cache.
            RuntimeError: nothing more is taken, so that nobody would ever answer.
        """
        if not request.prompt or request.limit < 1:
            raise ValueError("a request needs at least one token of a prompt and one of an answer")
        if len(request.prompt) + request.limit > self.tokens:
            raise ValueError(f"{len(request.prompt)} tokens of a prompt and {request.limit} of an answer do not fit into {self.tokens}")
        ticket = Ticket(request, deliver)
        with self.changed:
            if self.closed:
                raise RuntimeError("the service is closed: nothing more is answered")
            self.waiting.append(ticket)
            self.changed.notify_all()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """The answer ends with the next step, and its slot is free. Does nothing to one that has ended."""
        with self.changed:
            ticket.cancelled = True
            self.changed.notify_all()

    @property
    def busy(self) -> bool:
        """Whether a request is waiting or being answered."""
        return bool(self.waiting or self.active or self.begun)

    @property
    def coming(self) -> bool:
        """Whether requests wait that should go on waiting, because nothing is answered yet and others come right behind them."""
        if self.active or self.begun or self.closed or not 0 < len(self.waiting) < self.slots:
            return False
        now = time.monotonic()
        return now - self.waiting[-1].since < QUIET and now - self.waiting[0].since < PATIENCE

    # --- the stepping thread ---

    @torch.no_grad()
    def step(self) -> bool:
        """Lets in what waits, as far as there is room, and draws one token of every answer. False: there was nothing to do."""
        self._drop_cancelled()
        taken = self._take()
        if taken:
            self._deliver_begun()
            self._prefill(taken)
        rows = [(slot, ticket) for slot, ticket in self.active.items() if slot not in taken and ticket.steps < ticket.request.limit]
        begun = self._begin(rows) if rows else None
        heard = self._deliver_begun()
        self.begun = begun
        if not self.ahead:
            self._deliver_begun()
        return bool(taken or rows or heard)

    def fail(self) -> None:
        """Ends everything that is answered or waits; nothing more is taken."""
        self.begun = None
        with self.changed:
            self.closed = True
            waiting, self.waiting = list(self.waiting), deque()
        for ticket in [*self.active.values(), *waiting]:
            try:
                ticket.deliver(Drawn(None, 0.0, "failed"))
            except Exception as error:  # maybe what broke the step: the others hear of it all the same
                log.error("a request could not be told that it failed", exc_info=error)
        for slot in list(self.active):
            self._release(slot)

    def release(self) -> None:
        """Gives back the cache, the copied weights and the captured steps. Nothing may be on its way or come any more."""
        for steps in self.steps.values():
            steps.drop()
        self.cache.close()
        self.decoder.weights.close()

    def _drop_cancelled(self) -> None:
        with self.changed:
            gone = [ticket for ticket in self.waiting if ticket.cancelled]
            self.waiting = deque(ticket for ticket in self.waiting if not ticket.cancelled)
        for slot, ticket in list(self.active.items()):
            if ticket.cancelled:
                gone.append(ticket)
                self._release(slot)
        for ticket in gone:
            ticket.deliver(Drawn(None, 0.0, "cancelled"))

    def _take(self) -> dict[int, Ticket]:
        """Slot -> waiting request of one prefill pass; they are active from now on."""
        taken: dict[int, Ticket] = {}
        widest = 0
        with self.changed:
            if self.active and not self._enough_wait():
                return taken
            while self.waiting and self.free:
                widest = max(widest, len(self.waiting[0].request.prompt))
                if taken and widest * (len(taken) + 1) > self.prefill_tokens:
                    break
                taken[self.free.pop(0)] = self.waiting.popleft()
            self.active |= taken  # at once: whatever breaks or ends now, they hear of it
        return taken

    def _enough_wait(self) -> bool:
        """Whether it is time to let requests in, with answers under way that have to stop for it."""
        enough = max(1, min(len(self.free), self.slots // REFILL))
        return len(self.waiting) >= enough or (bool(self.waiting) and time.monotonic() - self.waiting[0].since >= GATHER)

    def _prefill(self, taken: dict[int, Ticket]) -> None:
        """Reads the prompts and draws the first token of each answer."""
        requests = [ticket.request for ticket in taken.values()]
        lengths = [len(request.prompt) for request in requests]
        at, sizes, limits, top_k, seeds = upload(
            [list(taken), lengths, [r.limit for r in requests], [r.top_k for r in requests], [r.seed & 0x7FFFFFFF for r in requests]],
            self.device,
        )  # (n,) each
        ids = upload(pad_sequence([torch.tensor(r.prompt) for r in requests], batch_first=True), self.device)  # (n, P)
        keys, values = self.cache.tensors["keys"], self.cache.tensors["values"]
        logits = self.decoder.prefill(ids, sizes, keys, values, at, torch.arange(len(taken), device=self.device))  # (n, V)
        state = self.state
        state.lengths[at] = sizes - 1  # drawing counts the token that the logits came from
        state.counts[at] = 0
        state.limits[at] = limits
        state.finished[at] = False
        self.top_k[at], self.seeds[at] = top_k, seeds
        self.temperature[at] = torch.tensor([r.temperature for r in requests], dtype=torch.float32, device=self.device)
        self.top_p[at] = torch.tensor([r.top_p for r in requests], dtype=torch.float32, device=self.device)
        drawn = self._draw(logits, at, _needed(requests))
        for ticket in taken.values():
            ticket.steps = 1
        self._deliver(drawn, list(taken.items()))

    def _begin(self, rows: list[tuple[int, Ticket]]) -> Begun:
        """Sends a step of these slots to the device, and what it draws to the host."""
        slots = [slot for slot, _ in rows]
        steps = self.steps[_needed([ticket.request for _, ticket in rows])]
        steps.run(self._place(slots, steps))
        for _, ticket in rows:
            ticket.steps += 1
        self.fetched.reverse()
        drawn = self.fetched[0][: len(rows)]
        drawn.copy_(self.drawn[: len(rows)], non_blocking=True)
        ready = torch.cuda.Event() if self.device.type == "cuda" else None
        if ready is not None:
            ready.record()
        return Begun(rows, drawn, ready)

    def _deliver_begun(self) -> bool:
        """Waits for the step that was begun last, if its tokens have not been delivered."""
        begun, self.begun = self.begun, None
        if begun is None:
            return False
        if begun.ready is not None:
            begun.ready.synchronize()
        self._deliver(begun.drawn, begun.rows)
        return True

    def _decode(self, size: int, *, draw: Draw) -> None:
        rows = self.state.rows[:size]
        logits = self.decoder.step(self.cache.tensors["keys"], self.cache.tensors["values"], self.state, rows)
        self.drawn[:size] = self._draw(logits, rows, draw)

    def _place(self, slots: list[int], steps: Steps) -> int:
        """Makes these slots the first rows of a step, the others idle; returns the size of the step."""
        width = steps.width(len(slots))
        wanted = slots + [self.slots] * (width - len(slots))
        if wanted != self.placed:
            self.state.rows[:width] = upload(wanted, self.device)
            self.placed = wanted
        return width

    def _draw(self, logits: Tensor, rows: Tensor, draw: Draw) -> Tensor:
        """(B, V), slots (B,) -> (B, 3) as `drawn`. One more token of each of these slots; nothing here waits for the GPU."""
        if draw == "greedy":
            self.decoder.ops.draw(logits, self.state, rows, self.sampling)
        else:
            uniform = uniforms(self.seeds[rows], torch.zeros_like(rows), self.state.counts[rows])
            filters = (self.top_k[rows], self.top_p[rows]) if draw == "filtered" else ()
            tokens, logprobs = choose_each(logits, uniform, self.temperature[rows], *filters)
            record(tokens, logprobs, self.state, rows, self.sampling)
        state = self.state
        drawn = (state.tokens[rows], state.logprobs[rows, state.counts[rows] - 1], state.finished[rows])  # of an idle row: anything
        return torch.stack([column.double() for column in drawn], dim=1)

    def _deliver(self, drawn: Tensor, rows: list[tuple[int, Ticket]]) -> None:  # (B, 3)
        for (slot, ticket), (number, logprob, ended) in zip(rows, drawn.tolist(), strict=True):
            if self.active.get(slot) is not ticket:
                continue  # it ended or was cancelled after this step had begun
            token = int(number)
            end: End | None = None
            if ended:
                end = "stop" if token in self.sampling.stop_ids else "length"
                self._release(slot)
            ticket.deliver(Drawn(token, logprob, end))

    def _release(self, slot: int) -> None:
        del self.active[slot]
        self.free.append(slot)


def _needed(requests: list[Request]) -> Draw:
    """What a step for all of them must be able to do."""
    sampled = [request for request in requests if request.temperature > 0]
    if any(request.top_k > 0 or request.top_p < 1 for request in sampled):
        return "filtered"
    return "sampled" if sampled else "greedy"


class Worker(threading.Thread):
    """Runs a service's steps in the background until `close`."""

    def __init__(self, service: Service) -> None:
        super().__init__(name="inference", daemon=True)
        self.service = service
        self.closing = False
        self.error: BaseException | None = None
        """What ended it, if it was not `close`."""

    def run(self) -> None:
        """The thread's work: `start` calls it. A failed step fails every request, and `error` says why."""
        service = self.service
        try:
            while True:
                with service.changed:
                    service.changed.wait_for(lambda: service.busy or self.closing)
                    if self.closing and not service.busy:
                        return
                    while service.coming:
                        service.changed.wait(QUIET)
                service.step()
        except BaseException as error:
            self.error = error
            log.error("a step of the model failed, and every request with it", exc_info=error)
            service.fail()

    def close(self, timeout: float | None = None) -> None:
        """Takes nothing more, answers what is on its way, then ends. After `timeout` seconds what is left is cut off."""
        with self.service.changed:
            self.closing = self.service.closed = True
            self.service.changed.notify_all()
        self.join(timeout)
        if self.is_alive():
            with self.service.changed:  # none is on its way from one to the other
                for ticket in [*self.service.active.values(), *self.service.waiting]:
                    self.service.cancel(ticket)
            self.join()
