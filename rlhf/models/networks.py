"""The two kinds of network of the recipe: a causal LM (actor, ref) and a scalar model (critic, reward).

Know no engine, no optimizer and no loss. B rows, T tokens, V vocabulary, D width of the backbone's output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf.config import UserError


def left_aligned(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Moves each row's tokens to the front: (B, T), (B, T) bool -> (B, T) ids, (B, 1) how far each row moved.

    Then no token has padding before it: positions count from 0, and causal attention alone keeps padding out of every answer. A mask
    is needed no more, which lets attention take its fastest kernel; and no query is left without a key, for which the CUDA kernels
    give gradients that are NaN.
    """
    shift = mask.int().argmax(dim=1, keepdim=True)  # (B, 1) padding before the first token
    columns = torch.arange(ids.shape[1], device=ids.device)
    return ids.gather(1, (columns + shift) % ids.shape[1]), shift


class Network(nn.Module):
    """A transformers model that is called with ids and a mask, whatever side the padding is on."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @property
    def layers(self) -> list[nn.Module]:
        """Of the backbone, in order: the outermost list of modules with as many as the config says."""
        count = self.model.config.num_hidden_layers
        return next((list(m) for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m) == count), [])

    def hidden(self, ids: Tensor, mask: Tensor, last: int) -> Tensor:
        """(B, T), (B, T) -> (B, last, D): the backbone's output at the last `last` columns. Columns of padding hold anything."""
        aligned, shift = left_aligned(ids, mask)
        states = self.model.base_model(input_ids=aligned, use_cache=False).last_hidden_state  # (B, T, D)
        columns = torch.arange(ids.shape[1] - last, ids.shape[1], device=ids.device) - shift  # (B, last) where they are now
        return states.gather(1, columns.clamp(min=0).unsqueeze(-1).expand(-1, -1, states.shape[-1]))


class CausalLM(Network):
    """Next-token logits."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        changed = [name for name in LOGIT_CHANGES if getattr(model.config, name, None) not in (None, 1.0)]
        if changed:
            raise UserError(
                f"model family {model.config.model_type!r} changes its logits after the head ({changed[0]}), which is not supported"
            )

    def forward(self, ids: Tensor, mask: Tensor, *, last: int = 0) -> Tensor:
        """(B, T), (B, T) -> (B, last or T, V): logits at the last `last` columns, 0 meaning all. Column t predicts token t + 1."""
        return self.model.get_output_embeddings()(self.hidden(ids, mask, last or ids.shape[1]))


LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier_scale")
"""Config fields of families whose logits are not just the head's output."""


class ScalarModel(Network):
    """A number for every position: a reward model's score, a critic's value.

    `model` is a transformers sequence-classification model with one label, so that its export loads there; its head is applied at
    every position instead of the last. OPT-350M's form (output narrower than the hidden size, post-LN) is the family's own business:
    the head takes the width that the backbone gives.
    """

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, T), (B, T) -> (B, T) in fp32."""
        return self.model.score(self.hidden(ids, mask, ids.shape[1])).squeeze(-1).float()


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
            device = module._buffers["inv_freq"].device  # type: ignore[union-attr]
            fresh = type(module)(module.config)
            for name, buffer in fresh.named_buffers():
                module._buffers[name] = buffer.float().to(device)
