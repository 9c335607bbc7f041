"""fp32: the same iteration whatever the ZeRO stage, the number of ranks and the split into micro-batches."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import column, composed, run_together
from safetensors.torch import load_file
from tiny import write_pairs
from transformers import AutoConfig

from rlhf.models.factory import Blueprint, build_network

SMALL = (
    "model@actor.model=tiny", "model@critic.model=tiny", "model@reward.model=tiny", "data=pairs", "data.max_prompt_tokens=12",
    "data.max_answer_tokens=8", "data.split=[1,1,2]", "ppo.iterations=3", "ppo.batch_size=8", "ppo.minibatch_size=8", "ppo.micro_batch_size=4",
    "ppo.score_micro_batch_size=4", "ppo.epochs=2", "ppo.actor_optimizer.lr=1e-2", "ppo.critic_optimizer.lr=1e-2",
    "ppo.actor_scheduler.warmup=0", "ppo.critic_scheduler.warmup=0", "ppo.ptx_coef=0.5", "data.ptx=[pairs]", "callbacks=none",
)  # fmt: skip
COMPARED = (
    "actor/loss", "actor/ptx_loss", "actor/entropy", "actor/grad_norm", "actor/approx_kl", "critic/loss", "critic/grad_norm", "rollout/kl", "rollout/reward",
    "critic/explained_variance", "ppo/advantage_std",
)  # fmt: skip

SETUPS: dict[str, tuple[int, tuple[str, ...]]] = {
    "stage 0, micro 2": (1, ("ppo.micro_batch_size=2", "ppo.score_micro_batch_size=3")),
    "stage 1": (1, ("zero@actor.zero=z1", "zero@critic.zero=z1")),
    "stage 2": (1, ("zero@actor.zero=z2", "zero@critic.zero=z2")),
    "stage 3": (1, ("zero@actor.zero=z3", "zero@critic.zero=z3", "zero@ref.zero=z3", "zero@reward.zero=z3")),
    "2 ranks": (2, ("ppo.micro_batch_size=2",)),
    "2 ranks, mixed stages": (2, ("zero@actor.zero=z2", "zero@critic.zero=z1", "ppo.micro_batch_size=4")),
    "2 ranks, stage 3": (
        2, ("zero@actor.zero=z3", "zero@critic.zero=z3", "zero@ref.zero=z3", "zero@reward.zero=z3", "ppo.micro_batch_size=1",
            "actor.zero.persistence_threshold=0"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Every setup run on the same recorded answers, from the same starting weights, in one launch for each number of ranks."""
    root = tmp_path_factory.mktemp("invariance")
    data = f"data.path={write_pairs(root / 'pairs.jsonl', 64)}"
    start = ("sft.max_steps=2", "sft.batch_size=8", "sft.micro_batch_size=8", "rm.max_steps=2", "rm.batch_size=8", "rm.micro_batch_size=8")

    def config(verb: str, name: str, *extra: str) -> dict[str, Any]:
        chosen = [o for o in (*SMALL, *start) if _belongs(o, verb)]
        return composed(
            verb, *chosen, data, f"data.cache_dir={root / 'cache'}", f"run_dir={root / name.replace(', ', '-').replace(' ', '-')}", *extra
        )

    init = (f"actor.init={root / 'sft'}", f"reward.init={root / 'reward'}")
    rollouts = root / "rollouts"
    first = [
        config("sft", "sft"),
        config("reward", "reward", f"reward.init={root / 'sft'}"),
        config("ppo", "base", *init, f"rollout.save_to={rollouts}"),
    ]
    alone: list[dict[str, Any]] = []
    together: list[dict[str, Any]] = []
    for name, (world, extra) in SETUPS.items():
        job = config("ppo", name, *init, "rollout=recorded", f"rollout.recorded_path={rollouts}", f"trainer.devices={world}", *extra)
        (alone if world == 1 else together).append(job)
    still = ("ppo.actor_optimizer.lr=0", "ppo.critic_optimizer.lr=0", "ppo.critic_optimizer.weight_decay=0.1")
    alone += [config("ppo", "still", *init, *still), config("ppo", "fresh", "ppo.iterations=1")]
    run_together(first + alone, world=1)
    run_together(together, world=2)
    yield {name: root / name.replace(", ", "-").replace(" ", "-") for name in ["base", "still", "fresh", *SETUPS]} | {
        "sft": root / "sft",
        "reward": root / "reward",
    }


