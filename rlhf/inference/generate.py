"""Answers many prompts through a fixed number of slots: finished sequences leave, waiting prompts take their place.

Knows the order of work and the clock; the network is the decoder's, the draw is the ops'. M prompts of at most P tokens, n = M x samples
sequences, A answer tokens at most, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf.inference.arena import Arena, make_arena
from rlhf.inference.decoder import Decoder
from rlhf.inference.graphs import Steps
from rlhf.inference.sampling import Sampling
from rlhf.inference.slots import Slots, cache_specs
from rlhf.inference.timing import PhaseTimer

CHECK_EVERY = 4
"""Steps between two looks at which sequences have ended, on a GPU: the host never waits for the step that runs."""

REFILL = 4
"""Waiting prompts go in once one slot in so many is free: a prefill of few prompts costs its launches, not its arithmetic."""


def upload(values: list[int] | list[list[int]] | Tensor, device: torch.device) -> Tensor:
    """Integers from the host, int64. From ordinary memory the copy would wait for all work of the GPU, and the GPU then for the host."""
    tensor = torch.as_tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@dataclass
class Answers:
    """What was drawn for n sequences."""

    tokens: Tensor  # (n, A) int64, pad_id behind the answer
    logprobs: Tensor  # (n, A) fp32, 0 behind the answer
    counts: Tensor  # (n,) int64


@dataclass
class Waiting:
    """One sequence to answer."""

    sequence: int
    prompt: int
    limit: int


@dataclass
class Glance:
    """Which slots had ended at some step, on its way to the host."""

    finished: Tensor  # (S + 1,) bool, pinned
    owners: dict[int, int]
    """Slot -> the sequence that was in it."""
    event: torch.cuda.Event | None = None


class Generator:
    """One per run: owns the cache, the slots and the captured steps."""

    def __init__(
        self, decoder: Decoder, sampling: Sampling, *, slots: int, tokens: int, new_tokens: int, prefill_tokens: int, graphs: bool,
        dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        """
        Args:
            tokens: prompt and answer tokens that the cache holds for a sequence.
            new_tokens: answer tokens of a sequence at most.
            prefill_tokens: of one prefill pass, padding included; a longer prompt goes alone.
        """
        self.decoder, self.sampling, self.device = decoder, sampling, device
        self.slots, self.tokens, self.new_tokens, self.prefill_tokens = slots, tokens, new_tokens, prefill_tokens
        kv_heads = decoder.shape.kv_heads // decoder.parallel.size
        specs = cache_specs(
            slots=slots, tokens=tokens, layers=decoder.shape.layers, kv_heads=kv_heads, head_dim=decoder.shape.head_dim, dtype=dtype
        )
        self.cache: Arena = make_arena(specs, device)
        self.state = Slots.empty(slots, new_tokens, device)
        self.steps = Steps(self._step, slots, graphs=graphs)
        self.timer = PhaseTimer(device)
        self.prefilled = 0
        """Prompt tokens read in the last call, padding included."""
        self.decoded = 0
        """Steps of the last call."""

    def _step(self, size: int) -> None:
        rows = self.state.rows[:size]
        logits = self.decoder.step(self.cache.tensors["keys"], self.cache.tensors["values"], self.state, rows)
        self.decoder.ops.draw(logits, self.state, rows, self.sampling)

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], *, samples: int, limits: list[int], sequences: list[int], seed: int) -> Answers:
        """Answers prompts: finished sequences leave their slots, and waiting ones take them.

        Args:
            prompts: token ids of M prompts, without padding.
            samples: answers for each prompt; sequence s * M + i answers prompt i.
            limits: answer tokens of each sequence at most, each at most A.
            sequences: the number that each sequence draws its random numbers by.
            seed: of the rollout.
        """
        m = len(prompts)
        order = sorted(range(m), key=lambda i: -len(prompts[i]))
        queue = [Waiting(s * m + i, i, limits[s * m + i]) for i in order for s in range(samples)]
        self._numbers, self._lengths = sequences, [len(ids) for ids in prompts]
        self._prompts = upload(pad_sequence([torch.tensor(ids) for ids in prompts], batch_first=True), self.device)  # (M, P)
        self._reset(seed)
        out = Answers(
            tokens=torch.full((m * samples, self.new_tokens), self.sampling.pad_id, device=self.device),
            logprobs=torch.zeros(m * samples, self.new_tokens, device=self.device),
            counts=torch.zeros(m * samples, dtype=torch.int64, device=self.device),
        )
        self._serve(queue, out)
        behind = torch.arange(self.new_tokens, device=self.device) >= out.counts[:, None]
        out.tokens.masked_fill_(behind, self.sampling.pad_id)
        out.logprobs.masked_fill_(behind, 0.0)
        return out

    def _reset(self, seed: int) -> None:
        self.state.seed.fill_(seed)
        self.state.finished.fill_(True)
        self.state.lengths.zero_()
        self.state.rows.fill_(self.slots)
        self._placed: list[int] = []
        self.prefilled = self.decoded = 0
        self.timer.reset()

    def _serve(self, queue: list[Waiting], out: Answers) -> None:
        free = list(range(self.slots))
        active: dict[int, Waiting] = {}  # by slot
        drawn: dict[int, int] = {}  # answer tokens of each active slot, were it not to stop
        glances: list[Glance] = []
        enough = max(1, self.slots // REFILL)
        while queue or active:
            if queue and (not active or len(free) >= min(enough, len(queue))):
                with self.timer("prefill"):
                    self._refill(queue, free, active, drawn)
            self._harvest([slot for slot, row in active.items() if drawn[slot] >= row.limit], free, active, out)
            if not active:
                continue
            with self.timer("decode"):
                width = self._place(list(active))
                left = min(row.limit - drawn[slot] for slot, row in active.items())
                count = min(left, CHECK_EVERY) if self.device.type == "cuda" else 1
                for _ in range(count):
                    self.steps.run(width)
                self.decoded += count
            drawn = {slot: drawn[slot] + count for slot in active}
            glances.append(self._glance(active))
            if self.device.type != "cuda" or len(glances) > 1:
                self._harvest(self._ended(glances.pop(0), active), free, active, out)

    def _place(self, slots: list[int]) -> int:
        """Makes these slots the first rows of a step, the others idle; returns the size of the step."""
        width = self.steps.width(len(slots))
        if self.steps.missing(width):
            self.state.rows.fill_(self.slots)  # capturing runs a step, which must touch no sequence
            self.steps.capture(width)
        elif slots == self._placed:
            return width
        self.state.rows[:width] = upload(slots + [self.slots] * (width - len(slots)), self.device)
        self._placed = slots
        return width

    def _glance(self, active: dict[int, Waiting]) -> Glance:
        owners = {slot: row.sequence for slot, row in active.items()}
        if self.device.type != "cuda":
            return Glance(self.state.finished, owners)
        finished = torch.empty(self.slots + 1, dtype=torch.bool, pin_memory=True)
        finished.copy_(self.state.finished, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return Glance(finished, owners, event)

    def _ended(self, glance: Glance, active: dict[int, Waiting]) -> list[int]:
        """Slots that had ended and still hold the sequence they held then."""
        if glance.event is not None:
            glance.event.synchronize()
        finished = glance.finished.tolist()
        return [slot for slot, row in active.items() if finished[slot] and glance.owners.get(slot) == row.sequence]

    def _harvest(self, slots: list[int], free: list[int], active: dict[int, Waiting], out: Answers) -> None:
        """Takes the answers out of these slots and frees them."""
        if not slots:
            return
        at, rows = upload([slots, [active.pop(slot).sequence for slot in slots]], self.device)
        out.tokens[rows], out.logprobs[rows] = self.state.answers[at], self.state.logprobs[at]
        out.counts[rows] = self.state.counts[at]
        free += slots

    def _refill(self, queue: list[Waiting], free: list[int], active: dict[int, Waiting], drawn: dict[int, int]) -> None:
        """Prefills as many waiting sequences as there are free slots, in passes of at most `prefill_tokens`."""
        while queue and free:
            width = self._lengths[queue[0].prompt]  # the longest that waits
            most = max(1, self.prefill_tokens // max(1, width))
            taken: list[Waiting] = []
            chosen: dict[int, int] = {}  # prompt -> its row in this pass
            while queue and len(taken) < len(free) and (queue[0].prompt in chosen or len(chosen) < most):
                row = queue.pop(0)
                chosen.setdefault(row.prompt, len(chosen))
                taken.append(row)
            slots = [free.pop(0) for _ in taken]
            self._prefill(list(chosen), [chosen[row.prompt] for row in taken], taken, slots)
            active |= dict(zip(slots, taken, strict=True))
            drawn |= dict.fromkeys(slots, 1)

    def _prefill(self, prompts: list[int], prompt_rows: list[int], taken: list[Waiting], slots: list[int]) -> None:
        """One pass over some prompts, and the first token of each sequence that answers one of them."""
        state = self.state
        limits, numbers = [row.limit for row in taken], [self._numbers[row.sequence] for row in taken]
        at, which, limits_at, numbers_at = upload([slots, prompt_rows, limits, numbers], self.device)  # (n,) each
        rows, lengths = upload([prompts, [self._lengths[i] for i in prompts]], self.device)  # (M',) each
        ids = self._prompts[rows, : self._lengths[prompts[0]]]  # (M', P'), the longest first
        keys, values = self.cache.tensors["keys"], self.cache.tensors["values"]
        logits = self.decoder.prefill(ids, lengths, keys, values, at, which)  # (M', V)
        self.prefilled += ids.numel()
        state.lengths[at] = lengths[which] - 1  # drawing counts the token that the logits came from
        state.counts[at] = 0
        state.limits[at] = limits_at
        state.sequences[at] = numbers_at
        state.finished[at] = False
        self.decoder.ops.draw(logits[which], state, at, self.sampling)
