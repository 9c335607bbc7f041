"""A checkpoint that answers conversations, many at once, piece by piece.

Knows tokens, text and the service that draws them; knows no terminal and no network.
"""

from __future__ import annotations

import gc
import queue
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf.config import UserError
from rlhf.data.tokenizer import encode_prompts
from rlhf.inference.build import decoder_of
from rlhf.inference.families import FAMILIES, UnsupportedFamily
from rlhf.inference.service import Drawn, End, Request, Service, Ticket, Worker
from rlhf.models.answering import load_policy
from rlhf.models.source import find_export
from rlhf.serving.conversation import ChatTemplate, Message, Prompt, TextStream
from rlhf.settings import ReplyConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LONGEST = 4096
"""Tokens of a context where neither model nor user says less: the cache is allocated for all of it."""
COLDEST = 1e-3
"""A lower temperature is 0: nothing but the likeliest token is ever drawn, and logits divided by it leave what numbers can hold."""
LARGEST_K = 2**31 - 1
"""Of top k, which no vocabulary reaches."""


@dataclass(frozen=True)
class Piece:
    """A part of a reply. The last one has an end."""

    text: str
    end: End | None
    tokens: int
    """Drawn so far, the end of the turn among them."""


class Speech:
    """From what is drawn to what is said."""

    def __init__(self, tokenizer: Any) -> None:
        self.text, self.tokens = TextStream(tokenizer), 0

    def hear(self, *drawn: Drawn) -> Piece:
        """One piece of all that was drawn. Its text is empty where there is no whole letter yet."""
        tokens = [one.token for one in drawn if one.token is not None]
        self.tokens += len(tokens)
        text, end = self.text.push(*tokens), drawn[-1].end
        return Piece(text if end is None else text + self.text.rest(), end, self.tokens)


class Reply:
    """One reply on its way: iterate over its pieces, once."""

    def __init__(self, answerer: Answerer, prompt: Prompt, options: ReplyConfig) -> None:
        self.prompt, self.answerer = prompt, answerer
        self.drawn: queue.SimpleQueue[Drawn] = queue.SimpleQueue()
        self.ticket: Ticket = answerer.submit(prompt.ids, options, self.drawn.put)

    def __iter__(self) -> Iterator[Piece]:
        speech = Speech(self.answerer.tokenizer)
        while True:
            piece = speech.hear(self.drawn.get())
            yield piece
            if piece.end is not None:
                return

    def cancel(self) -> None:
        """Asks for no more: the last piece comes with its end."""
        self.answerer.worker.service.cancel(self.ticket)


class Answerer:
    """One checkpoint in memory, and the thread that runs it."""

    def __init__(self, checkpoint: str, *, context: int | None, slots: int, device: str, dtype: str, key: str = "checkpoint") -> None:
        """
        Args:
            checkpoint: a run directory or a folder in HF layout.
            key: what the user named it by, for messages.
            context: tokens of prompt and answer; None: what the model has positions for, at most `LONGEST`.
            slots: conversations answered at once.

        Raises:
            UserError: there is no such checkpoint, nothing here can run it, or it does not fit.
        """
        self.folder = export_of(checkpoint, key)
        self.device = _device(device)
        self.dtype = DTYPES.get(dtype, torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        try:
            service = self._service(key, checkpoint, context, slots)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{key}={checkpoint} does not fit on the GPU with a cache of {slots} conversations: {str(error).splitlines()[0]}; lower "
                "chat.context or chat.server.slots, or set chat.device=cpu"
            ) from error
        self.worker = Worker(service)
        self.worker.start()

    def _service(self, key: str, checkpoint: str, context: int | None, slots: int) -> Service:
        model, self.tokenizer = load_policy(self.folder, device=self.device, dtype=self.dtype)
        self.template = ChatTemplate(self.tokenizer)
        self.context = _context(model.config, context)
        try:
            decoder = decoder_of(model, tokens=self.context)
        except UnsupportedFamily as error:
            raise UserError(f"{key}={checkpoint} cannot be chatted with: {error}; there are {', '.join(FAMILIES)}") from error
        stop_ids = _stop_ids(model, self.tokenizer)
        del model  # of weights that the decoder holds in another layout, one copy is enough
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the cache is not PyTorch's allocator's
        return Service(decoder, slots=slots, tokens=self.context, stop_ids=stop_ids, pad_id=self.tokenizer.pad_token_id or 0, graphs=True)

    def room(self, options: ReplyConfig) -> int:
        """Tokens that are kept free for a reply: what is asked for, but never more than half of the context."""
        return min(options.max_new_tokens, self.context // 2)

    def prompt(self, messages: list[Message], options: ReplyConfig) -> Prompt:
        """A conversation as it goes to the model, with room for a whole reply.

        Raises:
            UserError: the chat format refuses it.
        """
        return self.template.fit(messages, self.context - self.room(options))

    def text_ids(self, text: str) -> list[int]:
        """Plain text to go on from, without a chat format."""
        return encode_prompts(self.tokenizer, [text])[0]

    def reply(self, messages: list[Message], options: ReplyConfig) -> Reply:
        """Begins to answer a conversation. Errors as `prompt`."""
        return Reply(self, self.prompt(messages, options), options)

    def submit(self, ids: tuple[int, ...], options: ReplyConfig, deliver: Any) -> Ticket:
        """Asks for the tokens of a reply to a prompt.

        Raises:
            RuntimeError: the thread has ended, or is about to.
            ValueError: it does not fit.
        """
        request = Request(
            prompt=ids, limit=min(options.max_new_tokens, self.context - len(ids)), top_p=options.top_p,
            temperature=options.temperature if options.temperature >= COLDEST else 0.0, top_k=min(options.top_k, LARGEST_K),
            seed=random.getrandbits(31) if options.seed is None else options.seed,
        )  # fmt: skip
        try:
            return self.worker.service.submit(request, deliver)
        except RuntimeError as closed:
            raise RuntimeError("the model has stopped answering") from (self.worker.error or closed)

    def close(self, timeout: float | None = 0.0) -> None:
        """Ends the thread and gives the memory back. What is on its way is cut off after `timeout` seconds; None waits for it."""
        self.worker.close(timeout)
        if self.worker.error is None:  # a device that broke gives nothing back
            self.worker.service.release()


def export_of(checkpoint: str, key: str) -> Path:
    """The folder in HF layout that a key names.

    Raises:
        UserError: there is none.
    """
    otherwise = f"{key}={checkpoint} holds no model: give a run directory or a folder in HF layout"
    return find_export(checkpoint, "actor", key=key, otherwise=otherwise)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("chat.device=cuda, but no CUDA device is visible: use chat.device=cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _context(config: Any, asked: int | None) -> int:
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    window = getattr(config, "sliding_window", None)
    limits = [limit for limit in (most, window) if limit]
    if asked is not None and most is not None and asked > most:
        raise UserError(f"chat.context={asked} is more than the {most} positions of the model: lower it")
    return asked or min([LONGEST, *limits])


def _stop_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The end of a turn as the tokenizer has it, and whatever else the model's generation settings name."""
    named = getattr(model.generation_config, "eos_token_id", None)
    more = named if isinstance(named, list) else [named]
    return tuple(dict.fromkeys(i for i in (tokenizer.eos_token_id, *more) if i is not None))
