"""Reads back what a W&B run wrote offline: the `.wandb` file, which holds protocol buffers in LevelDB's log format.

Knows wandb's messages; knows nothing of rlhf.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as messages

FILE_HEADER, BLOCK, PIECE_HEADER = 7, 32768, 7
FULL, LAST = 1, 4


def records(file: Path) -> Iterator[Any]:
    data, position, pieces = file.read_bytes(), FILE_HEADER, b""
    while position + PIECE_HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < PIECE_HEADER:  # the rest of a block too short for a header is padding
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += PIECE_HEADER + length
        pieces += data[position - length : position]
        if kind in (FULL, LAST):
            record = messages.Record()
            record.ParseFromString(pieces)
            pieces = b""
            yield record


class Offline:
    """One offline record. `history` has a dictionary a row, nested keys joined by dots; `summary` the last value of each key."""

    def __init__(self, file: Path) -> None:
        self.config: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.artifacts: list[Any] = []
        self.axes: dict[str, str] = {}
        self.exit_code: int | None = None
        for record in records(file):
            self._read(record.WhichOneof("record_type"), record)

    def _read(self, kind: str, record: Any) -> None:
        if kind == "run":
            self.run = record.run
        elif kind == "config":
            self.config |= {item.key: json.loads(item.value_json) for item in record.config.update}
        elif kind == "history":
            self.history.append({".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item})
        elif kind == "summary":
            self.summary |= {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.summary.update}
        elif kind == "artifact":
            self.artifacts.append(record.artifact)
        elif kind == "metric":
            self.axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "exit":
            self.exit_code = record.exit.exit_code

    def rows_with(self, key: str) -> list[dict[str, Any]]:
        return [row for row in self.history if key in row]

    def models(self, *, used: bool) -> dict[str, str]:
        """Digest by name of the models that this run made, or started from."""
        return {a.name: a.digest for a in self.artifacts if a.type == "model" and a.use_after_commit is used}


def offline(run_dir: Path) -> list[Offline]:
    """All records in a run directory, the oldest first."""
    return [Offline(file) for file in sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))]
