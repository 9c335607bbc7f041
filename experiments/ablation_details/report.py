"""The table of the ablation: `python report.py [--out DIR] [--page docs/ppo_details.md]`.

Adds what run.py left in DIR to runs.csv, and writes table.csv, table.md and effects.png, and fills the column `effect measured` of the page. A cell's effect is its gold score less that
of the cell it was made from, seed by seed: both start from the same SFT and reward model and answer the same prompts. Its interval is the
2.5th to 97.5th percentile of 10,000 bootstrap means over seeds. With five seeds such an interval is too narrow by about a third, so the table
also says whether Student's interval of the same differences excludes 0.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from cells import Cell, load
from record import FILE, Runs, merged, read, read_out, write

from rlhf.reporting import statistics
from rlhf.reporting.statistics import bootstrap, student

MEANS = ("gold_sft", "kl", "length", "distinct_2", "reward")
"""Columns of a run that the table has as means over seeds."""
UNMEASURED = "not measured yet"

Row = dict[str, Any]


FEWEST = 3
"""Pairs of runs below which an interval means nothing: of two there are three bootstrap means."""


def verdict(low: float, high: float, *, pairs: int, diverged: int, base_diverged: int) -> str:
    """One of: diverges, mends (its base diverges on some seed, it on none), helps, hurts, no difference seen, too few seeds."""
    if diverged:
        return "diverges"
    if base_diverged:
        return "mends"
    return statistics.verdict(low, high) if pairs >= FEWEST else "too few seeds"


def table(cells: Mapping[str, Cell], runs: Runs) -> list[Row]:
    """A row for each cell that was run, in the order of the list."""
    return [row(cell, runs) for cell in cells.values() if cell.name in runs]


def row(cell: Cell, runs: Runs) -> Row:
    mine = runs[cell.name]
    done = {seed: run for seed, run in mine.items() if run["status"] == "done"}
    diverged = sum(run["status"] == "diverged" for run in mine.values())
    gold = [run["gold"] for run in done.values()]
    base = runs.get(cell.base or "", {})
    base_diverged = sum(base[seed]["status"] == "diverged" for seed in mine if seed in base)
    both = [seed for seed in done if seed in base and base[seed]["status"] == "done"]
    differences = [done[seed]["gold"] - base[seed]["gold"] for seed in both]
    low, high = bootstrap(gold)
    diff_low, diff_high = bootstrap(differences)
    t_low, t_high = student(differences)
    judged = verdict(diff_low, diff_high, pairs=len(differences), diverged=diverged, base_diverged=base_diverged) if cell.base else "base"
    return {
        "cell": cell.name, "from": cell.base or "", "set": " ".join(cell.flips), "n": len(gold), "diverged": diverged,
        "gold": mean(gold), "gold_sd": float(np.std(gold, ddof=1)) if len(gold) > 1 else math.nan, "gold_low": low, "gold_high": high,
        "below_sft": sum(run["gold"] < run["gold_sft"] for run in done.values()), "pairs": len(differences), "diff": mean(differences), "diff_low": diff_low, "diff_high": diff_high,
        "by_student_too": "yes" if t_low > 0 or t_high < 0 else "no", "verdict": judged, **{name: mean([run[name] for run in done.values()]) for name in MEANS},
        "value_clipped": mean([run["value_clipped"] for run in mine.values()]),
        "ratio_clipped": mean([run["ratio_clipped"] for run in mine.values()]),
        "seconds": mean([run["wall_seconds"] for run in mine.values()]),
        "commit": " ".join(sorted({run["commit"] for run in mine.values()})),
        "message": next((run["error"] for run in mine.values() if run["status"] == "diverged"), ""),
    }  # fmt: skip


def mixed_seeds(runs: Runs) -> list[int]:
    """Seeds whose cells did not start from the same SFT model: its gold score differs, so that differences compare more than the cells."""
    seen: dict[int, set[float]] = {}
    for by_seed in runs.values():
        for seed, run in by_seed.items():
            if run["status"] == "done":
                seen.setdefault(seed, set()).add(round(run["gold_sft"], 6))
    return sorted(seed for seed, scores in seen.items() if len(scores) > 1)


def mean(values: Sequence[float]) -> float:
    """Of those that there are; nan for none."""
    there = [value for value in values if not math.isnan(value)]
    return float(np.mean(there)) if there else math.nan


# --- files -------------------------------------------------------------------------------------------------------------------


def number(value: float, digits: int = 3, *, sign: bool = False) -> str:
    return "-" if math.isnan(value) else f"{value:{'+' if sign else ''}.{digits}f}"


def interval(low: float, high: float, *, sign: bool = False) -> str:
    return "-" if math.isnan(low) else f"{number(low, sign=sign)} to {number(high, sign=sign)}"


def write_csv(rows: Sequence[Row], file: Path) -> None:
    with file.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for values in rows:
            writer.writerow({key: (f"{x:.5g}" if isinstance(x, float) else x) for key, x in values.items()})


def markdown(rows: Sequence[Row]) -> str:
    heads = (
        "cell", "differs from", "by", "n", "diverged", "gold", "sd", "95 %", "below SFT", "paired difference", "95 %", "by Student's t too", "verdict",
        "KL", "length", "distinct-2", "values clipped", "ratios clipped",
    )  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "| --- | --- | --- |" + " ---: |" * 9 + " --- |" + " ---: |" * 5]
    for r in rows:
        by = " ".join(f"`{flip}`" for flip in str(r["set"]).split())
        values = (
            r["cell"], r["from"] or "-", by, f"{r['n']:.0f}", f"{r['diverged']:.0f}", number(r["gold"]), number(r["gold_sd"]),
            interval(r["gold_low"], r["gold_high"]), f"{r['below_sft']:.0f}", number(r["diff"], sign=True), interval(r["diff_low"], r["diff_high"], sign=True),
            r["by_student_too"] if r["pairs"] > 1 else "-", r["verdict"], number(r["kl"], 2), number(r["length"], 2),
            number(r["distinct_2"], 2), number(r["value_clipped"]), number(r["ratio_clipped"]),
        )  # fmt: skip
        lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


def figure(rows: Sequence[Row], file: Path) -> None:
    """Paired differences with their intervals, a panel for each base; cells that diverged are crosses at its left edge."""
    bases = list(dict.fromkeys(r["from"] for r in rows if r["from"] and any(o["from"] == r["from"] and o["pairs"] for o in rows)))
    if not bases:
        return
    groups = {base: [r for r in rows if r["from"] == base] for base in bases}
    heights = [len(group) + 1.5 for group in groups.values()]
    fig, axes = plt.subplots(
        len(groups), 1, figsize=(9, 0.24 * sum(heights) + 1), height_ratios=heights, sharex=True, squeeze=False, layout="constrained"
    )
    colours = {"helps": "tab:green", "hurts": "tab:red", "diverges": "black", "mends": "tab:blue"}
    left = min([r["diff_low"] for r in rows if not math.isnan(r["diff_low"])], default=-0.1)
    for axis, (base, group) in zip(axes[:, 0], groups.items(), strict=True):
        axis.axvline(0, color="grey", linewidth=0.8)
        for y, r in enumerate(reversed(group)):
            colour = colours.get(r["verdict"], "tab:gray")
            if math.isnan(r["diff"]):
                axis.plot(left, y, "x" if r["verdict"] == "diverges" else "o", color=colour)
            else:
                axis.plot([r["diff_low"], r["diff_high"]], [y, y], color=colour)
                axis.plot(r["diff"], y, "x" if r["verdict"] == "diverges" else "o", color=colour, markersize=4)
        axis.set_yticks(range(len(group)), [r["cell"] for r in reversed(group)], fontsize=7)
        axis.set_title(f"from {base}", fontsize=9, loc="left")
    axes[-1, 0].set_xlabel("gold score, paired difference, 95 % bootstrap interval over seeds (crosses: some seed diverged)")
    fig.savefig(file, dpi=110)
    plt.close(fig)


# --- the page of details -------------------------------------------------------------------------------------------------------


CRITIC_FREE = ("ppo=grpo", "ppo=rloo", "ppo=reinforce_pp")
"""Presets that are `corrected` with another `advantage` and what goes with it."""
APART = {
    "reward_source": "what is rewarded, not how PPO learns from it", "reward_function": "as `reward_source`",
    "reward_function_kwargs": "as `reward_source`", "reward_function_coef": "as `reward_source`",
    "actor_optimizer.name": "the same formula, computed otherwise", "critic_optimizer.name": "the same formula, computed otherwise",
}  # fmt: skip
"""Keys that are no detail of PPO."""


def effects(rows: Sequence[Row], known: set[str]) -> dict[str, str]:
    """What the cells say of each key of the page: `BASE with VALUE: difference (interval), verdict`. Whole presets are left out, and the cells
    of the riddle, which start from four epochs, where another cell turns the key."""
    said: dict[str, list[str]] = {}
    riddle: dict[str, list[str]] = {}
    four: set[str] = set()
    for r in rows:
        flips = dict(flip.split("=", 1) for flip in str(r["set"]).split())
        if r["from"] in four or flips.get("ppo.epochs") == "4":
            four.add(r["cell"])
        turned = {re.sub(r"^(ppo|rm)\.", "", key): value for key, value in flips.items()}
        if f"ppo={flips.get('ppo')}" in CRITIC_FREE:
            turned = {"advantage": flips["ppo"]}
        turned = {key: value for key, value in turned.items() if key in known}
        if not r["from"] or "ppo" in turned:
            continue
        measured = r["verdict"]
        if not math.isnan(r["diff"]):
            spread = "" if math.isnan(r["diff_low"]) else f" ({interval(r['diff_low'], r['diff_high'], sign=True)})"
            measured = f"{number(r['diff'], sign=True)}{spread}, {measured}"
        for key, value in turned.items():
            others = "".join(f" and `{other}={turned[other]}`" for other in turned if other != key)
            found = riddle if r["from"] in four else said
            found.setdefault(key, []).append(f"{r['from']} with `{value}`{others}: {measured}")
    return {key: "; ".join(parts) for key, parts in (riddle | said).items()} | APART


def keys_of(page: str) -> set[str]:
    return set(re.findall(r"^\| `([\w.]+)` \|.*\|.*\|.*\|.*\|$", page, re.MULTILINE))


def filled(page: str, rows: Sequence[Row]) -> str:
    """The page with the last column of its tables of keys from the rows; keys that no cell turns are `not measured yet`."""
    said = effects(rows, keys_of(page))
    lines = []
    for line in page.splitlines():
        key = re.match(r"\| `([\w.]+)` \|", line)
        parts = line.split(" | ")
        if key and len(parts) in (5, 6):
            line = " | ".join([*parts[:-1], f"{said.get(key.group(1), UNMEASURED)} |"])
        lines.append(line)
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="folder of new results, run.py's --out; without it runs.csv is all there is")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="folder of the table")
    parser.add_argument("--page", type=Path, default=None, help="page whose column is filled")
    options = parser.parse_args(argv)
    record = options.to / FILE.name
    runs = read(record) if options.out is None else merged(read(record), read_out(options.out))
    if mixed_seeds(runs):
        print(f"error: seeds {mixed_seeds(runs)} hold runs from different SFT models: run them again into one --out", file=sys.stderr)
        return 2
    if not runs:
        print(f"error: {options.out or record} holds no results", file=sys.stderr)
        return 2
    options.to.mkdir(parents=True, exist_ok=True)
    write(runs, load(), record)
    rows = table(load(), read(record))  # from what is kept, digits and all, so that anybody gets this table again
    write_csv(rows, options.to / "table.csv")
    (options.to / "table.md").write_text(markdown(rows), encoding="utf-8")
    figure(rows, options.to / "effects.png")
    if options.page is not None:
        options.page.write_text(filled(options.page.read_text(encoding="utf-8"), rows), encoding="utf-8")
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
