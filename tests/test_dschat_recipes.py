"""Every recipe of DeepSpeed-Chat composes, passes the rules, says what the original's script says, and stands in docs/recipes.md.

The tables below were typed from the scripts (DeepSpeedExamples, applications/DeepSpeed-Chat), not from conf/. Runs no job.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from jobs import composed

from rlhf.config import build
from rlhf.rules import check

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "conf" / "experiment" / "dschat"
BASES = {"sft", "reward", "dpo", "ppo"}
"""What the recipes of a step have in common; each is named by its verb."""
SHORT = {"opt-13b": "ppo_opt-13b_single_node", "opt-66b": "ppo_opt-66b_multi_node", "opt-175b": "ppo_opt-66b_multi_node"}
"""Short names and the recipes that they are made of."""
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem not in BASES | set(SHORT))

FOUR = {"rm_static", "full_hh_rlhf", "synthetic_instruct", "rlhf_reward_datasets"}
ONE = {"rm_static"}
CHINESE = {"zhihu_kol", "miracl_zh", "hc3_chinese", "mkqa_zh"}
JAPANESE = {"mkqa_ja", "miracl_ja", "qg_jaquad", "qag_jaquad"}

# name: model, sets, split, GPUs, ZeRO stage, examples a GPU, accumulation, rate, weight decay, epochs, LoRA rank, LoRA only, checkpointing
SFT: dict[str, tuple[Any, ...]] = {
    "opt-1.3b_single_gpu": ("opt-1.3b", ONE, [2, 4, 4], 1, 0, 16, 8, 1e-3, 0, 1, 128, False, False),
    "opt-6.7b_lora_single_gpu": ("opt-6.7b", FOUR, [2, 4, 4], 1, 0, 8, 16, 1e-3, 0, 16, 128, False, True),
    "opt-1.3b_single_node": ("opt-1.3b", FOUR, [2, 4, 4], 8, 2, 8, 1, 9.65e-6, 0, 16, 0, False, False),
    "opt-1.3b_lora_single_node": ("opt-1.3b", FOUR, [2, 4, 4], 8, 0, 8, 1, 1e-3, 0.1, 16, 128, True, False),
    "opt-6.7b_single_node": ("opt-6.7b", FOUR, [2, 4, 4], 8, 3, 6, 1, 9.65e-6, 0, 16, 0, False, True),
    "opt-13b_single_node": ("opt-13b", FOUR, [2, 4, 4], 8, 3, 4, 1, 1e-4, 0, 16, 128, False, True),
    "opt-30b_lora_single_node": ("opt-30b", FOUR, [2, 4, 4], 8, 3, 4, 1, 9.65e-6, 0, 16, 128, False, True),
    "opt-66b_multi_node": ("opt-66b", FOUR, [2, 4, 4], 64, 3, 4, 1, 1e-4, 0.1, 2, 128, False, True),
    "llama2-7b": ("llama2-7b", FOUR, [2, 4, 4], 8, 3, 4, 1, 9.65e-6, 0, 4, 0, False, True),
    "llama2-7b_lora": ("llama2-7b", FOUR, [2, 4, 4], 8, 3, 4, 1, 9.65e-6, 0, 4, 128, False, True),
    "bloom-1b1_chinese": ("bloom-1b1", CHINESE, [10, 0, 0], 8, 2, 8, 1, 9.65e-6, 0, 16, 0, False, False),
    "mgpt_japanese": ("mgpt", JAPANESE, [10, 0, 0], 8, 2, 8, 1, 9.65e-6, 0, 16, 0, False, False),
}

# name: model, sets, GPUs, ZeRO stage, offload, pairs a GPU, accumulation, rate (reward), rate (dpo), dropout, LoRA rank, checkpointing
PAIRS: dict[str, tuple[Any, ...]] = {
    "opt-350m_single_gpu": ("opt-350m", ONE, 1, 0, False, 16, 4, 5e-5, 1e-3, 0.0, 0, False),
    "opt-350m_single_node": ("opt-350m", FOUR, 8, 0, False, 4, 1, 5e-5, 5e-5, 0.0, 0, False),
    "opt-350m_multi_node": ("opt-350m", FOUR, 64, 0, False, 2, 1, 5e-5, 5e-5, 0.0, 0, False),
    "llama2-7b": ("llama2-7b", ONE, 8, 3, True, 8, 1, 9.65e-6, 9.65e-6, None, 0, True),
    "llama2-7b_lora": ("llama2-7b", ONE, 8, 3, True, 8, 1, 9.65e-6, 9.65e-6, None, 128, True),
}

# name: actor, critic, GPUs, ZeRO stage, prompts a GPU, accumulation, actor's rate, weight decay, LoRA ranks, checkpointing (actor,
# critic), hybrid engine, TP, layers gathered, ref offloaded
PPO: dict[str, tuple[Any, ...]] = {
    "opt-1.3b_single_gpu": ("opt-1.3b", "opt-350m", 1, 0, 16, 2, 9.65e-6, 0, (128, 0), (True, False), True, 1, 8, False),
    "opt-6.7b_lora_single_gpu": ("opt-6.7b", "opt-350m", 1, 0, 8, 16, 5e-4, 0, (128, 0), (True, True), True, 1, 8, False),
    "opt-1.3b_single_node": ("opt-1.3b", "opt-350m", 8, 2, 4, 1, 9.65e-6, 0, (0, 0), (False, False), True, 1, 8, False),
    "opt-1.3b_lora_single_node": ("opt-1.3b", "opt-350m", 8, 2, 4, 1, 9.65e-6, 0, (128, 0), (False, False), True, 1, 8, False),
    "opt-6.7b_single_node": ("opt-6.7b", "opt-350m", 8, 3, 4, 1, 9.65e-6, 0.1, (0, 0), (True, False), True, 1, 8, False),
    "opt-13b_single_node": ("opt-13b", "opt-350m", 8, 3, 16, 1, 5e-4, 0, (128, 0), (True, False), True, 2, 8, False),
    "opt-30b_lora_single_node": ("opt-30b", "opt-350m", 8, 3, 4, 1, 5e-4, 0, (128, 0), (True, False), True, 1, 8, False),
    "opt-66b_multi_node": ("opt-66b", "opt-350m", 64, 3, 4, 1, 5e-4, 0.1, (128, 0), (True, False), True, 8, 4, False),
    "llama2-7b": ("llama2-7b", "llama2-7b", 8, 3, 1, 1, 9.65e-6, 0.1, (0, 0), (True, True), True, 1, 8, True),
    "llama2-7b_lora": ("llama2-7b", "llama2-7b", 8, 3, 1, 1, 9.65e-6, 0.1, (64, 64), (True, True), True, 1, 8, True),
    "llama2-7b_mixz": ("llama2-7b", "llama2-7b", 8, 3, 1, 1, 9.65e-6, 0.1, (64, 64), (True, True), False, 1, 8, True),
}


def recipe(name: str) -> Any:
    """The checked settings of a recipe, under the verb that its name begins with."""
    cfg = build(composed(name.partition("_")[0], f"experiment=dschat/{name}", "run_dir=runs/x"))
    check(cfg)
    return cfg


def common(cfg: Any, gpus: int) -> None:
    """What section "Common" of the scripts says of every step."""
    assert (cfg.seed, cfg.trainer.precision, cfg.trainer.accelerator) == (1234, "fp16", "cuda")
    assert cfg.trainer.devices * cfg.trainer.num_nodes == gpus and cfg.trainer.devices == min(gpus, 8)
    assert cfg.data.max_prompt_tokens + cfg.data.max_answer_tokens == 512


def sets(cfg: Any) -> set[str]:
    return {*cfg.data.sources, *cfg.data.sft_only}


def supervised(cfg: Any, step: Any, gpus: int, examples: int, accumulation: int, rate: float, decay: float) -> None:
    common(cfg, gpus)
    assert (step.batch_size, step.micro_batch_size) == (examples * accumulation * gpus, examples)
    assert (step.scheduler.name, step.scheduler.warmup, step.scheduler.min_lr_ratio) == ("cosine", 0, 0)
    assert optimizer(step.optimizer) == (rate, decay, [0.9, 0.95], 1e-8, 1.0)
    assert step.max_steps is None


def optimizer(settings: Any) -> tuple[Any, ...]:
    return settings.lr, settings.weight_decay, settings.betas, settings.eps, settings.grad_clip


def lora(role: Any) -> int:
    """The rank, after what every run with adapters has: their own rate and an update scaled by 1 / rank."""
    if role.lora.rank:
        assert (role.lora.lr, role.lora.alpha, role.lora.dropout, role.lora.target_modules) == (5e-4, 1.0, 0.0, "all-linear")
    return role.lora.rank


def test_there_is_a_recipe_for_every_script() -> None:
    expected = {f"sft_{name}" for name in SFT} | {f"{verb}_{name}" for verb in ("reward", "dpo") for name in PAIRS}
    assert set(RECIPES) == expected | {f"ppo_{name}" for name in PPO}


@pytest.mark.parametrize("name", SFT)
def test_an_sft_recipe_says_what_its_script_says(name: str) -> None:
    model, data, split, gpus, stage, examples, accumulation, rate, decay, epochs, rank, only, checkpointing = SFT[name]
    cfg = recipe(f"sft_{name}")
    supervised(cfg, cfg.sft, gpus, examples, accumulation, rate, decay)
    assert (cfg.actor.model.name, sets(cfg), cfg.data.split, cfg.data.overlong) == (model, data, split, "cut")
    assert (cfg.actor.zero.stage, cfg.actor.zero.offload_optimizer, cfg.sft.optimizer.name) == (stage, False, "fused_adam")
    assert (cfg.sft.epochs, cfg.sft.loss_on, cfg.actor.dropout) == (epochs, "all", None)
    assert (lora(cfg.actor), cfg.actor.lora.only, cfg.actor.gradient_checkpointing) == (rank, only, checkpointing)


@pytest.mark.parametrize("verb", ["reward", "dpo"])
@pytest.mark.parametrize("name", PAIRS)
def test_a_recipe_on_pairs_says_what_its_script_says(name: str, verb: str) -> None:
    model, data, gpus, stage, offload, examples, accumulation, reward_rate, dpo_rate, dropout, rank, checkpointing = PAIRS[name]
    cfg = recipe(f"{verb}_{name}")
    role, step = (cfg.reward, cfg.rm) if verb == "reward" else (cfg.actor, cfg.dpo)
    supervised(cfg, step, gpus, examples, accumulation, reward_rate if verb == "reward" else dpo_rate, 0.1)
    assert (role.model.name, sets(cfg), cfg.data.split, cfg.data.overlong, step.epochs) == (model, data, [2, 4, 4], "cut", 1)
    assert (role.zero.stage, role.zero.offload_optimizer, role.zero.offload_params) == (stage, offload, offload)
    assert step.optimizer.name == ("cpu_adam" if offload else "fused_adam")
    assert (lora(role), role.dropout, role.gradient_checkpointing) == (rank, dropout, checkpointing)
    if verb == "reward":
        assert step.loss == "tokens"
    else:
        assert (step.loss, step.beta, step.label_smoothing) == ("sigmoid", 0.1, 0.0)
        assert (cfg.ref.zero.stage, cfg.ref.zero.offload_params) == (3 if stage == 3 else 0, False)


@pytest.mark.parametrize("name", PPO)
def test_a_ppo_recipe_says_what_its_script_says(name: str) -> None:
    actor, critic, gpus, stage, prompts, accumulation, rate, decay, ranks, checkpointing, hybrid, tp, gathered, ref_offloaded = PPO[name]
    cfg = recipe(f"ppo_{name}")
    ppo, whole = cfg.ppo, prompts * accumulation * gpus
    common(cfg, gpus)
    assert (cfg.actor.model.name, cfg.critic.model.name, cfg.reward.model.name) == (actor, critic, critic)
    assert (sets(cfg), cfg.data.split, cfg.data.max_prompt_tokens, cfg.rollout.max_new_tokens) == (ONE, [2, 4, 4], 256, 256)
    assert (cfg.data.overlong, ppo.iterations, ppo.epochs, ppo.samples_per_prompt) == ("drop", None, 1, 1)
    assert (ppo.batch_size, ppo.minibatch_size, ppo.micro_batch_size, cfg.rollout.micro_batch_size) == (whole, whole, prompts, prompts)
    assert optimizer(ppo.actor_optimizer) == (rate, decay, [0.9, 0.95], 1e-8, 1.0)
    assert optimizer(ppo.critic_optimizer) == (5e-6, decay, [0.9, 0.95], 1e-8, 1.0)
    assert {(s.name, s.warmup) for s in (ppo.actor_scheduler, ppo.critic_scheduler)} == {("cosine", 100)}
    assert (cfg.actor.zero.stage, cfg.critic.zero.stage) == (stage, stage)
    assert (cfg.ref.zero.stage, cfg.reward.zero.stage) == ((3, 3) if stage == 3 else (0, 0))
    assert (cfg.ref.zero.offload_params, cfg.actor.zero.offload_optimizer) == (ref_offloaded, False)
    assert cfg.actor.zero.quantized_weights is (name == "llama2-7b_mixz") and not cfg.critic.zero.quantized_weights
    assert (lora(cfg.actor), lora(cfg.critic)) == ranks and not cfg.actor.lora.only
    assert (cfg.actor.gradient_checkpointing, cfg.critic.gradient_checkpointing) == checkpointing
    assert (cfg.rollout.engine == "hybrid_engine", cfg.tp.size, cfg.rollout.tp_gather_partition_size) == (hybrid, tp, gathered)
    assert (cfg.actor.dropout, cfg.critic.dropout) == (0.0, None)


def test_the_constants_of_its_ppo_trainer() -> None:
    ppo = recipe(f"ppo_{next(iter(PPO))}").ppo
    assert (ppo.kl_coef, ppo.kl_target, ppo.reward_clip, ppo.clip_range, ppo.value_clip_range) == (0.1, None, 5, 0.2, 0.2)
    assert (ppo.gamma, ppo.gae_lambda, ppo.entropy_coef, ppo.whiten_advantages, ppo.reward_scaling) == (1, 0.95, 0, False, False)
    assert ppo.value_loss_coef == 1.0, "the factor 0.5 is in the loss"


@pytest.mark.parametrize("name", SHORT)
def test_a_short_name_is_its_recipe(name: str) -> None:
    changed = {} if name in SHORT[name] else {"model@actor.model": "opt-175b", "rollout.tp_gather_partition_size": 1}
    long = composed("ppo", f"experiment=dschat/{SHORT[name]}", "run_dir=runs/x", *(f"{key}={value}" for key, value in changed.items()))
    assert composed("ppo", f"experiment=dschat/{name}", "run_dir=runs/x") == long


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_short_and_names_its_script(name: str) -> None:
    lines = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 50 and max(map(len, lines)) <= 140
    assert re.search(r"training_scripts/[\w./-]+\.sh", lines[1])
    values = [line for line in lines if re.search(r": [\d.]", line)]
    unexplained = [line for line in values if " # " not in line and "micro_batch_size" not in line and "num_nodes" not in line]
    assert unexplained == [], "each value with its source"


@pytest.mark.parametrize("name", RECIPES)
def test_the_page_has_a_command_that_composes(name: str) -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and re.search(rf"experiment=dschat/{re.escape(name)}[ `]", line)]
    assert len(rows) == 1, "one row of the table"
    command = re.search(r"`(rlhf [^`]*)`", rows[0])
    assert command is not None
    words = shlex.split(command.group(1))
    assert words[1] == name.partition("_")[0]
    check(build(composed(words[1], "run_dir=runs/x", *words[2:])))
