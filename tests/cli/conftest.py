"""A command line run inside the test: what it changes of the process is put back."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from tiny import write_pairs

from rlhf.cli.main import main
from rlhf.engines.launcher import RANK_VARIABLES
from rlhf.logging import log


@pytest.fixture(autouse=True)
def own_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Cached rows go below the test's folder; environment, argv, path and the log's handler are as before afterwards."""
    environment, handlers, propagate = dict(os.environ), list(log.handlers), log.propagate
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)
    os.environ["RLHF_CACHE"] = str(tmp_path / "cache")
    log.handlers.clear()  # a handler writes to the stderr it was made with, which was another test's
    yield
    os.environ.clear()
    os.environ.update(environment)
    log.handlers[:], log.propagate = handlers, propagate


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a command that must be refused: exit code 2, one line on stderr, no network built. Returns what the line says."""

    def build_network(*args: object, **kwargs: object) -> None:
        raise AssertionError("a network was built before the input was refused")

    monkeypatch.setattr("rlhf.modules.base.build_network", build_network)

    def run(*words: str) -> str:
        capsys.readouterr()
        code = main(list(words))
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if "rows to train on:" not in line and "rows held out:" not in line]
        assert (code, len(lines)) == (2, 1), err
        assert lines[0].startswith("rlhf: error: "), err
        assert out == ""
        return lines[0].removeprefix("rlhf: error: ")

    return run


@pytest.fixture(autouse=True)
def no_hydra_left() -> Iterator[None]:
    yield
    GlobalHydra.instance().clear()


@pytest.fixture
def light(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Cells of this process's sweeps are jobs that train nothing; the folder of the sweep."""
    monkeypatch.setattr("rlhf.cli.sweep.run.CELL", (sys.executable, str(Path(__file__).with_name("light.py")), "cell"))
    monkeypatch.setenv("LIGHT_PYTHON", str(tmp_path / "python"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path / "sweep"


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "pairs.jsonl", 32)


@pytest.fixture
def there(tmp_path: Path, pairs: Path) -> tuple[str, str]:
    """A run directory and a file of pairs, for any command."""
    return f"run_dir={tmp_path / 'run'}", f"data.path={pairs}"
