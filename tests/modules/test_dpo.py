"""DPO: the module against a loop over pairs; then whole runs on one rank and on two, what they refuse, and a resume."""

from __future__ import annotations

import copy
import csv
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import column, composed, run_together
from safetensors.torch import load_file
from tiny import VOCAB, config
from torch import Tensor

from rlhf.cli.assemble import Job
from rlhf.cli.train import dpo as train_dpo
from rlhf.config import UserError, build
from rlhf.engines.strategy import StepResult
from rlhf.models.factory import Blueprint
from rlhf.modules.dpo import DPO
from rlhf.rules import check
from rlhf.types import PairBatch

TESTS = Path(__file__).parents[1]
PAIRS, WIDTH = 6, 9
LOSSES = {
    "sigmoid": ("dpo.loss=sigmoid", "dpo.beta=0.3"),
    "smoothed": ("dpo.loss=sigmoid", "dpo.beta=0.3", "dpo.label_smoothing=0.2"),
    "ipo": ("dpo.loss=ipo", "dpo.beta=0.3"),
}


# --- the module ----------------------------------------------------------------------------------------------------------------


class Summing:
    """What a module asks of a strategy on one rank: gradients are summed up and nothing steps."""

    def backward(self, role: str, loss: Tensor) -> None:
        assert role == "actor"
        loss.backward()

    def step(self, *roles: str) -> dict[str, StepResult]:
        assert roles == ("actor",)
        return {"actor": StepResult(0.0, 0.0, False)}

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return values


class Alone(DPO):
    """DPO without a Lightning trainer."""

    @property
    def strategy(self) -> Any:
        return Summing()

    @property
    def global_rank(self) -> int:
        return 0


@cache
def networks() -> Alone:
    """An actor that has moved away from ref."""
    torch.manual_seed(3)
    blueprint = Blueprint(kind="causal", config=config("llama"), folder=None, lora=None, gradient_checkpointing=False, dtype=torch.float32)
    settings = build(composed("dpo", "run_dir=x")).dpo
    module = Alone(settings, {"actor": blueprint, "ref": blueprint})
    module.configure_model()
    assert all(torch.equal(a, r) for a, r in zip(module.actor.parameters(), module.ref.parameters(), strict=True))
    with torch.no_grad():
        for parameter in module.actor.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return module


def learner(loss: str, micro: int | None = None) -> Alone:
    module = copy.deepcopy(networks())
    sizes = (f"dpo.batch_size={PAIRS}", f"dpo.micro_batch_size={'null' if micro is None else micro}")
    module.dpo = build(composed("dpo", "run_dir=x", *LOSSES[loss], *sizes)).dpo
    return module


def texts() -> list[tuple[list[int], list[int]]]:
    """Pairs with prompts and answers of all lengths; the second begins with its first token already, the third is a prefix."""
    generator = torch.Generator().manual_seed(1)
    pairs = []
    for i in range(PAIRS):
        ids = torch.randint(4, VOCAB, (2, WIDTH), generator=generator).tolist()
        shared = ids[0][: i % 4]
        pairs.append(((shared + ids[0])[: WIDTH - i % 3], (shared + ids[1])[: 4 + i]))
    pairs[2] = (pairs[2][0], pairs[2][0][:4])
    return pairs


def pair_batch(pairs: list[tuple[list[int], list[int]]]) -> PairBatch:
    sides = []
    for rows in zip(*pairs, strict=True):
        sides.append(torch.tensor([[*row, *[3] * (WIDTH - len(row))] for row in rows]))
        sides.append(torch.tensor([[t < len(row) for t in range(WIDTH)] for row in rows]))
    return PairBatch(chosen_ids=sides[0], chosen_mask=sides[1], rejected_ids=sides[2], rejected_mask=sides[3])


