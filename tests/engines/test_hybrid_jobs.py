"""The hybrid engine inside real jobs, on one rank and on two: parity after training, nothing disturbed, answers that know no ranks.

All jobs of a number of ranks run in one launch.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import column, composed, run_together
from safetensors.torch import load_file
from tiny import write_pairs

pytestmark = pytest.mark.launch

SMALL = (
    "model@actor.model=tiny", "model@critic.model=tiny", "model@reward.model=tiny", "data=pairs", "data.max_prompt_tokens=12",
    "data.max_answer_tokens=8", "data.split=[1,1,2]", "ppo.batch_size=8", "ppo.minibatch_size=8", "ppo.micro_batch_size=4",
    "ppo.score_micro_batch_size=4", "ppo.actor_optimizer.lr=1e-2", "ppo.critic_optimizer.lr=1e-2", "ppo.actor_scheduler.warmup=0",
    "ppo.critic_scheduler.warmup=0", "callbacks=none", "ppo.iterations=3",
)  # fmt: skip
STILL = (
    "ppo.iterations=2",
    "ppo.actor_optimizer.lr=0",
    "ppo.critic_optimizer.lr=0",
    "ppo.samples_per_prompt=2",
    "+callbacks.measure._target_=rlhf.callbacks.metrics.Throughput",
)
"""The weights stay, so that a last bit that differs between numbers of ranks does not grow."""
ALL_ON = ("ppo.epochs=2", "actor.dropout=0.1", "trainer.checkpoint_every=3")
Z3 = (
    "zero@actor.zero=z3",
    "zero@critic.zero=z2",
    "lora@actor.lora=r8",
    "actor.zero.persistence_threshold=0",
    "rollout.tp_gather_partition_size=1",
)
INTRUDER = ("+callbacks.intruder._target_=intruder.Intruder", "+callbacks.intruder.times=7")

ANSWERED: dict[str, tuple[int, tuple[str, ...]]] = {
    "whole": (1, ()),
    "few slots": (1, ("rollout.micro_batch_size=3", "rollout.prefill_tokens=20")),
    "memory kept": (1, ("rollout.pin_parameters=true", "rollout.release_inference_cache=false")),
    "2 ranks": (2, ()),
    "2 ranks, few slots": (2, ("rollout.micro_batch_size=2",)),
    "2 ranks, stage 3": (2, ("zero@actor.zero=z3", "actor.zero.persistence_threshold=0")),
    "2 ranks, tp 2": (2, ("tp=tp2",)),
    "2 ranks, tp 2, stage 3": (2, ("tp=tp2", "zero@actor.zero=z3", "actor.zero.persistence_threshold=0")),
}  # fmt: skip
LEARNED: dict[str, tuple[int, tuple[str, ...]]] = {
    "learner": (1, ALL_ON),
    "learner, 2 ranks": (2, (*ALL_ON, *Z3)),
}
CORRECTED: dict[str, tuple[str, ...]] = {
    "capped": ("ppo.importance_cap=2",),
    "from the sampler": ("ppo.old_logprobs=rollout", "rollout.temperature=0.7"),
}
PARITY = ("bench=parity", "bench.dtypes=[fp32]", "bench.graphs=[false]", "bench.train_steps=3", "bench.prompts=4", "callbacks=none")
PARITY_LISTS = {
    "families": (
        "bench.families=[opt-350m,gpt2,gpt_neox,bloom,qwen3,phi3]",
        "bench.zero_stages=[3]",
        "bench.tp_sizes=[2]",
        "bench.lora_ranks=[8]",
    ),
    "stages": ("bench.families=[llama-gqa]", "bench.zero_stages=[0,1,2]", "bench.tp_sizes=[1,2]", "bench.lora_ranks=[8]"),
    "no adapter": ("bench.families=[opt]", "bench.zero_stages=[0,3]", "bench.tp_sizes=[2]", "bench.lora_ranks=[0]"),
}
PARITY_CASES = {"families": 6, "stages": 6, "no adapter": 2}


def folder(root: Path, name: str) -> Path:
    return root / name.replace(", ", "-").replace(" ", "-")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs, each in one named after it."""
    root = tmp_path_factory.mktemp("hybrid")
    data = (f"data.path={write_pairs(root / 'pairs.jsonl', 64)}", f"data.cache_dir={root / 'cache'}")

    def ppo(name: str, world: int, *extra: str) -> dict[str, Any]:
        return composed("ppo", *SMALL, *data, f"run_dir={folder(root, name)}", f"trainer.devices={world}", *extra)

    recorded = root / "answers"
    jobs: dict[int, list[dict[str, Any]]] = {1: [ppo("recording", 1, f"rollout.save_to={recorded}")], 2: []}
    for name, (world, extra) in ANSWERED.items():
        jobs[world].append(ppo(name, world, *STILL, *extra, f"rollout.save_to={folder(root, name) / 'answers'}"))
    for name, (world, extra) in LEARNED.items():
        replay = (*extra, "rollout=recorded", f"rollout.recorded_path={recorded}")
        tensor_parallel = ("+callbacks.intruder.tp=2",) if world == 2 else ()
        jobs[world] += [ppo(name, world, *replay), ppo(f"{name}, disturbed", world, *replay, *INTRUDER, *tensor_parallel)]
    jobs[1] += [ppo(name, 1, *extra) for name, extra in CORRECTED.items()]
    for name, extra in PARITY_LISTS.items():
        jobs[2].append(composed("bench", *PARITY, *extra, f"run_dir={folder(root, name)}", "trainer.devices=2"))
    for world, configs in jobs.items():
        run_together(configs, world=world)
    return root


