"""What every step relies on: pad, end of turn, BOS, the chat template, and that a saved tokenizer comes back the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_fixtures import CHAT, WORDS, model_config
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf.config import UserError
from rlhf.data.chat import format_answer, format_prompt
from rlhf.data.tokenizer import encode_answers, encode_prompts, end_of_turn_id, load_tokenizer
from rlhf.settings import ChatFormat


def saved_tokenizer(folder: Path, *, pad: str | None, bos: str | None) -> str:
    """A small byte-level tokenizer as the hub has them: GPT-2 like (no pad, or pad = EOS) or OPT like (puts BOS in front)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [token for token in ("</s>", bos, pad) if token]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(dict.fromkeys(specials)), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token=bos, pad_token=pad).save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=["train:word:64", "train:bpe:300", "no pad", "pad is eos", "pad is bos", "own pad and bos"])
def any_tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedTokenizerBase:
    pads_and_bos = {"no pad": (None, None), "pad is eos": ("</s>", None), "pad is bos": ("<s>", "<s>"), "own pad and bos": ("<pad>", "<s>")}
    name = request.param
    if name in pads_and_bos:
        pad, bos = pads_and_bos[name]
        name = saved_tokenizer(tmp_path / "source", pad=pad, bos=bos)
    return load_tokenizer(model_config(name), CHAT, WORDS)


def test_pad_is_a_token_of_its_own(any_tokenizer: PreTrainedTokenizerBase) -> None:
    t = any_tokenizer
    assert t.pad_token_id is not None and t.pad_token_id not in (t.eos_token_id, t.bos_token_id, t.unk_token_id, end_of_turn_id(t))
    assert max(t.get_vocab().values()) == len(t) - 1


def test_a_pad_of_its_own_is_kept(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(model_config(saved_tokenizer(tmp_path, pad="<pad>", bos=None)), CHAT)
    assert tokenizer.pad_token == "<pad>"


def test_end_of_turn_is_one_id_even_inside_text(any_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    assert encode_answers(any_tokenizer, [f"good1{any_tokenizer.eos_token}"])[0][-1] == end_of_turn_id(any_tokenizer)
    any_tokenizer.save_pretrained(tmp_path / "again")
    chat = ChatFormat(human="{text}\n", assistant="", end_of_turn="<|im_end|>")
    other = load_tokenizer(model_config(str(tmp_path / "again")), chat)
    assert encode_answers(other, ["good1<|im_end|>"])[0][-1] == end_of_turn_id(other) == other.convert_tokens_to_ids("<|im_end|>")
    assert other.pad_token_id != other.eos_token_id


def test_bos_comes_once_or_never(tmp_path: Path) -> None:
    with_bos = load_tokenizer(model_config(saved_tokenizer(tmp_path / "a", pad="<pad>", bos="<s>")), CHAT)
    bos = with_bos.bos_token_id
    assert [ids.count(bos) for ids in encode_prompts(with_bos, ["question1", "<s>question1", ""])] == [1, 1, 1]
    assert bos not in encode_answers(with_bos, ["question1"])[0]
    without = load_tokenizer(model_config(saved_tokenizer(tmp_path / "b", pad="<pad>", bos=None)), CHAT)
    assert encode_prompts(without, ["question1", ""]) == [encode_answers(without, ["question1"])[0], []]


def test_a_saved_tokenizer_comes_back_the_same(any_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    any_tokenizer.save_pretrained(tmp_path / "export")
    back = AutoTokenizer.from_pretrained(tmp_path / "export")
    text = format_prompt(CHAT, "question1 ,") + " good1 answer" + any_tokenizer.eos_token
    assert back(text)["input_ids"] == any_tokenizer(text)["input_ids"]
    assert back.get_vocab() == any_tokenizer.get_vocab() and back.chat_template == any_tokenizer.chat_template
    assert (back.pad_token_id, back.eos_token_id, back.bos_token_id) == (
        any_tokenizer.pad_token_id, any_tokenizer.eos_token_id, any_tokenizer.bos_token_id,
    )  # fmt: skip
    assert back.decode(back(text)["input_ids"], skip_special_tokens=True) == any_tokenizer.decode(
        any_tokenizer(text)["input_ids"], skip_special_tokens=True
    )


FORMATS = [
    CHAT,
    ChatFormat(human="\n\nHuman: {text}", assistant="\n\nAssistant:", end_of_turn=None),
    ChatFormat(human="<|im_start|>user\n{text}<|im_end|>\n", assistant="<|im_start|>assistant\n", end_of_turn="<|im_end|>"),
    ChatFormat(human="it's {{ {text} }} \\ {% x %}\n", assistant="'", end_of_turn=None),
]


@pytest.mark.parametrize("chat", FORMATS)
@given(
    question=st.text(max_size=12), answer=st.text(min_size=1, max_size=12).filter(lambda text: not text[0].isspace() or text[0] in " \n\t")
)
@examples(max_examples=15, deadline=None)
def test_the_template_of_the_tokenizer_is_the_chat_format(chat: ChatFormat, question: str, answer: str) -> None:
    tokenizer = load_tokenizer(model_config("train:word:64"), chat, WORDS)
    user, assistant = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
    opened = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    assert opened == format_prompt(chat, question)
    whole = tokenizer.apply_chat_template([user, assistant], tokenize=False)
    assert whole == format_prompt(chat, question) + format_answer(chat, answer) + tokenizer.eos_token


@pytest.mark.parametrize("name", ["train:word:512", "train:bpe:300"])
def test_training_is_deterministic_and_loses_nothing(name: str) -> None:
    one, two = (load_tokenizer(model_config(name), CHAT, iter(WORDS)) for _ in range(2))
    assert one.backend_tokenizer.to_str() == two.backend_tokenizer.to_str()
    text = " Human: question7 Assistant: good7 answer"
    ids = encode_prompts(one, [text])[0]
    assert one.decode(ids) == text and one.unk_token_id not in ids


@pytest.mark.parametrize(
    ("name", "corpus", "message"),
    [
        ("train:words:512", WORDS, "write train:word:SIZE"),
        ("train:bpe:many", WORDS, "write train:word:SIZE"),
        ("train:bpe:100", WORDS, "at least 258"),
        ("train:word:512", [], r"no row left for training: data\.split, data\.max_rows"),
        (None, WORDS, "tokenizer is missing"),
    ],
)
def test_mistakes_are_named(name: str | None, corpus: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_tokenizer(model_config(name), CHAT, corpus)


def test_a_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(model_config(str(tmp_path)), CHAT)
