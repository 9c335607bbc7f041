"""Whether a rollout's memory fits, said before it is taken."""

from __future__ import annotations

import psutil
import torch

from rlhf.config import UserError
from rlhf.engines.strategy import RoleStrategy
from rlhf.inference.generate import Generator
from rlhf.inference.weights import DecoderWeights
from rlhf.settings import RolloutConfig


def free_bytes(device: torch.device) -> int:
    """Memory that a new allocation can have, after what PyTorch holds back for itself has been given up if need be."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    return int(torch.cuda.mem_get_info(device)[0])


def require_room(generator: Generator, weights: DecoderWeights, rollout: RolloutConfig, strategy: RoleStrategy, *, tp: int) -> None:
    """Collective: if one rank is short, all refuse, and none waits for it.

    Raises:
        UserError: cache and copied weights are larger than the free memory; says by how much and what helps.
    """
    copies = 0 if weights.arena.mapped else weights.arena.bytes
    needed = copies + (0 if generator.cache.mapped else generator.cache.bytes)
    free = free_bytes(generator.device)
    if needed > free and generator.device.type == "cuda":
        torch.cuda.empty_cache()
        free = free_bytes(generator.device)
    short = float(strategy.max_over_ranks(torch.tensor(float(needed - free), dtype=torch.float64, device=generator.device)))
    if short <= 0:
        return
    each = generator.cache.bytes / (generator.slots + 1)
    most = int((needed - short - copies) / each) - 1
    fewer = f"set rollout.micro_batch_size={most // tp} or lower" if most >= tp else "not even one sequence fits: raise tp.size"
    raise UserError(
        f"the rollout is {short / 1e9:.2f} GB short of memory: the cache of {generator.slots} sequences of {generator.tokens} tokens takes "
        f"{generator.cache.bytes / 1e9:.2f} GB, copied weights {weights.arena.bytes / 1e9:.2f} GB, and {(needed - short) / 1e9:.2f} GB are free; "
        f"{fewer}, lower rollout.max_out_tokens (now {rollout.max_out_tokens}), or raise tp.size (now {tp})"
    )
