"""What each table asks of the planner, and its rows: modelled with the original's engine and with ours."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from paper_cells import ADAPTERS, ENGINES, HERE, Cell, answer, cell_of, halves, published, question

from rlhf.planning.fit import Words
from rlhf.planning.paper import SAMPLES, PaperRow, single_gpu_script

QUANTITIES = {
    "table1": ("hours", "dollars"),
    "table2": ("hours", "dollars"),
    "table3": ("largest",),
    "breakdown": ("hours", "seconds_generate", "seconds_train", "seconds_rest", "seconds_iteration"),
    "figure6": ("generation", "training", "effective"),
    "figure7": ("sequences_per_s",),
}
"""Table -> what is modelled of it; the rest of published.csv is there to be read."""
NOW = "h100-80g-vm"
"""The card that is at hand. It has no published numbers: its rows are for measurements."""
EXTRA = {
    "table1": tuple((NOW, 1, model, "hours", "hours") for model in ("opt-125m", "opt-1.3b", "opt-2.7b", "opt-6.7b", "opt-13b")),
    "table3": ((NOW, 1, "", "largest", "billion parameters"),),
    "breakdown": tuple(
        (NOW, 1, model, f"seconds_{phase}", "seconds a sequence and GPU")
        for model in ("opt-1.3b", "opt-13b") for phase in ("generate", "train", "rest", "iteration")
    ),
    "figure6": tuple(
        (NOW, 1, model, quantity, "TFLOP/s a GPU")
        for model in ("opt-1.3b", "opt-6.7b", "opt-13b") for quantity in ("generation", "training", "effective")
    ),
}  # fmt: skip
"""Rows beside the published ones."""
SIZES = {"opt-125m": 0.125, "opt-350m": 0.331, "opt-1.3b": 1.3, "opt-2.7b": 2.7, "opt-6.7b": 6.7, "opt-13b": 13, "opt-30b": 30,
         "opt-66b": 66, "opt-175b": 175}  # fmt: skip
"""Billions of parameters, by OPT's names."""
COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)
SCALED = ("opt-13b", "opt-66b", "opt-175b")
GOOD_DOUBLING = 1.5
"""A run still scales while twice the GPUs make it at least so many times faster."""

Line = dict[str, str]


def wanted(table: str) -> list[Line]:
    """What modelled.csv has a line for: hardware, gpus, model, quantity, unit."""
    keys = ("hardware", "gpus", "model", "quantity", "unit")
    rows = [{key: row[key] for key in keys} for row in published(table) if row["quantity"] in QUANTITIES[table]]
    return rows + [dict(zip(keys, map(str, extra), strict=True)) for extra in EXTRA.get(table, ())]


def modelled(row: Line, engines: Sequence[str] = ENGINES) -> Line:
    """A line of modelled.csv, with the columns of these engines."""
    cell, name = cell_of(row), row["quantity"]
    answers = {engine: _answer(cell, engine, name) for engine in engines}
    line = row | {engine: "" if value is None else f"{value:.4g}" for engine, (value, _, _) in answers.items()}
    line["half"] = halves().get(cell, "") if name == "hours" else ""
    for engine, (_, batch, words) in answers.items():
        line |= {f"batch_{engine}": batch, f"layout_{engine}": " ".join(words)}
    return line


def _answer(cell: Cell, engine: str, name: str) -> tuple[float | None, str, Words]:
    """Value (None: nothing fits), batch and layout."""
    if name == "largest":
        return largest(cell.hardware, engine)
    row = answer(cell, engine)
    return (None, "", ()) if row is None else (quantity(row, name), str(row.batch), _words(row))


def _words(row: PaperRow) -> Words:
    return (*row.words, *((ADAPTERS,) if row.adapters else ()))


def largest(hardware: str, engine: str) -> tuple[float | None, str, Words]:
    """Billions of parameters of the largest actor that one GPU trains, the batch it does so with, and how."""
    best: tuple[float | None, str, Words] = (None, "", ())
    for model, size in SIZES.items():
        found: tuple[int, Words] | None = None
        if engine == "dschat":
            work, machine, how = question(hardware, model, engine)
            layout = single_gpu_script(work, machine, how["adapters"])
            found = None if layout is None else (layout[1].global_batch, (*layout[0], ADAPTERS))
        elif (row := answer(Cell(hardware, 1, model), engine)) is not None:
            found = row.batch, _words(row)
        if found is None:
            break
        best = (size, str(found[0]), found[1])
    return best


