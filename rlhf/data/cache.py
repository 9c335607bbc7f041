"""Finished data sets on disk, found by a key that says all they were made from.

Knows nothing about what a row is. An entry is written under a temporary name and renamed when complete, so that a reader never sees half
of one; one that was damaged since is built again.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from datasets import Dataset, DatasetInfo, Features, load_from_disk

from rlhf.config import UserError
from rlhf.logging import log

MANIFEST = "manifest.json"
Built = tuple[Dataset, dict[str, int]]


def cache_folder(folder: str | None) -> Path:
    """`data.cache_dir`, or $RLHF_CACHE, or ~/.cache/rlhf."""
    return Path(folder or os.environ.get("RLHF_CACHE") or Path.home() / ".cache" / "rlhf").expanduser()


def cached(folder: Path, key: str, build: Callable[[], Built]) -> Built:
    """The data set and the report stored under `key`, built first where there is none.

    Several processes may ask at once: each that finds nothing builds, the first to finish is kept.

    Raises:
        UserError: the folder cannot be written.
    """
    entry = folder / key
    if entry.exists():
        try:
            return _load(entry)
        except Exception as error:
            log.warning("the cached data in %s is damaged (%s) and is built again", entry, error)
            _discard(entry)
    rows, report = build()
    _store(entry, rows, report)
    return _load(entry)


def _store(entry: Path, rows: Dataset, report: dict[str, int]) -> None:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=entry.parent))
    except OSError as error:
        raise UserError(f"data.cache_dir={entry.parent} cannot be written ({error.strerror}): name another folder") from error
    try:
        rows.save_to_disk(part)
        sizes = {file.name: file.stat().st_size for file in sorted(part.iterdir())}
        (part / MANIFEST).write_text(json.dumps({"rows": len(rows), "sizes": sizes, "report": report}))
        part.chmod(0o755)  # mkdtemp keeps others out; a cache may be shared
        part.rename(entry)
    except OSError as error:
        if not (entry / MANIFEST).is_file():
            raise UserError(f"data.cache_dir={entry.parent} cannot be written ({error.strerror}): make room or name another") from error
        # Someone else finished first, with the same rows.
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _load(entry: Path) -> Built:
    manifest = json.loads((entry / MANIFEST).read_text())
    for name, size in manifest["sizes"].items():
        found = (entry / name).stat().st_size
        if found != size:
            raise ValueError(f"{name} has {found} bytes instead of {size}")
    if manifest["rows"] == 0:  # load_from_disk fails on a table without a row
        features = DatasetInfo.from_directory(str(entry)).features or Features()
        return Dataset.from_dict({name: [] for name in features}, features=features), manifest["report"]
    return load_from_disk(entry), manifest["report"]


def _discard(entry: Path) -> None:
    """Renames first: a reader that has the entry open keeps its files, and nobody meets a folder that is half deleted."""
    trash = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=entry.parent))
    try:
        entry.rename(trash / "damaged")
    except FileNotFoundError:
        pass  # another process has just thrown it away
    finally:
        shutil.rmtree(trash, ignore_errors=True)
