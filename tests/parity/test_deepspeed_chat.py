"""The numbers that DeepSpeed-Chat's own functions returned for recorded inputs, reproduced to 1e-6 by `ppo=dschat`.

Source: DeepSpeedExamples 45b4b715 (dschat/rlhf/ppo_trainer.py, dschat/utils/model/reward_model.py) on torch 2.13, CPU, fp32.

The module itself computes them, with the preset's values and networks that answer what was recorded. Two masks tell an answer in the
original. What it trains on are the tokens that are not padding: where the padding is the end-of-turn token, that drops the end itself.
The score, however, is put on that end, and GAE runs through it.
"""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jobs import composed
from torch import Tensor, nn

from rlhf.algorithms.advantages import shape_rewards
from rlhf.algorithms.kl import kl_estimate
from rlhf.algorithms.logprobs import token_logprobs
from rlhf.algorithms.losses import end_scores
from rlhf.config import build
from rlhf.modules.ppo import PPO
from rlhf.modules.reward import RewardModel
from rlhf.rules import check
from rlhf.types import PairBatch, Rollout

RECORDED = json.loads((Path(__file__).parent / "deepspeed_chat.json").read_text())
CONSTANTS = RECORDED["ppo"]["constants"]


@cache
def preset() -> Any:
    """The composed settings of a whole run under DeepSpeed-Chat's presets."""
    cfg = build(composed("pipeline", "run_dir=x", "ppo=dschat", "rm=dschat"))
    check(cfg)
    return cfg


def test_the_preset_has_the_constants() -> None:
    assert {name: getattr(preset().ppo, name) for name in CONSTANTS} == CONSTANTS


def close(ours: Tensor, recorded: Any) -> None:
    torch.testing.assert_close(ours.float(), torch.tensor(recorded), atol=1e-6, rtol=1e-6)


class Answers(nn.Module):
    """A network that gives recorded outputs, one after the other, the last one again and again."""

    def __init__(self, *outputs: Tensor) -> None:
        super().__init__()
        self.outputs = list(outputs)

    def forward(self, ids: Tensor, mask: Tensor, last: int = 0) -> Tensor:
        output = self.outputs.pop(0) if len(self.outputs) > 1 else self.outputs[0]
        return output[:, output.shape[1] - last :] if last else output


class Alone(PPO):
    """PPO on one rank that keeps losses instead of learning from them, and the rewards on the way."""

    def __init__(self) -> None:
        # Micro-batches of the whole batch, whatever size a case has.
        sizes = {"minibatch_size": 1, "batch_size": 1}
        super().__init__(dataclasses.replace(preset().ppo, **sizes), {}, temperature=preset().rollout.temperature, seed=0)
        self.losses: dict[str, Tensor] = {}

    @property
    def strategy(self) -> Any:
        return SimpleNamespace(
            world_size=1, sum_over_ranks=lambda x: x, max_over_ranks=lambda x: x, backward=self.losses.__setitem__, step=lambda *_: {}
        )

    def _rewards(self, *args: Any) -> Tensor:
        self.rewards = super()._rewards(*args)
        return self.rewards


