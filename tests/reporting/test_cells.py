"""Which runs are one cell, and what a cell is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiment_folder import config, run, sweep

from rlhf.reporting.cells import group, short_keys, text_of
from rlhf.reporting.runs import find_runs


def cells(folder: Path) -> dict[str, list[int | None]]:
    """Name -> seeds."""
    return {cell.name: [one.seed for one in cell.runs] for cell in group(find_runs([folder]).runs).cells}


def test_runs_that_differ_in_the_seed_alone_are_one_cell(tmp_path: Path) -> None:
    for i, (kl, seed) in enumerate([(0.1, 0), (0.1, 1), (0.02, 0), (0.02, 1)]):
        run(tmp_path / str(i), seed=seed, ppo={"kl_coef": kl})
    assert cells(tmp_path) == {"kl_coef=0.1": [0, 1], "kl_coef=0.02": [0, 1]}


def test_what_keeps_the_books_makes_no_cells(tmp_path: Path) -> None:
    for i, node in enumerate(
        ({"logger": "csv"}, {"logger": "wandb"}, {"launcher": {"name": "slurm"}}, {"trainer": {"devices": 1, "num_nodes": 1, "threads": 8}})
    ):
        run(tmp_path / str(i), seed=i, config=config(seed=i) | node)
    assert cells(tmp_path) == {"ppo": [0, 1, 2, 3]}


def test_what_follows_the_seed_makes_no_cells(tmp_path: Path) -> None:
    """A path that names the seed, one that ends in its number, and any key that the seed decides in several cells."""
    for i, (epochs, seed) in enumerate([(1, 0), (1, 1), (4, 0), (4, 1)]):
        own = config(seed=seed, epochs=epochs)
        run(tmp_path / "a" / str(i), seed=seed, config=own | {"actor": {"init": ["old", "new"][seed]}, "x": f"sweep/{seed}/sft"})
    grouping = group(find_runs([tmp_path]).runs)
    assert [cell.name for cell in grouping.cells] == ["epochs=1", "epochs=4"]
    assert set(grouping.with_seed) == {"actor.init", "x"}
    for seed in (0, 1):
        run(tmp_path / "b" / str(seed), seed=seed, config=config(seed=seed) | {"x": f"sweep/{seed}/sft"})
    assert cells(tmp_path / "b") == {"ppo": [0, 1]}


def test_one_seed_each_does_not_hide_a_setting(tmp_path: Path) -> None:
    """With as many seeds as runs, any key would be a function of the seed."""
    for seed, kl in enumerate((0.1, 0.2)):
        run(tmp_path / str(seed), seed=seed, ppo={"kl_coef": kl})
    assert cells(tmp_path) == {"kl_coef=0.1": [0], "kl_coef=0.2": [1]}


def test_names_are_as_short_as_they_can_be(tmp_path: Path) -> None:
    for i, (a, b) in enumerate([(1e-4, 1e-4), (2e-4, 1e-4), (1e-4, 2e-4)]):
        run(tmp_path / str(i), ppo={"actor_optimizer": {"lr": a}, "critic_optimizer": {"lr": b}})
    assert list(cells(tmp_path)) == [
        "actor_optimizer.lr=0.0001 critic_optimizer.lr=0.0001", "actor_optimizer.lr=0.0002 critic_optimizer.lr=0.0001",
        "actor_optimizer.lr=0.0001 critic_optimizer.lr=0.0002",
    ]  # fmt: skip
    assert short_keys(["a.b.lr", "lr"]) == {"a.b.lr": "b.lr", "lr": "lr"}
    assert short_keys(["model@actor.model", "zero@actor.zero"]) == {"model@actor.model": "model", "zero@actor.zero": "zero"}
    assert [text_of(value) for value in (None, True, 1, 0.1, 1e-5, "x")] == ["null", "true", "1", "0.1", "1e-05", "x"]


def test_a_key_that_says_nothing_new_is_not_in_the_name(tmp_path: Path) -> None:
    for i, (epochs, kl, seed) in enumerate([(1, 0.1, 0), (4, 0.2, 0), (1, 0.1, 1)]):
        run(tmp_path / str(i), seed=seed, ppo={"kl_coef": kl, "epochs": epochs})
    grouping = group(find_runs([tmp_path]).runs)
    assert [cell.name for cell in grouping.cells] == ["kl_coef=0.1", "kl_coef=0.2"]
    assert grouping.with_them == ("ppo.epochs",) and grouping.cells[1].settings == {"ppo.kl_coef": 0.2, "ppo.epochs": 4}


def test_what_a_sweep_sets_comes_first_and_options_stand_for_their_keys(tmp_path: Path) -> None:
    folder = sweep(
        tmp_path / "s", [{"ppo": name, "ppo.epochs": epochs, "seed": 0} for name in ("dschat", "corrected") for epochs in (1, 4)]
    )
    for i, (kl, epochs) in enumerate([(0.1, 1), (0.1, 4), (0.2, 1)]):
        run(folder / str(i), ppo={"kl_coef": kl, "epochs": epochs})
    assert cells(folder) == {
        "ppo=dschat epochs=1": [0], "ppo=dschat epochs=4": [0], "ppo=corrected epochs=1": [0], "ppo=corrected epochs=4": [0],
    }  # fmt: skip


def test_a_run_that_has_not_begun_is_in_the_cell_of_its_overrides(tmp_path: Path) -> None:
    folder = sweep(tmp_path / "s", [{"ppo.kl_coef": kl, "seed": seed} for kl in (0.1, 0.2) for seed in (0, 1)])
    run(folder / "0", ppo={"kl_coef": 0.1})
    assert cells(folder) == {"kl_coef=0.1": [0, 1], "kl_coef=0.2": [0, 1]}


def test_a_swept_key_is_a_cell_even_if_it_keeps_the_books(tmp_path: Path) -> None:
    folder = sweep(tmp_path / "s", [{"trainer.threads": n, "seed": 0} for n in (1, 2)])
    for i, n in enumerate((1, 2)):
        run(folder / str(i), config=config() | {"trainer": {"threads": n}})
    assert list(cells(folder)) == ["threads=1", "threads=2"]
    folder = sweep(tmp_path / "t", [{"callbacks": name, "seed": 0} for name in ("default", "ema")])
    for i, node in enumerate(({"guard": {"x": 1}}, {"ema": {"decay": 0.9}})):
        run(folder / str(i), config=config() | {"callbacks": node})
    assert list(cells(folder)) == ["callbacks=default", "callbacks=ema"]


def test_a_given_name_is_kept_and_runs_of_the_same_settings_join_it(tmp_path: Path) -> None:
    """The layout of experiments/ablation_details/run.py, with a run that still goes on."""
    common: dict[str, Any] = {"overrides": ["ppo=corrected", "ppo.epochs=4"], "wall_seconds": 50.0}
    for cell, epochs in (("base", 1), ("base4", 4)):
        for seed in (0, 1):
            run(tmp_path / "runs" / cell / f"seed-{seed}", seed=seed, cell=cell, ppo={"epochs": epochs}, **common)
    run(tmp_path / "work" / "x", seed=2, ppo={"epochs": 4})
    step = config(seed=2) | {"verb": "step", "left": "out"}
    run(tmp_path / "runs" / "base" / "seed-2", None, seed=2, cell="base", verb="step", status="diverged", config=step, **common)
    assert cells(tmp_path) == {"base": [0, 1, 2], "base4": [0, 1, 2]}
    grouping = group(find_runs([tmp_path]).runs)
    assert grouping.named_by == () and grouping.with_them == ("ppo.epochs",), "the step's own sections set nothing apart"


def test_the_same_settings_in_two_folders_are_the_same_cell(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        folder = sweep(tmp_path / name, [{"ppo.kl_coef": kl, "seed": seed} for kl in (0.1, 0.2)])
        for i, kl in enumerate((0.1, 0.2)):
            run(folder / str(i), seed=seed, ppo={"kl_coef": kl})
    assert cells(tmp_path) == {"kl_coef=0.1": [0, 1], "kl_coef=0.2": [0, 1]}


def test_paths_are_named_by_what_differs_in_them(tmp_path: Path) -> None:
    for i, name in enumerate(("small", "large")):
        run(tmp_path / str(i), config=config() | {"reward": {"init": f"/models/reward/{name}/export"}})
    assert list(cells(tmp_path)) == ["init=small/export", "init=large/export"]
