"""Published, modelled and measured numbers: what is read of the files, what is counted, and which rows are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from experiment_folder import MODELLED, PUBLISHED, RESULTS, folder

from rlhf.config import UserError
from rlhf.reporting.page import BEGIN, END, as_markdown, into_readme
from rlhf.reporting.plot import draw
from rlhf.reporting.tables import median_error, read_experiment


def test_rows_are_joined_by_cell_and_errors_counted_by_hand(tmp_path: Path) -> None:
    found = read_experiment(folder(tmp_path / "t"))
    rows = {row.cell: row for row in found.rows}
    assert list(rows) == ["card-a/1/small/hours", "card-a/8/small/hours", "card-a/8/large/hours", "card-b/1/small/hours"]
    first, second, third, extra = rows.values()
    assert first.error == pytest.approx(12 / 10 - 1) and first.half == "fitted"
    assert second.error == pytest.approx(1.8 / 2 - 1) and second.half == "held out"
    assert third.dschat is None and third.error is None
    assert extra.published is None and extra.error is None
    assert first.measured is not None and first.measured.value == 5, "the last of two measurements"
    assert first.error_ours == pytest.approx(6 / 5 - 1)
    assert (second.absent, extra.absent) == ("not run: needs 8 GPUs (card-a)", "not run: needs 1 GPU (card-b)")
    assert median_error(list(found.rows)) == pytest.approx(0.15)
    assert median_error(list(found.rows), "held out") == pytest.approx(0.1)
    assert median_error([extra]) is None
    assert [one.cell for one in found.left_out] == ["samples"]


def test_the_page_shows_every_number_and_what_is_missing(tmp_path: Path) -> None:
    lines = as_markdown(read_experiment(folder(tmp_path / "t"))).splitlines()
    assert "| small | card-a | 1 | hours | 10 | 12 | +20% | fitted | 6 | 5 (Some Card) | +20% |" in lines
    assert "| small | card-a | 8 | hours | 2 | 1.8 | -10% | held out | 1 | not run: needs 8 GPUs (card-a) |  |" in lines
    assert "| large | card-a | 8 | hours | 20 |  |  |  | 9 | not run: needs 8 GPUs (card-a) |  |" in lines
    assert "| small | card-b | 1 | hours |  | 3 |  |  | 2 | not run: needs 1 GPU (card-b) |  |" in lines
    assert "Median error of the model with the original's engine: all rows 15.0%, fitted rows 20.0%, held-out rows 10.0%." in lines
    assert "- card-a/1/small/hours: printed as \\| days" not in lines and "- card-a/1/small/hours: printed as days, about" in lines
    assert "Published and not modelled: samples 100 samples." in lines


def test_scaling_is_a_line_for_each_model_and_engine(tmp_path: Path) -> None:
    scale = "model,engine,gpus,sequences_per_s,stops\nsmall,ours,8,1,\nsmall,ours,16,1.9,\nsmall,ours,32,2,batch stays\nlarge,ours,16,3,\n"
    found = read_experiment(folder(tmp_path / "t", scale=scale))
    lines = as_markdown(found).splitlines()
    assert "| actor | engine | 8 | 16 | 32 | stops at |" in lines
    assert "| small | ours | 1 | 1.9 | 2 | 32 (batch stays) |" in lines
    assert "| large | ours |  | 3 |  | not in this range |" in lines
    draw(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_titles_and_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    """matplotlib reads dollars as formulas, and does not draw one that is wrong."""
    place = folder(
        tmp_path / "t",
        published=PUBLISHED.replace("small", "$\\nope{$"),
        modelled=MODELLED.replace("small", "$\\nope{$"),
        results=RESULTS.replace("small", "$\\nope{$"),
    )
    (place / "README.md").write_text("# 5 $ an hour, 7 $ a day, x_1 and $\\nope{$\n")
    draw(read_experiment(place), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_readme_without_both_markers_stays_as_it_is() -> None:
    assert into_readme(f"a\n{BEGIN}\nold\n{END}\nb", "new\n") == f"a\n{BEGIN}\n\nnew\n\n{END}\nb"
    for text in ("nothing", f"only {BEGIN}", f"{END} before {BEGIN}"):
        assert into_readme(text, "new") == text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"published": PUBLISHED + "card-c,1\n"}, r"published\.csv:6: another number of fields than the 8 of the header"),
        ({"published": PUBLISHED + "card-c,1,small,hours,ten,hours,a page,\n"}, r"published\.csv:6: value must be a number above 0, got 'ten'"),
        ({"published": PUBLISHED + "card-c,1,small,hours,nan,hours,a page,\n"}, r"published\.csv:6: value must be a number above 0, got 'nan'"),
        ({"published": PUBLISHED + "card-c,one,small,hours,1,hours,a page,\n"}, r"published\.csv:6: gpus must be a whole number"),
        ({"published": PUBLISHED + "card-c,1,small,hours,1,hours,,\n"}, r"published\.csv:6: quantity, unit and source must not be empty"),
        ({"published": PUBLISHED + "card-a,1,small,hours,1,hours,a page,\n"}, r"published\.csv:6: card-a/1/small/hours is there already"),
        ({"published": "hardware,gpus\n"}, r"published\.csv:1: no column model, quantity, value"),
        ({"published": ""}, r"published\.csv:1: no column hardware"),
        ({"published": PUBLISHED + 'card-c,1,"sm"all,hours,1,hours,a page,\n'}, r"published\.csv: not a table of comma-separated values"),
        ({"modelled": MODELLED + "card-c,0,small,hours,hours,1,1,\n"}, r"modelled\.csv:6: gpus must be a whole number of at least 1, got '0'"),
        ({"modelled": MODELLED + "card-c,1,small,hours,hours,-1,1,\n"}, r"modelled\.csv:6: dschat must be a number above 0, got '-1'"),
        ({"modelled": MODELLED + "card-c,1,small,hours,hours,1,1,kept\n"}, r"modelled\.csv:6: half must be empty, 'fitted' or 'held out', got 'kept'"),
        ({"modelled": MODELLED + "card-b,1,small,hours,hours,1,1,\n"}, r"modelled\.csv:6: card-b/1/small/hours is there already"),
        ({"modelled": MODELLED.replace("1,small,hours,hours,12", "1,small,hours,days,12")}, r"modelled\.csv:2: the unit of .* is 'hours' in published"),
        ({"results": RESULTS + "card-a/1/smal/hours,1,hours,c,x,y\n"}, r"results\.csv:4: card-a/1/smal/hours is in neither .*did you mean 'card-a/1/small"),
        ({"results": RESULTS + "card-a/8/small/hours,1,days,c,x,y\n"}, r"results\.csv:4: the unit of card-a/8/small/hours is 'hours', got 'days'"),
        ({"results": RESULTS + "card-a/8/small/hours,1,hours,,x,y\n"}, r"results\.csv:4: card must not be empty"),
        ({"scale": "model,engine,gpus,sequences_per_s,stops\nsmall,ours,8,fast,\n"}, r"scale\.csv:2: sequences_per_s must be a number above 0"),
    ],
)  # fmt: skip
def test_a_malformed_row_is_refused_with_file_and_line(files: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_experiment(folder(tmp_path / "t", **files))


@pytest.mark.parametrize("name", ["published.csv", "modelled.csv", "results.csv"])
def test_a_file_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    (folder(tmp_path / "t") / name).unlink()
    with pytest.raises(UserError, match=rf"report\.runs: .*t has no {name}; rlhf report reads folders with published\.csv"):
        read_experiment(tmp_path / "t")


def test_a_folder_that_is_not_there_is_named_with_the_nearest(tmp_path: Path) -> None:
    folder(tmp_path / "table1")
    with pytest.raises(UserError, match=r"report\.runs: there is no folder .*tabel1 \(did you mean 'table1'\?\)"):
        read_experiment(tmp_path / "tabel1")
    with pytest.raises(UserError, match="there is no folder nowhere/at/all"):
        read_experiment(Path("nowhere/at/all"))
