"""`rlhf bench`: words after the verb, refusals, the floor's arithmetic, what is measured and printed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_parts import CPU, WORDS, OneRank, run
from jobs import composed
from tiny import VOCAB
from tiny import config as tiny_config
from torch import nn
from transformers import AutoModelForCausalLM

from rlhf.cli.bench.page import print_rollout
from rlhf.cli.bench.rollout import rollout_metrics
from rlhf.cli.compose import with_own_group
from rlhf.cli.main import main
from rlhf.config import build
from rlhf.engines import bench_rollout
from rlhf.engines.baselines import Vocabulary, geometric_lengths, random_prompts, vocabulary
from rlhf.engines.bench_parity import mixed_prompts
from rlhf.engines.bench_rollout import Rates, RolloutBench, Row
from rlhf.engines.floor import ModelSize, decode_floor, model_size, prefill_floor
from rlhf.engines.generation import HFGenerate
from rlhf.models.networks import CausalLM
from rlhf.rules import check
from rlhf.types import PromptBatch, Rollout

SMALL = ("model@actor.model=tiny", "bench.batch_sizes=[2]", "bench.prompt_tokens=6", "bench.new_tokens=4", "bench.repeats=2")


# --- words after the verb --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "words", "meaning"),
    [
        ("bench", ["parity", "seed=1"], ["bench=parity", "seed=1"]),
        ("bench", ["rollout"], ["bench=rollout"]),
        ("bench", ["rollout,parity", "-m"], ["bench=rollout,parity", "-m"]),
        ("bench", [], []),
        ("bench", ["-m", "seed=1,2"], ["-m", "seed=1,2"]),
        ("bench", ["bench=parity"], ["bench=parity"]),
        ("bench", ["+x=1"], ["+x=1"]),
        ("ppo", ["quickstart", "seed=1"], ["ppo=quickstart", "seed=1"]),
        ("sft", ["resume"], ["resume"]),  # one option: nothing to choose
        ("evaluate", ["resume"], ["resume"]),  # no group of its own
    ],
)
def test_a_word_right_after_a_verb_chooses_in_its_own_group(verb: str, words: list[str], meaning: list[str]) -> None:
    assert with_own_group(verb, words) == meaning


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            ["rolout"],
            ("rolout: no such option of rlhf bench", "did you mean 'rollout'?", "there are calibrate, parity, rollout, step", "key=value"),
        ),
        (["parity", "rollout"], ("rollout: rlhf bench takes one option", "which is parity already")),
        (["rollout,party"], ("party: no such option", "'parity'")),
        (["parity", "bench.batch_sizes=[1]"], ("bench.batch_sizes: no such key",)),
    ],
)
def test_another_word_is_refused(words: list[str], parts: tuple[str, ...], refused: Callable[..., str], tmp_path: Path) -> None:
    message = refused("bench", *words, f"run_dir={tmp_path / 'run'}")
    assert not [part for part in parts if part not in message], message
    assert not (tmp_path / "run").exists()


def test_the_word_and_the_group_are_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for words in (["parity"], ["bench=parity"]):
        assert main(["bench", *words, "--cfg", "job"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert "families" in printed[0]


# --- refusals --------------------------------------------------------------------------------------------------------------------

REFUSALS = {
    "no batch": (("bench.batch_sizes=[]",), ("bench.batch_sizes is empty",)),
    "batch of nothing": (("bench.batch_sizes=[4,0]",), ("bench.batch_sizes must be at least 1, got 0",)),
    "engine": (("bench.engines=[hybird]",), ("bench.engines must name some of hybrid, hf_dynamic, hf_static", "'hybird'")),
    "engine twice": (("bench.engines=[hybrid,hybrid]",), ("bench.engines names hybrid twice",)),
    "law": (("bench.answer_lengths=normal",), ("bench.answer_lengths", "fixed, geometric")),
    "geometric without the engine for it": (
        ("bench.answer_lengths=geometric", "bench.engines=[hf_dynamic]"), ("bench.answer_lengths=geometric", "hybrid"),
    ),
    "recorded": (("rollout=recorded", "rollout.recorded_path=x"), ("rollout=recorded", "rollout=hybrid_engine")),
    "length of the rollout group": (("rollout.min_new_tokens=3",), ("rollout.min_new_tokens", "set bench.new_tokens")),
    "slots of the rollout group": (("rollout.micro_batch_size=3",), ("rollout.micro_batch_size", "bench.batch_sizes")),
    "saving": (("rollout.save_to=x",), ("rollout.save_to", "leave it at null")),
    "family": (("parity", "bench.families=[lama]"), ("bench.families must name some of opt, ", "'lama'")),
    "shape without a type": (("parity", "+bench.shapes.x.hidden_size=3"), ("bench.shapes.x must be a mapping with a model_type",)),
    "unknown type": (
        ("parity", "+bench.shapes.x={model_type: opted}", "bench.families=[x]"), ("bench.shapes.x.model_type='opted'", "no such model type"),
    ),
    "precision": (("parity", "bench.dtypes=[fp64]"), ("bench.dtypes must name some of fp32, bf16, fp16", "'fp64'")),
    "stage": (("parity", "bench.zero_stages=[4]"), ("bench.zero_stages must name some of 0, 1, 2, 3", "4")),
    "stage of the role": (("parity", "zero@actor.zero=z3"), ("actor.zero.stage=3", "bench.zero_stages")),
    "adapters of the role": (("parity", "lora@actor.lora=r8", "bench.lora_ranks=[0,4]"), ("actor.lora.rank=8", "bench.lora_ranks=[0, 4]")),
    "optimizer": (("parity", "bench.optimizer.name=fused_adam"), ("bench.optimizer.name=fused_adam", "use adamw")),
}  # fmt: skip


@pytest.mark.parametrize(("words", "parts"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_measured_is_refused(
    words: tuple[str, ...], parts: tuple[str, ...], refused: Callable[..., str], tmp_path: Path
) -> None:
    message = refused("bench", *words, f"run_dir={tmp_path / 'run'}")
    assert not [part for part in parts if part not in message], message


def test_a_trained_model_keeps_its_context(refused: Callable[..., str], tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(tiny_config("llama")).save_pretrained(tmp_path / "model")
    message = refused(
        "bench", f"actor.init={tmp_path / 'model'}", "bench.prompt_tokens=60", "bench.new_tokens=5", f"run_dir={tmp_path / 'run'}"
    )
    assert "bench.prompt_tokens + bench.new_tokens = 65 passes the context of actor.model" in message
    assert "64 tokens" in message


# --- the floor -------------------------------------------------------------------------------------------------------------------


def test_the_floor_by_hand() -> None:
    size = ModelSize(read=1000, multiplied=800, layers=3, heads=4, kv_heads=2, head_dim=8, element_bytes=2)
    assert size.kv_bytes_per_token == 2 * 3 * 2 * 8 * 2 == 192
    # 9 steps, each 2000 bytes of weights and 5 sequences x 192 x (20 + 10 / 2) bytes of cache, at 1e6 bytes/s
    assert decode_floor(size, batch=5, prompt=20, new=10, bandwidth=1e6) == pytest.approx(9 * (2000 + 5 * 192 * 25) / 1e6)
    # two ranks: half of the weights each
    assert decode_floor(size, batch=5, prompt=20, new=10, bandwidth=1e6, tp=2) == pytest.approx(9 * (1000 + 5 * 192 * 25) / 1e6)
    # 2 x 800 operations for each of 20 tokens; q k^T and p v over 20 x 20 / 2 pairs, 3 layers of 4 x 8 channels
    assert prefill_floor(size, batch=5, prompt=20, rate=1e6) == pytest.approx(5 * (2 * 800 * 20 + 2 * 2 * 200 * 3 * 32) / 1e6)


def test_the_size_of_a_model_by_hand() -> None:
    """Two LLaMA layers, 32 wide, 4 heads of 8 with 2 key/value heads, MLP of 64, vocabulary of 64."""
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
    body = 2 * layer + 32
    for tied in (True, False):
        model = AutoModelForCausalLM.from_config(tiny_config("llama", tie_word_embeddings=tied))
        size = model_size(model, torch.bfloat16)
        head = 0 if tied else 32 * 64
        assert (size.read, size.multiplied) == (body + 32 * 64, body + head)
        assert (size.layers, size.heads, size.kv_heads, size.head_dim, size.element_bytes) == (2, 4, 2, 8, 2)


@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt_neox", "bloom", "gptj"])
def test_the_size_of_other_families(family: str) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config(family))
    size = model_size(model, torch.float32)
    looked_up = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    total = sum(p.numel() for p in model.parameters())
    assert size.multiplied == total - looked_up
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert size.read == total - looked_up + (VOCAB * 32 if tied else 0)
    assert (size.layers, size.heads, size.kv_heads, size.head_dim) == (2, 4, 4, 8)


# --- prompts and lengths ---------------------------------------------------------------------------------------------------------


def test_prompts_are_padded_on_the_left_and_hold_no_special_token() -> None:
    prompts = random_prompts(WORDS, torch.tensor([7, 1, 4]), torch.Generator().manual_seed(0), CPU)
    assert prompts.mask.tolist() == [[True] * 7, [False] * 6 + [True], [False] * 3 + [True] * 4]
    assert set(prompts.ids[~prompts.mask].tolist()) == {3}
    many = random_prompts(WORDS, torch.full((200,), 20), torch.Generator().manual_seed(0), CPU)
    assert set(many.ids.flatten().tolist()) == set(range(VOCAB)) - {1, 2, 3}


def test_a_model_without_special_tokens_ends_on_its_last_id() -> None:
    words = vocabulary(tiny_config("llama", bos_token_id=None, eos_token_id=None, pad_token_id=None))
    assert (words.end, words.pad, words.special) == (VOCAB - 1, VOCAB - 1, {VOCAB - 1})
    several = vocabulary(tiny_config("llama", eos_token_id=[4, 5]))
    assert (several.end, several.pad, several.special) == (4, 3, {1, 3, 4, 5})


def test_lengths_follow_the_geometric_law_and_its_cut() -> None:
    lengths = geometric_lengths(20_000, mean=8.0, longest=20, generator=torch.Generator().manual_seed(0))
    shares = torch.bincount(lengths, minlength=21)[1:] / len(lengths)
    law = torch.tensor([(7 / 8) ** (n - 1) / 8 for n in range(1, 20)] + [(7 / 8) ** 19])
    chi_square = float((len(lengths) * (shares - law) ** 2 / law).sum())
    assert chi_square < 43.8  # 0.1 % point of 19 degrees of freedom
    assert geometric_lengths(3, mean=1.0, longest=9, generator=torch.Generator()).tolist() == [1, 1, 1]


# --- measuring -------------------------------------------------------------------------------------------------------------------


class Stub:
    """An engine that answers at once with the lengths it is asked for, or one token less."""

    capture_seconds = 1.5

    def __init__(self, rollout: Any, short: int = 0) -> None:
        self.rollout, self.short = rollout, short
        self.timings = {"decode": 0.25, "free": 0.5}
        self.calls: list[tuple[int, int, Any]] = []

    def generate(self, role: str, prompts: PromptBatch, *, samples: int, limits: torch.Tensor | None = None) -> Rollout:
        self.calls.append((len(prompts), prompts.ids.shape[1], limits))
        width = self.rollout.max_new_tokens
        lengths = torch.full((len(prompts),), width) if limits is None else limits
        action = torch.arange(width) < lengths[:, None] - self.short
        return Rollout(ids=prompts.ids, mask=prompts.mask, action_mask=action, ended=action[:, 0])


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> list[Stub]:
    """Every hybrid engine that a measurement builds, as stubs."""
    built: list[Stub] = []

    def build_stub(strategy: Any, rollout: Any, words: Vocabulary, *, tp: int) -> Stub:
        built.append(Stub(rollout))
        return built[-1]

    monkeypatch.setattr(bench_rollout, "hybrid_engine", build_stub)
    return built


def measured(*words: str, seen: list[Any] | None = None) -> tuple[list[Row], Rates]:
    cfg = build(composed("bench", "run_dir=unused", *SMALL, *words))
    check(cfg)
    network = CausalLM(AutoModelForCausalLM.from_config(tiny_config("llama")))
    size = model_size(network.model, torch.float32)
    bench = RolloutBench(
        OneRank(network), cfg.rollout, cfg.bench, size=size, words=WORDS, dtype=torch.float32, tp=1,  # type: ignore[arg-type]
        on_row=lambda rows, rates: (seen if seen is not None else []).append([row.engine for row in rows]),
    )  # fmt: skip
    return bench.run(), bench.rates


def test_every_engine_and_batch_is_measured_and_compared(stubs: list[Stub]) -> None:
    seen: list[Any] = []
    rows, rates = measured("bench.engines=[hybrid,hf_dynamic,hf_static]", "bench.batch_sizes=[2,3]", "bench.warmup=1", seen=seen)
    assert [(row.engine, row.batch, row.tokens) for row in rows] == [
        ("hybrid", 2, 8), ("hf_dynamic", 2, 8), ("hf_static", 2, 0), ("hybrid", 3, 12), ("hf_dynamic", 3, 12), ("hf_static", 3, 0),
    ]  # fmt: skip
    assert [len(names) for names in seen] == [1, 2, 3, 4, 5, 6], "a failure later on loses no row"
    assert [stub.calls for stub in stubs] == [[(2, 6, None)] * 3, [(3, 6, None)] * 3]
    assert all(stub.rollout.min_new_tokens == stub.rollout.max_new_tokens == 4 for stub in stubs)
    ours, theirs, skipped = rows[:3]
    assert len(ours.all_seconds) == 2 and ours.seconds in ours.all_seconds
    assert ours.ratios["vs_hf_dynamic"] == pytest.approx(theirs.seconds / ours.seconds)
    assert ours.ratios["of_floor"] == pytest.approx(ours.floor_seconds / ours.seconds)  # type: ignore[operator]
    assert set(theirs.ratios) == {"of_floor"}
    assert "bench.hf_static_on_cpu" in skipped.note and math.isnan(skipped.seconds)
    assert (ours.parts, ours.capture_seconds) == ({"decode": 0.25, "free": 0.5}, 1.5)
    assert rates.bandwidth > 0 and rates.matmul > 0


def test_static_cache_of_transformers_gives_the_tokens_of_the_dynamic_one() -> None:
    from rlhf.engines.baselines import HFStatic

    network = CausalLM(AutoModelForCausalLM.from_config(tiny_config("llama")))
    rollout = dataclasses.replace(build(composed("evaluate", "run_dir=x")).rollout, temperature=0.0, max_new_tokens=5)
    prompts = mixed_prompts(WORDS, count=3, longest=6, seed=0, device=CPU)
    strategy: Any = OneRank(network)
    static, dynamic = HFStatic(strategy, rollout, end_id=2, pad_id=3), HFGenerate(strategy, rollout, end_id=2, pad_id=3)
    answers = [engine.generate("actor", prompts, samples=1) for engine in (static, dynamic)]
    assert torch.equal(answers[0].ids, answers[1].ids)
    assert network.model.generation_config.cache_implementation is None
    assert hasattr(network.model, "_previous_max_cache_length"), "the static cache has been used"
    static.close()
    assert not hasattr(network.model, "_previous_max_cache_length")


def test_geometric_lengths_are_limits_of_their_own_and_compare_with_the_fixed_figure(stubs: list[Stub]) -> None:
    rows, _ = measured("bench.engines=[hybrid]", "bench.answer_lengths=geometric", "bench.prompts=7", "bench.mean_new_tokens=2")
    fixed, drawn = rows
    assert (fixed.lengths, drawn.lengths) == ("fixed", "geometric")
    assert [stub.rollout.micro_batch_size for stub in stubs] == [None, 2]
    prompts, width, limits = stubs[1].calls[0]
    assert (prompts, width, len(limits)) == (7, 6, 7)
    assert int(limits.min()) >= 1 and int(limits.max()) <= 4
    assert drawn.tokens == int(limits.sum())
    assert drawn.ratios == {"of_fixed": pytest.approx(drawn.tokens_per_s / fixed.tokens_per_s)}


def test_an_engine_that_gives_too_few_tokens_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_rollout, "hybrid_engine", lambda strategy, rollout, words, tp: Stub(rollout, short=1))
    with pytest.raises(RuntimeError, match="hybrid gave 6 tokens instead of 8"):
        measured("bench.engines=[hybrid]")


def test_the_table_and_the_metrics_say_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    rates = Rates(bandwidth=3e12, matmul=7.5e14)
    ours = Row(engine="hybrid", batch=64, lengths="fixed", seconds=0.8, tokens=16384, floor_seconds=0.72, parts={"swap": 0.01, "decode": 0.75},
               peak_bytes=9_500_000_000, free_bytes=60_000_000_000, capture_seconds=4.0)  # fmt: skip
    theirs = Row(engine="hf_dynamic", batch=64, lengths="fixed", seconds=3.2, tokens=16384, floor_seconds=0.72, peak_bytes=8, free_bytes=7)
    drawn = Row(engine="hybrid", batch=64, lengths="geometric", seconds=2.0, tokens=32768)
    rows = [ours, theirs, drawn]
    for row in rows:
        row.ratios = bench_rollout.ratios(row, rows)
    print_rollout("title", rows, rates)
    out = capsys.readouterr().out
    lines = [
        [cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in out.splitlines() if "│" in line or "┃" in line
    ]
    assert lines[0] == ["engine", "batch", "seconds", "tok/s", "of floor", "x hf_dynamic", "x hf_static", "swap s", "decode s", "peak GB",
                        "free GB", "capture s"]  # fmt: skip
    assert lines[1][:5] == ["floor", "64", "0.72", "22,756", "1.00"]
    assert lines[2] == ["hybrid", "64", "0.8", "20,480", "0.90", "4.00", "", "0.01", "0.75", "9.5", "60.0", "4.0"]
    assert lines[3][:6] == ["hf_dynamic", "64", "3.2", "5,120", "0.22", ""]
    assert lines[4][:4] == ["hybrid, geometric", "64", "2", "16,384"]
    assert "copy 3,000 GB/s" in out and "750.00 TFLOP/s" in out
    assert "geometric lengths give 0.80 of the fixed-length tok/s" in out
    metrics = rollout_metrics(rows, rates)
    assert metrics["bench/hybrid/64/tokens_per_s"] == 20480
    assert metrics["bench/hybrid/64/vs_hf_dynamic"] == 4
    assert metrics["bench/hybrid/64/time_swap"] == 0.01
    assert metrics["bench/hybrid/64/geometric/of_fixed"] == pytest.approx(0.8)
    assert "bench/hybrid/64/vs_hf_static" not in metrics


# --- whole commands --------------------------------------------------------------------------------------------------------------


@pytest.mark.launch
def test_the_command_times_rollouts_on_two_ranks(tmp_path: Path) -> None:
    done = run("-m", "rlhf", "bench", "rollout", *SMALL, "bench.engines=[hf_dynamic]", "trainer.devices=2", f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "bench.json").read_text())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (row,) = report["rows"]
    assert (row["engine"], row["batch"], row["tokens"]) == ("hf_dynamic", 2, 2 * 2 * 4)
    assert len(row["all_seconds"]) == 2
    assert report["actor"] == {"name": "tiny", "precision": "fp32", "tp": 1, "ranks": 2}
    assert report["versions"]["torch"] == torch.__version__ and report["card"]
    assert summary["status"] == "done"
    assert summary["metrics"]["bench/hf_dynamic/2/tokens_per_s"] == row["tokens_per_s"]
    assert f"{row['tokens_per_s']:,.0f}" in done.stdout
    assert done.stdout.count("│ hf_dynamic") == 1, "rank zero alone prints"
