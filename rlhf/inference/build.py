"""A decoder from a model: its operations, its positions, and, for a model that is only read, its weights.

Knows modules and devices; how training keeps weights is the hybrid engine's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf.inference.decoder import Decoder
from rlhf.inference.families import UnsupportedFamily, describe
from rlhf.inference.parallel import Parallel
from rlhf.inference.reference import Positions, TorchOps, alibi_slopes, rotary
from rlhf.inference.shape import DecoderShape
from rlhf.inference.weights import DecoderWeights


def operations(device: torch.device) -> TorchOps:
    """Kernels on a GPU, plain PyTorch elsewhere."""
    if device.type != "cuda":
        return TorchOps()
    from rlhf.inference.kernels.ops import TritonOps  # imports Triton, which only GPU builds of torch bring

    return TritonOps()


def positions_of(model: nn.Module, shape: DecoderShape, parallel: Parallel, *, tokens: int, device: torch.device) -> Positions:
    """Tables of a model's positions, up to `tokens`; rotary frequencies as the model's own module has them."""
    if shape.positions == "alibi":
        return Positions(slopes=alibi_slopes(shape.heads)[parallel.share(shape.heads)].to(device))
    if shape.positions == "learned":
        return Positions()
    module: Any = next(m for m in model.modules() if "inv_freq" in m._buffers)
    return rotary(module.inv_freq.to(device), module.attention_scaling, tokens=tokens, head_dim=shape.head_dim)


class PlainWeights:
    """A model's own parameters as the decoder's source of weights: whole, without adapters, on one device."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = dict(model.named_parameters())

    def has(self, name: str) -> bool:
        return name in self.parameters

    def shareable(self, name: str) -> bool:
        return True

    def read(self, name: str) -> Tensor:
        return self.parameters[name].data


def decoder_of(model: Any, *, tokens: int) -> Decoder:
    """A transformers model as a decoder, ready to answer. Weights that need no other layout are shared with the model.

    Args:
        tokens: of the longest sequence.

    Raises:
        UnsupportedFamily: the decoder has no form for the model, or for sequences of this length.
    """
    shape = describe(model.config)
    if 0 < shape.window < tokens:
        raise UnsupportedFamily(f"attention slides over {shape.window} tokens, but sequences may have {tokens}")
    first = next(model.parameters())
    source, parallel = PlainWeights(model), Parallel()
    weights = DecoderWeights(shape, source, parallel=parallel, dtype=first.dtype, device=first.device)
    weights.arena.map()
    for part in range(len(weights.parts)):
        weights.fill(part, source)
    positions = positions_of(model, shape, parallel, tokens=tokens, device=first.device)
    return Decoder(shape, weights, positions, operations(first.device), parallel)
