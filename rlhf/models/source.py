"""Where a network's configuration and weights come from: a hub id, a local folder, an export of a run, or nothing but a shape.

Knows no engine and no training. Weights are read tensor by tensor, so that a model sharded by ZeRO-3 is never whole on one rank.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from rlhf.config import UserError, nearest
from rlhf.settings import ModelConfig

WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json"]
CONFIG_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]

DROPOUTS = ("dropout", "attention_dropout", "hidden_dropout", "activation_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop",
            "embed_dropout", "resid_dropout", "layerdrop")  # fmt: skip
"""Every name under which a transformers config keeps a dropout probability."""


STEPS = ("ppo", "dpo", "sft", "reward")
"""Run directories that one directory may hold, as a pipeline's does: the policy that learned last comes first."""


EXPORTS = {"actor": ("actor",), "reward": ("reward", "actor"), "critic": ("critic", "reward", "actor"), "ref": ("actor", "ref")}
"""Role -> the exports of a run directory that it may start from, the first that is there."""


def find_export(path: str, *names: str, key: str = "init", otherwise: str | None = None) -> Path:
    """The HF-layout folder that a key means: the folder itself, or `export/<name>` of a run directory.

    Args:
        key: what names `path`, for messages.
        otherwise: the message where there is no model; None: one that says where it was looked for.

    Raises:
        UserError: nothing at `path` looks like a model.
    """
    root = Path(path)
    for folder in [root, *(root / "export" / name for name in names), *(root / name for name in names)]:
        if (folder / "config.json").is_file():
            return folder
    steps = [step for name in names for step in STEPS if (root / step / "export" / name / "config.json").is_file()]
    if steps:
        raise UserError(f"{key}={path} holds no model, but its step {steps[0]} does: {shlex.quote(f'{key}={root / steps[0]}')}")
    expected = " or ".join(f"export/{name}" for name in names)
    raise UserError(otherwise or f"{key}={path} holds no model: expected config.json there, or in {expected} of a run directory")


def weights_folder(model: ModelConfig, init: Path | None) -> Path | None:
    """The local folder with the weights to start from; hub ids are downloaded. None: random weights.

    Raises:
        UserError: the hub id cannot be fetched, or the folder has no weights.
    """
    if init is not None:
        return init
    if not model.pretrained or model.path is None:
        return None
    folder = Path(model.path)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(model.path, allow_patterns=CONFIG_FILES + WEIGHT_FILES))
        except Exception as error:
            raise UserError(
                f"model {model.name}: {model.path!r} is neither a local folder nor a model that can be fetched ({type(error).__name__}): "
                "give model.path a folder in HF layout, or model.pretrained=false for random weights"
            ) from error
    if not (folder / "config.json").is_file():
        raise UserError(f"model {model.name}: {folder} has no config.json, so it is no model in HF layout")
    return folder


