"""The rules that hold across groups of a configuration.

Knows keys; reads no file. What a user can get wrong is refused here, with the key's full name, before a model or a data set is touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf.config import ENTRY, LARGEST_SEED, TARGET, TOP_LEVEL, UserError, fits, locate, nearest


def world_size(cfg: Any) -> int:
    return cfg.trainer.devices * cfg.trainer.num_nodes


def roles(cfg: Any) -> dict[str, Any]:
    """The roles of a run that have a network of their own, by name: PPO may do without a critic or a reward model."""
    absent: set[str] = set()
    if cfg.verb == "ppo":
        absent |= {"critic"} if cfg.ppo.advantage != "gae" else set()
        absent |= {"reward"} if cfg.ppo.reward_source == "function" else set()
    return {name: getattr(cfg, name) for name in ("actor", "critic", "reward") if name not in absent and hasattr(cfg, name)}


def critic_start(cfg: Any) -> str | None:
    """The role whose `init` PPO's critic starts from: its own where it has one, or what ppo.critic_init names. None: there is no critic."""
    if cfg.ppo.advantage != "gae":
        return None
    return "critic" if cfg.critic.init is not None else cfg.ppo.critic_init


def check(cfg: Any) -> None:
    """Refuses combinations that no group can judge alone.

    Raises:
        UserError: names the keys that do not go together.
    """
    _check_names(cfg)
    if cfg.verb in ("report", "chat"):
        return  # they have none of the sections below
    _check_top(cfg)
    _check_launcher(cfg)
    _check_batches(cfg)
    _check_lengths(cfg)
    _check_precision(cfg)
    _check_node_copies(cfg)
    _check_rollout(cfg)
    _check_tensor_parallel(cfg)
    _check_optimizers(cfg)
    _check_reference(cfg)
    if hasattr(cfg, "ppo"):
        _check_critic(cfg)
        if "." in cfg.ppo.advantage:
            _require_function("ppo.advantage", cfg.ppo.advantage, "f(rewards, mask, samples) -> advantages")
        _check_reward(cfg)
        _check_plain_text(cfg)


def _check_names(cfg: Any) -> None:
    own = (ENTRY, cfg.verb) if hasattr(cfg, ENTRY) else ()
    for name in vars(cfg):
        if name not in (*TOP_LEVEL, *own):
            raise UserError(f"{name}: no such key{nearest(name, (*TOP_LEVEL, *own))}")


def _check_top(cfg: Any) -> None:
    """What no group describes: the plain keys, and entries that Hydra instantiates."""
    if not fits(cfg.seed, int) or not 0 <= cfg.seed <= LARGEST_SEED:
        raise UserError(f"seed must be a whole number in [0, {LARGEST_SEED}], got {cfg.seed!r}")
    if not isinstance(cfg.resume, bool):
        raise UserError(f"resume must be true or false, got {cfg.resume!r}")
    for group in ("callbacks", "logger"):
        for name, node in vars(getattr(cfg, group)).items():
            if not isinstance(node, Mapping):  # `build` leaves only mappings with a target as they are
                raise UserError(f"{group}.{name} names no class: give {group}.{name}.{TARGET}=package.module.Class")


def _check_launcher(cfg: Any) -> None:
    name = cfg.launcher.name
    if cfg.trainer.num_nodes > 1 and name == "local":
        raise UserError("trainer.num_nodes > 1 needs launcher=slurm, launcher=hostfile or launcher=external: local starts one node")
    if cfg.verb == "pipeline" and name != "local":
        raise UserError(f"launcher={name} starts one job, but rlhf pipeline runs several: call sft, reward and ppo one by one")


