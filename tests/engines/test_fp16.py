"""fp16's loss scale, and gradients that are no numbers, in any precision. The CPU is made to admit fp16: the arithmetic is there, only
DeepSpeed does not expect it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from jobs import composed, one_rank
from tiny import config

from rlhf.config import build
from rlhf.engines.config import EngineSpec, Training, engine_config
from rlhf.engines.gather import gathered, gathered_for_writing, sharded_init
from rlhf.engines.optimizers import build_optimizer
from rlhf.engines.overflow import _scaler, align_overflow, gradients, has_overflow, look_once, loss_scale
from rlhf.engines.strategy import RoleStrategy
from rlhf.models.factory import Blueprint, build_network


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One rank, on a CPU said to know fp16."""
    kind = type(get_accelerator())
    monkeypatch.setattr(kind, "is_fp16_supported", lambda _: True)
    monkeypatch.setattr(kind, "supported_dtypes", lambda _: [torch.float, torch.half, torch.bfloat16])
    with one_rank():
        yield


def engine_at(stage: int, precision: str = "fp16", *, offload: bool = False) -> Any:
    cfg = build(composed("sft", f"zero@actor.zero=z{stage}", "run_dir=unused", "sft.optimizer.grad_clip=0"))
    training = Training(
        optimizer=cfg.sft.optimizer, scheduler=cfg.sft.scheduler, total_steps=10, lora=cfg.actor.lora, micro_batch_size=2, accumulation=1
    )
    zero = dataclasses.replace(cfg.actor.zero, offload_optimizer=offload)
    spec = EngineSpec(zero=zero, precision=precision, training=training, reloadable=False)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    blueprint = Blueprint(kind="causal", config=config("llama"), folder=None, lora=None, gradient_checkpointing=False, dtype=dtype)
    torch.manual_seed(0)
    network = build_network(blueprint, sharded=sharded_init(spec), gather=gathered_for_writing, is_writer=True)
    settings = engine_config(spec) | {"zero_force_ds_cpu_optimizer": False}  # it would be compiled
    engine, *_ = deepspeed.initialize(
        model=network, optimizer=build_optimizer(network, training), config=settings, dist_init_required=False
    )
    return engine


def norm_of_a_step(stage: int) -> float:
    engine = engine_at(stage)
    strategy: Any = SimpleNamespace(
        engines={"actor": engine}, specs={"actor": SimpleNamespace(stage=stage, precision="fp16")}, world_size=1
    )
    ids = torch.arange(4, 20).reshape(2, 8)
    loss = engine(ids, torch.ones_like(ids, dtype=torch.bool)).float().logsumexp(-1).mean()
    RoleStrategy.backward(strategy, "actor", loss)
    assert max(float(g.abs().max()) for g in gradients(engine)) > 100, "no loss scale"
    result = RoleStrategy._step(strategy, "actor", engine)
    engine.destroy()
    return result.grad_norm


def test_the_gradient_norm_is_the_same_at_stage_0_and_1() -> None:
    """Stage 0 of DeepSpeed divides by a loss scale (65,536) that the loss was not multiplied by."""
    assert norm_of_a_step(0) == pytest.approx(norm_of_a_step(1), rel=0.01)


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "fp32"), (1, "bf16"), (2, "bf16")])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_with_a_gradient_that_is_no_number_changes_no_weight_and_is_an_error(stage: int, precision: str, bad: float) -> None:
    engine = engine_at(stage, precision)
    if precision == "bf16":
        look_once(engine)
    strategy: Any = SimpleNamespace(
        engines={"actor": engine}, specs={"actor": SimpleNamespace(stage=stage, precision=precision)}, world_size=1
    )
    before = [p.detach().clone() for p in engine.module.parameters()]
    ids = torch.arange(4, 20).reshape(2, 8)
    RoleStrategy.backward(strategy, "actor", engine(ids, torch.ones_like(ids, dtype=torch.bool)).float().logsumexp(-1).mean())
    gradients(engine)[-1].view(-1)[0] = bad
    with pytest.raises(FloatingPointError, match="actor: the gradients are not finite"):
        RoleStrategy._step(strategy, "actor", engine)
    assert all(torch.equal(old, new) for old, new in zip(before, engine.module.parameters(), strict=True))
    engine.destroy()


ACTORS = [(0, False), (1, False), (2, False), (3, False), (1, True), (2, True), (3, True)]


@pytest.mark.parametrize("overflowing", ["actor", "critic"])
@pytest.mark.parametrize(("stage", "offload"), ACTORS, ids=[f"stage {stage}{', offload' * offload}" for stage, offload in ACTORS])
def test_if_one_role_overflows_all_skip_and_only_its_own_scale_falls(stage: int, offload: bool, overflowing: str) -> None:
    engines = {"actor": engine_at(stage, offload=offload), "critic": engine_at(2)}
    ids = torch.arange(4, 20).reshape(2, 8)

    def step(bad: str | None) -> tuple[dict[str, bool], dict[str, bool], dict[str, int]]:
        """Which overflow by themselves, which skip, and how often each scale has been counted on."""
        for role, engine in engines.items():
            loss = engine(ids, torch.ones_like(ids, dtype=torch.bool)).float().logsumexp(-1).mean()
            engine.backward(loss * loss_scale(engine) * (1e30 if role == bad else 1.0), scale_wrt_gas=False)
        flags = {role: has_overflow(engine) for role, engine in engines.items()}
        before = weights()
        with align_overflow(engines):
            for engine in engines.values():
                engine.step()
        stays = {role: torch.equal(before[role], now) for role, now in weights().items()}
        return flags, stays, {role: _scaler(engine).cur_iter for role, engine in engines.items()}

    def weights() -> dict[str, torch.Tensor]:
        found = {}
        for role, engine in engines.items():
            parameter = engine.module.model.get_input_embeddings().weight
            with gathered([parameter]):
                found[role] = parameter.detach().clone()
        return found

    none = dict.fromkeys(engines, False)
    flags, stays, counted = step(None)
    while flags != none:  # the scale begins at 65,536, which may be too much for either
        flags, stays, counted = step(None)
    assert stays == none
    flags, stays, now = step(overflowing)
    assert flags == none | {overflowing: True} and all(stays.values())
    assert now == counted | {overflowing: counted[overflowing] + 1}
    assert step(None)[:2] == (none, none), "nothing of the overflow may be left"
    for engine in engines.values():
        engine.destroy()
