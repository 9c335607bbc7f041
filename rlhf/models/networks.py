"""The two kinds of network of the recipe: a causal LM (actor, ref) and a scalar model (critic, reward).

Know no engine, no optimizer and no loss. B rows, T tokens, V vocabulary, D width of the backbone's output.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn


def position_ids(mask: Tensor) -> Tensor:
    """(B, T) bool -> (B, T) int64: tokens are counted from 0 at the first real one, on whichever side the padding is."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


class Network(nn.Module):
    """A transformers model that is called with ids and a mask and gets its positions right under left padding."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def inputs(self, ids: Tensor, mask: Tensor) -> dict[str, Any]:  # ids (B, T), mask (B, T)
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
        if self._takes_positions:  # ALiBi families derive them from the mask
            inputs["position_ids"] = position_ids(mask)
        return inputs


class CausalLM(Network):
    """Next-token logits."""

    def forward(self, ids: Tensor, mask: Tensor, *, last: int = 0) -> Tensor:
        """(B, T), (B, T) -> (B, last or T, V): logits at the last `last` positions, 0 meaning all. Row t predicts token t + 1."""
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            return self.model(**self.inputs(ids, mask), logits_to_keep=last).logits
        return self.model(**self.inputs(ids, mask)).logits[:, -last:]


class ScalarModel(Network):
    """A number for every position: a reward model's score, a critic's value.

    `model` is a transformers sequence-classification model with one label, so that its export loads there; its head is applied at
    every position instead of the last. OPT-350M's form (output narrower than the hidden size, post-LN) is the family's own business:
    the head takes the width that the backbone gives.
    """

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, T), (B, T) -> (B, T) in fp32."""
        hidden = self.model.base_model(**self.inputs(ids, mask)).last_hidden_state  # (B, T, D)
        return self.model.score(hidden).squeeze(-1).float()


@torch.no_grad()
def init_scalar_head(head: nn.Linear) -> None:
    """Normal with std 1/sqrt(D + 1), so that fresh scores have unit size (Stiennon et al. 2020, appendix; the N details blog)."""
    head.weight.normal_(std=(head.in_features + 1) ** -0.5)


def restore_rotary(network: nn.Module) -> None:
    """Gives rotary embeddings their fp32 frequencies back, after an engine has cast every buffer to 16 bits.

    A bf16 frequency is off by up to 2^-9, half a radian at position 256.
    """
    for module in network.modules():
        if "inv_freq" in module._buffers and hasattr(module, "config"):
            device = module.inv_freq.device
            fresh = type(module)(module.config)
            for name, buffer in fresh.named_buffers():
                module._buffers[name] = buffer.float().to(device)
