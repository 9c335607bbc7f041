"""Whether the hybrid engine says what transformers says: one model, one engine, greedy answers to prompts of mixed length.

Knows engines and networks; knows no table and no exit code. B sequences of this rank, P prompt tokens, A answer tokens, T = P + A.
"""

from __future__ import annotations

import copy
import dataclasses
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from rlhf.algorithms.logprobs import token_logprobs
from rlhf.config import UserError
from rlhf.engines.baselines import Alone, Vocabulary, random_prompts
from rlhf.engines.generation import HFGenerate, RolloutEngine
from rlhf.engines.strategy import RoleStrategy
from rlhf.models.factory import Blueprint, build_network
from rlhf.models.networks import restore_rotary
from rlhf.settings import RolloutConfig
from rlhf.types import PromptBatch, Rollout


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What was seen on all ranks. Log-probabilities in nats, of the engine's own tokens."""

    tokens: int
    equal: int
    """Tokens that transformers chose as well, in the model's own precision."""
    largest: float
    """Largest difference to the fp32 reference."""
    error: float
    """Mean absolute difference to the fp32 reference."""
    peer_error: float
    """That of transformers in the model's own precision."""


def small_config(name: str, shape: dict[str, Any]) -> PretrainedConfig:
    """The transformers config of an entry of `bench.shapes`.

    Raises:
        UserError: transformers has no such model type.
    """
    try:
        config = AutoConfig.for_model(**shape)
    except ValueError as error:
        raise UserError(f"bench.shapes.{name}.model_type={shape['model_type']!r}: transformers has no such model type") from error
    config.use_cache = True
    return config


def train(strategy: RoleStrategy, words: Vocabulary, *, steps: int, rows: int, tokens: int, seed: int) -> None:
    """A few optimizer steps of the actor on random tokens, so that adapters and optimizer state are not those of a fresh model."""
    module: Any = strategy.lightning_module
    generator = torch.Generator().manual_seed(seed + 7919 * strategy.global_rank)
    for _ in range(steps):
        batch = random_prompts(words, torch.full((rows,), tokens), generator, strategy.root_device)
        logits = module.actor(batch.ids, batch.mask)  # (B, P, V)
        loss = -token_logprobs(logits[:, :-1], batch.ids[:, 1:]).mean() / strategy.world_size
        strategy.backward("actor", loss)
        strategy.step("actor")


def mixed_prompts(words: Vocabulary, *, count: int, longest: int, seed: int, device: torch.device) -> PromptBatch:
    """Random prompts from one token to `longest`, padded on the left."""
    lengths = torch.linspace(longest, 1, count).round().long()  # (B,)
    return random_prompts(words, lengths, torch.Generator().manual_seed(seed), device)


@torch.no_grad()
def reference(strategy: RoleStrategy, blueprint: Blueprint, dtype: torch.dtype) -> nn.Module:
    """The actor's present weights in a network of its own, outside any engine and with its adapters beside the weights."""
    plain = dataclasses.replace(blueprint, config=copy.deepcopy(blueprint.config), folder=None, dtype=dtype, gradient_checkpointing=False)
    whole: AbstractContextManager[object] = nullcontext()
    network = build_network(plain, sharded=whole, gather=lambda parameters: nullcontext(), is_writer=True)
    targets = dict(network.named_parameters())
    with strategy.whole("actor") as source:
        for name, parameter in source.named_parameters():
            targets[name].data.copy_(parameter.data)
    network = network.to(strategy.root_device).requires_grad_(False).eval()
    restore_rotary(network)
    return network


@torch.no_grad()
def compare(
    strategy: RoleStrategy, engine: RolloutEngine, blueprint: Blueprint, rollout: RolloutConfig, prompts: PromptBatch, words: Vocabulary
) -> Agreement:
    """Answers the prompts with the engine and with transformers in the model's precision; judges both by an fp32 copy. Collective.

    Raises:
        RuntimeError: the engine returned no log-probabilities.
    """
    ours = engine.generate("actor", prompts, samples=1)
    if ours.logprobs is None:
        raise RuntimeError("the engine returned no log-probabilities")
    peer = reference(strategy, blueprint, blueprint.dtype)
    exact = peer if blueprint.dtype == torch.float32 else reference(strategy, blueprint, torch.float32)
    theirs = HFGenerate(Alone(peer), rollout, end_id=words.end, pad_id=words.pad).generate("actor", prompts, samples=1)  # type: ignore[arg-type]
    mask = ours.action_mask
    truth = answer_logprobs(exact, ours)
    gap = (ours.logprobs.float() - truth).abs()[mask]
    peer_gap = (answer_logprobs(peer, ours) - truth).abs()[mask]
    sums = torch.stack([mask.sum(), equal_tokens(ours, theirs), gap.sum(), peer_gap.sum()]).double()
    strategy.sum_over_ranks(sums)
    # NaN loses every comparison, so it would pass for a small difference.
    largest = strategy.max_over_ranks(torch.where(gap.isnan(), torch.inf, gap).max().double())
    tokens, equal, error, peer_error = sums.tolist()
    return Agreement(tokens=int(tokens), equal=int(equal), largest=float(largest), error=error / tokens, peer_error=peer_error / tokens)


def answer_logprobs(network: Any, rollout: Rollout) -> Tensor:
    """(B, A) fp32: log-probability of each answer token under a network."""
    width = rollout.action_mask.shape[1]
    logits = network(rollout.ids, rollout.mask, last=width + 1)[:, :-1]  # (B, A, V)
    return token_logprobs(logits, rollout.ids[:, -width:])


def equal_tokens(ours: Rollout, theirs: Rollout) -> Tensor:
    """() int64: answer tokens of `ours` that `theirs` has in the same place, less those that `theirs` has beyond the end of `ours`."""
    width = max(ours.action_mask.shape[1], theirs.action_mask.shape[1])

    def padded(rollout: Rollout) -> tuple[Tensor, Tensor]:  # (B, width), (B, width)
        short = (0, width - rollout.action_mask.shape[1])
        return nn.functional.pad(rollout.ids[:, rollout.prompt_length :], short), nn.functional.pad(rollout.action_mask, short)

    (a, a_mask), (b, b_mask) = padded(ours), padded(theirs)
    return ((a == b) & a_mask & b_mask).sum() - (b_mask & ~a_mask).sum()
