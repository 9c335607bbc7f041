"""fp16: the loss scale, and skipping the step of every role when the gradients of one overflow.

Actor and critic learn from the same experience; a step of one alone would leave the other behind. DeepSpeed-Chat has the option
(`--align_overflow`), but it raises on every DeepSpeed it could be run with. Knows the optimizers' insides; knows no role.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gradients(engine: Any) -> list[Tensor]:
    """The (loss-scaled) gradients this rank is about to step with: its shards under ZeRO 1-3, the parameters' own at stage 0.

    Not with an offloaded optimizer, whose gradients are on their way to the host.
    """
    averaged = getattr(engine.optimizer, "averaged_gradients", None)
    if averaged:
        return [g for group in averaged.values() for g in (group or []) if g is not None]
    return [p.grad for p in engine.module.parameters() if p.grad is not None]


def has_overflow(engine: Any) -> bool:
    """Whether any rank's gradients hold an inf or a nan. Collective."""
    if hasattr(engine.optimizer, "has_overflow"):  # ZeRO's own look: with offload nobody else knows where the gradients are
        return bool(engine.optimizer.has_overflow())
    bad = any(not bool(torch.isfinite(g).all()) for g in gradients(engine))
    flag = torch.tensor(float(bad), device=engine.device)
    if dist.is_initialized():
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def look_once(engine: Any) -> None:
    """bf16 below stage 3: leaves out the first of DeepSpeed's two looks for an inf or a nan.

    DeepSpeed 0.19 tests the gradients tensor by tensor, which is 0.14 ms each of Python and small kernels, and then skips the step all the
    same where their norm is no number. With offload the norm is made otherwise, and both looks stay.
    """
    optimizer = engine.optimizer
    if getattr(optimizer, "check_grad_overflow", False) and optimizer.compute_grad_norm and not optimizer.cpu_offload:
        optimizer.check_overflow = lambda **_: None


@contextmanager
def align_overflow(engines: dict[str, Any]) -> Iterator[None]:
    """Around the steps of several engines: if one overflows, all skip. A role that skips for another's sake keeps its loss scale."""
    flags = {role: has_overflow(engine) for role, engine in engines.items()}
    spared = {}
    if any(flags.values()):
        for role, engine in engines.items():
            if not flags[role]:
                spared[role] = _scale_state(engine)
                _spoil(engine)
    yield
    for role, state in spared.items():
        vars(_scaler(engines[role])).update(state)


def _spoil(engine: Any) -> None:
    """Lets the engine's own check find an overflow in its next step."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "inf_or_nan_tracker"):  # stage 3
        optimizer.inf_or_nan_tracker.fill_(True)
    elif getattr(optimizer, "cpu_offload", False):  # stages 1 and 2, which look at gradients only on their way to the host
        optimizer.local_overflow = True
    else:
        gradients(engine)[0].fill_(float("inf"))


def loss_scale(engine: Any) -> float:
    """The factor of a loss that DeepSpeed forgets: at stage 0 it divides fp16 gradients by the loss scale, but does not multiply the loss."""
    config = getattr(engine.optimizer, "loss_scale_config", None)  # of stage 0's optimizers alone
    return 1.0 if config is None else float(config.cur_scale)


def norm_scale(engine: Any) -> float:
    """The factor in the gradient norm that DeepSpeed is about to tell: that of the scaled gradients, at stage 0 without its FusedAdam."""
    return loss_scale(engine) if type(engine.optimizer).__name__ == "FP16_UnfusedOptimizer" else 1.0


def _scaler(engine: Any) -> Any:
    """The object that holds the dynamic loss scale."""
    optimizer = engine.optimizer
    return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", optimizer)


def _scale_state(engine: Any) -> dict[str, float]:
    return {name: value for name, value in vars(_scaler(engine)).items() if isinstance(value, int | float)}
