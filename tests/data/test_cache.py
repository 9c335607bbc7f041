"""The cache: built once, never read half, rebuilt when damaged, safe with several builders."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from datasets import Dataset

from rlhf.config import UserError
from rlhf.data.cache import Built, cached


class Builder:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Built:
        self.calls += 1
        return Dataset.from_dict({"x": list(range(1000))}), {"rows": 1000}


def test_an_entry_is_built_once(tmp_path: Path) -> None:
    build = Builder()
    for _ in range(2):
        rows, report = cached(tmp_path, "key", build)
        assert rows["x"][:] == list(range(1000)) and report == {"rows": 1000}
    assert build.calls == 1 and [path.name for path in tmp_path.iterdir()] == ["key"]


@pytest.mark.parametrize("damage", ["no manifest", "cut short", "file lost", "empty folder"])
def test_a_damaged_entry_is_built_again(tmp_path: Path, damage: str) -> None:
    build = Builder()
    cached(tmp_path, "key", build)
    arrow = next((tmp_path / "key").glob("*.arrow"))
    if damage == "no manifest":
        (tmp_path / "key" / "manifest.json").unlink()
    elif damage == "cut short":
        arrow.write_bytes(arrow.read_bytes()[:-100])
    elif damage == "file lost":
        arrow.unlink()
    else:
        for file in (tmp_path / "key").iterdir():
            file.unlink()
    assert len(cached(tmp_path, "key", build)[0]) == 1000 and build.calls == 2
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_builder_that_was_killed_leaves_nothing_that_is_read(tmp_path: Path) -> None:
    (tmp_path / ".key.abandoned").mkdir()  # what a killed process leaves
    build = Builder()
    assert len(cached(tmp_path, "key", build)[0]) == 1000 and build.calls == 1


def test_an_empty_data_set_keeps_its_columns(tmp_path: Path) -> None:
    for _ in range(2):
        rows, _ = cached(tmp_path, "key", lambda: (Dataset.from_dict({"x": [1, 2]}).select([]), {"rows": 0}))
        assert len(rows) == 0 and rows.column_names == ["x"]


def test_a_failed_build_stores_nothing(tmp_path: Path) -> None:
    def fail() -> Built:
        raise UserError("no")

    with pytest.raises(UserError):
        cached(tmp_path, "key", fail)
    assert not list(tmp_path.iterdir())


def test_builders_at_the_same_time_do_not_clash(tmp_path: Path) -> None:
    barrier, lengths = threading.Barrier(4), []

    def build() -> Built:
        barrier.wait(timeout=10)  # all four have found nothing before the first stores
        return Dataset.from_dict({"x": [1, 2, 3]}), {"rows": 3}

    threads = [threading.Thread(target=lambda: lengths.append(len(cached(tmp_path, "key", build)[0]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lengths == [3] * 4 and [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir=.*file.* cannot be written"):
        cached(tmp_path / "file", "key", Builder())
