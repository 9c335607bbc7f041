"""The moving average is the exact one in fp32, whatever the ZeRO stage and the number of ranks. That it survives a kill: test_resume.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import composed, run_together
from safetensors.torch import load_file
from test_resume import DECAY, EMA, SMALL
from tiny import write_pairs

from rlhf.cli.assemble import with_context
from rlhf.config import UserError

RECORDED = (*EMA, "+callbacks.record._target_=recorder.RecordWeights")
STAGES = {1: ("z0", "z1", "z3"), 2: ("z0", "z2", "z3")}


def exact(folder: Path) -> dict[str, torch.Tensor]:
    """The average by its definition, in fp64, from the weights after every iteration."""
    steps = [torch.load(file) for file in sorted(folder.glob("weights-*.pt"))]
    average = {name: tensor.double() for name, tensor in steps[0].items()}
    for weights in steps[1:]:
        average = {name: DECAY * average[name] + (1 - DECAY) * weights[name].double() for name in average}
    return average


@pytest.mark.launch
@pytest.mark.parametrize("world", [1, 2])
def test_export_is_the_exact_average(world: int, tmp_path: Path) -> None:
    data = (f"data.path={write_pairs(tmp_path / 'pairs.jsonl', 64)}", f"data.cache_dir={tmp_path / 'cache'}")
    small = [o for o in SMALL if "kill" not in o and "checkpoint_every" not in o and not o.startswith("ppo.iterations")]
    configs: list[dict[str, Any]] = []
    for stage in STAGES[world]:
        run_dir = tmp_path / stage
        configs.append(
            composed(
                "ppo", *small, "ppo.iterations=3", *data, *RECORDED, f"+callbacks.record.folder={run_dir / 'weights'}", f"run_dir={run_dir}",
                f"zero@actor.zero={stage}", f"trainer.devices={world}",
            )
        )  # fmt: skip
    run_together(configs, world=world)
    for stage in STAGES[world]:
        expected = exact(tmp_path / stage / "weights")
        exported = load_file(tmp_path / stage / "export" / "actor_ema" / "model.safetensors")
        plain = load_file(tmp_path / stage / "export" / "actor" / "model.safetensors")
        moved = 0.0
        for name, tensor in exported.items():  # at stage 3, too, where small ones stay whole beside their shards
            torch.testing.assert_close(tensor.double(), expected[name], rtol=0, atol=1e-6, msg=f"{stage}: {name}")
            moved = max(moved, float((tensor - plain[name]).abs().max()))
        assert moved > 1e-4, "the average must differ from the last weights, or this test shows nothing"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("callbacks.ema.decay=1.0", r"callbacks\.ema\.decay must lie in \[0, 1\)"),
        ("callbacks.ema.role=acter", r"acter never learns \(did you mean 'actor'\?\)"),
    ],
)
def test_options_are_refused_before_anything_is_built(options: str, reason: str, tmp_path: Path) -> None:
    node = composed("ppo", "callbacks=ema", options, f"run_dir={tmp_path}")["callbacks"]["ema"]
    with pytest.raises(UserError, match=reason):
        with_context(node, {"folder": tmp_path, "tokenizer": None})