def _check_optimizers(cfg: Any) -> None:
    """An offloaded optimizer state needs the optimizer that works on the host, and only then."""
    learners = {
        ("sft", "optimizer"): "actor",
        ("rm", "optimizer"): "reward",
        ("dpo", "optimizer"): "actor",
        ("ppo", "actor_optimizer"): "actor",
        ("ppo", "critic_optimizer"): "critic",
    }
    for (step, key), role in learners.items():
        if not hasattr(cfg, step) or not hasattr(cfg, role):
            continue
        optimizer, offload = getattr(getattr(cfg, step), key), getattr(cfg, role).zero.offload_optimizer
        if offload != (optimizer.name == "cpu_adam"):
            raise UserError(
                f"{role}.zero.offload_optimizer={str(offload).lower()} does not go with {step}.{key}.name={optimizer.name}: "
                f"choose both or neither"
            )
        if optimizer.name == "fused_adam" and cfg.trainer.accelerator == "cpu":
            raise UserError(f"{step}.{key}.name=fused_adam needs a GPU, but trainer.accelerator=cpu: use adamw")


def _check_reference(cfg: Any) -> None:
    """A reference that is the actor without its adapters needs all the rest of the actor to stay as it was."""
    if not (hasattr(cfg, "ppo") or hasattr(cfg, "dpo")) or not getattr(getattr(cfg, "ref", None), "shared", False):
        return  # an evaluation has a rule of its own
    if cfg.ref.init is not None:
        raise UserError(
            f"ref.shared=true starts where the actor starts, so that ref.init={cfg.ref.init} would say nothing: set ref.init=null"
        )
    lora = cfg.actor.lora
    if lora.rank == 0 or not lora.only:
        raise UserError(
            f"ref.shared=true takes the actor without its adapters for the reference, but actor.lora.rank={lora.rank} and actor.lora.only="
            f"{str(lora.only).lower()}: choose lora@actor.lora=r8 or r128_only, with which adapters alone learn, or ref.shared=false"
        )


def _divides(key: str, total: int, parts: int, what: str) -> None:
    if total % parts:
        raise UserError(f"{key}={total} does not divide by {what} = {parts}: choose a multiple of {parts}")


def _divides_into_micro_batches(key: str, total: int, section: str, micro: int | None, world: int) -> None:
    if micro is None:
        _divides(key, total, world, "the number of ranks")
    else:
        _divides(key, total, micro * world, f"{section}.micro_batch_size x ranks")


def _check_batches(cfg: Any) -> None:
    world = world_size(cfg)
    for name in ("sft", "rm", "dpo"):
        step = getattr(cfg, name, None)
        if step is not None:
            _divides_into_micro_batches(f"{name}.batch_size", step.batch_size, name, step.micro_batch_size, world)
    ppo = getattr(cfg, "ppo", None)
    if ppo is not None:
        _divides("ppo.batch_size", ppo.batch_size, world, "the number of ranks")
        _divides_into_micro_batches("ppo.minibatch_size", ppo.minibatch_size, "ppo", ppo.micro_batch_size, world)


def _check_lengths(cfg: Any) -> None:
    data = getattr(cfg, "data", None)
    if data is None:
        return
    rollout = getattr(cfg, "rollout", None)
    if rollout is not None and rollout.max_new_tokens > data.max_answer_tokens:
        raise UserError(
            f"rollout.max_new_tokens={rollout.max_new_tokens} passes data.max_answer_tokens={data.max_answer_tokens}: the reward model "
            "would judge longer answers than it has seen"
        )
    if rollout is not None and rollout.max_out_tokens is not None:
        needed = data.max_prompt_tokens + rollout.max_new_tokens
        if rollout.max_out_tokens < needed:
            raise UserError(
                f"rollout.max_out_tokens={rollout.max_out_tokens} is {needed - rollout.max_out_tokens} short of data.max_prompt_tokens + "
                f"rollout.max_new_tokens = {needed}: raise it, or set it to null"
            )
    for name, role in roles(cfg).items():
        context = role.model.shape.get("max_position_embeddings")
        longest = data.max_prompt_tokens + data.max_answer_tokens
        if context is not None and longest > context:
            raise UserError(
                f"data.max_prompt_tokens + data.max_answer_tokens = {longest} passes the context of {name}.model "
                f"({role.model.name}: {context} tokens): lower one of the two"
            )


