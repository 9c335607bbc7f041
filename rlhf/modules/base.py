"""What the modules of the recipe share: named networks, a clock, and the state that a resumed run needs.

Knows no ZeRO stage, no process group and no data set. The strategy installs `sharded` and `gather_for_writing`, and puts an engine
under each role's name once the networks are built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, TypeVar

import lightning as L
import torch
from torch import Tensor, nn

from rlhf.engines.strategy import RoleStrategy, StepResult
from rlhf.logging import PhaseClock
from rlhf.models.factory import Blueprint, build_network, freeze
from rlhf.models.lora import without_adapters
from rlhf.types import Rows

AnyBatch = TypeVar("AnyBatch", bound=Rows)


class RoleModule(L.LightningModule):
    """A LightningModule whose parts are roles. One `training_step` is one iteration, whatever optimizer steps it holds.

    Attributes:
        iteration: finished iterations, over all resumed parts of the run.
        metrics: what the last iteration measured, by name; callbacks add to it and loggers write it.
        tokens: tokens the last iteration generated or trained on, on this rank, by phase.
        scores: (B,) what the reward said of each answer of the last iteration, on this rank; None where there are no answers.
        micro_batch_size: rows of one forward pass on one rank, of training and of an evaluation; None: the rank's whole share of a batch.
        measured: what the summary says and a resumed part cannot measure again: `before` the first iteration, and of the `last` one.
        interrupted: Ctrl-C ended the training early; what marks the end of a run does not happen.
    """

    trained: ClassVar[tuple[str, ...]] = ()
    """Roles that learn; all others are frozen."""
    judges_batches: ClassVar[bool] = False
    """Whether `evaluate_batch` measures something on held-out rows."""

    def __init__(self, blueprints: dict[str, Blueprint]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.blueprints = blueprints
        self.sharded: Callable[[str], AbstractContextManager[object]] = lambda role: nullcontext()
        self.gather_for_writing: Callable[[list[nn.Parameter]], AbstractContextManager[object]] = lambda parameters: nullcontext()
        self.clock = PhaseClock()
        self.iteration = 0
        self.metrics: dict[str, float] = {}
        self.tokens: dict[str, int] = {}
        self.scores: Tensor | None = None
        self.micro_batch_size: int | None = None
        self.measured: dict[str, dict[str, float]] = {}
        self.interrupted = False

    def __getattr__(self, name: str) -> Any:
        """Roles are set by name once they are built; to a type checker they may be anything."""
        return super().__getattr__(name)

    @property
    def strategy(self) -> RoleStrategy:
        """The engines, once a trainer is attached."""
        return self.trainer.strategy  # type: ignore[return-value]

    def configure_model(self) -> None:
        for role, blueprint in self.blueprints.items():
            if not hasattr(self, role):
                torch.manual_seed(torch.initial_seed())  # random weights come from seed and shape alone: ref starts as actor does
                network = build_network(
                    blueprint, sharded=self.sharded(role), gather=self.gather_for_writing, is_writer=self.global_rank == 0
                )
                setattr(self, role, network if role in self.trained else freeze(network))

    def configure_optimizers(self) -> None:
        """The strategy builds one for every trained role."""

    def train(self, mode: bool = True) -> RoleModule:
        """Frozen roles never leave evaluation mode, or their dropout would act."""
        super().train(mode)
        for role in self.blueprints:
            if role not in self.trained and hasattr(self, role):
                getattr(self, role).eval()
        return self

    def reference(self, ids: Tensor, mask: Tensor, *, last: int) -> Tensor:
        """Logits (B, last, V) of what the actor was before it learned: a network of its own, or the actor without its adapters. Nothing is
        learned from them.

        Args:
            ids, mask: (B, T).
            last: as for `CausalLM`.
        """
        with torch.no_grad():
            if hasattr(self, "ref"):
                return self.ref(ids, mask, last=last)
            with without_adapters(self.strategy.network("actor")):
                return self.actor(ids, mask, last=last)

    def passes(self, batch: AnyBatch) -> Iterator[AnyBatch]:
        """The rows of each forward pass of a batch."""
        return batch.micro_batches(self.micro_batch_size or len(batch))

    def state(self) -> dict[str, Any]:
        """What the next iteration and the summary depend on beside engines and random states."""
        return {"iteration": self.iteration, "measured": self.measured}

    def load_state(self, state: dict[str, Any]) -> None:
        self.iteration, self.measured = state["iteration"], state.get("measured", {})

    def evaluate_batch(self, batch: Any) -> dict[str, Tensor]:
        """Sums over a held-out batch of this rank, scalars by name."""
        raise NotImplementedError

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        """Metrics from `evaluate_batch`'s sums over all batches and ranks."""
        raise NotImplementedError


def step_metrics(results: dict[str, StepResult]) -> dict[str, float]:
    """Names each role's gradient norm, learning rate and skipped steps."""
    metrics: dict[str, float] = {}
    for role, result in results.items():
        metrics |= {f"{role}/grad_norm": result.grad_norm, f"{role}/lr": result.learning_rate, f"{role}/skipped": float(result.skipped)}
    return metrics


def as_scalars(sums: dict[str, Tensor]) -> dict[str, float]:
    """Moves scalars off the device in one transfer."""
    stacked = torch.stack([value.double().reshape(()) for value in sums.values()]).cpu()
    return dict(zip(sums, stacked.tolist(), strict=True))
