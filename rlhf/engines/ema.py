"""A moving average of a role's weights in fp32, each rank keeping its own part of it.

Knows where DeepSpeed keeps fp32 weights under each ZeRO stage; does not know when to average.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.utils import safe_get_local_fp32_param
from torch import Tensor, nn

from rlhf.config import UserError
from rlhf.engines.gather import release
from rlhf.engines.strategy import RoleStrategy


class AveragedWeights:
    """average <- decay x average + (1 - decay) x weights, starting from the weights it is built on.

    The weights averaged are the optimizer's fp32 ones, where it has any (bf16, fp16 above stage 0); frozen ones do not change and are
    not kept. A rank keeps what its optimizer holds: everything at stage 0, its share above.
    """

    def __init__(self, strategy: RoleStrategy, role: str, decay: float) -> None:
        self.strategy, self.role, self.decay = strategy, role, decay
        self.parameters = {name: p for name, p in strategy.network(role).named_parameters() if p.requires_grad}
        with torch.no_grad():
            self.parts = {name: part.clone() for name, part in self._live()}

    def _live(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's part of the current fp32 weights, flat or whole; parameters of which it holds nothing are left out."""
        for name, parameter in self.parameters.items():
            if hasattr(parameter, "ds_id"):
                yield name, safe_get_local_fp32_param(parameter)
            elif not hasattr(parameter, "_hp_mapping"):
                yield name, parameter.data.float()
            elif parameter._hp_mapping is not None:
                yield name, parameter._hp_mapping.get_hp_fragment()

    @torch.no_grad()
    def update(self) -> None:
        for name, part in self._live():
            self.parts[name].lerp_(part.to(self.parts[name].device), 1.0 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[nn.Module]:
        """The role's network with the average as its weights, in its own precision; the weights come back at the end. Collective."""
        release(list(self.parameters.values()))  # or a small parameter's whole copy would go on being used in the place of what is put
        kept = {name: self._storage(parameter).clone() for name, parameter in self.parameters.items()}
        try:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    self._put(name, parameter)
            yield self.strategy.network(self.role)
        finally:
            release(list(self.parameters.values()))
            for name, parameter in self.parameters.items():
                self._storage(parameter).copy_(kept[name])

    @staticmethod
    def _storage(parameter: Any) -> Tensor:
        """What this rank holds of a parameter: its shard under ZeRO-3."""
        return parameter.ds_tensor.data if hasattr(parameter, "ds_id") else parameter.data

    def _put(self, name: str, parameter: Any) -> None:
        storage = self._storage(parameter)
        if hasattr(parameter, "ds_id"):
            storage[: self.parts[name].numel()].copy_(self.parts[name])
        elif not hasattr(parameter, "_hp_mapping"):
            storage.copy_(self.parts[name])
        else:  # each rank has a piece of the flat weight
            whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
            if parameter._hp_mapping is not None:
                piece = parameter._hp_mapping.lp_fragment_address
                whole[piece.start : piece.start + piece.numel].copy_(self.parts[name])
            storage.copy_(self.strategy.sum_over_ranks(whole).view_as(storage))

    # --- resume ---

    def state_dict(self) -> dict[str, Tensor]:
        return self.parts

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """
        Raises:
            UserError: the state is of other weights.
        """
        if {name: part.shape for name, part in state.items()} != {name: part.shape for name, part in self.parts.items()}:
            raise UserError(f"the checkpoint's moving average of {self.role} belongs to another model or ZeRO stage")
        for name, part in state.items():
            self.parts[name].copy_(part)
