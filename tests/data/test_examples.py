"""Reading files: what is refused, with file and line, and what is held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from data_fixtures import CHAT, pair_rows, write_jsonl

from rlhf.config import UserError
from rlhf.data.examples import examples, identity
from rlhf.data.sources import resolve


def read(item: Any, path: Path | str, split: Any = "train", eval_fraction: float = 0.0) -> datasets.Dataset:
    return examples(resolve(item, str(path)), split, chat=CHAT, eval_fraction=eval_fraction, seed=1)[0]


PAIR = '{"prompt": "q", "chosen": "a"}\n'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "q", "chosen": "a"}\n{"prompt": "q", \n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", '{"prompt": "q", "chosen": "a"}\n\n{"prompt": "", "chosen": "a"}\n', r"a\.jsonl:3: the prompt is empty"),
        ("a.jsonl", '{"prompt": "q", "chosen": " "}\n', r"a\.jsonl:1: the chosen is empty"),
        ("a.jsonl", '{"prompt": "q", "chose": "a"}\n', r"a\.jsonl:1: column 'chosen' is missing \(the row has: prompt, chose\)"),
        ("a.jsonl", '["q", "a"]\n', r"a\.jsonl:1: expected an object"),
        ("a.jsonl", "\n", r"a\.jsonl: the file has no rows"),
        ("a.json", '[{"prompt": "q", "chosen": "a"}, {"prompt": "q", "chosen": null}]', r"a\.json: row 2: no value for \{chosen\}"),
        ("a.json", '[{"prompt": \n', r"a\.json:2: not JSON"),
        ("a.json", "3", r"a\.json: expected a list"),
        ("a.csv", 'prompt,chosen\n"two\nlines",a\nq,\n', r"a\.csv:4: the chosen is empty"),
        ("a.csv", "prompt,chosen\nq\n", r"a\.csv:2: the row has another number of cells"),
        ("a.csv", "prompt,chosen,,,prompt\nq,a,,,z\n", r"a\.csv:1: the header has column 'prompt' twice"),
        ("a.jsonl", PAIR + r'{"prompt": "a\ud800", "chosen": "a"}', r"a\.jsonl:2: a text holds '\\ud800', half a character"),
        ("a.json", r'[{"prompt": "q", "chosen": "\ude00"}]', r"a\.json: row 1: a text holds '\\ude00', half a character"),
        ("a.jsonl", PAIR + f'{{"prompt": {"9" * 5000}}}', r"a\.jsonl:2: a number has more than 4300 digits"),
        ("a.json", f'[{{"prompt": {"9" * 5000}}}]', r"a\.json: a number has more than 4300 digits"),
        ("a.jsonl", PAIR + '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}", r"a\.jsonl:2: lists or objects are nested too deeply"),
        ("a.json", '[{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}]", r"a\.json: lists or objects are nested too deeply"),
        ("a.parquet", "no parquet", r"a\.parquet: not a Parquet file"),
        ("a.txt", "q a", r"a\.txt' is no \.jsonl"),
    ],
    ids=lambda text: text[:40],
)
def test_a_bad_file_is_refused_with_its_place(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read("pairs", tmp_path / name)


def test_columns_without_a_name_may_stand_twice_and_whole_pairs_of_surrogates_are_characters(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,chosen,,\nq,a,,\n")
    (tmp_path / "a.jsonl").write_text(r'{"prompt": "\ud83d\ude00", "chosen": "a"}')
    assert read("pairs", tmp_path / "a.csv")[0]["chosen"] == " a"
    assert read("pairs", tmp_path / "a.jsonl")[0]["prompt"] == " Human: \U0001f600 Assistant:"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.jsonl: the file does not exist"):
        read("pairs", tmp_path / "absent.jsonl")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_examples(tmp_path: Path, suffix: str) -> None:
    rows = datasets.Dataset.from_list(pair_rows(5))
    path = tmp_path / f"rows.{suffix}"
    {"jsonl": rows.to_json, "json": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}[suffix](str(path))
    first = read("pairs", path)[0]
    expected = {"prompt": " Human: question0 Assistant:", "chosen": " good0 answer", "rejected": " bad0"}
    assert first == expected | {"label": None, "between": None, "ranks": None}


def test_rows_of_the_hub_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [{"question": "q", "sentence": "s"}, {"question": None, "sentence": "s"}, {"question": "q", "sentence": " "}]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "hub")
    kept, dropped = examples(
        resolve({"name": "qg_jaquad", "path": str(tmp_path / "hub")}, None), "train", chat=CHAT, eval_fraction=0.0, seed=1
    )
    assert len(kept) == 1 and dropped == {"no value for {question}": 1, "the chosen is empty": 1}
    with pytest.raises(UserError, match="column 'INSTRUCTION' is missing"):
        read({"name": "zhihu_kol", "path": str(tmp_path / "hub")}, "")


def test_held_out_rows_are_not_trained_on(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", pair_rows(50))
    train, held = (read("pairs", path, split, 0.2)["prompt"][:] for split in ("train", "eval"))
    assert (len(train), len(held)) == (40, 10) and not set(train) & set(held)
    own = {"name": "pairs", "eval_path": write_jsonl(tmp_path / "b.jsonl", pair_rows(3))}
    assert (len(read(own, path, "train", 0.2)), len(read(own, path, "eval", 0.2))) == (50, 3)


def test_where_keeps_the_rows_asked_for_and_labels_must_be_0_or_1(tmp_path: Path) -> None:
    rows = [{"text": "fine film", "label": 1, "source": "imdb"}, {"text": "dull", "label": 0, "source": "other"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    kept = read({"name": "labelled", "where": {"source": "imdb"}}, path)
    expected = {"prompt": [""], "chosen": ["fine film"], "rejected": [None], "label": [1], "between": [None], "ranks": [None]}
    assert kept[:] == expected
    with pytest.raises(UserError, match="no row is left"):
        read({"name": "labelled", "where": {"source": "imbd"}}, path)
    with pytest.raises(UserError, match=r":1: label must be 0 or 1, got 2"):
        read("labelled", write_jsonl(tmp_path / "b.jsonl", [{"text": "x", "label": 2}]))


def test_identity_follows_the_content_not_the_name(tmp_path: Path) -> None:
    one, same = (resolve("pairs", write_jsonl(tmp_path / name, pair_rows(3))) for name in ("a.jsonl", "b.jsonl"))
    assert identity(one) == identity(same)
    write_jsonl(tmp_path / "b.jsonl", pair_rows(4))
    assert identity(one) != identity(same)


def test_shares_of_a_source_divide_its_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"text number {i}"}) + "\n" for i in range(400)))

    def texts(share: list[float]) -> set[str]:
        source = resolve({"name": "text", "path": str(file), "share": share}, None)
        return set(examples(source, "train", chat=CHAT, eval_fraction=0.0, seed=1)[0]["chosen"])

    first, second = texts([0, 0.7]), texts([0.7, 1])
    assert not first & second and len(first | second) == 400 and 240 < len(first) < 320
    with pytest.raises(UserError, match=r"share must be \[from, to\]"):
        texts([0.7, 0.2])


def raising(split: str) -> list[Any]:
    raise RuntimeError("no luck")


def no_rows(split: str) -> list[Any]:
    return []


def no_list(split: str) -> Any:
    return (row for row in pair_rows(2))


def no_mapping(split: str) -> list[Any]:
    return ["q"]


def no_json(split: str) -> list[Any]:
    return [*pair_rows(1), {"prompt": {"a", "b"}, "chosen": "a"}]


def no_text(split: str) -> list[Any]:
    return [{"prompt": "\ud800", "chosen": "a"}]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.made", "generate=nowhere.made: cannot import 'nowhere.made'"),
        ("test_examples.raising", "generate=test_examples.raising raised RuntimeError: no luck, for the split 'train'"),
        ("os.sep", "generate=os.sep raised TypeError"),
        ("test_examples.no_list", "returned a generator for the split 'train': it must return a list of rows"),
        ("test_examples.no_mapping", "mine: row 1: expected an object with columns, got str"),
        ("test_examples.no_json", "mine: row 2: the row cannot be written as JSON"),
        ("test_examples.no_text", "mine: row 1: a text holds"),
    ],
)
def test_a_function_that_makes_no_rows_is_named(path: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    source = resolve({"name": "mine", "generate": path}, None)
    for read_it in (lambda: identity(source), lambda: examples(source, "train", chat=CHAT, eval_fraction=0.0, seed=1)):
        with pytest.raises(UserError, match=message):
            read_it()


def test_a_split_without_made_up_rows_is_refused_where_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    source = resolve({"name": "mine", "generate": "test_examples.no_rows"}, None)
    assert identity(source)
    with pytest.raises(UserError, match=r"generate=test_examples\.no_rows returned no row for the split 'eval'"):
        examples(source, "eval", chat=CHAT, eval_fraction=0.0, seed=1)
