"""From runs to an answer: the numbers of a tiny study by hand, what is in no mean, what is warned of, what is refused."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import pytest
from experiment_folder import run, sweep

from rlhf.config import UserError
from rlhf.reporting.effects import forest
from rlhf.reporting.files import write_report
from rlhf.reporting.study import Study, lower_is_better, read_study
from rlhf.reporting.study_table import as_csv, as_markdown
from rlhf.reporting.words import caveats, counts, decimals, headline, interval, number, title

GOLDS = {0.1: [0.50, 0.60, 0.70], 0.02: [0.60, 0.80, None], 0.5: [0.45, 0.52, 0.66]}
"""KL weight -> gold score of seeds 0 to 2; None: the run failed."""


def study(folder: Path, **asked: str | list[str]) -> Study:
    return read_study([folder], **({"metric": None, "baseline": None, "metrics": None, "direction": None} | asked))  # type: ignore[arg-type]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    folder = sweep(tmp_path / "s", [{"ppo.kl_coef": kl, "seed": seed} for kl in GOLDS for seed in range(3)])
    for i, (kl, seed) in enumerate((kl, seed) for kl in GOLDS for seed in range(3)):
        gold = GOLDS[kl][seed]
        run(folder / str(i), gold, seed=seed, ppo={"kl_coef": kl}, **({} if gold is None else {"metrics": {"kl": 1 / kl, "gold/sft": 0.4}}))
    (folder / "5" / "log.txt").write_text("all of it")
    return folder


def test_the_numbers_by_hand(small: Path) -> None:
    found = study(small)
    base, low, high = found.results
    assert (found.metric, found.baseline, found.columns) == ("gold/ppo", "kl_coef=0.1", ("kl", "hours"))
    one = base.estimates["gold/ppo"]
    assert one.mean == pytest.approx((0.5 + 0.6 + 0.7) / 3) and one.sd == pytest.approx(math.sqrt((0.01 + 0 + 0.01) / 2))
    assert (one.low, one.high) == pytest.approx((0.5, 0.7)), "of 27 draws, one is the lowest value three times: 3.7 %"
    assert base.differences == {} and base.verdict == "baseline"
    assert low.estimates["gold/ppo"].mean == pytest.approx((0.6 + 0.8) / 2), "the failed run is in no mean"
    difference = low.differences["gold/ppo"]
    assert difference.values == pytest.approx({0: 0.6 - 0.5, 1: 0.8 - 0.6}) and difference.mean == pytest.approx(0.15)
    assert (difference.low, difference.high) == pytest.approx((0.1, 0.2)) and low.verdict == "helps"
    half = 12.706 * math.sqrt(2 * 0.05**2) / math.sqrt(2)
    assert difference.student_low == pytest.approx(0.15 - half) and not difference.excludes_zero_by_student
    assert high.differences["gold/ppo"].mean == pytest.approx((-0.05 - 0.08 - 0.04) / 3) and high.verdict == "hurts"
    assert high.differences["kl"].mean == pytest.approx(1 / 0.5 - 1 / 0.1)


def test_the_answer_in_words(small: Path) -> None:
    found = study(small)
    assert title(found) == "gold/ppo by kl_coef"
    assert headline(found) == (
        "kl_coef=0.02 is best: gold/ppo 0.70 (0.60 to 0.80, 2 seeds; 1 of its 3 runs is not done), +0.15 (+0.10 to +0.20) "
        "against the baseline kl_coef=0.1."
    )
    assert caveats(found) == [
        "By Student's t the interval of this difference is −0.49 to +0.79, which holds 0.",  # noqa: RUF001
        "With 2 seeds a bootstrap interval is too narrow: about 11 % as wide as Student's.",
    ]
    assert counts(found) == "8 of 9 runs are done, 1 failed"


def test_the_best_may_be_the_baseline(small: Path) -> None:
    found = study(small, baseline="ppo.kl_coef=0.02")
    assert headline(found).startswith("kl_coef=0.02, the baseline, is best: gold/ppo 0.70 (0.60 to 0.80, 2 seeds")
    assert headline(found).endswith("Next is kl_coef=0.1, −0.15 (−0.20 to −0.10) against it.")  # noqa: RUF001


def test_one_lucky_seed_is_no_winner(tmp_path: Path) -> None:
    for name, golds in (("a", [0.5, 0.6, 0.7]), ("b", [0.9, None, None])):
        for seed, gold in enumerate(golds):
            run(tmp_path / name / str(seed), gold, seed=seed, ppo={"x": name})
    found = study(tmp_path)
    best = found.best()
    assert best is not None and best.name == "x=a" and [result.name for result in found.ranked()] == ["x=b", "x=a"]


def test_less_may_be_better(small: Path) -> None:
    assert [lower_is_better(name) for name in ("kl", "sft/eval_loss", "seconds/ppo", "rollout/kl_k3", "gold/ppo", "rollout/reward")] == [
        True, True, True, True, False, False,
    ]  # fmt: skip
    best, other = study(small, metric="kl").best(), study(small, metric="gold/ppo", direction="lower").best()
    assert best is not None and best.name == "kl_coef=0.5" and other is not None and other.name == "kl_coef=0.5"


def test_every_cell_and_metric_is_a_row(small: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(study(small, metrics=["kl"])))))
    assert [(row["cell"], row["metric"]) for row in rows][:3] == [
        ("kl_coef=0.1", "gold/ppo"),
        ("kl_coef=0.1", "kl"),
        ("kl_coef=0.02", "gold/ppo"),
    ]
    low = rows[2]
    assert {key: low[key] for key in ("runs", "done", "n", "mean", "pairs", "difference", "difference_low", "verdict", "too_narrow", "ppo.kl_coef")} == {
        "runs": "3", "done": "2", "n": "2", "mean": "0.7", "pairs": "2", "difference": "0.15", "difference_low": "0.1", "verdict": "helps",
        "too_narrow": "yes", "ppo.kl_coef": "0.02",
    }  # fmt: skip
    assert (rows[3]["metric"], rows[3]["verdict"]) == ("kl", "hurts"), "more KL is not better"
    assert rows[0]["difference"] == "" and rows[0]["verdict"] == "baseline"


def test_the_page_in_markdown_lists_what_is_not_done(small: Path) -> None:
    text = as_markdown(study(small))
    assert "| kl_coef=0.02 | 2 of 3 | 0.70 | 0.14 | 0.60 to 0.80 | +0.15 | +0.10 to +0.20 | no | helps | 50.0 | 1.00 |" in text
    assert f"| {small / '5'} | kl_coef=0.02 | 2 | failed | RuntimeError: no space left | {small / '5' / 'log.txt'} |" in text


def test_a_key_as_baseline_may_be_short_or_in_every_cell(small: Path) -> None:
    assert study(small, baseline="kl_coef=5e-1").baseline == study(small, baseline="kl_coef=0.5, epochs=1").baseline == "kl_coef=0.5"
    with pytest.raises(
        UserError, match=r"report\.baseline=epochs=1 fits 3 cells, name one of them: kl_coef=0\.1, kl_coef=0\.02, kl_coef=0\.5"
    ):
        study(small, baseline="epochs=1")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"metric": "gold/pppo"},
            r"report\.metric=gold/pppo: no finished run has this metric \(did you mean 'gold/ppo'\?\); there are gold/ppo, kl",
        ),
        ({"metrics": ["kll"]}, r"report\.metrics: no finished run has the metric kll \(did you mean 'kl'\?\)"),
        (
            {"baseline": "kl_coef=0.3"},
            r"report\.baseline=kl_coef=0\.3: no such cell \(did you mean 'kl_coef=0\.5'\?\); there are kl_coef=0\.1, ",
        ),
    ],
)
def test_what_is_not_there_is_refused_with_the_nearest(asked: dict[str, str | list[str]], message: str, small: Path) -> None:
    with pytest.raises(UserError, match=message):
        study(small, **asked)


def test_the_metric_is_the_first_of_a_list(tmp_path: Path) -> None:
    run(tmp_path / "0", metrics={"reward/ppo": 1.0})
    assert study(tmp_path).metric == "gold/ppo"
    for metrics, first in (
        ({"gold/dpo": 1.0, "gold/sft": 1.0, "rollout/reward": 1.0}, "gold/dpo"),
        ({"sft/eval_loss": 1.0, "reward/accuracy": 0.5}, "reward/accuracy"),
        ({"mine": 1.0}, "mine"),
    ):
        run(tmp_path / "0", None, status="done", metrics=metrics)
        assert study(tmp_path).metric == first


def test_runs_without_the_metric_are_left_out_and_said_so(small: Path) -> None:
    """The SFT runs that the others start from make no cells."""
    run(small.parent / "base" / "seed-0", None, verb="sft", status="done", metrics={"sft/loss": 1.0})
    found = study(small.parent)
    assert len(found.results) == 3 and [one.name for one in found.left_out] == [str(small.parent / "base" / "seed-0")]
    assert counts(found).endswith("1 more without gold/ppo")


def test_a_named_cell_keeps_its_runs_that_ended_in_a_step(tmp_path: Path) -> None:
    """A run that diverged has the summary of its step, of another verb: it is still one of the cell's five."""
    for seed in range(3):
        run(tmp_path / "b" / f"seed-{seed}", None if seed == 1 else 0.5, seed=seed, cell="b", verb="ppo" if seed == 1 else "pipeline")
    found = study(tmp_path)
    assert [(result.name, result.cell.counts()) for result in found.results] == [("b", "2 of 3")]
    assert [(one.seed, cell) for one, cell in found.not_done] == [(1, "b")]