def _belongs(override: str, verb: str) -> bool:
    """Whether a verb has the section that an override changes."""
    sections = {"sft": ("actor", "sft"), "reward": ("reward", "rm"), "ppo": ("actor", "critic", "reward", "ppo")}[verb]
    key = override.split("=")[0]
    return key.split("@")[-1].split(".")[0] in (*sections, "data", "callbacks")


@pytest.mark.launch
@pytest.mark.parametrize("setup", SETUPS)
def test_every_setup_learns_the_same(runs: dict[str, Path], setup: str) -> None:
    for name in COMPARED:
        expected, found = column(runs["base"], name), column(runs[setup], name)
        assert found == pytest.approx(expected, rel=1e-4, abs=2e-6), name


@pytest.mark.launch
def test_the_first_step_starts_from_the_policy_that_sampled(runs: dict[str, Path]) -> None:
    assert column(runs["base"], "actor/ratio_first") != column(runs["base"], "actor/ratio_max")
    assert column(runs["base"], "actor/ratio_first")[0] == pytest.approx(1.0, abs=1e-5)
    assert column(runs["base"], "rollout/kl")[0] == pytest.approx(0.0, abs=1e-4)
    assert abs(column(runs["base"], "rollout/kl")[2]) > 1e-3


@pytest.mark.launch
@pytest.mark.parametrize(("role", "start"), [("actor", "sft/export/actor"), ("critic", "reward/export/reward")])
def test_with_learning_rate_zero_nothing_moves(runs: dict[str, Path], role: str, start: str) -> None:
    """The export of such a run is its starting point, weight for weight; so is a ratio of 1 and a KL of 0 in every iteration."""
    ours = load_file(runs["still"] / "export" / role / "model.safetensors")
    theirs = load_file(runs["sft"].parent / start / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert column(runs["still"], "rollout/kl") == pytest.approx([0.0] * 3, abs=1e-4)
    assert column(runs["still"], "actor/ratio_max") == pytest.approx([1.0] * 3, abs=1e-4)


@pytest.mark.launch
def test_exports_load_in_a_python_without_this_package(runs: dict[str, Path], tmp_path: Path) -> None:
    """transformers alone, in a process that cannot import rlhf, gives the logits that our network gives."""
    folder = runs["base"] / "export" / "actor"
    ids = torch.tensor([[5, 6, 7, 8]])
    code = (
        "import sys; sys.modules['rlhf'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r}).eval()\n"
        f"assert AutoTokenizer.from_pretrained({str(folder)!r}).pad_token_id == model.config.pad_token_id\n"
        f"torch.save(model(torch.tensor({ids.tolist()})).logits.detach(), {str(tmp_path / 'logits.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    blueprint = Blueprint(
        kind="causal",
        config=AutoConfig.from_pretrained(folder),
        folder=folder,
        lora=None,
        gradient_checkpointing=False,
        dtype=torch.float32,
    )
    network = build_network(blueprint, sharded=nullcontext(), gather=lambda parameters: nullcontext(), is_writer=True).eval()
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), network(ids, torch.ones_like(ids).bool()))


@pytest.mark.launch
def test_without_weights_to_start_from_ref_is_still_the_actor(runs: dict[str, Path]) -> None:
    assert column(runs["fresh"], "rollout/kl") == pytest.approx([0.0], abs=1e-4)
