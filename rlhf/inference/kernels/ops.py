"""The decoder's operations on a GPU: kernels where they save memory traffic or launches, PyTorch's own for the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.inference.kernels import attention, draw, matmul, norm, pointwise, prefill
from rlhf.inference.kernels.matmul import Partial
from rlhf.inference.reference import Positions, TorchOps
from rlhf.inference.sampling import Sampling, filtered
from rlhf.inference.shape import DecoderShape
from rlhf.inference.slots import Slots
from rlhf.inference.weights import Layer, Linear, Norm

FEW_ROWS = matmul.BM
"""Up to so many rows our product beats cuBLAS's."""
SIXTEEN_BIT = (torch.float16, torch.bfloat16)


class TritonOps(TorchOps):
    def __init__(self, *, pdl: bool | None = None) -> None:
        """
        Args:
            pdl: programmatic dependent launch: a kernel is set up while the one before it ends. None: where the card has it.
        """
        self.pdl = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0) if pdl is None else pdl
        self._stops: dict[tuple[int, ...], Tensor] = {}

    def embed(self, table: Tensor, positions: Tensor | None, offset: int, slots: Slots, rows: Tensor) -> Tensor:
        return pointwise.embed(table, positions, offset, slots, rows)

    def linear(self, x: Tensor, linear: Linear, activation: str | None = None) -> Tensor:
        if self._few(x) and activation in (None, "relu") and len(linear.weight) <= 32768:  # not the head: cuBLAS is better there
            out = matmul.product(x, linear, relu=activation == "relu", split=False, pdl=self.pdl)
            assert isinstance(out, Tensor)
            return out
        if activation == "relu" and linear.bias is not None:
            return torch._addmm_activation(linear.bias, x, linear.weight.t())  # bias and ReLU in the product's own epilogue
        return super().linear(x, linear, activation)

    def project(self, x: Tensor, linear: Linear) -> Tensor | Partial:
        if self._few(x):
            return matmul.product(x, linear, relu=False, split=True, pdl=self.pdl)
        return super().linear(x, linear)

    def _few(self, x: Tensor) -> bool:
        return len(x) <= FEW_ROWS and x.dtype in SIXTEEN_BIT

    def gate(self, x: Tensor, activation: str) -> Tensor:
        return pointwise.gate(x, pdl=self.pdl) if activation == "silu" else super().gate(x, activation)

    def norm(self, x: Tensor, norm_: Norm, shape: DecoderShape) -> Tensor:
        return norm.add_norm(x, None, norm_, shape, pdl=self.pdl)[1]

    def add_norm(self, x: Tensor, delta: Tensor | Partial, norm_: Norm, shape: DecoderShape) -> tuple[Tensor, Tensor]:
        return norm.add_norm(x, delta, norm_, shape, pdl=self.pdl)

    def heads(self, qkv: Tensor, layer: Layer, positions: Positions, width: int, shape: DecoderShape) -> tuple[Tensor, Tensor, Tensor]:
        if positions.cos is None:
            return super().heads(qkv, layer, positions, width, shape)  # views, nothing to compute
        return prefill.heads(qkv, layer, positions, width, shape)

    def keep(self, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor, prompts: Tensor) -> None:
        prefill.keep(k, v, keys, values, slots, prompts)

    def attend(
        self, qkv: Tensor, keys: Tensor, values: Tensor, slots: Slots, rows: Tensor, layer: Layer, positions: Positions, shape: DecoderShape
    ) -> Tensor:
        return attention.attend(qkv, keys, values, slots, rows, layer, positions, shape, pdl=self.pdl)

    def draw(self, logits: Tensor, slots: Slots, rows: Tensor, sampling: Sampling) -> None:
        candidates = logits
        if sampling.stop_ids not in self._stops:  # once: a captured graph cannot copy from the host
            self._stops[sampling.stop_ids] = torch.tensor(sampling.stop_ids or (-1,), device=logits.device)
        stops = self._stops[sampling.stop_ids]
        if sampling.filters:
            if sampling.min_new_tokens > 0:
                early = (slots.counts[rows] < sampling.min_new_tokens).unsqueeze(1)
                ids = torch.arange(logits.shape[1], device=logits.device)
                candidates = candidates.masked_fill(early & torch.isin(ids, stops), -torch.inf)
            candidates = filtered(candidates, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
        draw.draw(logits, candidates, slots, rows, sampling, stops)
