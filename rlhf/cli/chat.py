"""The verb `chat`: a conversation with a checkpoint in the terminal, or its server (rlhf/cli/serve.py).

Knows lines and commands; what a conversation is to a model is rlhf/serving's.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from rich.console import Console

from rlhf.cli.rundir import write_atomically
from rlhf.config import UserError, build, nearest
from rlhf.rules import check
from rlhf.serving.answerer import Answerer
from rlhf.serving.conversation import Message
from rlhf.serving.judge import Judge
from rlhf.settings import ReplyConfig

HELP = {
    "/clear": "forget the conversation",
    "/undo": "take back the last question and its reply",
    "/system TEXT": "begin with this message; without a text: with none",
    "/set KEY=VALUE": "temperature, top_k, top_p, max_new_tokens or seed; without a value: show them",
    "/save FILE": "write the conversation as JSON",
    "/help": "this list",
    "/quit": "end, as Ctrl-D does; Ctrl-C stops a reply",
}


def run_chat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Talks until the input ends, or serves until it is told to stop.

    Raises:
        UserError: no checkpoint is named, or it or the reward model cannot be used.
    """
    cfg = build(config)
    check(cfg)
    if cfg.checkpoint is None:
        raise UserError("checkpoint is not set: name a run directory or a folder in HF layout, as in rlhf chat checkpoint=runs/my-ppo")
    chat, done = cfg.chat, {"verb": "chat", "status": "done", "metrics": {}, "seconds": {}}
    if chat.serve:
        from rlhf.cli.serve import run_server

        run_server(cfg)
        return done
    idle = next((word for word in HydraConfig.get().overrides.task if word.lstrip("+").startswith("chat.server.")), None)
    if idle is not None:
        raise UserError(f"{idle} is for the server, and this is the terminal: add chat.serve=true, or leave it out")
    answerer = Answerer(cfg.checkpoint, context=chat.context, slots=1, device=chat.device, dtype=chat.dtype)
    try:
        judge = None if chat.reward is None else Judge(chat.reward, device=answerer.device, dtype=answerer.dtype)
        Terminal(answerer, judge, chat.reply, chat.system).run()
    finally:
        answerer.close()
    return done


