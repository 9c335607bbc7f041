"""Seconds by phase, on made-up hardware with round rates, by hand; and how they change with the job."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from plans import job, machine
from tiny import config

from rlhf.config import UserError
from rlhf.models.factory import Blueprint, build_network
from rlhf.planning.networks import FAMILIES
from rlhf.planning.speed import ADAM_BYTES, Clock, TimePlan, forward_operations, padded, time_plan
from rlhf.planning.workload import Workload

IDEAL: dict[str, Any] = {
    "training": 1.0, "forward": 1.0, "memory": 1.0, "decode_layer_us": 0.0, "decode_cache_passes": 1.0, "eager_layer_us": 0.0, "adapter_moves": 7.0, "hf_layer_us": 0.0, "hf_adapter_us": 0.0,
    "hf_cache_passes": 1.0, "logit_bytes": 0.0, "logit_training_bytes": 0.0,
    "gradient_tensor_us": 0.0, "optimizer_tensor_us": 0.0, "optimizer_extra_bytes": 0.0, "pads_heads": False, "zero3_tensor_us": 0.0, "zero3_layer_tensor_us": 0.0, "link": 1.0, "network": 1.0,
    "overlap": 0.0, "collective_us": 0.0, "host_link": 1.0, "host_adam_gbs": 30.0, "iteration_ms": 0.0,
}  # fmt: skip
HARDWARE = dataclasses.replace(
    machine().hardware, tflops_16bit=100.0, bandwidth_gbs=1000.0, link_gbs=100.0, network_gbs=50.0, host_link_gbs=10.0, devices_per_node=8
)
EFFICIENCY = machine().efficiency
assert EFFICIENCY is not None
BEST = dataclasses.replace(EFFICIENCY, **IDEAL)
L, D, F, V = 24, 2048, 8192, 50272  # OPT-1.3B
WEIGHTS = L * (4 * D * D + 2 * D * F)


def clock(work: Workload) -> Clock:
    return Clock(work, HARDWARE, BEST)


def timed(work: Workload) -> TimePlan:
    return time_plan(work, HARDWARE, BEST)


def test_operations_of_a_forward_pass() -> None:
    """Two a weight and token, half of the attention square, and the head where it is scored."""
    net = job().roles["actor"].network
    assert net.multiplied == WEIGHTS
    one = 2 * WEIGHTS * 512 + 4 * L * D * 512 * 512 / 2 + 2 * V * D * 257
    assert forward_operations(net, "causal", 3, 512, 257) == pytest.approx(3 * one)


def test_decoding_reads_weights_and_the_live_cache() -> None:
    work = job()  # 64 answers
    step = (2 * (WEIGHTS + V * D) + 64 * (256 + 128) * 2 * 2 * D * L) / 1e12
    assert clock(work).decode() == pytest.approx(255 * step)
    waves = job("rollout.micro_batch_size=32")
    half = (2 * (WEIGHTS + V * D) + 32 * (256 + 128) * 2 * 2 * D * L) / 1e12
    assert clock(waves).decode() == pytest.approx(2 * 255 * half)


def test_answers_to_one_prompt_share_its_prefill() -> None:
    many = job("ppo.samples_per_prompt=4", "ppo.batch_size=16")
    assert clock(many).prefill() == pytest.approx(clock(job()).prefill() / 4)


def test_training_passes() -> None:
    """A backward pass is two forward ones; checkpointing adds one, adapters alone take one off."""
    forward = forward_operations(job().roles["actor"].network, "causal", 64, 512, 257) / 1e14
    for overrides, factor in (((), 3), (("actor.gradient_checkpointing=true",), 4), (("lora@actor.lora=r8",), 2)):
        work = job(*overrides)
        beside = 3 * clock(work).adapters(work.roles["actor"])
        assert clock(work).train(work.roles["actor"]) == pytest.approx(factor * forward + beside), overrides
        assert (beside > 0) == ("lora@actor.lora=r8" in overrides)
    twice = job("ppo.epochs=2")
    assert clock(twice).train(twice.roles["actor"]) == pytest.approx(6 * forward)


def test_plain_text_trains_as_many_rows_again() -> None:
    work = job("data=ptx", "ppo.ptx_coef=27.8")
    net = work.roles["actor"].network
    texts = 3 * forward_operations(net, "causal", 64, 512, 512) / 1e14
    assert clock(work).train(work.roles["actor"]) == pytest.approx(clock(job()).train(job().roles["actor"]) + texts)
    assert clock(work).train(work.roles["critic"]) == clock(job()).train(job().roles["critic"])


def test_small_batches_take_as_long_as_their_launches() -> None:
    work = job("ppo.micro_batch_size=1")
    slow = Clock(work, HARDWARE, dataclasses.replace(BEST, eager_layer_us=1000.0))
    assert slow.train(work.roles["actor"]) == pytest.approx(64 * 3 * L * 1e-3)


def test_adapters_move_activations_beside_their_matrices() -> None:
    """Seven elements for each output of q, k, v, out, up and down, by every token of a micro-batch."""
    work = job("lora@actor.lora=r8", "ppo.micro_batch_size=16")
    outputs = L * (4 * D + F + D)
    assert clock(work).adapters(work.roles["actor"]) == pytest.approx(16 * 512 * 7 * outputs * 2 / 1e12)
    assert clock(work).adapters(work.roles["critic"]) == 0


def test_engines_take_time_for_every_tensor() -> None:
    """OPT-1.3B has 388: six matrices with biases and two norms a layer, two tables, a norm at the end."""
    slow = dataclasses.replace(BEST, gradient_tensor_us=1000.0, optimizer_tensor_us=500.0)
    work = job("ppo.micro_batch_size=16", "ppo.minibatch_size=32")
    actor = work.roles["actor"]
    assert Clock(work, HARDWARE, slow).train(actor) - clock(work).train(actor) == pytest.approx(4 * 388 * 1e-3)
    assert Clock(work, HARDWARE, slow).optimizer(actor) - clock(work).optimizer(actor) == pytest.approx(2 * 388 * 5e-4)
    adapted = job("lora@actor.lora=r128_only").roles["actor"]
    assert adapted.trained_tensors == 2 * 6 * L


@pytest.mark.parametrize("lora", ["none", "r8", "r128", "r128_only"])
@pytest.mark.parametrize("family", ["opt", "llama", "qwen2"])
def test_tensors_that_learn_are_those_of_the_network(family: str, lora: str) -> None:
    """Of a real one, adapters on; families with biases in all, some and no matrices."""
    made = config(family)
    actor = job(f"lora@actor.lora={lora}").roles["actor"]
    model = build_network(
        Blueprint(kind="causal", config=made, folder=None, lora=actor.lora, gradient_checkpointing=False, dtype=torch.float32),
        sharded=nullcontext(), gather=lambda _: nullcontext(), is_writer=True,
    )  # fmt: skip
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "tie_word_embeddings")
    shape = made.to_dict() | {name: getattr(made, name) for name in names}
    role = dataclasses.replace(actor, network=FAMILIES[made.model_type](shape))
    assert role.trained_tensors == sum(p.requires_grad for p in model.parameters())


def test_zero_3_takes_at_least_the_time_of_its_hooks() -> None:
    slow = dataclasses.replace(BEST, zero3_tensor_us=2e6, zero3_layer_tensor_us=1e6)
    words = ("zero@actor.zero=z3", "actor.gradient_checkpointing=true", "ppo.micro_batch_size=32", "ppo.score_micro_batch_size=16")
    work = job(*words)
    found = Clock(work, HARDWARE, slow)
    assert found.train(work.roles["actor"]) == pytest.approx(2 * 3 * 388)
    assert found.score(work.roles["actor"]) == pytest.approx(4 * 388)
    by_module, adapted = job(*words, "actor.zero.gather_layers=false"), job(*words, "lora@actor.lora=r128_only")
    assert Clock(by_module, HARDWARE, slow).score(by_module.roles["actor"]) == pytest.approx(4 * 388 * 2)
    assert Clock(adapted, HARDWARE, slow).score(adapted.roles["actor"]) == pytest.approx(4 * (388 + 2 * 6 * 24)), (
        "adapters are tensors, too"
    )
    assert found.score(work.roles["ref"]) == clock(work).score(work.roles["ref"]), "not sharded"


def test_the_cache_is_read_as_wide_as_the_kernel_works() -> None:
    assert [padded(width) for width in (64, 80, 96, 128)] == [64, 128, 128, 128]
    work = job("model@actor.model=opt-2.7b")  # heads of 80
    net = work.roles["actor"].network
    live = 64 * (256 + 128) * net.kv_width * net.layers * 2
    wide = Clock(work, HARDWARE, dataclasses.replace(BEST, pads_heads=True))
    assert wide.decode() - clock(work).decode() == pytest.approx(255 * live * (128 / 80 - 1) / 1e12)


def test_the_optimizer_moves_its_state() -> None:
    work = job("optimizer@ppo.actor_optimizer=fused_adam", "ppo.minibatch_size=16")
    assert clock(work).optimizer(work.roles["actor"]) == pytest.approx(4 * 1_315_758_080 * ADAM_BYTES["fused_adam"] / 1e12)
    away = job("zero@actor.zero=z2_offload", "optimizer@ppo.actor_optimizer=cpu_adam")
    p = 1_315_758_080
    assert clock(away).optimizer(away.roles["actor"]) == pytest.approx(30 * p / 30e9 + 4 * p / 10e9)


def test_collectives_within_and_between_nodes() -> None:
    """Within a node at the link's rate; between two nodes half of the whole enters each node once."""
    within, between = (
        job("trainer.devices=8"),
        job("trainer.devices=8", "trainer.num_nodes=2", "ppo.batch_size=128", "ppo.minibatch_size=128"),
    )
    assert clock(within).collective(7e9, 0) == pytest.approx(0.07)
    assert clock(between).collective(15e9, 0) == pytest.approx(max(0.15, 16e9 / 2 / 50e9))
    assert clock(job()).collective(1e9, 5) == 0


