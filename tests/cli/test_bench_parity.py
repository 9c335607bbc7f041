"""`rlhf bench parity`: what counts as agreement, the table, and a wrong engine that ends the command with exit code 1."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_parts import CPU, WORDS, Answers, OneRank, run
from jobs import composed
from tiny import config as tiny_config
from transformers import AutoModelForCausalLM

from rlhf.cli.bench.parity import Case, Outcome, cases, disagreement, page, parity_metrics, refuse_groups
from rlhf.config import UserError, build
from rlhf.engines.bench_parity import Agreement, compare, equal_tokens, mixed_prompts
from rlhf.models.factory import Blueprint
from rlhf.models.networks import CausalLM
from rlhf.types import Rollout

WRONG_ENGINE = """
import sys
import bench_parts
from rlhf.cli.bench import parity
from rlhf.cli.main import main

def engine(strategy, rollout, words, *, tp):
    answers = bench_parts.Answers(strategy, rollout, end_id=words.end, pad_id=words.pad)
    adapted = any("lora_" in name for name, _ in strategy.network("actor").named_parameters())
    answers.shift = 1e-2 if adapted else 0.0
    return answers

parity.hybrid_engine = engine
sys.exit(main(sys.argv[1:]))
"""


def agreement(dtype: torch.dtype, shift: float) -> tuple[Agreement, Any]:
    cfg = build(composed("bench", "bench=parity", "run_dir=x"))
    torch.manual_seed(0)
    config = tiny_config("llama", initializer_range=0.3)
    strategy: Any = OneRank(CausalLM(AutoModelForCausalLM.from_config(config, dtype=dtype)).eval())
    blueprint = Blueprint(kind="causal", config=config, folder=None, lora=None, gradient_checkpointing=False, dtype=dtype)
    rollout = dataclasses.replace(cfg.rollout, engine="hf_generate", temperature=0.0, max_new_tokens=8)
    engine = Answers(strategy, rollout, end_id=2, pad_id=3)
    engine.shift = shift
    prompts = mixed_prompts(WORDS, count=4, longest=9, seed=0, device=CPU)
    return compare(strategy, engine, blueprint, rollout, prompts, WORDS), cfg.bench


def test_an_engine_that_agrees_passes_and_one_that_is_off_fails() -> None:
    right, settings = agreement(torch.float32, 0.0)
    assert right.equal == right.tokens > 0
    assert disagreement(right, "fp32", settings) == ""
    wrong, _ = agreement(torch.float32, 1e-3)
    assert wrong.largest == pytest.approx(1e-3, rel=1e-2)
    assert "log-probabilities differ by 1.00e-03, more than 0.0001" in disagreement(wrong, "fp32", settings)
    assert "not finite" in disagreement(agreement(torch.float32, math.nan)[0], "fp32", settings)


def test_in_16_bits_the_error_counts_against_that_of_transformers() -> None:
    right, settings = agreement(torch.bfloat16, 0.0)
    assert 0 < right.error == pytest.approx(right.peer_error)
    assert disagreement(right, "bf16", settings) == ""
    wrong, _ = agreement(torch.bfloat16, 1.0)
    assert wrong.error > 1.2 * wrong.peer_error
    assert "passes 1.2 x" in disagreement(wrong, "bf16", settings)


def rollout_of(answers: list[list[int]], lengths: list[int]) -> Rollout:
    ids = torch.tensor(answers)
    mask = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    return Rollout(ids=ids, mask=mask, action_mask=mask, ended=mask[:, 0])


def test_tokens_beyond_an_end_count_as_different() -> None:
    ours = rollout_of([[5, 6, 7], [5, 2, 3]], [3, 2])
    assert int(equal_tokens(ours, ours)) == 5
    assert int(equal_tokens(ours, rollout_of([[5, 9, 7], [5, 2, 3]], [3, 2]))) == 4
    assert int(equal_tokens(ours, rollout_of([[5, 6], [5, 2]], [2, 2]))) == 4
    assert int(equal_tokens(ours, rollout_of([[5, 6, 7, 8], [5, 2, 3, 3]], [4, 2]))) == 4


def test_combinations_and_their_table() -> None:
    settings = build(
        composed("bench", "bench=parity", "bench.families=[]", "bench.dtypes=[fp32]", "bench.graphs=[false]", "run_dir=x")
    ).bench
    assert len(list(cases(settings, "mine"))) == 2 * 4 * 2
    assert {case.family for case in cases(settings, "mine")} == {"mine"}
    case = Case(family="opt", dtype="fp32", zero=0, tp=1, lora=0, graphs=False)
    outcomes = [
        Outcome(case=case, result="pass", agreement=Agreement(tokens=4, equal=4, largest=2e-6, error=1e-7, peer_error=0.0)),
        Outcome(case=dataclasses.replace(case, tp=2), result="skipped", reason="tp 2: needs 2 ranks"),
        Outcome(case=dataclasses.replace(case, zero=3), result="fail", reason="2 of 4 tokens differ"),
        Outcome(case=dataclasses.replace(case, dtype="bf16"), result="pass",
                agreement=Agreement(tokens=4, equal=3, largest=0.1, error=0.011, peer_error=0.01)),
    ]  # fmt: skip
    rows, columns, remarks = page(outcomes)
    assert columns == ["model", "dtype", "lora", "zero 0", "zero 3"]
    assert rows == [["opt", "fp32", "0", "pass 2e-06", "fail"], ["opt", "bf16", "0", "pass 1.10x", ""]]
    assert remarks[1:] == ["skipped 1: tp 2: needs 2 ranks", "fail: opt fp32 zero 3 lora 0: 2 of 4 tokens differ"]
    assert parity_metrics(outcomes) == pytest.approx({
        "bench/parity/passed": 2, "bench/parity/failed": 1, "bench/parity/skipped": 1, "bench/parity/fp32_logprob_difference": 2e-6,
        "bench/parity/error_ratio": 1.1,
    })  # fmt: skip


@pytest.mark.launch
def test_the_command_fails_when_one_combination_does_not_agree(tmp_path: Path) -> None:
    small = ("bench.families=[llama-gqa]", "bench.dtypes=[fp32]", "bench.zero_stages=[1]", "bench.prompts=2", "bench.new_tokens=4")
    done = run("-c", WRONG_ENGINE, "bench", "parity", *small, f"run_dir={tmp_path / 'run'}", "callbacks=none")
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1] == f"rlhf: 1 of 8 combinations fail; bench.json in {tmp_path / 'run'} has them all"
    assert "Traceback" not in done.stderr
    outcomes = json.loads((tmp_path / "run" / "bench.json").read_text())["outcomes"]
    results = {(o["case"]["lora"], o["case"]["tp"], o["case"]["graphs"]): (o["result"], o["reason"]) for o in outcomes}
    assert results[0, 1, False] == ("pass", "")
    assert results[8, 1, False][0] == "fail" and "log-probabilities differ by 1.00e-02" in results[8, 1, False][1]
    assert results[0, 1, True] == ("skipped", "graphs: needs a GPU")
    assert results[0, 2, False] == ("skipped", "tp 2: needs 2 ranks")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"


def test_a_parity_list_does_not_go_with_the_tp_group(tmp_path: Path) -> None:
    cfg = build(composed("bench", "bench=parity", "tp=tp2", "run_dir=x"))
    with pytest.raises(UserError, match=r"tp\.size=2: .*bench\.tp_sizes"):
        refuse_groups(cfg)