class Terminal:
    """One conversation, line by line."""

    def __init__(self, answerer: Answerer, judge: Judge | None, options: ReplyConfig, system: str | None) -> None:
        self.answerer, self.judge, self.options = answerer, judge, options
        self.messages: list[Message] = []
        self.system = system
        self.console = Console(highlight=False, soft_wrap=True)

    # --- the loop ---

    def run(self) -> None:
        self.say(
            f"{self.answerer.folder} on {self.answerer.device.type}, {self.answerer.context} tokens of context. /help lists what there is beside talking."
        )
        if not self.answerer.template.native:
            self.say("This model brings no chat format, so it is spoken to as ` Human: ... Assistant:`.")
        with line_history():
            while (line := self.ask()) is not None:
                try:
                    if not self.obey(line):
                        return
                except UserError as error:
                    self.say(f"error: {error}")

    def ask(self) -> str | None:
        """The next line; None at the end of the input."""
        try:
            return input("> ").encode(errors="replace").decode().strip()  # bytes that are no text come as lone surrogates
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print()
            return ""

    def obey(self, line: str) -> bool:
        """Answers a line or does what it says; False: it was /quit."""
        if not line.startswith("/"):
            if line:
                self.reply(line)
            return True
        word, _, rest = line.partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/clear": self.clear, "/undo": self.undo, "/system": self.set_system, "/set": self.set, "/save": self.save, "/help": self.help,
        }  # fmt: skip
        if word in ("/quit", "/exit"):
            return False
        if word not in commands:
            raise UserError(
                f"{word}: no such command{nearest(word, commands)}; /help lists them, and a line that begins with a blank is no command"
            )
        commands[word](rest.strip())
        return True

    def say(self, text: str) -> None:
        """What is not the model's."""
        self.console.print(text, style="dim", markup=False)

    # --- talking ---

    def conversation(self) -> list[Message]:
        head: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        return head + self.messages

    def reply(self, line: str) -> None:
        """Asks, shows the reply as it comes, and what the reward model thinks of it."""
        asked: Message = {"role": "user", "content": line}
        try:
            reply = self.answerer.reply([*self.conversation(), asked], self.options)
        except RuntimeError as error:
            raise UserError(f"{error}: start the chat again") from error
        if reply.prompt.notice:
            self.say(f"[{reply.prompt.notice}]")
        text, end, tokens = "", None, 0
        pieces = iter(reply)
        while end is None:
            try:
                piece = next(pieces)
                text, end, tokens = text + piece.text, piece.end, piece.tokens
                print(piece.text if len(text) > len(piece.text) else piece.text.lstrip(), end="", flush=True)
            except KeyboardInterrupt:
                reply.cancel()
        print()
        if end == "failed":
            raise UserError(f"the model has stopped answering: {self.answerer.worker.error!r}")
        if end != "stop":
            self.say({"length": f"[cut at {tokens} tokens]", "cancelled": "[stopped]"}[end])
        self.messages += [asked, {"role": "assistant", "content": text.strip()}]
        if self.judge is not None:
            self.say(f"[reward {self.judge.score(self.conversation()):.3f}]")

    # --- commands ---

    def clear(self, _: str) -> None:
        self.messages.clear()
        self.say("The conversation is forgotten.")

    def undo(self, _: str) -> None:
        if not self.messages:
            raise UserError("there is nothing to take back")
        del self.messages[-2:]
        self.say(f"Taken back; {len(self.messages)} messages are left.")

    def set_system(self, text: str) -> None:
        before, self.system = self.system, text or None
        try:
            self.answerer.template.ids([*self.conversation(), {"role": "user", "content": "."}])
        except UserError:
            self.system = before
            raise
        self.say("The conversation begins with this message now." if text else "The conversation begins with no system message now.")

    def set(self, assignment: str) -> None:
        key, equals, value = assignment.partition("=")
        values = dataclasses.asdict(self.options)
        if not equals:
            self.say("  ".join(f"{name}={'null' if value is None else value}" for name, value in values.items()))
            return
        if key not in values:
            raise UserError(f"{key}: no such setting{nearest(key, values)}; there are {', '.join(values)}")
        try:
            given = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"{value!r} is no value: write a number, or null") from error
        target = {"_target_": "rlhf.settings.ReplyConfig", **values, key: given}
        self.options = build(target, "chat.reply")
        self.say(f"{key}={value}")

    def save(self, name: str) -> None:
        if not name:
            raise UserError("name a file: /save conversation.json")
        try:
            file = Path(name).expanduser()
            there = file.exists()
        except (RuntimeError, ValueError) as error:  # no such user; a character that no name has
            raise UserError(f"{name!r} is no file: {error}") from error
        if there:
            raise UserError(f"{file} is there already: choose another name")
        content = {"checkpoint": str(self.answerer.folder), "reply": dataclasses.asdict(self.options), "messages": self.conversation()}
        try:
            write_atomically(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be written: {getattr(error, 'strerror', None) or error}") from error
        self.say(f"Wrote {file}.")

    def help(self, _: str) -> None:
        for command, what in HELP.items():
            self.say(f"  {command:<16} {what}")


class line_history:
    """Arrow keys bring back earlier lines, those of earlier chats too, where the terminal has readline."""

    def __init__(self) -> None:
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        self.file = Path(state) / "rlhf" / "chat_history"

    def __enter__(self) -> None:
        self.readline: Any = None
        if not sys.stdin.isatty():
            return
        try:
            import readline
        except ImportError:
            return
        self.readline = readline
        readline.set_history_length(1000)
        if self.file.is_file():
            readline.read_history_file(self.file)

    def __exit__(self, *_: object) -> None:
        if self.readline is None:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.readline.write_history_file(self.file)
        except OSError:
            pass  # a chat without a place to remember lines is still a chat