def quantity(row: PaperRow, name: str) -> float | None:
    """One published quantity of a modelled row; None: not known (no price)."""
    seconds, total = row.time.seconds, row.time.total
    generation = sum(seconds.get(phase, 0.0) for phase in ("gather", "prefill", "decode"))
    training = sum(value for phase, value in seconds.items() if phase.startswith("train") or phase == "optimizer")
    times = Times(generation=generation, training=training, total=total)
    return quantities(
        times, sequences=row.batch, gpus=row.gpus, tflops=row.tflops, price=row.dollars and row.dollars / row.hours / row.gpus
    )[name]


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of one iteration."""

    generation: float
    training: float
    """Of all roles, with their optimizer steps."""
    total: float


def quantities(times: Times, *, sequences: int, gpus: int, tflops: float, price: float | None) -> dict[str, float | None]:
    """Everything that is published of a run, from its times, modelled or measured.

    Args:
        sequences: of an iteration, on all GPUs.
        tflops: of a GPU by the original's formula, factor 5: one pass of generation and four of training.
        price: dollars of a GPU's hour; None: not known.
    """
    hours, each, work = SAMPLES / sequences * times.total / 3600, gpus / sequences, tflops * times.total
    return {
        "hours": hours, "dollars": None if price is None else hours * gpus * price, "sequences_per_s": sequences / times.total,
        "effective": tflops, "generation": work / 5 / times.generation, "training": work * 4 / 5 / times.training,
        "seconds_generate": times.generation * each, "seconds_train": times.training * each,
        "seconds_rest": (times.total - times.generation - times.training) * each, "seconds_iteration": times.total * each,
    }  # fmt: skip


# --- scaling --------------------------------------------------------------------------------------------------------------------


def scale(model: str, engine: str) -> list[Line]:
    """A100-80G from 8 to 1,024 GPUs: speed, and where doubling them stops paying and why."""
    lines: list[Line] = []
    before: PaperRow | None = None
    stopped = False
    for gpus in COUNTS:
        row = answer(Cell("a100-80g", gpus, model), engine)
        line = {"model": model, "engine": engine, "gpus": str(gpus), "batch": "", "sequences_per_s": "", "hours": "", "dollars": "",
                "gain": "", "largest_phase": "", "stops": ""}  # fmt: skip
        if row is not None:
            gain = row.time.sequences_per_second / before.time.sequences_per_second if before is not None else None
            phase, seconds = max(row.time.seconds.items(), key=lambda item: item[1])
            line |= {
                "batch": str(row.batch), "sequences_per_s": f"{row.time.sequences_per_second:.4g}", "hours": f"{row.hours:.4g}",
                "dollars": "" if row.dollars is None else f"{row.dollars:.0f}", "gain": "" if gain is None else f"{gain:.2f}",
                "largest_phase": f"{phase} {seconds / row.time.total:.0%}",
            }  # fmt: skip
            if gain is not None and before is not None and gain < GOOD_DOUBLING and not stopped:
                line["stops"], stopped = why(before, row), True
        before = row
        lines.append(line)
    return lines


def why(before: PaperRow, row: PaperRow) -> str:
    """What kept twice the GPUs from halving a sequence's time: the two phases that shrank least, and whether the batch could grow."""

    def cost(one: PaperRow, phase: str) -> float:
        return one.time.seconds.get(phase, 0.0) / one.batch

    lost = {phase: cost(row, phase) - cost(before, phase) / 2 for phase in row.time.seconds}
    whole = sum(value for value in lost.values() if value > 0)
    first, second = sorted(lost, key=lambda name: -lost[name])[:2]
    capped = row.batch == before.batch
    batch = f"the batch stays {row.batch}, {row.batch // row.gpus} a GPU" if capped else f"batch {before.batch} to {row.batch}"
    return f"{batch}; of the loss {lost[first] / whole:.0%} is {first}, {lost[second] / whole:.0%} {second}"


# --- files ----------------------------------------------------------------------------------------------------------------------


def as_csv(lines: Sequence[Line]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def read(table: str, name: str) -> list[Line]:
    with (HERE / table / name).open(newline="") as file:
        return list(csv.DictReader(file))
