"""What autograd keeps, counted in real forward passes of transformers' models, against the formula."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from plans import job
from test_network_sizes import _canonical
from tiny import config
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf.models.networks import CausalLM
from rlhf.planning.activations import backward_workspace, forward_workspace, kept, logits
from rlhf.planning.networks import FAMILIES
from rlhf.planning.workload import Role

ROWS, LENGTH = 4, 32
WIDER = {"opt": {"ffn_dim": 128}, "llama": {"intermediate_size": 80}, "gpt_neox": {"intermediate_size": 128}}


def measured(family: str, dtype: torch.dtype, *, checkpointing: bool) -> tuple[int, Role]:
    """Bytes of distinct storages that a training forward pass saves, parameters and integers left out."""
    made = config(family, **WIDER.get(family, {}))
    model = AutoModelForCausalLM.from_config(made, dtype=dtype).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, tuple[int, Tensor]] = {}  # holding the tensors keeps addresses from being used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.is_floating_point():
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.randint(4, made.vocab_size, (ROWS, LENGTH))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        CausalLM(model)(ids, torch.ones_like(ids, dtype=torch.bool))
    network = FAMILIES[made.model_type](made.to_dict() | _canonical(made))
    role = dataclasses.replace(job(actor="opt-125m").roles["actor"], network=network, checkpointing=checkpointing, drops=False)
    return sum(size for size, _ in saved.values()), role


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "tolerance"), [("opt", 0.02), ("llama", 0.02), ("gpt2", 0.02), ("gpt_neox", 0.02), ("qwen2", 0.02), ("opt-post-ln", 0.02),
                              ("bloom", 0.08), ("gptj", 0.08)]
)  # fmt: skip
def test_what_is_kept_for_the_backward_pass(family: str, tolerance: float, dtype: torch.dtype) -> None:
    size, role = measured(family, dtype, checkpointing=False)
    assert kept(role, dtype.itemsize, ROWS, LENGTH) == pytest.approx(size, rel=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["opt", "llama", "gpt_neox"])
def test_with_checkpointing_the_layers_inputs_are_kept(family: str, dtype: torch.dtype) -> None:
    size, role = measured(family, dtype, checkpointing=True)
    one_layer = kept(role, dtype.itemsize, ROWS, LENGTH) - size  # is made again in the backward pass, layer by layer
    alone = dataclasses.replace(role, network=dataclasses.replace(role.network, layers=1), checkpointing=False)
    inputs = ROWS * LENGTH * dtype.itemsize * role.network.hidden
    assert one_layer + size == pytest.approx(kept(alone, dtype.itemsize, ROWS, LENGTH) + inputs, rel=0.02)
    assert size < kept(dataclasses.replace(role, checkpointing=False), dtype.itemsize, ROWS, LENGTH)


def test_sizes_by_hand() -> None:
    """OPT-1.3B, one row of 512 tokens in bf16: 12 hidden sizes of 2 bytes a layer, with attention's and the norms' sums."""
    role = job().roles["actor"]
    layer = 2 * 12 * 2048 + 4 * 32 + 16
    assert kept(role, 2, 1, 512) == 512 * (24 * layer + 2 * 3 * 2048)
    assert logits(role.network, 2, 8, 257, backward=False) == 8 * 257 * 50272 * 2 + 2**24 * 12
    assert logits(role.network, 2, 8, 257, backward=True) == 2 * 8 * 257 * 50272 * 2 + 2**24 * 12
    assert forward_workspace(role.network, 2, 1, 512) == 512 * 2 * (2 * 8192 + 4 * 2048)
    assert backward_workspace(role, 2, 3, 512) == 3 * backward_workspace(role, 2, 1, 512)


def test_adapters_and_dropout_add_to_it() -> None:
    plain = job().roles["actor"]
    adapted = job("lora@actor.lora=r128").roles["actor"]
    assert kept(adapted, 2, 1, 1) - kept(plain, 2, 1, 1) == 24 * 6 * 128 * 2
    dropping = job("actor.dropout=0.1").roles["actor"]
    assert kept(dropping, 2, 1, 1) - kept(plain, 2, 1, 1) == 24 * 2 * 2048