# --- parity ---


@pytest.mark.parametrize("name", PARITY_LISTS)
def test_after_three_steps_it_says_what_transformers_says(root: Path, name: str) -> None:
    """Every layout of weights and ZeRO stage, with adapters, alone and as two halves: the same greedy tokens, log-probabilities to 1e-4."""
    outcomes = json.loads((folder(root, name) / "bench.json").read_text())["outcomes"]
    assert len(outcomes) == PARITY_CASES[name]
    for outcome in outcomes:
        seen = outcome["agreement"]
        assert outcome["result"] == "pass" and seen["equal"] == seen["tokens"] > 0 and seen["largest"] < 1e-4, outcome["case"]


# --- answers ---


def answers(run: Path, iteration: int) -> tuple[list[list[int]], list[list[float]]]:
    """Tokens and log-probabilities of each answer, in global order."""
    saved = torch.load(run / "answers" / f"{iteration:06d}.pt", weights_only=True)
    width = saved["action_mask"].shape[1]
    rows = list(zip(saved["ids"][:, -width:], saved["logprobs"], saved["action_mask"], strict=True))
    return [ids[live].tolist() for ids, _, live in rows], [logprobs[live].tolist() for _, logprobs, live in rows]


@pytest.mark.parametrize("name", [name for name in ANSWERED if name != "whole"])
def test_answers_depend_on_neither_ranks_nor_slots(root: Path, name: str) -> None:
    for iteration in range(2):
        (tokens, logprobs), (expected, expected_logprobs) = (answers(folder(root, run), iteration) for run in (name, "whole"))
        assert len({tuple(row) for row in expected}) > 12, "the answers say too little"
        assert by_prompt(tokens, ANSWERED[name][0]) == by_prompt(expected, 1)
        flat, expected_flat = (sorted(x for row in rows for x in row) for rows in (logprobs, expected_logprobs))
        assert flat == pytest.approx(expected_flat, abs=1e-4)
    assert answers(folder(root, name), 0)[0] != answers(folder(root, name), 1)[0]


