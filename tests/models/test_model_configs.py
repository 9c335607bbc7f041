"""Every option of the groups model, zero, lora, tp, optimizer, scheduler and hardware: it composes, it builds, and networks have their size.

Knows no weights: networks are built on torch's meta device, where even BLOOM-176B costs no memory.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from rlhf import settings
from rlhf.config import build

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
CLASSES = {
    "model": settings.ModelConfig,
    "zero": settings.ZeroConfig,
    "lora": settings.LoraConfig,
    "tp": settings.TensorParallelConfig,
    "optimizer": settings.OptimizerConfig,
    "scheduler": settings.SchedulerConfig,
    "hardware": settings.HardwareConfig,
}
OPTIONS = [(group, path.stem) for group in CLASSES for path in sorted((CONF / group).glob("*.yaml"))]
MODELS = [option for group, option in OPTIONS if group == "model"]

BYTES_PER_MASK = 2048 * 2048  # CodeGen's checkpoints hold one causal mask a layer

# What others say the size is. A name such as "2.7B" is rounded too far for 1 %, so then the source is a count or the size of a file.
PUBLISHED: dict[str, tuple[float, str]] = {
    "opt-125m": (125e6, "arXiv 2205.01068, table 1"),
    "opt-350m": (331_196_416, "DiZO's benchmark script"),
    "opt-1.3b": (1_315_758_080, "count printed by several public LoRA scripts before adapters are added"),
    "opt-2.7b": (2_651_596_800, "tensor count of a public fp16 checkpoint of 5,303,361,770 bytes"),
    "opt-6.7b": (6_666_862_592 - 8_388_608, "PEFT's int8 notebook: all parameters less the adapters"),
    "opt-13b": (25.7e9 / 2, "hub: facebook/opt-13b, flax_model.msgpack in fp16"),
    "opt-30b": (30e9, "arXiv 2205.01068, table 1"),
    "opt-66b": (66e9, "arXiv 2205.01068, table 1"),
    "opt-175b": (175e9, "arXiv 2205.01068, table 1"),
    "llama2-7b": (6_738_415_616, "Ollama's general.parameter_count"),
    "llama2-13b": (13_015_864_320, "count printed by several public repositories"),
    "llama2-70b": (68_976_648_192, "togethercomputer's table of parameter counts"),
    "gpt2": (124e6, "github.com/openai/gpt-2: model 124M"),
    "gpt2-medium": (355e6, "github.com/openai/gpt-2: model 355M"),
    "gpt2-large": (774e6, "github.com/openai/gpt-2: model 774M"),
    "gpt2-xl": (1558e6, "github.com/openai/gpt-2: model 1558M"),
    "gpt-j-6b": (6_053_381_344, "model card of EleutherAI/gpt-j-6b"),
    "gpt-neo-125m": (125e6, "model card of EleutherAI/gpt-neo-125m"),
    "gpt-neo-1.3b": (5.26e9 / 4, "hub: EleutherAI/gpt-neo-1.3B, flax_model.msgpack in fp32"),
    "gpt-neo-2.7b": (10.6e9 / 4, "hub: EleutherAI/gpt-neo-2.7B, flax_model.msgpack in fp32"),
    "pythia-70m": (70_426_624, "Pythia model cards, exact counts"),
    "pythia-160m": (162_322_944, "Pythia model cards, exact counts"),
    "pythia-410m": (405_334_016, "Pythia model cards, exact counts"),
    "pythia-1b": (1_011_781_632, "Pythia model cards, exact counts"),
    "pythia-1.4b": (1_414_647_808, "Pythia model cards, exact counts"),
    "pythia-2.8b": (2_775_208_960, "Pythia model cards, exact counts"),
    "pythia-6.9b": (6_857_302_016, "Pythia model cards, exact counts"),
    "pythia-12b": (11_846_072_320, "Pythia model cards, exact counts"),
    "bloom-560m": (559_214_592, "model card of bigscience/bloom-560m"),
    "bloom-1b1": (1_065_314_304, "model card of bigscience/bloom-1b1"),
    "bloom-1b7": (1_722_408_960, "model card of bigscience/bloom-1b7"),
    "bloom-3b": (3_002_557_440, "model card of bigscience/bloom-3b"),
    "bloom-7b1": (7_069_016_064, "model card of bigscience/bloom-7b1"),
    "bloom-176b": (176_247_271_424, "model card of bigscience/bloom"),
    "mgpt": (1_417_596_928, "github.com/ai-forever/mgpt, plots of the paper"),
    "codegen-350m": ((797e6 - 20 * BYTES_PER_MASK) / 2, "hub: Salesforce/codegen-350M-mono, pytorch_model.bin in fp16"),
    "codegen-2b": ((5.69e9 - 32 * BYTES_PER_MASK) / 2, "hub: Salesforce/codegen-2B-mono, pytorch_model.bin in fp16"),
    "codegen-6b": (14.1e9 / 2, "hub: michaelfeil/ct2fast-codegen-6B-mono, model.bin in fp16"),
    "qwen2.5-0.5b": (0.49e9, "model card of Qwen/Qwen2.5-0.5B"),
    "qwen2.5-1.5b": (1.54e9, "model card of Qwen/Qwen2.5-1.5B"),
    "qwen2.5-3b": (3.09e9, "model card of Qwen/Qwen2.5-3B"),
    "qwen2.5-7b": (7.61e9, "model card of Qwen/Qwen2.5-7B"),
    "qwen2.5-14b": (14.7e9, "model card of Qwen/Qwen2.5-14B"),
    "qwen2.5-32b": (32.5e9, "model card of Qwen/Qwen2.5-32B"),
    "qwen2.5-72b": (72.7e9, "model card of Qwen/Qwen2.5-72B"),
    "smollm2-135m": (134_515_008, "count printed by a public inspection script"),
    "smollm2-360m": (362e6, "hub: HuggingFaceTB/SmolLM2-360M-Instruct, model size"),
    "smollm2-1.7b": (1.71e9, "hub: HuggingFaceTB/SmolLM2-1.7B-Instruct, model size"),
}
RANDOM = {"tiny", "tiny-opt", "quickstart"}


@cache
def option(group: str, name: str) -> Any:
    """The settings of one option, composed into a role's package as the verbs do."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(overrides=[f"+{group}@role.{group}={name}"])
    return getattr(build(OmegaConf.to_container(cfg.role, resolve=True)), group)


