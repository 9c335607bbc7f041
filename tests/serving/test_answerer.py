"""A checkpoint answers conversations; a reward model says what it thinks of them."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_policy, save_reward, tokenizer_of_tests
from tiny import save_causal
from transformers import AutoModelForCausalLM

from rlhf.config import UserError
from rlhf.inference.arena import mapped_memory
from rlhf.inference.service import Service
from rlhf.serving import answerer as answering
from rlhf.serving.answerer import Answerer, Piece
from rlhf.serving.conversation import ChatTemplate, Message
from rlhf.serving.judge import Judge
from rlhf.settings import ReplyConfig

GREEDY = ReplyConfig(temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=12, seed=0)
ASKED: list[Message] = [{"role": "user", "content": "name four fruits"}]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "export" / "actor"
    save_policy(folder)
    return folder


@pytest.fixture
def answerer(policy: Path) -> Iterator[Answerer]:
    one = Answerer(str(policy.parents[1]), context=None, slots=2, device="cpu", dtype="fp32")
    yield one
    one.close()


def collect(pieces: list[Piece]) -> str:
    assert all(piece.end is None for piece in pieces[:-1])
    return "".join(piece.text for piece in pieces)


def test_a_greedy_reply_is_that_of_transformers(answerer: Answerer, policy: Path) -> None:
    tokenizer, model = tokenizer_of_tests(), AutoModelForCausalLM.from_pretrained(policy)
    ids = torch.tensor([ChatTemplate(tokenizer).ids(ASKED)])
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    pieces = list(answerer.reply(ASKED, GREEDY))
    assert collect(pieces) == tokenizer.decode(out, skip_special_tokens=True)
    assert pieces[-1].tokens == len(out) and pieces[-1].end == ("stop" if out[-1] == tokenizer.eos_token_id else "length")


def test_a_seed_is_a_reply_and_none_is_another_each_time(answerer: Answerer) -> None:
    warm = dataclasses.replace(GREEDY, temperature=1.5)
    said = {collect(list(answerer.reply(ASKED, warm))) for _ in range(3)}
    assert len(said) == 1
    free = dataclasses.replace(warm, seed=None)
    assert len({collect(list(answerer.reply(ASKED, free))) for _ in range(4)}) > 1


def test_a_long_conversation_is_cut_and_a_long_reply_too(answerer: Answerer) -> None:
    long = [ASKED[0], {"role": "assistant", "content": "plum " * 30}, ASKED[0]]
    reply = answerer.reply(long, GREEDY)  # type: ignore[arg-type]
    assert reply.prompt.notice is not None and "oldest 2 messages" in reply.prompt.notice
    assert list(reply)[-1].tokens <= 12
    endless = dataclasses.replace(GREEDY, max_new_tokens=10_000)
    assert answerer.context == 96 and answerer.room(endless) == 48
    whole = answerer.reply(ASKED, endless)
    assert list(whole)[-1].tokens <= 96 - len(whole.prompt.ids), "as much as there is room for"


def test_a_cancelled_reply_ends(answerer: Answerer) -> None:
    reply = answerer.reply(ASKED, GREEDY)
    reply.cancel()
    assert list(reply)[-1].end in ("cancelled", "stop", "length")
    assert not answerer.worker.service.active


def test_a_model_that_broke_says_so(answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answerer.worker.service.decoder, "prefill", lambda *_: 1 / 0)
    assert [piece.end for piece in answerer.reply(ASKED, GREEDY)] == ["failed"]
    with pytest.raises(RuntimeError, match="stopped answering"):
        answerer.reply(ASKED, GREEDY)


def test_a_closed_model_says_so(answerer: Answerer) -> None:
    answerer.close()
    with pytest.raises(RuntimeError, match="stopped answering"):
        answerer.reply(ASKED, GREEDY)


def test_of_a_weight_in_another_layout_there_is_one_copy_and_all_is_given_back(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache takes what the card has left, so that the network must be gone by then."""
    loaded: list[Any] = []
    load = answering.load_policy

    def remembered(*args: Any, **options: Any) -> Any:
        model, tokenizer = load(*args, **options)
        loaded.append(weakref.ref(model))
        return model, tokenizer

    class Looking(Service):
        def __init__(self, *args: Any, **options: Any) -> None:
            assert loaded[0]() is None
            super().__init__(*args, **options)

    monkeypatch.setattr(answering, "load_policy", remembered)
    monkeypatch.setattr(answering, "Service", Looking)
    before = mapped_memory.now
    one = Answerer(str(policy), context=None, slots=2, device="cpu", dtype="fp32")
    assert list(one.reply(ASKED, GREEDY))[-1].end is not None and mapped_memory.now > before
    one.close()
    assert mapped_memory.now == before
    one.close()