def network_config(
    model: ModelConfig, folder: Path | None, *, key: str, dropout: float | None, vocab_size: int, ids: dict[str, int | None]
) -> PretrainedConfig:
    """The transformers config of a role.

    Args:
        folder: weights to start from; their config.json wins over `model.shape`.
        key: of the model, `actor.model`, for messages.
        dropout: overrides every dropout of the config where it is not None.
        vocab_size: tokens of the tokenizer. A vocabulary that is too small grows to a multiple of 8 (tensor cores; DeepSpeed-Chat's rule);
            one built from a shape takes that size exactly.
        ids: `bos_token_id`, `eos_token_id`, `pad_token_id` of the tokenizer.

    Raises:
        UserError: the config.json, or the family and the shape, are none that transformers knows.
    """
    rounded = -(-vocab_size // 8) * 8
    if folder is not None:
        try:
            config = AutoConfig.from_pretrained(folder)
        except Exception as error:
            raise UserError(
                f"model {model.name}: {folder / 'config.json'} is no configuration that transformers knows: {said(error)}"
            ) from error
        if config.vocab_size < vocab_size:
            config.vocab_size = rounded
    else:
        shape = {key: value for key, value in model.shape.items() if not key.endswith("_token_id")}
        if (model.tokenizer is not None and model.tokenizer.startswith("train:")) or shape["vocab_size"] < vocab_size:
            shape["vocab_size"] = rounded
        config = _config_of_shape(model, shape, key)
    if dropout is not None:
        for name in DROPOUTS:
            if hasattr(config, name):
                setattr(config, name, dropout)
    for name, value in ids.items():
        setattr(config, name, value)
    config.use_cache = True
    return config


def _config_of_shape(model: ModelConfig, shape: dict[str, Any], key: str) -> PretrainedConfig:
    """
    Raises:
        UserError: names the family or the shape.
    """
    if model.family not in CONFIG_MAPPING:
        similar = nearest(str(model.family), CONFIG_MAPPING)
        raise UserError(f"{key}.family={model.family} (model {model.name}): transformers knows no such family{similar}")
    try:
        config = AutoConfig.for_model(model.family, **shape)
    except Exception as error:  # each family has checks of its own
        raise UserError(f"{key}.shape (model {model.name}) is none that the family {model.family} can have: {said(error)}") from error
    _check_keys(config, model, shape, key)
    _check_heads(config, f"{key}.shape (model {model.name})")
    return config


def _check_keys(config: PretrainedConfig, model: ModelConfig, shape: dict[str, Any], key: str) -> None:
    """
    Raises:
        UserError: the family has no such key: transformers would keep it, and nothing would read it. One that is null or false asks for
            nothing.
    """
    known = sorted(set(vars(type(config)())) | set(config.attribute_map))
    for name, value in shape.items():
        if value is not None and value is not False and name not in known and not hasattr(type(config), name):
            raise UserError(f"{key}.shape.{name} (model {model.name}): the family {model.family} has no such key{nearest(name, known)}")


def _check_heads(config: PretrainedConfig, where: str) -> None:
    """What families find only when a network of theirs is built, or when it reads its first tokens.

    Raises:
        UserError: the width of a head is no whole number, query heads do not share their keys evenly, or what is rotated is odd.
    """
    width, heads, kv = (getattr(config, name, None) for name in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if not width or not heads:
        return
    head = getattr(config, "head_dim", None)
    if head is None and width % heads:
        raise UserError(f"{where}: hidden_size={width} does not divide by num_attention_heads={heads}")
    if kv and heads % kv:
        raise UserError(f"{where}: num_attention_heads={heads} does not divide by num_key_value_heads={kv}")
    head = head or width // heads
    rotated = getattr(config, "rotary_dim", None)
    if rotated is None and (rope := getattr(config, "rope_parameters", None)) is not None and "rope_type" in rope:
        rotated = int(head * rope.get("partial_rotary_factor", 1.0))
    if rotated is not None and (rotated % 2 or rotated > head):
        raise UserError(
            f"{where}: {rotated} elements of a head of {head} are rotated, which must be an even number and no more than it has"
        )


def said(error: Exception) -> str:
    """The last of the lines in which a check of transformers complains, which says what is wrong."""
    if isinstance(error, KeyError):
        return f"it knows no {error}"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^\w+Error: ", "", lines[-1].strip())


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every weight in a folder, one at a time, from safetensors or (memory-mapped) .bin files.

    Raises:
        UserError: no weight file is there, or one is cut short.
    """
    files = _shards(folder, "model.safetensors") or sorted(folder.glob("*.safetensors"))
    try:
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    yield name, tensors.get_tensor(name)
        if not files:
            files = _shards(folder, "pytorch_model.bin") or sorted(folder.glob("pytorch_model*.bin"))
            for file in files:
                yield from torch.load(file, map_location="cpu", mmap=True, weights_only=True).items()
    except Exception as error:
        raise UserError(f"the weights in {folder} cannot be read ({error}): the file is damaged or cut short") from error
    if not files:
        raise UserError(f"{folder} has a config.json but no weights (*.safetensors or pytorch_model*.bin)")


def _shards(folder: Path, name: str) -> list[Path]:
    index = folder / f"{name}.index.json"
    if not index.is_file():
        return [folder / name] if (folder / name).is_file() else []
    return [folder / file for file in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
