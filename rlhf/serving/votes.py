"""Votes as pairs on disk: appended whole, or not at all. Knows files; knows no model."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any


class Votes:
    """A file of pairs, one JSON object a line, in the columns of `data=pairs`. What is no pair (a tie, an answer that is empty or the
    same as the other) goes to a file beside it, so that the first can be trained on as it is."""

    def __init__(self, file: Path) -> None:
        """
        Raises:
            OSError: the folder cannot be written to.
        """
        self.file, self.others = file, file.with_name(f"{file.stem}.others{file.suffix}")
        self.lock = threading.Lock()
        file.parent.mkdir(parents=True, exist_ok=True)
        for one in (self.file, self.others):
            _mend(one)
        with self.file.open("a"):
            pass  # a folder that cannot be written to is found out now, not at the first vote

    def add(self, row: dict[str, Any], *, pair: bool) -> None:
        """On disk once this returns.

        Raises:
            OSError: it could not be written (a full disk); the file is as it was before.
        """
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        with self.lock, (self.file if pair else self.others).open("ab", buffering=0) as f:
            before = f.tell()
            try:
                written = f.write(line)
                if written != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f.name)
                os.fsync(f.fileno())
            except OSError:
                os.ftruncate(f.fileno(), before)
                raise


def _mend(file: Path) -> None:
    """Puts aside what a crash left of a line at the end of the file: `NAME.broken` keeps it."""
    if not file.is_file():
        return
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole == len(content):
        return
    with file.with_name(f"{file.name}.broken").open("ab") as aside:
        aside.write(content[whole:] + b"\n")
    os.truncate(file, whole)
