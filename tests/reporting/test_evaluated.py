"""What `rlhf evaluate` found, on the page of an evaluation and of a pipeline: as the evaluation prints it, with calibration and answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Tab, binary, chromium
from experiment_folder import run
from pipelines import ANSWERS, EVALUATE, SFT, pipeline

from rlhf.cli.evaluate.page import comparison_table
from rlhf.cli.report.evaluation import calibration_bins, policies, read_evaluated
from rlhf.cli.summary_page import print_pipeline
from rlhf.modules.measures import JudgedPrompt, calibration, pair_metrics, wilson
from rlhf.reporting.files import write_report
from rlhf.reporting.runs import read_run
from rlhf.reporting.study import Study
from rlhf.reporting.words import MINUS


def report(folders: list[Path], out: Path) -> tuple[str, Study]:
    """The section, as `rlhf report` makes it."""
    study = write_report(folders, out, evaluation=read_evaluated)
    section = re.search(r"<section id=evaluation.*?</section>", (out / "report.html").read_text(encoding="utf-8"), re.DOTALL)
    return ("" if section is None else section.group()), study


def plain(markup: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", markup))


@pytest.mark.parametrize("part", ["", "evaluate"], ids=["pipeline", "evaluation"])
def test_the_page_shows_what_the_evaluation_prints(part: str, tmp_path: Path) -> None:
    section, study = report([pipeline(tmp_path / "p") / part], tmp_path / "out")
    printed = comparison_table("", EVALUATE, ["base", "ppo"])
    text = plain(section)
    for row in zip(*(map(str, column.cells) for column in printed.columns), strict=True):
        assert " ".join(" ".join(row).split()).replace("-", MINUS) in text.replace("-", MINUS), row
    assert "wins by gold 0.700 0.600 to 0.800" in text and "on web 0.900" in text and "on books 0.600" in text
    assert str(printed.caption)[1:] in text and study.warnings == ()


def test_the_calibration_is_drawn_and_tabled(tmp_path: Path) -> None:
    section, _ = report([pipeline(tmp_path / "p")], tmp_path / "out")
    assert section.count("<svg") == 1 and "var(--c1)" in section
    low, high = wilson(0.9, 1200)
    assert f"1,200 0.930 0.900 {low:.3f} to {high:.3f}" in plain(section) and "Calibration error 0.031." in plain(section)


def test_the_bins_are_those_of_the_measure() -> None:
    margins = [0.1, -0.2, 1.0, 2.0, -2.0, 0.0, 6.0]
    bins = calibration_bins(pair_metrics([JudgedPrompt(source="web", margins=margins)]))
    expected = calibration(margins)
    assert [(one.name, one.count, one.predicted, one.right) for one in bins] == [(b.name, b.count, b.predicted, b.right) for b in expected]
    assert calibration_bins({"calibration/50-55/count": 3.0, "calibration/50-55/right": 0.5}) == (), "half a bin is none"


def test_prompts_stand_with_their_answers_and_nothing_of_them_is_markup(tmp_path: Path) -> None:
    section, _ = report([pipeline(tmp_path / "p")], tmp_path / "out")
    fixed, held_out = section.split("<details>")
    assert "What is red?" in fixed and "a &lt;i&gt;plum&lt;/i&gt;" in fixed and "reward -0.50, 8 tokens, cut off" in fixed
    assert "Answers to held-out prompts (1)" in held_out and "Say &lt;b&gt;hi&lt;/b&gt;." in held_out
    assert "hi\n  there" in held_out and "gold 1.00, 3 tokens<" in held_out
    assert "<i>" not in section and "<b>" not in section


def test_one_policy_alone_has_no_difference(tmp_path: Path) -> None:
    assert policies({"evaluation": {"names": ["a", "b"]}, "ref": {"init": None}}) == ["b"]
    metrics = {"reward/b": 1.0, "reward/accuracy": 0.7}
    own = {"verb": "evaluate", "seed": 0, "evaluation": {"names": ["a", "b"]}, "ref": {"init": None}}
    section, _ = report(
        [run(tmp_path / "e", None, verb="evaluate", status="done", error=None, metrics=metrics, config=own)], tmp_path / "out"
    )
    assert "difference" not in section and "reward model: accuracy 0.700" in plain(section) and "reward 1.000" in plain(section)


def test_a_malformed_file_of_answers_costs_the_answers_alone(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "p")
    file = folder / "evaluate" / "samples.jsonl"
    for text, what in (("{}\n", ":1: no prompt"), (json.dumps(ANSWERS[0]) + "\n{torn", ":2: not JSON")):
        file.write_text(text)
        section, study = report([folder], tmp_path / "out")
        assert "wins by gold" in section and "samples" not in section
        assert study.warnings == (next(w for w in study.warnings if w.startswith("No answers of the evaluation") and what in w),)
    file.write_bytes(b"\xff\xfe")
    assert "not text" in report([folder], tmp_path / "out")[1].warnings[0]
    file.unlink()
    assert report([folder], tmp_path / "out")[1].warnings == ()


def test_an_answer_with_other_ends_of_lines_is_one_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pipeline(tmp_path / "p")
    odd = ANSWERS[0] | {"base": "one\u0085two\u2028three\u2029four", "ppo": "\x1cfive"}
    file = folder / "evaluate" / "samples.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in (odd, ANSWERS[1])), encoding="utf-8")
    section, study = report([folder], tmp_path / "out")
    assert study.warnings == () and "one\u0085two\u2028three\u2029four" in section and "What is red?" in section
    print_pipeline(folder, {}, {"total": 1.0}, ["base", "ppo"], None)
    printed = capsys.readouterr().out
    assert "four" in printed and "plum" in printed


def test_only_the_page_of_one_run_has_it(tmp_path: Path) -> None:
    for seed in range(2):
        pipeline(tmp_path / "two" / str(seed), seed=seed)
    assert report([tmp_path / "two"], tmp_path / "out")[0] == ""
    without = pipeline(tmp_path / "without", steps={"sft": SFT})
    assert read_evaluated(read_run(without)) is None and read_evaluated(read_run(run(tmp_path / "ppo"))) is None


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    pytest.importorskip("websocket", reason="pip install websocket-client")
    if binary() is None:
        pytest.skip("no chromium on this machine")
    with chromium(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_both_sections_without_a_page_that_scrolls_sideways(width: int, tab: Tab, tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "p")
    long = ANSWERS[1] | {"base": "word" * 200, "prompt": "long" * 100}
    (folder / "evaluate" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (*ANSWERS, long)))
    write_report([folder], folder, evaluation=read_evaluated)
    tab.open(folder / "report.html", width=width)
    tab.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert tab.run("document.documentElement.scrollWidth") <= width
    inside = "[...document.querySelectorAll('#steps p, #evaluation h3, #evaluation p, #evaluation dd, #evaluation figure')]"
    assert tab.run(f"Math.max(...{inside}.map((one) => one.getBoundingClientRect().right))") <= width
    steps = "document.querySelector('#steps .scroll')"
    assert tab.run(f"{steps}.scrollWidth <= {steps}.clientWidth"), "before, after and difference are all seen at once"
    assert tab.run("document.querySelectorAll('#steps tbody tr').length") == 6 and tab.complaints == []
