"""The decoder's operations on a GPU: kernels where they save memory traffic or launches, PyTorch's own for the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.inference.kernels import attention, draw, norm
from rlhf.inference.reference import Positions, TorchOps
from rlhf.inference.sampling import Sampling, filtered
from rlhf.inference.shape import DecoderShape
from rlhf.inference.slots import Slots
from rlhf.inference.weights import Layer, Linear, Norm


class TritonOps(TorchOps):
    def __init__(self) -> None:
        self._stops: dict[tuple[int, ...], Tensor] = {}

    def linear(self, x: Tensor, linear: Linear, activation: str | None = None) -> Tensor:
        if activation == "relu" and linear.bias is not None:
            return torch._addmm_activation(linear.bias, x, linear.weight.t())  # bias and ReLU in the product's own epilogue
        return super().linear(x, linear, activation)

    def norm(self, x: Tensor, norm_: Norm, shape: DecoderShape) -> Tensor:
        return norm.add_norm(x, None, norm_, shape)[1]

    def add_norm(self, x: Tensor, delta: Tensor, norm_: Norm, shape: DecoderShape) -> tuple[Tensor, Tensor]:
        return norm.add_norm(x, delta, norm_, shape)

    def attend(
        self, qkv: Tensor, keys: Tensor, values: Tensor, slots: Slots, rows: Tensor, layer: Layer, positions: Positions, shape: DecoderShape
    ) -> Tensor:
        return attention.attend(qkv, keys, values, slots, rows, layer, positions, shape)

    def draw(self, logits: Tensor, slots: Slots, rows: Tensor, sampling: Sampling) -> None:
        candidates = logits
        stops = self._stops.setdefault(sampling.stop_ids, torch.tensor(sampling.stop_ids or (-1,), device=logits.device))
        if sampling.filters:
            if sampling.min_new_tokens > 0:
                early = (slots.counts[rows] < sampling.min_new_tokens).unsqueeze(1)
                candidates = candidates.masked_fill(early & torch.isin(torch.arange(logits.shape[1], device=logits.device), stops), -torch.inf)
            candidates = filtered(candidates, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
        draw.draw(logits, candidates, slots, rows, sampling, stops)