def test_what_does_not_fit_on_a_card_is_refused(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("the GPU has no 8.00 GB free")

    monkeypatch.setattr(answering, "Service", full)
    with pytest.raises(UserError, match=r"does not fit on the GPU with a cache of 32 conversations: .*8.00 GB free; lower chat\.context"):
        Answerer(str(policy), context=None, slots=32, device="cpu", dtype="fp32")


def test_what_cannot_answer_is_refused(tmp_path: Path, policy: Path) -> None:
    def refusal(checkpoint: Path, context: int | None = None, device: str = "cpu") -> str:
        with pytest.raises(UserError) as error:
            Answerer(str(checkpoint), context=context, slots=1, device=device, dtype="auto")
        return str(error.value)

    assert refusal(tmp_path) == f"checkpoint={tmp_path} holds no model: give a run directory or a folder in HF layout"
    save_reward(tmp_path / "reward")
    assert "holds a reward model (LlamaForSequenceClassification), which scores and does not answer" in refusal(tmp_path / "reward")
    save_causal("gpt_neo", tmp_path / "neo")
    tokenizer_of_tests().save_pretrained(tmp_path / "neo")
    assert "family 'gpt_neo' has no entry" in refusal(tmp_path / "neo")
    save_causal("llama", tmp_path / "bare")
    assert "no tokenizer" in refusal(tmp_path / "bare")
    assert "chat.context=97 is more than the 96 positions" in refusal(policy, context=97)
    if not torch.cuda.is_available():
        assert "no CUDA device is visible" in refusal(policy, device="cuda")
    for content, said in (("{", "is not a valid JSON file"), ('{"model_type": "nosuch"}', "nosuch")):
        (tmp_path / "odd").mkdir(exist_ok=True)
        (tmp_path / "odd" / "config.json").write_text(content)
        assert "config.json says nothing that can be loaded" in refusal(tmp_path / "odd") and said in refusal(tmp_path / "odd")
    (tmp_path / "bare" / "model.safetensors").write_bytes(b"short")
    assert "the weights in" in refusal(tmp_path / "bare")


def test_the_judge_scores_the_end_of_the_turn(tmp_path: Path) -> None:
    model = save_reward(tmp_path / "export" / "reward")
    judge = Judge(str(tmp_path), device=torch.device("cpu"), dtype=torch.float32)
    answered: list[Message] = [*ASKED, {"role": "assistant", "content": "plum plum"}]
    ids = ChatTemplate(tokenizer_of_tests()).ids(answered, opened=False)
    assert ids[-1] == tokenizer_of_tests().eos_token_id
    hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    assert judge.score(answered) == pytest.approx(float(model.score(hidden)), rel=1e-4)
    long: list[Message] = [*ASKED, {"role": "assistant", "content": "plum " * 200}]
    assert isinstance(judge.score(long), float)
    save_policy(tmp_path / "policy")
    with pytest.raises(UserError, match="holds no reward model"):
        Judge(str(tmp_path / "policy"), device=torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(UserError, match=r"chat\.reward=nowhere holds no model"):
        Judge("nowhere", device=torch.device("cpu"), dtype=torch.float32)
