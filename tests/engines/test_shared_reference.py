"""A reference that is the actor without its adapters says what one with weights of its own says, whatever holds the actor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import column, composed, run_together
from tiny import config, write_pairs

from rlhf.models.factory import Blueprint, build_network
from rlhf.models.lora import adapted_layers, without_adapters
from rlhf.settings import LoraConfig

SMALL = (
    "model@actor.model=tiny", "data=pairs", "data.max_prompt_tokens=12", "data.max_answer_tokens=8", "data.split=[1,2,1]", "callbacks=none",
    "trainer.devices=2", "lora@actor.lora=r8", "actor.lora.only=true", "actor.lora.lr=2e-2",
)  # fmt: skip
PPO = (
    "model@critic.model=tiny", "model@reward.model=tiny", "ppo.iterations=3", "ppo.batch_size=8", "ppo.minibatch_size=8", "ppo.micro_batch_size=2",
    "ppo.score_micro_batch_size=2", "ppo.actor_scheduler.warmup=0", "ppo.critic_optimizer.lr=1e-2",
)  # fmt: skip
DPO = ("dpo.batch_size=8", "dpo.micro_batch_size=2", "dpo.max_steps=3", "dpo.scheduler.warmup=0", "actor.dropout=0.1")
Z3 = ("zero@actor.zero=z3", "actor.zero.persistence_threshold=0")
SETUPS: dict[str, tuple[str, ...]] = {
    "ppo": (),
    "ppo z2": ("zero@actor.zero=z2", "actor.gradient_checkpointing=true"),
    "ppo z3": (*Z3, "actor.gradient_checkpointing=true", "tp=tp2"),
    "ppo z3 by module": (*Z3, "actor.zero.gather_layers=false"),
    "ppo in training mode": ("ppo.score_in_train_mode=true", "actor.dropout=0.1", "ppo.kl_in=loss", "ppo.kl_estimator=k3"),
    "dpo": (),
    "dpo z3": Z3,
}
COMPARED = {
    "ppo": ("rollout/kl", "rollout/reward", "actor/loss", "actor/grad_norm", "actor/entropy", "critic/loss"),
    "dpo": ("dpo/loss", "dpo/train_drift", "dpo/train_margin", "actor/grad_norm", "dpo/accuracy"),
}


def folder(root: Path, setup: str, *, shared: bool) -> Path:
    return root / f"{setup.replace(' ', '-')}-{'shared' if shared else 'own'}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Every setup twice, one after the other on the same two ranks."""
    root = tmp_path_factory.mktemp("shared")
    data = (f"data.path={write_pairs(root / 'pairs.jsonl', 64)}", f"data.cache_dir={root / 'cache'}")

    def job(setup: str, *, shared: bool) -> dict[str, Any]:
        verb = setup[:3]
        own = {"ppo": PPO, "dpo": DPO}[verb]
        where = (f"run_dir={folder(root, setup, shared=shared)}", f"ref.shared={str(shared).lower()}")
        return composed(verb, *SMALL, *own, *data, *SETUPS[setup], *where)

    run_together([job(setup, shared=shared) for setup in SETUPS for shared in (False, True)], world=2)
    yield root


@pytest.mark.launch
@pytest.mark.parametrize("setup", SETUPS)
def test_a_run_learns_what_it_learns_with_a_reference_of_its_own(runs: Path, setup: str) -> None:
    for name in COMPARED[setup[:3]]:
        expected = column(folder(runs, setup, shared=False), name)
        assert len(expected) >= 2 and column(folder(runs, setup, shared=True), name) == pytest.approx(expected, rel=1e-5, abs=1e-7), name
    moved = "rollout/kl" if setup.startswith("ppo") else "dpo/train_drift"
    assert abs(column(folder(runs, setup, shared=True), moved)[-1]) > 1e-3, "the actor has left its reference"


def test_nothing_of_the_network_is_changed_by_the_question() -> None:
    lora = composed("sft", "lora@actor.lora=r8", "actor.lora.only=true", "actor.lora.dropout=0.1", "run_dir=unused")["actor"]["lora"]
    lora.pop("_target_")
    blueprint = Blueprint(
        kind="causal", config=config("llama", attention_dropout=0.1), folder=None, lora=LoraConfig(**lora), gradient_checkpointing=False,
        dtype=torch.float32,
    )  # fmt: skip
    torch.manual_seed(0)
    network = build_network(blueprint, sharded=torch.no_grad(), gather=lambda parameters: torch.no_grad(), is_writer=True)
    ids, mask = torch.arange(4, 20).reshape(2, 8), torch.ones(2, 8, dtype=torch.bool)
    before = network.eval()(ids, mask)
    for layer in adapted_layers(network).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    learns = {name for name, p in network.named_parameters() if p.requires_grad}
    network.train()
    with pytest.raises(RuntimeError, match="halfway"), without_adapters(network):
        assert torch.equal(network(ids, mask), before), "its dropout is off as well"
        raise RuntimeError("halfway")
    assert {name for name, p in network.named_parameters() if p.requires_grad} == learns
    assert network.training and all(module.training for module in network.modules())
    assert not torch.allclose(network.eval()(ids, mask), before)
