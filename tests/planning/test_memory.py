"""Parts of memory against numbers worked out by hand, and rules that must hold for any job."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import NOTHING, job

from rlhf.planning import states
from rlhf.planning.fit import shard_all, with_batch
from rlhf.planning.memory import Phase, Reserve, memory_plan
from rlhf.planning.workload import Workload

P = 1_315_758_080  # OPT-1.3B
C = 331_196_416 + 512  # OPT-350M with a scalar head
BUCKET = 500_000_000


def part(work: Workload, phase: str, role: str, name: str) -> float:
    return named(work, phase).of(role=role, part=name)


def named(work: Workload, phase: str) -> Phase:
    return next(p for p in memory_plan(work, NOTHING).phases if p.name == phase)


def test_bf16_on_one_gpu_by_hand() -> None:
    """bf16 at stage 0 runs at stage 1: 16-bit weights, an fp32 master and two moments, two reduction buckets in the backward pass."""
    work = job("ppo.micro_batch_size=8", "optimizer@ppo.actor_optimizer=fused_adam")
    assert part(work, "generate", "actor", "weights") == part(work, "generate", "ref", "weights") == 2 * P
    assert part(work, "generate", "critic", "weights") == part(work, "generate", "reward", "weights") == 2 * C
    assert part(work, "score", "actor", "optimizer") == 12 * P
    assert part(work, "score", "ref", "optimizer") == part(work, "score", "actor", "gradients") == 0
    assert part(work, "train actor", "actor", "reduce buffers") == 2 * 2 * BUCKET
    assert part(work, "train critic", "actor", "reduce buffers") == 2 * 2 * BUCKET, "kept until the last micro-batch of the step"
    assert part(work, "train critic", "actor", "gradients") == 2 * P, "they wait for the step"
    assert part(work, "update", "actor", "gradients") == 2 * P
    assert part(work, "update", "actor", "step") == (2 + 4) * P, "flat, then fp32"
    assert part(job(), "update", "actor", "step") == (4 + 4) * P, "torch's AdamW has a temporary of its own"


def test_buckets_without_accumulation_live_in_their_own_backward_pass() -> None:
    """They come with the first gradient, behind the head, and go at the end of the pass (seen on an H100: experiments/planner_memory, e and f)."""
    rows = ("ppo.batch_size=64", "ppo.minibatch_size=64", "ppo.micro_batch_size=null")
    whole = job(*rows, actor="opt-125m")
    assert part(whole, "train actor", "actor", "logits") > 0, "the head is this job's worst moment"
    assert part(whole, "train actor", "actor", "reduce buffers") == part(whole, "train critic", "actor", "reduce buffers") == 0
    assert part(job(*rows, "zero@actor.zero=z2", "ppo.micro_batch_size=8"), "train critic", "actor", "reduce buffers") == 0


def test_scoring_counts_a_layer_or_the_head() -> None:
    """64 rows of 512 tokens through OPT-1.3B: the head is larger, by its logits; with 8 rows likewise. A layer's tensors are gone by then."""
    work = job("ppo.batch_size=64", "ppo.score_micro_batch_size=null", "ppo.minibatch_size=64")
    tokens = 64 * 512
    assert part(work, "score", "actor", "activations") + part(work, "score", "ref", "activations") == 2 * 2 * 2048 * tokens
    assert named(work, "score").of(part="logits") > 2 * 64 * 256 * 50272


def test_fp32_has_no_master_at_stage_0() -> None:
    work = job("trainer.precision=fp32")
    assert part(work, "score", "actor", "weights") == 4 * P
    assert part(work, "score", "actor", "optimizer") == 8 * P
    assert part(work, "train actor", "actor", "reduce buffers") == 0
    assert part(job("trainer.precision=fp32", "zero@actor.zero=z2"), "score", "actor", "optimizer") == 12 * P
    assert part(job("trainer.precision=fp32", "zero@actor.zero=z3"), "score", "actor", "optimizer") == 8 * P


