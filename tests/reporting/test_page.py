"""report.html: everything is in it, nothing of a run can break it, and a browser shows, sorts and fits it without any request."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Tab, binary, chromium
from experiment_folder import run, sweep

from rlhf.reporting.effects import nice_step
from rlhf.reporting.files import write_report

HOSTILE = "<script>alert(1)</script>&'\""
CURVE = "step,rollout/reward,rollout/kl\n" + "".join(f"{i},{i / 10},{i / 20}\n" for i in range(1, 30))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three weights on three seeds; one run failed, with a message that no page should take for its own."""
    place = sweep(
        tmp_path_factory.mktemp("report") / "s", [{"ppo.kl_coef": kl, "seed": seed} for kl in (0.1, 0.02, 0.5) for seed in range(3)]
    )
    for i in range(8):
        kl, seed = (0.1, 0.02, 0.5)[i // 3], i % 3
        gold = None if i == 4 else 0.5 + 0.1 * (i // 3) + 0.01 * seed * (1 + i // 3)
        run(place / str(i), gold, seed=seed, ppo={"kl_coef": kl}, curve=CURVE, metrics={} if gold is None else {"kl": 0.1 / kl},
            **({"error": HOSTILE} if gold is None else {}))  # fmt: skip
    (place / "4" / "log.txt").write_text("all of it")
    write_report([place], place)
    return place


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    pytest.importorskip("websocket", reason="pip install websocket-client")
    if binary() is None:
        pytest.skip("no chromium on this machine")
    with chromium(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


def test_all_files_are_written_whole(folder: Path) -> None:
    written = {path.name for path in folder.iterdir() if path.is_file()}
    assert written == {"sweep.yaml", "report.html", "table.csv", "table.md", "report_curves.png", "report_effects.png", "report_pareto.png"}
    for file in folder.glob("*.png"):
        assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 5000


def test_a_figure_with_nothing_left_to_draw_is_taken_away(folder: Path, tmp_path: Path) -> None:
    write_report([folder], tmp_path)
    assert (tmp_path / "report_effects.png").is_file()
    run(tmp_path / "one")
    write_report([tmp_path / "one"], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"one", "report.html", "table.csv", "table.md"}


def test_the_page_holds_the_answer_and_everything_that_qualifies_it(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    for text in (
        "<strong>kl_coef=0.5</strong> is best: gold/ppo", "7 of 9 runs are done", "1 failed", "1 running or not started", "rlhf ppo -m ppo.kl_coef=0.02,0.1 seed=0,1",
        '<a href="4/log.txt">', "no run directory yet", "CPU, x86, 1 thread", "Reward of the rollouts", "gold/ppo against <span>kl</span>", "†",
    ):  # fmt: skip
        assert text in page, text


def test_nothing_of_a_run_is_markup(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert HOSTILE not in page and "&lt;script&gt;alert(1)&lt;/script&gt;&amp;" in page


def test_a_name_may_hold_what_would_be_mathematics(tmp_path: Path) -> None:
    names = ("$\\nope{$", "$x^2$", "a\\d")
    place = sweep(tmp_path / "s", [{"ppo.tag": name, "seed": seed} for name in names for seed in range(2)])
    for i in range(6):
        metrics = {"kl": 1.0 + i, "reward/$\\nope{$": i / 10}
        run(place / str(i), None, seed=i % 2, ppo={"tag": names[i // 2]}, curve=CURVE, metrics=metrics, status="done")
    write_report([place], place, metric="reward/$\\nope{$")
    assert {file.name for file in place.glob("*.png")} == {"report_curves.png", "report_effects.png", "report_pareto.png"}
    assert "$\\nope{$ against kl, a cross for each cell" in (place / "report.html").read_text(encoding="utf-8")


def test_the_page_names_no_other_address(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert re.findall(r"(?:src|href)=\"(?!#|data:,|4/log\.txt)[^\"]*\"|url\((?!#)[^)]*\)|@import", page) == []


def test_drawings_take_their_colours_from_the_page(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    drawn = re.findall(r"<svg role=.*?</svg>", page, re.DOTALL)
    assert len(drawn) == 4 and all("var(--c1)" in svg and "#0f68b3" not in svg for svg in drawn)


@pytest.mark.parametrize(("width", "step"), [(0.1, 0.02), (1.0, 0.2), (3.0, 1.0), (0.017, 0.005), (0.0, 1.0)])
def test_steps_of_an_axis_are_round(width: float, step: float) -> None:
    assert nice_step(width) == pytest.approx(step)


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_browser_shows_it_without_requests_complaints_or_a_page_that_scrolls_sideways(
    folder: Path, tab: Tab, width: int, theme: str
) -> None:
    tab.requests.clear()
    tab.open(folder / "report.html", width=width, theme=theme)
    tab.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert tab.run("document.documentElement.scrollWidth") <= width
    inside = "[...document.querySelectorAll('p, h1, h2, dd, pre, figure, .effects, .legend')]"
    assert tab.run(f"Math.max(...{inside}.map((one) => one.getBoundingClientRect().right))") <= width
    shade = tab.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (sum(shade) > 700) == (theme == "light")
    assert tab.complaints == [] and tab.requests == [(folder / "report.html").resolve().as_uri()]


def test_columns_sort_by_click_and_by_key(folder: Path, tab: Tab) -> None:
    tab.open(folder / "report.html", width=1280)
    names = "[...document.querySelectorAll('table.cells tbody th')].map((one) => one.textContent)"
    state = "[...document.querySelectorAll('table.cells thead th')].map((one) => one.ariaSort)"
    assert tab.run(names) == ["kl_coef=0.1", "kl_coef=0.02", "kl_coef=0.5"]
    tab.run("document.querySelectorAll('table.cells thead button')[2].click()")
    assert tab.run(names) == ["kl_coef=0.1", "kl_coef=0.02", "kl_coef=0.5"] and tab.run(state)[2] == "ascending"
    tab.run("document.querySelectorAll('table.cells thead button')[2].focus()")
    tab.press("Enter", 13, "\r")
    assert tab.run(names) == ["kl_coef=0.5", "kl_coef=0.02", "kl_coef=0.1"] and tab.run(state)[2] == "descending"
    tab.run("document.querySelectorAll('table.cells thead button')[0].focus()")
    tab.press(" ", 32, " ")
    assert tab.run(names) == ["kl_coef=0.02", "kl_coef=0.1", "kl_coef=0.5"] and tab.run(state)[:3] == ["ascending", "none", "none"]
    tab.run("document.querySelectorAll('table.cells thead button')[4].click()")
    assert tab.run(names)[-1] == "kl_coef=0.1", "the baseline has no difference: last in either order"
    tab.run("document.querySelectorAll('table.cells thead button')[4].click()")
    assert tab.run(names)[-1] == "kl_coef=0.1" and tab.complaints == []
