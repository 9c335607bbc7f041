"""Making sharded parameters whole for a moment, and creating them sharded.

The only place that knows how ZeRO-3 keeps parameters; every context does nothing for parameters that are not sharded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import deepspeed
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import set_z3_leaf_modules
from torch import nn

from rlhf.engines.config import EngineSpec, engine_config
from rlhf.models.networks import Network


def sharded_init(spec: EngineSpec) -> AbstractContextManager[object]:
    """Parameters created inside are split over the ranks at once, so that no rank ever holds the whole model."""
    if spec.stage != 3:
        return nullcontext()
    config = engine_config(spec)
    if spec.zero.quantized_weights:
        # DeepSpeed 0.19 casts quantised tensors that it sends as one to integers, and reads the scales of all with one size of group. Said here
        # alone: of an engine it asks as well to fetch nothing ahead, and such an engine loses track of what is on its way.
        config["zero_optimization"]["stage3_allgather_sequential"] = True
    # No dtype: the config says it. Given one, DeepSpeed 0.19 takes bf16 instead wherever the device has no fp16.
    return deepspeed.zero.Init(config_dict_or_path=config)


def gather_by_layer(network: Network, *, trained: bool) -> None:
    """ZeRO-3 makes all of a layer whole at once. To be called before the engine is made; see `ZeroConfig.gather_layers`.

    In training DeepSpeed reduces a layer's gradients as soon as those of its inputs are there, or, where no input needs any, those of its outputs, which
    is before there are any. So the first layer's input needs one, even where only adapters learn.
    """
    kinds = {type(layer) for layer in network.layers}
    if not kinds:
        return
    set_z3_leaf_modules(network, list(kinds))
    if trained:
        network.model.enable_input_require_grads()


@contextmanager
def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Whole on every rank; changes are dropped at the end."""
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    _dequantise(sharded)
    with deepspeed.zero.GatheredParameters(sharded) if sharded else nullcontext():
        yield


def _dequantise(sharded: list[Any]) -> None:
    """Makes quantised weights whole as a forward pass does, before `GatheredParameters` comes: DeepSpeed 0.19's dequantises no tensor that travels
    for itself (see `sharded_init`), and leaves alone what is whole."""
    quantised = [
        p for p in dict.fromkeys(sharded) if hasattr(p.ds_tensor, "ds_quant_scale") and p.ds_status is ZeroParamStatus.NOT_AVAILABLE
    ]
    if quantised:
        quantised[0].all_gather_coalesced(quantised, quantize=True).wait()


def gathered_for_writing(parameters: list[nn.Parameter]) -> AbstractContextManager[object]:
    """Whole on every rank; what rank zero writes is what all ranks keep."""
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    return deepspeed.zero.GatheredParameters(sharded, modifier_rank=0) if sharded else nullcontext()


def release(parameters: list[nn.Parameter]) -> None:
    """Drops what this rank has whole beside its shard, without communication. Small parameters stay whole after a step
    (`persistence_threshold`), and what is written into a shard then would not be seen."""
    with gathered([p for p in parameters if getattr(p, "ds_status", None) is ZeroParamStatus.AVAILABLE]):
        pass


@contextmanager
def whole(network: nn.Module) -> Iterator[None]:
    """All of a network's parameters whole at once. DeepSpeed's hooks still act on each module that runs inside, so a forward pass costs about
    what it costs outside; the hybrid engine runs no module of the network and pays one gather."""
    with gathered(list(network.parameters())):
        yield
