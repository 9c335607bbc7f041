"""The server's page in a browser: a chat, and twenty votes by keyboard that a reward model learns from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Tab, binary, chromium
from checkpoints import WORDS, save_reward
from servers import PLAIN, alone, loaded, questions, serving, settings

from rlhf.serving.answerer import Answerer
from rlhf.serving.app import Server
from rlhf.serving.compare import Comparisons
from rlhf.serving.judge import Judge
from rlhf.serving.votes import Votes

pytestmark = pytest.mark.skipif(binary() is None, reason="no Chromium is installed")
TOKEN = "a long secret"


@pytest.fixture(scope="module")
def answerers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Answerer]]:
    yield from loaded(tmp_path_factory.mktemp("models"), "my-sft", "my-ppo", slots=4)


@pytest.fixture
def page(answerers: dict[str, Answerer], tmp_path: Path) -> Iterator[str]:
    """The address of a server that two checkpoints, a reward model and a token stand behind."""
    save_reward(tmp_path / "reward", tokenizer=WORDS)
    first = answerers["my-sft"]
    judge = Judge(str(tmp_path / "reward"), device=first.device, dtype=first.dtype)
    comparisons = Comparisons(("my-sft", "my-ppo"), Votes(tmp_path / "votes.jsonl"), judge)
    with serving(Server(answerers, PLAIN, settings(token=TOKEN), comparisons)) as url:
        yield f"{url}/#token={TOKEN.replace(' ', '%20')}"


def until(tab: Tab, script: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not tab.run(script):
        assert time.monotonic() < deadline, f"{script} did not become true; {tab.complaints}"
        time.sleep(0.05)


def write(tab: Tab, text: str) -> None:
    """Into the line, and Enter."""
    tab.run("document.getElementById('line').focus()")
    tab.call("Input.insertText", text=text)
    tab.press("Enter", 13, "\r")


def test_a_conversation(page: str, answerers: dict[str, Answerer], tmp_path: Path) -> None:
    with chromium(tmp_path / "profile") as tab:
        tab.open(page, width=1280)
        until(tab, "document.querySelectorAll('#model option').length === 2")
        assert "secret" not in tab.run("location.href"), "the token is nothing to leave in the address"
        write(tab, "name four fruits")
        until(tab, "document.getElementById('send').textContent === 'Send' && document.querySelectorAll('.assistant').length === 1")
        shown = tab.run("document.querySelector('.assistant').textContent")
        assert shown == alone(answerers["my-sft"], "name four fruits").strip()
        write(tab, "what is red? " * 12)
        until(tab, "document.getElementById('send').textContent === 'Send' && document.querySelectorAll('.assistant').length === 2")
        write(tab, "name " * 60)
        until(tab, "document.body.textContent.includes('do not fit into the context')")
        tab.run("document.getElementById('clear').click()")
        assert tab.run("document.getElementById('chat').children.length") == 0
        assert all(url.startswith(page.partition("#")[0]) for url in tab.requests)
        assert [one for one in tab.complaints if "400" not in one] == [], "a context that is too long is a 400, which Chromium logs"


@pytest.mark.launch
def test_twenty_votes_by_keyboard_train_a_reward_model(page: str, answerers: dict[str, Answerer], tmp_path: Path) -> None:
    with chromium(tmp_path / "profile") as tab:
        tab.open(page, width=1280)
        until(tab, "document.querySelectorAll('#model option').length === 2")
        tab.run("document.getElementById('tab-compare').click()")
        for i, question in enumerate(questions(answerers, 20)):
            write(tab, question)
            until(tab, "!document.querySelector('#votes button').disabled")
            tab.press("12"[i % 2], 49 + i % 2)
            until(tab, f"document.getElementById('verdict').textContent.startsWith('Vote {i + 1} ')")
        names = tab.run("[...document.querySelectorAll('#answers footer')].map((one) => one.textContent)")
        assert {name.split(",")[0] for name in names} == set(answerers) and all("reward" in name for name in names)
        assert tab.complaints == []
        for width in (1280, 360):
            tab.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500)
            assert tab.run("document.documentElement.scrollWidth <= window.innerWidth")
    rows = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()]
    assert len(rows) == 20 and all(row["prompt"] and row["chosen"] != row["rejected"] for row in rows)
    assert [row["choice"] for row in rows] == ["a", "b"] * 10
    words = (
        "data=votes", f"data.path={tmp_path}/votes.jsonl", "data.max_prompt_tokens=48", "data.max_answer_tokens=48", "model@reward.model=tiny", f"reward.init={tmp_path}/reward", "rm.batch_size=4", "rm.epochs=1",
        "trainer.threads=1", f"run_dir={tmp_path}/run",
    )  # fmt: skip
    environment = os.environ | {"RLHF_CACHE": str(tmp_path / "cache")}
    trained = subprocess.run([sys.executable, "-m", "rlhf", "reward", *words], env=environment, capture_output=True, text=True, check=False)
    assert trained.returncode == 0, trained.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "done"
