"""Runs the cells of a table that a machine can run, and appends them to its results.csv:

    python experiments/paper/measure.py TABLE hardware=h100-80g-vm trainer.devices=1 [models=opt-1.3b,...] [more overrides of rlhf bench step] [--show]

TABLE may be several with commas between: an actor runs once for all of them. A cell belongs to a machine if its hardware is the machine's and its GPUs are all of them. The layout is the one that the planner chose for
our engine (modelled.csv), the models have random weights, and every answer has 256 tokens, so neither data nor downloads are needed.
An override of the user's takes the place of the layout's: `ppo.batch_size=256 ppo.minibatch_size=256` where 1024 sequences take too long. `models=`
takes some of a table's actors. `--show` prints the commands and runs nothing. For `largest` actors are tried from the largest that the planner thinks fits down to the first
that completes its iterations; `hardware.host_memory_gb=N` says what the host really has. Exit code 2: this machine has fewer GPUs than
`trainer.devices`, nothing was run.
"""

from __future__ import annotations

import csv
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paper_cells import ADAPTERS, HERE, PROTOCOL, Cell, answer, question
from paper_tables import QUANTITIES, SIZES, Line, Times, quantities, read

from rlhf.planning.fit import Words
from rlhf.reporting.tables import RESULTS, cell_name

OURS = "ours"


@dataclass(frozen=True)
class Machine:
    hardware: str
    devices: int
    num_nodes: int
    more: Words
    """Overrides for every run."""
    models: Words = ()
    """Actors to run; all without."""

    @property
    def gpus(self) -> int:
        return self.devices * self.num_nodes

    @property
    def price(self) -> float | None:
        _, machine, _ = question(self.hardware, "opt-125m", OURS)
        return machine.hardware.price_per_hour or None


def machine_of(words: Sequence[str]) -> Machine:
    """From `hardware=`, `trainer.devices=` and `trainer.num_nodes=`; the other words go to every run."""
    given = dict(word.split("=", 1) for word in words if "=" in word)
    bare = [word for word in words if "=" not in word]
    if bare or "hardware" not in given:
        raise SystemExit(f"say hardware=NAME trainer.devices=N, and overrides as key=value{': ' + ' '.join(bare) if bare else ''}")
    own = ("hardware", "trainer.devices", "trainer.num_nodes", "models")
    devices, nodes = (given.get(key, "1") for key in own[1:3])
    if not (devices.isdecimal() and nodes.isdecimal() and int(devices) and int(nodes)):
        raise SystemExit(f"trainer.devices={devices} and trainer.num_nodes={nodes} must be whole numbers of at least 1")
    return Machine(
        given["hardware"], int(devices), int(nodes),
        tuple(word for word in words if word.split("=", 1)[0] not in own), tuple(filter(None, given.get("models", "").split(","))),
    )  # fmt: skip


def cards() -> int:
    """GPUs of this machine."""
    import torch  # takes seconds, and `--show` does without

    return torch.cuda.device_count()


def command(machine: Machine, model: str, batch: int, layout: Words) -> list[str]:
    """One run of `rlhf bench step`, without its run directory."""
    own = {word.split("=", 1)[0] for word in machine.more}
    planned = (f"ppo.batch_size={batch}", f"ppo.minibatch_size={batch}", *layout)
    return [
        "rlhf", "bench", "step", *PROTOCOL, f"hardware={machine.hardware}", f"trainer.devices={machine.devices}",
        *([f"trainer.num_nodes={machine.num_nodes}"] if machine.num_nodes > 1 else []), f"model@actor.model={model}",
        *(word for word in planned if word.split("=", 1)[0] not in own), *machine.more,
    ]  # fmt: skip


def run(words: Sequence[str], run_dir: Path) -> dict[str, Any] | None:
    """bench.json of a run that completed; None: it did not, and has said why. Of several nodes the script of launcher=hostfile is run."""
    done = subprocess.run([sys.executable, "-m", *words, f"run_dir={run_dir}"], check=False)
    file, script = run_dir / "bench.json", run_dir / "launch.sh"
    if done.returncode == 0 and script.is_file():
        done = subprocess.run(["bash", str(script)], check=False)
    found = json.loads(file.read_text()) if done.returncode == 0 and file.is_file() else None
    return found if found and found["status"] == "done" else None


def measured(bench: dict[str, Any], machine: Machine) -> dict[str, float | None]:
    """Every published quantity of a run."""
    seconds = {name: figures["median_seconds"] for name, figures in bench["phases"].items()}
    times = Times(generation=seconds["generate"], training=seconds["train"], total=seconds["iteration"])
    return quantities(
        times, sequences=bench["config"]["sequences"], gpus=machine.gpus, tflops=bench["paper_tflops_per_gpu"], price=machine.price
    )


