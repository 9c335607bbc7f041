"""Which run made a model and which runs started from it, as artifacts of W&B.

Knows exports and their records; knows no config. A record, `wandb/ROLE.model.json` in the directory of the run that made the model, says
what the artifact is called. A run that uses the model builds the same artifact from the record: W&B knows it by its contents, so that
the edge is drawn whether the runs talk to W&B or are sent later, and no gigabyte is read or copied for a reference.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf.logging import log

MODES_OF_MODELS = ("reference", "upload", "none")


def record_of(export: Path) -> Path:
    """Of `RUN/export/ROLE`."""
    return export.parent.parent / "wandb" / f"{export.name}.model.json"


def log_exports(run: Any, exports: Path, *, verb: str, how: str, metadata: Mapping[str, Any]) -> None:
    """One artifact a role, `VERB-ROLE`; its versions are the runs that made one."""
    for export in sorted(folder for folder in exports.glob("*") if folder.is_dir()):
        record = record_of(export)
        said = {"artifact": f"{verb}-{export.name}", "run": run.id, "role": export.name, "how": how, "folder": str(export.resolve())}
        part = record.with_suffix(".part")
        part.write_text(json.dumps(said, indent=1), encoding="utf-8")
        part.rename(record)
        run.log_artifact(artifact(record, metadata), aliases=["latest", alias(said)])


def use_exports(run: Any, folders: Mapping[str, Path]) -> None:
    """Declares what a run starts from, as inputs and, by role, as `lineage` in its config. Models that no run in W&B made are left out."""
    records = dict(_records(folders))
    if records:
        lineage = {role: {"artifact": said["artifact"], "run": said["run"]} for role, said in records.items()}
        run.config.update({"lineage": lineage}, allow_val_change=True)
    for said in {said["record"]: said for said in records.values()}.values():  # two roles may start from one model
        _use(run, said)


def _records(folders: Mapping[str, Path]) -> Iterator[tuple[str, dict[str, str]]]:
    for role, folder in folders.items():
        record = record_of(folder.resolve())
        if record.is_file():
            yield role, {**json.loads(record.read_text()), "record": str(record)}


def _use(run: Any, said: Mapping[str, str]) -> None:
    if not Path(said["folder"]).is_dir():
        log.info("W&B: %s was moved after run %s made it: the lineage is in this run's config only", said["artifact"], said["run"])
        return
    made = artifact(Path(said["record"]), {})
    if run.offline:
        # `use_artifact` wants the network. This is what it does with an artifact that is not yet sent; `wandb sync` then declares the use.
        run._log_artifact(made, aliases=[alias(said)], is_user_created=True, use_after_commit=True)
    else:
        run.use_artifact(made, aliases=[alias(said)])


def artifact(record: Path, metadata: Mapping[str, Any]) -> Any:
    """The record, which makes it this run's, and the export: where it lies, or its files."""
    import wandb

    said = json.loads(record.read_text())
    made = wandb.Artifact(said["artifact"], type="model", metadata=dict(metadata))
    made.add_file(str(record), name="run.json", policy="immutable", skip_cache=True)
    if said["how"] == "reference":
        made.add_reference(Path(said["folder"]).as_uri(), name=said["role"], checksum=False)
    else:
        made.add_dir(said["folder"], name=said["role"], policy="immutable", skip_cache=True)
    return made


def alias(said: Mapping[str, str]) -> str:
    return f"run-{said['run']}"
