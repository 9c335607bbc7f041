"""What the decoder's weights are made of: shared storage, fused and sliced copies, and the memory they live in."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from decoders import CPU, FAMILIES, PlainSource, fill, noisy_model, weights_of
from torch import Tensor

from rlhf.inference.arena import ALIGNMENT, Arena
from rlhf.inference.parallel import Parallel
from rlhf.inference.weights import DecoderWeights

COPIED = {
    "opt": {"qkv"}, "opt-350m": {"qkv"}, "gpt2": set(), "gpt_neox": {"qkv"}, "gpt_neox-serial": {"qkv"}, "bloom": {"qkv"},
    "llama-mha": {"qkv", "up"}, "llama-gqa": {"qkv", "up"}, "llama-bias": {"qkv", "up"}, "mistral": {"qkv", "up"}, "qwen2": {"qkv", "up"}, "qwen3": {"qkv", "up"},
    "phi3": set(),
}  # fmt: skip
"""What is fused or ordered anew in each layer; all else is the training network's own."""

KV_HEADS = {"llama-gqa": 2, "llama-bias": 2, "mistral": 2, "qwen2": 2, "qwen3": 2, "phi3": 2}


def storages(model: Any) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in model.parameters()}


def parts_of(key: str) -> tuple[int, str]:
    part, name = key.split(".", 1)
    return int(part), name.rsplit(".", 1)[0]


# --- one rank ---


@pytest.mark.parametrize("family", FAMILIES)
def test_what_needs_no_change_is_shared(family: str) -> None:
    model = noisy_model(family)
    weights = weights_of(model)
    own = storages(model)
    copied = {key for key, tensor in weights.tensors.items() if tensor.untyped_storage().data_ptr() not in own}
    assert {parts_of(key) for key in copied} == {(i + 1, name) for i in range(2) for name in COPIED[family]}
    assert weights.shared == weights.tensors.keys() - copied
    assert set(weights.arena.tensors) == copied


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_read(family: str) -> None:
    """A weight that the table forgets would be missing from the network without a word."""
    model = noisy_model(family)
    weights = weights_of(model)
    read = {name for part in range(len(weights.parts)) for name in weights.parameters_of(part)}
    assert read == set(dict(model.named_parameters()))


def test_conv1d_is_turned_around_without_a_copy() -> None:
    model = noisy_model("gpt2")
    layer, theirs = weights_of(model).layer(0), model.transformer.h[0]
    for ours, conv in ((layer.qkv, theirs.attn.c_attn), (layer.out, theirs.attn.c_proj), (layer.up, theirs.mlp.c_fc)):
        assert torch.equal(ours.weight, conv.weight.t()) and ours.weight.data_ptr() == conv.weight.data_ptr()
        assert torch.equal(ours.bias, conv.bias)  # type: ignore[arg-type]
    assert torch.equal(layer.down.weight, theirs.mlp.c_proj.weight.t())


@pytest.mark.parametrize("family", ["gpt_neox", "bloom"])
def test_heads_that_hold_q_k_and_v_are_sorted(family: str) -> None:
    model, hd = noisy_model(family), 8
    module = model.gpt_neox.layers[1].attention if family == "gpt_neox" else model.transformer.h[1].self_attention
    ours = weights_of(model).layer(1).qkv
    for which in range(3):
        for head in range(4):
            theirs = slice((head * 3 + which) * hd, (head * 3 + which + 1) * hd)
            here = slice((which * 4 + head) * hd, (which * 4 + head + 1) * hd)
            assert torch.equal(ours.weight[here], module.query_key_value.weight[theirs])
            assert torch.equal(ours.bias[here], module.query_key_value.bias[theirs])  # type: ignore[index]


