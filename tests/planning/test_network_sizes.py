"""Counts of networks against the published numbers and against transformers' own models."""

from __future__ import annotations

from typing import Any

import pytest
from plans import models
from tiny import SHAPES, config
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.config import UserError
from rlhf.planning.networks import FAMILIES, check_count, network
from rlhf.settings import ModelConfig

MODELS = models()


def model(name: str = "opt-125m", **changes: Any) -> ModelConfig:
    values = {key: value for key, value in MODELS[name].items() if key != "_target_"}
    return ModelConfig(**(values | changes))


@pytest.mark.parametrize("name", MODELS)
def test_every_model_of_conf_has_the_published_count(name: str) -> None:
    assert network(model(name), "actor").parameters("causal") == MODELS[name]["parameters"]
    check_count(model(name), "actor")


@pytest.mark.parametrize("family", SHAPES)
def test_counts_are_those_of_transformers(family: str) -> None:
    made = config(family)
    found = FAMILIES[made.model_type](made.to_dict() | _canonical(made))
    weights = list(AutoModelForCausalLM.from_config(made).parameters())
    assert found.parameters("causal") == sum(p.numel() for p in weights)
    assert found.tensors("causal") == len(weights)
    assert found.layers == made.num_hidden_layers and found.vocab == made.vocab_size
    if made.model_type != "codegen":  # transformers has no scalar model for it
        scalar = AutoModelForSequenceClassification.from_config(config(family, num_labels=1))
        assert found.parameters("scalar") == sum(p.numel() for p in scalar.parameters())
        assert found.tensors("scalar") == len(list(scalar.parameters()))


def _canonical(made: Any) -> dict[str, Any]:
    """conf/model writes the names that every family understands."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "tie_word_embeddings")
    return {name: getattr(made, name) for name in names if hasattr(made, name)}


@pytest.mark.parametrize(("family", "tied"), [("qwen3", True), ("mistral", False), ("phi3", False), ("qwen2", False)])
def test_families_without_a_file(family: str, tied: bool) -> None:
    from transformers import AutoConfig

    shape = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 64,
        "tie_word_embeddings": tied, "pad_token_id": 0, "head_dim": 8,
    }  # fmt: skip
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape))
    assert FAMILIES[family](shape).parameters("causal") == sum(p.numel() for p in made.parameters())
    assert FAMILIES[family](shape).tensors("causal") == len(list(made.parameters()))


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(UserError, match=r"actor.model.family=optt has no known shape \(did you mean 'opt'\?\): planning knows opt, gpt2"):
        network(model(family="optt"), "actor")


def test_a_missing_size_is_named() -> None:
    shape = {key: value for key, value in MODELS["opt-125m"]["shape"].items() if key != "ffn_dim"}
    with pytest.raises(UserError, match=r"critic.model.shape.ffn_dim is missing.*opt-125m"):
        network(model(shape=shape), "critic")


def test_a_count_that_contradicts_the_shape_is_named() -> None:
    with pytest.raises(UserError, match=r"actor.model.parameters=7 contradicts actor.model.shape, which makes 125239296"):
        check_count(model(parameters=7), "actor")