def _check_precision(cfg: Any) -> None:
    trainer = cfg.trainer
    if trainer.precision == "fp16" and trainer.accelerator == "cpu":
        raise UserError("trainer.precision=fp16 does not run on trainer.accelerator=cpu: use fp32 or bf16")
    for name, role in roles(cfg).items():
        if not role.zero.quantized_weights:
            continue
        if trainer.accelerator == "cpu":
            raise UserError(f"{name}.zero.quantized_weights needs a GPU, but trainer.accelerator=cpu")
        if trainer.precision != "fp16":
            raise UserError(
                f"{name}.zero.quantized_weights goes with trainer.precision=fp16 only, which is all that DeepSpeed quantises; got "
                f"{trainer.precision}"
            )


def _check_node_copies(cfg: Any) -> None:
    """ZeRO++'s copy on each node: DeepSpeed 0.19 makes groups of ranks for one engine of a process, and splits a node into whole groups."""
    holders = {name: role.zero.hpz_partition_size for name, role in roles(cfg).items() if role.zero.hpz_partition_size > 1}
    if len(holders) > 1:
        raise UserError(
            f"{' and '.join(f'{name}.zero.hpz_partition_size' for name in holders)}: DeepSpeed keeps such a copy of one role only: choose "
            f"zero@{list(holders)[-1]}.zero=mixz"
        )
    for name, size in holders.items():
        if cfg.trainer.devices % size:
            raise UserError(
                f"{name}.zero.hpz_partition_size={size} does not divide trainer.devices={cfg.trainer.devices}: set it to the GPUs of a node, or "
                f"choose zero@{name}.zero=mixz"
            )


def _check_rollout(cfg: Any) -> None:
    rollout = getattr(cfg, "rollout", None)
    if rollout is None:
        return
    if hasattr(cfg, "ppo") and rollout.engine != "hybrid_engine":
        key = "old_logprobs=rollout" if cfg.ppo.old_logprobs == "rollout" else f"importance_cap={cfg.ppo.importance_cap}"
        if cfg.ppo.old_logprobs == "rollout" or cfg.ppo.importance_cap is not None:
            raise UserError(
                f"ppo.{key} needs the sampler's log-probabilities, which rollout.engine={rollout.engine} does not return: "
                "choose rollout=hybrid_engine"
            )
    if hasattr(cfg, "ppo"):
        _check_answers(cfg.ppo, rollout)


def _check_critic(cfg: Any) -> None:
    ppo, critic = cfg.ppo, cfg.critic
    if ppo.advantage != "gae":
        if critic.init is not None:
            raise UserError(f"critic.init={critic.init}, but ppo.advantage={ppo.advantage} has no critic: set critic.init=null")
    elif critic_start(cfg) == "actor" and critic.model.name != cfg.actor.model.name:
        raise UserError(
            f"ppo.critic_init=actor needs critic.model and actor.model to be the same network, got {critic.model.name} and "
            f"{cfg.actor.model.name}"
        )


def _require_function(key: str, path: str, form: str) -> None:
    """Refuses an import path of the user's behind which nothing can be called as `form` says."""
    try:
        function = locate(path)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    if not callable(function):
        raise UserError(f"{key}={path} is no function {form}")


