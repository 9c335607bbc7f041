"""From a transformers config to a shape; what the decoder does not compute is refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
from decoders import FAMILIES
from tiny import COMMON, SHAPES, config
from transformers import AutoConfig

from rlhf.inference.families import UnsupportedFamily, describe


def described(family: str, **changes: Any) -> Any:
    return describe(AutoConfig.for_model(family.split("-")[0], **{**COMMON, **FAMILIES[family], **changes}))


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (
            "opt",
            {"positions": "learned", "position_offset": 2, "post_norm": False, "activation": "relu", "embed_width": 32, "gated": False},
        ),
        ("opt-350m", {"post_norm": True, "embed_width": 16, "hidden": 32}),
        ("gpt2", {"positions": "learned", "position_offset": 0, "activation": "gelu_tanh", "intermediate": 128, "max_positions": 64}),
        ("gpt_neox", {"positions": "rotary", "parallel_residual": True, "activation": "gelu", "norm": "layer"}),
        ("gpt_neox-serial", {"parallel_residual": False}),
        ("bloom", {"positions": "alibi", "intermediate": 128, "max_positions": 0}),
        ("llama-gqa", {"kv_heads": 2, "group": 2, "qkv_width": 64, "norm": "rms", "gated": True, "activation": "silu", "head_dim": 8}),
        ("llama-mha", {"kv_heads": 4, "group": 1, "qkv_width": 96}),
        ("qwen3", {"head_dim": 16, "qkv_width": 128}),
    ],
)
def test_a_config_reads_as_a_shape(family: str, expected: dict[str, Any]) -> None:
    shape = described(family)
    assert {name: getattr(shape, name) for name in expected} == expected
    assert (shape.layers, shape.heads, shape.vocab) == (2, 4, 64)


@pytest.mark.parametrize("family", ["gptj", "gpt_neo", "codegen"])
def test_a_family_without_an_entry_is_named(family: str) -> None:
    assert family in SHAPES
    with pytest.raises(UnsupportedFamily, match=f"family '{family}' has no entry in the table of families"):
        describe(config(family))


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("opt", {"enable_bias": False}, "enable_bias=False"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine=False"),
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm=True"),
        ("opt", {"activation_function": "quick_gelu"}, "activation 'quick_gelu' of 'opt' is not one of"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm=True"),
        ("llama-gqa", {"hidden_act": "mish"}, "activation 'mish' of 'llama' is not one of"),
        ("llama-gqa", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "type 'dynamic' change with the length"),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, "rotary positions of type 'yarn'"),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
             "original_max_position_embeddings": 32},
            "type 'longrope' change with the length",
        ),
        ("gpt_neox", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "type 'dynamic' change with the length"),
    ],
)  # fmt: skip
def test_an_option_that_the_decoder_lacks_is_refused(family: str, changes: dict[str, Any], reason: str) -> None:
    described(family)
    with pytest.raises(UnsupportedFamily) as refused:
        described(family, **changes)
    assert reason in str(refused.value)


@pytest.mark.parametrize(
    ("family", "changes", "window"),
    [
        ("llama-gqa", {}, 0),
        ("mistral", {"sliding_window": None}, 0),
        ("mistral", {"sliding_window": 16}, 16),
        ("phi3", {"sliding_window": 16}, 16),
        ("qwen2", {"sliding_window": 16}, 0),  # its switch is off
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}, 16),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2}, 0),  # from layer 2 on: there is none
        ("qwen3", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0}, 16),
    ],
)
def test_the_window_is_that_of_the_layers_that_slide(family: str, changes: dict[str, Any], window: int) -> None:
    assert described(family, **changes).window == window
