"""The table of families: how a transformers config reads as a shape, and what a family calls its weights.

Adding a family is one entry in FAMILIES and one case in the parity test. Knows config attributes and names; imports no transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from rlhf.inference.shape import DecoderShape


class UnsupportedFamily(ValueError):
    """The decoder has no form for this model; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Names:
    """Names of a family's parameters without `.weight` and `.bias`; those of a layer stand below `layer` + index. None: it has none."""

    layer: str
    embed: str
    final_norm: str | None
    norm1: str
    norm2: str
    out: str
    down: str
    qkv: tuple[str, ...]
    """q, k and v, or one matrix that holds all three."""
    qkv_order: Literal["separate", "stacked", "per_head"] = "separate"
    """stacked: all of q, then k, then v. per_head: q, k and v of the first head, then of the second."""
    up: tuple[str, ...]
    """One matrix; of a gated MLP gate and up, or one that holds both stacked."""
    head: str = "lm_head"
    """Absent from the model: tied to `embed`."""
    positions: str | None = None
    embed_norm: str | None = None
    project_in: str | None = None
    project_out: str | None = None
    q_norm: str | None = None
    k_norm: str | None = None
    transposed: bool = False
    """Matrices of a layer are stored (in, out) (GPT-2's Conv1D)."""


@dataclass(frozen=True)
class Family:
    shape: Callable[[Any], DecoderShape]
    names: Names


