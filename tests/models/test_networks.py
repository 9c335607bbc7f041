"""Networks are built from local folders of every family, and what is exported is what transformers computes."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel  # noqa: F401 (imports early, so that its start-up is not timed in a test)
from tiny import COMMON, SHAPES, config, save_causal, save_scalar
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from rlhf.config import UserError
from rlhf.models.export import export_network
from rlhf.models.factory import Blueprint, build_network, freeze
from rlhf.models.lora import init_adapters
from rlhf.models.networks import left_aligned
from rlhf.settings import LoraConfig

LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.0, target_modules="all-linear", only=True, lr=None)


def build(blueprint: Blueprint):
    return build_network(blueprint, sharded=nullcontext(), gather=lambda p: nullcontext(), is_writer=True)


def blueprint(kind: str, folder: Path | None, family: str = "llama", **changes) -> Blueprint:
    hf = AutoConfig.from_pretrained(folder) if folder else config(family)
    plain = Blueprint(kind=kind, config=hf, folder=folder, lora=None, gradient_checkpointing=False, dtype=torch.float32)
    return replace(plain, **changes)


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(60)} | {"<pad>": 60, "<eos>": 61}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "w0")), pad_token="<pad>", eos_token="<eos>")


def padded(rows: int = 3, length: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded ids and their mask."""
    ids = torch.randint(4, 60, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(length) >= torch.tensor([0, 3, 5])[:rows, None]
    return ids.masked_fill(~mask, 3), mask


@pytest.mark.parametrize("family", SHAPES)
def test_loads_a_folder_and_ignores_left_padding(family: str, tmp_path: Path) -> None:
    reference = save_causal(family, tmp_path)
    network = build(blueprint("causal", tmp_path)).eval()
    ids, mask = padded()
    logits = network(ids, mask)
    last = network(ids, mask, last=2)
    assert torch.equal(last, logits[:, -2:])
    for row, start in enumerate([0, 3, 5]):
        alone = reference(ids[row : row + 1, start:]).logits[0]
        torch.testing.assert_close(logits[row, start:], alone, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", [f for f in SHAPES if f != "codegen"])
def test_scalar_model_reads_its_own_export_and_a_causal_folder(family: str, tmp_path: Path) -> None:
    reference = save_scalar(family, tmp_path / "scalar")
    network = build(blueprint("scalar", tmp_path / "scalar")).eval()
    ids, mask = padded(1)
    torch.testing.assert_close(network(ids, mask)[:, -1:], reference(ids).logits, rtol=1e-4, atol=2e-5)
    causal = save_causal(family, tmp_path / "causal")
    fresh = build(blueprint("scalar", tmp_path / "causal")).eval()
    hidden = causal.base_model(ids).last_hidden_state
    torch.testing.assert_close(fresh(ids, mask), fresh.model.score(hidden).squeeze(-1), rtol=1e-4, atol=2e-5)
    assert fresh.model.score.in_features == hidden.shape[-1]


def test_family_without_scalar_model_is_refused() -> None:
    with pytest.raises(UserError, match="no scalar model for the family 'codegen'"):
        build(blueprint("scalar", None, "codegen"))


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("lora", [None, LORA])
def test_export_loads_in_transformers_with_the_same_logits(family: str, lora: LoraConfig | None, tmp_path: Path) -> None:
    save_causal(family, tmp_path / "start")
    network = build(blueprint("causal", tmp_path / "start", lora=lora)).eval()
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    export_network(network, tokenizer(), tmp_path / "out", gather=None, is_writer=True)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids, mask = padded(1)
    torch.testing.assert_close(loaded.eval()(ids).logits, network(ids, mask), rtol=1e-4, atol=1e-4)


def test_export_of_a_scalar_model_loads_as_a_classifier(tmp_path: Path) -> None:
    network = build(blueprint("scalar", None, "opt-post-ln", lora=LORA)).eval()
    torch.nn.init.normal_(network.model.score.weight)
    export_network(network, tokenizer(), tmp_path / "out", gather=None, is_writer=True)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    ids, mask = padded(1)
    torch.testing.assert_close(loaded(ids).logits, network(ids, mask)[:, -1:], rtol=1e-4, atol=1e-5)


def test_export_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.models.export.SHARD_BYTES", 10_000)
    save_causal("llama", tmp_path / "start")
    network = build(blueprint("causal", tmp_path / "start")).eval()
    export_network(network, tokenizer(), tmp_path / "out", gather=None, is_writer=True)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    ids, mask = padded(1)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(ids).logits, network(ids, mask))


def test_random_weights_follow_the_family(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build(blueprint("causal", None, "gpt2"))
    reference = AutoModelForCausalLM.from_config(config("gpt2"))
    ours, theirs = dict(network.model.named_parameters()), dict(reference.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert parameter.std().item() == pytest.approx(theirs[name].std().item(), rel=0.3, abs=1e-6), name


@pytest.mark.parametrize("kind", ["causal", "scalar"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_an_adapter_changes_no_random_weight(kind: str, family: str) -> None:
    """So that an actor with adapters and a reference without begin as the same network."""
    parameters = []
    for lora in (None, LORA):
        torch.manual_seed(3)
        named = build(blueprint(kind, None, family, lora=lora)).named_parameters()
        parameters.append({name.replace(".base_layer", ""): p for name, p in named if "lora_" not in name})
    plain, adapted = parameters
    assert plain.keys() == adapted.keys()
    assert [name for name in plain if not torch.equal(plain[name], adapted[name])] == []


def test_grown_vocabulary_keeps_the_old_rows(tmp_path: Path) -> None:
    reference = save_causal("llama", tmp_path)
    grown = blueprint("causal", tmp_path)
    grown.config.vocab_size = 72
    network = build(grown)
    table = network.model.get_input_embeddings().weight
    torch.testing.assert_close(table[:64], reference.get_input_embeddings().weight)
    torch.testing.assert_close(table[64:], reference.get_input_embeddings().weight.mean(0).expand(8, -1))


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save_causal("llama", tmp_path)
    other = blueprint("causal", tmp_path)
    other.config.intermediate_size = 48
    with pytest.raises(UserError, match=r"has shape .* but the model needs"):
        build(other)


def test_cut_weights_are_refused(tmp_path: Path) -> None:
    save_causal("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged or cut short"):
        build(blueprint("causal", tmp_path))


def test_lora_only_trains_adapters_and_head() -> None:
    network = build(blueprint("scalar", None, "llama", lora=LORA))
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert "model.score.weight" in trained and all("lora_" in name for name in trained - {"model.score.weight"})
    assert any("lora_A" in name for name in trained)
    assert not any(p.requires_grad for p in freeze(network).parameters())


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_that_no_export_could_hold_is_refused(target: str) -> None:
    with pytest.raises(
        UserError, match=rf"^lora\.target_modules=\['{target}'\]: \S*{target} (has its weight in common|is no linear layer)"
    ):
        build(blueprint("causal", None, "llama", lora=replace(LORA, target_modules=[target])))


def test_a_head_of_its_own_may_be_adapted(tmp_path: Path) -> None:
    network = build(blueprint("causal", None, "qwen2", lora=replace(LORA, target_modules=["lm_head"]))).eval()
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    export_network(network, tokenizer(), tmp_path / "out", gather=None, is_writer=True)
    ids, mask = padded()
    torch.testing.assert_close(build(blueprint("causal", tmp_path / "out")).eval()(ids, mask), network(ids, mask), rtol=1e-4, atol=2e-5)


def test_adapters_come_from_the_seed_alone(tmp_path: Path) -> None:
    """ZeRO-3 and a GPU draw other numbers before it comes to the adapters, or on another device."""
    save_causal("llama", tmp_path)

    def drawn(seed: int, *, before: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        torch.rand(before)
        network = build(blueprint("causal", tmp_path, lora=LORA))
        return [p.detach() for name, p in network.named_parameters() if "lora_A" in name]

    first, again, other = drawn(3, before=0), drawn(3, before=5), drawn(4, before=0)
    assert first and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    with torch.device("meta"):  # as where a GPU is the default
        init_adapters(build(blueprint("causal", tmp_path, lora=LORA)), lambda p: nullcontext(), is_writer=True)


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path: Path) -> None:
    save_causal("llama", tmp_path)
    ids, mask = padded()
    gradients = []
    for checkpointing in (False, True):
        network = build(blueprint("causal", tmp_path, gradient_checkpointing=checkpointing))
        network(ids, mask).logsumexp(-1).sum().backward()
        gradients.append(network.model.get_input_embeddings().weight.grad)
    torch.testing.assert_close(*gradients)


def test_rows_move_to_the_front() -> None:
    ids = torch.tensor([[9, 9, 5, 6], [5, 6, 7, 9]])
    mask = torch.tensor([[False, False, True, True], [True, True, True, False]])
    aligned, shift = left_aligned(ids, mask)
    assert aligned.tolist() == [[5, 6, 9, 9], [5, 6, 7, 9]] and shift.tolist() == [[2], [0]]


def test_padding_gets_no_gradient(tmp_path: Path) -> None:
    """What stands in the padding changes neither the answer's logits nor any gradient."""
    save_causal("llama", tmp_path)
    ids, mask = padded()
    found = []
    for filler in (3, 7):
        network = build(blueprint("causal", tmp_path))
        logits = network(ids.masked_fill(~mask, filler), mask, last=3)
        logits.logsumexp(-1).sum().backward()
        found.append((logits.detach(), network.model.get_input_embeddings().weight.grad))
    torch.testing.assert_close(*found)


def test_a_family_that_changes_its_logits_is_refused() -> None:
    with pytest.raises(UserError, match="final_logit_softcapping"):
        build(
            blueprint(
                "causal", None, config=AutoConfig.for_model("gemma2", **COMMON, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
            )
        )
