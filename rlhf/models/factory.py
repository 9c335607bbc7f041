"""Builds a role's network: shape, weights, adapters, what is frozen.

Knows no engine: the caller passes `sharded`, the context parameters are created in, and `gather`, which makes some of them whole for
rank zero to write. Both do nothing outside ZeRO-3.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig
from transformers.initialization import no_init_weights

from rlhf.config import UserError
from rlhf.logging import log
from rlhf.models.lora import Gather, add_adapters, init_adapters
from rlhf.models.networks import CausalLM, Network, ScalarModel, init_scalar_head
from rlhf.models.source import read_tensors, said
from rlhf.settings import LoraConfig

PUBLISHED_NAMES = {"embed_out.weight": "lm_head.weight"}
"""Names in checkpoints on the hub that newer transformers give another name (GPT-NeoX)."""


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """All that is needed to build one network."""

    kind: Literal["causal", "scalar"]
    config: PretrainedConfig
    folder: Path | None
    """Weights to start from; None: random."""
    lora: LoraConfig | None
    gradient_checkpointing: bool
    dtype: torch.dtype


def build_network(blueprint: Blueprint, *, sharded: AbstractContextManager[object], gather: Gather, is_writer: bool) -> Network:
    """Builds, loads and freezes one network on the CPU (or wherever `sharded` puts it).

    Args:
        is_writer: this rank writes gathered parameters (rank zero); outside ZeRO-3 every rank does.

    Raises:
        UserError: the family has no such head, or the weights do not fit the config.
    """
    with sharded:
        model = _empty(blueprint)
    fresh = _load(model, blueprint.folder, gather, is_writer) if blueprint.folder else set(dict(model.named_parameters()))
    _initialize(model, fresh, gather, is_writer)
    if blueprint.lora is not None and blueprint.lora.rank > 0:  # last, so that random weights are those without adapters
        with sharded:
            add_adapters(model, blueprint.lora, scalar=blueprint.kind == "scalar")
        init_adapters(model, gather, is_writer)
    if blueprint.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    network = CausalLM(model) if blueprint.kind == "causal" else ScalarModel(model)
    return network.train()


def check_buildable(blueprint: Blueprint, role: str) -> None:
    """Refuses what `build_network` would, before anything is loaded: a shape that makes no network, and layers of the user's choice that
    cannot have an adapter.

    Raises:
        UserError: names the key of the role.
    """
    chosen = blueprint.lora is not None and blueprint.lora.rank > 0 and blueprint.lora.target_modules != "all-linear"
    if blueprint.folder is not None and not chosen:
        return
    with torch.device("meta"):
        try:
            model = _empty(blueprint)
        except UserError:
            raise
        except Exception as error:  # each family has a way of its own
            family = blueprint.config.model_type
            raise UserError(f"{role}.model.shape makes no network of the family {family}: {said(error)}") from error
        if not chosen:
            return
        try:
            add_adapters(model, blueprint.lora, scalar=blueprint.kind == "scalar")  # type: ignore[arg-type]
        except UserError as error:
            raise UserError(f"{role}.{error}") from error


def _empty(blueprint: Blueprint) -> Any:
    """The model of transformers, its weights whatever the memory holds.

    Raises:
        UserError: the family has no such head.
    """
    auto = AutoModelForCausalLM if blueprint.kind == "causal" else AutoModelForSequenceClassification
    if blueprint.kind == "scalar":
        blueprint.config.num_labels = 1
    try:
        with no_init_weights():
            model = auto.from_config(blueprint.config, dtype=blueprint.dtype)
    except ValueError as error:
        if "Unrecognized configuration class" in str(error):
            raise UserError(f"transformers has no {blueprint.kind} model for the family {blueprint.config.model_type!r}") from error
        raise
    model.tie_weights()
    return model


def freeze(network: Network) -> Network:
    """No parameter learns and no dropout acts."""
    return network.requires_grad_(False).eval()


def _names(name: str, prefix: str) -> Iterable[str]:
    """The names a tensor of a checkpoint may have here: as it is, and with or without the prefix of the backbone."""
    name = PUBLISHED_NAMES.get(name, name)
    yield name
    yield f"{prefix}.{name}"
    yield name.removeprefix(f"{prefix}.")


def _load(model: nn.Module, folder: Path, gather: Gather, is_writer: bool) -> set[str]:
    """Copies a folder's tensors into the model one by one; returns the names of the parameters it has no tensor for.

    An embedding or head that has grown keeps its old rows; a new row starts as the mean of the old ones.
    """
    targets: dict[str, Tensor] = dict(model.named_parameters())
    targets |= {name: b for name, b in model.named_buffers() if name in model.state_dict()}
    missing = set(dict(model.named_parameters()))
    unused = []
    for stored, tensor in read_tensors(folder):
        name = next((n for n in _names(stored, str(model.base_model_prefix)) if n in targets), None)
        if name is None:
            unused.append(stored)
            continue
        target = targets[name]
        with gather([target]) if isinstance(target, nn.Parameter) else torch.no_grad():
            if is_writer or target.numel():
                _copy(tensor, target.data, f"{folder}: {stored}")
        missing.discard(name)
    tied = tied_names(model)
    absent = [n for n in missing if n not in tied and not n.startswith("score.")]
    if absent:
        raise UserError(f"the weights in {folder} do not fit the model: {len(absent)} tensors are missing, such as {sorted(absent)[0]}")
    heads = ("lm_head.", "embed_out.", "score.")
    strange = [n for n in unused if not n.startswith(heads) and not n.endswith((".bias", "inv_freq", "masked_bias"))]
    if strange:
        log.warning("%s: %d tensors have no place in the model and are left out, such as %s", folder, len(strange), strange[0])
    return {n for n in missing if n not in tied}


def tied_names(model: nn.Module) -> set[str]:
    """Names that share another parameter's storage (a head tied to the embedding)."""
    return set(getattr(model, "all_tied_weights_keys", {}) or {})


