"""The reward model on rankings: against pairs and a loop over comparisons; then whole runs on one rank and on two."""

from __future__ import annotations

import copy
import itertools
import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import column, composed, run_together
from tiny import VOCAB, config
from torch import Tensor, nn

from rlhf.algorithms.losses import comparisons, end_scores, pairwise_end_loss, pairwise_token_loss
from rlhf.config import build
from rlhf.data.collate import CollatePairs, Padding
from rlhf.engines.strategy import StepResult
from rlhf.models.factory import Blueprint
from rlhf.modules.dpo import DPO
from rlhf.modules.reward import RewardModel, every_answer
from rlhf.types import PairBatch, RankedBatch

PAD = 3
LOSSES = ("end", "tokens")
Row = tuple[list[list[int]], list[int]]
"""Texts from the best to the worst, and their ranks."""


# --- the comparisons -----------------------------------------------------------------------------------------------------------


def test_comparisons_of_full_and_short_rows_and_ties() -> None:
    ranks = torch.tensor([[0, 1, 2], [0, -1, 1], [0, 1, 1]])
    better, worse, weight = comparisons(ranks)
    # The answers there are, slot by slot: 0 1 2 (the first of each prompt), 3 4 (second, of prompts 0 and 2), 5 6 7 (third).
    assert list(zip(better.tolist(), worse.tolist(), strict=True)) == [(0, 3), (0, 5), (3, 5), (1, 6), (2, 4), (2, 7)]
    assert weight.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1, 1 / 2, 1 / 2])


@pytest.mark.parametrize("answers", [2, 3, 4, 9])
def test_k_choose_2(answers: int) -> None:
    better, worse, weight = comparisons(torch.arange(answers).expand(5, answers))
    assert len(better) == len(worse) == 5 * answers * (answers - 1) // 2 and weight.sum().item() == pytest.approx(5)


# --- the module ----------------------------------------------------------------------------------------------------------------


class Summing:
    """What a module asks of a strategy on one rank: gradients are summed up and nothing steps."""

    def backward(self, role: str, loss: Tensor) -> None:
        loss.backward()

    def step(self, *roles: str) -> dict[str, StepResult]:
        return {"reward": StepResult(0.0, 0.0, False)}

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return values


class Alone(RewardModel):
    """A reward model without a Lightning trainer."""

    @property
    def strategy(self) -> Any:
        return Summing()


def blueprint(kind: Any) -> Blueprint:
    return Blueprint(kind=kind, config=config("llama"), folder=None, lora=None, gradient_checkpointing=False, dtype=torch.float32)


@cache
def network() -> Alone:
    torch.manual_seed(3)
    module = Alone(build(composed("reward", "run_dir=x")).rm, {"reward": blueprint("scalar")})
    module.configure_model()
    return module


def learner(loss: str, prompts: int, micro: int | None = None) -> Alone:
    module = copy.deepcopy(network())
    sizes = (f"rm.loss={loss}", f"rm.batch_size={prompts}", f"rm.micro_batch_size={'null' if micro is None else micro}")
    module.rm = build(composed("reward", "run_dir=x", *sizes)).rm
    return module