def test_zero_3_gathers_parameters_in_every_pass() -> None:
    work = job("trainer.devices=8", "zero@actor.zero=z3", "zero@ref.zero=z3")
    size = 2 * 1_315_758_080 * 7 / 8
    assert clock(work).communication(work.roles["ref"]) == pytest.approx(size / 100e9)
    assert clock(work).communication(work.roles["actor"]) == pytest.approx((3 + 1) * size / 100e9), "score, forward, backward; gradients"
    assert clock(work).gather() > size / 100e9


def test_the_total_is_that_of_its_phases() -> None:
    found = timed(job())
    assert set(found.seconds) == {"gather", "prefill", "decode", "score", "train actor", "train critic", "optimizer"}
    assert found.sequences_per_second == pytest.approx(64 / sum(found.seconds.values()))
    assert timed(job("ppo.old_logprobs=rollout")).seconds["score"] < found.seconds["score"]
    assert set(timed(job(step="sft")).seconds) == {"train actor", "optimizer"}
    assert set(timed(job(step="dpo")).seconds) == {"score", "train actor", "optimizer"}


def test_without_rates_nothing_is_said() -> None:
    nothing = time_plan(job(), dataclasses.replace(HARDWARE, tflops_16bit=0.0), BEST)
    assert (nothing.seconds, nothing.total, nothing.sequences_per_second) == ({}, 0.0, 0.0)


