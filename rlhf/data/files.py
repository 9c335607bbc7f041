"""Rows of local files, each with the place it came from.

Knows no templates and no tokenizer. A place is `file:line` (1-based) for .jsonl and .csv, `file: row N` for .json and .parquet.
"""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets

from rlhf.config import UserError

LARGEST_CELL = 1 << 24
"""Characters in one cell of a .csv file; Python's own limit of 131072 is too short for documents."""


def read_rows(files: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, row) over all files in order.

    Raises:
        UserError: a file does not exist, holds no rows, or has a row that cannot be read; the message begins with file and line.
    """
    for file in files:
        path = Path(file)
        if not path.is_file():
            raise UserError(f"{file}: the file does not exist (a relative path starts at {Path.cwd()})")
        rows = 0
        try:
            for place, row in _reader(path)(path):
                rows += 1
                yield place, row
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start}): save the file as UTF-8") from error
        if rows == 0:
            raise UserError(f"{file}: the file has no rows")


def hash_files(files: Iterable[str]) -> str:
    """sha256 over the bytes of the files.

    Raises:
        UserError: a file does not exist.
    """
    digest = hashlib.sha256()
    for file in files:
        try:
            with open(file, "rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise UserError(f"{file}: the file cannot be read ({error.strerror}; a relative path starts at {Path.cwd()})") from error
    return digest.hexdigest()


def _reader(path: Path) -> Any:
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    if path.suffix not in readers:
        raise UserError(f"{path}: rows are read from {', '.join(readers)} files, not from {path.suffix or 'a file without suffix'}")
    return readers[path.suffix]


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not JSON ({error.msg} at column {error.colno}): write one object a line") from error
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number}: {_beyond(error)}: mend or delete the row") from error
            yield checked(f"{path}:{number}", row)


def _json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip()[:1] == "{" and error.msg == "Extra data":  # one object a line under the name .json
            yield from _jsonl(path)
            return
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {_beyond(error)}: mend or delete its row") from error
    if isinstance(rows, dict):
        rows = rows.get("data", [rows])
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of objects, got {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        yield checked(f"{path}: row {number}", row)


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(LARGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        line = 2  # a cell may hold line breaks, so that the next row begins where the reader stands
        try:
            names = [name for name in reader.fieldnames or [] if name]  # spreadsheets leave columns without a name behind the others
            twice = [name for name, count in Counter(names).items() if count > 1]
            if twice:
                raise UserError(f"{path}:1: the header has column {twice[0]!r} twice: rename or delete one of the two")
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(f"{path}:{line}: the row has another number of cells than the header ({len(reader.fieldnames or [])})")
                yield f"{path}:{line}", row
                line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: not CSV ({error})") from error


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        table = datasets.Dataset.from_parquet(str(path), keep_in_memory=True)
    except Exception as error:
        raise UserError(f"{path}: not a Parquet file that can be read ({type(error).__name__})") from error
    for number, row in enumerate(table, start=1):
        yield f"{path}: row {number}", row


def _beyond(error: ValueError | RecursionError) -> str:
    """What Python's reader of JSON does not take although it is JSON."""
    if isinstance(error, RecursionError):
        return "lists or objects are nested too deeply to be read"
    return f"a number has more than {sys.get_int_max_str_digits()} digits, which cannot be read"


def checked(place: str, row: Any) -> tuple[str, dict[str, Any]]:
    """Place and row.

    Raises:
        UserError: the row is no object with columns, or it holds what JSON in UTF-8 cannot.
    """
    if not isinstance(row, dict):
        raise UserError(f"{place}: expected an object with columns, got {type(row).__name__}")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise UserError(f"{place}: a text holds {half}, half a character, which UTF-8 cannot write: mend or delete the row") from error
    except RecursionError as error:
        raise UserError(f"{place}: {_beyond(error)}: mend or delete the row") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{place}: the row cannot be written as JSON ({error}): return texts, numbers and lists") from error
    return place, row