def slow_logprobs(network: Any, text: list[int], other: list[int]) -> list[Tensor]:
    """Of each answer token of one text, alone and without padding."""
    shared = next((t for t, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    ids = torch.tensor([text])
    logits = network(ids, torch.ones_like(ids).bool())[0].double()  # (T, V)
    return [logits[t - 1].log_softmax(-1)[text[t]] for t in range(max(shared, 1), len(text))]


def slow_step(module: Alone, pairs: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """Means over the pairs, pair by pair and token by token."""
    totals: dict[str, Any] = dict.fromkeys(("loss", "margin", "accuracy", "chosen_logprob", "rejected_logprob"), 0.0)
    drifts = []
    settings = module.dpo
    for pair in pairs:
        ratios, sums = [], []
        for text, other in (pair, pair[::-1]):
            ours = slow_logprobs(module.actor, text, other)
            theirs = [x.detach() for x in slow_logprobs(module.ref, text, other)]
            drifts += [0.5 * float(a - b) ** 2 for a, b in zip(ours, theirs, strict=True)]
            count = max(1, len(ours)) if settings.loss == "ipo" else 1
            ratios.append(sum((a - b for a, b in zip(ours, theirs, strict=True)), torch.zeros((), dtype=torch.float64)) / count)
            sums.append(float(sum(ours)))
        h = ratios[0] - ratios[1]
        if settings.loss == "ipo":
            loss = (h - 1 / (2 * settings.beta)) ** 2
        else:
            right = 1 / (1 + torch.exp(-settings.beta * h))
            loss = -(1 - settings.label_smoothing) * right.log() - settings.label_smoothing * (1 - right).log()
        found = {"loss": loss, "margin": settings.beta * h, "accuracy": float(h > 0)}
        found |= {"chosen_logprob": sums[0], "rejected_logprob": sums[1]}
        totals = {name: totals[name] + found[name] / len(pairs) for name in totals}
    return totals | {"drift": torch.tensor(sum(drifts) / len(drifts))}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_equals_a_loop_over_pairs(loss: str) -> None:
    """Loss, metrics and gradient; the batch is padded, and its logits are cut to the columns of the answers."""
    pairs = texts()
    slow = learner(loss)
    expected = slow_step(slow, pairs)
    expected["loss"].backward()
    for micro in (None, 2, 1):
        module = learner(loss, micro)
        module.training_step(pair_batch(pairs), 0)
        assert module.metrics["dpo/loss"] == pytest.approx(float(expected["loss"]), rel=1e-4)
        for name in ("margin", "accuracy", "chosen_logprob", "rejected_logprob", "drift"):
            assert module.metrics[f"dpo/train_{name}"] == pytest.approx(float(expected[name]), rel=1e-4, abs=1e-5), name
        for ours, theirs in zip(module.actor.parameters(), slow.actor.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
        assert all(parameter.grad is None for parameter in module.ref.parameters())
    assert expected["drift"] > 0.01, "actor and ref differ"


@pytest.mark.parametrize(("loss", "value"), [("sigmoid", math.log(2)), ("smoothed", math.log(2)), ("ipo", 1 / (4 * 0.3**2))])
def test_an_actor_that_equals_ref_has_no_margin(loss: str, value: float) -> None:
    module = learner(loss)
    module.actor.load_state_dict(module.ref.state_dict())
    with torch.no_grad():
        sums = module.evaluate_batch(pair_batch(texts()))
    judged = module.summarize({name: float(x) for name, x in sums.items()})
    assert judged["dpo/eval_loss"] == pytest.approx(value)
    assert (judged["dpo/margin"], judged["dpo/accuracy"], judged["dpo/drift"]) == (0.0, 0.5, 0.0)
    assert judged["dpo/chosen_logprob"] < 0


def test_a_pair_without_an_answer_token_teaches_nothing() -> None:
    """Two equal texts, and two texts of one token: no logit is read, and the step goes on."""
    module = learner("sigmoid")
    module.training_step(pair_batch([([5, 6], [5, 6]), ([7], [8])] * 3), 0)
    assert module.metrics["dpo/loss"] == pytest.approx(math.log(2)) and module.metrics["dpo/train_drift"] == 0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in module.actor.parameters())


# --- whole runs ----------------------------------------------------------------------------------------------------------------

SMALL = (
    "model@actor.model=tiny", "data=pairs", "data.max_prompt_tokens=12", "data.max_answer_tokens=8", "data.split=[1,2,1]", "dpo.batch_size=8",
    "dpo.micro_batch_size=4", "dpo.epochs=3", "dpo.optimizer.lr=2e-3", "dpo.scheduler.warmup=0", "callbacks=none",
)  # fmt: skip
Z3 = ("zero@actor.zero=z3", "zero@ref.zero=z3")
SETUPS: dict[str, tuple[int, tuple[str, ...]]] = {
    "micro 8": (1, ("dpo.micro_batch_size=null",)),
    "stage 2": (1, ("zero@actor.zero=z2",)),
    "stage 3": (1, Z3),
    "2 ranks": (2, ("dpo.micro_batch_size=2",)),
    "2 ranks, stage 3": (2, (*Z3, "dpo.micro_batch_size=1", "actor.zero.persistence_threshold=0")),
}
VARIANTS: dict[str, tuple[str, ...]] = {"ipo": ("dpo.loss=ipo",), "lora": ("lora@actor.lora=r8", "actor.lora.lr=2e-2")}
COMPARED = (
    "dpo/loss", "dpo/train_margin", "dpo/train_accuracy", "dpo/train_chosen_logprob", "dpo/train_drift", "actor/grad_norm", "dpo/accuracy",
)  # fmt: skip


RESUMED = ("dpo.max_steps=5", "actor.dropout=0.1", "trainer.checkpoint_every=2", "+callbacks.kill._target_=crash.KillRank")


def write_plain_pairs(file: Path, rows: int) -> Path:
    """Prompts of three colours. Good answers name birds, bad ones fish: what is preferred can be learned from few pairs."""
    rng = random.Random(0)
    colours, birds, fish = ["red", "blue", "green", "black", "white"], ["owl", "crow", "duck", "wren"], ["cod", "tuna", "carp", "eel"]
    with file.open("w") as f:
        for _ in range(rows):
            row = {"prompt": rng.sample(colours, 3), "chosen": rng.sample(birds, 2), "rejected": rng.sample(fish, 3)}
            f.write(json.dumps({name: " ".join(words) for name, words in row.items()}) + "\n")
    return file


def folder(root: Path, name: str) -> Path:
    return root / name.replace(", ", "-").replace(" ", "-")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One launch for each number of ranks: SFT, then every setup from its export."""
    root = tmp_path_factory.mktemp("dpo")
    data = (f"data.path={write_plain_pairs(root / 'pairs.jsonl', 96)}", f"data.cache_dir={root / 'cache'}")

    def job(name: str, world: int, *extra: str) -> dict[str, Any]:
        start = (f"actor.init={root / 'sft'}", f"run_dir={folder(root, name)}", f"trainer.devices={world}")
        return composed("dpo", *SMALL, *data, *start, *extra)

    shared = [override for override in SMALL if not override.startswith("dpo.")]
    sft = composed("sft", *shared, *data, f"run_dir={root / 'sft'}", "sft.max_steps=20", "sft.batch_size=8")
    alone = [job(name, 1, *extra) for name, (world, extra) in SETUPS.items() if world == 1]
    others = [job(name, 1, *extra) for name, extra in (*VARIANTS.items(), ("whole", RESUMED))]
    run_together([sft, job("base", 1), *alone, *others], world=1)
    run_together([job(name, 2, *extra) for name, (world, extra) in SETUPS.items() if world == 2], world=2)
    yield root


def summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


@pytest.mark.launch
@pytest.mark.parametrize("setup", SETUPS)
def test_every_setup_learns_the_same(runs: Path, setup: str) -> None:
    for name in COMPARED:
        expected, found = column(runs / "base", name), column(folder(runs, setup), name)
        assert len(expected) > 1 and found == pytest.approx(expected, rel=1e-3, abs=1e-5), name


@pytest.mark.launch
@pytest.mark.parametrize("name", ["base", *VARIANTS])
def test_the_actor_learns_to_tell_the_answers_apart(runs: Path, name: str) -> None:
    done = summary(runs / name)
    metrics = done["metrics"]
    assert done["status"] == "done" and done["verb"] == "dpo"
    assert (metrics["dpo/accuracy_before"], metrics["dpo/margin_before"], metrics["dpo/drift_before"]) == (0.5, 0.0, 0.0)
    assert metrics["dpo/accuracy"] > 0.9 and metrics["dpo/margin"] > 0 and metrics["dpo/drift"] > 0
    assert metrics["dpo/eval_loss"] < metrics["dpo/eval_loss_before"]
    losses = column(runs / name, "dpo/loss")
    assert losses[-1] < losses[0]


@pytest.mark.launch
def test_only_the_actor_is_exported(runs: Path) -> None:
    exports = runs / "base" / "export"
    assert [path.name for path in exports.iterdir()] == ["actor"]
    after, before = (load_file(path / "export" / "actor" / "model.safetensors") for path in (runs / "base", runs / "sft"))
    assert after.keys() == before.keys() and any(not torch.equal(after[name], before[name]) for name in after)


def rows(run_dir: Path) -> list[dict[str, str]]:
    """metrics.csv without what a clock measured."""
    with (run_dir / "metrics.csv").open(newline="") as f:
        return [{k: v for k, v in row.items() if not k.startswith("time/") and not k.endswith("per_s")} for row in csv.DictReader(f)]


@pytest.mark.launch
def test_killed_and_resumed_equals_uninterrupted(runs: Path, tmp_path: Path) -> None:
    """With dropout, so that the random state counts; ref is read again from where it came."""
    data = (f"data.path={runs / 'pairs.jsonl'}", f"data.cache_dir={runs / 'cache'}", f"actor.init={runs / 'sft'}")
    killed = tmp_path / "killed"

    def dpo(*overrides: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "rlhf", "dpo", f"run_dir={killed}", *overrides]
        environment = os.environ | {"PYTHONPATH": str(TESTS)} | variables
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)

    assert dpo(*SMALL, *data, *RESUMED, KILL_AT="3").returncode != 0
    assert len(column(killed, "dpo/loss")) == 3 and not (killed / "export").exists()
    resumed = dpo("resume=true")
    assert resumed.returncode == 0, resumed.stderr
    assert rows(killed) == rows(runs / "whole") and len(column(killed, "dpo/loss")) == 5


# --- refusals ------------------------------------------------------------------------------------------------------------------

REFUSED = {
    "smoothing of a half": (("dpo.label_smoothing=0.5",), "dpo.label_smoothing must lie in [0, 0.5), got 0.5"),
    "negative smoothing": (("dpo.label_smoothing=-0.1",), "dpo.label_smoothing must lie in [0, 0.5), got -0.1"),
    "smoothing with ipo": (("dpo=ipo", "dpo.label_smoothing=0.1"), "dpo.label_smoothing=0.1 acts with loss=sigmoid only, got loss=ipo"),
    "beta of zero": (("dpo.beta=0",), "dpo.beta must be positive, got 0"),
    "negative beta": (("dpo.beta=-0.1",), "dpo.beta must be positive, got -0.1"),
    "unknown loss": (("dpo.loss=hinge",), "dpo.loss: expected one of sigmoid, ipo, got 'hinge'"),
    "batch and micro-batch": (("dpo.batch_size=6", "dpo.micro_batch_size=4"), "dpo.batch_size=6 does not divide by dpo.micro_batch_size x ranks"),
    "batch and ranks": (("dpo.batch_size=7", "trainer.devices=2"), "dpo.batch_size=7 does not divide by the number of ranks = 2"),
    "offload without its optimizer": (
        ("zero@actor.zero=z2_offload",), "actor.zero.offload_optimizer=true does not go with dpo.optimizer.name=adamw",
    ),
    "ref at stage 2": (("zero@ref.zero=z2",), "ref.zero.stage of a frozen role must be 0 or 3, got 2"),
}  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_settings_are_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check(build(composed("dpo", "run_dir=x", *overrides)))
    assert message in str(caught.value)


def test_neither_a_critic_nor_a_reward_model_is_configured() -> None:
    assert {"critic", "reward", "ppo", "rollout"} & composed("dpo", "run_dir=x").keys() == set()


def test_too_few_pairs_are_refused_by_the_key_of_this_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    data = (f"data.path={write_plain_pairs(tmp_path / 'pairs.jsonl', 32)}", f"data.cache_dir={tmp_path / 'cache'}")
    config = composed("dpo", *SMALL, *data, "dpo.batch_size=400", f"run_dir={tmp_path / 'run'}")
    with pytest.raises(UserError, match=r"dpo\.batch_size=400 passes the"):
        train_dpo(Job(config, build(config)))