ACTIVATIONS = {
    "relu": "relu", "gelu": "gelu", "gelu_python": "gelu", "silu": "silu", "swish": "silu",
    "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip
"""transformers' names -> ours. gelu_new and gelu_fast are the same function, written differently."""


def describe(config: Any) -> DecoderShape:
    """The shape of a model from its transformers config.

    Raises:
        UnsupportedFamily: no entry for the family, or an option of it that the decoder does not have.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedFamily(f"family {config.model_type!r} has no entry in the table of families")
    return family.shape(config)


def names_of(shape: DecoderShape) -> Names:
    return FAMILIES[shape.family].names


def _activation(config: Any, name: str) -> Any:
    if name not in ACTIVATIONS:
        raise UnsupportedFamily(f"activation {name!r} of {config.model_type!r} is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _refuse(config: Any, **unwanted: Any) -> None:
    """An option that changes the computation must have its plain value."""
    for name, plain in unwanted.items():
        value = getattr(config, name, plain)
        if value not in (plain, None):
            raise UnsupportedFamily(f"{config.model_type!r} with {name}={value!r} computes something else than the decoder")


def _refuse_changing_rope(config: Any) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3"):
        raise UnsupportedFamily(f"rotary positions of type {rope['rope_type']!r} change with the length of the text")


def _shape(config: Any, **values: Any) -> DecoderShape:
    plain = {
        "family": config.model_type, "vocab": config.vocab_size, "window": 0, "position_offset": 0, "post_norm": False,
        "parallel_residual": False, "gated": False, "max_positions": getattr(config, "max_position_embeddings", 0) or 0,
    }  # fmt: skip
    return DecoderShape(**({"embed_width": values["hidden"]} | plain | values))


def _opt(config: Any) -> DecoderShape:
    _refuse(config, enable_bias=True, layer_norm_elementwise_affine=True, _remove_final_layer_norm=False)
    return _shape(
        config, layers=config.num_hidden_layers, hidden=config.hidden_size, embed_width=config.word_embed_proj_dim,
        heads=config.num_attention_heads, kv_heads=config.num_attention_heads, head_dim=config.hidden_size // config.num_attention_heads,
        intermediate=config.ffn_dim, positions="learned", position_offset=2, norm="layer", norm_eps=1e-5, post_norm=not config.do_layer_norm_before,
        activation=_activation(config, config.activation_function),
    )  # fmt: skip


def _gpt2(config: Any) -> DecoderShape:
    _refuse(config, scale_attn_by_inverse_layer_idx=False, scale_attn_weights=True, add_cross_attention=False)
    return _shape(
        config, layers=config.n_layer, hidden=config.n_embd, heads=config.n_head, kv_heads=config.n_head,
        head_dim=config.n_embd // config.n_head, intermediate=config.n_inner or 4 * config.n_embd, positions="learned", norm="layer",
        norm_eps=config.layer_norm_epsilon, activation=_activation(config, config.activation_function),
    )  # fmt: skip


def _gpt_neox(config: Any) -> DecoderShape:
    _refuse_changing_rope(config)
    return _shape(
        config, layers=config.num_hidden_layers, hidden=config.hidden_size, heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads, head_dim=config.hidden_size // config.num_attention_heads,
        intermediate=config.intermediate_size, positions="rotary", norm="layer", norm_eps=config.layer_norm_eps,
        parallel_residual=config.use_parallel_residual, activation=_activation(config, config.hidden_act),
    )  # fmt: skip


def _bloom(config: Any) -> DecoderShape:
    _refuse(config, apply_residual_connection_post_layernorm=False)
    return _shape(
        config, layers=config.n_layer, hidden=config.hidden_size, heads=config.n_head, kv_heads=config.n_head,
        head_dim=config.hidden_size // config.n_head, intermediate=4 * config.hidden_size, positions="alibi", norm="layer",
        norm_eps=config.layer_norm_epsilon, activation="gelu_tanh",
    )  # fmt: skip


def _llama(config: Any) -> DecoderShape:
    """LLaMA and what came of it: Mistral, Qwen2, Qwen3, Phi-3, SmolLM2."""
    _refuse_changing_rope(config)
    heads = config.num_attention_heads
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]  # families without the list slide in every layer
    slides = getattr(config, "use_sliding_window", True) and "sliding_attention" in kinds
    return _shape(
        config, layers=config.num_hidden_layers, hidden=config.hidden_size, heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads, intermediate=config.intermediate_size,
        window=(getattr(config, "sliding_window", None) or 0) if slides else 0, positions="rotary", norm="rms",
        norm_eps=config.rms_norm_eps, gated=True, activation=_activation(config, config.hidden_act),
    )  # fmt: skip


OPT = Names(
    layer="model.decoder.layers.", embed="model.decoder.embed_tokens", positions="model.decoder.embed_positions",
    final_norm="model.decoder.final_layer_norm", project_in="model.decoder.project_in", project_out="model.decoder.project_out",
    norm1="self_attn_layer_norm", norm2="final_layer_norm", qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.out_proj", up=("fc1",), down="fc2",
)  # fmt: skip
GPT2 = Names(
    layer="transformer.h.", embed="transformer.wte", positions="transformer.wpe", final_norm="transformer.ln_f", norm1="ln_1", norm2="ln_2",
    qkv=("attn.c_attn",), qkv_order="stacked", out="attn.c_proj", up=("mlp.c_fc",), down="mlp.c_proj", transposed=True,
)  # fmt: skip
GPT_NEOX = Names(
    layer="gpt_neox.layers.", embed="gpt_neox.embed_in", final_norm="gpt_neox.final_layer_norm", norm1="input_layernorm",
    norm2="post_attention_layernorm", qkv=("attention.query_key_value",), qkv_order="per_head", out="attention.dense",
    up=("mlp.dense_h_to_4h",), down="mlp.dense_4h_to_h",
)  # fmt: skip
BLOOM = Names(
    layer="transformer.h.", embed="transformer.word_embeddings", embed_norm="transformer.word_embeddings_layernorm",
    final_norm="transformer.ln_f", norm1="input_layernorm", norm2="post_attention_layernorm", qkv=("self_attention.query_key_value",),
    qkv_order="per_head", out="self_attention.dense", up=("mlp.dense_h_to_4h",), down="mlp.dense_4h_to_h",
)  # fmt: skip
LLAMA = Names(
    layer="model.layers.", embed="model.embed_tokens", final_norm="model.norm", norm1="input_layernorm", norm2="post_attention_layernorm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), q_norm="self_attn.q_norm", k_norm="self_attn.k_norm",
    out="self_attn.o_proj", up=("mlp.gate_proj", "mlp.up_proj"), down="mlp.down_proj",
)  # fmt: skip
PHI3 = Names(
    layer="model.layers.", embed="model.embed_tokens", final_norm="model.norm", norm1="input_layernorm", norm2="post_attention_layernorm",
    qkv=("self_attn.qkv_proj",), qkv_order="stacked", out="self_attn.o_proj", up=("mlp.gate_up_proj",), down="mlp.down_proj",
)  # fmt: skip

FAMILIES = {
    "opt": Family(_opt, OPT),
    "gpt2": Family(_gpt2, GPT2),
    "gpt_neox": Family(_gpt_neox, GPT_NEOX),
    "bloom": Family(_bloom, BLOOM),
    "llama": Family(_llama, LLAMA),
    "mistral": Family(_llama, LLAMA),
    "qwen2": Family(_llama, LLAMA),
    "qwen3": Family(_llama, LLAMA),
    "phi3": Family(_llama, PHI3),
}
"""transformers' `model_type` -> how to read it. SmolLM2 is `llama`, Pythia is `gpt_neox`."""
