"""Plan against measurement: `python table.py` writes table.md and planner.png from measured.csv and protocol.csv and the planner as it is now."""

from __future__ import annotations

import sys
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from measure import PARTS, read
from planned import CARDS, HERE, Prediction, load, predict

PHASES = ("generate", "score", "train")
LISTS = {"cases.yaml": "measured.csv", "protocol.yaml": "protocol.csv"}
"""What was run, and where its measurements lie."""


def number(row: dict[str, str], column: str) -> float | None:
    return float(row[column]) if row.get(column) else None


def off(predicted: float, measured: float | None) -> float | None:
    """Relative error of the prediction."""
    return None if not measured else predicted / measured - 1


def rows(cases_file: str) -> list[dict[str, Any]]:
    cases = load(HERE / cases_file)
    found = []
    for measured in read(HERE / LISTS[cases_file]):
        case = cases[measured["case"]]
        plan = predict(case, CARDS[measured["card"]])
        found.append(
            {"case": case, "plan": plan, "measured": measured, "memory": memory_errors(plan, measured), "time": time_error(plan, measured)}
        )
    return found


def memory_errors(plan: Prediction, measured: dict[str, str]) -> dict[str, float | None]:
    """By phase, and of the peak."""
    return {phase: off(plan.bytes[phase] / 1e9, number(measured, f"{phase}_gb")) for phase in (*PHASES, "iteration")}


def time_error(plan: Prediction, measured: dict[str, str]) -> float | None:
    return off(plan.seconds["iteration"], number(measured, "iteration_s")) if plan.seconds else None


def pair(predicted: float, measured: float | None, digits: int) -> str:
    return f"{predicted:.{digits}f} / " + ("-" if measured is None else f"{measured:.{digits}f}")


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1%}"


def markdown(found: list[dict[str, Any]]) -> str:
    lines = [
        "| case | plan says | ran | generate, GB | score, GB | train, GB | peak | iteration, s | |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in found:
        plan, measured = one["plan"], one["measured"]
        done = measured["status"] == "done"
        sizes = [pair(plan.bytes[phase] / 1e9, number(measured, f"{phase}_gb") if done else None, 1) for phase in PHASES]
        seconds = pair(plan.seconds["iteration"], number(measured, "iteration_s") if done else None, 2)
        errors = (percent(one["memory"]["iteration"]), percent(one["time"])) if done else ("-", "-")
        verdict = "fits" if plan.fits else f"needs {plan.total / 1e9:.0f} GB"
        lines.append(
            f"| {one['case'].name} | {verdict} | {'yes' if done else measured['status']} | "
            + " | ".join([*sizes, errors[0], seconds, errors[1]])
            + " |"
        )
    return "\n".join(lines) + "\n"


def draw(found: list[dict[str, Any]]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    done = [one for one in found if one["measured"]["status"] == "done"]
    for phase, marker in zip((*PHASES, "iteration"), "sDPo", strict=True):
        points = [(number(one["measured"], f"{phase}_gb"), one["plan"].bytes[phase] / 1e9) for one in done]
        points = [(x, y) for x, y in points if x]
        if points:
            axes[0].plot(*zip(*points, strict=True), marker, label=phase, alpha=0.7)
    parts = {name: name for name in (*PHASES, "iteration")} | {column.removesuffix("_s"): part for column, part in PARTS.items()}
    for (name, part), marker in zip(parts.items(), "sDPo^v<>*", strict=True):
        points = [(number(one["measured"], f"{name}_s"), one["plan"].seconds.get(part)) for one in done]
        points = [(x, y) for x, y in points if x and y]
        if points:
            axes[1].loglog(*zip(*points, strict=True), marker, label=name, alpha=0.7)
    for axis, unit in zip(axes, ("GB", "s"), strict=True):
        low, high = axis.get_xlim()
        axis.plot([low, high], [low, high], color="grey", linewidth=0.8)
        share = 0.1 if unit == "GB" else 0.2
        axis.fill_between(
            [low, high], [low * (1 - share), high * (1 - share)], [low * (1 + share), high * (1 + share)], color="grey", alpha=0.15
        )
        axis.set(xlabel=f"measured, {unit}", ylabel=f"planned, {unit}")
        axis.legend(fontsize=8)
    axes[0].set_title("peak memory by phase (band: 10 %)", fontsize=10)
    axes[1].set_title("time by phase (band: 20 %)", fontsize=10)
    figure.savefig(HERE / "planner.png", dpi=110)


def main() -> int:
    found = {name: rows(name) for name in LISTS}
    text = "".join(f"{name}:\n\n{markdown(some)}\n" for name, some in found.items())
    (HERE / "table.md").write_text("<!-- Written by table.py -->\n" + text, encoding="utf-8")
    print(text)
    draw([one for some in found.values() for one in some])
    return 0


if __name__ == "__main__":
    sys.exit(main())