def test_the_measured_rollout_of_the_hybrid_engine() -> None:
    """OPT-1.3B, batch 64 and 128, 256 + 256 tokens on one H100: 18,080 and 23,259 tokens a second (experiments/hybrid_engine)."""
    from plans import settings

    for batch, rate in ((64, 18_080), (128, 23_259)):
        work = job(f"ppo.batch_size={batch}", f"ppo.minibatch_size={batch}")
        cfg = settings("ppo", "model@actor.model=opt-1.3b")
        found = time_plan(work, cfg.hardware, cfg.plan.efficiency).seconds
        assert batch * 256 / (found["gather"] + found["prefill"] + found["decode"]) == pytest.approx(rate, rel=0.05)


def test_ranks_that_cannot_talk_are_refused() -> None:
    several = job("trainer.devices=8", "trainer.num_nodes=2", "ppo.batch_size=128", "ppo.minibatch_size=128")
    for key in ("link_gbs", "network_gbs"):
        with pytest.raises(UserError, match=rf"hardware.{key}=0, but 16 ranks exchange data"):
            time_plan(several, dataclasses.replace(HARDWARE, **{key: 0.0}), BEST)
    assert time_plan(job(), dataclasses.replace(HARDWARE, link_gbs=0.0, network_gbs=0.0), BEST).total > 0, "one rank needs neither"
