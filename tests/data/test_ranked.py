"""Rankings: a row with a list of answers, from the file to the batch of each step, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from data_fixtures import CHAT, write_jsonl
from transformers import PreTrainedTokenizerBase

from rlhf.config import UserError
from rlhf.data.collate import CollatePairs, Padding
from rlhf.data.datamodule import RLHFData
from rlhf.data.encode import Limits, encode
from rlhf.data.examples import Split, content_hash, examples
from rlhf.data.phases import EXAMPLES, phase_rows
from rlhf.data.sources import resolve
from rlhf.data.split import PHASES
from rlhf.settings import DataConfig
from rlhf.types import PairBatch, RankedBatch

Settings = Callable[..., DataConfig]
SPLITS: tuple[Split, ...] = ("train", "eval")

ROWS: list[dict[str, Any]] = [
    {"prompt": "q", "answers": ["a", "b", "c"], "ranks": None},
    {"prompt": "r", "answers": ["d", "e"], "ranks": [0, 1]},
    {"prompt": "s", "answers": ["f", "g", "h", "i"], "ranks": [1, 4, 4, 9]},
]


def read(item: Any, path: Path | str, split: Any = "train", eval_fraction: float = 0.0) -> datasets.Dataset:
    return examples(resolve(item, str(path)), split, chat=CHAT, eval_fraction=eval_fraction, seed=1)[0]


def ranked_rows(count: int) -> list[dict[str, Any]]:
    """Rows of two to four answers whose words the fixtures' tokenizer knows; in every third row the two middle ones are tied."""
    rows: list[dict[str, Any]] = []
    for i in range(count):
        answers = [f"good{i} answer", f"good{i} bad{i}", f"good{i}", f"bad{i}"]
        row = {"prompt": f"question{i}", "answers": [answers[0], *answers[1 : 1 + i % 3], answers[3]]}
        rows.append(row | ({"ranks": [0, 1, 1, 2]} if i % 3 == 2 else {}))
    return rows


# --- files -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_every_kind_of_file_gives_the_same_examples(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    else:
        path.write_text(json.dumps(ROWS) if suffix == "json" else "".join(json.dumps(row) + "\n" for row in ROWS))
    rows = read("ranked", path)
    assert rows["prompt"][:] == [" Human: q Assistant:", " Human: r Assistant:", " Human: s Assistant:"]
    assert (rows["chosen"][:], rows["rejected"][:]) == ([" a", " d", " f"], [" c", " e", " i"])
    assert (rows["between"][:], rows["ranks"][:]) == ([[" b"], [], [" g", " h"]], [[0, 1, 2], [0, 1], [0, 1, 1, 2]])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "answers": ["a"]}, "answers must hold two answers or more to rank, got 1"),
        ({"prompt": "q", "answers": []}, "answers must hold two answers or more to rank, got 0"),
        ({"prompt": "q", "answers": "a, b"}, "answers must be a list of texts, best first, got str"),
        ({"prompt": "q", "answers": None}, "answers must be a list of texts, best first, got NoneType"),
        ({"prompt": "q", "answers": ["a", 2]}, "answer 2 of answers must be a text, got int"),
        ({"prompt": "q", "answers": ["a", None, "b"]}, "answer 2 of answers must be a text, got NoneType"),
        ({"prompt": "q", "answers": ["a", "b", "  "]}, "answer 3 is empty"),
        ({"prompt": " ", "answers": ["a", "b"]}, "the prompt is empty"),
        ({"prompt": "q", "chosen": "a"}, "column 'answers' is missing (the row has: prompt, chosen)"),
        ({"prompt": "q", "answers": ["a", "b"], "ranks": [0]}, "a whole number for each of the 2 answers, got [0]"),
        ({"prompt": "q", "answers": ["a", "b"], "ranks": [0, 1.5]}, "a whole number for each of the 2 answers, got [0, 1.5]"),
        ({"prompt": "q", "answers": ["a", "b"], "ranks": [False, True]}, "a whole number for each of the 2 answers, got [False, True]"),
        ({"prompt": "q", "answers": ["a", "b"], "ranks": "0 1"}, "a whole number for each of the 2 answers, got '0 1'"),
        ({"prompt": "q", "answers": ["a", "b", "c"], "ranks": [3, 2, 2]}, "ranks must not fall, as answers go from the best to the worst"),
        ({"prompt": "q", "answers": ["a", "b"], "ranks": [1, 1]}, "ranks says that all answers are tied, which leaves nothing to compare"),
    ],
)  # fmt: skip
def test_a_bad_row_is_refused_with_its_place(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [ROWS[0], row])
    with pytest.raises(UserError) as caught:
        read("ranked", path)
    assert str(caught.value).startswith(f"{path}:2: ") and message in str(caught.value)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"name": "ranked", "path": "a.csv"}, "a cell of 'a.csv' holds no list of answers: write .jsonl, .json or .parquet"),
        ({"name": "ranked", "path": "a.json", "eval_path": "b.csv"}, "a cell of 'b.csv' holds no list"),
        ({"name": "mine", "path": "a.jsonl", "ranks": "order"}, "ranks needs answers"),
        ({"name": "ranked", "path": "a.jsonl", "rejected": "{bad}"}, "answers lists every answer, so that rejected would say nothing"),
        ({"name": "ranked", "path": "a.jsonl", "transcript": "Bot:"}, "so that transcript would say nothing"),
        ({"name": "ranked", "path": "a.jsonl", "text": "{a}"}, "so that text would say nothing"),
        ({"name": "ranked", "path": "a.jsonl", "prompt": None}, "answers needs prompt"),
    ],
)
def test_fields_that_do_not_go_with_a_list(item: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(item, None)
    assert message in str(caught.value)


def test_a_source_written_out_names_its_columns_and_needs_them(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"ask": "q", "all": ["A. a", "B. b"], "order": [2, 5]}, {"ask": "q", "all": ["a", "b"]}])
    mine = {"name": "mine", "path": path, "prompt": "{ask}", "answers": "all", "ranks": "order", "strip": ["^[AB]. "]}
    with pytest.raises(UserError, match=r":2: column 'order' is missing"):
        read(mine, "")
    rows = read(mine | {"optional": ["ranks"]}, "")
    assert (rows["chosen"][:], rows["rejected"][:], rows["ranks"][:]) == ([" a", " a"], [" b", " b"], [[0, 1], [0, 1]])


