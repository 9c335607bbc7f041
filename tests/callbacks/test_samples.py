"""samples.jsonl of a resumed run reads as if it had never stopped."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rlhf.callbacks.samples import Samples
from rlhf.modules.base import RoleModule


def test_answers_of_iterations_that_are_repeated_are_dropped(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "answer": "grün\u2028"}, ensure_ascii=False) + "\n" for step in (1, 1, 11, 21)]
    file = tmp_path / "samples.jsonl"
    file.write_text("".join(lines) + lines[0][:9], encoding="utf-8")
    module, samples = RoleModule({}), Samples(tmp_path, lambda ids: [], every=10, rows=2)
    module.iteration = 12
    trainer: Any = SimpleNamespace(is_global_zero=True)
    samples.on_train_start(trainer, module)
    assert file.read_text(encoding="utf-8") == "".join(lines[:3])
    file.unlink()
    samples.on_train_start(trainer, module)
    assert not file.exists()
