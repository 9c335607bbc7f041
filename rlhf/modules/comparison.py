"""Judging what was trained, on held-out rows: two policies on the same prompts, the reward model on pairs, perplexity on texts.

Knows what to record of a batch; what the records come to is `rlhf.modules.measures`'. Knows no engine and no data set. Roles: `actor` (the
policy after), `ref` (before), `reward`, `base` (one that both policies' KL is taken to); any but `actor` may be absent.
B rows, P prompt tokens, A answer tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf.algorithms.kl import kl_estimate
from rlhf.algorithms.logprobs import token_logprobs
from rlhf.algorithms.losses import comparisons, end_scores, sft_loss
from rlhf.config import UserError
from rlhf.engines.generation import RolloutEngine
from rlhf.models.factory import Blueprint
from rlhf.modules.base import RoleModule
from rlhf.modules.measures import Answer, JudgedPrompt, Metrics, ReadText, Records, all_metrics, interleaved
from rlhf.modules.reward import every_answer
from rlhf.modules.scorers import Scorer, is_finite_number, shown
from rlhf.types import PairBatch, PromptBatch, Rollout, TextBatch

Part = Literal["prompts", "pairs", "texts", "fixed prompts", "fixed pairs"]
"""What a loader's batches are for. Those of the fixed parts are the same on every rank, so that rank zero's records are all of them."""
Sourced = tuple[PairBatch, list[str]]
FIXED_SEED = 500_009
"""Parts the random stream of fixed prompts from that of held-out ones."""


class Comparison(RoleModule):
    """`names` labels the policies in metrics: `gold/<name>`, `reward/<name>`, ... The first one is `ref`, the second `actor`."""

    def __init__(
        self, blueprints: dict[str, Blueprint], *, names: list[str], gold: Scorer | None, decode: Callable[[Tensor], list[str]],
        samples: int, seed: int, parts: Sequence[Part], judges: Sequence[str],
    ) -> None:  # fmt: skip
        """
        Args:
            samples: answers to each held-out prompt; a fixed one has one.
            parts: of each loader, in order.
            judges: by which win rates are counted, `reward` and `gold`.
        """
        super().__init__(blueprints)
        self.samples = samples
        self.policies = {role: name for role, name in zip(("ref", "actor"), names, strict=True) if role in blueprints}
        self.gold = gold
        self.decode = decode
        self.sampling_seed = seed
        self.parts = parts
        self.judges = judges
        self.engine: RolloutEngine | None = None
        self.records = Records()
        self.fixed = Records()

    def validation_step(self, batch: PromptBatch | Sourced | TextBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        part = self.parts[dataloader_idx]
        records = self.fixed if part.startswith("fixed") else self.records
        if isinstance(batch, PromptBatch):
            fixed = part == "fixed prompts"
            seed = self.sampling_seed + 7919 * batch_idx + (FIXED_SEED if fixed else 100_003 * self.global_rank)
            records.add(Records(answers=self._compare(batch, samples=1 if fixed else self.samples, seed=seed, gold=not fixed)))
        elif isinstance(batch, TextBatch):
            records.texts += self._read(batch)
        else:
            records.judged += self._judge(*batch)

    # --- pairs and texts ---

    def _judge(self, batch: PairBatch, sources: list[str]) -> list[JudgedPrompt]:
        ids, mask, ranks = every_answer(batch)  # (N, T), (N, T), (B, K)
        scores = end_scores(self.reward(ids, mask), mask)  # (N,)
        better, worse, _ = comparisons(ranks)  # (C,) twice
        rows = torch.arange(len(ranks), device=ranks.device).expand(ranks.shape[1], -1)[(ranks >= 0).T]  # (N,) the prompt of each answer
        margins: list[list[float]] = [[] for _ in sources]
        for row, margin in zip(rows[better].tolist(), (scores[better] - scores[worse]).tolist(), strict=True):
            margins[row].append(margin)
        return [JudgedPrompt(source=source, margins=own) for source, own in zip(sources, margins, strict=True)]

    def _read(self, batch: TextBatch) -> list[ReadText]:
        nll = {
            name: sft_loss(getattr(self, role)(batch.ids, batch.mask), batch.ids, batch.loss_mask).sum(dim=1).tolist()
            for role, name in self.policies.items()
        }
        tokens = batch.loss_mask[:, 1:].sum(dim=1).tolist()  # (B,)
        return [ReadText(tokens=count, nll={name: nll[name][i] for name in nll}) for i, count in enumerate(tokens)]

    # --- answers ---

    def _compare(self, batch: PromptBatch, *, samples: int, seed: int, gold: bool) -> dict[str, list[Answer]]:
        """Every policy answers with the same random stream; the training's stream is left as it was."""
        assert self.engine is not None
        found: dict[str, list[Answer]] = {}
        for role, name in self.policies.items():
            devices = [self.device] if self.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(seed)
                rollout = self.engine.generate(role, batch, samples=samples)
            found[name] = self._answers(role, rollout, batch.texts, gold=self.gold if gold else None)
        return found

    def _answers(self, role: str, rollout: Rollout, texts: list[str], *, gold: Scorer | None) -> list[Answer]:
        prompts = texts * (len(rollout) // len(texts))  # as the answers come: sample-major
        answers = self.decode(rollout.ids[:, rollout.prompt_length :])
        numbers = {key: value.tolist() for key, value in self._measure(role, rollout).items()}
        if gold is not None:
            with self.strategy.together():
                numbers["gold"] = gold_scores(gold, prompts, answers, rollout.ended.tolist())
        lengths = rollout.lengths.tolist()
        tokens = rollout.ids[:, rollout.prompt_length :].tolist()
        return [
            Answer(
                prompt=prompt, sample=i // len(texts), text=answers[i], tokens=tokens[i][: lengths[i]],
                numbers={key: float(values[i]) for key, values in numbers.items()},
            )
            for i, prompt in enumerate(prompts)
        ]  # fmt: skip

    def _measure(self, role: str, rollout: Rollout) -> dict[str, Tensor]:
        """(B,) each, by the names of `Answer.numbers`."""
        numbers = {"length": rollout.lengths, "ended": rollout.ended}
        if "reward" in self.blueprints:
            numbers["reward"] = end_scores(self.reward(rollout.ids, rollout.mask), rollout.mask)
        others = {other: name for other, name in (("ref", "kl"), ("base", "kl_base")) if other in self.blueprints}
        logprobs = {each: self._logprobs(each, rollout) for each in dict.fromkeys([*others, role]) if others}  # (B, A) each
        if "ref" in others:
            numbers["ref_nll"] = -logprobs["ref"].sum(dim=1)
        for other, name in others.items():
            if other != role:
                numbers[name] = (logprobs[role] - logprobs[other]).sum(dim=1)
                numbers[f"{name}_k3"] = kl_estimate(logprobs[role], logprobs[other], "k3").sum(dim=1)
        return numbers

    def _logprobs(self, role: str, rollout: Rollout) -> Tensor:
        """(B, A) of the answers' tokens under a policy, 0 on padding."""
        width = rollout.action_mask.shape[1]
        logits = getattr(self, role)(rollout.ids, rollout.mask, last=width + 1)[:, :-1]  # (B, A, V)
        return torch.where(rollout.action_mask, token_logprobs(logits, rollout.ids[:, -width:]), 0)

    # --- results ---

    def results(self) -> Metrics:
        """Metrics over all ranks, whose records are then those of all of them. Collective."""
        gathered = self.strategy.gather_objects((self.records, self.fixed))
        self.records, self.fixed = interleaved([records for records, _ in gathered]), gathered[0][1]
        metrics = all_metrics(self.records, names=list(self.policies.values()), judges=self.judges)
        if self.fixed.judged:
            margins = [margin for prompt in self.fixed.judged for margin in prompt.margins]
            metrics["fixed/accuracy"] = sum(margin > 0 for margin in margins) / len(margins)
        return metrics


def gold_scores(gold: Scorer, prompts: list[str], answers: list[str], ended: list[bool]) -> list[float]:
    """One score an answer.

    Raises:
        UserError: the scorer raises, or returns anything but one finite number for each answer.
    """
    try:
        scores: list[Any] = list(gold(prompts, answers, ended))
    except Exception as error:
        raise UserError(f"evaluation.gold raised {type(error).__name__}: {error}, for prompts such as {shown(prompts[0])}") from error
    if len(scores) != len(answers):
        raise UserError(f"evaluation.gold returned {len(scores)} scores for {len(answers)} answers: it must return one number for each")
    for prompt, answer, score in zip(prompts, answers, scores, strict=True):
        if not is_finite_number(score):
            raise UserError(
                f"evaluation.gold returned {score!r} for the prompt {shown(prompt)} and the answer {shown(answer)}: it must be a finite number"
            )
    return [float(score) for score in scores]
