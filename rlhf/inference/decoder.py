"""One transformer for every family: prefill of whole prompts and a step of one token a row, over a cache with a slot a sequence.

Knows no training model and no sampling. M prompts of P tokens, B rows of a step, N tokens in all, D hidden, H heads, K key/value heads, hd
head dimension, V vocabulary, S slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.inference.parallel import Parallel
from rlhf.inference.reference import Positions, TorchOps
from rlhf.inference.shape import DecoderShape
from rlhf.inference.slots import Slots
from rlhf.inference.weights import DecoderWeights, Layer, Linear

Attend = Callable[[int, Layer, Tensor], Tensor]
"""Index of a layer, the layer, (N, (H + 2K) hd) -> (N, H hd)."""


class Decoder:
    """Reads the weights anew for every call, so that whoever fills them need not tell it."""

    def __init__(self, shape: DecoderShape, weights: DecoderWeights, positions: Positions, ops: TorchOps, parallel: Parallel) -> None:
        self.shape = shape
        self.weights = weights
        self.positions = positions
        self.ops = ops
        self.parallel = parallel

    # --- whole prompts ---

    def prefill(self, ids: Tensor, lengths: Tensor, keys: Tensor, values: Tensor, slots: Tensor, prompts: Tensor) -> Tensor:
        """Reads prompts and fills the cache of the slots that will answer them.

        Args:
            ids: (M, P) int64, padded on the right.
            lengths: (M,) int64.
            keys, values: (layers, S + 1, K, tokens, hd).
            slots: (n,) int64, slots that get
            prompts: (n,) int64, the keys and values of these prompts: several answers share one prefill.

        Returns:
            (M, V) logits after each prompt's last token.
        """
        m, width = ids.shape
        at = torch.arange(width, device=ids.device).repeat(m)  # (M P,)

        def attend(index: int, layer: Layer, qkv: Tensor) -> Tensor:
            q, k, v = self.ops.heads(qkv, layer, self.positions, width, self.shape)
            self.ops.keep(k, v, keys[index], values[index], slots, prompts)
            out = self.ops.attend_prompts(q, k, v, self.positions)
            return out.transpose(1, 2).flatten(0, 1).flatten(1)  # (M P, H hd)

        last = torch.arange(m, device=ids.device) * width + lengths - 1  # (M,)
        return self._forward(self._embed(ids.flatten(), at), attend, last)

    # --- one token a row ---

    def step(self, keys: Tensor, values: Tensor, slots: Slots, rows: Tensor) -> Tensor:
        """The last token of each row goes into the cache. (layers, S + 1, K, tokens, hd) twice; rows (B,) -> (B, V) logits of the next."""

        def attend(index: int, layer: Layer, qkv: Tensor) -> Tensor:
            return self.ops.attend(qkv, keys[index], values[index], slots, rows, layer, self.positions, self.shape)

        if self.shape.embed_width != self.shape.hidden:
            return self._forward(self._embed(slots.tokens[rows], slots.lengths[rows]), attend, None)
        tensors = self.weights.tensors
        table, positions = tensors["0.embed.weight"], tensors.get("0.positions.weight")
        return self._forward(self.ops.embed(table, positions, self.shape.position_offset, slots, rows), attend, None)

    # --- the network ---

    def _embed(self, tokens: Tensor, at: Tensor) -> Tensor:  # (N,), (N,) -> (N, D)
        tensors = self.weights.tensors
        x = F.embedding(tokens, tensors["0.embed.weight"])
        project = self.weights.linear(0, "project_in")
        if project is not None:
            x = self.ops.linear(x, project)
        table = tensors.get("0.positions.weight")
        return x if table is None else x + F.embedding(at + self.shape.position_offset, table)

    def _forward(self, x: Tensor, attend: Attend, last: Tensor | None) -> Tensor:
        """(N, D) embedded tokens -> (N, V), or (len(last), V) at the rows `last`."""
        norm = self.weights.norm(0, "embed_norm")
        if norm is not None:
            x = self.ops.norm(x, norm, self.shape)
        x = self._layers(x, attend, last)
        project = self.weights.linear(0, "project_out")
        if project is not None:
            x = self.ops.linear(x, project)
        head = self.weights.linear(0, "head")
        assert head is not None
        return self.ops.linear(x, head)

    def _layers(self, x: Tensor, attend: Attend, last: Tensor | None) -> Tensor:  # (N, D) -> (N or len(last), D)
        """All layers and the final norm. The sum of a layer's output and the next norm are one operation."""
        layers = [self.weights.layer(i) for i in range(self.shape.layers)]
        norms = [layer.norm1 for layer in layers[1:]] + [self.weights.norm(0, "final_norm")]
        ops, shape = self.ops, self.shape
        if shape.post_norm:
            for i, layer in enumerate(layers):
                _, x = ops.add_norm(x, self._attention(i, layer, x, attend), layer.norm1, shape)
                _, x = ops.add_norm(x, self._mlp(layer, x), layer.norm2, shape)
            return x if last is None else x[last]
        h = ops.norm(x, layers[0].norm1, shape)
        for i, (layer, norm) in enumerate(zip(layers, norms, strict=True)):
            assert norm is not None
            attention = self._attention(i, layer, h, attend)
            if last is not None and i == len(layers) - 1:
                x, attention = x[last], attention[last]  # nothing reads the other tokens any more
            if shape.parallel_residual:
                h = ops.norm(x, layer.norm2, shape)
                attention = attention + self._mlp(layer, h)
                x, h = ops.add_norm(x, attention, norm, shape)
            else:
                x, h = ops.add_norm(x, attention, layer.norm2, shape)
                x, h = ops.add_norm(x, self._mlp(layer, h), norm, shape)
        return h

    def _attention(self, index: int, layer: Layer, h: Tensor, attend: Attend) -> Any:  # (N, D) -> (N, D)
        return self._summed(attend(index, layer, self.ops.linear(h, layer.qkv)), layer.out)

    def _mlp(self, layer: Layer, h: Tensor) -> Any:  # (N, D) -> (N, D)
        if self.shape.gated:
            h = self.ops.gate(self.ops.linear(h, layer.up), self.shape.activation)
        else:
            h = self.ops.linear(h, layer.up, self.shape.activation)
        return self._summed(h, layer.down)

    def _summed(self, x: Tensor, linear: Linear) -> Any:  # (N, in) -> (N, D), or what `ops.add_norm` takes instead
        if self.parallel.size == 1 and not self.shape.parallel_residual:
            return self.ops.project(x, linear)
        return self.parallel.sum(self.ops.linear(x, linear))