def cells_of(table: str, machine: Machine) -> list[Line]:
    """Lines of modelled.csv that the machine can run."""
    return [row for row in read(table, "modelled.csv") if (row["hardware"], row["gpus"]) == (machine.hardware, str(machine.gpus))]


def runs(tables: Sequence[str], machine: Machine) -> Iterator[tuple[str, int, Words, list[tuple[str, Line]]]]:
    """(model, batch, layout, (table, line) that the run answers): one run for all quantities of a model."""
    by_model: dict[str, list[tuple[str, Line]]] = {}
    for table, row in ((name, row) for name in tables for row in cells_of(name, machine)):
        if row["quantity"] != "largest" and row[OURS] and (not machine.models or row["model"] in machine.models):
            by_model.setdefault(row["model"], []).append((table, row))
    for model, rows in by_model.items():
        first = rows[0][1]
        yield model, int(first[f"batch_{OURS}"]), tuple(first[f"layout_{OURS}"].split()), rows


def candidates(row: Line, machine: Machine) -> Iterator[tuple[str, int, Words]]:
    """Actors to try for `largest`: the planner's, and then the next smaller ones."""
    for model in reversed([model for model, size in SIZES.items() if size <= float(row[OURS] or 0)]):
        found = answer(Cell(machine.hardware, machine.gpus, model), OURS)
        if found is not None:
            yield model, found.batch, (*found.words, *((ADAPTERS,) if found.adapters else ()))


def append(table: str, row: Line, value: float, bench: dict[str, Any], words: Sequence[str]) -> None:
    cell = cell_name(row["hardware"], row["gpus"], row["model"], row["quantity"])
    with (HERE / table / "results.csv").open("a", newline="") as file:
        csv.DictWriter(file, RESULTS, lineterminator="\n").writerow(
            {"cell": cell, "value": f"{value:.4g}", "unit": row["unit"], "card": bench["card"], "command": shlex.join(words),
             "commit": bench["commit"] or "unknown"}
        )  # fmt: skip


def main(words: Sequence[str]) -> int:
    """0: every cell that belongs to the machine was measured; 2: this is not the machine."""
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    show = "--show" in words
    names = [word for word in words if word != "--show"]
    tables = names[0].split(",") if names else []
    if not tables or not set(tables) <= set(QUANTITIES):
        raise SystemExit(f"name a table first: {', '.join(QUANTITIES)}")
    machine = machine_of(names[1:])
    for table in tables:
        if not cells_of(table, machine):
            raise SystemExit(f"{table} has no cell for {machine.gpus} x {machine.hardware}")
    there = dict.fromkeys(row["model"] for table in tables for row in cells_of(table, machine) if row["model"])
    if unknown := [model for model in machine.models if model not in there]:
        raise SystemExit(
            f"models={','.join(unknown)}: the cells of {machine.gpus} x {machine.hardware} have {', '.join(there) or 'no actor to choose'}"
        )
    # Of several nodes this one may be without a card: the script of the launcher starts the ranks elsewhere.
    if not show and machine.num_nodes == 1 and (found := cards()) < machine.devices:
        print(f"trainer.devices={machine.devices}, but torch sees {found} GPUs here; --show only prints the commands", file=sys.stderr)
        return 2
    return measure(tables, machine, show=show)


def measure(tables: Sequence[str], machine: Machine, *, show: bool) -> int:
    """Runs, or prints, what belongs to the machine. 1: something was not measured."""
    missed = []
    for model, batch, layout, rows in runs(tables, machine):
        words = command(machine, model, batch, layout)
        print(shlex.join(words), flush=True)
        bench = None if show else run(words, folder(machine, model))
        missed += [model] if bench is None else []
        for table, row in rows if bench is not None else ():
            assert bench is not None
            value = measured(bench, machine)[row["quantity"]]
            if value is not None:
                append(table, row, value, bench, words)
    for table, row in ((name, row) for name in tables for row in cells_of(name, machine) if row["quantity"] == "largest"):
        missed += [] if largest(table, row, machine, show=show) else ["largest"]
    if missed and not show:
        print(f"not measured: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed and not show else 0


def folder(machine: Machine, model: str) -> Path:
    return Path("runs") / "paper" / f"{machine.gpus}x{machine.hardware}" / model


def largest(table: str, row: Line, machine: Machine, *, show: bool) -> bool:
    """Whether one of the actors completed."""
    for model, batch, layout in candidates(row, machine):
        words = command(machine, model, batch, layout)
        print(shlex.join(words), flush=True)
        bench = None if show else run(words, folder(machine, model))
        if bench is not None:
            append(table, row, SIZES[model], bench, words)
            return True
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
