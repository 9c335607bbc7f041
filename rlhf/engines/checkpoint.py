"""Saving and restoring everything the next iteration depends on.

A checkpoint is a folder `step-000042` that appears whole or not at all: every engine, every rank's random state, and what the module
says of itself (iteration, KL controller, running statistics). `manifest.json` lists each file with its size, so that one cut short is
refused by name before anything is loaded. Knows no loss and no data.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf.config import UserError
from rlhf.engines.strategy import RoleStrategy
from rlhf.logging import log

MANIFEST = "manifest.json"


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints in a run's `checkpoints` folder, oldest first."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and (p / MANIFEST).is_file()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def verify(folder: Path, *, world_size: int) -> dict[str, Any]:
    """The manifest of a checkpoint, after every file it lists was found at its full size.

    Raises:
        UserError: a file is missing or cut short, or the checkpoint was written by another number of ranks.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"checkpoint {folder} has no readable {MANIFEST}: it is damaged; remove it to go on from the one before") from error
    for name, size in manifest["files"].items():
        file = folder / name
        actual = file.stat().st_size if file.is_file() else -1
        if actual != size:
            state = "is missing" if actual < 0 else f"has {actual} bytes instead of {size}"
            raise UserError(f"checkpoint {folder}: {name} {state}: it is damaged; remove the folder to go on from the one before")
    if manifest["world_size"] != world_size:
        raise UserError(
            f"checkpoint {folder} was written by {manifest['world_size']} ranks, this run has {world_size}: "
            f"set trainer.devices x trainer.num_nodes to {manifest['world_size']}"
        )
    return manifest


class Checkpointer:
    """Writes and reads the checkpoints of one run."""

    def __init__(self, folder: Path, strategy: RoleStrategy, *, keep: int) -> None:
        self.folder = folder
        self.strategy = strategy
        self.keep = keep

    def save(self, step: int, module_state: dict[str, Any]) -> Path:
        """Collective. Returns the finished folder; older ones beyond `keep` are removed after it exists."""
        final = self.folder / f"step-{step:06d}"
        part = self.folder / f"{final.name}.part"
        rank, strategy = self.strategy.global_rank, self.strategy
        if rank == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        strategy.barrier()
        for role in self._trained():
            exclude = strategy.specs[role].reloadable
            strategy.engines[role].save_checkpoint(str(part), tag=role, save_latest=False, exclude_frozen_parameters=exclude)
        kept = {name: holder.state_dict() for name, holder in strategy.kept.items()}
        torch.save({"random": random_state(), "kept": kept}, part / f"rank-{rank}.pt")
        if rank == 0:
            torch.save(module_state, part / "module.pt")
        strategy.barrier()
        if rank == 0:
            files = {str(p.relative_to(part)): p.stat().st_size for p in sorted(part.rglob("*")) if p.is_file()}
            manifest = {"step": step, "world_size": strategy.world_size, "files": files}
            (part / MANIFEST).write_text(json.dumps(manifest, indent=1))
            shutil.rmtree(final, ignore_errors=True)
            part.rename(final)
            for old in checkpoints(self.folder)[: -self.keep]:
                shutil.rmtree(old)
        strategy.barrier()
        return final

    def restore(self, folder: Path) -> dict[str, Any]:
        """Loads the engines and this rank's random state; returns what the module saved. Collective."""
        strategy = self.strategy
        for role in self._trained():
            strict = not strategy.specs[role].reloadable
            path, _ = strategy.engines[role].load_checkpoint(str(folder), tag=role, load_module_strict=strict)
            if path is None:
                raise UserError(f"checkpoint {folder} holds no {role}: it belongs to another kind of run")
        # Our own file, listed in the manifest: random states are no tensors alone, so it is a full pickle.
        own = torch.load(folder / f"rank-{strategy.global_rank}.pt", weights_only=False)
        set_random_state(own["random"])
        for name, holder in strategy.kept.items():
            if name not in own["kept"]:
                raise UserError(f"checkpoint {folder} holds no {name}: the run was started without it")
            holder.load_state_dict(own["kept"][name])
        log.info("resumed from %s", folder)
        return torch.load(folder / "module.pt", weights_only=False)

    def _trained(self) -> list[str]:
        return [role for role, spec in self.strategy.specs.items() if spec.training is not None]


def random_state() -> dict[str, Any]:
    """The state of every generator a step may draw from."""
    state: dict[str, Any] = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
