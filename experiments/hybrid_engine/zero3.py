"""Rollouts under ZeRO-3 on two CPU ranks: gathered once by the hybrid engine, against transformers' generate under ZeRO-3's own hooks.

    python experiments/hybrid_engine/zero3.py [Hydra overrides of `rlhf bench`]

Prints one line of JSON: seconds of one rollout (the slowest rank's; all warm runs and their median) for `hybrid`, for `hf_hooks`
(model.generate with synced_gpus, every layer gathered for every token) and for `hf_generate` (this project's rollout=hf_generate).
All are greedy and must give the same tokens.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from rlhf.cli.compose import conf_dir
from rlhf.config import build
from rlhf.engines.launcher import free_port, prepare_rank, rank_environment

WORLD, RUNS = 2, 5
DEFAULTS = (
    "zero@actor.zero=z3", "trainer.devices=2", "callbacks=none", "bench.prompt_tokens=32", "bench.new_tokens=64", "bench.batch_sizes=[16]",
)  # fmt: skip
"""The quickstart's model. `bench.batch_sizes` is that of one rank; its first entry counts."""


def main(overrides: list[str]) -> None:
    if {"-h", "--help"} & set(overrides):
        print(__doc__)
        return
    with tempfile.TemporaryDirectory() as folder, initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("bench", [*DEFAULTS, f"run_dir={folder}", *overrides])
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(OmegaConf.to_container(config, resolve=True, throw_on_missing=True)))
        port = free_port()
        ranks = []
        for rank in range(WORLD):
            environment = rank_environment(rank, WORLD, local_rank=rank, per_node=WORLD, address="127.0.0.1", port=port)
            ranks.append(subprocess.Popen([sys.executable, __file__, "--rank", str(file)], env=os.environ | environment))
        if any([rank.wait() for rank in ranks]):
            sys.exit(1)


def one_rank(path: str) -> None:
    config = yaml.safe_load(Path(path).read_text())
    cfg = build(config)
    prepare_rank(cfg.trainer)
    from rlhf.cli.assemble import Job  # after prepare_rank: it imports deepspeed
    from rlhf.cli.bench.measured import Measured, actor_blueprint, run
    from rlhf.engines.baselines import vocabulary

    job = Job(config, cfg)
    blueprint = actor_blueprint(job, tokens=cfg.bench.prompt_tokens + cfg.bench.new_tokens)
    words = vocabulary(blueprint.config)
    result = run(job, Measured(blueprint, lambda strategy: measure(strategy, cfg, words)), job.frozen_engine(cfg.actor.zero))
    if os.environ["RANK"] == "0":
        print(json.dumps({"ranks": WORLD, "threads": torch.get_num_threads(), "model": cfg.actor.model.shape, **result}))


def measure(strategy: Any, cfg: Any, words: Any) -> dict[str, Any]:
    """Every way warm, then RUNS times each in turn."""
    from rlhf.engines.baselines import random_prompts
    from rlhf.engines.bench_rollout import hybrid_engine
    from rlhf.engines.generation import HFGenerate

    rows, prompt, new = cfg.bench.batch_sizes[0], cfg.bench.prompt_tokens, cfg.bench.new_tokens
    rollout = dataclasses.replace(
        cfg.rollout, engine="hf_generate", temperature=0.0, max_new_tokens=new, min_new_tokens=new, max_out_tokens=prompt + new
    )
    generator = torch.Generator().manual_seed(7919 * strategy.global_rank)
    prompts = random_prompts(words, torch.full((rows,), prompt), generator, strategy.root_device)
    hybrid = hybrid_engine(strategy, rollout, words, tp=cfg.tp.size)
    plain = HFGenerate(strategy, rollout, end_id=words.end, pad_id=words.pad)

    def under_hooks() -> torch.Tensor:  # (B, A)
        network = strategy.network("actor").eval()
        with torch.no_grad():
            out = network.model.generate(
                input_ids=prompts.ids, attention_mask=prompts.mask.long(), max_new_tokens=new, min_new_tokens=new, do_sample=False,
                eos_token_id=words.end, pad_token_id=words.pad, use_cache=True, synced_gpus=True,
            )  # fmt: skip
        return out[:, prompt:]

    ways: dict[str, Callable[[], torch.Tensor]] = {
        "hybrid": lambda: hybrid.generate("actor", prompts, samples=1).ids[:, prompt:],
        "hf_hooks": under_hooks,
        "hf_generate": lambda: plain.generate("actor", prompts, samples=1).ids[:, prompt:],
    }
    answers = {name: way() for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(RUNS):
        for name, way in ways.items():
            strategy.barrier()
            began = time.perf_counter()
            way()
            took = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
            seconds[name].append(round(float(strategy.max_over_ranks(took)), 4))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    same = torch.tensor(float(all(torch.equal(found, answers["hybrid"]) for found in answers.values())))
    return {
        "batch_per_rank": rows, "prompt_tokens": prompt, "new_tokens": new, "same_tokens": float(strategy.sum_over_ranks(same)) == WORLD,
        "seconds": seconds, "median": medians, "times_hf_hooks": round(medians["hf_hooks"] / medians["hybrid"], 2),
        "times_hf_generate": round(medians["hf_generate"] / medians["hybrid"], 2), "timings": hybrid.timings,  # type: ignore[attr-defined]
    }  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        one_rank(sys.argv[2])
        sys.stdout.flush()
        os._exit(0)  # as the launcher's ranks end: nothing waits for a peer's destructors
    main(sys.argv[1:])
