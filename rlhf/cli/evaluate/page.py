"""What an evaluation shows: a table on the terminal, samples.jsonl, side_by_side.md, calibration.png. Knows metrics and records; judges nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf.cli.rundir import write_atomically
from rlhf.modules.measures import JUDGES, Bin, JudgedPrompt, Records, wilson

if TYPE_CHECKING:
    from rlhf.cli.evaluate.prompts import FixedPrompt  # which loads tokenizers, and a pipeline's parent shows this page without them

ROWS = {
    "gold score": "gold/{}", "reward": "reward/{}", "answer length": "length/{}", "ended by itself": "eos_rate/{}",
    "distinct-1": "distinct_1/{}", "distinct-2": "distinct_2/{}", "distinct-3": "distinct_3/{}",
    "perplexity under ref": "ref_perplexity/{}", "held-out perplexity": "perplexity/{}", "KL to base": "kl_base/{}",
}  # fmt: skip
SHOWN_SAMPLES = 16
"""Rows of held-out prompts in samples.jsonl; fixed prompts are all there."""
SHOWN_CHARACTERS = 400
"""Of a prompt or an answer on the terminal."""
MISSING = "-"
CAPTION = "intervals over prompts; KL in nats an answer; wins: share of comparisons that the second wins, a tie as half"


# --- the terminal --------------------------------------------------------------------------------------------------------------


def print_page(run_dir: Path, metrics: Mapping[str, float], names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    console = Console()
    console.print(comparison_table(f"{run_dir.name}: held out, same sampling", metrics, names))
    print_answers(console, rows, names)
    console.print(f"everything is in {run_dir}", soft_wrap=True, markup=False)


def comparison_table(title: str, metrics: Mapping[str, float], names: Sequence[str]) -> Table:
    """Both policies with the difference and its 95 % interval, where there is one; then what belongs to the second policy or to neither.

    Args:
        names: of one policy or of two, the one before first.
    """
    table = Table(title=Text(title), caption=CAPTION)
    table.add_column("")
    for name in names:
        table.add_column(Text(name), justify="right")
    for column in ("difference", "95 % interval") if len(names) == 2 else ("95 % interval",):
        table.add_column(column, justify="right", no_wrap=True)
    for label, key in ROWS.items():
        values = [metrics.get(key.format(name)) for name in names]
        if any(value is not None for value in values):
            table.add_row(label, *map(_number, values), *_difference(metrics, key.removesuffix("/{}"), values))
    for label, key in _single_rows(metrics, names):
        before = ["", ""] if len(names) == 2 else [""]
        table.add_row(Text(label), *before[1:], _number(metrics[key]), *before[1:], _interval(metrics, key))
    return table


def _difference(metrics: Mapping[str, float], measure: str, values: Sequence[float | None]) -> list[str]:
    if len(values) < 2:
        return [_interval(metrics, measure)]
    before, after = values
    known = metrics.get(f"difference/{measure}", None if before is None or after is None else after - before)
    return [MISSING if known is None else f"{known:+.3f}", _interval(metrics, f"difference/{measure}")]


def _single_rows(metrics: Mapping[str, float], names: Sequence[str]) -> list[tuple[str, str]]:
    """(label, metric) of what is one number."""
    rows = [("KL to ref", "kl")]
    rows += [(f"wins by {judge}", f"win_rate/{judge}") for judge in JUDGES]
    sources = [key for key in metrics if key.startswith("reward/accuracy/") and not key.endswith(("_low", "_high"))]
    rows += [("reward model: accuracy", "reward/accuracy")]
    rows += [(f"  on {key.removeprefix('reward/accuracy/')}", key) for key in sources] if len(sources) > 1 else []
    rows += [("  calibration error", "reward/calibration_error"), ("  on fixed pairs", "fixed/accuracy")]
    return [(label, key) for label, key in rows if key in metrics]


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"


def _interval(metrics: Mapping[str, float], key: str) -> str:
    low, high = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
    return "" if low is None or high is None else f"{low:.3f} to {high:.3f}"


def print_answers(console: Console, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Prompts and answers side by side, each answer with its scores."""
    if not rows:
        return
    table = Table(title="answers", show_lines=True)
    for column in ("prompt", *names):
        table.add_column(Text(column))
    for row in rows:
        cells = [_shortened(f"{row.get(name, '')}") + (f" [{said}]" if (said := _scores(row, name)) else "") for name in names]
        table.add_row(*map(Text, (_shortened(row["prompt"]), *cells)))
    console.print(table)


