"""One job from a composed config: check it, claim its directory, start its ranks, read its summary.

Knows launchers and directories; knows no training.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rlhf.cli import rundir
from rlhf.cli.errors import FAILED
from rlhf.cli.vocabulary import require_one_vocabulary
from rlhf.config import build
from rlhf.engines.launcher import SCRIPTED, accelerator_of_ranks, read_hostfile, render_hostfile, render_slurm, run_ranks
from rlhf.logging import log
from rlhf.rules import check


class JobFailed(Exception):
    """A job ended without its summary saying `done`; its message has been printed. `code` is the exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the job ended with exit code {code}")
        self.code = code


def checked(config: Mapping[str, Any]) -> Any:
    """Typed settings of a resolved config, after every rule that needs no file and no model.

    Raises:
        UserError: names the key.
    """
    cfg = build(config)
    check(cfg)
    require_one_vocabulary(cfg)
    kind = accelerator_of_ranks(cfg.trainer, cfg.launcher)
    if kind == "cuda":
        from rlhf.cli.plan import require_fit

        require_fit(cfg, kind)
    return cfg


def run_job(config: Mapping[str, Any]) -> dict[str, Any]:
    """Runs one sft, reward, ppo or evaluate job to its end and returns its summary.

    Raises:
        UserError: refused before anything was written.
        JobFailed: it ended otherwise than done.
    """
    cfg = checked(config)
    run_dir = Path(cfg.run_dir)
    external = cfg.launcher.name == "external"
    if (summary := rundir.done_already(run_dir, config)) is not None:
        log.info("run_dir=%s is done already: there is nothing to resume", run_dir)
        return summary
    hosts = read_hostfile(Path(cfg.launcher.hostfile), cfg.trainer) if cfg.launcher.name == "hostfile" else []
    first = not external or os.environ.get("RANK", "0") == "0"
    with rundir.claimed(run_dir, config) if first else nullcontext():
        return _started(cfg, config, hosts)


def _started(cfg: Any, config: Mapping[str, Any], hosts: list[str]) -> dict[str, Any]:
    """`run_job` once the directory is this run's."""
    run_dir, external = Path(cfg.run_dir), cfg.launcher.name == "external"
    file = (run_dir / "config.yaml").resolve()
    if cfg.launcher.name in SCRIPTED:
        return _write_script(cfg, run_dir, file, hosts)
    starts_ranks = cfg.trainer.devices > 1 and not external
    code = run_ranks(file, cfg.trainer, cfg.launcher) if starts_ranks else _run_here(config)
    summary = rundir.read_summary(run_dir)
    if code == FAILED and summary is None:
        # Rank zero was ended before it could say so itself: killed, or out of memory.
        rundir.write_summary(config, "failed", error=f"the ranks ended with exit code {code}")
    if code:
        raise JobFailed(code)
    return summary or {}


def _run_here(config: Mapping[str, Any]) -> int:
    """This process is the only rank, or one that torchrun or srun started."""
    from rlhf.cli.rank import attempt

    return attempt(config)


def _write_script(cfg: Any, run_dir: Path, file: Path, hosts: list[str]) -> dict[str, Any]:
    if cfg.launcher.name == "slurm":
        script, text, start = run_dir / "job.sbatch", render_slurm(file, cfg.trainer, cfg.launcher), "sbatch"
    else:
        script, text, start = run_dir / "launch.sh", render_hostfile(file, hosts, cfg.trainer, cfg.launcher), "bash"
    rundir.write_atomically(script, text)
    log.info("wrote %s; start it with: %s %s", script, start, shlex.quote(str(script)))
    return {"verb": cfg.verb, "status": "written", "metrics": {}, "seconds": {}}
