"""Answers of requests that come and go are those of requests alone."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch
from decoders import END, PAD, POSITIONS, greedy_of_transformers, mixed_prompts, noisy_model
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.inference import service as serving
from rlhf.inference.build import decoder_of
from rlhf.inference.families import UnsupportedFamily
from rlhf.inference.sampling import choose, choose_each, filtered
from rlhf.inference.service import Drawn, Request, Service, Worker


def service_of(model: Any, *, slots: int, stop: int | None = END, ahead: bool = False) -> Service:
    stops = () if stop is None else (stop,)
    decoder = decoder_of(model, tokens=POSITIONS)
    service = Service(decoder, slots=slots, tokens=POSITIONS, stop_ids=stops, pad_id=PAD, prefill_tokens=64, graphs=True)
    service.ahead = ahead
    return service


def request(prompt: Any, limit: int = 24, **changes: Any) -> Request:
    plain = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}
    return Request(prompt=tuple(map(int, prompt)), limit=limit, **(plain | changes))


class Heard:
    """What one request was told."""

    def __init__(self) -> None:
        self.drawn: list[Drawn] = []
        self.ended = threading.Event()

    def __call__(self, drawn: Drawn) -> None:
        assert not self.ended.is_set(), "nothing follows the end"
        self.drawn.append(drawn)
        if drawn.end is not None:
            self.ended.set()

    @property
    def tokens(self) -> list[int]:
        return [d.token for d in self.drawn if d.token is not None]

    @property
    def end(self) -> str | None:
        return self.drawn[-1].end


def answer_all(service: Service, requests: list[Request]) -> list[Heard]:
    heard = [Heard() for _ in requests]
    for one, hears in zip(requests, heard, strict=True):
        service.submit(one, hears)
    while service.step():
        pass
    return heard


@pytest.mark.parametrize("ahead", [False, True], ids=["", "ahead"])
@pytest.mark.parametrize("family", ["opt", "llama-gqa", "bloom"])
def test_greedy_answers_are_those_of_transformers_however_they_come(family: str, ahead: bool) -> None:
    """23 requests on 5 slots, coming one by one in between steps."""
    model = noisy_model(family)
    prompts = mixed_prompts([3 + 5 * i % 17 for i in range(23)])
    stop = int(greedy_of_transformers(model, [prompts[0]], end=None, new_tokens=24)[0, 8])  # one that some answers have
    service, order = service_of(model, slots=5, stop=stop, ahead=ahead), random.Random(0)
    heard = [Heard() for _ in prompts]
    for prompt, hears in zip(prompts, heard, strict=True):
        service.submit(request(prompt), hears)
        for _ in range(order.randrange(4)):
            service.step()
    while service.step():
        pass
    for prompt, hears in zip(prompts, heard, strict=True):
        [expected] = greedy_of_transformers(model, [prompt], end=stop, new_tokens=24).tolist()
        length = expected.index(stop) + 1 if stop in expected else 24
        assert hears.tokens == expected[:length]
        assert hears.end == ("stop" if stop in expected else "length")
    assert {hears.end for hears in heard} == {"stop", "length"}, "both are seen"
    assert sorted(service.free) == list(range(5)) and not service.active and not service.busy


def test_a_seed_gives_the_same_answer_beside_other_requests() -> None:
    model = noisy_model("opt")
    prompts = mixed_prompts([4, 9, 6, 11, 5])
    asked = [
        request(p, temperature=0.5 + 0.3 * i, top_k=[0, 5, 0, 3, 0][i], top_p=[1.0, 1.0, 0.7, 0.9, 0.2][i], seed=i)
        for i, p in enumerate(prompts)
    ]
    alone = [answer_all(service_of(model, slots=1, stop=None), [one])[0].tokens for one in asked]
    together = [hears.tokens for hears in answer_all(service_of(model, slots=3, stop=None), asked)]
    assert together == alone
    assert answer_all(service_of(model, slots=1, stop=None), [request(prompts[0], temperature=0.5, seed=9)])[0].tokens != alone[0]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.3, 1.0, 2.0]), st.sampled_from([0, 1, 3, 50]), st.sampled_from([1.0, 0.9, 0.4, 0.01]))
def test_rows_are_drawn_as_a_rollout_draws_them(seed: int, temperature: float, top_k: int, top_p: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, uniform = torch.randn(6, 40, generator=generator) * 3, torch.rand(6, generator=generator)
    candidates = logits if temperature == 0 else filtered(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    tokens, logprobs = choose(logits, candidates, uniform, temperature=temperature)
    each = choose_each(
        logits, uniform, torch.full((6,), temperature), torch.full((6,), top_k), torch.full((6,), top_p, dtype=torch.float32)
    )
    assert torch.equal(each[0], tokens)
    torch.testing.assert_close(each[1], logprobs)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_idles_draws_some_token_whatever_its_logits_are(temperature: float) -> None:
    """On a GPU nothing is computed for it, so that its logits are what was in memory."""
    logits = torch.full((2, 40), torch.nan)
    logits[1] = 0
    uniform, row = torch.rand(2), torch.ones(2)
    for tokens, _ in (
        choose(logits, logits, uniform, temperature=temperature),
        choose_each(logits, uniform, row * temperature, row.long() * 9, row * 0.9),
    ):
        assert ((tokens >= 0) & (tokens < 40)).all()


def test_log_probabilities_are_those_of_a_full_pass() -> None:
    model = noisy_model("qwen2")
    [prompt] = mixed_prompts([7])
    [hears] = answer_all(service_of(model, slots=2, stop=None), [request(prompt, limit=9, temperature=0.8, seed=3)])
    ids = torch.cat([prompt, torch.tensor(hears.tokens)])
    logits = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1].float() / 0.8
    expected = logits.log_softmax(-1).gather(1, torch.tensor(hears.tokens)[:, None]).squeeze(1)
    torch.testing.assert_close(torch.tensor([d.logprob for d in hears.drawn]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("ahead", [False, True], ids=["", "ahead"])
def test_a_cancelled_request_leaves_its_slot_and_the_others_alone(ahead: bool) -> None:
    """The third takes the slot of the first, for which a step may be under way."""
    model = noisy_model("opt")
    first, second, third = mixed_prompts([5, 6, 7])
    service, heard = service_of(model, slots=1, stop=None, ahead=ahead), [Heard(), Heard(), Heard()]
    tickets = [service.submit(request(p), h) for p, h in zip((first, second, third), heard, strict=True)]
    service.step()
    service.step()
    service.cancel(tickets[0])
    service.cancel(tickets[1])  # still waits
    while service.step():
        pass
    assert [h.end for h in heard] == ["cancelled", "cancelled", "length"]
    assert len(heard[0].tokens) == 2 - ahead and heard[1].tokens == []
    assert heard[2].tokens == answer_all(service_of(model, slots=1, stop=None), [request(third)])[0].tokens
    service.cancel(tickets[2])
    assert not service.step() and service.free == [0]


def test_requests_gather_while_an_answer_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of eight slots' worth, or whoever has waited long enough, or as many as there is room for."""
    now = [0.0]
    monkeypatch.setattr(serving.time, "monotonic", lambda: now[0])
    service, prompts = service_of(noisy_model("opt"), slots=8, stop=None), mixed_prompts([5] * 12)

    def busy(after: float, *more: Any) -> int:
        now[0] += after
        for prompt in more:
            service.submit(request(prompt, limit=40), Heard())
        service.step()
        return len(service.active)

    assert busy(0, prompts[0]) == 1, "nobody has to stop for it"
    assert busy(0, prompts[1]) == 1
    assert busy(serving.GATHER / 2) == 1
    assert busy(serving.GATHER) == 2
    assert busy(0, *prompts[2:4]) == 4
    assert busy(0, *prompts[4:7]) == 7
    assert busy(0, *prompts[7:9]) == 8 and len(service.waiting) == 1


