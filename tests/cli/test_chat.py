"""`rlhf chat` as a person meets it: line by line in the process, and once in a real terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from checkpoints import WORDS, save_policy, save_reward

from rlhf.cli.main import main

GREEDY = ("chat.reply.temperature=0", "chat.reply.max_new_tokens=6")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save_policy(folder / "export" / "actor")
    save_reward(folder / "export" / "reward")
    return folder


@pytest.fixture
def chat(run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Types lines into a chat; returns what was said between one and the next, the greeting first."""

    def run(*lines: str | BaseException, words: tuple[str, ...] = ()) -> list[str]:
        waiting: Iterator[Any] = iter(lines)
        heard: list[str] = []

        def answer(prompt: str = "") -> str:
            heard.append(capsys.readouterr().out.strip())
            line = next(waiting, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", answer)
        assert main(["chat", f"checkpoint={run_dir}", *GREEDY, *words]) == 0
        return heard

    return run


def test_turns_go_on_from_each_other_and_are_taken_back(chat: Callable[..., list[str]]) -> None:
    greeting, first, second, undone, again, cleared, anew, nothing = chat(
        "name four fruits", "what is red?", "/undo", "what is red?", "/clear", "name four fruits", "/nothing"
    )
    assert "96 tokens of context" in greeting
    assert undone == "Taken back; 2 messages are left."
    assert again == second and anew == first, "greedy: the same conversation has the same reply"
    assert cleared == "The conversation is forgotten."
    assert nothing.startswith("error: /nothing: no such command")


def test_a_reward_stands_beside_each_reply(chat: Callable[..., list[str]], run_dir: Path) -> None:
    said = chat("name four fruits", "what is red?", words=(f"chat.reward={run_dir}",))
    scores = [re.search(r"\[reward (-?\d+\.\d{3})\]", text) for text in said[1:]]
    assert all(scores) and scores[0].group(1) != scores[1].group(1)  # type: ignore[union-attr]


def test_settings_change_the_next_reply(chat: Callable[..., list[str]]) -> None:
    said = chat(
        "/set",
        "/set max_new_tokens=1",
        "name",
        "/set seed=3",
        "/set temperature=2",
        "name",
        "/clear",
        "name",
        "/set top_p=2",
        "/set topp=1",
        "/set top_p=[",
        "/set top_p=high",
    )
    assert said[1] == "temperature=0.0  top_k=0  top_p=0.95  max_new_tokens=6  seed=null"
    assert said[3].endswith("[cut at 1 tokens]")
    assert said[9] == "error: chat.reply.top_p must lie in (0, 1], got 2.0"
    assert said[10].startswith("error: topp: no such setting (did you mean 'top_p'?)")
    assert said[11:] == ["error: '[' is no value: write a number, or null", "error: chat.reply.top_p: expected float, got 'high'"]


def test_a_conversation_is_saved_once(chat: Callable[..., list[str]], tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    said = chat("/save", "name four fruits", f"/save {file}", f"/save {file}", f"/save {tmp_path}/no/where.json")
    assert said[1] == "error: name a file: /save conversation.json"
    assert said[3] == f"Wrote {file}."
    assert "is there already" in said[4] and "cannot be written: No such file or directory" in said[5]
    saved = json.loads(file.read_text())
    assert [message["role"] for message in saved["messages"]] == ["user", "assistant"]
    assert saved["messages"][0]["content"] == "name four fruits" and saved["reply"]["max_new_tokens"] == 6
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]


def test_a_format_without_a_system_turn_says_so(chat: Callable[..., list[str]]) -> None:
    said = chat("/system be brief", "name four fruits", "/help", "/quit")
    assert "refuses this conversation" in said[1]
    assert not said[2].startswith("error"), "the message was not kept"
    assert all(command in said[3] for command in ("/clear", "/undo", "/set", "/save", "/system", "/quit"))


def test_ctrl_c_at_the_prompt_ends_nothing(chat: Callable[..., list[str]]) -> None:
    said = chat(KeyboardInterrupt(), "name four fruits")
    assert len(said) == 3 and said[2]


def test_an_old_conversation_makes_room(chat: Callable[..., list[str]]) -> None:
    said = chat(*["what is red and what is a plum?"] * 8)
    assert "do not fit into the context and are left out" in said[-1] and "do not fit" not in said[1]


def test_what_is_wrong_is_refused(run_dir: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert refused("chat").startswith("checkpoint is not set: name a run directory")
    assert refused("chat", f"checkpoint={tmp_path}").startswith(f"checkpoint={tmp_path} holds no model")
    assert refused("chat", f"checkpoint={run_dir}", "chat.reply.temperature=-1") == "chat.reply.temperature must lie in [0, 10], got -1.0"
    assert "chat.context=4096 is more than the 96 positions" in refused("chat", f"checkpoint={run_dir}", "chat.context=4096")
    assert refused("chat", f"checkpoint={run_dir}", "chat.server.port=9").startswith("chat.server.port=9 is for the server, and this is")
    assert refused("chat", "chekpoint=x").startswith("chekpoint: no such key (did you mean 'checkpoint'?)")


class Screen:
    """A terminal with `rlhf chat` in it."""

    def __init__(self, *words: str, home: Path) -> None:
        self.master, slave = pty.openpty()
        environment = os.environ | {"XDG_STATE_HOME": str(home), "TERM": "xterm", "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rlhf", "chat", *words], stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
        )
        os.close(slave)
        self.seen = ""

    def wait_for(self, text: str, seconds: float = 120) -> str:
        """What came since the last call, up to and with `text`."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < deadline, f"{text!r} did not come; there was {self.seen!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                self.seen += os.read(self.master, 4096).decode(errors="replace")
        found, _, self.seen = self.seen.partition(text)
        return found + text

    def type(self, line: str) -> None:
        os.write(self.master, (line + "\n").encode())


@pytest.mark.launch
def test_a_session_in_a_terminal(run_dir: Path, tmp_path: Path) -> None:
    screen = Screen(f"checkpoint={run_dir}", *GREEDY, f"chat.reward={run_dir}", home=tmp_path)
    try:
        screen.wait_for("/help lists what there is")
        screen.wait_for("> ")
        screen.type("name four fruits")
        screen.wait_for("[reward ")
        screen.type("/clear")
        screen.wait_for("The conversation is forgotten.")
        screen.type("what is red?")
        screen.wait_for("[reward ")
        screen.type(f"/save {tmp_path}/talk.json")
        screen.wait_for("Wrote ")
        os.write(screen.master, b"\x1b[A")  # the arrow up brings the last line back
        screen.wait_for("/save")
        screen.type(".again")
        screen.wait_for("talk.json.again")
        screen.type("/quit")
        assert screen.process.wait(timeout=60) == 0
    finally:
        screen.process.kill()
        os.close(screen.master)
    assert len(json.loads((tmp_path / "talk.json").read_text())["messages"]) == 2, "what was cleared is not in it"
    assert "name four fruits" in (tmp_path / "rlhf" / "chat_history").read_text()


def talkative_policy(folder: Path) -> None:
    """A policy whose greedy answer goes on to the last token asked for: some other token's logit is always above the end token's, which is 0."""
    model = save_policy(folder, positions=4096, tokenizer=WORDS)
    with torch.no_grad():
        model.get_output_embeddings().weight[model.config.eos_token_id] = 0.0
    model.save_pretrained(folder)


@pytest.mark.launch
def test_a_server_that_is_told_to_stop_finishes_its_answers(tmp_path: Path) -> None:
    talkative_policy(tmp_path / "model")
    words = (f"checkpoint={tmp_path}/model", "chat.serve=true", "chat.server.port=0", f"chat.server.votes={tmp_path}/votes.jsonl")
    process = subprocess.Popen([sys.executable, "-m", "rlhf", "chat", *words], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        address = next(found.group(1) for line in process.stderr if (found := re.search(r"serving model on (http://\S+)", line)))
        body = {"model": "model", "messages": [{"role": "user", "content": "name"}], "stream": True, "max_tokens": 1500, "temperature": 0}
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and '"finish_reason": "length"' in rest[-2] and len(rest) > 3
        assert process.wait(timeout=60) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/health")
    finally:
        process.kill()
        process.wait()


def test_a_server_needs_its_libraries(run_dir: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert (
        refused("chat", f"checkpoint={run_dir}", "chat.serve=true")
        == "chat.serve=true needs uvicorn: pip install -e '.[serve]' in the checkout"
    )


def test_a_server_that_cannot_be_is_refused(run_dir: Path, refused: Callable[..., str]) -> None:
    base = ("chat", f"checkpoint={run_dir}", "chat.serve=true")
    assert refused(*base, "chat.server.host=0.0.0.0").startswith("chat.server.host=0.0.0.0 can be reached from other machines")
    assert refused(*base, f"chat.compare={run_dir}/") == "chat.compare and checkpoint are the same: there is nothing to compare"
    assert refused(*base, f"chat.reward={run_dir}").endswith("add chat.compare=DIR")
    assert refused(*base, "chat.compare=nowhere").startswith("chat.compare=nowhere holds no model")
    assert refused(
        *base, f"chat.compare={run_dir}/export/actor", f"chat.server.votes={run_dir}/export/actor/config.json/votes.jsonl"
    ).startswith("chat.server.votes=")
    assert refused("chat", f"checkpoint={run_dir}", "chat.compare=x") == "chat.compare is for the server's page: add chat.serve=true"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert refused(*base, f"chat.server.port={port}").endswith("cannot be listened on: Address already in use")
