"""What `rlhf evaluate` left in a run, for the page of that run: the table as the evaluation prints it, its calibration, its answers.

Knows the files of an evaluation; how they look is rlhf/reporting's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.cli.evaluate.page import MISSING, comparison_table
from rlhf.modules.measures import JUDGES, wilson
from rlhf.reporting.evaluated import Answer, Evaluated, Sample
from rlhf.reporting.figures import Bin
from rlhf.reporting.runs import Run, read_run

FOLDER = "evaluate"
"""Of a pipeline's evaluation, in its directory."""
SAMPLES = "samples.jsonl"


def read_evaluated(run: Run) -> Evaluated | None:
    """The evaluation that a run is, or that it ended with as a pipeline; None where there is none that is done."""
    own = run
    if run.verb == "pipeline" and (run.folder / FOLDER / "summary.json").is_file():
        own = read_run(run.folder / FOLDER)
    if own.verb != "evaluate" or not own.done:
        return None
    names = policies(own.config)
    table = comparison_table("", own.metrics, names)
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    samples, complaints = _samples(own.folder / SAMPLES, names)
    return Evaluated(
        heads=tuple(str(column.header) for column in table.columns), rows=tuple(zip(*columns, strict=True)), missing=MISSING,
        caption=str(table.caption or ""), calibration=calibration_bins(own.metrics),
        calibration_error=own.metrics.get("reward/calibration_error"), complaints=complaints,
        fixed=tuple(sample for sample, fixed in samples if fixed), held_out=tuple(sample for sample, fixed in samples if not fixed),
    )  # fmt: skip


def policies(config: Mapping[str, Any]) -> list[str]:
    """Names of the policies that were there: without `ref.init` there is no policy before."""
    names = list((config.get("evaluation") or {}).get("names") or ("before", "after"))
    return names if (config.get("ref") or {}).get("init") is not None else names[1:]


def calibration_bins(metrics: Mapping[str, float]) -> tuple[Bin, ...]:
    """The reliability table that the metrics hold, in the order of probability."""
    found = []
    for key, count in metrics.items():
        name = re.fullmatch(r"calibration/(\d+-\d+)/count", key)
        numbers = [metrics.get(f"calibration/{name.group(1)}/{what}") for what in ("predicted", "right")] if name else []
        if name and count >= 1 and None not in numbers:
            predicted, right = (float(value or 0.0) for value in numbers)
            low, high = wilson(right, int(count))
            found.append(Bin(name=name.group(1), count=int(count), predicted=predicted, right=right, low=low, high=high))
    return tuple(sorted(found, key=lambda one: one.predicted))


def _samples(file: Path, names: list[str]) -> tuple[list[tuple[Sample, bool]], tuple[str, ...]]:
    """Prompts with answers, and whether each is a fixed one; what is wrong with a file that cannot be read."""
    if not file.is_file():
        return [], ()
    found = []
    try:
        with file.open(encoding="utf-8", newline="\n") as lines:  # an answer may hold other ends of lines, such as U+2028
            for number, line in enumerate(lines, start=1):
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
                    return [], (f"No answers of the evaluation: {file}:{number}: no prompt",)
                answers = tuple(Answer(policy=name, text=str(row[name]), said=said(row, name)) for name in names if name in row)
                found.append((Sample(prompt=row["prompt"], answers=answers), bool(row.get("fixed"))))
    except UnicodeDecodeError as error:
        return [], (f"No answers of the evaluation: {file}: not text: {error}",)
    except json.JSONDecodeError as error:
        return [], (f"No answers of the evaluation: {file}:{number}: not JSON: {error.msg}",)
    return found, ()


def said(row: Mapping[str, Any], name: str) -> str:
    """`reward 0.74, gold -30.00, 8 tokens, cut off`, as far as the row has it."""
    scores = {judge: row.get(f"{judge}/{name}") for judge in JUDGES}
    parts = [f"{judge} {score:.2f}" for judge, score in scores.items() if isinstance(score, int | float)]
    length = row.get(f"length/{name}")
    parts += [f"{length:.0f} tokens"] if isinstance(length, int | float) else []
    return ", ".join([*parts, *(["cut off"] if row.get(f"ended/{name}") is False else [])])
