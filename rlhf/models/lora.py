"""Low-rank adapters through PEFT: put them in, say what trains, and give a weight with its adapter folded in.

Knows no engine: a sharded weight is made whole by the caller.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from peft import LoraConfig as PeftLora
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf.config import UserError
from rlhf.settings import LoraConfig

Gather = Callable[[list[nn.Parameter]], AbstractContextManager[object]]
"""Makes some parameters whole for a moment; does nothing outside ZeRO-3."""


def add_adapters(model: nn.Module, lora: LoraConfig, *, scalar: bool) -> None:
    """Adds an adapter to every linear layer that `lora.target_modules` names; the head of a scalar model keeps training whole.

    Raises:
        UserError: no module has such a name, or one that has cannot be adapted.
    """
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    config = PeftLora(
        r=lora.rank, lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout, target_modules=lora.target_modules, task_type="SEQ_CLS" if scalar else "CAUSAL_LM"
    )  # fmt: skip
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:
        raise UserError(f"lora.target_modules={lora.target_modules}: {error}") from error
    _refuse_unfoldable(model, lora)
    for name, parameter in model.named_parameters():
        in_adapted_layer = ".base_layer." in name  # frozen always, as in the original: its adapter learns in its place
        parameter.requires_grad_(
            "lora_" in name or name.startswith("score.") or (not lora.only and not in_adapted_layer and name in trained)
        )


def _refuse_unfoldable(model: nn.Module, lora: LoraConfig) -> None:
    """
    Raises:
        UserError: an adapter would train that no weight of an export can hold.
    """
    holders = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    for name, layer in adapted_layers(model).items():
        base = layer.get_base_layer()
        if not isinstance(base, nn.Linear | Conv1D):
            raise UserError(
                f"lora.target_modules={lora.target_modules}: {name} is no linear layer, but {type(base).__name__}: leave it out"
            )
        if holders[id(base.weight)] > 1:
            raise UserError(
                f"lora.target_modules={lora.target_modules}: {name} has its weight in common with another layer (tie_word_embeddings), which an "
                "adapter would change as well: leave it out"
            )


def adapted_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The layers with an adapter, by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@torch.no_grad()
def init_adapters(model: nn.Module, gather: Gather, is_writer: bool) -> None:
    """A as PEFT draws it (Kaiming uniform), B zero, so that an adapter begins as no change (Hu et al. 2021, section 4.1).

    PEFT's own initialization acts on parameters that ZeRO-3 has already taken apart, where it does nothing. The numbers come from the CPU and
    from the seed alone, so that an adapter is the same whatever the ZeRO stage and the device.
    """
    generator = torch.Generator().manual_seed(torch.initial_seed() + 1)  # not the numbers that random base weights began with
    for layer in adapted_layers(model).values():
        _, a, b = layer_parameters(layer)
        with gather([a, b]):
            if is_writer or a.numel():
                a.copy_(nn.init.kaiming_uniform_(torch.empty(a.shape, device="cpu"), a=math.sqrt(5), generator=generator))
                nn.init.zeros_(b)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The model as it was before it had adapters, and without dropout. For passes that nothing is learned from."""
    layers, training = adapted_layers(model).values(), model.training
    assert layers, "without adapters a model is nobody's reference but its own"
    model.eval()
    for layer in layers:
        layer._disable_adapters = True  # PEFT's own switch also says which parameters learn, and engines have asked already
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
        model.train(training)


def layer_parameters(layer: LoraLayer) -> list[nn.Parameter]:
    """What has to be whole to fold an adapter in: base weight, A and B."""
    return [part.weight for part in (layer.get_base_layer(), layer.lora_A["default"], layer.lora_B["default"])]  # type: ignore[misc]


@torch.no_grad()
def folded_weight(layer: LoraLayer) -> Tensor:
    """The base weight plus scaling x B A (Hu et al. 2021, eq. 3), in the layout and dtype of the base weight."""
    base, delta = layer_parameters(layer)[0], layer.get_delta_weight("default")  # type: ignore[attr-defined]
    return (base.data.float() + delta.float()).to(base.dtype)
