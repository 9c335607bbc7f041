"""`rlhf report` as a user meets it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from experiment_folder import RESULTS, folder, run, sweep

from rlhf.cli.main import main
from rlhf.cli.report.verb import with_runs
from rlhf.reporting.page import BEGIN, END


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_folder_is_printed_and_drawn(capsys: pytest.CaptureFixture[str], elsewhere: Path) -> None:
    place = folder(elsewhere / "experiments" / "t")
    (place / "README.md").write_text(f"# The table of tests\n\n{BEGIN}\n{END}\n\nVerdict.\n")
    assert main(["report", "experiments/t"]) == 0
    out = capsys.readouterr().out
    for word in (
        "The table of tests",
        "published",
        "measured",
        "+20%",
        "5 (Some Card)",
        "not run: needs 8 GPUs (card-a)",
        "not run: needs 1 GPU (card-b)",
        "held-out rows 10.0%",
    ):
        assert word in out
    table = (place / "table.md").read_text()
    assert "| small | card-a | 1 | hours | 10 | 12 | +20% | fitted | 6 | 5 (Some Card) | +20% |" in table
    readme = (place / "README.md").read_text()
    assert table in readme and readme.endswith("Verdict.\n")
    assert (place / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in place.iterdir()) == [
        "README.md", "modelled.csv", "plot.png", "published.csv", "results.csv", "table.md",
    ]  # fmt: skip
    assert [path.name for path in elsewhere.iterdir()] == ["experiments"], "a report leaves no run directory"


def test_several_folders_have_medians_together(capsys: pytest.CaptureFixture[str], elsewhere: Path) -> None:
    folder(elsewhere / "a")
    folder(elsewhere / "with 'quotes' and, commas")
    assert main(["report", "a", "with 'quotes' and, commas/"]) == 0
    out = capsys.readouterr().out
    assert "All folders together. Median error of the model with the original's engine: all rows 15.0%" in out
    assert (elsewhere / "with 'quotes' and, commas" / "table.md").is_file()


def test_the_key_is_as_good_as_the_words(elsewhere: Path) -> None:
    folder(elsewhere / "a")
    assert main(["report", "report.runs=[a]"]) == 0
    assert (elsewhere / "a" / "plot.png").is_file()


def test_a_folder_with_an_equals_sign_is_a_folder(elsewhere: Path) -> None:
    (elsewhere / "lr=0.1").mkdir()
    assert with_runs(["lr=0.1", "x", "--cfg", "job"]) == ["report.runs=['lr=0.1','x']", "--cfg", "job"]
    assert with_runs(["lr=0.2"]) == ["lr=0.2"]


def test_a_folder_with_a_backslash_is_found(elsewhere: Path) -> None:
    folder(elsewhere / "a\\b")
    assert main(["report", "a\\b"]) == 0
    assert (elsewhere / "a\\b" / "table.md").is_file()


def test_names_of_cells_are_taken_as_they_are_typed() -> None:
    words = [
        "s",
        "report.metric=gold/ppo",
        "report.baseline=a.b=0.05 it's=x,y",
        "report.out=null",
        "report.out='x y'",
        "report.metrics=[kl]",
    ]
    assert with_runs(words) == [
        "report.runs=['s']", "report.metric='gold/ppo'", r"report.baseline='a.b=0.05 it\'s=x,y'", "report.out=null", "report.out='x y'",
        "report.metrics=[kl]",
    ]  # fmt: skip


def two_weights(place: Path) -> Path:
    """A sweep of two KL weights on two seeds, one run failed."""
    sweep(place, [{"ppo.kl_coef": kl, "seed": seed} for kl in (0.1, 0.05) for seed in (0, 1)])
    for i, gold in enumerate((0.5, 0.6, 0.7, None)):
        run(place / str(i), gold, seed=i % 2, ppo={"kl_coef": (0.1, 0.05)[i // 2]}, metrics={"kl": 1.0 + i})
    return place


def test_runs_are_compared_on_one_page(capsys: pytest.CaptureFixture[str], elsewhere: Path) -> None:
    place = two_weights(elsewhere / "s")
    (place / "3" / "log.txt").write_text("")
    assert (
        main(["report", "s", "report.metric=gold/ppo", "report.baseline=ppo.kl_coef=0.05", "report.metrics=[kl]", "report.out=made/here"])
        == 0
    )
    out = capsys.readouterr().out
    for text in (
        "kl_coef=0.1", "kl_coef=0.05, the baseline, is best: gold/ppo 0.700 (1 seed; 1 of its 2 runs is not done)",
        "s/3 (kl_coef=0.05): failed: RuntimeError: no space left: see s/3/log.txt", "3 of 4 runs are done, 1 failed.", "wrote made/here/report.html",
    ):  # fmt: skip
        assert text in out, text
    assert sorted(path.name for path in (elsewhere / "made" / "here").iterdir()) == [
        "report.html", "report_effects.png", "report_pareto.png", "table.csv", "table.md",
    ]  # fmt: skip
    assert not (place / "report.html").exists()


def test_runs_and_published_tables_go_together(capsys: pytest.CaptureFixture[str], elsewhere: Path) -> None:
    folder(elsewhere / "t")
    two_weights(elsewhere / "s")
    assert main(["report", "t", "s"]) == 0
    assert (elsewhere / "t" / "plot.png").is_file() and not (elsewhere / "t" / "report.html").exists()
    assert (elsewhere / "s" / "report.html").is_file() and "wrote s/report.html" in capsys.readouterr().out


def test_a_report_imports_no_torch(elsewhere: Path) -> None:
    folder(elsewhere / "a")
    two_weights(elsewhere / "s")
    code = (
        "import sys; from rlhf.cli.main import main; code = main(['report', 'a', 's']);"
        "print('heavy:', sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'lightning', 'transformers', 'deepspeed', 'datasets'}));"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert "heavy: []" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "report.runs is empty: name a folder, as in rlhf report runs/ppo/my-sweep or rlhf report experiments/table1"),
        (("b",), "report.runs: there is no folder b"),
        (("empty",), "report.runs: empty holds no run (no summary.json, config.yaml or sweep.yaml in it or below) and no published.csv"),
        (("half",), "report.runs: half has no modelled.csv; rlhf report reads folders with published.csv, modelled.csv and results.csv"),
        (
            ("s", "report.metric=gold/pp"),
            "report.metric=gold/pp: no finished run has this metric (did you mean 'gold/ppo'?); there are gold/ppo, kl",
        ),
        (
            ("s", "report.baseline=kl_coef=0.06"),
            "report.baseline=kl_coef=0.06: no such cell (did you mean 'kl_coef=0.05'?); there are kl_coef=0.1, ",
        ),
        (("s", "report.metrics=[kl,kll]"), "report.metrics: no finished run has the metric kll (did you mean 'kl'?)"),
        (("s", "report.metrics=[kl,kl]"), "report.metrics names a metric twice: ['kl', 'kl']"),
        (("s", "report.direction=up"), "report.direction: expected one of higher, lower | null, got 'up'"),
        (("s", "report.out="), "report.out must not be empty; null stands for the default"),
        (("s", "report.out=s/sweep.yaml"), "report.out=s/sweep.yaml: cannot be written to: File exists"),
        (("a", "report.baseline=x"), "report.baseline is for runs and sweeps, and a holds published tables"),
        (("a", "report.direction=lower"), "report.direction is for runs and sweeps, and a holds published tables"),
        (("broken",), "broken/results.csv:4: value must be a number above 0, got 'fast'"),
        (("a", "report.runs=[b]"), "report.runs is a already, the words right after rlhf report"),
        (("a", "a"), "report.runs names a folder twice: ['a', 'a']"),
        (("a", "run_dir=x"), "run_dir: rlhf report leaves no run directory; report.out=PATH says where its page goes"),
        (("a", "trainer=gpu"), "trainer: no such key"),
        (("a", "report.run=b"), "report.run: no such key (did you mean 'report.runs'?)"),
        (("report.runs=a",), "report.runs: expected list[str], got 'a'"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    words: tuple[str, ...], message: str, refused: Callable[..., str], elsewhere: Path
) -> None:
    folder(elsewhere / "a")
    folder(elsewhere / "broken", results=RESULTS + "card-a/8/small/hours,fast,hours,c,x,y\n")
    (elsewhere / "empty").mkdir()
    (folder(elsewhere / "half") / "modelled.csv").unlink()
    two_weights(elsewhere / "s")
    assert message in refused("report", *words)
    assert not list(elsewhere.rglob("*.png")) and not list(elsewhere.rglob("table.md"))


def test_one_bad_folder_keeps_the_others_from_being_written(refused: Callable[..., str], elsewhere: Path) -> None:
    folder(elsewhere / "a")
    assert "there is no folder b" in refused("report", "a", "b")
    assert not (elsewhere / "a" / "table.md").exists()