def by_prompt(rows: list[list[int]], world: int) -> list[list[list[int]]]:
    """[sample][prompt] -> its answer. Rank r holds prompts r, r + world, ..., sample-major; the file interleaves the ranks' rows."""
    prompts = len(rows) // 2
    ranks = [rows[r::world] for r in range(world)]
    return [[ranks[p % world][s * (prompts // world) + p // world] for p in range(prompts)] for s in range(2)]


# --- nothing disturbed ---


def rows(run: Path) -> list[dict[str, str]]:
    """metrics.csv without what a clock measured."""
    with (run / "metrics.csv").open(newline="") as f:
        return [{k: v for k, v in row.items() if not k.startswith("time/") and not k.endswith("per_s")} for row in csv.DictReader(f)]


def same(a: Any, b: Any, where: str) -> None:
    """Bit for bit, through whatever a checkpoint holds."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(map(str, a)) == list(map(str, b)), where
        for key, value in a.items():
            same(value, b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}[{i}]")
    elif hasattr(a, "__dict__") and not callable(a):
        same(vars(a), vars(b), where)
    else:
        assert bool((a == b).all()) if hasattr(a, "all") else a == b, where


@pytest.mark.parametrize("name", LEARNED)
def test_a_swap_in_between_changes_nothing_of_training(root: Path, name: str) -> None:
    """On recorded answers: every metric, and in the checkpoint weights, optimizer state, schedules and random states."""
    plain, disturbed = folder(root, name), folder(root, f"{name}, disturbed")
    assert rows(disturbed) == rows(plain)
    assert len(rows(plain)) == 3 and len({row["actor/loss"] for row in rows(plain)}) == 3
    kept = [run / "checkpoints" / "step-000003" for run in (plain, disturbed)]
    names = [sorted(p.relative_to(base) for p in base.rglob("*.pt")) for base in kept]
    assert names[0] == names[1] and len(names[0]) >= 4
    for file in names[0]:
        same(*(torch.load(base / file, weights_only=False) for base in kept), str(file))
    weights = [load_file(run / "export" / "actor" / "model.safetensors") for run in (plain, disturbed)]
    same(*weights, "export")


@pytest.mark.parametrize(("name", "rank"), [("learner", 0), ("learner, 2 ranks", 0), ("learner, 2 ranks", 1)])
def test_leaving_gives_all_memory_back(root: Path, name: str, rank: int) -> None:
    """To the byte, over 21 rollouts, 7 before each step. The first one builds what stays: slots, and tables of positions."""
    seen = json.loads((folder(root, f"{name}, disturbed") / f"memory-{rank}.json").read_text())
    assert len(seen) == 3
    assert [before for before, after in seen[1:] if before != after] == []
    stays = seen[0][1] - seen[0][0]
    slots, answer, head, tokens = 16, 8, 16, 12 + 8
    assert 0 <= stays <= 2 * ((slots + 1) * (answer * 12 + 64) + tokens * head * 8), "more stays than slots and positions"


# --- metrics and corrections ---


def test_its_times_and_counts_are_metrics(root: Path) -> None:
    for name in ("whole", "2 ranks, tp 2, stage 3"):
        run = folder(root, name)
        parts = {part: column(run, f"time/rollout_{part}") for part in ("gather", "swap", "prefill", "decode", "free")}
        assert all(len(values) == 2 for values in parts.values())
        assert min(parts["prefill"] + parts["decode"] + parts["swap"]) > 0
        assert all(sum(values) <= total for *values, total in zip(*parts.values(), column(run, "time/generate"), strict=True))
        assert min(column(run, "rollout/decode_steps")) >= 7 and min(column(run, "rollout/prefill_tokens")) > 8
    assert sum(column(folder(root, "few slots"), "rollout/decode_steps")) > sum(column(folder(root, "whole"), "rollout/decode_steps"))


@pytest.mark.parametrize("name", ["recording", *CORRECTED])
def test_the_sampler_and_the_actor_agree_to_rounding(root: Path, name: str) -> None:
    run = folder(root, name)
    assert len(column(run, "actor/loss")) == 3 and abs(column(run, "rollout/kl")[2]) > 1e-4
    for metric in ("mismatch_abs", "mismatch_max", "mismatch_kl"):
        assert len(column(run, f"rollout/{metric}")) == 3
        assert max(map(abs, column(run, f"rollout/{metric}"))) < 1e-4, metric
    assert max(column(run, "rollout/mismatch_max")) > 0, "nothing was compared"
    if name == "capped":
        assert column(run, "actor/importance_weight") == pytest.approx([1.0] * 3, abs=1e-4)