def test_nothing_is_done_yet(tmp_path: Path) -> None:
    found = study(sweep(tmp_path / "s", [{"ppo.kl_coef": 0.1, "seed": 0}]), metric="gold/ppo")
    assert (found.metric, found.best(), found.baseline) == (None, None, None)
    assert headline(found) == "No run is done yet."
    assert "0 of 1 runs are done, 1 running or not started." in as_markdown(found) and as_csv(found).count("\n") == 1


def test_what_makes_a_comparison_less_than_it_seems(small: Path) -> None:
    run(
        small / "8",
        0.66,
        seed=2,
        ppo={"kl_coef": 0.5},
        commit="def+",
        hardware={"gpus": ["H100"]},
        metrics={"kl": float("nan"), "gold/sft": 0.41},
    )
    run(small.parent / "again", 0.9, seed=0, ppo={"kl_coef": 0.1}, metrics={"gold/sft": 0.4})
    (small / "7" / "summary.json").write_text("{")
    found = study(small.parent)
    assert list(found.warnings) == [
        f"Not read: {small / '7' / 'summary.json'}:1: not JSON: Expecting property name enclosed in double quotes",
        "Under seed 2 some runs start from different SFT models (their gold/sft differs), so that paired differences hold more than the settings.",
        "Runs of different commits: abc (7), def+ (1).",
        "Runs of different hardware: CPU, x86, 1 thread (7), 1 x H100 (1).",
        "Files differed from the commit when runs began: def+.",
        "kl_coef=0.1 has several runs of seed 0: each seed counts once, with their mean.",
        f"kl is no finite number in {small / '8'}, which are left out of its means.",
    ]
    base = found.base
    assert base is not None and base.estimates["gold/ppo"].values[0] == pytest.approx((0.5 + 0.9) / 2) and base.estimates["gold/ppo"].n == 3


