"""Judging what was trained, on held-out rows: two policies on the same prompts, the reward model on pairs, perplexity on texts.

Knows the measures; knows no engine and no data set. Roles: `actor` (the policy after), `ref` (before), `reward`; any may be absent.
B rows, P prompt tokens, A answer tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf.algorithms.kl import kl_estimate
from rlhf.algorithms.logprobs import token_logprobs
from rlhf.algorithms.losses import comparisons, end_scores, sft_loss
from rlhf.algorithms.masked import masked_sum
from rlhf.engines.generation import RolloutEngine
from rlhf.models.factory import Blueprint
from rlhf.modules.base import RoleModule
from rlhf.modules.reward import every_answer
from rlhf.modules.scorers import Scorer
from rlhf.types import PairBatch, PromptBatch, Rollout, TextBatch


class Comparison(RoleModule):
    """`names` labels the policies in metrics: `gold/<name>`, `rollout/reward/<name>`, ... The first one is `ref`, the second `actor`."""

    def __init__(
        self, blueprints: dict[str, Blueprint], *, names: list[str], gold: Scorer | None, decode: Callable[[Tensor], list[str]],
        samples: int, seed: int,
    ) -> None:  # fmt: skip
        """
        Args:
            samples: answers to each prompt.
        """
        super().__init__(blueprints)
        self.samples = samples
        self.policies = {role: name for role, name in zip(("ref", "actor"), names, strict=True) if role in blueprints}
        self.gold = gold
        self.decode = decode
        self.sampling_seed = seed
        self.engine: RolloutEngine | None = None
        self.sums: dict[str, float] = {}
        self.bigrams: dict[str, list[tuple[int, int]]] = {}
        self.rows: list[dict[str, Any]] = []

    def validation_step(self, batch: PromptBatch | PairBatch | TextBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        if isinstance(batch, PromptBatch):
            self._compare(batch, batch_idx)
        elif isinstance(batch, PairBatch):
            self._judge_pairs(batch)
        else:
            for role, name in self.policies.items():
                nll = sft_loss(getattr(self, role)(batch.ids, batch.mask), batch.ids, batch.loss_mask)
                self._add({f"nll/{name}": nll.sum(), "nll_tokens": batch.loss_mask[:, 1:].sum() / len(self.policies)})

    def _add(self, sums: dict[str, Tensor | float]) -> None:
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)

    def _judge_pairs(self, batch: PairBatch) -> None:
        ids, mask, ranks = every_answer(batch)  # (N, T), (N, T), (B, K)
        scores = end_scores(self.reward(ids, mask), mask)  # (N,)
        better, worse, _ = comparisons(ranks)  # (C,) twice
        chosen, rejected = scores[better], scores[worse]  # (C,)
        self._add({"pairs": float(len(better)), "right": (chosen > rejected).sum(), "chosen": chosen.sum(), "rejected": rejected.sum()})

    def _compare(self, batch: PromptBatch, batch_idx: int) -> None:
        """Every policy answers with the same random stream; the training's stream is left as it was."""
        assert self.engine is not None
        prompts = batch.texts * self.samples  # as the answers come: sample-major
        rows: list[dict[str, Any]] = [{"prompt": text} for text in prompts]
        for role, name in self.policies.items():
            devices = [self.device] if self.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(self.sampling_seed + 7919 * batch_idx + 100_003 * self.global_rank)
                rollout = self.engine.generate(role, batch, samples=self.samples)
            answers = self.decode(rollout.ids[:, rollout.prompt_length :])
            ended = rollout.ended.tolist()
            self._measure(role, name, rollout, prompts=len(batch))
            for row, answer in zip(rows, answers, strict=True):
                row[name] = answer
            if self.gold is not None:
                scores = self.gold(prompts, answers, ended)
                self._add({f"gold/{name}": sum(scores)})
                for row, score in zip(rows, scores, strict=True):
                    row[f"gold/{name}"] = score
        self._add({"prompts": float(len(prompts))})
        self.rows += rows

    def _measure(self, role: str, name: str, rollout: Rollout, *, prompts: int) -> None:
        mask, width = rollout.action_mask, rollout.action_mask.shape[1]
        answers = rollout.ids[:, -width:]  # (B, A)
        self._add({f"length/{name}": mask.sum(), f"ended/{name}": rollout.ended.sum()})
        if "reward" in self.blueprints:
            self._add({f"reward/{name}": end_scores(self.reward(rollout.ids, rollout.mask), rollout.mask).sum()})
        if "ref" in self.blueprints:
            ref = token_logprobs(self.ref(rollout.ids, rollout.mask, last=width + 1)[:, :-1], answers)  # (B, A)
            self._add({f"ref_nll/{name}": -masked_sum(ref, mask)})
            if role == "actor":
                own = token_logprobs(self.actor(rollout.ids, rollout.mask, last=width + 1)[:, :-1], answers)
                self._add({"k1": masked_sum(own - ref, mask), "k3": masked_sum(kl_estimate(own, ref, "k3"), mask)})
        pairs = self.bigrams.setdefault(name, [])
        first = slice(prompts)  # one answer to each prompt: the share of different pairs falls with the number of answers
        for tokens, length in zip(answers[first].tolist(), mask[first].sum(dim=1).tolist(), strict=True):
            pairs += itertools.pairwise(tokens[:length])

    def results(self) -> dict[str, float]:
        """Metrics over all ranks. Collective."""
        gathered = self.strategy.gather_objects((self.sums, self.bigrams, self.rows))
        self.rows = [row for _, _, rows in gathered for row in rows]
        total: dict[str, float] = {}
        for sums, _, _ in gathered:
            for key, value in sums.items():
                total[key] = total.get(key, 0.0) + value
        metrics: dict[str, float] = {}
        if total.get("pairs"):
            metrics["reward/accuracy"] = total["right"] / total["pairs"]
            metrics["reward/margin"] = (total["chosen"] - total["rejected"]) / total["pairs"]
        for name in self.policies.values():
            if total.get("prompts"):
                metrics |= self._policy_results(name, total, [pair for _, bigrams, _ in gathered for pair in bigrams.get(name, [])])
            if total.get("nll_tokens"):
                metrics[f"perplexity/{name}"] = math.exp(min(700.0, total[f"nll/{name}"] / total["nll_tokens"]))
        if "k1" in total:
            metrics |= {"kl": total["k1"] / total["prompts"], "kl_k3": total["k3"] / total["prompts"]}
        return metrics

    def _policy_results(self, name: str, total: dict[str, float], bigrams: list[tuple[int, int]]) -> dict[str, float]:
        prompts, tokens = total["prompts"], max(1.0, total[f"length/{name}"])
        metrics = {f"length/{name}": total[f"length/{name}"] / prompts, f"eos_rate/{name}": total[f"ended/{name}"] / prompts}
        for key in ("gold", "reward"):
            if f"{key}/{name}" in total:
                metrics[f"{key}/{name}"] = total[f"{key}/{name}"] / prompts
        if f"ref_nll/{name}" in total:
            metrics[f"ref_perplexity/{name}"] = math.exp(min(700.0, total[f"ref_nll/{name}"] / tokens))
        metrics[f"distinct_2/{name}"] = len(set(bigrams)) / max(1, len(bigrams))
        return metrics
