"""One DeepSpeed engine for every role of a module, under Lightning.

Knows ZeRO stages, optimizers and process groups; knows no loss and no data. A module says `backward(role, loss)` and
`step(*roles)`; which engine that is, and how it is sharded, is decided here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import CUDAQuantizer
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn

from rlhf.config import UserError
from rlhf.engines.config import EngineSpec, engine_config
from rlhf.engines.gather import gather_by_layer, gathered, gathered_for_writing, sharded_init, whole
from rlhf.engines.optimizers import build_optimizer, build_scheduler
from rlhf.engines.overflow import align_overflow, has_overflow, look_once, loss_scale, norm_scale
from rlhf.models.networks import Network, restore_rotary


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step of one role did."""

    grad_norm: float
    """Before clipping; nan where the engine does not tell (fp16 after an overflow)."""
    learning_rate: float
    skipped: bool
    """fp16: an overflow, so that nothing was learned."""


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class RoleStrategy(DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy with an engine per role instead of one for the whole module, on CUDA and on the CPU.

    The LightningModule itself is never wrapped: its `training_step` runs outside any engine's forward and calls the engines, which
    stand in the module under their role's names. Lightning's own optimizer and checkpoint paths are not used: see `Checkpointer`.
    """

    strategy_name = "rlhf_roles"

    def __init__(self, *, specs: dict[str, EngineSpec], align_overflow: bool, timeout: timedelta, threads: int | None = None) -> None:
        super().__init__(cluster_environment=TorchElasticEnvironment(), precision_plugin=Precision(), timeout=timeout, logging_level=40)
        self.specs = specs
        self.engines: dict[str, Any] = {}
        self.kept: dict[str, Stateful] = {}
        """What else a checkpoint holds of each rank, by name."""
        self.closing: list[Callable[[], None]] = []
        """What else gives memory back at the end."""
        self._align_overflow = align_overflow
        self._threads = threads

    # --- what Lightning asks for ---

    @property
    def parallel_devices(self) -> list[torch.device] | None:  # type: ignore[override]
        return self._parallel_devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        """The CPU has no index of its own in Lightning, but the stock strategy sorts ranks by one."""
        self._parallel_devices = devices and [torch.device("cpu", i) if d.type == "cpu" else d for i, d in enumerate(devices)]

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)  # the stock one refuses everything but CUDA
        if self._threads is not None:
            torch.set_num_threads(self._threads)  # not earlier: Lightning's launcher sets a number of its own

    def model_sharded_context(self) -> Any:
        return nullcontext()  # each role has its own: see `connect`

    def connect(self, model: Any) -> None:
        super().connect(model)
        model.sharded = lambda role: sharded_init(self.specs[role])
        model.gather_for_writing = gathered_for_writing

    def setup(self, trainer: Any) -> None:
        assert self.accelerator is not None and self.lightning_module is not None
        self.accelerator.setup(trainer)
        for role, spec in self.specs.items():
            setattr(self.lightning_module, role, self._initialize(role, getattr(self.lightning_module, role), spec))
        self.optimizers = []
        self.barrier()

    def _initialize(self, role: str, network: Network, spec: EngineSpec) -> nn.Module:
        if spec.training is None and spec.stage == 0:
            return network.to(self.root_device)  # nothing to shard and nothing to learn: no engine
        if spec.stage == 3 and spec.zero.gather_layers:
            gather_by_layer(network, trained=spec.training is not None)
        optimizer = scheduler = None
        if spec.training is not None:
            optimizer = build_optimizer(network, spec.training)
            scheduler = build_scheduler(optimizer, spec.training)
        engine, *_ = deepspeed.initialize(
            model=network, optimizer=optimizer, lr_scheduler=scheduler, config=engine_config(spec), dist_init_required=False
        )
        if spec.precision == "bf16" and spec.training is not None:
            look_once(engine)
        if spec.zero.quantized_weights:
            engine.optimizer.quantize_nontrainable_params()
            # A single rank "gathers" by other code, which looks for the quantizer on the class; DeepSpeed 0.19 puts it on instances only.
            deepspeed.zero.Init.quantizer_module = CUDAQuantizer()
        restore_rotary(network)
        self.engines[role] = engine
        return engine

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}  # the engines save themselves

    def teardown(self) -> None:
        """Releases the engines' hooks and memory, so that the next job of this process starts clean."""
        for close in self.closing:
            close()
        self.closing.clear()
        for engine in self.engines.values():
            engine.destroy()
        self.engines.clear()
        self.kept.clear()
        assert self.accelerator is not None
        self.accelerator.teardown()

    # --- what modules and callbacks ask for ---

    def network(self, role: str) -> nn.Module:
        """The role's network under whatever engine holds it."""
        module = getattr(self.lightning_module, role)
        return module.module if role in self.engines else module

    @contextmanager
    def whole(self, role: str) -> Iterator[nn.Module]:
        """The role's network with all parameters whole on this rank."""
        network = self.network(role)
        with whole(network):
            yield network

    def gather(self, parameters: list[nn.Parameter]) -> Any:
        """A context in which these parameters are whole on every rank, to be read; what is written is lost."""
        return gathered(parameters)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What one rank refuses inside, all refuse with its words: those that went on would wait for it, and nobody would hear it. Collective.

        Raises:
            UserError: raised inside, on some rank.
        """
        own: UserError | None = None
        try:
            yield
        except UserError as error:
            own = error
        refused = [said for said in self.gather_objects(None if own is None else str(own)) if said is not None]
        if refused:
            raise UserError(refused[0]) from own

    def backward(self, role: str, loss: Tensor) -> None:  # type: ignore[override]
        """Adds the gradients of `loss` (a scalar). The losses of all ranks and of all micro-batches of a step sum to the objective.

        DeepSpeed averages gradients over ranks, hence the factor. One backward for each forward: ZeRO loses or repeats gradients
        where two backwards share a step of its micro-batch counter, so `step` follows every call.
        """
        engine = self.engines[role]
        engine.backward(loss * (self.world_size * loss_scale(engine)), scale_wrt_gas=False)

    def step(self, *roles: str) -> dict[str, StepResult]:
        """Ends a micro-batch of these roles; on the last one of a step the optimizers act, and their results come back."""
        if not self.engines[roles[0]].is_gradient_accumulation_boundary():
            for role in roles:
                self.engines[role].step()
            return {}
        engines = {role: self.engines[role] for role in roles}
        fp16 = any(self.specs[role].precision == "fp16" for role in roles)
        context = align_overflow(engines) if fp16 and self._align_overflow else nullcontext()
        with context:
            return {role: self._step(role, engine) for role, engine in engines.items()}

    def _step(self, role: str, engine: Any) -> StepResult:
        # Stage 0 in fp32 clips without telling the norm, so it is taken from the gradients, which are already reduced. It also looks at
        # nothing: every weight would become nan.
        norm = _gradient_norm(engine) if self.specs[role].stage == 0 and self.specs[role].precision == "fp32" else None
        if norm is not None and not math.isfinite(norm):
            raise _not_finite(role)
        rate = engine.optimizer.param_groups[0]["lr"]
        scale = norm_scale(engine)
        engine.step()
        told = engine.get_global_grad_norm() if norm is None else norm
        skipped = bool(getattr(engine.optimizer, "overflow", False))
        if skipped and self.specs[role].precision != "fp16":
            # fp16 overflows now and then and its scaler recovers; here DeepSpeed would drop every step without a word.
            raise _not_finite(role)
        return StepResult(math.nan if told is None else float(told) / scale, float(rate), skipped)

    def overflows(self, role: str) -> bool:
        """fp16: whether the gradients of a role are not finite on any rank, so that its step would be skipped."""
        return has_overflow(self.engines[role])

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Any shape -> the same shape, summed over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def max_over_ranks(self, values: Tensor) -> Tensor:
        """Any shape -> the same shape, the largest over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def gather_objects(self, value: Any) -> list[Any]:
        """One object from every rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


def _not_finite(role: str) -> FloatingPointError:
    return FloatingPointError(f"{role}: the gradients are not finite, so nothing can be learned; see the last rows of metrics.csv")


def _gradient_norm(engine: Any) -> float:
    grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0
