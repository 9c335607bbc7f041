"""One training job as numbers: its roles with their sharding, and the sizes of each phase.

Knows the sections of a config and which roles a verb has; knows no bytes and no seconds. B sequences of one rank, P prompt tokens, A answer
tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rlhf.config import UserError
from rlhf.planning.networks import Matrix, Network, network
from rlhf.rules import world_size
from rlhf.settings import LoraConfig, ZeroConfig

STEPS = ("sft", "reward", "ppo", "dpo")
"""Verbs that train, each one job."""
WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of a weight by precision."""

MODULES = {
    "q": ("q_proj",), "k": ("k_proj",), "v": ("v_proj",), "qkv": ("c_attn", "query_key_value", "qkv_proj"),
    "out": ("out_proj", "o_proj", "dense", "c_proj"), "up": ("fc1", "up_proj", "c_fc", "fc_in", "dense_h_to_4h"), "gate": ("gate_proj",),
    "gate_up": ("gate_up_proj",), "down": ("fc2", "down_proj", "c_proj", "fc_out", "dense_4h_to_h"),
}  # fmt: skip
"""What transformers calls a matrix, by ours, over all families: for lora.target_modules."""


@dataclass(frozen=True, kw_only=True)
class Role:
    """One network of the job and how its engine holds it."""

    name: str
    kind: Literal["causal", "scalar"]
    network: Network
    model: str
    zero: ZeroConfig
    stage: int
    """The ZeRO stage that runs (rlhf/engines/config.py: bf16 training at stage 0 runs at stage 1)."""
    trained: bool
    lora: LoraConfig | None
    checkpointing: bool
    optimizer: str | None
    averaged: bool
    """A moving average of it is kept (callbacks=ema)."""
    drops: bool
    """Dropout acts in training."""
    shared: bool = False
    """A reference without weights of its own: the actor's pass without adapters, gathered as the actor is."""
    shareable: bool = False
    """A reference that might be so, as adapters alone learn and both start from the same weights."""

    @property
    def parameters(self) -> int:
        """Without adapters."""
        return self.network.parameters(self.kind)

    @property
    def adapters(self) -> int:
        return 0 if self.lora is None else sum(m.adapter(self.lora.rank) * n for m, n in self.network.adapted if self.adapts(m))

    @property
    def trainable(self) -> int:
        """What has gradients and optimizer state. Adapted weights are frozen; with `lora.only` all but adapters and a scalar head is."""
        if not self.trained:
            return 0
        if self.lora is None:
            return self.parameters
        if self.lora.only:
            return self.adapters + (self.network.embed_width if self.kind == "scalar" else 0)
        frozen = sum(m.count * n for m, n in self.network.adapted if self.adapts(m))
        return self.parameters - frozen + self.adapters

    @property
    def adapter_tensors(self) -> int:
        """Two for each adapted matrix."""
        return 2 * sum(n for m, n in self.network.adapted if self.adapts(m))

    @property
    def tensors(self) -> int:
        """Parameters as tensors, adapters among them."""
        return self.network.tensors(self.kind) + self.adapter_tensors

    @property
    def trained_tensors(self) -> int:
        """Parameters with gradients, as tensors."""
        if not self.trained:
            return 0
        if self.lora is not None and self.lora.only:
            return self.adapter_tensors + (1 if self.kind == "scalar" else 0)
        return self.tensors - sum(n * (2 if m.bias else 1) for m, n in self.network.adapted if self.adapts(m))

    def adapts(self, matrix: Matrix) -> bool:
        """Whether LoRA adapts this matrix. A pattern (a string other than all-linear) is taken to mean every linear layer: an upper bound."""
        if self.lora is None or isinstance(self.lora.target_modules, str):
            return self.lora is not None
        names = MODULES.get(matrix.name, (matrix.name,))
        return any(target.rpartition(".")[2] in names for target in self.lora.target_modules)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Sizes of one rank unless they say otherwise."""

    step: str
    roles: dict[str, Role]
    element: int
    """Bytes of a weight and of an activation."""
    precision: str
    ranks: int
    per_node: int
    nodes: int
    prompt: int
    """Longest prompt, tokens."""
    answer: int
    """Longest answer, tokens."""
    global_batch: int
    """Sequences (pairs, texts) of one iteration, over all ranks."""
    batch: int
    """Of one rank: rows that go through a model. A pair is two."""
    minibatch: int
    """Rows of one optimizer step on this rank."""
    micro: int
    """Rows of one training forward pass."""
    score_micro: int
    """Rows of one scoring forward pass."""
    passes: int
    """Passes over an iteration's rows."""
    scored: int
    """Positions of a row whose logits are computed; all of them in SFT."""
    samples: int
    """Answers to a prompt."""
    rollout: Any | None
    """RolloutConfig of a job that generates."""
    tp: int
    old_logprobs: str
    iterations: int | None
    """Of the whole run, where the config says it."""
    ptx: bool
    """A pre-training loss beside the policy's."""

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.prompt + self.answer

    @property
    def accumulates(self) -> bool:
        """More than one micro-batch in an optimizer step."""
        return self.minibatch > self.micro

    @property
    def steps(self) -> int:
        """Optimizer steps of one iteration."""
        return self.passes * (self.batch // self.minibatch)


def workload(cfg: Any) -> Workload:
    """The job of checked settings of sft, reward, ppo or dpo.

    Raises:
        UserError: a model whose shape is not known.
    """
    build = {"sft": _supervised, "reward": _supervised, "dpo": _supervised, "ppo": _ppo}
    if cfg.verb not in build:
        raise UserError(f"verb={cfg.verb} does not train, so there is nothing to plan: choose {', '.join(STEPS)}")
    return build[cfg.verb](cfg)


def _common(cfg: Any) -> dict[str, Any]:
    return {
        "step": cfg.verb, "element": WIDTHS[cfg.trainer.precision], "precision": cfg.trainer.precision, "ranks": world_size(cfg),
        "per_node": cfg.trainer.devices, "nodes": cfg.trainer.num_nodes, "prompt": cfg.data.max_prompt_tokens,
        "answer": cfg.data.max_answer_tokens,
    }  # fmt: skip


def _supervised(cfg: Any) -> Workload:
    """One optimizer step an iteration. Pairs are two rows of one forward pass (rlhf/modules/reward.py, dpo.py)."""
    step = {"sft": "sft", "reward": "rm", "dpo": "dpo"}[cfg.verb]
    settings, rows = getattr(cfg, step), 1 if cfg.verb == "sft" else 2
    world = world_size(cfg)
    share = settings.batch_size // world
    role = "reward" if cfg.verb == "reward" else "actor"
    kind: Any = "scalar" if cfg.verb == "reward" else "causal"
    roles = {role: _trained(cfg, role, kind, settings.optimizer.name)}
    if cfg.verb == "dpo":
        roles["ref"] = _reference(cfg, roles["actor"])
    common = _common(cfg)
    micro = rows * (settings.micro_batch_size or share)
    return Workload(
        **common, roles=roles, global_batch=settings.batch_size, batch=rows * share, minibatch=rows * share, micro=micro,
        score_micro=micro, passes=1, scored=common["prompt"] + common["answer"] if cfg.verb == "sft" else common["answer"] + 1, samples=1,
        rollout=None, tp=1, old_logprobs="none", iterations=settings.max_steps, ptx=False,
    )  # fmt: skip


def _ppo(cfg: Any) -> Workload:
    ppo, world, rollout = cfg.ppo, world_size(cfg), cfg.rollout
    roles = {"actor": _trained(cfg, "actor", "causal", ppo.actor_optimizer.name)}
    if ppo.advantage == "gae":
        roles["critic"] = _trained(cfg, "critic", "scalar", ppo.critic_optimizer.name)
    roles["ref"] = _reference(cfg, roles["actor"])
    if ppo.reward_source != "function":
        roles["reward"] = _frozen(cfg, "reward", "scalar", cfg.reward.zero, cfg.reward)
    batch, minibatch = ppo.batch_size * ppo.samples_per_prompt // world, ppo.minibatch_size // world
    return Workload(
        **(_common(cfg) | {"answer": rollout.max_new_tokens}), roles=roles, global_batch=ppo.batch_size * ppo.samples_per_prompt, batch=batch,
        minibatch=minibatch, micro=min(minibatch, ppo.micro_batch_size or minibatch),
        score_micro=min(batch, ppo.score_micro_batch_size or batch), passes=ppo.epochs, scored=rollout.max_new_tokens + 1,
        samples=ppo.samples_per_prompt, rollout=rollout, tp=cfg.tp.size, old_logprobs=ppo.old_logprobs, iterations=ppo.iterations,
        ptx=ppo.ptx_coef > 0,
    )  # fmt: skip


def _trained(cfg: Any, name: str, kind: Literal["causal", "scalar"], optimizer: str) -> Role:
    settings = getattr(cfg, name)
    found = network(settings.model, name)
    stage = max(1, settings.zero.stage) if cfg.trainer.precision == "bf16" else settings.zero.stage
    return Role(
        name=name, kind=kind, network=found, model=settings.model.name, zero=settings.zero, stage=stage, trained=True,
        lora=settings.lora if settings.lora.rank > 0 else None, checkpointing=settings.gradient_checkpointing, optimizer=optimizer,
        averaged=_averaged(cfg.callbacks) == name, drops=found.dropouts > 0 and settings.dropout != 0,
    )  # fmt: skip


def _frozen(cfg: Any, name: str, kind: Literal["causal", "scalar"], zero: ZeroConfig, like: Any) -> Role:
    """Sharded if its options say stage 3, whole otherwise (rlhf/cli/assemble.py: frozen_engine)."""
    return Role(
        name=name, kind=kind, network=network(like.model, "actor" if name == "ref" else name), model=like.model.name, zero=zero,
        stage=3 if zero.stage == 3 else 0, trained=False, lora=None, checkpointing=False, optimizer=None, averaged=False, drops=False,
    )  # fmt: skip


def _reference(cfg: Any, actor: Role) -> Role:
    role = _frozen(cfg, "ref", "causal", cfg.ref.zero, cfg.actor)
    if cfg.ref.shared:
        return dataclasses.replace(role, zero=actor.zero, stage=actor.stage, shared=True)
    return dataclasses.replace(role, shareable=actor.lora is not None and actor.lora.only and cfg.ref.init is None)


def _averaged(callbacks: Any) -> str | None:
    """The role that callbacks=ema keeps an average of."""
    for node in vars(callbacks).values():
        if isinstance(node, Mapping) and str(node.get("_target_", "")).endswith("ema.MovingAverage"):
            return str(node["role"])
    return None