class Case:
    """One recorded PPO batch, run through the module. N = P + A - 1 positions predict a token, and the answer starts at P - 1."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.expected = case["expected"]
        sequences = torch.tensor(case["sequences"])  # (B, P + A)
        tokens = sequences != case["pad_id"]
        assert tokens.int().tolist() == case["attention_mask"]
        prompt = case["prompt_length"]
        self.start = prompt - 1
        # What the rollout knows as the end of turn is the first padding behind the answer, as the original has one token for both.
        lengths = tokens[:, prompt:].sum(dim=1)
        ended = lengths < sequences.shape[1] - prompt
        action_mask = torch.arange(sequences.shape[1] - prompt) < (lengths + ended.long())[:, None]  # (B, A)
        mask = torch.cat([tokens[:, :prompt], action_mask], dim=1)
        rollout = Rollout(ids=sequences, mask=mask, action_mask=action_mask, ended=ended)

        tensors = {name: torch.tensor(case[name]) for name in ("logits", "ref_logits", "old_logits", "values", "old_values", "score")}
        self.tensors, self.sequences = tensors, sequences
        whole = {name: nn.functional.pad(tensors[name], (0, 1)) for name in ("values", "old_values")}  # (B, P + A)
        # The reward model reads the last token that is no padding: it says the recorded score there, and something else elsewhere.
        scores = torch.full(sequences.shape, 99.0)
        scores[torch.arange(len(sequences)), prompt + lengths - 1] = tensors["score"]

        self.module = Alone()
        self.module.actor = Answers(tensors["old_logits"], tensors["logits"])
        self.module.ref = Answers(tensors["ref_logits"])
        self.module.critic = Answers(whole["old_values"], whole["values"])
        self.module.reward = Answers(scores)
        self.experience, _ = self.module.score(rollout)
        self.rewarded = self.module._masks(rollout).rewarded
        self.module._minibatch(self.experience, {})

    def recorded(self, name: str) -> Any:
        """The answer's part of a recorded (B, N)."""
        return [row[self.start :] for row in self.expected[name]]


@pytest.fixture(params=RECORDED["ppo"]["cases"], ids=lambda case: f"{len(case['sequences'])}x{len(case['sequences'][0])}")
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_logprobs(case: Case) -> None:
    for ours, logits in (("logprobs", "logits"), ("old_logprobs", "old_logits"), ("ref_logprobs", "ref_logits")):
        close(token_logprobs(case.tensors[logits][:, :-1], case.sequences[:, 1:]), case.expected[ours])
    old = torch.tensor(case.recorded("old_logprobs"))
    close(case.experience.logprobs, old.where(case.rewarded, 0).tolist())


def test_shaped_rewards(case: Case) -> None:
    close(case.module.rewards, case.recorded("shaped_rewards_tail_zeroed"))
    # Before it cuts the tail, the original has the penalty everywhere and the score at the end.
    kl = kl_estimate(*(torch.tensor(case.recorded(name)) for name in ("old_logprobs", "ref_logprobs")), "k1")
    score_alone = shape_rewards(case.tensors["score"].clamp(-5, 5), torch.zeros_like(kl), case.rewarded, kl_coef=0.0)
    close(score_alone - CONSTANTS["kl_coef"] * kl, case.recorded("shaped_rewards"))


def test_advantages_and_returns(case: Case) -> None:
    close(case.experience.advantages, case.expected["advantages"])
    close(case.experience.returns, case.expected["returns"])


def test_policy_loss(case: Case) -> None:
    close(case.module.losses["actor"].detach(), case.expected["policy_loss"])


def test_value_loss(case: Case) -> None:
    close(case.module.losses["critic"].detach(), case.expected["value_loss"])


def mask_to_first_padding(ids: Tensor, pad_id: int, skipped: int) -> Tensor:
    """(B, T) bool: tokens before the padding, of which the first `skipped` belong to the text (OPT begins every text with its
    padding token)."""
    return ((ids == pad_id).cumsum(dim=1) - skipped) <= 0


@pytest.mark.parametrize("pair", RECORDED["reward"], ids=lambda pair: f"pads_at_beginning={pair['num_padding_at_beginning']}")
def test_reward_model(pair: dict[str, Any]) -> None:
    ids = {name: torch.tensor(pair[name]) for name in ("chosen", "rejected")}
    scores = [torch.tensor(pair[f"{name}_token_scores"]) for name in ids]
    masks = [mask_to_first_padding(x, pair["pad_id"], pair["num_padding_at_beginning"]) for x in ids.values()]
    for name, values, mask in zip(ids, scores, masks, strict=True):
        close(end_scores(values, mask), pair["expected"][f"{name}_end_scores"])
    module = RewardModel(preset().rm, {})
    module.reward = Answers(torch.cat(scores))
    sums = module._judge(
        PairBatch(chosen_ids=ids["chosen"], chosen_mask=masks[0], rejected_ids=ids["rejected"], rejected_mask=masks[1])
    )  # fmt: skip
    close(sums["loss"] / sums["pairs"], pair["expected"]["loss"])
