"""From a file to batches: the steps' rows, what is held out, the cache's key, resuming."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_fixtures import CHAT, model_config, pair_rows, write_jsonl
from transformers import PreTrainedTokenizerBase

from rlhf.config import UserError
from rlhf.data import phases
from rlhf.data.datamodule import RLHFData
from rlhf.data.phases import phase_rows, ptx_rows, sft_corpus
from rlhf.data.tokenizer import load_tokenizer
from rlhf.settings import DataConfig
from rlhf.types import PairBatch, PromptBatch, TextBatch

Settings = Callable[..., DataConfig]


@pytest.fixture
def pairs(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(60))


def build(data: DataConfig, tokenizer: PreTrainedTokenizerBase, phase: Any, **changes: Any) -> RLHFData:
    return RLHFData(data, tokenizer, phase, **({"batch_size": 4, "epochs": 1, "seed": 7} | changes)).prepare()


def prompt_numbers(data: DataConfig, tokenizer: PreTrainedTokenizerBase, phase: Any, split: Any) -> list[str]:
    rows = phase_rows(data, tokenizer, phase, split)[0]
    ids = rows["chosen"] if phase == "reward" else rows["ids"]
    return [tokenizer.decode(row).split()[1] for row in ids]


@pytest.mark.usefixtures("pairs")
def test_the_three_steps_share_no_row_and_use_them_all(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> None:
    train = [number for phase in ("sft", "reward", "ppo") for number in prompt_numbers(settings(), tokenizer, phase, "train")]
    held = [number for phase in ("sft", "reward", "ppo") for number in prompt_numbers(settings(), tokenizer, phase, "eval")]
    assert len(train) == 48 and len(held) == 12 and len(set(train + held)) == 60


@pytest.mark.usefixtures("pairs")
def test_another_source_in_the_blend_moves_no_row(settings: Settings, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    other = {"name": "other", "path": write_jsonl(tmp_path / "other.jsonl", [{"prompt": "answer", "chosen": "bad1"}] * 20)}
    alone = prompt_numbers(settings(), tokenizer, "sft", "train")
    blended = prompt_numbers(settings(sft_only=[other]), tokenizer, "sft", "train")
    assert set(blended) == {*alone, "answer"} and blended.count("answer") == 16


@pytest.mark.usefixtures("pairs")
def test_every_step_gives_its_batch(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> None:
    text = next(iter(build(settings(), tokenizer, "sft").train_dataloader()))
    pair = next(iter(build(settings(), tokenizer, "reward").train_dataloader()))
    prompt = next(iter(build(settings(), tokenizer, "ppo").train_dataloader()))
    assert isinstance(text, TextBatch) and isinstance(pair, PairBatch) and isinstance(prompt, PromptBatch)
    assert len(text) == len(pair) == len(prompt) == 4 and text.ids.shape[1] % 4 == 0
    assert prompt.texts == tokenizer.batch_decode([ids[mask] for ids, mask in zip(prompt.ids, prompt.mask, strict=True)])


@pytest.mark.usefixtures("pairs")
def test_a_resumed_loader_goes_on_where_it_stopped(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> None:
    whole = [batch.ids for batch in build(settings(), tokenizer, "ppo", epochs=2).train_dataloader()]
    module = build(settings(), tokenizer, "ppo", epochs=2)
    module.start = 3
    rest = [batch.ids for batch in module.train_dataloader()]
    assert len(module.train_dataloader()) == module.total_steps == len(whole)
    assert len(rest) == len(whole) - 3 and all(torch.equal(a, b) for a, b in zip(rest, whole[3:], strict=True))


@pytest.mark.usefixtures("pairs")
def test_two_ranks_get_the_halves_of_each_batch(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> None:
    whole = [batch.index.tolist() for batch in build(settings(), tokenizer, "ppo").train_dataloader()]
    halves = [[b.index.tolist() for b in build(settings(), tokenizer, "ppo", rank=r, world=2).train_dataloader()] for r in range(2)]
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == [sorted(batch) for batch in whole]


@pytest.mark.usefixtures("pairs")
def test_loader_workers_change_nothing(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> None:
    plain, spawned = (next(iter(build(settings(workers=n), tokenizer, "ppo").train_dataloader())) for n in (0, 1))
    assert torch.equal(plain.ids, spawned.ids)


@pytest.mark.usefixtures("pairs")
def test_the_cache_is_used_until_something_that_matters_changes(
    settings: Settings, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []
    encode = phases.encode
    monkeypatch.setattr(phases, "encode", lambda *given: (built.append(given[1]), encode(*given))[1])

    def builds(**changes: Any) -> bool:
        before = len(built)
        phase_rows(settings(**changes), changes.pop("tokenizer", tokenizer), "sft", "train")
        return len(built) > before

    assert builds() and not builds()
    assert not builds(length_bucket=8, workers=2)
    assert all(
        builds(**change)
        for change in (
            {"max_answer_tokens": 7},
            {"split": [1, 0, 0]},
            {"split_seed": 5},
            {"overlong": "cut"},
            {"max_rows": 20},
            {"eval_fraction": 0.3},
        )
    )
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(59))
    assert builds()
    monkeypatch.setattr(phases, "CODE_VERSION", phases.CODE_VERSION + 1)
    assert builds()


def test_the_key_knows_the_tokenizer(settings: Settings, pairs: None, tokenizer: PreTrainedTokenizerBase) -> None:
    other = load_tokenizer(model_config("train:word:40"), CHAT, sft_corpus(settings()))
    keys = {phases._key(settings(), t, "sft", "train", ["x"]) for t in (tokenizer, other)}
    tokenizer(["a b", "c"], padding=True)  # leaves a padding state behind, which decides no id
    assert len(keys) == 2 and phases._key(settings(), tokenizer, "sft", "train", ["x"]) in keys


def test_held_out_prompts_are_seen_by_no_step(settings: Settings, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [{"prompt": f"question{i % 20}", "chosen": f"good{i}", "rejected": f"bad{i}"} for i in range(40)]
    data = settings(path=write_jsonl(tmp_path / "twice.jsonl", rows), split=[1, 1, 1], eval_fraction=0.5)
    trained = {number for phase in ("sft", "reward", "ppo") for number in prompt_numbers(data, tokenizer, phase, "train")}
    held, report = phase_rows(data, tokenizer, "ppo", "eval")
    assert not trained & {text.split()[1] for text in held["text"]}
    assert report["prompt seen in training"] + report["rows"] == 7


@pytest.mark.usefixtures("pairs")
def test_swapped_preferences_touch_training_pairs_only(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> None:
    def good(split: Any, swap: bool) -> list[bool]:
        rows = phase_rows(settings(split=[0, 1, 0], shuffle_preferences=swap), tokenizer, "reward", split)[0]
        return ["good" in tokenizer.decode(ids) for ids in rows["chosen"]]

    assert all(good("train", False)) and all(good("eval", True))
    assert 10 < sum(good("train", True)) < 38


def test_labelled_texts_serve_each_step_in_its_own_way(settings: Settings, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [{"text": f" {'good' if i % 2 else 'bad'}{i} answer answer", "label": i % 2} for i in range(60)]
    data = settings(
        sources=[{"name": "labelled", "prompt_tokens": 2}], path=write_jsonl(tmp_path / "l.jsonl", rows), split=[1, 1, 1], overlong="cut"
    )
    texts = phase_rows(data, tokenizer, "sft", "train")[0]
    assert set(texts["prompt"]) == {0} and len(texts) == 16
    pairs = phase_rows(data, tokenizer, "reward", "train")[0]
    assert all(" good" in tokenizer.decode(ids) for ids in pairs["chosen"]) and all(
        " bad" in tokenizer.decode(ids) for ids in pairs["rejected"]
    )
    used = [tuple(ids) for side in ("chosen", "rejected") for ids in pairs[side]]
    assert len(used) == len(set(used)) and 0 < len(pairs) <= 8
    prompts = phase_rows(data, tokenizer, "ppo", "train")[0]
    assert set(prompts["length"]) == {2} and all(text.endswith(" answer") for text in prompts["text"])


def test_ptx_texts_last_as_long_as_training(settings: Settings, tokenizer: PreTrainedTokenizerBase, pairs: None, tmp_path: Path) -> None:
    text = {"name": "text", "path": write_jsonl(tmp_path / "t.jsonl", [{"text": " good1 answer" * 30}] * 3)}
    module = build(settings(ptx=[text]), tokenizer, "ppo", epochs=3)
    batches = list(module.ptx_dataloader(2))
    assert len(batches) == module.total_steps and batches[0].ids.shape == (2, 24)
    assert batches[0].loss_mask[:, 1:].all() and not batches[0].loss_mask[:, 0].any()
    with pytest.raises(UserError, match=r"data\.ptx: no source is called 'wikitxt' \(did you mean 'wikitext'\?\)"):
        build(settings(ptx=["wikitxt"]), tokenizer, "ppo").ptx_dataloader(2)
    with pytest.raises(UserError, match=r"data\.ptx is empty"):
        build(settings(), tokenizer, "ppo").ptx_dataloader(2)


@pytest.mark.usefixtures("pairs")
def test_evaluation_and_reports(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> None:
    write_jsonl(Path(settings().path or ""), [*pair_rows(60), {"prompt": "question1 " * 20, "chosen": "good1", "rejected": "bad1"}])
    module = build(settings(split=[0, 1, 0], eval_fraction=0.1), tokenizer, "reward", eval_batches=1)
    lost = [report.get("prompt too long", 0) for report in (module.report, module.eval_report)]
    assert sum(lost) == 1 and module.report["rows"] + lost[0] == 55 and module.eval_report["rows"] + lost[1] == 6
    assert [len(batch) for loader in module.val_dataloader() for batch in loader] == [4]
    assert module.heldout("sft")[:] == {"ids": [], "prompt": [], "length": []} and len(module.heldout(limit=2)) == 2
    assert build(settings(eval_fraction=0.0), tokenizer, "sft").val_dataloader() == []


@pytest.mark.usefixtures("pairs")
def test_mistakes_are_named(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"no row is left for the reward step \(.*answer too long"):
        build(settings(max_answer_tokens=1), tokenizer, "reward")
    with pytest.raises(UserError, match=r"no row is left for the ppo step \(data\.split="):
        build(settings(split=[1, 1, 0]), tokenizer, "ppo")
    with pytest.raises(UserError, match=r"rm\.batch_size=100 passes"):
        build(settings(), tokenizer, "reward", batch_size=100).train_dataloader()
    with pytest.raises(UserError, match="named twice"):
        build(settings(sources=["pairs", "pairs"]), tokenizer, "sft")


UNREAD = r"data\.path=.*pairs\.jsonl, but no source of data\.sources or data\.sft_only or data\.ptx reads it: add data=pairs"


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize("phase", ["sft", "reward", "ppo"])
def test_a_path_that_no_source_reads_is_refused(phase: Any, settings: Settings, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    own = {"name": "own", "path": write_jsonl(tmp_path / "own.jsonl", pair_rows(60)), "rejected": "{rejected}"}
    with pytest.raises(UserError, match=UNREAD):
        build(settings(sources=[own]), tokenizer, phase)
    with pytest.raises(UserError, match=UNREAD):
        ptx_rows(settings(sources=[own], ptx=[{"name": "text", "path": "t.jsonl"}]), tokenizer)
    assert build(settings(sources=[own], path=None), tokenizer, phase).report["rows"] > 0
    assert build(settings(sources=[own], sft_only=["pairs"]), tokenizer, phase).report["rows"] > 0
    assert build(settings(sources=[own], ptx=["text"]), tokenizer, phase).report["rows"] > 0, "PPO will read it"