@pytest.mark.parametrize("metric", ["gold/ppo", "kl"])
def test_a_number_too_large_for_a_mean_is_said_and_left_out(metric: str, tmp_path: Path) -> None:
    folder = sweep(tmp_path / "s", [{"ppo.kl_coef": kl, "seed": seed} for kl in (0.1, 0.2) for seed in (0, 1, 2)])
    for i in range(6):
        values = {"gold/ppo": 0.5, "kl": 1.0 + i} | ({metric: 1e308} if i == 4 else {})
        curve = "step,rollout/kl\n1,1\n2,-1.7e308\n3,1e308\n4,inf\n5,2\n"
        run(folder / str(i), seed=i % 3, ppo={"kl_coef": (0.1, 0.2)[i // 3]}, metrics=values, curve=curve)
    found = write_report([folder], tmp_path / "out")
    assert f"{metric} is too large a number for a mean in {folder / '4'} (1e+308), which are left out of its means." in found.warnings
    assert found.results[1].estimates[metric].n == 2
    assert "1e+308" in (tmp_path / "out" / "report.html").read_text()


def test_what_is_studied_is_no_start(tmp_path: Path) -> None:
    """SFT runs differ in their loss because that is what they are about."""
    for i, (lr, loss) in enumerate([(0.1, 4.0), (0.2, 3.0)]):
        run(tmp_path / "sft" / str(i), None, verb="sft", status="done", ppo={"lr": lr}, metrics={"sft/eval_loss": loss})
        run(tmp_path / "pipeline" / str(i), loss / 10, verb="pipeline", ppo={"lr": lr}, metrics={"sft/eval_loss": loss})
    assert study(tmp_path / "sft", metric="hours").warnings == study(tmp_path / "pipeline", metric="sft/eval_loss").warnings == ()
    assert "start from different SFT models (their sft/eval_loss differs)" in study(tmp_path / "pipeline").warnings[0]


def test_many_comparisons_are_counted(tmp_path: Path) -> None:
    for i in range(21):
        for seed in range(5):
            run(
                tmp_path / str(i) / str(seed),
                0.5 + 0.01 * seed + (0.1 if i == 20 else 0.001 * (-1) ** seed * (i > 0)),
                seed=seed,
                ppo={"x": i},
            )
    assert caveats(study(tmp_path)) == [
        "1 of 20 comparisons have an interval without 0; about 1 would by chance alone, and more with few seeds."
    ]


def test_numbers_as_they_are_shown() -> None:
    assert number(-0.0004, 3) == "0.000" and number(0.05, 2, sign=True) == "+0.05" and number(1234.5, 0) == "1,234"
    assert number(-1e99, 2) == "−1e+99"  # noqa: RUF001
    assert interval(-0.1, 0.25, 2, sign=True) == "−0.10 to +0.25" and interval(math.nan, math.nan, 2) == "–"  # noqa: RUF001
    assert decimals([]) == 2


def test_cells_that_do_not_differ_at_all_are_drawn(tmp_path: Path) -> None:
    folder = sweep(tmp_path / "s", [{"ppo.kl_coef": kl, "seed": 0} for kl in (0.1, 0.2)])
    for i, kl in enumerate((0.1, 0.2)):
        run(folder / str(i), 0.5, seed=0, ppo={"kl_coef": kl})
    found = study(folder)
    assert "NaN" not in forest(found, [result for result in found.results if result.differences])
