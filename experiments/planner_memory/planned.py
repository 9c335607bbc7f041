"""The cases, and what the planner says of each. Knows no measurement."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from rlhf.cli.bench.step_page import by_phase, memory_by_phase
from rlhf.cli.compose import conf_dir
from rlhf.config import build
from rlhf.planning.report import machine_of
from rlhf.planning.workload import workload

HERE = Path(__file__).parent
CARD = "h100-80g-vm"
CARDS = {"NVIDIA H100 80GB HBM3": CARD, "NVIDIA H200": "h200-141g"}
"""What the plan is asked for, by the card that was measured."""


@dataclass(frozen=True)
class Case:
    """One configuration that `rlhf bench step` measures."""

    name: str
    words: tuple[str, ...]
    """Overrides."""
    fits: bool
    """What the plan has to say of it."""


@dataclass(frozen=True)
class Prediction:
    bytes: dict[str, float]
    """By phase, without the reserve: what a meter in the process sees."""
    total: float
    """The peak with context and fragmentation."""
    host: float
    """Bytes of the host."""
    seconds: dict[str, float]
    """By phase; `iteration` is the sum."""
    fits: bool


def load(file: Path = HERE / "cases.yaml") -> dict[str, Case]:
    """The cases by name, in the order of the file."""
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    found = {}
    for name, case in content["cases"].items():
        words = case["words"]
        for short, long in content["words"].items():
            words = words.replace(f"${short}", long)
        if "$" in words:
            raise ValueError(f"{file}: {name}: {words} has a word that `words` does not explain")
        found[name] = Case(name, (*content["common"], *words.split()), case.get("fits", True))
    return found


def predict(case: Case, hardware: str = CARD) -> Prediction:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = OmegaConf.to_container(compose("bench_step", [*case.words, f"hardware={hardware}", "run_dir=x"]), resolve=True)
    assert isinstance(config, dict)
    cfg = build(config | {"verb": "ppo"})
    work, machine = workload(cfg), dataclasses.replace(machine_of(cfg), efficiency=cfg.bench.efficiency)
    memory = machine.memory(work)
    return Prediction(memory_by_phase(memory), memory.peak, memory.host_peak, by_phase(machine.time(work), work), machine.fits(work))
