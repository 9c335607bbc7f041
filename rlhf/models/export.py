"""Writes a network in HF layout, so that transformers loads it with no word about this project.

Knows no engine: `gather` makes parameters whole, a few at a time, so that no rank ever holds a whole sharded model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rlhf.models.factory import PUBLISHED_NAMES, tied_names
from rlhf.models.lora import Gather, adapted_layers, folded_weight, layer_parameters
from rlhf.models.networks import Network

SHARD_BYTES = 2 * 10**9
"""One safetensors file is closed once it holds this much: the most that rank zero keeps in memory."""


def whole_tensors(network: Network, gather: Gather) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every weight as transformers would save it: adapters folded in, tied weights once. Collective under ZeRO-3."""
    model = network.model
    layers = adapted_layers(model)
    weights = {f"{name}.base_layer.weight": layer for name, layer in layers.items()}
    tied = tied_names(model)
    published = {ours: theirs for theirs, ours in PUBLISHED_NAMES.items()} if model.config.model_type == "gpt_neox" else {}
    for name, parameter in model.named_parameters():
        if "lora_" in name or name in tied:
            continue
        layer = weights.get(name)
        with gather([parameter] if layer is None else layer_parameters(layer)):
            value = parameter.data if layer is None else folded_weight(layer)
            plain = name.replace(".base_layer.", ".")
            yield published.get(plain, plain), value.detach().cpu().contiguous().clone()
    kept = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in kept:
            yield name.replace(".base_layer.", "."), buffer.detach().cpu().contiguous().clone()


def export_network(network: Network, tokenizer: Any, folder: Path, *, gather: Gather | None, is_writer: bool) -> None:
    """Writes weights, config, generation config and tokenizer; the folder appears whole or not at all.

    Args:
        gather: makes parameters whole on every rank; None where they are.
        is_writer: this rank writes. The others only take part in gathering.
    """
    part = folder.with_name(folder.name + ".part")
    if is_writer:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    shards: list[dict[str, Tensor]] = [{}]
    index: dict[str, str] = {}
    size = total = 0
    for name, tensor in whole_tensors(network, gather or (lambda parameters: nullcontext())):
        if not is_writer:
            continue
        if size + tensor.nbytes > SHARD_BYTES and shards[-1]:
            _write(shards, part, index)
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    if not is_writer:
        return
    _write(shards, part, index)
    _finish_index(part, index, total)
    _write_configs(network.model, tokenizer, part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def _write(shards: list[dict[str, Tensor]], part: Path, index: dict[str, str]) -> None:
    """Closes the open shard and starts an empty one in its place."""
    file = f"model-{len(shards):05d}.safetensors"
    save_file(shards[-1], part / file, metadata={"format": "pt"})
    index.update(dict.fromkeys(shards[-1], file))
    shards[-1] = {}
    shards.append({})


def _finish_index(part: Path, index: dict[str, str], total: int) -> None:
    files = sorted(set(index.values()))
    if len(files) == 1:
        (part / files[0]).rename(part / "model.safetensors")
        return
    final = {file: f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i, file in enumerate(files)}
    for file, name in final.items():
        (part / file).rename(part / name)
    weight_map = {name: final[file] for name, file in index.items()}
    (part / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1))


def _write_configs(model: Any, tokenizer: Any, part: Path) -> None:
    config = type(model.config).from_dict(model.config.to_dict())
    config.architectures = [type(model).__name__]
    config.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    config.save_pretrained(part)
    if model.can_generate():
        generation = type(model.generation_config).from_model_config(config)
        generation.save_pretrained(part)
    tokenizer.save_pretrained(part)