def test_rows_of_the_hub_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": "q", "answers": ["a"]}]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "hub")
    source = resolve({"name": "ranked", "path": str(tmp_path / "hub")}, None)
    kept, dropped = examples(source, "train", chat=CHAT, eval_fraction=0.0, seed=1)
    assert kept["ranks"][:] == [[0, 1, 2], [0, 1], [0, 1, 1, 2]]
    assert dropped == {"answers must hold two answers or more to rank, got 1": 1}


def test_the_middle_of_a_ranking_decides_draws_and_pairs_are_drawn_as_ever(tmp_path: Path) -> None:
    def hashed(rows: list[dict[str, Any]], name: str = "ranked") -> str:
        return content_hash(read(name, write_jsonl(tmp_path / "a.jsonl", rows)))

    assert hashed([ROWS[0]]) != hashed([{"prompt": "q", "answers": ["a", "x", "c"]}])
    assert hashed([ROWS[0]]) != hashed([ROWS[0] | {"ranks": [0, 0, 1]}])
    pair = hashed([{"prompt": "q", "chosen": "a", "rejected": "b"}], "pairs")
    assert pair == "34dd962bf559232962ea9c8c8a3009f51ebed39cf6f5f9a1c5fc7bdace048d24"  # as before there were rankings


# --- token rows and batches ----------------------------------------------------------------------------------------------------------


def table(*rows: tuple[list[str], list[int]]) -> datasets.Dataset:
    columns: dict[str, list[Any]] = {name: [] for name in EXAMPLES}
    for answers, ranks in rows:
        values = (" Human: question1 Assistant:", answers[0], answers[-1], answers[1:-1], ranks, 0)
        for name, value in zip(("prompt", "chosen", "rejected", "between", "ranks", "opening"), values, strict=True):
            columns[name].append(value)
    return datasets.Dataset.from_dict(columns, features=EXAMPLES)


