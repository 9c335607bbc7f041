"""What a run is called and which runs it belongs to: from the directories around it. Knows config.yaml and sweep.yaml; knows no logger.

A job replays its config.yaml and nothing else. That it is a cell of a sweep is seen from the sweep.yaml beside its directory, that it is a
step of a pipeline from the pipeline's config.yaml above it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf.callbacks.wandb_mode import chosen_mode

TARGET = "rlhf.callbacks.wandb_log.WandbLog"


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Of one run directory. Directories have the name they would have on their own, without those above."""

    pipeline: Path | None
    """The directory of the pipeline whose step this is."""
    sweep: Path | None
    """The directory of the sweep whose cell this is, or whose cell the pipeline is."""
    cell: str | None
    """The cell's folder in it."""
    overrides: Mapping[str, Any]
    """What the sweep changes in this cell."""
    config_name: str | None
    """The sweep's file."""
    experiment: str | None
    """What the run's config, the pipeline's or the sweep says was chosen."""


def surroundings(config: Mapping[str, Any]) -> Surroundings:
    run_dir = Path(config["run_dir"]).resolve()
    above = read_yaml(run_dir.parent / "config.yaml")
    pipeline = run_dir.parent if above.get("verb") == "pipeline" and config["verb"] != "pipeline" else None
    job = pipeline or run_dir
    sweep = read_yaml(job.parent / "sweep.yaml")
    cells = {str(cell["folder"]): cell["overrides"] for cell in sweep.get("cells", [])}
    overrides, words = cells.get(job.name) or {}, sweep.get("words") or []
    known = config.get("experiment") or (pipeline and above.get("experiment"))
    return Surroundings(
        pipeline=pipeline, sweep=job.parent if sweep else None, cell=job.name if sweep else None, overrides=overrides,
        config_name=sweep.get("config_name"), experiment=overrides.get("experiment") or known or chosen(words, "experiment"),
    )  # fmt: skip


def read_yaml(file: Path) -> dict[str, Any]:
    """Empty where there is no such file."""
    return (yaml.safe_load(file.read_text(encoding="utf-8")) or {}) if file.is_file() else {}


def place(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `rlhf.callbacks.wandb_log.Place` holds."""
    verb, around = str(config["verb"]), surroundings(config)
    job = around.pipeline or Path(config["run_dir"]).resolve()
    whole = around.sweep or around.pipeline or (job if verb == "pipeline" else None)
    tags = [str(tag) for tag in (around.experiment, around.config_name) if tag is not None]
    return {
        "verb": verb, "group": whole and whole.name, "name": f"{verb} {changes(around.overrides) or job.name}", "tags": tuple(tags),
    }  # fmt: skip


def facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a logger shows beside the config: where the run belongs. Empty for a run on its own."""
    around = surroundings(config)
    told: dict[str, Any] = {} if around.pipeline is None else {"pipeline": around.pipeline.name}
    return told if around.sweep is None else told | {"sweep": {"name": around.sweep.name, "cell": around.cell}}


def chosen(words: Sequence[str], group: str) -> str | None:
    """The option of a group on a command line, unless it sweeps over several."""
    options = [word.partition("=")[2] for word in words if word.lstrip("+").startswith(f"{group}=")]
    return options[-1] if options and "," not in options[-1] and options[-1] != "null" else None


def changes(overrides: Mapping[str, Any]) -> str:
    """`kl_coef=0.02 seed=1`: the last part of each key, or all of it where two end alike."""
    ends = [key.rpartition(".")[2] for key in overrides]
    named = {key if ends.count(end) > 1 else end: value for (key, value), end in zip(overrides.items(), ends, strict=True)}
    return " ".join(f"{name}={value}" for name, value in named.items())


def require_key(config: Mapping[str, Any]) -> None:
    """Refuses a run that is to go online and cannot, before anything is read or built.

    Raises:
        UserError: as `chosen_mode`.
    """
    for node in config["logger"].values():
        if node["_target_"] == TARGET:
            chosen_mode(node.get("offline"))
