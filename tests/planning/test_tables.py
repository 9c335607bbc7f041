"""experiments/table1 and its like: what lies there is what the planner says now, and what measure.py would run on a machine that has the cards."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "paper"))
import fit
import make
import measure
import paper_cells
import paper_tables
from jobs import composed

from rlhf.cli.compose import primary_config, with_own_group
from rlhf.config import build
from rlhf.planning.paper import LARGEST_BATCH, SAMPLES
from rlhf.reporting.page import BEGIN, END, as_markdown, into_readme
from rlhf.reporting.tables import median_error, read_experiment
from rlhf.rules import check

TABLES = tuple(paper_tables.QUANTITIES)
CHECKED = {"table1": 16, "table2": 4, "table3": 4, "breakdown": 2, "figure6": 9, "figure7": 4}
"""Every so many rows are modelled again: all of them would take a minute."""
ENGINES = {"table3": ("dschat",)}
"""Of our engine every layout of models that do not fit would be tried there, which takes longer than all the rest."""


@pytest.mark.parametrize("name", TABLES)
def test_modelled_rows_are_what_the_planner_says(name: str) -> None:
    kept, asked = paper_tables.read(name, "modelled.csv"), paper_tables.wanted(name)
    assert [{key: line[key] for key in row} for row, line in zip(asked, kept, strict=True)] == asked
    for row, line in list(zip(asked, kept, strict=True))[:: CHECKED[name]]:
        made = paper_tables.modelled(row, ENGINES.get(name, paper_cells.ENGINES))
        assert made == {key: line[key] for key in made}, f"python experiments/paper/make.py {name}"


@pytest.mark.parametrize("name", TABLES)
def test_the_page_is_made_from_the_files(name: str) -> None:
    folder = paper_cells.HERE / name
    found = read_experiment(folder)
    readme = (folder / "README.md").read_text()
    assert (folder / "table.md").read_text() == as_markdown(found), f"rlhf report experiments/{name}"
    assert BEGIN in readme and END in readme
    assert into_readme(readme, as_markdown(found)) == readme, f"rlhf report experiments/{name}"
    assert (folder / "plot.png").is_file()
    if len({row.gpus for row in found.rows} | {1}) > 1:
        assert any("not run: needs" in line for line in readme.splitlines())


def test_halves_take_turns_and_the_held_out_one_is_within_15_percent() -> None:
    rows = [row for name in ("table1", "table2") for row in read_experiment(paper_cells.HERE / name).rows]
    hours = [row for row in rows if row.quantity == "hours" and row.published is not None]
    assert [row.half for row in hours] == [("fitted", "held out")[i % 2] for i in range(len(hours))]
    held = median_error(rows, "held out")
    assert held is not None and held <= 0.15
    for page in ("experiments/table1/README.md", "experiments/table2/README.md", "docs/planning.md"):
        text = (paper_cells.HERE.parent / page).read_text().partition(BEGIN)[0] + (paper_cells.HERE.parent / page).read_text().partition(
            END
        )[2]
        assert f"{held * 100:.1f} %" in text, f"{page} says another median"


def test_what_the_verdicts_say_of_errors_is_so() -> None:
    def errors(table: str, *quantities: str) -> list[float]:
        rows = read_experiment(paper_cells.HERE / table).rows
        return [row.error for row in rows if row.error is not None and (row.quantity in quantities or not quantities)]

    assert max(map(abs, errors("figure7"))) <= 0.15
    assert max(map(abs, errors("figure6", "effective"))) <= 0.26
    assert [round(100 * error) for error in errors("breakdown")[2:]] == [25, -31, 19, 7]
    assert errors("table3") == [0, 0, 0, 0]
    worst = max(errors("table1", "hours") + errors("table2", "hours"), key=abs)
    assert round(100 * worst) == -47 and "47 % at worst" in (paper_cells.HERE.parent / "docs" / "planning.md").read_text()
    alone = median_error(list(read_experiment(paper_cells.HERE / "table1").rows), "held out")
    assert alone is not None and f"of this table alone it is {alone * 100:.1f} %" in (paper_cells.HERE / "table1" / "README.md").read_text()


def test_the_number_of_samples_is_the_one_that_agrees_with_figure_7() -> None:
    hours, speed = (
        paper_cells.cells("table1", "hours") | paper_cells.cells("table2", "hours"),
        paper_cells.cells("figure7", "sequences_per_s"),
    )
    shared = [cell for cell in speed if cell in hours]
    assert len(shared) == 3
    for cell in shared:
        assert SAMPLES / hours[cell] / 3600 == pytest.approx(speed[cell], rel=0.03)
        assert 131_900 / hours[cell] / 3600 < 0.55 * speed[cell]


def test_dollars_are_those_of_the_published_price() -> None:
    for table in ("table1", "table2"):
        hours = paper_cells.cells(table, "hours")
        for cell, dollars in paper_cells.cells(table, "dollars").items():
            assert hours[cell] * cell.gpus * 4.0 == pytest.approx(dollars, rel=0.01)


def test_scaling_rows_obey_the_batch_cap_and_gains_are_of_a_doubling() -> None:
    lines = paper_tables.read("figure7", "scale.csv")
    assert len(lines) == len(paper_tables.SCALED) * len(paper_cells.ENGINES) * len(paper_tables.COUNTS)
    for before, line in itertools.pairwise(lines):
        if line["batch"]:
            assert int(line["gpus"]) <= int(line["batch"]) <= LARGEST_BATCH
        if line["gain"]:
            assert int(line["gpus"]) == 2 * int(before["gpus"])
            assert float(line["gain"]) == pytest.approx(float(line["sequences_per_s"]) / float(before["sequences_per_s"]), abs=0.01)
            assert not line["stops"] or float(line["gain"]) <= paper_tables.GOOD_DOUBLING
    first = [line for line in lines if line["gpus"] == "64" and line["model"] == "opt-66b"]
    for line in first:
        speed = next(row for row in paper_tables.read("figure7", "modelled.csv") if (row["gpus"], row["model"]) == ("64", "opt-66b"))
        assert line["sequences_per_s"] == speed[line["engine"]]


def test_an_unknown_table_is_named() -> None:
    with pytest.raises(SystemExit, match="table9 to make; tables: table1, "):
        make.main(["table9"])


# --- measuring ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_a_command_of_every_machine_composes_and_passes_the_rules(name: str) -> None:
    """The first cell of each kind of machine: the layouts the planner chose are overrides that there are."""
    machines = dict.fromkeys((row["hardware"], int(row["gpus"])) for row in paper_tables.read(name, "modelled.csv"))
    for hardware, gpus in machines:
        nodes = max(1, gpus // 8)
        machine = measure.Machine(hardware, gpus // nodes, nodes, ("launcher=external",) if nodes > 1 else ())
        ways = [(model, batch, layout) for model, batch, layout, _ in measure.runs([name], machine)]
        if name == "table3":
            row = measure.cells_of(name, machine)[0]
            ways = [("opt-125m", int(row["batch_ours"]), tuple(row["layout_ours"].split()))]
        assert ways
        for model, batch, layout in ways[:1]:
            words = measure.command(machine, model, batch, layout)[2:]
            overrides = with_own_group("bench", words)
            cfg = build(composed(primary_config("bench", overrides), "run_dir=x", *overrides))
            check(cfg)
            assert (cfg.ppo.batch_size, cfg.data.max_prompt_tokens, cfg.data.max_answer_tokens) == (batch, 256, 256)


def test_the_commands_of_the_pages_name_machines_with_cells() -> None:
    for name in TABLES:
        text = (paper_cells.HERE / name / "README.md").read_text()
        commands = re.findall(r"^    python experiments/paper/measure\.py (.*)$", text, re.MULTILINE)
        assert commands
        for line in commands:
            words = shlex.split(line.replace("num_nodes=N", "num_nodes=2"), comments=True)
            assert name in words[0].split(",")
            assert all(measure.cells_of(table, measure.machine_of(words[1:])) for table in words[0].split(","))


def finished(model: str, *, sequences: int = 1024, iteration: float = 16.0) -> dict[str, Any]:
    phases = {"generate": 4.0, "score": 2.0, "train": 9.0, "other": 1.0, "iteration": iteration}
    return {
        "status": "done", "card": "Some Card", "commit": "abc1234", "config": {"sequences": sequences}, "paper_tflops_per_gpu": 50.0,
        "phases": {name: {"median_seconds": seconds} for name, seconds in phases.items()},
    }  # fmt: skip


def test_measured_quantities_are_counted_by_hand() -> None:
    values = measure.measured(finished("opt-1.3b"), measure.Machine("a100-80g", 8, 1, ()))
    assert values["sequences_per_s"] == 64.0
    assert values["hours"] == pytest.approx(264_292 / 64 / 3600)
    assert values["dollars"] == pytest.approx(264_292 / 64 / 3600 * 8 * 4.0)
    assert values["effective"] == 50.0
    assert values["generation"] == pytest.approx(50 * 16 / 5 / 4) and values["training"] == pytest.approx(50 * 16 * 4 / 5 / 9)
    parts = [values["seconds_generate"], values["seconds_train"], values["seconds_rest"]]
    assert parts == pytest.approx([4 * 8 / 1024, 9 * 8 / 1024, 3 * 8 / 1024])
    assert values["seconds_iteration"] == pytest.approx(16 * 8 / 1024)


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tables in a folder of the test, where measurements may go, on a machine with eight cards."""
    for name in ("table1", "table3"):
        shutil.copytree(paper_cells.HERE / name, tmp_path / name)
        (tmp_path / name / "results.csv").write_text("cell,value,unit,card,command,commit\n")
    for module in (paper_cells, paper_tables, measure):
        monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(measure, "cards", lambda: 8)
    return tmp_path


