"""Mixed-precision ZeRO++: frozen weights that are kept and sent as integers, on two ranks. Each rank runs this file as a script.

DeepSpeed's quantizer is a CUDA kernel; `Quantizer` is the same arithmetic in PyTorch, and the CPU is made to admit fp16.
"""

from __future__ import annotations

import dataclasses
import sys
from contextlib import nullcontext
from pathlib import Path

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import CUDAQuantizer
from jobs import composed, start_ranks
from tiny import config
from torch import Tensor

from rlhf.config import build
from rlhf.engines.config import EngineSpec, Training, engine_config
from rlhf.engines.gather import gather_by_layer, gathered, gathered_for_writing, sharded_init
from rlhf.engines.optimizers import build_optimizer
from rlhf.engines.overflow import loss_scale
from rlhf.models.factory import Blueprint, build_network
from rlhf.models.lora import without_adapters

WIDE = {
    "opt": {"hidden_size": 768, "num_attention_heads": 12, "ffn_dim": 1280, "word_embed_proj_dim": 768},
    "llama": {"hidden_size": 768, "num_attention_heads": 12, "num_key_value_heads": 12, "intermediate_size": 1280},
}
"""DeepSpeed quantises tensors of more than half a million weights; halves of 768 x 768 and of 768 x 1280 have groups of different sizes."""
GATHERED = ("layers", "modules", "node")
"""A layer or a module at once; `node`: a layer at once, from the copy that the ranks of a node keep."""


class Quantizer:
    """What DeepSpeed's compiled module does for symmetric integers of 8 bits."""

    Symmetric = 0

    def quantize(self, x: Tensor, groups: int, bits: int, kind: int) -> tuple[Tensor, Tensor]:
        rows = x.float().reshape(groups, -1)
        scale = rows.abs().amax(1, keepdim=True) / 127
        return (rows / scale).round().to(torch.int8).reshape(x.shape), scale.flatten()

    def dequantize(self, x: Tensor, scale: Tensor, groups: int, bits: int, kind: int) -> Tensor:
        return (x.float().reshape(groups, -1) * scale.reshape(groups, 1)).half().reshape(x.shape)


@pytest.mark.parametrize("family", WIDE)
@pytest.mark.parametrize("gather", GATHERED)
def test_two_ranks_compute_with_their_weights_rounded(family: str, gather: str) -> None:
    for output in start_ranks(Path(__file__), family, gather, world=2):
        assert {"opt": "12 of 12", "llama": "14 of 14"}[family] + " quantised weights are right, and so are passes" in output, output


def as_sent(weight: Tensor) -> Tensor:
    """A weight (fp16) after each rank's half was quantised and dequantised."""
    kernel = CUDAQuantizer()
    return torch.cat([kernel.dequantize(*kernel.quantize(half)) for half in weight.flatten().chunk(2)]).view_as(weight)


def run(family: str, gather: str) -> None:
    kind = type(get_accelerator())
    kind.is_fp16_supported = lambda _: True
    kind.supported_dtypes = lambda _: [torch.float, torch.half, torch.bfloat16]
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled
    deepspeed.init_distributed("gloo")
    CUDAQuantizer.quantizer_cuda_module = Quantizer()

    cfg = build(
        composed("sft", "zero@actor.zero=mixz", "trainer.precision=fp16", "lora@actor.lora=r8", "actor.lora.only=true", "run_dir=unused")
    )
    training = Training(
        optimizer=cfg.sft.optimizer, scheduler=cfg.sft.scheduler, total_steps=10, lora=cfg.actor.lora, micro_batch_size=2, accumulation=1
    )
    zero = dataclasses.replace(cfg.actor.zero, gather_layers=gather != "modules", hpz_partition_size=2 if gather == "node" else 1)
    spec = EngineSpec(zero=zero, precision="fp16", training=training, reloadable=False)
    blueprint = Blueprint(
        kind="causal",
        config=config(family, **WIDE[family]),
        folder=None,
        lora=cfg.actor.lora,
        gradient_checkpointing=False,
        dtype=torch.float16,
    )
    torch.manual_seed(0)
    network = build_network(blueprint, sharded=sharded_init(spec), gather=gathered_for_writing, is_writer=torch.distributed.get_rank() == 0)
    with gathered(list(network.parameters())):
        before = {name: p.detach().clone() for name, p in network.named_parameters()}
    if gather != "modules":
        gather_by_layer(network, trained=True)
    engine, *_ = deepspeed.initialize(
        model=network, optimizer=build_optimizer(network, training), config=engine_config(spec), dist_init_required=False
    )
    engine.optimizer.quantize_nontrainable_params()

    quantised = [name for name, p in network.named_parameters() if hasattr(p.ds_tensor, "ds_quant_scale")]
    expected = before | {name: as_sent(before[name]) for name in quantised}
    named = dict(network.named_parameters())
    right = 0
    for name in quantised:
        with gathered([named[name]]):  # one by one
            right += torch.equal(named[name], expected[name]) and not torch.equal(named[name], before[name])
    with gathered(list(named.values())):  # all at once
        right *= all(torch.equal(named[name], expected[name]) for name in named)

    plain = build_network(blueprint, sharded=nullcontext(), gather=gathered_for_writing, is_writer=True)
    plain.load_state_dict(expected, strict=False)  # the head is the embedding
    ids = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    frozen = {name: weight for name, weight in expected.items() if "lora" not in name}
    for learns in (False, True, True, False, True):  # an evaluation, steps, an evaluation, a step
        with torch.set_grad_enabled(learns):
            logits = engine(ids, mask)
            torch.testing.assert_close(logits, plain(ids, mask), atol=2e-3, rtol=1e-2)
        if learns:
            loss = torch.nn.functional.cross_entropy(logits.float()[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            engine.backward(loss * loss_scale(engine), scale_wrt_gas=False)
            engine.step()
        with gathered(list(named.values())):  # as an export does, whatever is on its way
            assert all(torch.equal(named[name], weight) for name, weight in frozen.items())
            plain.load_state_dict({name: p.detach().clone() for name, p in named.items()}, strict=False)
    with gathered(list(named.values())):
        assert not all(torch.equal(named[name], expected[name]) for name in named), "the adapters have learned"
    with without_adapters(network), torch.no_grad():
        plain.load_state_dict(expected, strict=False)
        torch.testing.assert_close(engine(ids, mask), plain(ids, mask), atol=2e-3, rtol=1e-2)
    print(f"{right} of {len(quantised)} quantised weights are right, and so are passes")


if __name__ == "__main__":
    run(*sys.argv[1:])
