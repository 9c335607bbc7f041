"""Runs the cases on the card at hand and appends what was measured: `python measure.py --out DIR [--cases a,b] [--results FILE]`.

Each case is one `rlhf bench step`; its bench.json stays in DIR/CASE, and a row of FILE (measured.csv beside this script) holds what the table needs.
A case that runs out of memory is a result. Cases that FILE has already are skipped.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from planned import CARD, HERE, Case, load

ROOT = HERE.parents[1]
PHASES = ("generate", "score", "train", "iteration")
COLUMNS = (
    "case", "status", *(f"{phase}_gb" for phase in PHASES), "reserved_gb", "outside_gb", "host_gb",
    *(f"{phase}_s" for phase in PHASES), "prefill_s", "decode_s", "actor_s", "critic_s", "optimizer_s", "sequences", "gpus", "tflops_per_gpu", "card", "commit", "message",
)  # fmt: skip
PARTS = {"prefill_s": "generate/prefill", "decode_s": "generate/decode", "actor_s": "train/actor", "critic_s": "train/critic",
         "optimizer_s": "train/optimizer"}  # fmt: skip


def run(case: Case, folder: Path, timeout: float, hardware: str = CARD) -> dict[str, Any]:
    """One row. The plan is not asked whether it fits: that is what is measured."""
    command = [
        sys.executable,
        "-m",
        "rlhf",
        "bench",
        "step",
        *case.words,
        f"hardware={hardware}",
        "plan.enforce=false",
        f"run_dir={folder}",
    ]
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.log").open("w", encoding="utf-8") as log:
        log.write(" ".join(command) + "\n")
        log.flush()
        try:
            subprocess.run(
                command, env=os.environ | {"PYTHONPATH": path}, stdout=log, stderr=subprocess.STDOUT, check=False, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            log.write("stopped: time was up\n")
    file = folder / "bench.json"
    return row(case.name, json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {"case": case.name, "status": "failed"}


def row(name: str, bench: dict[str, Any]) -> dict[str, Any]:
    phases, memory = bench["phases"], bench["memory"]
    found: dict[str, Any] = {key: bench.get(key) for key in ("status", "sequences", "card", "commit", "message")} | {"case": name}
    found |= {"sequences": bench["config"]["sequences"], "gpus": bench.get("ranks", 1), "tflops_per_gpu": bench.get("paper_tflops_per_gpu")}
    for phase in PHASES:
        figures = phases.get(phase, {})
        found |= {f"{phase}_gb": giga(figures.get("peak_bytes")), f"{phase}_s": figures.get("median_seconds")}
    found |= {column: phases.get(part, {}).get("median_seconds") for column, part in PARTS.items()}
    sizes = {"reserved_gb": "reserved_bytes", "outside_gb": "outside_pytorch_bytes", "host_gb": "host_bytes_of_rank"}
    return found | {column: giga(memory[key]) for column, key in sizes.items()}


def giga(size: float | None) -> float | None:
    return None if size is None else size / 1e9


def read(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def append(file: Path, found: dict[str, Any]) -> None:
    shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in found.items()}
    fresh = not file.is_file()
    with file.open("a", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(shown)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", default="", help="names with commas between; all without")
    parser.add_argument("--results", type=Path, default=HERE / "measured.csv")
    parser.add_argument("--file", type=Path, default=HERE / "cases.yaml", help="another list of cases")
    parser.add_argument("--hardware", default=CARD)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds of one case")
    options = parser.parse_args(argv)
    cases = load(options.file)
    names = [name for name in options.cases.split(",") if name] or list(cases)
    if unknown := [name for name in names if name not in cases]:
        parser.error(f"--cases names {', '.join(unknown)}: {options.file} has {', '.join(cases)}")
    there = {found["case"] for found in read(options.results)}
    failed = 0
    for name in names:
        if name in there:
            continue
        found = run(cases[name], options.out.resolve() / name, options.timeout, options.hardware)
        print(f"{name}: {found['status']}, {found.get('iteration_gb')} GB, {found.get('iteration_s')} s", flush=True)
        failed += found["status"] == "failed"
        if found["status"] != "failed":
            append(options.results, found)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