def rows(*sizes: tuple[int, ...]) -> list[Row]:
    """A ranking for each tuple of ranks: texts of random tokens and lengths that begin with the same prompt."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for ranks in sizes:
        texts = torch.randint(4, VOCAB, (len(ranks), 9), generator=generator)
        texts[:, :3] = texts[0, :3]
        found.append(([text[: 4 + int(torch.randint(0, 6, (), generator=generator))].tolist() for text in texts], list(ranks)))
    return found


MIXED = rows((0, 1, 2, 3), (0, 1), (0, 0, 1), (0, 1, 1, 2), (0, 1, 2), (0, 1))
"""Rows of two to four answers, two of them with a tie."""


def batch_of(rankings: list[Row]) -> PairBatch:
    collate = CollatePairs(padding=Padding(pad_id=PAD, bucket=1, limit=9))
    return collate([{"chosen": t[0], "between": t[1:-1], "rejected": t[-1], "ranks": ranks} for t, ranks in rankings])


def as_ranked(pairs: PairBatch) -> RankedBatch:
    """Pairs in the shape of rankings with one empty slot."""
    shape = (len(pairs), 1, pairs.chosen_ids.shape[1])
    empty = {"between_ids": torch.full(shape, PAD), "between_mask": torch.zeros(shape, dtype=torch.bool)}
    return RankedBatch(**vars(pairs), **empty, ranks=torch.tensor([[0, -1, 1]]).expand(len(pairs), 3))


def gradients(module: Alone) -> list[Tensor]:
    return [parameter.grad for parameter in module.reward.parameters()]


def loop(module: Alone, rankings: list[Row]) -> tuple[Tensor, list[float]]:
    """The mean over prompts of the mean over comparisons, pair by pair; and whether each was won."""
    losses, won = [], []
    for texts, ranks in rankings:
        own = []
        for better, worse in itertools.combinations(range(len(texts)), 2):
            if ranks[better] < ranks[worse]:
                sums = module._judge(batch_of([([texts[better], texts[worse]], [0, 1])]))
                own.append(sums["loss"])
                won.append(float(sums["right"]))
        losses.append(torch.stack(own).mean())
    return torch.stack(losses).mean(), won


@pytest.mark.parametrize("loss", LOSSES)
def test_two_answers_are_a_pair_exactly(loss: str) -> None:
    """The same numbers and the same gradient, bit for bit, as the pairwise loss on the two sides; whether or not a slot is empty."""
    pairs = batch_of(rows(*[(0, 1)] * 5))
    plain = learner(loss, 5)
    values = plain.reward(torch.cat([pairs.chosen_ids, pairs.rejected_ids]), torch.cat([pairs.chosen_mask, pairs.rejected_mask]))
    better, worse = values.chunk(2)
    chosen, rejected = end_scores(better, pairs.chosen_mask), end_scores(worse, pairs.rejected_mask)
    masks = pairs.chosen_mask, pairs.rejected_mask
    each = {
        "end": lambda: pairwise_end_loss(chosen, rejected),
        "tokens": lambda: pairwise_token_loss(better, worse, pairs.chosen_ids, pairs.rejected_ids, *masks),
    }[loss]()  # (B,)
    each.sum().backward()
    for batch in (pairs, as_ranked(pairs)):
        module = learner(loss, 5)
        sums = module._judge(batch)
        sums["loss"].backward()
        assert torch.equal(sums["loss"], each.sum())
        assert sums["right"] == (chosen > rejected).sum() and sums["prompts"] == sums["pairs"] == 5
        assert sums["chosen"] == chosen.double().sum() and sums["rejected"] == rejected.double().sum()
        assert all(map(torch.equal, gradients(module), gradients(plain)))


@pytest.mark.parametrize("loss", LOSSES)
def test_four_answers_are_the_mean_of_six_pairs(loss: str) -> None:
    ranking = rows((0, 1, 2, 3))
    module = learner(loss, 1)
    expected, won = loop(module, ranking)
    sums = module._judge(batch_of(ranking))
    assert len(won) == 6 and sums["pairs"] == 6 and sums["prompts"] == 1
    assert sums["loss"].item() == pytest.approx(expected.item(), rel=1e-5) and sums["right"] == sum(won)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("micro", [None, 4, 2, 1])
def test_a_step_equals_the_loop_however_it_is_cut(loss: str, micro: int | None) -> None:
    """Rows of different K in one batch, ties among them: every prompt weighs the same in the loss, every comparison in the accuracy."""
    slow = learner(loss, len(MIXED))
    expected, won = loop(slow, MIXED)
    expected.backward()
    module = learner(loss, len(MIXED), micro)
    module.training_step(batch_of(MIXED), 0)
    assert len(won) == 6 + 1 + 2 + 5 + 3 + 1
    assert module.metrics["reward/loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert module.metrics["reward/train_eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert module.metrics["reward/train_accuracy"] == pytest.approx(sum(won) / len(won))
    for ours, theirs in zip(gradients(module), gradients(slow), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_every_answer_goes_through_the_model_once() -> None:
    class Counting(nn.Module):
        rows: list[list[int]] = []

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:  # (N, T), (N, T) -> (N, T)
            self.rows += [row[inside].tolist() for row, inside in zip(ids, mask, strict=True)]
            return ids.float() * scale

    scale = torch.ones((), requires_grad=True)
    module = Alone(learner("end", len(MIXED), 4).rm, {})
    module.reward = Counting()
    module.training_step(batch_of(MIXED), 0)
    texts = [text for ranking, _ in MIXED for text in ranking]
    assert sorted(module.reward.rows) == sorted(texts)
    assert module.tokens == {"train": sum(map(len, texts))}


def test_scores_of_the_best_and_the_worst() -> None:
    module = learner("end", len(MIXED))
    with torch.no_grad():
        sums = {name: float(value) for name, value in module.evaluate_batch(batch_of(MIXED)).items()}
        ends = [batch_of([([texts[0], texts[-1]], [0, 1])]) for texts, _ in MIXED]
        alone = [end_scores(module.reward(*every_answer(pair)[:2]), every_answer(pair)[1]) for pair in ends]
    judged = module.summarize(sums)
    assert judged["reward/chosen_score"] == pytest.approx(sum(float(x[0]) for x in alone) / len(MIXED), rel=1e-5)
    assert judged["reward/rejected_score"] == pytest.approx(sum(float(x[1]) for x in alone) / len(MIXED), rel=1e-5)


def test_dpo_takes_the_best_against_the_worst() -> None:
    torch.manual_seed(5)
    module = DPO(build(composed("dpo", "run_dir=x")).dpo, {"actor": blueprint("causal"), "ref": blueprint("causal")})
    module.configure_model()
    with torch.no_grad():
        for parameter in module.actor.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        found = module.evaluate_batch(batch_of(MIXED))
        expected = module.evaluate_batch(batch_of([([texts[0], texts[-1]], [0, 1]) for texts, _ in MIXED]))
    for name in found.keys() | expected.keys():
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


# --- whole runs ----------------------------------------------------------------------------------------------------------------

SMALL = (
    "model@reward.model=tiny", "data=ranked", "data.max_prompt_tokens=16", "data.max_answer_tokens=8", "data.split=[1,3,0]",
    "rm.batch_size=8", "rm.micro_batch_size=4", "rm.epochs=4", "rm.optimizer.lr=2e-3", "rm.scheduler.warmup=0", "callbacks=none",
)  # fmt: skip
SHORT = "rm.max_steps=6"
SETUPS: dict[str, tuple[int, tuple[str, ...]]] = {
    "micro-1": (1, ("rm.micro_batch_size=1",)),
    "stage-3": (1, ("zero@reward.zero=z3",)),
    "2-ranks": (2, ("rm.micro_batch_size=2",)),
    "2-ranks-stage-3": (2, ("rm.micro_batch_size=1", "zero@reward.zero=z3", "reward.zero.persistence_threshold=0")),
}
COMPARED = ("reward/loss", "reward/train_accuracy", "reward/grad_norm", "reward/train_chosen_score", "reward/accuracy", "reward/eval_loss")


def write_rankings(file: Path, count: int) -> Path:
    """Answers of four colours each, the better the more of them are red; two to four answers a row, and some ties."""
    rng = random.Random(0)
    others = ["blue", "green", "black", "white", "pink"]
    with file.open("w") as f:
        for i in range(count):
            ranks = [(0, 1), (0, 1, 2), (0, 1, 2, 3), (0, 1, 1, 2), (0, 0, 1)][i % 5]
            answers = [rng.sample(["red"] * (4 - rank) + [rng.choice(others) for _ in range(rank)], 4) for rank in ranks]
            prompt = rng.sample(["red", *others], 4)
            f.write(json.dumps({"prompt": " ".join(prompt), "answers": [" ".join(a) for a in answers], "ranks": ranks}) + "\n")
    return file


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("ranked")
    data = (f"data.path={write_rankings(root / 'ranked.jsonl', 160)}", f"data.cache_dir={root / 'cache'}")

    def job(name: str, world: int, *extra: str) -> dict[str, Any]:
        return composed("reward", *SMALL, *data, f"run_dir={root / name}", f"trainer.devices={world}", *extra)

    alone = [job(name, 1, SHORT, *extra) for name, (world, extra) in SETUPS.items() if world == 1]
    run_together([job("end", 1), job("tokens", 1, "rm.loss=tokens"), job("base", 1, SHORT), *alone], world=1)
    run_together([job(name, 2, SHORT, *extra) for name, (world, extra) in SETUPS.items() if world == 2], world=2)
    yield root


@pytest.mark.launch
@pytest.mark.parametrize("setup", SETUPS)
def test_every_setup_learns_the_same(runs: Path, setup: str) -> None:
    for name in COMPARED:
        expected, found = column(runs / "base", name), column(runs / setup, name)
        assert len(expected) > 1 and found == pytest.approx(expected, rel=1e-3, abs=1e-5), name


@pytest.mark.launch
@pytest.mark.parametrize("name", LOSSES)
def test_the_reward_model_learns_the_order(runs: Path, name: str) -> None:
    done = json.loads((runs / name / "summary.json").read_text())
    metrics = done["metrics"]
    assert done["status"] == "done"
    assert metrics["reward/accuracy_before"] < 0.75 and metrics["reward/accuracy"] > 0.95
    assert metrics["reward/eval_loss"] < metrics["reward/eval_loss_before"]
    assert metrics["reward/chosen_score"] > metrics["reward/rejected_score"]
