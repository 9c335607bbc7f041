"""The verb `plan`: what a run needs, before anything is loaded; and the check of memory that training verbs run first.

Knows sections of configs and where the answer is printed; the models of memory and time are rlhf/planning's. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from rlhf.cli.sections import COMMON, TRAINING
from rlhf.config import UserError, build
from rlhf.logging import log
from rlhf.planning.report import as_json, judged, report
from rlhf.rules import check


def run_plan(config: Mapping[str, Any]) -> dict[str, Any]:
    """Prints the plan of one step, or of a pipeline's, and returns a summary for sweeps.

    Raises:
        UserError: the step's config is refused, as its verb would, or the plan cannot be made.
    """
    plan = build(config["plan"], "plan")
    steps = _pipeline_steps(config["steps"]) if plan.step == "pipeline" else [plan.step]
    found = [report(step_settings(config, step)) for step in steps]
    answers = [as_json(one) for one in found]
    if plan.json:
        print(json.dumps(answers if plan.step == "pipeline" else answers[0], indent=1))
    else:
        from rlhf.cli.plan_page import print_plan

        for one in found:
            print_plan(one, enforce=plan.enforce)
    last = answers[-1]
    metrics = {"plan/peak_gb": max(answer["gpu"]["peak"] for answer in answers) / 1e9}
    if last["seconds_per_iteration"] is not None:
        metrics |= {"plan/seconds": last["seconds_per_iteration"], "plan/sequences_per_s": last["sequences_per_second"]}
    return {"verb": "plan", "status": "done", "metrics": metrics, "seconds": {}}


def _pipeline_steps(steps: list[str]) -> list[str]:
    """Of `steps`, those that train."""
    unknown = [step for step in steps if step not in (*TRAINING, "evaluate")]
    training = [step for step in steps if step in TRAINING]
    if unknown or not training:
        raise UserError(f"steps={steps} must name some of {', '.join(TRAINING)}, which are planned, and evaluate, which trains nothing")
    return training


def step_settings(config: Mapping[str, Any], step: str) -> Any:
    """Typed settings of one step, checked as if its verb had been called. Who starts the ranks does not matter to a plan.

    Raises:
        UserError: names the key.
    """
    part = {"verb": step, **{key: config[key] for key in (*COMMON, *TRAINING[step])}}
    part["launcher"] = {**config["launcher"], "name": "external"}
    cfg = build(part)
    check(cfg)
    return cfg


def require_fit(cfg: Any, accelerator: str) -> None:
    """A training run on GPUs of a known kind fits by the model of memory, or goes on with `plan.enforce=false`. Of a pipeline all steps are
    looked at before the first one starts.

    Raises:
        UserError: it cannot fit; says by how much it is short, and what would help.
    """
    plan = getattr(cfg, "plan", None)
    if accelerator != "cuda" or plan is None or not plan.enforce:
        return
    steps = cfg.steps if cfg.verb == "pipeline" else [cfg.verb]
    for step in (step for step in steps if step in TRAINING):
        refusal, caution = judged(SimpleNamespace(**{**vars(cfg), "verb": step}))
        if refusal is not None:
            raise UserError(f"{step}: {refusal}" if cfg.verb == "pipeline" else refusal)
        if caution is not None:
            log.warning("%s: %s", step, caution)
