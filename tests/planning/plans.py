"""Jobs for the planning tests, from real configs. Plain functions, for any test to call."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import yaml
from jobs import composed

from rlhf.cli.plan import step_settings
from rlhf.planning.fit import Machine
from rlhf.planning.memory import Reserve
from rlhf.planning.workload import Workload, workload

CONF = Path(__file__).parents[2] / "conf"
NOTHING = Reserve(context=0.0, communication=0.0, fragmentation=0.0, process=0.0)
BASE = ("run_dir=x", "trainer=gpu", "hardware=h100-80g", "data=rm_static", "model@critic.model=opt-350m", "model@reward.model=opt-350m")


@functools.cache
def settings(step: str, *overrides: str) -> Any:
    """Checked settings as `rlhf plan` has them."""
    return step_settings(composed("plan", *BASE, f"plan={step}", *overrides), step)


def job(*overrides: str, step: str = "ppo", actor: str = "opt-1.3b") -> Workload:
    return workload(settings(step, f"model@actor.model={actor}", *overrides))


def machine(hardware: str = "h100-80g", *, reserve: Reserve = NOTHING, **changes: Any) -> Machine:
    cfg = settings("ppo", f"hardware={hardware}", "model@actor.model=opt-125m", *(f"hardware.{k}={v}" for k, v in changes.items()))
    return Machine(hardware=cfg.hardware, reserve=reserve, efficiency=cfg.plan.efficiency)


def models() -> dict[str, dict[str, Any]]:
    """Every file of conf/model with its family's values under it."""
    found = {}
    for file in sorted((CONF / "model").glob("*.yaml")):
        node = yaml.safe_load(file.read_text())
        family = next((d.split("@")[0] for d in node.pop("defaults", []) if d.startswith("family/")), None)
        base = yaml.safe_load((CONF / "model" / f"{family}.yaml").read_text()) if family else {}
        found[file.stem] = base | node | {"shape": base.get("shape", {}) | node["shape"]}
    return found