@pytest.mark.parametrize(("stage", "weights", "optimizer"), [("z1", P, P / 8), ("z2", P, P / 8), ("z3", P / 8, P / 8)])
def test_stages_split_over_ranks(stage: str, weights: float, optimizer: float) -> None:
    work = job("trainer.devices=8", f"zero@actor.zero={stage}")
    assert part(work, "score", "actor", "weights") == 2 * weights
    assert part(work, "score", "actor", "optimizer") == 12 * optimizer
    assert part(work, "update", "actor", "gradients") == 2 * P / 8
    assert part(work, "score", "ref", "weights") == 2 * P, "a frozen role is whole below stage 3"


def test_between_micro_batches_stage_1_keeps_whole_gradients() -> None:
    one, many = (job("trainer.devices=8", "zero@actor.zero=z1", f"ppo.micro_batch_size={n}") for n in (8, 4))
    assert part(one, "train critic", "actor", "gradients") == 2 * P / 8
    assert part(many, "train critic", "actor", "gradients") == 2 * P
    assert part(many, "update", "actor", "gradients") == 2 * P / 8
    away = job("trainer.devices=8", "zero@actor.zero=z2", "ppo.micro_batch_size=4")
    assert part(away, "train critic", "actor", "gradients") == 2 * P / 8


def test_zero_3_holds_its_bucket_and_gradients_all_the_time() -> None:
    work = job("trainer.devices=8", "zero@actor.zero=z3", "zero@ref.zero=z3")
    assert part(work, "generate", "actor", "gradients") == 2 * P / 8
    assert part(work, "generate", "actor", "reduce buffers") == 2 * BUCKET
    assert part(work, "generate", "ref", "weights") == 2 * P / 8
    assert part(work, "train actor", "actor", "gather buffers") == 2 * (30_000_000 + 50272 * 2048)


def test_offload_moves_state_to_the_host() -> None:
    work = job("zero@actor.zero=z2_offload", "optimizer@ppo.actor_optimizer=cpu_adam")
    assert part(work, "update", "actor", "optimizer") == part(work, "update", "actor", "gradients") == 0
    pinned = 2**33 + 2**33 + 2**32  # master, fp32 gradients, 16-bit weights, each rounded up to a power of two
    assert memory_plan(work, NOTHING).host["offloaded"] == 8 * P + pinned
    whole = job("zero@actor.zero=z3_offload", "optimizer@ppo.actor_optimizer=cpu_adam")
    assert part(whole, "score", "actor", "weights") == 0


def test_networks_are_built_on_the_host_by_every_rank() -> None:
    built = "networks being built"
    assert memory_plan(job("trainer.devices=4"), NOTHING).host[built] == 4 * 2 * (2 * P + 2 * C)
    sharded = job("trainer.devices=4", "zero@actor.zero=z3", "zero@ref.zero=z3")
    assert memory_plan(sharded, NOTHING).host[built] == 4 * 2 * 2 * C


def test_lora_trains_adapters_alone_or_with_what_it_does_not_adapt() -> None:
    rows = 24 * (4 * 2 * 2048 + 2 * (2048 + 8192)) * 128
    matrices = 24 * (4 * (2048**2 + 2048) + (2 * 2048 * 8192 + 8192 + 2048))
    only, both = job("lora@actor.lora=r128_only").roles["actor"], job("lora@actor.lora=r128").roles["actor"]
    assert only.adapters == only.trainable == rows
    assert both.trainable == P - matrices + rows
    critic = job("lora@critic.lora=r128_only").roles["critic"]
    assert critic.trainable == critic.adapters + 512, "the scalar head learns, too"
    some = job("lora@actor.lora=r128_only", "actor.lora.target_modules=[q_proj,v_proj]").roles["actor"]
    assert some.adapters == 24 * 2 * 2 * 2048 * 128


def test_the_average_is_kept_in_fp32() -> None:
    assert part(job("callbacks=ema"), "score", "actor", "EMA") == 4 * P
    assert part(job("callbacks=ema", "trainer.devices=2"), "score", "actor", "EMA") == 2 * P


