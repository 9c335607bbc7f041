"""One job from a composed config: check it, claim its directory, start its ranks, read its summary.

Knows launchers and directories; knows no training.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.cli import rundir
from rlhf.cli.errors import report
from rlhf.config import UserError, build, check
from rlhf.engines.launcher import accelerator, read_hostfile, render_hostfile, render_slurm, run_ranks
from rlhf.logging import log


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
    accelerator(cfg.trainer)
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
    if not external or os.environ.get("RANK", "0") == "0":
        rundir.claim(run_dir, config)
    file = (run_dir / "config.yaml").resolve()
    if cfg.launcher.name in ("slurm", "hostfile"):
        return _write_script(config, cfg, run_dir, file)
    if cfg.trainer.num_nodes > 1 and not external:
        raise UserError("trainer.num_nodes > 1 needs launcher=slurm, launcher=hostfile or launcher=external")
    starts_ranks = cfg.trainer.devices > 1 and not external
    code = run_ranks(file, cfg.trainer, cfg.launcher) if starts_ranks else _run_here(config, external)
    if code:
        raise JobFailed(code)
    return rundir.read_summary(run_dir) or {}


def _run_here(config: Mapping[str, Any], external: bool) -> int:
    """This process is the only rank, or one that torchrun or srun started."""
    from rlhf.cli.rank import run_rank

    if external and "RANK" not in os.environ:
        raise UserError("launcher=external, but no RANK is set: start this command with torchrun, or use launcher=local")
    try:
        run_rank(config)
    except UserError as error:
        return report(config, error)
    except KeyboardInterrupt:
        report(config, RuntimeError("stopped by a second Ctrl-C"))
        return 1
    except Exception as error:
        if type(error).__name__ != "Interrupted":
            log.exception("the job failed")
        return report(config, error)
    return 0


def _write_script(config: Mapping[str, Any], cfg: Any, run_dir: Path, file: Path) -> dict[str, Any]:
    if cfg.launcher.name == "slurm":
        script, text, start = run_dir / "job.sbatch", render_slurm(file, cfg.trainer, cfg.launcher), "sbatch"
    else:
        hosts = read_hostfile(Path(cfg.launcher.hostfile), cfg.trainer)
        script, text, start = run_dir / "launch.sh", render_hostfile(file, hosts, cfg.trainer, cfg.launcher), "bash"
    rundir.write_atomically(script, text)
    log.info("wrote %s; start it with: %s %s", script, start, script)
    return {"verb": cfg.verb, "status": "written", "metrics": {}, "seconds": {}}