def test_an_idle_model_waits_for_requests_that_come_right_behind_others(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(serving.time, "monotonic", lambda: now[0])
    service, prompts = service_of(noisy_model("opt"), slots=32, stop=None), mixed_prompts([5] * 32)
    apart = 0.75 * serving.QUIET

    def come(prompt: Any) -> bool:
        now[0] += apart
        service.submit(request(prompt), Heard())
        return service.coming

    assert not service.coming
    assert come(prompts[0]) and come(prompts[1])
    now[0] += serving.QUIET
    assert not service.coming, "nobody came any more"
    assert come(prompts[2]), "somebody did"
    in_time = [come(prompt) for prompt in prompts[3:31]]
    assert in_time[0] and not in_time[-1], "the first one has waited long enough"
    service.step()
    assert service.active and not come(prompts[31]), "answers under way wait by their own rule"


def test_a_burst_of_requests_is_read_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "QUIET", 0.2)  # a slow machine takes its time to send them
    passes: list[int] = []
    prefill = Service._prefill
    monkeypatch.setattr(Service, "_prefill", lambda self, taken: (passes.append(len(taken)), prefill(self, taken))[1])
    worker = Worker(service_of(noisy_model("opt"), slots=8))
    worker.start()
    for prompt in mixed_prompts([5] * 8):
        worker.service.submit(request(prompt), Heard())
    worker.close()
    assert passes == [8]


def test_what_does_not_fit_is_refused() -> None:
    service = service_of(noisy_model("opt"), slots=1)
    with pytest.raises(ValueError, match="120 tokens of a prompt and 9 of an answer do not fit into 128"):
        service.submit(request(range(4, 124), limit=9), Heard())
    with pytest.raises(ValueError, match="at least one token"):
        service.submit(request([]), Heard())
    with pytest.raises(UnsupportedFamily, match="slides over 32 tokens"):
        decoder_of(noisy_model("mistral", sliding_window=32), tokens=64)


