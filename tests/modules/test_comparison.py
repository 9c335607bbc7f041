"""What the comparison records of a batch, with networks that answer by a rule: no training, no engine."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.config import UserError
from rlhf.models.factory import Blueprint
from rlhf.modules.comparison import Comparison, gold_scores
from rlhf.modules.measures import Answer, JudgedPrompt, ReadText, Records, interleaved
from rlhf.types import PairBatch, PromptBatch, RankedBatch, Rollout, TextBatch

VOCAB, END, PAD = 8, 1, 0
BY_RULE: Any = None
"""A blueprint of no network: the tests put one in its place."""


class Sharp:
    """A policy that gives each token t the probability share[t], whatever came before."""

    def __init__(self, *shares: float) -> None:
        self.logits = torch.tensor(shares).log()

    def __call__(self, ids: Tensor, mask: Tensor, last: int | None = None) -> Tensor:
        return self.logits.expand(len(ids), ids.shape[1] if last is None else last, -1)


class Engine:
    """Answers every prompt with its first token and the end of turn; the policy before says it twice."""

    def generate(self, role: str, prompts: PromptBatch, *, samples: int) -> Rollout:
        first = prompts.ids[:, :1].repeat(samples, 1)
        answers = torch.cat([first, first if role == "ref" else torch.full_like(first, END), torch.full_like(first, PAD)], dim=1)
        action_mask = torch.tensor([[True, True, False]]).expand(len(answers), 3)
        ids = torch.cat([prompts.ids.repeat(samples, 1), answers], dim=1)
        mask = torch.cat([prompts.mask.repeat(samples, 1), action_mask], dim=1)
        return Rollout(ids=ids, mask=mask, action_mask=action_mask, ended=torch.tensor([role != "ref"] * len(answers)))


class Alone(Comparison):
    """On one rank, without a trainer."""

    @property
    def strategy(self) -> Any:
        return self

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]

    def together(self) -> AbstractContextManager[None]:
        return nullcontext()


def comparison(networks: dict[str, Any], **more: Any) -> Alone:
    """`networks` by role."""
    options: dict[str, Any] = {
        "names": ["before", "after"], "gold": None, "samples": 1, "seed": 0, "parts": ["prompts"], "judges": ("reward", "gold"),
        "decode": lambda ids: [" ".join(str(token) for token in row if token) for row in ids.tolist()],
    }  # fmt: skip
    blueprints: dict[str, Blueprint] = dict.fromkeys(networks, BY_RULE)
    module = Alone(blueprints, **{**options, **more})
    for role, network in networks.items():
        setattr(module, role, network)
    module.engine = Engine()
    return module


def sum_of_ids(ids: Tensor, mask: Tensor) -> Tensor:
    """A reward model: the running sum of the tokens, (B, T)."""
    return torch.where(mask, ids, 0).cumsum(dim=1).float()


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    return ids, torch.tensor([[i < len(row) for i in range(width)] for row in rows])


# --- pairs -----------------------------------------------------------------------------------------------------------------------


def test_a_pair_has_one_margin_and_its_source() -> None:
    module = comparison({"reward": sum_of_ids}, parts=["pairs"])
    (chosen, chosen_mask), (rejected, rejected_mask) = padded([[5, 1], [2]]), padded([[2, 1], [3]])
    batch = PairBatch(chosen_ids=chosen, chosen_mask=chosen_mask, rejected_ids=rejected, rejected_mask=rejected_mask)
    module.validation_step((batch, ["web", "books"]), 0)
    assert module.records.judged == [JudgedPrompt(source="web", margins=[3.0]), JudgedPrompt(source="books", margins=[-1.0])]


def test_the_comparisons_of_a_ranking_stay_with_their_prompt() -> None:
    """Row 0: scores 7, 5, 5, 1 with ranks 0, 1, 1, 2: margins 2, 2, 6 of the best and 4, 4 of the tied ones. Row 1: 3 against 6."""
    module = comparison({"reward": sum_of_ids}, parts=["pairs"])
    one = torch.ones(2, 1, dtype=torch.bool)
    batch = RankedBatch(
        chosen_ids=torch.tensor([[7], [3]]), chosen_mask=one, rejected_ids=torch.tensor([[1], [6]]), rejected_mask=one,
        between_ids=torch.tensor([[[5], [5]], [[PAD], [PAD]]]), between_mask=torch.tensor([[[True], [True]], [[False], [False]]]),
        ranks=torch.tensor([[0, 1, 1, 2], [0, -1, -1, 1]]),
    )  # fmt: skip
    module.validation_step((batch, ["web", "books"]), 0)
    first, second = module.records.judged
    assert sorted(first.margins) == [2.0, 2.0, 4.0, 4.0, 6.0] and (second.source, second.margins) == ("books", [-3.0])


# --- texts and answers -----------------------------------------------------------------------------------------------------------


EVEN = (0.125,) * VOCAB
FOUR = (0.0625, 0.0625, 0.0625, 0.0625, 0.5, 0.0625, 0.0625, 0.125)


def test_each_policy_reads_the_tokens_to_predict_alone() -> None:
    module = comparison({"ref": Sharp(*EVEN), "actor": Sharp(*FOUR)}, parts=["texts"])
    ids, mask = padded([[5, 4, 4, 6], [5, 6]])
    module.validation_step(TextBatch(ids=ids, mask=mask, loss_mask=mask & (torch.arange(4) >= 2)), 0)
    first, second = module.records.texts
    log2 = pytest.approx(0.6931472)
    assert (first.tokens, first.nll["before"] / 6, first.nll["after"] / 5) == (2, log2, log2), "two of 1/8; 1/2 and 1/16"
    assert (second.tokens, second.nll) == (0, {"before": 0.0, "after": 0.0})


def prompts() -> PromptBatch:
    ids, mask = padded([[4, 5], [5, 5]])
    return PromptBatch(ids=ids, mask=mask, index=torch.arange(2), texts=["four", "five"])


def test_answers_are_recorded_with_their_numbers() -> None:
    """Under the policy after, tokens 4 and 5 have probability 1/2 and 1/16 and the end 1/16; under the one before all have 1/8."""
    networks = {"ref": Sharp(*EVEN), "actor": Sharp(*FOUR), "base": Sharp(*FOUR), "reward": sum_of_ids}
    module = comparison(networks, samples=2, gold=lambda prompts, answers, ended: [float(end) for end in ended])
    module.validation_step(prompts(), 0)
    before, after = module.records.answers["before"], module.records.answers["after"]
    assert [(a.prompt, a.sample, a.tokens, a.text) for a in after] == [
        ("four", 0, [4, END], "4 1"), ("five", 0, [5, END], "5 1"), ("four", 1, [4, END], "4 1"), ("five", 1, [5, END], "5 1"),
    ]  # fmt: skip
    log2 = 0.6931472
    assert after[0].numbers == pytest.approx(
        {"length": 2, "ended": 1, "reward": 14, "gold": 1, "ref_nll": 6 * log2, "kl": log2, "kl_k3": (1 / 4 - 1 + 2 * log2) + (2 - 1 - log2),
         "kl_base": 0, "kl_base_k3": 0}, abs=1e-5,
    )  # fmt: skip
    assert before[1].numbers == pytest.approx(
        {"length": 2, "ended": 0, "reward": 20, "gold": 0, "ref_nll": 6 * log2, "kl_base": 2 * log2, "kl_base_k3": 2 * (0.5 - 1 + log2)},
        abs=1e-5,
    )
    found = module.results()
    assert (found["kl"], found["win_rate/reward"], found["win_rate/gold"]) == (pytest.approx(-log2 / 2), 0.0, 1.0), "log 2 and -2 log 2"
    assert found["difference/reward"] == -3.5, "14 against 17 and 16 against 20"


def test_fixed_prompts_are_answered_once_and_counted_nowhere() -> None:
    module = comparison(
        {"actor": Sharp(*EVEN)}, parts=["prompts", "fixed prompts"], samples=3, gold=lambda prompts, answers, ended: [0.0] * len(answers)
    )
    module.validation_step(prompts(), 0, 0)
    module.validation_step(prompts(), 0, 1)
    assert len(module.records.answers["after"]) == 6 and len(module.fixed.answers["after"]) == 2
    assert "gold" in module.records.answers["after"][0].numbers and "gold" not in module.fixed.answers["after"][0].numbers
    assert module.results()["evaluated/answers"] == 6


def test_the_random_stream_of_the_caller_is_left_alone() -> None:
    module = comparison({"actor": Sharp(*EVEN)})
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    module.validation_step(prompts(), 0)
    assert torch.equal(torch.rand(1), expected)


# --- scorers and ranks -----------------------------------------------------------------------------------------------------------


def scored(returned: Any) -> list[float]:
    return gold_scores(lambda prompts, answers, ended: returned, ["why?", "how?"], ["a", "b"], [True, True])


def refusal(returned: Any) -> str:
    with pytest.raises(UserError) as caught:
        scored(returned)
    return str(caught.value)


def test_a_scorer_must_return_a_finite_number_for_each_answer() -> None:
    assert scored(torch.tensor([1, 2])) == [1.0, 2.0]
    assert refusal([1.0]) == "evaluation.gold returned 1 scores for 2 answers: it must return one number for each"
    assert (
        refusal([1.0, float("nan")]) == "evaluation.gold returned nan for the prompt 'how?' and the answer 'b': it must be a finite number"
    )
    assert refusal(7).startswith("evaluation.gold raised TypeError")


def test_records_of_ranks_come_back_in_the_order_of_one() -> None:
    def part(*rows: int) -> Records:
        return Records(
            answers={"a": [Answer(prompt=str(row), sample=0, text="", tokens=[], numbers={}) for row in rows]},
            judged=[JudgedPrompt(source=str(row), margins=[]) for row in rows],
            texts=[ReadText(tokens=row, nll={}) for row in rows],
        )

    assert interleaved([part(0, 2, 4), part(1, 3, 5)]) == part(0, 1, 2, 3, 4, 5)
    assert interleaved([part(0, 1)]) == part(0, 1)
