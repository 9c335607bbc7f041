"""How the head of a critic and of a reward model begins."""

from __future__ import annotations

import copy
import dataclasses
import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from jobs import composed
from on_ranks import networks, settings
from tiny import config
from torch import Tensor

from rlhf.config import build
from rlhf.models.factory import build_network
from rlhf.modules.heads import restart_head
from rlhf.modules.reward import RewardModel


def built(module: Any, role: str) -> Tensor:
    """The head of a role whose network is drawn anew."""
    blueprint = module.blueprints[role]
    setattr(module, role, build_network(blueprint, sharded=nullcontext(), gather=module.gather_for_writing, is_writer=True))
    module.configure_model()
    head = getattr(module, role).model.score.weight
    assert head.requires_grad
    return head.detach()


def test_the_head_of_the_critic() -> None:
    heads = {}
    for how in ("init", "zeros"):
        module = copy.deepcopy(networks())
        module.ppo = dataclasses.replace(settings(), critic_head=how)
        heads[how] = built(module, "critic")
    assert (heads["init"] != 0).all() and (heads["zeros"] == 0).all()


def test_the_head_of_the_reward_model() -> None:
    rm, blueprint = build(composed("reward", "run_dir=x")).rm, dataclasses.replace(networks().blueprints["critic"], config=wide())
    heads = {}
    for how in ("normal", "uniform", "zeros"):
        module = RewardModel(dataclasses.replace(rm, head_init=how), {"reward": blueprint})
        heads[how] = built(module, "reward")
    bound = WIDTH**-0.5
    assert heads["normal"].std().item() == pytest.approx((WIDTH + 1) ** -0.5, rel=0.1) and heads["normal"].abs().max() > bound
    assert heads["uniform"].abs().max() <= bound and heads["uniform"].std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert (heads["zeros"] == 0).all()


WIDTH = 512
"""Entries of a head, enough to tell two distributions apart."""


def wide() -> Any:
    return config("llama", hidden_size=WIDTH, num_hidden_layers=1)


def test_a_head_is_drawn_on_the_cpu_whatever_the_default_device() -> None:
    """Lightning makes the GPU the default device while networks are built; `meta` stands for it here."""
    module = copy.deepcopy(networks())
    for how in ("uniform", "zeros"):
        with torch.device("meta"):
            restart_head(module, "critic", how)
        assert bool((module.critic.model.score.weight == 0).all()) == (how == "zeros")