def _scores(row: Mapping[str, Any], name: str) -> str:
    return ", ".join(f"{judge} {row[f'{judge}/{name}']:.2f}" for judge in ("gold", "reward") if f"{judge}/{name}" in row)


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


# --- files ---------------------------------------------------------------------------------------------------------------------


def sample_rows(records: Records, prompts: Sequence[FixedPrompt] | None = None) -> list[dict[str, Any]]:
    """A row for each prompt with every policy's answer and what was measured of it.

    Args:
        prompts: for records of fixed prompts, which are all shown as they stand in their file; None: the first held-out ones.
    """
    rows: list[dict[str, Any]] = []
    for answers in zip(*records.answers.values(), strict=True):
        row: dict[str, Any] = {"prompt": answers[0].prompt if prompts is None else prompts[len(rows)].prompt}
        for name, answer in zip(records.answers, answers, strict=True):
            kept = {key: answer.numbers[key] for key in ("gold", "reward", "length") if key in answer.numbers}
            row |= {
                name: answer.text,
                **{f"{key}/{name}": value for key, value in kept.items()},
                f"ended/{name}": bool(answer.numbers["ended"]),
            }
        rows.append(row if prompts is None else row | {"fixed": True})
    return rows if prompts is not None else rows[:SHOWN_SAMPLES]


def write_samples(run_dir: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_atomically(run_dir / "samples.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_side_by_side(
    run_dir: Path, rows: Sequence[Mapping[str, Any]], names: Sequence[str], *, title: str, judged: Mapping[str, JudgedPrompt],
    prompts: Sequence[FixedPrompt],
) -> None:  # fmt: skip
    """side_by_side.md: the fixed prompts with every policy's answer in full.

    Args:
        judged: what the reward model says of good and bad answers, by the place of their prompt.
    """
    parts = [f"# Fixed prompts: {title}\n"]
    for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True), start=1):
        parts.append(f"## {number}\n\n{_fenced(row['prompt'])}")
        for name in names:
            facts = [*([said] if (said := _scores(row, name)) else []), f"{row[f'length/{name}']:.0f} tokens"]
            facts += [] if row[f"ended/{name}"] else ["cut off"]
            parts.append(f"**{name}** ({', '.join(facts)})\n\n{_fenced(row[name])}")
        if prompt.place in judged:
            margin = judged[prompt.place].margins[0]
            parts.append(
                f"The reward model puts the good answer of the file {abs(margin):.2f} {'above' if margin > 0 else 'below'} the bad one.\n"
            )
    write_atomically(run_dir / "side_by_side.md", "\n".join(parts))


def _fenced(text: str) -> str:
    """As a block of plain text, whatever marks it holds."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}text\n{text.strip()}\n{fence}\n"


def plot_calibration(run_dir: Path, table: Sequence[Bin], error: float) -> Path:
    """calibration.png: how often the reward model is right against how often it should be, and how many comparisons that rests on."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (axis, below) = plt.subplots(2, 1, figsize=(4.6, 5.4), sharex=True, height_ratios=(3, 1))
    x, y = [row.predicted for row in table], [row.right for row in table]
    ends = [wilson(row.right, row.count) for row in table]
    reach = [
        [max(0.0, right - low) for right, (low, _) in zip(y, ends, strict=True)],
        [max(0.0, high - right) for right, (_, high) in zip(y, ends, strict=True)],
    ]
    axis.plot([0.5, 1], [0.5, 1], color="#888888", linewidth=1, linestyle="--", label="perfect")
    axis.errorbar(x, y, yerr=reach, color="#1f5fa8", marker="o", markersize=4, linewidth=1.4, capsize=2, label="reward model")
    axis.set_ylabel("share that is right")
    axis.set_ylim(min(0.45, *(low for low, _ in ends)), 1.02)
    axis.set_title(f"calibration error {error:.3f}, {sum(row.count for row in table)} comparisons", fontsize=10)
    axis.legend(fontsize=8, loc="lower right")
    below.bar([(row.low + row.high) / 2 for row in table], [row.count for row in table], width=0.045, color="#9bb8d3")
    below.set_yscale("log")
    below.set_ylim(bottom=0.5)
    below.set_ylabel("comparisons")
    below.set_xlabel("predicted probability, sigmoid(abs(margin))")
    below.set_xlim(0.49, 1.01)
    for each in (axis, below):
        each.grid(alpha=0.3)
    figure.tight_layout()
    part = run_dir / "calibration.part.png"
    figure.savefig(part, dpi=130)
    plt.close(figure)
    return part.rename(run_dir / "calibration.png")