def _check_reward(cfg: Any) -> None:
    """A reward function can be called, and what a reward model would be for without it is there or not asked for."""
    ppo = cfg.ppo
    if ppo.reward_source == "model":
        return
    _require_function("ppo.reward_function", ppo.reward_function, "f(prompts, answers, ended) -> scores")
    if ppo.reward_source == "both" or cfg.verb != "ppo":
        return
    from_reward = critic_start(cfg) == "reward"
    if cfg.reward.init is not None and not from_reward:
        raise UserError(f"reward.init={cfg.reward.init}, but ppo.reward_source=function needs no reward model: set reward.init=null")
    if from_reward and cfg.reward.init is None and not cfg.critic.model.pretrained:
        raise UserError(
            "ppo.critic_init=reward, but ppo.reward_source=function has no reward model to start the critic from: choose "
            "ppo.critic_init=actor, a reward.init, or an advantage without a critic"
        )


def _check_plain_text(cfg: Any) -> None:
    ptx, coef = cfg.data.ptx, cfg.ppo.ptx_coef
    if coef > 0 and not ptx:
        raise UserError(f"ppo.ptx_coef={coef:g}, but data.ptx is empty: name a source of plain text, such as data.ptx=[wikitext]")
    if ptx and coef == 0:
        raise UserError("data.ptx names text for a pre-training loss, but ppo.ptx_coef=0: give it a weight above 0, or set data.ptx=[]")


def _check_answers(ppo: Any, rollout: Any) -> None:
    """What PPO asks of answers against what the rollout gives."""
    if rollout.temperature == 0:
        raise UserError(
            "rollout.temperature=0 samples greedily, so that PPO has nothing to explore: choose a temperature above 0, or say that it is "
            "meant with ppo.greedy_rollouts=true and rollout.temperature=1"
        )
    plain = {"temperature": 1, "top_k": 0, "top_p": 1}
    changed = [name for name, value in plain.items() if getattr(rollout, name) != value]
    if ppo.greedy_rollouts and changed:
        raise UserError(
            f"ppo.greedy_rollouts=true takes the likeliest token, so that rollout.{changed[0]}={getattr(rollout, changed[0])} would say "
            f"nothing: set it to {plain[changed[0]]}"
        )
    if ppo.min_answer_tokens > rollout.max_new_tokens:
        raise UserError(
            f"ppo.min_answer_tokens={ppo.min_answer_tokens} passes rollout.max_new_tokens={rollout.max_new_tokens}: no answer would be "
            "trained on"
        )
    if ppo.length_penalty > 0 and ppo.length_free >= rollout.max_new_tokens:
        raise UserError(
            f"ppo.length_penalty={ppo.length_penalty} never acts: ppo.length_free={ppo.length_free} reaches rollout.max_new_tokens="
            f"{rollout.max_new_tokens}; lower ppo.length_free"
        )


def _check_tensor_parallel(cfg: Any) -> None:
    """The ranks that share an actor: an engine that can shard it, one node, and heads for each of them."""
    tp, rollout = getattr(cfg, "tp", None), getattr(cfg, "rollout", None)
    if tp is None or rollout is None or tp.size == 1:
        return
    size, world, per_node = tp.size, world_size(cfg), cfg.trainer.devices
    if rollout.engine != "hybrid_engine":
        raise UserError(
            f"tp.size={size} shards the actor during rollouts, which rollout.engine={rollout.engine} cannot do: "
            "choose rollout=hybrid_engine or tp=tp1"
        )
    if world % size:
        raise UserError(f"tp.size={size} does not divide the number of ranks, trainer.devices x trainer.num_nodes = {world}")
    if per_node % size:
        raise UserError(f"tp.size={size} does not divide trainer.devices={per_node}: the ranks that share an actor must be of one node")
    shape, model = cfg.actor.model.shape, cfg.actor.model.name
    heads = shape["num_attention_heads"]
    for key in ("num_attention_heads", "num_key_value_heads"):
        count = shape.get(key) or heads  # null, too, means a key/value head for each query head
        if count < size:
            raise UserError(f"tp.size={size} is more than actor.model.shape.{key}={count} ({model}): some ranks would have no head")
        if count % size:
            raise UserError(f"tp.size={size} does not divide actor.model.shape.{key}={count} ({model})")
