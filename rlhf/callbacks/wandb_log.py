"""A run in W&B: its record, its axis, its tables and distributions, and how it ended.

Knows wandb and a run directory; knows no trainer and no config. What a run is called and which group it belongs to is its `Place`,
which rlhf/cli finds out. `wandb_models` has the lineage of models.
"""

from __future__ import annotations

import json
import math
import secrets
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from rlhf.callbacks.run_log import Ending
from rlhf.callbacks.wandb_mode import chosen_mode
from rlhf.callbacks.wandb_models import MODES_OF_MODELS, log_exports, use_exports
from rlhf.config import UserError
from rlhf.logging import log

RECORD = "wandb/run.json"
"""In a run directory: the id of its run."""
AXIS = "iteration"
"""What metrics are drawn over; W&B's own step is the same number."""
EXIT_CODES = {"done": 0, "pruned": 0, "refused": 2}
"""By status; 1 for any other."""
EMPTY_RECORD = 7
"""Bytes of an offline record that holds nothing but its header: `wandb sync` refuses it, and with it the parts that follow."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run stands among others."""

    verb: str
    group: str | None
    name: str
    tags: tuple[str, ...]


class WandbLog(WandbLogger):
    """One run of W&B for one run directory. A resumed job goes on with the same one."""

    def __init__(
        self, *, folder: Path, place: Place, project: str, entity: str | None, name: str | None, group: str | None, tags: Sequence[str],
        offline: bool | None, artifacts: str, bins: int, upload_minutes: float, resumes: bool = False,
    ) -> None:  # fmt: skip
        """
        Args:
            folder: of the run.
            place: what `name` and `group` are taken from where they are null, and tags beside `tags`.
            artifacts: what is recorded of exported models: a reference to the folder, its files (upload), none.
            bins: of a histogram.
            upload_minutes: that the end of a run may wait for its upload; what is left then stays on disk for `wandb sync`.
            resumes: goes on with the run whose id the folder holds.

        Raises:
            UserError: an argument out of range, or online is asked for without a key.
        """
        if artifacts not in MODES_OF_MODELS:
            raise UserError(f"logger.wandb.artifacts must be one of {', '.join(MODES_OF_MODELS)}, got {artifacts!r}")
        if isinstance(tags, str) or not all(isinstance(tag, str) for tag in tags):
            raise UserError(f"logger.wandb.tags must be a list of words, got {tags!r}")
        if not isinstance(bins, int) or not 1 <= bins <= 512:
            raise UserError(f"logger.wandb.bins must lie in [1, 512], got {bins!r}")
        if isinstance(upload_minutes, bool) or not isinstance(upload_minutes, int | float) or upload_minutes <= 0:
            raise UserError(f"logger.wandb.upload_minutes must be above 0, got {upload_minutes!r}")
        self.mode, self.for_want_of_a_key = chosen_mode(offline)
        self.upload_seconds = 60.0 * upload_minutes
        self.may_fall_back = offline is None
        self.folder, self.place, self.artifacts, self.bins, self.resumes = Path(folder), place, artifacts, bins, resumes
        self._tables: dict[str, Any] = {}
        self._finished = False
        words = dict.fromkeys([*place.tags, *tags])
        super().__init__(
            project=project, save_dir=str(folder), name=(name or place.name)[:128], entity=entity, group=(group or place.group or "")[:128]
            or None, job_type=place.verb, tags=[word[:64] for word in words],
        )  # fmt: skip
        self._wandb_init.pop("anonymous", None)  # newer versions warn of it

    # --- the record ---

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of wandb, started by the first one who asks."""
        if self._experiment is None:
            self._experiment = self._start()
        return self._experiment

    def _start(self) -> Any:
        import wandb

        if wandb.run is not None:
            wandb.finish()  # of the last job of this process, which nobody has finished
        (self.folder / "wandb").mkdir(parents=True, exist_ok=True)
        self._drop_empty_records()
        self._wandb_init["id"] = self._id = self._run_id()
        run = self._open(wandb)
        run.define_metric(AXIS)
        run.define_metric("*", step_metric=AXIS, step_sync=True)
        if self.mode == "offline":  # online wandb itself says where the run is
            why = "no key (WANDB_API_KEY, wandb login), so this run is" if self.for_want_of_a_key else "this run is"
            log.info("W&B: %s kept offline; send it later with: wandb sync %s", why, shlex.quote(str(Path(run.dir).parent)))
        return run

    def _open(self, wandb: Any) -> Any:
        def init() -> Any:
            # Offline nothing can go wrong that wandb would have to say; where the record lies we say ourselves.
            settings = wandb.Settings(quiet=True, silent=self.mode != "online", finish_timeout=self.upload_seconds)
            return wandb.init(**self._wandb_init, mode=self.mode, settings=settings)

        try:
            return init()
        except wandb.Error as error:
            why = str(error).partition("\n")[0]
            if self.mode != "online" or not self.may_fall_back:
                raise UserError(f"logger.wandb: W&B does not take this run ({why}): try later, or logger.wandb.offline=true") from error
            log.warning("logger.wandb: W&B does not take this run (%s)", why)
            wandb.teardown()  # its service still holds the id
            self.mode, self.for_want_of_a_key = "offline", False
            return init()

    def _run_id(self) -> str:
        """That of the run which is resumed; otherwise a new one, kept in the run directory."""
        file = self.folder / RECORD
        if self.resumes and file.is_file():
            return json.loads(file.read_text())["id"]
        new = secrets.token_hex(4)
        part = file.with_suffix(".part")
        part.write_text(json.dumps({"id": new, "project": self._project, "entity": self._wandb_init["entity"]}), encoding="utf-8")
        part.rename(file)
        return new

    def _drop_empty_records(self) -> None:
        """A run that is killed in its first seconds leaves a record without a word."""
        for record in (self.folder / "wandb").glob("offline-run-*/*.wandb"):
            if record.stat().st_size <= EMPTY_RECORD:
                shutil.rmtree(record.parent)

    @rank_zero_only
    def reopen(self) -> None:
        """Starts the run, or goes on with it, before anything is logged."""
        _ = self.experiment

    # --- numbers, tables, pictures ---

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """The config, nested as it is, so that W&B filters by `ppo.kl_coef`."""
        self.experiment.config.update(dict(params), allow_val_change=True)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._log(metrics, step)

    def _log(self, row: Mapping[str, Any], step: int | None) -> None:
        run = self.experiment
        if step is None:
            run.log(dict(row))
        elif step >= run.step:  # what W&B has of a run that was killed comes again with the same numbers once it is resumed
            run.log({**row, AXIS: step}, step=step)

    @rank_zero_only
    def log_rows(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        import wandb

        if name not in self._tables:
            self._tables[name] = wandb.Table(columns=list(rows[0]), log_mode="INCREMENTAL")  # each time only new rows are sent
        for row in rows:
            self._tables[name].add_data(*row.values())
        self._log({name: self._tables[name]}, step)

    @rank_zero_only
    def log_histograms(self, values: Mapping[str, Sequence[float]], step: int) -> None:
        import wandb

        kept = {name: [x for x in numbers if math.isfinite(x)] for name, numbers in values.items()}
        self._log({name: wandb.Histogram(numbers, num_bins=self.bins) for name, numbers in kept.items() if numbers}, step)

    @rank_zero_only
    def log_picture(self, name: str, file: Path) -> None:
        import wandb

        self._log({name: wandb.Image(str(file))}, None)

    @rank_zero_only
    def log_page(self, name: str, file: Path) -> None:
        """An HTML page, shown as it is."""
        import wandb

        self._log({name: wandb.Html(file.read_text(encoding="utf-8"), inject=False)}, None)

    # --- models and files ---

    @rank_zero_only
    def log_files(self, name: str, kind: str, files: Sequence[Path]) -> None:
        """Copies of small files, as an artifact."""
        import wandb

        artifact = wandb.Artifact(name, type=kind)
        for file in files:
            artifact.add_file(str(file), name=file.name)
        self.experiment.log_artifact(artifact)

    @rank_zero_only
    def use_models(self, folders: Mapping[str, Path]) -> None:
        """The exports, by role, that this run starts from."""
        if self.mode != "disabled":
            with self._without_harm("which models the run starts from"):
                use_exports(self.experiment, folders)

    @rank_zero_only
    def log_models(self, exports: Path, metadata: Mapping[str, Any]) -> None:
        """Every role in the run's folder of exports."""
        if self.artifacts != "none" and self.mode != "disabled":
            with self._without_harm("the exports"):
                log_exports(self.experiment, exports, verb=self.place.verb, how=self.artifacts, metadata=metadata)

    @contextmanager
    def _without_harm(self, what: str) -> Iterator[None]:
        """The server may be away for a while, or answer what wandb does not expect: no reason to lose a training."""
        try:
            yield
        except Exception as error:
            log.warning("logger.wandb: W&B did not record %s (%s: %s)", what, type(error).__name__, str(error).partition("\n")[0])

    # --- the end ---

    @rank_zero_only
    def finish(self, ending: Ending) -> None:
        """Puts the final numbers into the run's summary, by which W&B sorts, and ends it with the job's exit code. A run that nobody has
        logged to has none."""
        if self._experiment is None or self._finished:
            return
        run, self._finished = self._experiment, True
        run.summary.update({**ending.metrics, "status": ending.status})
        if ending.seconds:
            run.summary.update({"seconds": ending.seconds})
        if ending.error is not None or self.resumes:  # what an earlier part died of is over
            run.summary.update({"error": ending.error})
        run.finish(exit_code=EXIT_CODES.get(ending.status, 1))
