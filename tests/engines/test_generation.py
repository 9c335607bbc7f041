"""transformers' generate inside real jobs of several ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import composed, run_together
from test_hybrid_jobs import SMALL, STILL
from tiny import write_pairs

from rlhf.callbacks.rollout import load_rollout


@pytest.mark.launch
def test_ranks_whose_answers_differ_in_length_wait_for_each_other(tmp_path: Path) -> None:
    """Under ZeRO-3 every step gathers the layers, so that a rank that ended alone would leave the others waiting for ever."""
    answers = tmp_path / "answers"
    job = composed(
        "ppo", *SMALL, *STILL, f"data.path={write_pairs(tmp_path / 'pairs.jsonl', 64)}", f"data.cache_dir={tmp_path / 'cache'}",
        "rollout=hf_generate", "rollout.max_new_tokens=32", "rollout.micro_batch_size=2", f"rollout.save_to={answers}",
        "zero@actor.zero=z3", "actor.zero.persistence_threshold=0", "trainer.devices=2", "launcher.timeout_minutes=1", f"run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    run_together([job], world=2)
    lengths = load_rollout(answers, 0).lengths
    parts = [lengths[rank::2].view(-1, 2).amax(dim=1) for rank in (0, 1)]
    assert (parts[0] != parts[1]).any(), "the ranks must answer differently long, or this test shows nothing"
