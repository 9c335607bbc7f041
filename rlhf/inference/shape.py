"""What a decoder looks like: sizes, and which of a few options each of its parts takes.

Knows no family and no weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """A decoder-only transformer, as far as inference cares."""

    family: str
    layers: int
    hidden: int
    embed_width: int
    """Of the embedding; differs from `hidden` where projections stand between (OPT-350M)."""
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_positions: int
    """Longest sequence the model can take; 0: no limit."""
    window: int
    """Longest sequence for which sliding-window attention sees everything; 0: no window."""

    positions: Literal["learned", "rotary", "alibi"]
    position_offset: int
    """Row of the learned table that belongs to the first token (OPT: 2)."""
    norm: Literal["layer", "rms"]
    norm_eps: float
    post_norm: bool
    """Norms after the residual sum instead of before the layer (OPT-350M)."""
    parallel_residual: bool
    """Attention and MLP both read the layer's input, and their outputs are added together (GPT-NeoX)."""
    gated: bool
    """down(act(gate x) * up x) instead of down(act(up x))."""
    activation: Literal["relu", "gelu", "gelu_tanh", "silu"]

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.heads // self.kv_heads

    @property
    def qkv_width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim
