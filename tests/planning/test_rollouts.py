"""Cache and copied weights of a rollout: against what the decoder really makes of tiny networks, and by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from plans import job
from test_network_sizes import _canonical
from tiny import config
from transformers import AutoModelForCausalLM

from rlhf.engines.hybrid import TrainingWeights
from rlhf.inference.families import describe
from rlhf.inference.parallel import Parallel
from rlhf.inference.slots import cache_specs
from rlhf.inference.weights import DecoderWeights
from rlhf.models.lora import add_adapters
from rlhf.planning import rollouts
from rlhf.planning.networks import FAMILIES
from rlhf.planning.workload import Workload

CPU = torch.device("cpu")
FAST = ("opt", "opt-post-ln", "gpt2", "gpt_neox", "bloom", "llama", "qwen2")


def tiny_job(family: str, *overrides: str) -> Workload:
    made = config(family)
    network = FAMILIES[made.model_type](made.to_dict() | _canonical(made))
    work = job("trainer.precision=fp32", *overrides)
    actor = dataclasses.replace(work.roles["actor"], network=network)
    return dataclasses.replace(work, roles=work.roles | {"actor": actor})


def copied(weights: DecoderWeights) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in weights.arena.specs.values())


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("family", FAST)
def test_copies_are_those_of_the_decoder(family: str, adapted: bool) -> None:
    work = tiny_job(family, *(["lora@actor.lora=r8"] if adapted else []))
    model = AutoModelForCausalLM.from_config(config(family))
    lora = work.roles["actor"].lora
    if lora is not None:
        add_adapters(model, lora, scalar=False)
    weights = DecoderWeights(
        describe(model.config), TrainingWeights(model, torch.float32, CPU), parallel=Parallel(), dtype=torch.float32, device=CPU
    )
    assert rollouts.copies(work) == copied(weights)


class Elsewhere(TrainingWeights):
    """Parameters whose storage cannot be shared, as under ZeRO-3."""

    def shareable(self, name: str) -> bool:
        return False


@pytest.mark.parametrize("family", FAST)
def test_under_zero_3_everything_is_copied(family: str) -> None:
    work = tiny_job(family, "zero@actor.zero=z3")
    model = AutoModelForCausalLM.from_config(config(family))
    weights = DecoderWeights(
        describe(model.config), Elsewhere(model, torch.float32, CPU), parallel=Parallel(), dtype=torch.float32, device=CPU
    )
    assert rollouts.copies(work) == copied(weights)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_cache_has_a_slot_more_than_sequences(family: str) -> None:
    work = tiny_job(family, "rollout.micro_batch_size=3")
    net = work.roles["actor"].network
    specs = cache_specs(
        slots=3, tokens=work.prompt + work.answer, layers=net.layers, kv_heads=net.kv_heads, head_dim=net.head_dim, dtype=torch.float32
    )
    assert rollouts.cache(work) == sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs.values())


def test_tensor_parallel_ranks_share_cache_and_weights() -> None:
    """Two ranks hold half of the heads each, for the sequences of both."""
    alone = job("trainer.devices=2", "zero@actor.zero=z3")
    pair = job("trainer.devices=2", "zero@actor.zero=z3", "tp=tp2")
    assert rollouts.slots(pair) == 2 * rollouts.slots(alone) == 64
    per_slot = 24 * 2 * 2048 * 512 * 2
    assert rollouts.cache(alone) == 33 * per_slot
    assert rollouts.cache(pair) == 65 * per_slot / 2
    net = alone.roles["actor"].network
    outside = (2 * 50272 * 2048 + 2050 * 2048 + 2 * 2048) * 2  # table, head, positions, last norm
    assert (rollouts.copies(alone) - outside) / 2 == pytest.approx(rollouts.copies(pair) - outside, rel=1e-3)
    assert rollouts.copies(alone) == 2 * (net.parameters("causal") + 50272 * 2048), "a tied head is copied beside its table"


def test_transformers_generate_makes_zero_3_whole() -> None:
    work = job("rollout=hf_generate", "trainer.devices=4", "zero@actor.zero=z3")
    assert rollouts.copies(work) == 0
    assert rollouts.gathered(work) == 2 * work.roles["actor"].parameters
    hybrid = job("trainer.devices=4", "zero@actor.zero=z3", "rollout.tp_gather_partition_size=4")
    assert rollouts.gathered(hybrid) == 2 * 4 * hybrid.roles["actor"].network.layer


def test_a_family_without_an_entry_falls_back() -> None:
    assert not rollouts.fast(job(actor="gpt-neo-125m"))
    assert rollouts.fast(job(actor="bloom-560m"))
