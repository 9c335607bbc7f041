"""The verb `pipeline`: the steps in order, each a job of its own, each from the last one's export; then a table and a plot.

Knows how the steps hang together; knows no training.
"""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.callbacks.run_log import run_logs, told
from rlhf.cli import rundir
from rlhf.cli.evaluate.ahead import require_possible
from rlhf.cli.job import JobFailed, checked, run_job
from rlhf.cli.pipeline_ahead import require_later_steps
from rlhf.cli.sections import COMMON, EVALUATE, TRAINING
from rlhf.cli.summary_page import ROWS, plot_pipeline, print_pipeline
from rlhf.cli.wandb_settings import require_key
from rlhf.config import UserError, build
from rlhf.logging import log
from rlhf.rules import critic_start
from rlhf.sweeping.cells import INTERRUPTED

PARTS = {step: TRAINING[step] for step in ("sft", "reward", "ppo")} | {"evaluate": EVALUATE}
"""Which sections of the pipeline's config each step has."""


def step_config(config: Mapping[str, Any], step: str) -> dict[str, Any]:
    """The config of one step, as if its verb had been called with it; roles start where the earlier steps' exports are.

    A step that is not run takes its result from the role's own `init`.
    """
    root, run_dir = str(config["run_dir"]), str(Path(config["run_dir"]) / step)
    part = {"verb": step, **{key: config[key] for key in (*COMMON, *PARTS[step])}}
    part = _moved(part, root, run_dir)
    part["run_dir"] = run_dir
    steps = config["steps"]

    def start(role: str, *candidates: tuple[str, str]) -> None:
        for earlier, export in candidates:
            if earlier in steps:
                part[role] = {**part[role], "init": str(Path(root) / earlier / "export" / export)}
                return

    same_network = config["reward"]["model"]["name"] == config["actor"]["model"]["name"]
    if step == "reward" and same_network and config["reward"]["init"] is None:
        start("reward", ("sft", "actor"))  # InstructGPT, section 3.5: the reward model starts from the SFT model
    if step == "ppo":
        start("actor", ("sft", "actor"))
        if reads_reward_model(config):
            start("reward", ("reward", "reward"))
        else:
            part["reward"] = {**part["reward"], "init": None}  # the evaluation alone reads it
    if step == "evaluate":
        start("actor", ("ppo", "actor"), ("sft", "actor"))
        start("reward", ("reward", "reward"))
        part["ref"] = {**part["ref"], "shared": False}  # two exports are compared, whatever PPO held
        if "ppo" in steps:
            start("ref", ("sft", "actor"))
            if "sft" not in steps:
                part["ref"] = {**part["ref"], "init": part["ref"]["init"] or config["actor"]["init"]}
    return part


def reads_reward_model(config: Mapping[str, Any]) -> bool:
    """Whether PPO needs one: as a reward, or to start the critic from."""
    cfg = build({key: config[key] for key in ("ppo", "critic")})
    return cfg.ppo.reward_source != "function" or critic_start(cfg) == "reward"


def _moved(node: Any, old: str, new: str) -> Any:
    """The same config with every path below the pipeline's directory put below the step's."""
    if isinstance(node, Mapping):
        return {key: _moved(value, old, new) for key, value in node.items()}
    if isinstance(node, list):
        return [_moved(value, old, new) for value in node]
    return new if node == old else node


def run_pipeline(config: Mapping[str, Any]) -> dict[str, Any]:
    """Runs the steps that are not yet done and returns the summary of the whole.

    Raises:
        UserError: refused before anything was written, or by a step.
        JobFailed: a step ended otherwise than done.
    """
    steps, run_dir = config["steps"], Path(config["run_dir"])
    if not isinstance(steps, list) or not steps or steps != [step for step in PARTS if step in steps]:
        raise UserError(
            f"steps={'null' if steps is None else steps} must name some of {', '.join(PARTS)}, in that order: steps=[sft,reward]"
        )
    cfg = checked(config)
    if (whole := rundir.done_already(run_dir, config)) is not None:
        log.info("run_dir=%s is done already: there is nothing to resume", run_dir)
        return whole
    root = run_dir.absolute()
    require_later_steps([build(step_config(config, step)) for step in steps if step != "evaluate"], root)
    if "evaluate" in steps:  # before hours of training, rather than after
        require_possible(cfg, step_config(config, "evaluate"))
    require_key(config)
    with rundir.claimed(run_dir, config):
        return _run_steps(config, steps)