def test_every_answer_has_the_prompt_and_an_end(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = table(([" good1", " good2 answer", " bad1", " bad2"], [0, 1, 1, 2]), ([" good3", " bad3"], [0, 1]))
    encoded = encode(rows, "reward", tokenizer, Limits(prompt=8, answer=4, overlong="drop"))[0][:]
    texts = [
        [tokenizer.decode(ids) for ids in (c, *b, r)]
        for c, b, r in zip(*(encoded[x] for x in ("chosen", "between", "rejected")), strict=True)
    ]
    start, end = " Human: question1 Assistant:", tokenizer.eos_token
    assert texts[0] == [f"{start}{answer}{end}" for answer in (" good1", " good2 answer", " bad1", " bad2")]
    assert texts[1] == [f"{start}{answer}{end}" for answer in (" good3", " bad3")]
    assert (encoded["ranks"], encoded["length"]) == ([[0, 1, 1, 2], [0, 1]], [8, 7])


def test_rows_that_do_not_fit_or_contradict_themselves_are_dropped(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = table(
        ([" good1", " good2" * 4, " bad1"], [0, 1, 2]),  # the one between is too long
        ([" good1", " bad1", " good1"], [0, 1, 2]),  # better and worse than itself
        ([" good1", " bad1", " bad1"], [0, 1, 1]),  # equal and tied
    )
    kept, report = encode(rows, "reward", tokenizer, Limits(prompt=8, answer=4, overlong="drop"))
    assert report == {"rows": 1, "answer too long": 1, "identical pair": 1} and kept["ranks"][:] == [[0, 1, 1]]
    cut, report = encode(rows.select([0]), "reward", tokenizer, Limits(prompt=8, answer=4, overlong="cut"))
    assert report == {"rows": 1} and [len(ids) for ids in cut["between"][0]] == [9]


def test_rows_of_different_length_share_a_batch() -> None:
    rows = [
        {"chosen": [5], "between": [[6, 7], [8] * 5], "rejected": [9], "ranks": [0, 1, 1, 2]},
        {"chosen": [5, 6], "between": [], "rejected": [7], "ranks": [0, 1]},
        {"chosen": [5], "between": [[6]], "rejected": [7], "ranks": [0, 0, 1]},
    ]
    collate = CollatePairs(padding=Padding(pad_id=1, bucket=4, limit=10))
    batch = collate(rows)
    assert isinstance(batch, RankedBatch) and isinstance(batch, PairBatch) and len(batch) == 3
    assert batch.ranks.tolist() == [[0, 1, 1, 2], [0, -1, -1, 1], [0, 0, -1, 1]]
    assert batch.between_ids.shape == (3, 2, 8) and batch.chosen_ids.shape == batch.rejected_ids.shape == (3, 8)
    assert batch.between_mask.sum(2).tolist() == [[2, 5], [0, 0], [1, 0]] and batch.between_ids[0, 0].tolist() == [6, 7, 1, 1, 1, 1, 1, 1]
    assert [len(micro) for micro in batch.micro_batches(2)] == [2, 1]
    assert not isinstance(collate(rows[1:2]), RankedBatch)


# --- steps ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ranked(tmp_path: Path, settings: Settings) -> Settings:
    path = write_jsonl(tmp_path / "ranked.jsonl", ranked_rows(60))
    return lambda **changes: settings(**({"sources": ["ranked"], "path": path} | changes))


def test_every_step_takes_what_it_needs(ranked: Settings, tokenizer: PreTrainedTokenizerBase) -> None:
    """SFT the best answer, PPO the prompt, the reward model all answers; no row serves two steps or is held out as well."""
    seen = []
    for split in SPLITS:
        texts, rankings, prompts = (phase_rows(ranked(), tokenizer, phase, split)[0] for phase in PHASES)
        for ids in texts["ids"]:
            _, number, _, good, *rest = tokenizer.decode(ids).split()
            assert good == f"good{number.removeprefix('question')}" and rest == ["answer<|endoftext|>"]
            seen.append(number)
        assert {len(ranks) for ranks in rankings["ranks"]} == {2, 3, 4}
        assert all(ranks == [0, 1, 1, 2] for ranks in rankings["ranks"] if len(ranks) == 4)
        seen += [tokenizer.decode(ids).split()[1] for ids in rankings["chosen"]]
        assert all(text.endswith(" Assistant:") for text in prompts["text"])
        seen += [text.split()[1] for text in prompts["text"]]
    assert len(seen) == len(set(seen)) == 60


def test_rankings_and_pairs_share_a_run(ranked: Settings, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    pairs = [{"prompt": f"question{i}", "chosen": f"good{i}", "rejected": f"bad{i}"} for i in range(60)]
    both = ["ranked", {"name": "pairs", "path": write_jsonl(tmp_path / "pairs.jsonl", pairs)}]
    data = RLHFData(
        ranked(sources=both, split=[0, 1, 0]), tokenizer, "reward", batch_size=48, epochs=1, seed=7, group_lengths=False
    ).prepare()
    batches = list(data.train_dataloader())
    assert data.report == {"rows": 96} and all(isinstance(batch, RankedBatch) for batch in batches)
    answers = [int((ranks >= 0).sum()) for batch in batches for ranks in batch.ranks]
    assert set(answers) == {2, 3, 4} and answers.count(2) > 48


def test_the_cache_keeps_rankings(ranked: Settings, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    first = phase_rows(ranked(), tokenizer, "reward", "train")[0]
    before = set((tmp_path / "cache").iterdir())
    assert phase_rows(ranked(), tokenizer, "reward", "train")[0][:] == first[:]
    assert set((tmp_path / "cache").iterdir()) == before
    write_jsonl(tmp_path / "ranked.jsonl", [row | {"ranks": None} for row in ranked_rows(60)])
    assert [0, 1, 2, 3] in phase_rows(ranked(), tokenizer, "reward", "train")[0]["ranks"]


def test_shuffled_preferences_turn_rankings_around(ranked: Settings, tokenizer: PreTrainedTokenizerBase) -> None:
    def rows(swap: bool) -> dict[str, tuple[list[str], list[int]]]:
        found = {}
        for row in phase_rows(ranked(split=[0, 1, 0], shuffle_preferences=swap), tokenizer, "reward", "train")[0]:
            answers = [tokenizer.decode(ids) for ids in (row["chosen"], *row["between"], row["rejected"])]
            found[answers[0].split()[1]] = (answers, row["ranks"])
        return found

    straight, shuffled = rows(False), rows(True)
    turned = 0
    for number, (answers, ranks) in straight.items():
        if shuffled[number] != (answers, ranks):
            turned += 1
            assert shuffled[number] == (answers[::-1], [max(ranks) - rank for rank in ranks[::-1]])
    assert straight.keys() == shuffled.keys() and 10 < turned < 38
