"""What each step of a pipeline changed: the same numbers on the terminal and on the page, each from its own step's summary."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from experiment_folder import run
from pipelines import EVALUATE, REWARD, SFT, pipeline

from rlhf.cli.summary_page import plot_pipeline, print_pipeline, steps_table
from rlhf.reporting.files import write_report
from rlhf.reporting.runs import read_run
from rlhf.reporting.steps import Change, changes_of, mean_changes
from rlhf.reporting.words import MINUS

ALL = [
    ("SFT: perplexity of held-out answers", 135.2, 12.876),
    ("reward model: accuracy on held-out pairs", 0.48, 0.81),
    ("PPO: gold score", 0.49, 0.76),
    ("PPO: reward", 0.1, 1.4),
    ("PPO: KL to the policy before, nats an answer", 0.0, 5.2),
    ("PPO: answer length, tokens", 20.0, 24.0),
]


def found(folder: Path) -> list[tuple[str, float, float]]:
    return [(one.label, one.before, one.after) for one in changes_of(read_run(folder))]


def page(folders: list[Path], out: Path) -> str:
    write_report(folders, out)
    return (out / "report.html").read_text(encoding="utf-8")


def steps_of(text: str) -> str:
    """The section as text, a line for each row of a table."""
    section = re.search(r"<section id=steps.*?</section>", text, re.DOTALL)
    return "" if section is None else re.sub(r"<(?!/tr)[^>]+>", " ", section.group()).replace("</tr>", "\n")


def test_each_number_is_that_of_its_own_step(tmp_path: Path) -> None:
    whole = read_run(pipeline(tmp_path / "p")).metrics
    assert whole["reward/accuracy"] == 0.75, "the evaluation's, over other pairs"
    assert found(tmp_path / "p") == ALL


def test_nothing_by_halves(tmp_path: Path) -> None:
    steps = {
        "sft": {"sft/perplexity": 9.0},
        "reward": REWARD,
        "ppo": {},
        "evaluate": {"gold/ppo": 0.7, "reward/base": 1.0, "reward/ppo": 2.0},
    }
    assert [label for label, _, _ in found(pipeline(tmp_path / "p", steps=steps))] == [ALL[1][0], "PPO: reward"]


def test_an_evaluation_without_ppo_says_nothing_of_ppo(tmp_path: Path) -> None:
    assert found(pipeline(tmp_path / "p", steps={"sft": SFT, "evaluate": EVALUATE})) == ALL[:1]


def test_another_verb_has_no_steps(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "p")
    assert found(folder / "evaluate") == found(folder / "sft") == found(run(tmp_path / "ppo", metrics=EVALUATE)) == []


def test_where_the_summary_of_the_whole_is_all_there_is(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "p")
    for step in ("sft", "reward", "ppo", "evaluate"):
        shutil.rmtree(folder / step)
    assert found(folder) == [ALL[0], *ALL[2:]], "the accuracy after the step is not in it"
    folder = pipeline(tmp_path / "q", steps={"sft": SFT, "reward": REWARD})
    shutil.rmtree(folder / "reward")
    shutil.rmtree(folder / "sft")
    assert found(folder) == ALL[:2]


def test_the_terminal_prints_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    folder = pipeline(tmp_path / "p")
    print_pipeline(folder, dict(read_run(folder).metrics), {"total": 1.0}, ["base", "ppo"], None)
    printed = capsys.readouterr().out
    for label, before, after in ALL:
        assert re.search(rf"{re.escape(label)} *│ *{before:.3f} │ *{after:.3f} ", printed), label


def test_the_names_of_policies_and_of_the_folder_are_printed_and_drawn_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pipeline(tmp_path / "[/red]")
    names = ["$\\nope{$", "b$x$"]
    run(folder / "evaluate", None, verb="evaluate", status="done", metrics={f"gold/{name}": 0.5 for name in names})
    (folder / "sft" / "metrics.csv").write_text("step,sft/loss\n1,2.0\n2,1.0\n")
    plot = plot_pipeline(folder, names)
    assert plot is not None and plot.stat().st_size > 5000
    (folder / "ppo" / "export").mkdir()
    print_pipeline(folder, {}, {"total": 1.0}, ["base", "ppo"], plot)
    assert f"rlhf chat 'checkpoint=\"{folder}/ppo\"'" in capsys.readouterr().out


def test_what_cannot_be_drawn_is_left_out(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "p")
    run(folder / "evaluate", None, verb="evaluate", status="done", metrics={"gold/base": 1.5e308, "gold/ppo": -1.5e308})
    (folder / "sft" / "metrics.csv").write_text("step,sft/loss\n1,1.5e308\n2,-1.5e308\n3,inf\n4,2.0\n5,1.0\n")
    plot = plot_pipeline(folder, ["base", "ppo"])
    assert plot is not None and plot.stat().st_size > 5000


def test_a_row_of_the_terminal_has_three_decimals() -> None:
    table = steps_table([Change(label="PPO: reward", before=0.5, after=12.34567)])
    assert [list(column.cells) for column in table.columns] == [["PPO: reward"], ["0.500"], ["12.346"]]


def test_the_page_of_a_pipeline_shows_it(tmp_path: Path) -> None:
    text = steps_of(page([pipeline(tmp_path / "p")], tmp_path))
    for label, *numbers in (
        ("SFT: perplexity of held-out answers", "135.2", "12.9", f"{MINUS}122.3"), ("reward model: accuracy on held-out pairs", "0.480", "0.810", "+0.330"),
        ("PPO: gold score", "0.490", "0.760", "+0.270"), ("PPO: KL to the policy before, nats an answer", "0.00", "5.20", "+5.20"),
        ("PPO: answer length, tokens", "20.0", "24.0", "+4.0"),
    ):  # fmt: skip
        assert re.search(rf"{re.escape(label)}\s+" + r"\s+".join(map(re.escape, numbers)), text), (label, text)
    assert "not done" not in text and "<details>" not in text


def test_seeds_are_averaged_and_differences_taken_seed_by_seed(tmp_path: Path) -> None:
    runs = []
    for seed, (before, after) in enumerate([(100.0, 10.0), (200.0, 30.0), (300.0, 20.0)]):
        steps = {"sft": {"sft/perplexity_before": before, "sft/perplexity": after}}
        runs.append(read_run(pipeline(tmp_path / str(seed), seed=seed, steps=steps)))
    (change,) = mean_changes(runs)
    assert (change.before.mean, change.after.mean, change.difference.mean) == (200.0, 20.0, -180.0)
    assert change.difference.values == {0: -90.0, 1: -170.0, 2: -280.0}
    text = page([tmp_path], tmp_path / "out")
    assert f"{MINUS}280 to {MINUS}90 †" in steps_of(text) and "fewer than 5 seeds" in steps_of(text)


def test_of_several_cells_the_tables_are_folded(tmp_path: Path) -> None:
    for i, kl_coef in enumerate((0.1, 0.5)):
        pipeline(tmp_path / str(i), kl_coef=kl_coef)
    text = page([tmp_path], tmp_path / "out")
    section = text[text.index("<section id=steps") :].partition("</section>")[0]
    assert re.findall(r"<summary>(.*?)</summary>", section) == ["kl_coef=0.1", "kl_coef=0.5"]


def test_a_pipeline_that_failed_shows_how_far_it_came(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "p", steps={"sft": SFT, "reward": REWARD}, status="failed", error="RuntimeError: ppo: no space left")
    run(folder / "ppo", None, verb="ppo")
    text = steps_of(page([folder], tmp_path / "out"))
    assert "0.810" in text and "PPO: gold" not in text and "This run is not done" in text
    (folder / "summary.json").unlink()
    (folder / "config.yaml").write_text("verb: pipeline\nseed: 0\nevaluation: {names: [base, ppo]}\n")
    assert "0.810" in steps_of(page([folder], tmp_path / "out")), "nor does a pipeline that was killed have a summary of its own"


def test_runs_of_other_verbs_have_no_such_section(tmp_path: Path) -> None:
    assert "What each step changed" not in page([run(tmp_path / "ppo")], tmp_path / "out")
