"""What only a GPU can show: fp16 with aligned overflow, bf16 at every stage, offload, quantised frozen weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_reward
from jobs import column, composed, run_together
from tiny import config, write_pairs

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def cuda() -> None:
    """These tests undo the CPU setting of conftest; run them alone: `pytest -m gpu tests/gpu`."""
    os.environ.pop("DS_ACCELERATOR", None)
    from rlhf.engines.launcher import prepare_rank

    prepare_rank(_trainer())
    import deepspeed

    deepspeed.init_distributed("nccl")


def _trainer() -> Any:
    from rlhf.config import build

    return build(composed("sft", "trainer=gpu", "run_dir=unused")).trainer


def _engine(zero: str, precision: str) -> Any:
    import deepspeed

    from rlhf.config import build
    from rlhf.engines.config import EngineSpec, Training, engine_config
    from rlhf.engines.gather import gathered_for_writing, sharded_init
    from rlhf.engines.optimizers import build_optimizer, build_scheduler
    from rlhf.models.factory import Blueprint, build_network

    adam = "cpu_adam" if "offload" in zero else "adamw"
    cfg = build(composed("sft", f"zero@actor.zero={zero}", "run_dir=unused", "sft.optimizer.grad_clip=0", f"sft.optimizer.name={adam}"))
    training = Training(
        optimizer=cfg.sft.optimizer, scheduler=cfg.sft.scheduler, total_steps=10, lora=cfg.actor.lora, micro_batch_size=2, accumulation=1
    )
    spec = EngineSpec(zero=cfg.actor.zero, precision=precision, training=training, reloadable=False)
    blueprint = Blueprint(kind="causal", config=config("llama"), folder=None, lora=None, gradient_checkpointing=False, dtype=torch.float16)
    torch.manual_seed(0)
    network = build_network(blueprint, sharded=sharded_init(spec), gather=gathered_for_writing, is_writer=True)
    optimizer = build_optimizer(network, training)
    engine, *_ = deepspeed.initialize(
        model=network,
        optimizer=optimizer,
        lr_scheduler=build_scheduler(optimizer, training),
        config=engine_config(spec),
        dist_init_required=False,
    )
    return engine


@pytest.mark.parametrize("zero", ["z0", "z1", "z2", "z3", "z2_offload", "z3_offload"])
def test_one_overflow_skips_both_steps_and_only_its_own_scale_falls(zero: str) -> None:
    from rlhf.engines.gather import gathered
    from rlhf.engines.overflow import align_overflow, has_overflow, loss_scale

    engines = {"actor": _engine(zero, "fp16"), "critic": _engine(zero, "fp16")}
    ids = torch.randint(4, 60, (2, 8), device="cuda")
    mask = torch.ones_like(ids, dtype=torch.bool)

    def scale(engine: Any) -> float:
        return float(getattr(engine.optimizer, "loss_scale_config" if zero == "z0" else "loss_scaler").cur_scale)

    def weights() -> list[torch.Tensor]:
        found = []
        for engine in engines.values():
            parameter = engine.module.model.get_input_embeddings().weight
            with gathered([parameter]):
                found.append(parameter.detach().float().cpu().clone())
        return found

    def step(factor: float, context: Any) -> dict[str, bool]:
        for role, engine in engines.items():
            loss = engine(ids, mask).float().logsumexp(-1).mean()
            engine.backward(loss * ((factor if role == "actor" else 1.0) * loss_scale(engine)), scale_wrt_gas=False)
        flags = {role: has_overflow(engine) for role, engine in engines.items()}
        with context:
            for engine in engines.values():
                engine.step()
        return flags

    before = weights()
    scales = [scale(engine) for engine in engines.values()]
    assert step(1e6, align_overflow(engines)) == {"actor": True, "critic": False}
    assert all(torch.equal(a, b) for a, b in zip(before, weights(), strict=True))
    after = [scale(engine) for engine in engines.values()]
    assert after[0] <= scales[0]  # hysteresis may keep the first overflow's scale
    assert after[1] == scales[1]
    for _ in range(12):
        flags = step(1.0, align_overflow(engines))
    assert flags == {"actor": False, "critic": False}
    assert not any(torch.equal(a, b) for a, b in zip(before, weights(), strict=True))


QUANTISED = tuple(f"actor.model.shape.{key}" for key in ("hidden_size=768", "num_attention_heads=12", "num_key_value_heads=12"))
"""DeepSpeed quantises tensors of more than half a million weights, such as 768 x 768."""
OFFLOADED = (
    "zero@actor.zero=z3_offload", "zero@critic.zero=z2_offload", "ppo.actor_optimizer.name=cpu_adam", "ppo.critic_optimizer.name=cpu_adam",
)  # fmt: skip
JOBS = {
    "bf16 stage 0": ("trainer.precision=bf16",),
    "bf16 stage 3": ("trainer.precision=bf16", "zero@actor.zero=z3", "zero@critic.zero=z3", "zero@ref.zero=z3", "zero@reward.zero=z3"),
    "fp16 stage 0": ("trainer.precision=fp16",),
    "fp16 stage 2": ("trainer.precision=fp16", "zero@actor.zero=z2", "zero@critic.zero=z2"),
    "bf16 offload": ("trainer.precision=bf16", *OFFLOADED),
    "fp16 offload": ("trainer.precision=fp16", *OFFLOADED),
    "fp16 mixz": ("trainer.precision=fp16", "zero@actor.zero=mixz", "lora@actor.lora=r8", *QUANTISED),
    "bf16 lora": ("trainer.precision=bf16", "lora@actor.lora=r8", "zero@actor.zero=z2", "actor.gradient_checkpointing=true"),
    "bf16 shared": ("trainer.precision=bf16", "lora@actor.lora=r8", "zero@actor.zero=z3", "ref.shared=true"),
    "bf16 fused": ("trainer.precision=bf16", "ppo.actor_optimizer.name=fused_adam", "ppo.critic_optimizer.name=fused_adam"),
}  # fmt: skip


@pytest.mark.parametrize("name", JOBS)
def test_ppo_runs_and_starts_on_policy(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Sharded

    from rlhf.cli.rank import run_rank

    quantised, quantise = [], Sharded.quantize_nontrainable_params

    def counted(optimizer: Any) -> None:
        quantise(optimizer)
        quantised.extend(p for p in optimizer.module.parameters() if hasattr(p.ds_tensor, "ds_quant_scale"))

    monkeypatch.setattr(Sharded, "quantize_nontrainable_params", counted)

    job = composed(
        "ppo", "trainer=gpu", "model@actor.model=tiny", "model@critic.model=tiny", "model@reward.model=tiny", "data=pairs",
        f"data.path={write_pairs(tmp_path / 'pairs.jsonl', 64)}", "data.max_prompt_tokens=12", "data.max_answer_tokens=8", "ppo.iterations=3",
        "ppo.batch_size=8", "ppo.minibatch_size=8", "ppo.micro_batch_size=8", "ppo.score_micro_batch_size=8", "callbacks=none",
        "ppo.actor_optimizer.lr=1e-3", "ppo.critic_optimizer.lr=1e-3", f"run_dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'cache'}",
        *JOBS[name],
    )  # fmt: skip
    (tmp_path / "run").mkdir()
    run_rank(job)
    assert bool(quantised) == ("mixz" in name)
    assert column(tmp_path / "run", "actor/ratio_first")[0] == pytest.approx(1.0, abs=0.02)
    assert abs(column(tmp_path / "run", "rollout/kl")[0]) < 0.02
    assert max(column(tmp_path / "run", "rollout/mismatch_abs")) < 0.02, "the decoder is not the network that learns"
    assert all(torch.isfinite(torch.tensor(column(tmp_path / "run", "critic/loss"))))
    assert (tmp_path / "run" / "export" / "actor" / "model.safetensors").is_file()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_each_rank_scores_with_a_model_on_its_own_gpu(tmp_path: Path) -> None:
    """The scorer's model is loaded before Lightning chooses a rank's device."""
    save_reward(tmp_path / "scorer")
    job = composed(
        "ppo", "trainer=gpu", "trainer.devices=2", "model@actor.model=tiny", "model@critic.model=tiny", "data=pairs",
        f"data.path={write_pairs(tmp_path / 'pairs.jsonl', 64)}", "data.max_prompt_tokens=12", "data.max_answer_tokens=8", "ppo.iterations=2",
        "ppo.batch_size=8", "ppo.minibatch_size=8", "ppo.micro_batch_size=4", "ppo.score_micro_batch_size=4", "callbacks=none",
        "ppo.reward_source=function", "ppo.reward_function=rlhf.models.scorer.ScalarScorer", f"run_dir={tmp_path / 'run'}",
        f"+ppo.reward_function_kwargs.path={tmp_path / 'scorer'}", "+ppo.reward_function_kwargs.threshold=0.0",
        f"data.cache_dir={tmp_path / 'cache'}",
    )  # fmt: skip
    run_together([job], world=2)
    assert len(column(tmp_path / "run", "rollout/reward")) == 2