def _run_steps(config: Mapping[str, Any], steps: list[str]) -> dict[str, Any]:
    """`run_pipeline` once the directory is this run's."""
    run_dir, start = Path(config["run_dir"]), time.perf_counter()
    summaries: dict[str, dict[str, Any]] = {}
    try:
        for step in steps:
            summaries[step] = _run_step(step_config(config, step))
            log.info("%s done in %.0f s", step, summaries[step]["seconds"].get("total", 0.0))
    except (UserError, JobFailed) as error:
        reason = _reason(config, steps[len(summaries)], error, begun=bool(summaries))
        _end(config, summaries, time.perf_counter() - start, **reason)
        if reason["error"].startswith(INTERRUPTED):  # the step has said how it alone goes on
            log.info("the pipeline goes on with rlhf pipeline resume=true %s", shlex.quote(f"run_dir={run_dir}"))
        raise
    return _end(config, summaries, time.perf_counter() - start, status="done")


def _reason(config: Mapping[str, Any], step: str, error: Exception, *, begun: bool) -> dict[str, str]:
    """Status and error of the whole from those of the step that ended otherwise than done. Only a first step may leave the directory free."""
    said = rundir.read_summary(Path(config["run_dir"]) / step) or {}
    text = f"{type(error).__name__}: {error}" if isinstance(error, UserError) else said.get("error", f"RuntimeError: {error}")
    kind, _, message = text.partition(": ")
    refused = isinstance(error, UserError) or said.get("status") == "refused"
    return {"status": "refused" if refused and not begun else "failed", "error": f"{kind}: {step}: {message}"}


def _end(config: Mapping[str, Any], summaries: Mapping[str, dict[str, Any]], total: float, **ended: str) -> dict[str, Any]:
    """Writes the summary of the whole from those of its steps; one that is done is also drawn and printed."""
    run_dir, names = Path(config["run_dir"]), config["evaluation"]["names"]
    metrics: dict[str, float] = {}
    seconds: dict[str, float] = {"total": total}
    for step, summary in summaries.items():
        metrics |= summary["metrics"]
        seconds[step] = summary["seconds"].get("total", 0.0)
        seconds |= {f"{step}/{phase}": value for phase, value in summary["seconds"].items() if phase != "total"}
    whole = rundir.write_summary(config, **ended, metrics=metrics, seconds=seconds)
    plot = plot_pipeline(run_dir, names) if ended["status"] == "done" else None
    _log(config, whole, plot)
    if ended["status"] == "done":
        print_pipeline(run_dir, metrics, seconds, names, plot)
    return whole


def _log(config: Mapping[str, Any], whole: Mapping[str, Any], plot: Path | None) -> None:
    """The pipeline as a run of its own, beside those of its steps: its config and final numbers, the table and the curves."""
    if not config["logger"]:
        return
    from rlhf.cli.loggers import added_loggers

    names = config["evaluation"]["names"]
    loggers = added_loggers(config)
    with told(loggers) as ending:
        ending.status, ending.error = whole["status"], whole.get("error")
        ending.metrics, ending.seconds = whole["metrics"], whole["seconds"]
        rows = compared(whole["metrics"], names)
        for logger in run_logs(loggers):
            if rows:
                logger.log_rows("comparison", rows, 0)
            if plot is not None:
                logger.log_picture("curves", plot)


def compared(metrics: Mapping[str, float], names: list[str]) -> list[dict[str, Any]]:
    """A row for each measure of the two policies."""
    rows = [{"measure": label, **{name: metrics.get(key.format(name)) for name in names}} for label, key in ROWS.items()]
    return [row for row in rows if any(row[name] is not None for name in names)]


def _run_step(config: dict[str, Any]) -> dict[str, Any]:
    """A finished step is not run again; one that had begun goes on from its checkpoint, or anew where it has none."""
    run_dir = Path(config["run_dir"])
    if config["resume"]:
        summary = rundir.read_summary(run_dir)
        if summary is not None and summary["status"] == "done":
            log.info("%s is done already", config["verb"])
            return summary
        if not (run_dir / "config.yaml").is_file():
            config = {**config, "resume": False}
        elif not (run_dir / "checkpoints").is_dir():
            shutil.rmtree(run_dir)
            config = {**config, "resume": False}
    log.info("%s: %s", config["verb"], run_dir)
    return run_job(config)
