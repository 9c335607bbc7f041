"""The server as its clients meet it: OpenAI's own client, many at once, some that hang up, and some that should not have come."""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from checkpoints import WORDS, save_policy, save_reward
from openai import OpenAI
from servers import PLAIN, SOME_WORDS, alone, loaded, questions, serving, settings

from rlhf.serving.answerer import Answerer
from rlhf.serving.app import Server
from rlhf.serving.compare import Comparisons
from rlhf.serving.judge import Judge
from rlhf.serving.protocol import Refused
from rlhf.serving.votes import Votes

TOKEN = "a long secret"


@pytest.fixture(scope="module")
def answerers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Answerer]]:
    yield from loaded(tmp_path_factory.mktemp("models"), "before", "after", slots=8)


@pytest.fixture(scope="module")
def url(answerers: dict[str, Answerer]) -> Iterator[str]:
    with serving(Server(answerers, PLAIN, settings(), None)) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)


def idle(answerer: Answerer) -> bool:
    """Nothing is answered any more, within some seconds."""
    service, deadline = answerer.worker.service, time.monotonic() + 10
    while service.busy and time.monotonic() < deadline:
        time.sleep(0.02)
    return not service.busy and len(service.free) == service.slots


def test_openais_client_completes_and_streams(client: OpenAI, answerers: dict[str, Answerer]) -> None:
    asked: Any = [{"role": "user", "content": "name four fruits"}]
    expected = alone(answerers["after"], "name four fruits")
    whole = client.chat.completions.create(model="after", messages=asked)
    assert whole.choices[0].message.content == expected and whole.choices[0].finish_reason in ("stop", "length")
    assert whole.usage is not None and whole.usage.completion_tokens <= 16 and whole.usage.prompt_tokens > 3
    pieces = list(client.chat.completions.create(model="after", messages=asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == expected
    assert pieces[0].choices[0].delta.role == "assistant" and pieces[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert pieces[-1].usage == whole.usage
    assert len(pieces) > 3, "it came in pieces"
    text = client.completions.create(model="after", prompt=" Human: name four fruits Assistant:")
    assert text.choices[0].text.lstrip() == expected, "the same prompt, formatted by hand"
    assert [model.id for model in client.models.list()] == ["before", "after"]


def test_settings_of_a_request_count(client: OpenAI, answerers: dict[str, Answerer]) -> None:
    asked: Any = [{"role": "user", "content": "what is red?"}]

    def say(**changes: Any) -> str:
        return client.chat.completions.create(model="before", messages=asked, **changes).choices[0].message.content or ""

    whole = say()
    assert say(max_tokens=3) == alone(answerers["before"], "what is red?", 3) != whole
    assert say(max_completion_tokens=3) == say(max_tokens=3)
    assert say(temperature=1.5, seed=5) == say(temperature=1.5, seed=5)
    assert len({say(temperature=1.5, seed=seed) for seed in range(4)}) > 1
    stop = whole[4:6]
    assert say(stop=stop) == whole[: whole.index(stop)]
    cut = client.chat.completions.create(model="before", messages=asked, stop=["\x00never", stop], stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in cut) == whole[: whole.index(stop)], "no piece of it slipped out"
    assert idle(answerers["before"])


def test_sixty_four_at_once_get_what_each_would_get_alone(client: OpenAI, answerers: dict[str, Answerer]) -> None:
    drawn = random.Random(0)
    asked = [" ".join(drawn.choices(SOME_WORDS, k=1 + i % 9)) for i in range(64)]
    expected = [alone(answerers["after"], question) for question in asked]

    def ask(question: str) -> str:
        stream = client.chat.completions.create(model="after", messages=[{"role": "user", "content": question}], stream=True)
        return "".join(piece.choices[0].delta.content or "" for piece in stream)

    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(ask, asked)) == expected
    assert len(set(expected)) > 4 and idle(answerers["after"])


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_hang_up_free_their_places(
    url: str, answerers: dict[str, Answerer], stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    answerer = answerers["after"]
    service = answerer.worker.service
    step = service.step
    monkeypatch.setattr(service, "step", lambda: (time.sleep(0.05), step())[1])  # or the answers end before anybody can hang up
    body = {"model": "after", "messages": [{"role": "user", "content": "name"}], "stream": stream, "max_tokens": 60, "temperature": 2}
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    host, port = url.removeprefix("http://").split(":")
    clients = [socket.create_connection((host, int(port))) for _ in range(16)]
    for one in clients:
        one.sendall(head.encode() + content)
    deadline = time.monotonic() + 10
    while len(service.active) < service.slots and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(service.active) == service.slots and service.waiting, "8 are answered, 8 wait"
    for one in clients:
        one.close()
    began = time.monotonic()
    assert idle(answerer)
    assert time.monotonic() - began < 2, "they were cut off: to the end it would take 6 seconds"
    monkeypatch.undo()
    assert alone(answerer, "name four fruits")


ASKED = {"model": "after", "messages": [{"role": "user", "content": "name"}]}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BAD: list[tuple[str, Any, int, str]] = [
    (CHAT, b"{not json", 400, "the body is not JSON"),
    (CHAT, {"model": "after"}, 400, "messages: Field required"),
    (CHAT, {"messages": ASKED["messages"]}, 400, "model: Field required"),
    (CHAT, ASKED | {"messages": []}, 400, "messages: List should have at least 1 item"),
    (CHAT, ASKED | {"messages": "hello"}, 400, "messages: Input should be a valid"),
    (CHAT, ASKED | {"messages": [{"role": "king", "content": "x"}]}, 400, "messages.0.role: Input should be"),
    (CHAT, ASKED | {"messages": [{"role": "system", "content": "x"}]}, 400, "knows the roles user and assistant"),
    (CHAT, ASKED | {"messages": [{"role": "user", "content": "long " * 200}]}, 400, "the context holds 96 with the answer"),
    (CHAT, ASKED | {"messages": [{"role": "user", "content": "x" * 2**20}]}, 413, "the body is larger than 64 KB"),
    (CHAT, ASKED | {"messages": [{"role": "user", "content": "x", "name": "ann"}]}, 400, "messages.0.name is not supported here"),
    (CHAT, ASKED | {"temperature": -1}, 400, "temperature: Input should be greater than or equal to 0"),
    (CHAT, ASKED | {"temperature": "hot"}, 400, "temperature: Input should be a valid number"),
    (CHAT, ASKED | {"top_p": 0}, 400, "top_p: Input should be greater than 0"),
    (CHAT, ASKED | {"max_tokens": 0}, 400, "max_tokens: Input should be greater than or equal to 1"),
    (CHAT, ASKED | {"n": 2}, 400, "n: Input should be 1"),
    (CHAT, ASKED | {"logprobs": True}, 400, "logprobs is not supported here: leave it out"),
    (CHAT, ASKED | {"stop": ["a", ""]}, 400, "stop must be up to four texts"),
    (CHAT, ASKED | {"model": "gpt-5"}, 404, "there is no model 'gpt-5': there are before, after"),
    (CHAT, ASKED | {"model": "../../etc/passwd"}, 404, "there is no model '../../etc/passwd'"),
    (TEXT, {"model": "after", "prompt": ""}, 400, "prompt: String should have at least 1 character"),
    (TEXT, {"model": "after", "prompt": ["a"]}, 400, "prompt: Input should be a valid string"),
    ("/compare", {"prompt": "name"}, 404, "there is one checkpoint only"),
    ("/compare/..%2f..%2fetc/vote", {"choice": "a"}, 404, "there is"),
    ("/v1/embeddings", {}, 404, "there is nothing at /v1/embeddings"),
    ("/../../etc/passwd", {}, 404, "there is nothing at"),
    ("/health", {}, 405, "/health does not take POST"),
]


@pytest.mark.parametrize(("path", "body", "status", "said"), BAD)
def test_a_bad_request_gets_one_clear_sentence(url: str, path: str, body: Any, status: int, said: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.post(url + path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    message = answer.json()["error"]["message"]
    assert said in message and "\n" not in message and "Traceback" not in message


def test_only_json_is_taken_and_only_by_its_own_name(url: str) -> None:
    wrong_kind = httpx.post(f"{url}/v1/chat/completions", content=json.dumps(ASKED), headers={"Content-Type": "text/plain"})
    assert wrong_kind.status_code == 415 and "must be JSON" in wrong_kind.json()["error"]["message"]
    loud = httpx.post(f"{url}/v1/chat/completions", content=json.dumps(ASKED), headers={"Content-Type": "Application/JSON; charset=utf-8"})
    assert loud.status_code == 200
    rebound = httpx.post(f"{url}/v1/chat/completions", json=ASKED, headers={"Host": "evil.example:80"})
    assert rebound.status_code == 403 and "has no token" in rebound.json()["error"]["message"]
    assert "access-control-allow-origin" not in httpx.get(f"{url}/v1/models", headers={"Origin": "https://evil.example"}).headers


def test_a_token_opens_every_door_and_nothing_else_does(answerers: dict[str, Answerer]) -> None:
    with serving(Server(answerers, PLAIN, settings(host="0.0.0.0", token=TOKEN), None)) as url:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN[:-1]}):
            for path in ("/v1/models", "/metrics"):
                refused = httpx.get(url + path, headers=headers)
                assert refused.status_code == 401 and "the token is missing or wrong" in refused.json()["error"]["message"]
        assert httpx.get(f"{url}/health").status_code == 200, "for whatever watches over the server"
        client = OpenAI(base_url=f"{url}/v1", api_key=TOKEN, default_headers={"Host": "models.example"})
        assert [model.id for model in client.models.list()] == ["before", "after"]


def test_an_open_address_needs_a_token() -> None:
    with pytest.raises(ValueError, match=r"^host=0\.0\.0\.0 can be reached from other machines, so token must be set"):
        settings(host="0.0.0.0")
    with pytest.raises(ValueError, match="token must have at least 8 characters"):
        settings(token="short")
    with pytest.raises(ValueError, match="token must be ASCII"):
        settings(token="schlüssel1")


def test_more_than_may_wait_is_refused(answerers: dict[str, Answerer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answerers["after"].worker.service, "free", [])
    with serving(Server(answerers, PLAIN, settings(queue=1), None)) as url:
        service = answerers["after"].worker.service
        waiting = [object()]
        service.waiting.extend(waiting)  # type: ignore[arg-type]
        try:
            answer = httpx.post(f"{url}/v1/chat/completions", json=ASKED)
        finally:
            service.waiting.clear()
        assert answer.status_code == 429 and "1 requests wait already" in answer.json()["error"]["message"]


def test_those_that_come_at_once_count_before_the_model_has_heard_of_them(answerers: dict[str, Answerer]) -> None:
    server, answerer = Server(answerers, PLAIN, settings(queue=2), None), answerers["after"]

    def begin() -> Any:
        return server._begin(answerer, (1, 2), PLAIN, [], turn=True)

    coming = [begin() for _ in range(2 + answerer.worker.service.slots)]
    with pytest.raises(Refused, match="2 requests wait already"):
        begin()
    coming.pop()  # its client has gone away
    assert begin() is not None


def test_a_setting_beyond_what_numbers_hold_harms_nobody(client: OpenAI, answerers: dict[str, Answerer]) -> None:
    """The likeliest token is drawn where nothing else could be."""
    for settings_ in ({"temperature": 1e-40}, {"temperature": 1e-4}, {"extra_body": {"top_k": 10**30}}, {"seed": 10**30}):
        said = client.chat.completions.create(model="after", messages=[{"role": "user", "content": "name four fruits"}], **settings_)  # type: ignore[call-overload]
        if "temperature" in settings_:
            assert said.choices[0].message.content == alone(answerers["after"], "name four fruits")
    assert answerers["after"].worker.error is None


def test_health_and_metrics(url: str) -> None:
    health = httpx.get(f"{url}/health")
    assert health.status_code == 200 and health.json() == {"status": "ok", "models": ["before", "after"]}
    before = dict(line.rsplit(" ", 1) for line in httpx.get(f"{url}/metrics").text.splitlines())
    httpx.post(f"{url}/v1/chat/completions", json=ASKED | {"max_tokens": 2})
    after = dict(line.rsplit(" ", 1) for line in httpx.get(f"{url}/metrics").text.splitlines())
    assert int(after["rlhf_tokens_total"]) - int(before["rlhf_tokens_total"]) in (1, 2)
    assert after['rlhf_active{model="after"}'] == "0" and after['rlhf_slots{model="after"}'] == "8"
    page = httpx.get(url)
    assert page.status_code == 200 and "<!doctype html>" in page.text and "http://" not in page.text and "https://" not in page.text
    assert "connect-src 'self'" in page.headers["content-security-policy"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("late", [False, True], ids=["asked afterwards", "asked just before"])
def test_a_model_that_has_ended_is_an_answer_and_no_wait(stream: bool, late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_policy(tmp_path, tokenizer=WORDS)
    answerer = Answerer(str(tmp_path), context=None, slots=1, device="cpu", dtype="fp32")
    begin = Server._begin

    def ends_in_between(*args: Any, **options: Any) -> Any:
        answering = begin(*args, **options)
        answerer.close()
        return answering

    if late:
        monkeypatch.setattr(Server, "_begin", ends_in_between)
    else:
        answerer.close()
    with serving(Server({"after": answerer}, PLAIN, settings(), None)) as url:
        answer = httpx.post(f"{url}/v1/chat/completions", json=ASKED | {"stream": stream}, timeout=20)
        health = httpx.get(f"{url}/health")
    assert answer.status_code == (200 if late and stream else 503), "a stream has begun by then"
    assert "the model has stopped answering" in answer.text
    assert health.status_code == 503 and health.json()["status"] == "failed"


# --- comparing ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def comparing(answerers: dict[str, Answerer], tmp_path: Path) -> Iterator[tuple[str, Path]]:
    save_reward(tmp_path / "reward", tokenizer=WORDS)
    first = answerers["before"]
    judge = Judge(str(tmp_path / "reward"), device=first.device, dtype=first.dtype)
    comparisons = Comparisons(("before", "after"), Votes(tmp_path / "votes.jsonl"), judge)
    with serving(Server(answerers, PLAIN, settings(), comparisons)) as url:
        yield url, tmp_path / "votes.jsonl"


def compare(url: str, prompt: str) -> tuple[str, dict[str, str]]:
    """The pair's id and both answers."""
    id, said = "", {"a": "", "b": ""}
    with httpx.stream("POST", f"{url}/compare", json={"prompt": prompt}) as answer:
        for line in answer.iter_lines():
            event = json.loads(line.removeprefix("data: ")) if line else {}
            id = event.get("id", id)
            if "side" in event:
                said[event["side"]] += event["text"]
    return id, said


def test_votes_are_pairs_that_name_who_won(comparing: tuple[str, Path], answerers: dict[str, Answerer]) -> None:
    url, file = comparing
    seen = set()
    for i, question in enumerate(questions(answerers, 12)):
        id, said = compare(url, question)
        choice = "ab"[i % 2]
        verdict = httpx.post(f"{url}/compare/{id}/vote", json={"choice": choice}).json()
        for side, model in verdict["models"].items():
            assert said[side] == alone(answerers[model], question)
        seen.add(verdict["models"]["a"])
        row = json.loads(file.read_text().splitlines()[-1])
        assert (row["prompt"], row["chosen"]) == (question, said[choice].strip())
        assert row["chosen_model"] == verdict["models"][choice] and row["chosen_reward"] == verdict["rewards"][choice] is not None
    assert seen == {"before", "after"}, "who comes first is drawn"
    assert len(file.read_text().splitlines()) == 12


def test_a_vote_counts_once_and_a_tie_is_no_pair(comparing: tuple[str, Path]) -> None:
    url, file = comparing
    id, _ = compare(url, "what is red?")
    vote: Callable[[], httpx.Response] = lambda: httpx.post(f"{url}/compare/{id}/vote", json={"choice": "tie"})  # noqa: E731
    assert vote().status_code == 200
    again = vote()
    assert again.status_code == 404 and "it has been voted on" in again.json()["error"]["message"]
    assert file.read_text() == "" and len(file.with_name("votes.others.jsonl").read_text().splitlines()) == 1
    assert httpx.post(f"{url}/compare/{id}/vote", json={"choice": "c"}).status_code == 400
    with httpx.stream("POST", f"{url}/compare", json={"prompt": "what"}) as answer:
        half = json.loads(next(answer.iter_lines()).removeprefix("data: "))["id"]
    assert httpx.post(f"{url}/compare/{half}/vote", json={"choice": "a"}).status_code == 404, "nobody has seen both answers"


def test_a_prompt_that_would_be_cut_is_not_compared(comparing: tuple[str, Path]) -> None:
    url, votes = comparing
    answer = httpx.post(f"{url}/compare", json={"prompt": "plum red " * 300})
    assert answer.status_code == 400 and "do not fit into the context" in answer.json()["error"]["message"]
    assert not votes.read_text()


def test_an_empty_or_equal_answer_makes_no_pair(tmp_path: Path) -> None:
    comparisons = Comparisons(("x", "y"), Votes(tmp_path / "votes.jsonl"), None)
    for answers in ({"a": "plum", "b": " "}, {"a": "plum", "b": "plum "}, {"a": "plum", "b": "pear"}):
        pair = comparisons.open("name")
        comparisons.answered(pair.id, answers)
        comparisons.vote(pair.id, "a")
    assert len((tmp_path / "votes.jsonl").read_text().splitlines()) == 1
    assert len((tmp_path / "votes.others.jsonl").read_text().splitlines()) == 2


def test_a_model_that_breaks_leaves_nothing_to_vote_on(
    comparing: tuple[str, Path], answerers: dict[str, Answerer], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _ = comparing

    def broken(*_: Any) -> Any:
        raise RuntimeError("the model has stopped answering")

    monkeypatch.setattr(answerers["after"], "submit", broken)
    with httpx.stream("POST", f"{url}/compare", json={"prompt": "name"}, timeout=20) as answer:
        events = [json.loads(line.removeprefix("data: ")) for line in answer.iter_lines() if line]
    assert events[-1]["end"] == "failed" and not any("ready" in event for event in events)
    vote = httpx.post(f"{url}/compare/{events[0]['id']}/vote", json={"choice": "a"})
    assert vote.status_code == 404


def test_a_full_disk_loses_no_vote(comparing: tuple[str, Path], answerers: dict[str, Answerer], monkeypatch: pytest.MonkeyPatch) -> None:
    url, file = comparing
    one, two = questions(answerers, 2)
    first, _ = compare(url, one)
    assert httpx.post(f"{url}/compare/{first}/vote", json={"choice": "a"}).status_code == 200
    kept = file.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    second, _ = compare(url, two)
    with monkeypatch.context() as patch:
        patch.setattr("rlhf.serving.votes.os.fsync", full)
        refused = httpx.post(f"{url}/compare/{second}/vote", json={"choice": "b"})
    assert refused.status_code == 507 and "No space left on device" in refused.json()["error"]["message"]
    assert file.read_bytes() == kept, "no half of a line"
    assert httpx.post(f"{url}/compare/{second}/vote", json={"choice": "b"}).status_code == 200, "it can be cast again"
    assert [json.loads(line)["prompt"] for line in file.read_text().splitlines()] == [one, two]


def test_what_a_crash_left_of_a_line_is_put_aside(tmp_path: Path) -> None:
    file = tmp_path / "votes.jsonl"
    file.write_text('{"prompt": "one"}\n{"prompt": "tw')
    Votes(file).add({"prompt": "three"}, pair=True)
    assert [json.loads(line)["prompt"] for line in file.read_text().splitlines()] == ["one", "three"]
    assert (tmp_path / "votes.jsonl.broken").read_text() == '{"prompt": "tw\n'