def test_pairs_are_two_rows_and_a_step_has_its_roles() -> None:
    reward = job("model@reward.model=opt-350m", "rm.batch_size=8", step="reward")
    assert (set(reward.roles), reward.micro, reward.global_batch) == ({"reward"}, 16, 8)
    dpo = job("dpo.batch_size=8", "dpo.micro_batch_size=2", step="dpo")
    assert (set(dpo.roles), dpo.batch, dpo.micro) == ({"actor", "ref"}, 16, 4)
    sft = job("sft.batch_size=8", step="sft")
    assert (set(sft.roles), sft.micro, sft.scored) == ({"actor"}, 8, 512)
    assert [phase.name for phase in memory_plan(sft, NOTHING).phases] == ["train actor", "update"]


def test_critic_free_advantages_and_reward_functions_need_fewer_roles() -> None:
    critic_free = job("ppo=rloo", "ppo.samples_per_prompt=4", "ppo.batch_size=16")
    assert set(critic_free.roles) == {"actor", "ref", "reward"}
    assert "train critic" not in [phase.name for phase in memory_plan(critic_free, NOTHING).phases]


def test_the_reserve_is_part_of_every_phase() -> None:
    reserve = Reserve(context=1e9, communication=2e9, fragmentation=0.5, process=0.0)
    one, two = (memory_plan(job(f"trainer.devices={n}"), reserve) for n in (1, 2))
    for phase in one.phases:
        assert phase.of(part="reserve") == pytest.approx(1e9 + 0.5 * phase.allocated)
    assert two.phases[0].of(part="reserve") == pytest.approx(3e9 + 0.5 * two.phases[0].allocated)


# --- rules --------------------------------------------------------------------------------------------------------------------------


JOBS = {
    name: job("ppo.batch_size=64", "ppo.minibatch_size=64", *overrides)
    for name, overrides in {
        "plain": (), "micro": ("ppo.micro_batch_size=4",), "lora": ("lora@actor.lora=r128",), "ckpt": ("actor.gradient_checkpointing=true",),
        "fp16": ("trainer.precision=fp16",), "ema": ("callbacks=ema",),
    }.items()
}  # fmt: skip
STAGES = st.sampled_from([1, 2, 3])


def on(work: Workload, ranks: int) -> Workload:
    """The same work of a rank, on more of them."""
    return dataclasses.replace(work, ranks=ranks, per_node=min(ranks, 8), nodes=max(1, ranks // 8), global_batch=work.batch * ranks)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(JOBS)), STAGES, st.integers(1, 9), st.integers(1, 3))
def test_more_gpus_never_need_more_memory_each(name: str, stage: int, power: int, more: int) -> None:
    _, work = shard_all(JOBS[name], stage)
    few, many = (memory_plan(on(work, 2**n), NOTHING) for n in (power, power + more))
    for one, other in zip(few.phases, many.phases, strict=True):
        assert other.total <= one.total


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(JOBS)), st.integers(1, 200), st.integers(1, 50))
def test_larger_batches_need_more(name: str, rows: int, more: int) -> None:
    work = JOBS[name]
    unit = work.micro if work.micro < work.minibatch else 1
    small, large = (memory_plan(with_batch(work, n * unit), NOTHING).peak for n in (rows, rows + more))
    assert small <= large


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(list(JOBS)), STAGES)
def test_sharding_further_never_needs_more_in_training(name: str, stage: int) -> None:
    work = on(JOBS[name], 8)
    _, less = shard_all(work, stage)
    role = less.roles["actor"]
    unsharded = dataclasses.replace(role, stage=1, zero=dataclasses.replace(role.zero, stage=1))
    assert states.standing(role, less).weights <= states.weights(unsharded, less)
    assert states.standing(role, less).optimizer <= states.standing(work.roles["actor"], work).optimizer


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["plain", "micro", "lora", "fp16", "ema"]))
def test_checkpointing_never_needs_more(name: str) -> None:
    work = JOBS[name]
    actor = dataclasses.replace(work.roles["actor"], checkpointing=True)
    light = dataclasses.replace(work, roles=work.roles | {"actor": actor})
    assert named(light, "train actor").total <= named(work, "train actor").total