def test_measurements_are_appended_and_a_failed_cell_is_told(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def run(words: Sequence[str], run_dir: Path) -> dict[str, Any] | None:
        asked.append(next(word for word in words if word.startswith("model@actor")))
        return None if asked[-1].endswith("opt-2.7b") else finished(asked[-1])

    monkeypatch.setattr(measure, "run", run)
    assert measure.main(["table1", "hardware=h100-80g-vm", "bench.iterations=2"]) == 1
    assert len(asked) == len(set(asked)) == 5
    assert "not measured: opt-2.7b" in capsys.readouterr().err
    rows = {row.cell: row for row in read_experiment(copied / "table1").rows}
    row = rows["h100-80g-vm/1/opt-1.3b/hours"]
    assert row.measured is not None and row.measured.value == pytest.approx(264_292 / 64 / 3600, rel=1e-3)
    assert row.measured.card == "Some Card" and row.measured.commit == "abc1234" and row.measured.command.endswith("bench.iterations=2")
    assert rows["h100-80g-vm/1/opt-2.7b/hours"].measured is None
    assert rows["a100-80g/1/opt-1.3b/hours"].measured is None, "another machine's cell"


def test_the_largest_is_the_first_that_completes(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        measure, "candidates", lambda row, machine: iter([("opt-30b", 8, ()), ("opt-13b", 8, ("tp=tp1",)), ("opt-6.7b", 8, ())])
    )
    monkeypatch.setattr(measure, "run", lambda words, run_dir: finished("x") if "model@actor.model=opt-13b" in words else None)
    assert measure.main(["table3", "hardware=h100-80g-vm"]) == 0
    row = next(row for row in read_experiment(copied / "table3").rows if row.hardware == "h100-80g-vm")
    assert row.measured is not None and row.measured.value == 13 and "opt-13b" in row.measured.command


def test_candidates_go_down_from_the_planners_largest() -> None:
    row = next(row for row in paper_tables.read("table3", "modelled.csv") if row["hardware"] == "h100-80g-vm")
    first = next(measure.candidates(row | {"ours": "2.7"}, measure.Machine("h100-80g-vm", 1, 1, ())))
    assert first[0] == "opt-2.7b" and first[1] > 1 and any(word.startswith("zero@actor.zero=") for word in first[2])


def test_a_run_counts_only_when_it_says_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = iter([0, 1, 0, 0])
    monkeypatch.setattr(measure.subprocess, "run", lambda *words, check: measure.subprocess.CompletedProcess(words, next(codes)))
    assert measure.run(["rlhf"], tmp_path) is None, "no bench.json"
    (tmp_path / "bench.json").write_text(json.dumps({"status": "done"}))
    assert measure.run(["rlhf"], tmp_path) is None, "exit code 1"
    assert measure.run(["rlhf"], tmp_path) == {"status": "done"}
    (tmp_path / "bench.json").write_text(json.dumps({"status": "out of memory"}))
    assert measure.run(["rlhf"], tmp_path) is None


def test_without_the_cards_nothing_is_composed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("it went on")

    monkeypatch.setattr(measure, "cards", lambda: 4)
    monkeypatch.setattr(measure, "command", never)
    assert measure.main(["table1", "hardware=a100-80g", "trainer.devices=8"]) == 2
    assert capsys.readouterr().err.splitlines() == ["trainer.devices=8, but torch sees 4 GPUs here; --show only prints the commands"]


def test_showing_and_several_nodes_need_no_card_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(measure, "cards", lambda: 0)
    monkeypatch.setattr(measure, "run", lambda words, run_dir: None)
    assert measure.main(["table1", "hardware=a100-80g", "trainer.devices=8", "--show"]) == 0
    assert measure.main(["table2", "hardware=a100-80g", "trainer.devices=8", "trainer.num_nodes=8", "launcher=external"]) == 1
    assert capsys.readouterr().out.count("rlhf bench step") > 5


@pytest.mark.parametrize("script", [measure, make, fit], ids=lambda script: script.__name__)
def test_help_is_the_docstring(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert not script.main(["--help"])
    except SystemExit as end:
        assert end.code == 0
    assert script.__doc__.strip() in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a table first: table1"),
        (["table9", "hardware=h100-80g-vm"], "name a table first"),
        (["table1"], "say hardware=NAME"),
        (["table1", "hardware=h100-80g-vm", "h100"], "overrides as key=value: h100"),
        (["table1", "hardware=h100-80g-vm", "trainer.devices=two"], "must be whole numbers"),
        (["table2", "hardware=h100-80g-vm"], "table2 has no cell for 1 x h100-80g"),
        (
            ["table1", "hardware=h100-80g-vm", "models=opt-13b,opt-9b"],
            "models=opt-9b: the cells of 1 x h100-80g-vm have opt-125m, opt-1.3b",
        ),
    ],
)
def test_mistakes_of_measuring(words: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        measure.main(words)


def test_some_actors_some_tables_and_a_batch_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["hardware=h100-80g-vm", "models=opt-6.7b", "ppo.batch_size=256", "ppo.minibatch_size=256"]
    assert measure.main(["table1,figure6", *words, "--show"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert "model@actor.model=opt-6.7b" in line and line.count("ppo.batch_size=") == 1 and "ppo.batch_size=256" in line