def _copy(tensor: torch.Tensor, target: torch.Tensor, what: str) -> None:
    if tensor.shape == target.shape:
        target.copy_(tensor)
    elif tensor.ndim == 2 and tensor.shape[1:] == target.shape[1:] and tensor.shape[0] < target.shape[0]:
        target[: tensor.shape[0]].copy_(tensor)
        target[tensor.shape[0] :] = tensor.float().mean(dim=0).to(target.dtype)
    else:
        raise UserError(f"{what} has shape {tuple(tensor.shape)}, but the model needs {tuple(target.shape)}: is it another model?")


@torch.no_grad()
def _initialize(model: nn.Module, fresh: set[str], gather: Gather, is_writer: bool) -> None:
    """Random weights for the parameters in `fresh`, module by module with the family's own rule."""
    for name, parameter in model.named_parameters():
        # transformers' init functions leave parameters with this flag alone.
        parameter._is_hf_initialized = name not in fresh  # type: ignore[attr-defined]
    # Children before parents: GPT-2's blocks scale the projections that their children have just drawn.
    for module in reversed(list(model.modules())):
        near: list[nn.Parameter] = [p for child in (module, *module.children()) for p in child.parameters(recurse=False)]
        if not (near or any(True for _ in module.buffers(recurse=False))):
            continue
        with gather(near):
            if is_writer or all(p.numel() for p in near):
                model._init_weights(module)  # type: ignore[operator]
    if "score.weight" in fresh:
        with gather([model.score.weight]):  # type: ignore[union-attr, list-item]
            if is_writer or model.score.weight.numel():  # type: ignore[union-attr, operator]
                init_scalar_head(model.score)  # type: ignore[arg-type]
    for parameter in model.parameters():
        del parameter._is_hf_initialized  # type: ignore[attr-defined]