def test_separate_matrices_stand_one_under_the_other() -> None:
    model = noisy_model("qwen2")
    layer, theirs = weights_of(model).layer(0), model.model.layers[0]
    attention, mlp = theirs.self_attn, theirs.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    assert torch.equal(layer.qkv.weight, torch.cat([p.weight for p in projections]))
    assert torch.equal(layer.qkv.bias, torch.cat([p.bias for p in projections]))  # type: ignore[arg-type]
    assert torch.equal(layer.up.weight, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
    assert layer.up.bias is None and layer.out.bias is None


# --- tensor parallelism ---


def whole_from(parts: list[DecoderWeights], index: int, kind: str) -> dict[str, Tensor | None]:
    """A layer's matrices put together from the ranks' slices, in the order of the whole."""
    shape, layers = parts[0].shape, [weights.layer(index) for weights in parts]
    hd = shape.head_dim
    q, kv = shape.heads * hd // len(parts), shape.kv_heads * hd // len(parts)
    f = shape.intermediate // len(parts)

    def rows(name: str, sizes: list[int]) -> Tensor | None:
        pieces = [getattr(getattr(layer, name), kind) for layer in layers]
        if pieces[0] is None:
            return None
        return torch.cat([torch.cat(piece) for piece in zip(*(x.split(sizes) for x in pieces), strict=True)])

    def inputs(name: str) -> Tensor | None:
        pieces = [getattr(getattr(layer, name), kind) for layer in layers]
        if pieces[0] is None:
            return None
        return torch.cat(pieces, 1) if kind == "weight" else sum(pieces)

    return {"qkv": rows("qkv", [q, kv, kv]), "up": rows("up", [f, f] if shape.gated else [f]), "out": inputs("out"), "down": inputs("down")}


@pytest.mark.parametrize(("family", "size"), [(family, size) for family in FAMILIES for size in (2, 4) if size <= KV_HEADS.get(family, 4)])
def test_the_slices_of_all_ranks_are_the_whole(family: str, size: int) -> None:
    model = noisy_model(family)
    whole = weights_of(model)
    parts = [weights_of(model, parallel=Parallel(rank, size)) for rank in range(size)]
    for index in range(whole.shape.layers):
        for kind in ("weight", "bias"):
            for name, found in whole_from(parts, index, kind).items():
                expected = getattr(getattr(whole.layer(index), name), kind)
                assert (found is None) == (expected is None), (name, kind)
                assert found is None or torch.equal(found, expected), (name, kind)
    for weights in parts:
        outside = {key for key in weights.tensors if key.startswith("0.")}
        assert all(torch.equal(weights.tensors[key], whole.tensors[key]) for key in outside)
        assert weights.arena.bytes < 0.75 * sum(p.numel() * 4 for p in model.parameters()), "a rank holds more than its share"
    sizes = [{key: tuple(t.shape) for key, t in weights.tensors.items()} for weights in parts]
    assert all(shapes == sizes[0] for shapes in sizes)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_rank_reads_the_same_parameters(family: str) -> None:
    """They are gathered together: a rank that asks for one less would leave the others waiting."""
    model = noisy_model(family)
    ranks = [weights_of(model, parallel=Parallel(rank, 2)) for rank in range(2)]
    for part in range(len(ranks[0].parts)):
        assert ranks[0].parameters_of(part) == ranks[1].parameters_of(part)


# --- filling again ---


@pytest.mark.parametrize("parallel", [Parallel(), Parallel(1, 2)], ids=["alone", "rank 1 of 2"])
@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt_neox", "llama-gqa", "phi3"])
def test_a_training_step_reaches_the_decoder(family: str, parallel: Parallel) -> None:
    model = noisy_model(family)
    source = PlainSource(model)
    weights = weights_of(model, source=source, parallel=parallel)
    addresses = {key: t.data_ptr() for key, t in weights.tensors.items()}
    for parameter in model.parameters():
        parameter.mul_(1.5)
    fill(weights, source)
    fresh = weights_of(model, parallel=parallel)
    assert all(torch.equal(t, fresh.tensors[key]) for key, t in weights.tensors.items())
    assert {key: t.data_ptr() for key, t in weights.tensors.items()} == addresses
    assert not weights.moved


def test_a_shared_parameter_that_moves_is_noticed() -> None:
    model = noisy_model("llama-gqa")
    weights, source = weights_of(model), PlainSource(model)
    model.model.norm.weight.data = model.model.norm.weight.data.clone()
    for part in range(1, len(weights.parts)):
        weights.fill(part, source)
    assert not weights.moved
    weights.fill(0, source)
    assert weights.moved
    assert weights.tensors["0.final_norm.weight"].data_ptr() == model.model.norm.weight.data_ptr()


def test_what_the_source_folds_is_copied() -> None:
    model = noisy_model("opt")
    name = "model.decoder.layers.1.fc2.weight"
    weights = weights_of(model, source=PlainSource(model, folded=(name,)))
    assert "2.down.weight" not in weights.shared and "1.down.weight" in weights.shared
    assert torch.equal(weights.tensors["2.down.weight"], dict(model.named_parameters())[name])


# --- the arena ---

SPECS: Any = {"a": ((3, 5), torch.float32), "b": ((7,), torch.bfloat16), "c": ((2, 2), torch.int64)}


def test_an_arena_has_its_tensors_while_it_is_mapped() -> None:
    arena = Arena(SPECS, CPU)
    assert arena.bytes == 3 * ALIGNMENT and not arena.mapped and not arena.tensors
    arena.map()
    assert {name: (tuple(t.shape), t.dtype) for name, t in arena.tensors.items()} == SPECS
    assert all((t == 0).all() for t in arena.tensors.values())
    kept = dict(arena.tensors)
    arena.map()
    assert all(arena.tensors[name] is t for name, t in kept.items()), "mapping twice got new memory"
    gone = [weakref.ref(t) for t in kept.values()]
    kept.clear()
    arena.unmap()
    gc.collect()
    assert not arena.mapped and not any(ref() is not None for ref in gone)
    arena.unmap()
    arena.map()
    assert (arena.tensors["a"] == 0).all()
    arena.close()
    assert not arena.mapped and not arena.tensors


def test_weights_that_were_given_back_are_gone() -> None:
    """All that is left of a rollout's weights is what training holds anyway."""
    model = noisy_model("llama-gqa")
    weights = weights_of(model)
    copies = [weakref.ref(t) for key, t in weights.tensors.items() if key not in weights.shared]
    assert copies
    weights.release()
    gc.collect()
    assert not any(ref() is not None for ref in copies)
    weights.arena.map()
    fill(weights, PlainSource(model))
    assert all(torch.equal(t, weights_of(model).tensors[key]) for key, t in weights.tensors.items())
