"""How fast a rollout could be at best on this machine: two measured rates and two formulas.

Knows tensors and sizes; knows no engine and no configuration.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

COPIES = 8
"""Attempts of each measurement; the best one counts, since the floor is what the machine can do."""


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What the floor needs to know of a causal LM."""

    read: int
    """Parameters read in every decode step: all but tables in which a token looks one row up. A tied head is read whole."""
    multiplied: int
    """Parameters that every prompt token is multiplied with: all but embeddings."""
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    element_bytes: int
    """Of a weight, and of a key or value."""

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers, in bytes."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.element_bytes


def model_size(model: Any, dtype: torch.dtype) -> ModelSize:
    """The size of a transformers causal LM, sharded by ZeRO-3 or not. Adapters do not count: an engine folds them in."""
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    head = model.get_output_embeddings().weight
    weights = [p for name, p in model.named_parameters() if "lora_" not in name]
    config = model.config
    heads = config.num_attention_heads
    return ModelSize(
        read=sum(_numel(p) for p in weights if p is head or not _among(p, tables)),
        multiplied=sum(_numel(p) for p in weights if not _among(p, tables)),
        layers=config.num_hidden_layers, heads=heads, kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads, element_bytes=dtype.itemsize,
    )  # fmt: skip


def _numel(parameter: Any) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves an empty tensor and the number


def _among(parameter: Any, others: list[Any]) -> bool:
    return any(parameter is other for other in others)


def decode_floor(size: ModelSize, *, batch: int, prompt: int, new: int, bandwidth: float, tp: int = 1) -> float:
    """Seconds in which one rank can read what it must to decode `new` tokens for `batch` sequences of its own.

    steps x (weight bytes / tp + batch x mean KV bytes) / bandwidth, with new - 1 steps (the prefill gives the first token) and the KV
    cache at its mean length, prompt + new / 2 tokens. In a tensor-parallel group of `tp` ranks each holds 1 / tp of the weights, and
    1 / tp of the KV of tp x batch sequences.

    Args:
        bandwidth: bytes/s of device memory.
    """
    kv = size.kv_bytes_per_token * (prompt + new / 2)
    return (new - 1) * (size.read * size.element_bytes / tp + batch * kv) / bandwidth


def prefill_floor(size: ModelSize, *, batch: int, prompt: int, rate: float) -> float:
    """Seconds for the matrix products over `batch` prompts of `prompt` tokens: the same on one rank and in a tensor-parallel group.

    A product with a weight costs 2 operations a parameter and token. Attention adds q k^T and its product with v: 2 x 2 operations for
    each pair of tokens, layer and channel, of which the causal half is needed. Norms, softmax and the head at one position are left out.

    Args:
        rate: matrix operations/s.
    """
    weights = 2 * size.multiplied * prompt
    attention = 4 * size.layers * size.heads * size.head_dim * prompt * prompt / 2
    return batch * (weights + attention) / rate


def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s of a copy within device memory, what is read and what is written both counted. 1 GiB on CUDA, 256 MiB on a CPU."""
    count = 2**30 if device.type == "cuda" else 2**28
    return 2 * count / min(timed(copy_work(device, count), device, repeats=COPIES))


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations/s of a square matrix product: 8192 wide on CUDA, 1024 on a CPU."""
    width = 8192 if device.type == "cuda" else 1024
    return 2 * width**3 / min(timed(matmul_work(device, dtype, width), device, repeats=COPIES))


def copy_work(device: torch.device, count: int) -> Callable[[], Any]:
    """A copy of `count` bytes within device memory."""
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def matmul_work(device: torch.device, dtype: torch.dtype, width: int) -> Callable[[], Any]:
    """A product of two `width` x `width` matrices."""
    a = torch.randn(width, width, device=device).to(dtype)
    return lambda: a @ a


def timed(work: Callable[[], Any], device: torch.device, *, repeats: int, warmup: int = 1) -> list[float]:
    """Seconds of each of `repeats` calls, after some that are not counted, with the device idle at both ends of each."""
    seconds = []
    for call in range(warmup + repeats):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        if call >= warmup:
            seconds.append(time.perf_counter() - start)
    return seconds


def synchronize(device: torch.device) -> None:
    """Waits for what is queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