def hf_config(name: str) -> PretrainedConfig:
    model = option("model", name)
    return AutoConfig.for_model(model.family, **model.shape)


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_every_option_composes_and_builds(group: str, name: str) -> None:
    assert isinstance(option(group, name), CLASSES[group])


@pytest.mark.parametrize(("group", "name"), [pair for pair in OPTIONS if pair[0] in ("model", "hardware")])
def test_an_option_carries_its_own_name(group: str, name: str) -> None:
    assert option(group, name).name == name


def test_no_option_reaches_out_of_its_package() -> None:
    """The same file serves actor.model and reward.model, so an absolute interpolation would read the wrong role."""
    for group in CLASSES:
        for path in (CONF / group).rglob("*.yaml"):
            assert not re.search(r"\$\{(?!\.)", path.read_text()), path


@pytest.mark.parametrize("name", MODELS)
def test_the_shape_is_understood_and_counts_what_the_yaml_says(name: str) -> None:
    config = hf_config(name)
    known = set(vars(type(config)())) | set(config.attribute_map)
    assert set(option("model", name).shape) <= known, "transformers would store an unknown keyword without a word"
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in network.parameters()) == option("model", name).parameters


@pytest.mark.parametrize("name", sorted(set(MODELS) - RANDOM))
def test_the_size_is_the_published_one(name: str) -> None:
    figure, source = PUBLISHED[name]
    assert option("model", name).parameters == pytest.approx(figure, rel=0.01), source


@pytest.mark.parametrize("name", sorted(RANDOM))
def test_a_small_model_runs(name: str) -> None:
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(hf_config(name)).eval()
    ids = torch.randint(0, network.config.vocab_size, (2, 8))  # (B, T)
    with torch.no_grad():
        logits = network(ids).logits  # (B, T, V)
    assert logits.shape == (2, 8, network.config.vocab_size)
    assert logits.isfinite().all()


def test_tiny_opt_has_the_traits_of_opt_350m() -> None:
    for name in ("tiny-opt", "opt-350m"):
        shape = option("model", name).shape
        assert not shape["do_layer_norm_before"]
        assert shape["word_embed_proj_dim"] < shape["hidden_size"]


def test_rope_parameters_survive_transformers() -> None:
    for name, theta in (("llama2-7b", 1e4), ("smollm2-135m", 1e5), ("smollm2-1.7b", 1.3e5), ("qwen2.5-0.5b", 1e6), ("pythia-70m", 1e4)):
        assert hf_config(name).rope_parameters["rope_theta"] == theta
    assert hf_config("pythia-70m").rope_parameters["partial_rotary_factor"] == 0.25


def test_original_lora_is_scaled_by_one_over_rank() -> None:
    for name in ("r64", "r128", "r128_only"):
        lora = option("lora", name)
        assert lora.alpha / lora.rank == 1 / lora.rank
        assert lora.lr == 5e-4


def test_the_guide_lists_every_model() -> None:
    table = (ROOT / "docs" / "models.md").read_text()
    for name in MODELS:
        model = option("model", name)
        assert f"| `{name}` | {f'`{model.path}`' if model.path else '-'} | {model.family} | {model.parameters:,} |" in table
