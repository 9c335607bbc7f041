"""What each step of a pipeline changed: a number before it and the same number after it. The terminal and the page both read it here.

Knows names of metrics and where the steps of a pipeline lie; knows no table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf.reporting.runs import STEPS, Run, read_run
from rlhf.reporting.statistics import Estimate, estimate, paired


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A number that a step is there to change."""

    label: str
    needs: tuple[str, ...]
    """Steps that must have ended well; the last one's summary holds the number."""
    before: str | None
    """Metric; `{before}` and `{after}` stand for the policies' names. None: 0, as a distance to what was there before is."""
    after: str


MEASURES = (
    Measure(label="SFT: perplexity of held-out answers", needs=("sft",), before="sft/perplexity_before", after="sft/perplexity"),
    Measure(label="reward model: accuracy on held-out pairs", needs=("reward",), before="reward/accuracy_before", after="reward/accuracy"),
    Measure(label="PPO: gold score", needs=("ppo", "evaluate"), before="gold/{before}", after="gold/{after}"),
    Measure(label="PPO: reward", needs=("ppo", "evaluate"), before="reward/{before}", after="reward/{after}"),
    Measure(label="PPO: KL to the policy before, nats an answer", needs=("ppo", "evaluate"), before=None, after="kl"),
    Measure(label="PPO: answer length, tokens", needs=("ppo", "evaluate"), before="length/{before}", after="length/{after}"),
)
"""In the order of the table."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One number of one run."""

    label: str
    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class MeanChange:
    """The same of several runs: means over seeds, and the differences seed by seed."""

    label: str
    before: Estimate
    after: Estimate
    difference: Estimate


def changes(steps: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> list[Change]:
    """Every number that was taken both before and after its step.

    Each is read from its own step's metrics: `reward/accuracy` of an evaluation is over other pairs than that of the reward model's
    step, and a difference of the two would be none.

    Args:
        steps: the metrics of each step that ended well.
        names: of the policies before and after PPO.
    """
    policies = dict(zip(("before", "after"), names, strict=True))
    found = []
    for measure in MEASURES:
        if all(step in steps for step in measure.needs):
            metrics = steps[measure.needs[-1]]
            before = 0.0 if measure.before is None else metrics.get(measure.before.format(**policies))
            after = metrics.get(measure.after.format(**policies))
            if before is not None and after is not None:
                found.append(Change(label=measure.label, before=before, after=after))
    return found


def step_metrics(folder: Path) -> dict[str, Mapping[str, float]]:
    """Of a pipeline's directory: the metrics of each step whose summary.json says that it is done."""
    found = {step: read_run(folder / step) for step in STEPS if (folder / step / "summary.json").is_file()}
    return {step: run.metrics for step, run in found.items() if run.done}


def changes_of(run: Run) -> list[Change]:
    """Those of a pipeline; none of a run of another verb, or where its configuration does not name the policies."""
    evaluation = run.config.get("evaluation")
    names = evaluation.get("names") if isinstance(evaluation, Mapping) else None
    if run.verb != "pipeline" or not isinstance(names, list) or len(names) != 2:
        return []
    return changes(step_metrics(run.folder) or _from_whole(run), names)


def _from_whole(run: Run) -> dict[str, Mapping[str, float]]:
    """Where the summary of the whole is all that was kept. In it an evaluation's accuracy stands in the place of that of the reward
    model's step, so that there is no saying what the step changed."""
    steps = run.config.get("steps")
    found: dict[str, Mapping[str, float]] = dict.fromkeys(steps, run.metrics) if run.done and isinstance(steps, list) else {}
    if "reward" in found and "evaluated/pairs" in run.metrics:
        found["reward"] = {name: value for name, value in run.metrics.items() if name != "reward/accuracy"}
    return found


def mean_changes(runs: Iterable[Run]) -> list[MeanChange]:
    """Over the seeds of the runs; several runs of one seed count as one, with their mean."""
    before: dict[str, dict[int, list[float]]] = {}
    after: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        for change in changes_of(run) if run.seed is not None else ():
            for values, value in ((before, change.before), (after, change.after)):
                values.setdefault(change.label, {}).setdefault(run.seed or 0, []).append(value)
    found = []
    for measure in MEASURES:
        if measure.label in before:
            first, last = _means(before[measure.label]), _means(after[measure.label])
            found.append(
                MeanChange(
                    label=measure.label, before=estimate(first), after=estimate(last), difference=estimate(paired(last, first))
                )
            )  # fmt: skip
    return found


def _means(values: Mapping[int, Sequence[float]]) -> dict[int, float]:
    return {seed: sum(several) / len(several) for seed, several in sorted(values.items())}
