"""Tiny models of every family with noise in their weights, their decoders, and what transformers says of the same prompts."""

from __future__ import annotations

from typing import Any

import torch
from tiny import COMMON, SHAPES
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.inference.build import PlainWeights, positions_of
from rlhf.inference.decoder import Decoder
from rlhf.inference.families import describe
from rlhf.inference.generate import Generator
from rlhf.inference.parallel import Parallel
from rlhf.inference.reference import TorchOps
from rlhf.inference.sampling import Sampling
from rlhf.inference.weights import DecoderWeights

CPU = torch.device("cpu")
END, PAD = 2, 3
POSITIONS = 128
NEW = 64

LLAMA = SHAPES["llama"]
FAMILIES: dict[str, dict[str, Any]] = {
    "opt": SHAPES["opt"],
    "opt-350m": SHAPES["opt-post-ln"],
    "gpt2": SHAPES["gpt2"],
    "gpt_neox": SHAPES["gpt_neox"],
    "gpt_neox-serial": {**SHAPES["gpt_neox"], "use_parallel_residual": False},
    "bloom": SHAPES["bloom"],
    "llama-mha": {**LLAMA, "num_key_value_heads": 4},
    "llama-gqa": LLAMA,
    "llama-bias": {**LLAMA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}},
    "mistral": LLAMA,
    "qwen2": SHAPES["qwen2"],
    "qwen3": {**SHAPES["qwen2"], "head_dim": 16},
    "phi3": {**LLAMA, "tie_word_embeddings": False},
}  # fmt: skip
"""Test id -> shape; the model type stands before the dash."""


def noisy_model(family: str, *, noise: float = 0.15, seed: int = 0, **changes: Any) -> Any:
    """A random causal LM whose biases and norms are not zeros and ones, and whose greedy answers vary."""
    shape: dict[str, Any] = {**COMMON, **FAMILIES[family], **changes}
    if family != "bloom":
        shape["max_position_embeddings"] = POSITIONS
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family.split("-")[0], **shape, attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * noise)
    return model


class PlainSource(PlainWeights):
    """A model's own parameters; the names in `folded` may not be shared, as if an adapter belonged to them."""

    def __init__(self, model: nn.Module, *, folded: tuple[str, ...] = ()) -> None:
        super().__init__(model)
        self.folded = folded

    def shareable(self, name: str) -> bool:
        return name not in self.folded


def weights_of(model: Any, *, parallel: Parallel | None = None, source: PlainSource | None = None) -> DecoderWeights:
    """Filled, on the model's device and in its dtype."""
    source = source or PlainSource(model)
    first = next(model.parameters())
    weights = DecoderWeights(describe(model.config), source, parallel=parallel or Parallel(), dtype=first.dtype, device=first.device)
    weights.arena.map()
    fill(weights, source)
    return weights


def fill(weights: DecoderWeights, source: PlainSource) -> None:
    for part in range(len(weights.parts)):
        weights.fill(part, source)


def generator_of(
    model: Any,
    *,
    slots: int,
    prefill_tokens: int = 64,
    new_tokens: int = NEW,
    ops: TorchOps | None = None,
    graphs: bool = False,
    **sampling: Any,
) -> Generator:
    """Greedy and without stop tokens unless said otherwise; its cache is mapped."""
    shape = describe(model.config)
    decoder = Decoder(
        shape,
        weights_of(model),
        positions_of(model, shape, Parallel(), tokens=POSITIONS, device=model.device),
        ops or TorchOps(),
        Parallel(),
    )
    generator = Generator(
        decoder, plain_sampling(**sampling), slots=slots, tokens=POSITIONS, new_tokens=new_tokens, prefill_tokens=prefill_tokens,
        graphs=graphs, dtype=model.dtype, device=model.device,
    )  # fmt: skip
    generator.cache.map()
    return generator


def plain_sampling(**changes: Any) -> Sampling:
    return Sampling(**({"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_new_tokens": 0, "stop_ids": (), "pad_id": PAD} | changes))


def mixed_prompts(lengths: list[int], *, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, COMMON["vocab_size"], (n,), generator=generator) for n in lengths]


def left_padded(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(B, P) ids and (B, P) int64 mask."""
    width = max(map(len, prompts))
    ids = torch.stack([torch.cat([torch.full((width - len(p),), PAD), p]) for p in prompts])
    mask = torch.stack([torch.cat([torch.zeros(width - len(p)), torch.ones(len(p))]) for p in prompts])
    return ids, mask.long()


def greedy_of_transformers(model: Any, prompts: list[Tensor], *, end: int | None, new_tokens: int = NEW) -> Tensor:
    """(B, A): transformers' greedy answers to one left-padded batch, PAD behind `end`, as wide as new_tokens."""
    ids, mask = left_padded(prompts)
    model.generation_config.eos_token_id = end
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=PAD)
    answers = out[:, ids.shape[1] :]
    return nn.functional.pad(answers, (0, new_tokens - answers.shape[1]), value=PAD)


def full_forward_logprobs(model: Any, prompts: list[Tensor], answers: Tensor, *, temperature: float = 1.0) -> Tensor:
    """(B, A) fp32 under softmax(logits / temperature): one forward pass for each sequence alone, without padding or cache."""
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = model(input_ids=torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1].float()
        found.append((logits / temperature).log_softmax(-1).gather(1, answer[:, None]).squeeze(1))
    return torch.stack(found)
