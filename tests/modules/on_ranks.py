"""PPO on one rank or two without DeepSpeed: threads stand for ranks, and plain gradient descent for the engines.

Plain functions, for any test of the module to call.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from threading import Barrier
from typing import Any

import pytest
import torch
from jobs import composed
from tiny import VOCAB, config
from torch import Tensor, nn

from rlhf.algorithms.kl import kl_controller
from rlhf.config import build
from rlhf.engines.strategy import StepResult
from rlhf.models.factory import Blueprint
from rlhf.modules.ppo import PPO
from rlhf.settings import PPOConfig
from rlhf.types import PromptBatch, Rollout

ROWS, PROMPT, ANSWER = 8, 4, 6
TEMPERATURE = 0.7


class Meeting:
    """Where the threads of a run add up their tensors."""

    def __init__(self, ranks: int) -> None:
        self.barrier = Barrier(ranks)
        self.shares: list[Any] = [None] * ranks

    def reduce(self, rank: int, values: Tensor, how: Callable[[Tensor], Tensor]) -> Tensor:
        self.shares[rank] = values.clone()
        self.barrier.wait(timeout=60)
        result = how(torch.stack(self.shares))
        self.barrier.wait(timeout=60)
        return result.to(values.dtype)


class Descent:
    """What a module asks of a strategy, with a step of plain gradient descent on every micro-batch that ends a minibatch."""

    def __init__(self, module: PPO, rank: int, meeting: Meeting, *, rate: float, micro_batches: int) -> None:
        self.module, self.rank, self.meeting = module, rank, meeting
        self.rate, self.micro_batches, self.calls = rate, micro_batches, 0
        self.world_size = len(meeting.shares)

    def together(self) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, role: str, loss: Tensor) -> None:
        loss.backward()

    def step(self, *roles: str) -> dict[str, StepResult]:
        self.calls += 1
        if self.calls % self.micro_batches:
            return {}
        for role in roles:
            for parameter in getattr(self.module, role).parameters():
                if parameter.grad is not None:
                    parameter.data -= self.rate * self.sum_over_ranks(parameter.grad)
                    parameter.grad = None
        return {role: StepResult(0.0, self.rate, False) for role in roles}

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return self.meeting.reduce(self.rank, values, lambda shares: shares.sum(dim=0))

    def max_over_ranks(self, values: Tensor) -> Tensor:
        return self.meeting.reduce(self.rank, values, lambda shares: shares.amax(dim=0))


class OnRank(PPO):
    """PPO without a Lightning trainer."""

    rank = 0
    descent: Any = None

    @property
    def strategy(self) -> Any:
        return self.descent

    @property
    def global_rank(self) -> int:
        return self.rank


@cache
def settings() -> PPOConfig:
    sizes = ("ppo.batch_size=8", "ppo.minibatch_size=4", "ppo.micro_batch_size=2", "ppo.epochs=2", "ppo.score_micro_batch_size=3")
    return build(composed("ppo", "run_dir=x", *sizes)).ppo


@cache
def networks() -> PPO:
    """The four networks, random; the actor has moved away from ref."""
    torch.manual_seed(3)
    kinds = {"actor": "causal", "ref": "causal", "critic": "scalar", "reward": "scalar"}
    blueprints = {
        role: Blueprint(kind=kind, config=config("llama"), folder=None, lora=None, gradient_checkpointing=False, dtype=torch.float32)
        for role, kind in kinds.items()
    }  # fmt: skip
    module = OnRank(settings(), blueprints, temperature=TEMPERATURE, seed=5)
    module.configure_model()
    with torch.no_grad():
        for parameter in module.actor.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return module


def answered(*, shift: Tensor | float = 0.0, with_logprobs: bool = True) -> Rollout:
    """Random prompts and answers of all lengths, with the actor's log-probabilities minus `shift`, NaN where no token is."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, VOCAB, (ROWS, PROMPT + ANSWER), generator=generator)
    prompts = torch.arange(PROMPT) >= torch.arange(ROWS).unsqueeze(1) % PROMPT  # (B, P) padded on the left
    action_mask = torch.arange(ANSWER) <= torch.arange(ROWS).unsqueeze(1) % ANSWER  # (B, A)
    mask = torch.cat([prompts, action_mask], dim=1)
    logprobs = None
    if with_logprobs:
        with torch.no_grad():
            logits = networks().actor.eval()(ids, mask)[:, PROMPT - 1 : -1] / TEMPERATURE  # (B, A, V)
        actor = logits.log_softmax(-1).gather(-1, ids[:, PROMPT:].unsqueeze(-1)).squeeze(-1)  # (B, A)
        logprobs = torch.where(action_mask, actor - shift, math.nan)
    return Rollout(ids=ids, mask=mask, action_mask=action_mask, ended=torch.arange(ROWS) % 3 == 0, logprobs=logprobs)


def learner(ranks: int = 1, rate: float = 0.05, **changes: Any) -> list[OnRank]:
    """A module for each rank, all from the same weights."""
    meeting, modules = Meeting(ranks), []
    for rank in range(ranks):
        module = copy.deepcopy(networks())
        module.ppo = dataclasses.replace(settings(), **changes)
        module.kl = kl_controller(module.ppo.kl_coef, module.ppo.kl_target, module.ppo.kl_horizon)
        module.rank = rank
        share, micro = module.ppo.minibatch_size // ranks, module.ppo.micro_batch_size
        module.descent = Descent(module, rank, meeting, rate=rate, micro_batches=share // (micro or share))
        modules.append(module)
    return modules


def iterate(modules: list[OnRank], rollout: Rollout) -> dict[str, float]:
    """One iteration on all ranks, row g being rank g % ranks's; the metrics of rank zero."""

    def run(module: OnRank) -> None:
        rows = rollout.rows(torch.arange(module.rank, ROWS, len(modules)))
        batch = PromptBatch(ids=rows.ids[:, :PROMPT], mask=rows.mask[:, :PROMPT], index=torch.arange(len(rows)), texts=[""] * len(rows))
        batch.rollout = rows
        module.training_step(batch, 0)

    with ThreadPoolExecutor(len(modules)) as pool:
        list(pool.map(run, modules))
    assert all(module.metrics == pytest.approx(modules[0].metrics) for module in modules)
    return modules[0].metrics


def same(found: dict[str, float], expected: dict[str, float], *, without: tuple[str, ...] = ()) -> None:
    assert found.keys() - set(without) == expected.keys() - set(without)
    for name in found.keys() - set(without):
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name


def weights(module: PPO) -> Tensor:
    return nn.utils.parameters_to_vector(module.actor.parameters()).detach()
