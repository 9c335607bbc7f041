"""A folder of experiments/ in small, runs and sweeps, for tests of the report. Plain text, for any test to write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

PUBLISHED = """\
hardware,gpus,model,quantity,value,unit,source,note
card-a,1,small,hours,10,hours,a page,"printed as days, about"
card-a,8,small,hours,2,hours,a page,
card-a,8,large,hours,20,hours,a page,
,,,samples,100,samples,another page,
"""
MODELLED = """\
hardware,gpus,model,quantity,unit,dschat,ours,half
card-a,1,small,hours,hours,12,6,fitted
card-a,8,small,hours,hours,1.8,1,held out
card-a,8,large,hours,hours,,9,
card-b,1,small,hours,hours,3,2,
"""
RESULTS = """\
cell,value,unit,card,command,commit
card-a/1/small/hours,7,hours,Some Card,rlhf bench step,abc
card-a/1/small/hours,5,hours,Some Card,rlhf bench step,abc
"""


def folder(path: Path, *, published: str = PUBLISHED, modelled: str = MODELLED, results: str = RESULTS, scale: str | None = None) -> Path:
    path.mkdir(parents=True)
    for name, text in (("published", published), ("modelled", modelled), ("results", results), ("scale", scale)):
        if text is not None:
            (path / f"{name}.csv").write_text(text)
    return path


# --- runs and sweeps ------------------------------------------------------------------------------------------------------------


def config(seed: int = 0, **values: Any) -> dict[str, Any]:
    """A resolved configuration in small; `values` are keys of ppo."""
    return {
        "verb": "ppo", "seed": seed, "run_dir": f"runs/{seed}", "actor": {"init": f"base/seed-{seed}/sft"},
        "trainer": {"devices": 1, "num_nodes": 1, "threads": 1}, "ppo": {"_target_": "x", "kl_coef": 0.1, "epochs": 1, **values},
    }  # fmt: skip


def run(
    path: Path, gold: float | None = 0.5, *, seed: int = 0, curve: str = "", metrics: dict[str, float] | None = None, **fields: Any
) -> Path:
    """A run directory as a verb leaves it. No gold score: it failed. `fields` replace keys of summary.json; `ppo` goes into the config."""
    path.mkdir(parents=True, exist_ok=True)
    own = config(seed, **fields.pop("ppo", {}))
    score = {} if gold is None else {"gold/ppo": gold}
    ended = {"status": "failed", "error": "RuntimeError: no space left\nmore of it"} if gold is None else {"status": "done"}
    summary = {
        "verb": "ppo", "seed": seed, "commit": "abc", "hardware": {"gpus": [], "cpu": "x86", "threads": 1}, "config": own,
        "metrics": score | (metrics or {}), "seconds": {"total": 3600.0}, **ended, **fields,
    }  # fmt: skip
    (path / "summary.json").write_text(json.dumps(summary))
    if curve:
        (path / "metrics.csv").write_text(curve)
    return path


def sweep(path: Path, cells: list[dict[str, Any]], words: list[str] | None = None) -> Path:
    """A sweep's directory with its sweep.yaml; its runs are to be written."""
    path.mkdir(parents=True)
    listed = [{"folder": str(i), "overrides": overrides} for i, overrides in enumerate(cells)]
    text = {
        "verb": "ppo",
        "words": words or ["ppo.kl_coef=0.02,0.1", "seed=0,1"],
        "config_name": None,
        "commit": "abc",
        "settings": {},
        "cells": listed,
    }
    (path / "sweep.yaml").write_text(yaml.safe_dump(text, sort_keys=False))
    return path