def test_a_worker_serves_many_threads_and_ends_what_is_on_its_way() -> None:
    model = noisy_model("opt")
    prompts = mixed_prompts([3 + i % 9 for i in range(24)])
    expected = [answer_all(service_of(model, slots=1), [request(p)])[0].tokens for p in prompts]
    worker = Worker(service_of(model, slots=4))
    worker.start()
    heard = [Heard() for _ in prompts]

    def ask(i: int) -> None:
        worker.service.submit(request(prompts[i]), heard[i])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    worker.close()
    assert [h.tokens for h in heard] == expected
    assert worker.error is None and not worker.is_alive() and len(worker.service.free) == 4


def test_closing_in_haste_cuts_answers_off() -> None:
    worker = Worker(service_of(noisy_model("opt"), slots=2, stop=None))
    heard = [Heard() for _ in range(5)]
    for hears, prompt in zip(heard, mixed_prompts([4] * 5), strict=True):
        worker.service.submit(request(prompt, limit=POSITIONS - 4), hears)
    worker.start()
    worker.close(timeout=0.0)
    assert not worker.is_alive() and all(h.ended.is_set() for h in heard)
    assert "cancelled" in {h.end for h in heard} and len(worker.service.free) == 2


def test_a_step_that_breaks_ends_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(service_of(noisy_model("opt"), slots=1))
    monkeypatch.setattr(worker.service.decoder, "step", lambda *_: 1 / 0)
    heard = [Heard(), Heard()]
    for hears, prompt in zip(heard, mixed_prompts([4, 4]), strict=True):
        worker.service.submit(request(prompt), hears)
    worker.start()
    worker.join(timeout=30)
    assert [h.end for h in heard] == ["failed", "failed"] and isinstance(worker.error, ZeroDivisionError)
    assert worker.service.free == [0]
    with pytest.raises(RuntimeError, match="the service is closed"):
        worker.service.submit(request([5, 6]), Heard())
    assert not worker.service.busy


def test_a_step_that_breaks_on_its_way_ends_those_who_have_just_come_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU what broke a step is heard of where its tokens are waited for: behind the choice of who comes next."""
    service = service_of(noisy_model("opt"), slots=2, stop=None, ahead=True)
    heard, prompts = [Heard(), Heard(), Heard()], mixed_prompts([4, 5, 6])
    service.submit(request(prompts[0]), heard[0])
    service.step()
    service.step()
    for prompt, hears in zip(prompts[1:], heard[1:], strict=True):
        service.submit(request(prompt), hears)
    monkeypatch.setattr(service, "_deliver", lambda *_: 1 / 0)
    worker = Worker(service)
    worker.start()
    worker.join(timeout=30)
    assert [hears.ended.is_set() and hears.end for hears in heard] == ["failed"] * 3


def test_a_request_that_cannot_be_told_keeps_nobody_from_hearing() -> None:
    service, hears = service_of(noisy_model("opt"), slots=2), Heard()

    def broken(_: Drawn) -> None:
        raise RuntimeError("the loop is closed")

    service.submit(request([5, 6]), broken)
    service.submit(request([7, 8]), hears)
    worker = Worker(service)
    worker.start()
    worker.join(timeout=30)
    assert hears.end == "failed" and len(service.free) == 2


def test_closing_in_haste_reaches_one_that_is_just_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    service, heard = service_of(noisy_model("opt"), slots=2, stop=None, ahead=True), [Heard(), Heard()]
    inside, go, deliver = threading.Event(), threading.Event(), service._deliver_begun
    service.submit(request([5, 6], limit=POSITIONS - 2), heard[0])
    service.step()
    service.step()
    service.submit(request([7, 8], limit=POSITIONS - 2), heard[1])

    def slowly() -> bool:
        inside.set()
        go.wait(30)
        return deliver()

    monkeypatch.setattr(service, "_deliver_begun", slowly)
    worker = Worker(service)
    worker.start()
    assert inside.wait(30)
    closer = threading.Thread(target=worker.close, args=(0.0,))
    closer.start()
    closer.join(0.3)
    go.set()
    closer.join(30)
    assert not worker.is_alive() and [hears.end for hears in heard] == ["cancelled"] * 2


@pytest.mark.parametrize("timeout", [None, 0.0])
def test_a_closed_worker_takes_nothing_more(timeout: float | None) -> None:
    """What it took would wait for ever."""
    worker, hears = Worker(service_of(noisy_model("opt"), slots=1)), Heard()
    worker.start()
    worker.close(timeout)
    with pytest.raises(RuntimeError, match="the service is closed"):
        worker.service.submit(request([5, 6]), hears)
    assert hears.drawn == [] and worker.error is None


def test_settings_may_be_whole_numbers() -> None:
    prompts, model = mixed_prompts([4, 5]), noisy_model("opt")

    def answers(temperature: float, top_p: float) -> list[list[int]]:
        asked = [request(p, temperature=temperature, top_p=top_p, seed=3) for p in prompts]
        return [hears.tokens for hears in answer_all(service_of(model, slots=2), asked)]

    assert answers(1, 1) == answers(1.0, 1.0)
