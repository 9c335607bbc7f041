"""`python table.py` writes table.md and scaling.png from results.csv and the planner as it is now."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "planner_memory"))

from measure import read  # noqa: E402
from planned import Prediction, load, predict  # noqa: E402

HARDWARE = {"NVIDIA H100 80GB HBM3": "h100-80g", "NVIDIA H200": "h200-141g"}
"""What the plan is asked for, by the card that was measured."""
Row = dict[str, str]


def speed(row: Row) -> float:
    """Sequences a second."""
    return int(row["sequences"]) / float(row["iteration_s"])


def efficiency(row: Row, done: dict[str, Row]) -> float | None:
    """Speed of a GPU against that of one alone with the same actor, if it was measured on such a card."""
    alone = done.get(f"{row['case'].split('-')[0]}-1")
    return None if alone is None or alone is row or alone["card"] != row["card"] else speed(row) / int(row["gpus"]) / speed(alone)


def line(row: Row, plan: Prediction, done: dict[str, Row]) -> str:
    if row["status"] != "done":
        return f"| {row['case']} | | | | | | | | {row['status']}: {row['message']} | | | |"
    share = efficiency(row, done)
    seconds, peak = float(row["iteration_s"]), float(row["iteration_gb"])
    planned, bytes_ = plan.seconds["iteration"], plan.bytes["iteration"] / 1e9
    parts = " | ".join(f"{float(row[f'{phase}_s']):.2f} ({plan.seconds[phase]:.2f})" for phase in ("generate", "score", "train"))
    return (
        f"| {row['case']} | {row['gpus']} | {row['sequences']} | {parts} | {seconds:.2f} ({planned:.2f}, {planned / seconds - 1:+.0%}) | {speed(row):.2f} | "
        f"{'' if share is None else f'{share:.0%}'} | {float(row['tflops_per_gpu']):.0f} | {peak:.1f} ({bytes_ / peak - 1:+.1%}) | {row['card'].removeprefix('NVIDIA ')} |"
    )


def draw(done: dict[str, Row], plans: dict[str, Prediction]) -> None:
    """Work of a GPU by the paper's formula, which makes actors of all sizes comparable; the largest actor at the bottom."""
    cases = sorted(done, key=lambda case: float(case.partition("b-")[0]))
    measured = [float(done[case]["tflops_per_gpu"]) for case in cases]
    planned = [
        rate * float(done[case]["iteration_s"]) / plans[case].seconds["iteration"] for case, rate in zip(cases, measured, strict=True)
    ]
    figure, axes = plt.subplots(figsize=(8, 1 + 0.32 * len(cases)), layout="constrained")
    for card, colour in zip(HARDWARE, ("#1f77b4", "#2ca02c"), strict=True):
        there = [i for i, case in enumerate(cases) if done[case]["card"] == card]
        axes.barh(there, [measured[i] for i in there], 0.6, color=colour, label=card.removeprefix("NVIDIA "))
    axes.plot(planned, range(len(cases)), "|", color="black", markersize=13, markeredgewidth=2, label="planned")
    axes.set_yticks(range(len(cases)), [f"OPT-{case.replace('b-', 'B, ', 1)}" for case in cases])
    axes.invert_yaxis()
    axes.set_xlabel("TFLOP/s a GPU by the paper's formula")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3)
    figure.savefig(HERE / "scaling.png", dpi=120)


def main() -> None:
    cases, rows = load(HERE / "cases.yaml"), {row["case"]: row for row in read(HERE / "results.csv")}
    plans = {name: predict(cases[name], HARDWARE[row["card"]]) for name, row in rows.items()}
    done = {name: row for name, row in rows.items() if row["status"] == "done"}
    head = [
        "| case | GPUs | sequences | generate, s (plan) | score, s | train, s | iteration, s | sequences/s | of one GPU's, each | TFLOP/s a GPU | peak, GB (plan) | card |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    text = "\n".join([*head, *(line(row, plans[name], done) for name, row in rows.items())]) + "\n"
    (HERE / "table.md").write_text(text, encoding="utf-8")
    print(text)
    draw(done, plans)


if __name__ == "__main__":
    main()
