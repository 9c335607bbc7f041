"""ZeRO-3 that makes a layer whole at once: every family learns what it learns without sharding, whatever of it is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import deepspeed
import pytest
import torch
from deepspeed.utils import get_z3_leaf_modules
from jobs import composed, one_rank
from tiny import SHAPES, config

from rlhf.config import build
from rlhf.engines.config import EngineSpec, Training, engine_config
from rlhf.engines.gather import gather_by_layer, gathered_for_writing, sharded_init
from rlhf.engines.optimizers import build_optimizer
from rlhf.models.factory import Blueprint, build_network

FULL, ADAPTERS, BOTH = (), ("lora@actor.lora=r8", "actor.lora.only=true"), ("lora@actor.lora=r8",)


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    with one_rank():
        yield


def losses(family: str, stage: int, words: tuple[str, ...], *, by_layer: bool = True, checkpointing: bool = False) -> list[float]:
    """Of four steps, two micro-batches each; the last one tells of all gradients before."""
    cfg = build(
        composed(
            "sft", f"zero@actor.zero=z{stage}", "run_dir=unused", "sft.optimizer.lr=1e-2", "actor.zero.persistence_threshold=0", *words
        )
    )
    training = Training(
        optimizer=cfg.sft.optimizer, scheduler=cfg.sft.scheduler, total_steps=10, lora=cfg.actor.lora, micro_batch_size=2, accumulation=2
    )
    spec = EngineSpec(
        zero=dataclasses.replace(cfg.actor.zero, gather_layers=by_layer), precision="fp32", training=training, reloadable=False
    )
    blueprint = Blueprint(
        kind="causal", config=config(family), folder=None, lora=cfg.actor.lora, gradient_checkpointing=checkpointing, dtype=torch.float32
    )
    torch.manual_seed(0)
    network = build_network(blueprint, sharded=sharded_init(spec), gather=gathered_for_writing, is_writer=True)
    if stage == 3 and by_layer:
        gather_by_layer(network, trained=True)
        assert len(get_z3_leaf_modules(network)) == len(network.layers) == 2
    engine, *_ = deepspeed.initialize(
        model=network, optimizer=build_optimizer(network, training), config=engine_config(spec), dist_init_required=False
    )
    ids = torch.randint(4, 60, (4, 2, 9), generator=torch.Generator().manual_seed(1))
    found = []
    for _ in range(4):
        for rows in ids.split(2):
            for micro in rows:
                logits = engine(micro, torch.ones_like(micro, dtype=torch.bool))
                loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), micro[:, 1:].flatten())
                engine.backward(loss)
                engine.step()
                found.append(loss.item())
    engine.destroy()
    return found


@pytest.mark.parametrize("family", SHAPES)
def test_every_family_learns_what_it_learns_whole(family: str) -> None:
    assert losses(family, 3, FULL) == pytest.approx(losses(family, 0, FULL), rel=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("words", [FULL, ADAPTERS, BOTH], ids=["full", "adapters", "both"])
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_adapters_learn_in_the_first_layer_too(family: str, words: tuple[str, ...], checkpointing: bool) -> None:
    """Its input needs no gradient where only adapters learn: DeepSpeed would reduce gradients that are not there yet."""
    found = losses(family, 3, words, checkpointing=checkpointing)
    assert found == pytest.approx(losses(family, 0, words), rel=1e-5) and found[-1] < found[0]


def test_module_by_module_is_there_still() -> None:
    assert losses("llama", 3, ADAPTERS, by_layer=False) == pytest.approx(losses("llama", 0, ADAPTERS), rel=1e-5)
