"""The head of a scalar model before its first step, where it is not to be that of the weights.

Knows neither losses nor data.
"""

from __future__ import annotations

import torch

from rlhf.modules.base import RoleModule


@torch.no_grad()
def restart_head(module: RoleModule, role: str, how: str) -> None:
    """Overwrites the role's head, the same on every rank; before an engine holds it.

    Args:
        how: zeros (Ziegler et al. 2019, their value head); or uniform in +-1/sqrt(D), torch's nn.Linear and so DeepSpeed-Chat's
            reward model.
    """
    weight = getattr(module, role).model.score.weight  # (1, D)
    with module.gather_for_writing([weight]):
        if module.global_rank == 0 or weight.numel():
            fresh = torch.zeros(weight.shape, device="cpu")  # Lightning builds networks with the GPU as the default device
            if how == "uniform":
                bound = weight.shape[1] ** -0.5
                fresh.uniform_(-bound, bound, generator=torch.Generator().manual_seed(torch.initial_seed() % 2**63))
            weight.copy_(fresh)
