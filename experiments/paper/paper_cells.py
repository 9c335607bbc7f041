"""Cells of the published tables, and the planner's answer to one: which hardware, how many GPUs, which actor, whose engine."""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from rlhf.cli.compose import conf_dir
from rlhf.cli.plan import step_settings
from rlhf.planning.fit import Machine, with_role
from rlhf.planning.paper import PaperRow, paper_iteration
from rlhf.planning.report import machine_of
from rlhf.planning.workload import Workload, workload

HERE = Path(__file__).parents[1]
ENGINES = ("dschat", "ours")
PROTOCOL = ("experiment=dschat/ppo", "model@critic.model=opt-350m", "model@reward.model=opt-350m")
BY_MODULE = tuple(f"{role}.zero.gather_layers=false" for role in ("actor", "critic", "ref", "reward"))
"""ZeRO-3 as the original has it."""
ADAPTERS = "lora@actor.lora=r128"


@dataclass(frozen=True)
class Cell:
    hardware: str
    gpus: int
    model: str


def published(table: str) -> list[dict[str, str]]:
    """Rows of published.csv: one number each."""
    with (HERE / table / "published.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def cell_of(row: dict[str, str]) -> Cell:
    return Cell(row["hardware"], int(row["gpus"]), row["model"])


def cells(table: str, quantity: str) -> dict[Cell, float]:
    """Published values of one quantity, in the file's order."""
    return {cell_of(row): float(row["value"]) for row in published(table) if row["quantity"] == quantity}


@functools.cache
def question(hardware: str, model: str, engine: str) -> tuple[Workload, Machine, dict[str, Any]]:
    """The job, what it is held against, and how the engine may lay it out."""
    words = [
        "run_dir=none",
        *PROTOCOL,
        f"efficiency@plan.efficiency={engine}",
        f"hardware={hardware}",
        f"model@actor.model={model}",
        ADAPTERS,
        *(BY_MODULE if engine == "dschat" else ()),
    ]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config: Any = OmegaConf.to_container(compose("plan", words), resolve=True)
    cfg = step_settings(config, "ppo")
    original = engine == "dschat"
    work = with_role(workload(cfg), "actor", lora=None)
    return work, machine_of(cfg), {"waves": not original, "shipped": original, "adapters": cfg.actor.lora}


@functools.cache
def answer(cell: Cell, engine: str) -> PaperRow | None:
    """None: nothing fits."""
    work, machine, how = question(cell.hardware, cell.model, engine)
    return paper_iteration(work, machine, cell.gpus, **how)


def order() -> list[tuple[Cell, float]]:
    """Hours of step 3 in table 1 and then table 2, in the files' order: what is fitted and held out."""
    return [item for table in ("table1", "table2") for item in cells(table, "hours").items()]


@functools.cache
def halves() -> dict[Cell, str]:
    """Every second of them is fitted, beginning with the first."""
    return {cell: ("fitted", "held out")[i % 2] for i, (cell, _) in enumerate(order())}
