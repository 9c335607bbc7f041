"""The numbers that DeepSpeed-Chat's own functions returned for recorded inputs, reproduced to 1e-6.

Source: DeepSpeedExamples 45b4b715 (dschat/rlhf/ppo_trainer.py, dschat/utils/model/reward_model.py) on torch 2.13, CPU, fp32.

Two masks tell an answer in the original. What it trains on are the tokens that are not padding: where the padding is the end-of-turn
token, that drops the end itself. The score, however, is put on that end, and GAE runs through it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.algorithms.advantages import gae, shape_rewards
from rlhf.algorithms.kl import kl_estimate
from rlhf.algorithms.logprobs import token_logprobs
from rlhf.algorithms.losses import end_scores, pairwise_token_loss, policy_loss, value_loss
from rlhf.algorithms.masked import masked_mean

RECORDED = json.loads((Path(__file__).parent / "deepspeed_chat.json").read_text())
CONSTANTS = RECORDED["ppo"]["constants"]
NO_CLAMP = 80.0  # the original has none; exp(80) is still finite in fp32


def close(ours: Tensor, recorded: Any) -> None:
    torch.testing.assert_close(ours, torch.tensor(recorded), atol=1e-6, rtol=1e-6)


class Case:
    """One recorded PPO batch, with everything the functions are given. N = P + A - 1 positions predict a token."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.expected = case["expected"]
        self.sequences = torch.tensor(case["sequences"])  # (B, P + A)
        self.attention_mask = self.sequences != case["pad_id"]
        assert self.attention_mask.int().tolist() == case["attention_mask"]
        self.start = case["prompt_length"] - 1  # the position that predicts the first answer token
        self.train_mask = self.attention_mask[:, 1:]  # (B, N)
        # Up to and including the first position after the answer's last token that counts: the end-of-turn token's.
        ends = self.start + self.train_mask[:, self.start :].sum(dim=1) + 1
        self.until_end = torch.arange(self.train_mask.shape[1]) < ends[:, None]  # (B, N)
        self.score = torch.tensor(case["score"]).clamp(-CONSTANTS["reward_clip"], CONSTANTS["reward_clip"])  # (B,)
        self.values, self.old_values = torch.tensor(case["values"]), torch.tensor(case["old_values"])  # (B, N)
        self.logprobs, self.ref_logprobs, self.old_logprobs = (
            token_logprobs(torch.tensor(case[name])[:, :-1], self.sequences[:, 1:]) for name in ("logits", "ref_logits", "old_logits")
        )

    def answer(self, x: Tensor) -> Tensor:
        return x[:, self.start :]  # (B, A)

    def rewards(self) -> Tensor:
        """(B, N), also on the prompt, where the original computes and ignores them."""
        kl = kl_estimate(self.old_logprobs, self.ref_logprobs, "k1")
        return shape_rewards(self.score, kl, self.until_end, kl_coef=CONSTANTS["kl_coef"])

    def advantages(self) -> tuple[Tensor, Tensor]:
        rewards, values, mask = map(self.answer, (self.rewards(), self.old_values, self.until_end))
        return gae(rewards, values, mask, gamma=CONSTANTS["gamma"], gae_lambda=CONSTANTS["gae_lambda"])


@pytest.fixture(params=RECORDED["ppo"]["cases"], ids=lambda case: f"{len(case['sequences'])}x{len(case['sequences'][0])}")
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_logprobs(case: Case) -> None:
    close(case.logprobs, case.expected["logprobs"])
    close(case.old_logprobs, case.expected["old_logprobs"])
    close(case.ref_logprobs, case.expected["ref_logprobs"])


def test_shaped_rewards(case: Case) -> None:
    close(case.rewards(), case.expected["shaped_rewards_tail_zeroed"])
    # Before it cuts the tail, the original has the penalty everywhere and the score at the end.
    kl = kl_estimate(case.old_logprobs, case.ref_logprobs, "k1")
    score_alone = shape_rewards(case.score, torch.zeros_like(kl), case.until_end, kl_coef=0.0)
    close(score_alone - CONSTANTS["kl_coef"] * kl, case.expected["shaped_rewards"])


def test_advantages_and_returns(case: Case) -> None:
    advantages, returns = case.advantages()
    close(advantages, case.expected["advantages"])
    close(returns, case.expected["returns"])


def test_policy_loss(case: Case) -> None:
    mask, advantages = case.answer(case.train_mask), case.advantages()[0]
    got = policy_loss(
        case.answer(case.logprobs), case.answer(case.old_logprobs), advantages, mask,
        clip_range=CONSTANTS["clip_range"], log_ratio_clamp=NO_CLAMP,
    )  # fmt: skip
    close(masked_mean(got.loss, mask), case.expected["policy_loss"])


def test_value_loss(case: Case) -> None:
    mask, returns = case.answer(case.train_mask), case.advantages()[1]
    old_values = torch.where(case.until_end, case.old_values, 0)
    got = value_loss(
        case.answer(case.values), case.answer(old_values), returns, mask, value_clip_range=CONSTANTS["value_clip_range"]
    )  # fmt: skip
    close(masked_mean(got.loss, mask), case.expected["value_loss"])


def mask_to_first_padding(ids: Tensor, pad_id: int, skipped: int) -> Tensor:
    """(B, T) bool: tokens before the padding, of which the first `skipped` belong to the text (OPT begins every text with its
    padding token)."""
    return ((ids == pad_id).cumsum(dim=1) - skipped) <= 0


@pytest.mark.parametrize("pair", RECORDED["reward"], ids=lambda pair: f"pads_at_beginning={pair['num_padding_at_beginning']}")
def test_reward_model(pair: dict[str, Any]) -> None:
    chosen_ids, rejected_ids = torch.tensor(pair["chosen"]), torch.tensor(pair["rejected"])
    chosen, rejected = torch.tensor(pair["chosen_token_scores"]), torch.tensor(pair["rejected_token_scores"])
    masks = [mask_to_first_padding(ids, pair["pad_id"], pair["num_padding_at_beginning"]) for ids in (chosen_ids, rejected_ids)]
    close(pairwise_token_loss(chosen, rejected, chosen_ids, rejected_ids, *masks).mean(), pair["expected"]["loss"])
    close(end_scores(chosen, masks[0]), pair["expected"]["chosen_end_scores"])
    close(end_scores(rejected, masks[1]), pair["expected"]["rejected_end_scores"])
