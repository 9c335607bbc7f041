"""What loggers hear of the end of a run, and what TensorBoard makes of rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.callbacks.csv_log import MetricsFile
from rlhf.callbacks.run_log import Ending, told
from rlhf.callbacks.tensorboard_log import markdown
from rlhf.config import UserError


class Listener:
    """A logger that only listens."""

    def __init__(self) -> None:
        self.heard: list[Ending] = []

    def log_rows(self, name: str, rows: object, step: int) -> None: ...

    def log_histograms(self, values: object, step: int) -> None: ...

    def log_picture(self, name: str, file: Path) -> None: ...

    def finish(self, ending: Ending) -> None:
        self.heard.append(ending)


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (RuntimeError("out of paper"), "failed", "RuntimeError: out of paper"),
        (UserError("no such file"), "refused", "UserError: no such file"),
        (KeyboardInterrupt(), "failed", "KeyboardInterrupt: "),
    ],
)
def test_an_error_is_told_and_goes_on(error: BaseException, status: str, says: str, tmp_path: Path) -> None:
    listener = Listener()
    with pytest.raises(type(error)), told([MetricsFile(tmp_path), listener]):
        raise error
    assert [(ending.status, ending.error, ending.metrics) for ending in listener.heard] == [(status, says, {})]


def test_a_good_end_has_its_numbers() -> None:
    listener = Listener()
    with told([listener]) as ending:
        ending.metrics = {"gold/ppo": 0.7}
    assert listener.heard == [Ending(status="done", metrics={"gold/ppo": 0.7})]


def test_a_table_keeps_its_cells_apart() -> None:
    assert markdown([{"prompt": "a|b", "answer": "one\ntwo"}, {"prompt": 1, "answer": None}]).splitlines() == [
        "| prompt | answer |", "| --- | --- |", "| a\\|b | one<br>two |", "| 1 | None |",
    ]  # fmt: skip
