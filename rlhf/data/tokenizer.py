"""A tokenizer that every step can rely on: from the hub, from a folder, or trained on the run's own text.

Knows no data set and no model network. Afterwards `pad_token_id` is a token of its own, `eos_token_id` ends a turn, and the chat format
travels with the saved tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf.config import UserError
from rlhf.data.chat import format_answer, format_prompt, jinja_template
from rlhf.settings import ChatFormat, ModelConfig

__all__ = [
    "PreTrainedTokenizerBase",  # for the rest of the room, which does not import transformers
    "encode_answers",
    "encode_prompts",
    "end_of_turn_id",
    "format_answer",
    "format_prompt",
    "load_tokenizer",
]

PAD, UNK, EOS = "<|pad|>", "<|unk|>", "<|endoftext|>"
SMALLEST_BPE = 256 + 2
"""Every byte is a token, so that nothing is unknown; and the two special tokens."""
WORD_PATTERN = r" ?[^\W_]+(?:['_-][^\W_]+)*| ?[^\w\s]| ?_|\s"
"""A word or a mark of punctuation, with the space before it: joining the tokens gives the text back."""


def load_tokenizer(model: ModelConfig, chat: ChatFormat, corpus: Iterable[str] | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, made ready for the chat format.

    Args:
        model: `tokenizer` names it (hub id, folder, `train:word:512`, `train:bpe:2048`); where that is None, `path` does.
        corpus: the text to train on, needed for `train:` only.

    Returns:
        A tokenizer whose pad token exists and is none of EOS, BOS, UNK; whose EOS is the end-of-turn token (one id); whose
        `chat_template` is the chat format. The same corpus always gives the same tokenizer.

    Raises:
        UserError: it cannot be loaded, the name is malformed, or there is nothing to train on.
    """
    name = model.tokenizer or model.path
    if name is None:
        raise UserError(f"model {model.name}: tokenizer is missing, and there is no path to take it from: set model.tokenizer")
    tokenizer = _train(name, corpus) if name.startswith("train:") else _load(name)
    _set_end_of_turn(tokenizer, chat.end_of_turn)
    _set_pad(tokenizer)
    tokenizer.padding_side = "left"
    tokenizer.chat_template = jinja_template(chat)
    return tokenizer


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an answer. `load_tokenizer` makes it the tokenizer's EOS."""
    assert isinstance(tokenizer.eos_token_id, int), "a tokenizer of load_tokenizer has an EOS"
    return tokenizer.eos_token_id


def encode_prompts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of prompts, with one BOS in front where the tokenizer puts one by itself (OPT, LLaMA), and nowhere else."""
    bos = _own_bos(tokenizer)
    rows = encode_answers(tokenizer, texts)
    return rows if bos is None else [ids if ids[:1] == [bos] else [bos, *ids] for ids in rows]


def encode_answers(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of texts that follow a prompt, without special tokens around them."""
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _own_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    starts = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return tokenizer.bos_token_id if starts else None


def _load(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        what = "the folder holds no tokenizer" if Path(name).is_dir() else "neither a local folder nor a name the hub can serve"
        raise UserError(f"model.tokenizer={name}: {what} ({type(error).__name__})") from error


def _set_end_of_turn(tokenizer: PreTrainedTokenizerBase, token: str | None) -> None:
    """Makes the token special, so that it is one id and never cut or merged, and the EOS, so that generation stops there."""
    tokenizer.add_special_tokens({"eos_token": token or tokenizer.eos_token or EOS})


def _set_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    """Padding must never look like a token that means something (with pad = EOS, DeepSpeed-Chat masks the EOS an actor wrote)."""
    taken = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in taken:
        tokenizer.add_special_tokens({"pad_token": PAD})


def _train(name: str, corpus: Iterable[str] | None) -> PreTrainedTokenizerFast:
    _, kind, size = [*name.split(":"), "", ""][:3]
    if kind not in ("word", "bpe") or not size.isdigit() or name.count(":") != 2:
        raise UserError(f"model.tokenizer={name}: write train:word:SIZE or train:bpe:SIZE, such as train:bpe:2048")
    smallest = SMALLEST_BPE if kind == "bpe" else 3
    if int(size) < smallest:
        raise UserError(f"model.tokenizer={name}: the vocabulary needs at least {smallest} tokens")
    texts = list(corpus or [])
    if not texts:
        raise UserError(
            f"model.tokenizer={name}: there is no text to train the tokenizer on, as the data has no row left for training: "
            "data.split, data.max_rows and data.sources say how many there are"
        )
    tokenizer = _word_level(texts, int(size)) if kind == "word" else _byte_pairs(texts, int(size))
    unk = UNK if kind == "word" else None
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unk, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def _word_level(texts: list[str], size: int) -> Tokenizer:
    """The most frequent words, each with its leading space; ties go in alphabetical order."""
    tokenizer = Tokenizer(models.WordLevel({UNK: 0}, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(vocab_size=size, special_tokens=[PAD, EOS, UNK], show_progress=False))
    return tokenizer


def _byte_pairs(texts: list[str], size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[PAD, EOS], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
