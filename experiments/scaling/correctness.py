"""The same PPO on one rank and on several, however it is split: `python correctness.py --out DIR [--trainer gpu|cpu]`.

A small network in fp32 with the same seed: rollouts drawn by the hybrid engine, three iterations of two epochs. Every way of splitting has to give the
losses, gradient norms, KL and rewards of one rank with whole weights, with and without adapters; so its answers have to be the same tokens.
Then a run on all ranks is killed in its fifth iteration and resumed, and has to give the numbers of one that was not.

Writes DIR/correctness.json: for each way the largest relative difference. Exit code 1: one is above the bound.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
from jobs import column, composed, run_together  # noqa: E402
from tiny import write_pairs  # noqa: E402

SMALL = (
    "model@actor.model=tiny", "model@critic.model=tiny", "model@reward.model=tiny", "data=pairs", "data.max_prompt_tokens=12",
    "data.max_answer_tokens=8", "data.split=[1,1,2]", "ppo.batch_size=8", "ppo.minibatch_size=8", "ppo.micro_batch_size=2",
    "ppo.score_micro_batch_size=4", "ppo.epochs=2", "ppo.actor_optimizer.lr=1e-3", "ppo.critic_optimizer.lr=1e-3", "ppo.actor_scheduler.warmup=0",
    "ppo.critic_scheduler.warmup=0", "callbacks=none", "trainer.precision=fp32",
)  # fmt: skip
Z2 = ("zero@actor.zero=z2", "zero@critic.zero=z2")
Z3 = ("zero@actor.zero=z3", "zero@critic.zero=z3", "zero@ref.zero=z3", "zero@reward.zero=z3", "actor.zero.persistence_threshold=0")
LORA = ("lora@actor.lora=r8", "actor.lora.only=true")
WAYS: dict[str, tuple[str, ...]] = {
    "zero 0": (), "zero 2": Z2, "zero 3": Z3, "zero 0, tp": ("tp=tp2",), "zero 2, tp": (*Z2, "tp=tp2"), "zero 3, tp": (*Z3, "tp=tp2"),
}  # fmt: skip
COMPARED = (
    "rollout/reward", "rollout/kl", "rollout/length", "actor/loss", "actor/grad_norm", "actor/entropy", "critic/loss", "critic/grad_norm", "ppo/advantage_std",
)  # fmt: skip
BOUND = 1e-4
CRASH = ("ppo.iterations=6", "trainer.checkpoint_every=2", "+callbacks.kill._target_=crash.KillRank", *Z3, "tp=tp2", *LORA)


def difference(found: Path, expected: Path) -> float:
    """Largest difference of a metric in any iteration, relative to the metric's largest value."""
    worst = 0.0
    for name in COMPARED:
        ours, theirs = column(found, name), column(expected, name)
        if len(ours) != len(theirs) or not theirs or not all(map(math.isfinite, ours)):
            return math.inf
        scale = max(map(abs, theirs)) + 1e-6
        worst = max(worst, *(abs(a - b) / scale for a, b in zip(ours, theirs, strict=True)))
    return worst


def splits(out: Path, data: tuple[str, ...], ranks: int) -> dict[str, float]:
    """Way -> difference to one rank."""

    def config(name: str, *extra: str) -> dict[str, Any]:
        return composed("ppo", *SMALL, *data, "ppo.iterations=3", f"run_dir={out / name.replace(', ', '-').replace(' ', '-')}", *extra)

    adapters = {"": (), ", lora": LORA}
    small = (
        "model@{role}.model=tiny",
        "data=pairs",
        "data.max_prompt_tokens=12",
        "data.max_answer_tokens=8",
        "data.split=[1,1,2]",
        "callbacks=none",
    )
    start = [
        composed(verb, *(word.format(role=role) for word in small), *data, f"{part}.max_steps=2", f"{part}.batch_size=8", f"{part}.micro_batch_size=8",
                 f"run_dir={out / verb}", *more)
        for verb, role, part, more in (("sft", "actor", "sft", ()), ("reward", "reward", "rm", (f"reward.init={out / 'sft'}",)))
    ]  # fmt: skip
    data += (f"actor.init={out / 'sft'}", f"reward.init={out / 'reward'}")  # random weights depend on the device that they are drawn on
    alone = {kind: config(f"one rank{kind}", *words) for kind, words in adapters.items()}
    many = {
        f"{way}{kind}": config(f"{way}{kind}", *words, *more, f"trainer.devices={ranks}")
        for kind, more in adapters.items()
        for way, words in WAYS.items()
    }
    run_together([*start, *alone.values()], world=1)
    run_together(list(many.values()), world=ranks)
    return {
        name: difference(Path(job["run_dir"]), Path(alone[", lora" if name.endswith("lora") else ""]["run_dir"]))
        for name, job in many.items()
    }


def rows(run_dir: Path) -> list[dict[str, str]]:
    """metrics.csv without what a clock or a meter measured."""
    with (run_dir / "metrics.csv").open(newline="") as f:
        return [
            {key: value for key, value in row.items() if not key.startswith(("time/", "memory/")) and not key.endswith("per_s")}
            for row in csv.DictReader(f)
        ]


def resume(out: Path, data: tuple[str, ...], ranks: int) -> float:
    """Share of the numbers that a killed and resumed run has in common with one that was not."""

    def ppo(name: str, *words: str, kill_at: int | None = None) -> int:
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": path} | ({} if kill_at is None else {"KILL_AT": str(kill_at)})
        with (out / f"{name}.log").open("a") as log:
            command = [sys.executable, "-m", "rlhf", "ppo", f"run_dir={out / name}", *words]
            return subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False).returncode

    words = (*SMALL, *data, *CRASH, f"trainer.devices={ranks}")
    if ppo("whole", *words) or not ppo("killed", *words, kill_at=5) or ppo("killed", "resume=true"):
        return 0.0
    whole, resumed = rows(out / "whole"), rows(out / "killed")
    pairs = [(a.get(key), b.get(key)) for a, b in zip(whole, resumed, strict=True) for key in a]
    return sum(a == b for a, b in pairs) / len(pairs)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trainer", default="gpu", choices=("gpu", "cpu"))
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args(argv)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    data = (f"data.path={write_pairs(out / 'pairs.jsonl', 64)}", f"data.cache_dir={out / 'cache'}", f"trainer={options.trainer}")
    found = {"differences": splits(out, data, options.ranks), "same_after_resume": resume(out, data, options.ranks)}
    card = torch.cuda.get_device_name() if options.trainer == "gpu" else f"{os.cpu_count()} CPU cores"
    (out / "correctness.json").write_text(json.dumps({"card": card, "ranks": options.ranks, **found}, indent=1))
    for name, value in found["differences"].items():
        print(f"{name}: {value:.1e}")
    print(f"killed and resumed: {found['same_after_resume']:.1%} of the numbers are those of a run that was not")
    return 1 if max(found["differences"].values()) > BOUND or found["same_after_resume"] < 1 else 0


if __name__ == "__main__":
    sys.exit(main())
