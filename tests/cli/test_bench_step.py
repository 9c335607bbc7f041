"""`rlhf bench step`: what it refuses, whether its numbers add up, what it expects of a config, whole commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_parts import WORDS, run
from jobs import column, composed

from rlhf.cli.bench.step import Ids, ppo_settings
from rlhf.cli.bench.step_page import Expected, Lap, complete, expected, median, phase_figures, print_step, speeds, step_metrics
from rlhf.cli.compose import primary_config
from rlhf.config import UserError, build
from rlhf.engines.bench_rollout import Rates
from rlhf.engines.bench_step import RandomPrompts, Spans, is_out_of_memory
from rlhf.engines.floor import ModelSize, decode_floor, prefill_floor
from rlhf.inference.arena import Mapped
from rlhf.rules import check

TINY = (
    "model@actor.model=tiny", "model@critic.model=tiny-opt", "model@reward.model=tiny-opt", "bench.prompt_tokens=8", "bench.new_tokens=6",
    "ppo.batch_size=4", "ppo.minibatch_size=4", "bench.warmup=1", "bench.iterations=2",
)  # fmt: skip


def settings(*words: str) -> Any:
    cfg = build(composed("bench_step", "run_dir=unused", *words))
    check(cfg)
    return ppo_settings(cfg)


# --- which config, what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "words", "name"),
    [
        ("bench", ["bench=step", "seed=1"], "bench_step"),
        ("bench", ["bench=calibrate"], "bench_calibrate"),
        ("bench", ["bench=rollout"], "bench"),
        ("bench", ["bench=rollout,parity", "-m"], "bench"),
        ("bench", [], "bench"),
        ("ppo", ["ppo=quickstart"], "ppo"),
    ],
)
def test_an_option_may_have_a_file_with_sections_of_its_own(verb: str, words: list[str], name: str) -> None:
    assert primary_config(verb, words) == name


def test_a_sweep_over_different_sections_is_refused() -> None:
    with pytest.raises(UserError, match="bench=step,rollout: these do not have the same sections"):
        primary_config("bench", ["bench=step,rollout", "-m"])


REFUSALS = {
    "warmup": (("bench.warmup=0",), ("bench.warmup must be at least 1",)),
    "baseline": (("bench.baselines=[trl]",), ("bench.baselines must name some of hf_generate, hybrid_engine", "'trl'")),
    "baseline is measured": (("bench.baselines=[hybrid_engine]",), ("bench.baselines names hybrid_engine", "rollout.engine")),
    "baseline without logprobs": (
        ("bench.baselines=[hf_generate]", "ppo.old_logprobs=rollout"), ("bench.baselines names hf_generate", "ppo.old_logprobs=rollout"),
    ),
    "prompt length": (("data.max_prompt_tokens=9",), ("data.max_prompt_tokens", "set bench.prompt_tokens")),
    "answer length": (("rollout.min_new_tokens=3",), ("rollout.min_new_tokens", "set bench.new_tokens")),
    "recorded": (("rollout=recorded", "rollout.recorded_path=x"), ("rollout=recorded",)),
    "saving": (("rollout.save_to=x",), ("rollout.save_to", "leave it at null")),
    "iterations": (("ppo.iterations=4",), ("ppo.iterations", "set bench.iterations")),
    "critic alone": (("ppo.critic_warmup=1",), ("ppo.critic_warmup",)),
    "texts": (("ppo.ptx_coef=1", "data.ptx=[wikitext]"), ("ppo.ptx_coef", "set it to 0")),
    "function": (
        ("ppo.reward_source=function", "ppo.reward_function=rlhf.data.quickstart.gold", "ppo.critic_init=actor", "model@critic.model=tiny"),
        ("ppo.reward_source must be model",),
    ),
    "card": (("hardware=h100-80g",), ("hardware=h100-80g", "choose trainer=gpu, or hardware=cpu")),
    "context": (("bench.prompt_tokens=200",), ("context of actor.model", "128 tokens")),
    "key": (("bench.promt_tokens=2",), ("bench.promt_tokens: no such key", "prompt_tokens", "rlhf bench step --cfg job")),
}  # fmt: skip


@pytest.mark.parametrize(("words", "parts"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_measured_is_refused(
    words: tuple[str, ...], parts: tuple[str, ...], refused: Callable[..., str], tmp_path: Path
) -> None:
    message = refused("bench", "step", *TINY, *words, f"run_dir={tmp_path / 'run'}")
    assert not [part for part in parts if part not in message], message


def test_a_plan_that_does_not_fit_is_refused_unless_it_is_not_enforced(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with the card: the accelerator is what `hardware` says."""
    from rlhf.cli.bench import step as bench_step

    measured: list[Any] = []
    monkeypatch.setattr(bench_step, "accelerator", lambda trainer: "cuda")
    monkeypatch.setattr(bench_step, "StepJob", lambda config, cfg: cfg)
    monkeypatch.setattr(bench_step, "ppo", lambda job: measured.append(job.verb) or {})
    for enforce in (True, False):
        words = ("trainer=gpu", "hardware=h100-80g", "model@actor.model=opt-13b", f"plan.enforce={enforce}")
        job: Any = type("Job", (), {"config": {}, "cfg": build(composed("bench_step", "run_dir=unused", *words))})()
        if enforce:
            with pytest.raises(UserError, match=r"short of memory in the phase .* plan.enforce=false goes on"):
                bench_step.step(job)
        else:
            bench_step.step(job)
    assert measured == ["ppo"]


# --- what is replaced of a PPO job -------------------------------------------------------------------------------------------------


def test_the_job_is_that_of_ppo_with_the_lengths_of_the_bench() -> None:
    cfg = settings(*TINY, "bench.baselines=[hf_generate]")
    assert (cfg.verb, cfg.ppo.iterations) == ("ppo", 2 * (1 + 2))
    assert (cfg.data.max_prompt_tokens, cfg.data.max_answer_tokens) == (8, 6)
    assert (cfg.rollout.min_new_tokens, cfg.rollout.max_new_tokens) == (6, 6)
    assert not any(role.model.pretrained for role in (cfg.actor, cfg.critic, cfg.reward))


def test_prompts_are_this_ranks_share_and_differ() -> None:
    ranks = [RandomPrompts(WORDS, batch_size=6, prompt_tokens=5, iterations=3, seed=0, rank=rank, world=2) for rank in (0, 1)]
    batches = [batch for data in ranks for batch in data.train_dataloader()]
    assert [batch.ids.shape for batch in batches] == [(3, 5)] * 6
    assert all(bool(batch.mask.all()) for batch in batches)
    assert len({tuple(batch.ids.flatten().tolist()) for batch in batches}) == 6
    assert ranks[0].total_steps == 3


def test_ids_stand_for_a_tokenizer() -> None:
    ids = Ids(WORDS, 1)
    assert (len(ids), ids.eos_token_id, ids.pad_token_id, ids.bos_token_id) == (WORDS.size, 2, 3, 1)
    assert ids.batch_decode([[7, 2], [8, 9]], skip_special_tokens=True) == ["7", "8 9"]


# --- clocks and arithmetic ---------------------------------------------------------------------------------------------------------


def test_a_span_opens_once_closes_once_and_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 4.0, 10.0, 12.0])
    spans = Spans(cuda=False)
    monkeypatch.setattr(spans, "_now", lambda: next(times))
    spans.begin("train actor")
    spans.begin("train actor")  # a second forward pass of one micro-batch
    spans.end("train actor")
    spans.end("score actor")  # was never open
    with spans("train actor"):
        pass
    assert spans.drain() == ({"train actor": 5.0}, {})
    assert spans.drain() == ({}, {})


def test_a_span_on_a_card_begins_a_peak_of_its_own_and_none_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks are told to the phase that they fall into, as its own meter is set back by every part."""
    peak, clock = [0], [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...

        def record(self) -> None:
            self.at = clock[0]

        def elapsed_time(self, other: Any) -> float:
            return (other.at - self.at) * 1000

    def used(size: int) -> None:
        peak[0] = max(peak[0], size)

    monkeypatch.setattr("rlhf.engines.bench_step.mapped_memory", Mapped())  # not what other tests of this process left mapped
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.__setitem__(0, 0))
    spans = Spans(cuda=True, phase="train")
    used(50)  # before the first part
    spans.begin("train actor")
    used(30)
    clock[0] = 2.0
    spans.end("train actor")
    used(90)  # between two parts
    for size in (20, 40):
        with spans("train critic"):
            used(size)
    spans.phase = "score"
    with spans("score actor"):
        used(10)
    seconds, peaks = spans.drain()
    assert seconds == {"train actor": 2.0, "train critic": 0.0, "score actor": 0.0}
    assert peaks == {"train actor": 30, "train critic": 40, "score actor": 10, "train": 90, "score": 10}


LAPS = [
    Lap(
        complete({"generate": 4.0, "generate/decode": 3.0, "score": 2.0, "train": 3.0, "train/actor": 2.0, "iteration": 10.0}), {"train": 7}
    ),
    Lap(
        complete({"generate": 6.0, "generate/decode": 4.0, "score": 2.0, "train": 3.0, "train/actor": 2.5, "iteration": 12.0}), {"train": 9}
    ),
    Lap(
        complete({"generate": 3.0, "generate/decode": 1.0, "score": 2.0, "train": 3.0, "train/actor": 1.0, "iteration": 9.0}), {"train": 8}
    ),
]


def test_parts_and_rests_add_up() -> None:
    for lap in LAPS:
        seconds = lap.seconds
        assert sum(seconds[phase] for phase in ("generate", "score", "train", "other")) == seconds["iteration"]
        for phase in ("generate", "train"):
            assert sum(value for name, value in seconds.items() if name.startswith(f"{phase}/")) == pytest.approx(seconds[phase])
        assert "score/rest" not in seconds, "a phase without parts has no rest"
    assert median(LAPS) is LAPS[0]
    assert median(LAPS[:2]) is LAPS[0]


def test_figures_compare_the_median_iteration() -> None:
    baseline = [Lap(complete({"generate": 40.0, "score": 2.0, "train": 3.0, "iteration": 50.0}))]
    expect = Expected(floor={"generate": 2.0, "iteration": 5.0}, seconds={"generate": 5.0, "train": 6.0}, peaks={"train": 8.1})
    figures = phase_figures({"hybrid_engine": LAPS, "hf_generate": baseline}, expect)
    generate, train, whole = figures["generate"], figures["train"], figures["iteration"]
    assert (generate["seconds"], generate["median_seconds"]) == ([4.0, 6.0, 3.0], 4.0)
    assert (generate["floor_seconds"], generate["of_floor"], generate["predicted_over_measured"]) == (2.0, 0.5, 1.25)
    assert generate["faster_than"] == {"hf_generate": 10.0}
    assert (train["peak_bytes"], train["predicted_peak_bytes"], train["predicted_over_measured"]) == (9, 8.1, 2.0)
    assert (whole["faster_than"], whole["of_floor"]) == ({"hf_generate": 5.0}, 0.5)
    assert figures["generate/decode"]["faster_than"] == {}, "transformers does not tell"
    metrics = step_metrics(figures, {"sequences_per_s": 6.4}, Rates(bandwidth=2e12, matmul=5e14))
    assert metrics["bench/copy_gbs"] == 2000 and metrics["bench/sequences_per_s"] == 6.4
    assert (metrics["bench/iteration/seconds"], metrics["bench/generate/vs_hf_generate"]) == (10.0, 10.0)
    assert "bench/score/floor_seconds" not in metrics


GPU = ("trainer=gpu", "hardware=h100-80g", "model@actor.model=opt-1.3b", "model@critic.model=opt-350m", "model@reward.model=opt-350m")


def card_settings(*words: str) -> Any:
    """Settings of a card that is not here."""
    cfg = build(composed("bench_step", "run_dir=unused", *GPU, *words))
    cfg.verb = "ppo"
    return cfg


def test_the_floor_of_generation_is_that_of_bench_rollout() -> None:
    rates = Rates(bandwidth=2.9e12, matmul=7e14)
    cfg = card_settings("bench.prompt_tokens=200", "bench.new_tokens=100")
    floor = expected(cfg, rates).floor
    hidden, vocabulary = 2048, 50272
    layer = 12 * hidden**2 + 13 * hidden
    size = ModelSize(
        read=24 * layer + vocabulary * hidden, multiplied=24 * layer, layers=24, heads=32, kv_heads=32, head_dim=64, element_bytes=2
    )
    decode = decode_floor(size, batch=64, prompt=200, new=100, bandwidth=rates.bandwidth)
    prefill = prefill_floor(size, batch=64, prompt=200, rate=rates.matmul)
    assert floor["generate/decode"] == pytest.approx(decode, rel=2e-3)  # the floor of a rollout reads biases and norms, too
    assert floor["generate/prefill"] == pytest.approx(prefill, rel=2e-3)
    assert floor["generate"] == pytest.approx(sum(v for name, v in floor.items() if name.startswith("generate/")))
    assert floor["iteration"] == pytest.approx(floor["generate"] + floor["score"] + floor["train"])


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_floor_of_scoring_and_training_by_hand(precision: str) -> None:
    """Two operations a weight and token, the head where logits are computed, causal attention; a backward pass is twice a forward one."""
    rates = Rates(bandwidth=2.9e12, matmul=7e14)
    words = [f"trainer.precision={precision}", "actor.gradient_checkpointing=true"]
    found = expected(card_settings(*words), rates)

    def forward(layers: int, hidden: int, beside: int, head: int) -> float:
        weights = layers * 12 * hidden**2 + beside
        return 64 * (2 * weights * 512 + 4 * layers * hidden * 512 * 512 / 2 + 2 * head * 257) / rates.matmul

    actor = forward(24, 2048, 0, 50272 * 2048)
    scalar = forward(24, 1024, 2 * 512 * 1024, 0)
    assert found.floor["train/actor"] == pytest.approx(3 * actor, rel=2e-3), "nothing is computed twice at best"
    assert found.floor["train/critic"] == pytest.approx(3 * scalar, rel=2e-3)
    assert found.floor["score"] == pytest.approx(2 * actor + 2 * scalar, rel=2e-3)
    assert "other" not in found.floor


def test_the_prediction_is_the_planners() -> None:
    found = expected(card_settings(), Rates(bandwidth=2.9e12, matmul=7e14))
    assert found.time is not None and found.memory is not None
    assert found.seconds["iteration"] == pytest.approx(found.time.total)
    assert sum(found.seconds[phase] for phase in ("generate", "score", "train", "other")) == pytest.approx(found.time.total)
    assert found.seconds["iteration"] > found.floor["iteration"]
    assert set(found.peaks) >= {"generate", "score", "train", "train/actor", "train/critic", "train/optimizer", "iteration"}
    assert found.peaks["iteration"] == max(found.peaks.values()) < found.memory.peak
    stages = [expected(card_settings(f"zero@actor.zero={zero}"), Rates(1e12, 1e14)).seconds for zero in ("z2", "z3")]
    assert ["generate/gather" in seconds for seconds in stages] == [False, True]


def test_nothing_is_predicted_for_a_cpu_nor_known_of_a_strange_family() -> None:
    rates = Rates(bandwidth=1e10, matmul=1e11)
    found = expected(settings(*TINY), rates)
    assert (found.seconds, found.peaks, found.time) == ({}, {}, None) and found.floor["train/actor"] > 0
    assert expected(settings(*TINY, "actor.model.family=mamba"), rates) == Expected()


@pytest.mark.parametrize(
    "words",
    [
        ("trainer.devices=2", "tp=tp2"),
        ("zero@actor.zero=z3_offload", "optimizer@ppo.actor_optimizer=cpu_adam"),
        ("zero@actor.zero=z3_offload_params",),
    ],
)
def test_a_link_that_is_not_known_costs_nothing_at_best(words: tuple[str, ...]) -> None:
    """hardware=cpu has neither a second device nor a link to one."""
    floor = expected(settings(*TINY, *words), Rates(bandwidth=1e10, matmul=1e11)).floor
    assert 0 < floor["iteration"] < 1


def test_speeds_of_an_iteration() -> None:
    found = expected(card_settings(), Rates(bandwidth=2.9e12, matmul=7e14))
    rates = speeds(2.0, found, sequences=64, new_tokens=256, ranks=2, prompt_tokens=256)
    assert (rates["sequences_per_s"], rates["answer_tokens_per_s"]) == (32, 8192)
    s, layers, h, v = 512, 24, 2048, 50272
    by_hand = 24 * 5 * 64 * s * layers * h * h * (1 + s / (6 * h) + v / (16 * layers * h)) / 2.0 / 2 / 1e12
    assert rates["paper_tflops_per_gpu"] == pytest.approx(by_hand)
    assert "paper_tflops_per_gpu" not in speeds(2.0, found, sequences=64, new_tokens=128, ranks=1, prompt_tokens=256)


def test_the_table_shows_predictions_and_memory_where_there_are_some(capsys: pytest.CaptureFixture[str]) -> None:
    rates = {"sequences_per_s": 6.4, "answer_tokens_per_s": 1638.4}
    print_step("title", phase_figures({"hybrid_engine": LAPS}, Expected(floor={"score": 1.0})), rates, Rates(2e12, 5e14), ["a [remark]"])
    plain = capsys.readouterr().out
    assert "predicted" not in plain and "6.40 sequences/s, 1,638 answer tokens/s" in plain and "a [remark]" in plain
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in plain.splitlines() if line.startswith("│")]
    assert [line[0] for line in lines] == ["generate", "decode", "rest", "score", "train", "actor", "rest", "other", "iteration"]
    assert lines[3][1:6] == ["2", "2", "2", "1", "0.50"]
    expect = Expected(seconds={"score": 3.0}, peaks={"train": 8e9})
    print_step("title", phase_figures({"hybrid_engine": LAPS}, expect), rates, Rates(2e12, 5e14), [])
    shown = capsys.readouterr().out
    assert "pred / meas" in shown and "1.50" in shown and "8.00" in shown


def test_running_out_of_memory_has_many_words() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert is_out_of_memory(UserError("the rollout is 2.00 GB short of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


# --- whole commands ----------------------------------------------------------------------------------------------------------------


@pytest.mark.launch
def test_two_ranks_measure_both_engines(tmp_path: Path) -> None:
    words = ("bench.baselines=[hf_generate]", "trainer.devices=2", "trainer.threads=1", "ppo.micro_batch_size=1", "zero@actor.zero=z3")
    done = run("-m", "rlhf", "bench", "step", *TINY, *words, f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "bench.json").read_text())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (report["bench"], report["status"], report["message"], report["prediction"]) == ("step", "done", None, None)
    assert {name: len(laps) for name, laps in report["iterations"].items()} == {"hybrid_engine": 2, "hf_generate": 2}
    assert {name: len(laps) for name, laps in report["warmup"].items()} == {"hybrid_engine": 1, "hf_generate": 1}
    phases = report["phases"]
    assert set(phases) >= {
        *(f"generate/{part}" for part in ("gather", "swap", "prefill", "decode", "free", "rest")), "score/actor", "score/ref", "score/critic",
        "score/reward", "train/actor", "train/critic", "train/optimizer",
    }  # fmt: skip
    for laps in report["iterations"].values():
        for seconds in (lap["seconds"] for lap in laps):
            assert sum(seconds[phase] for phase in ("generate", "score", "train", "other")) == pytest.approx(seconds["iteration"])
            assert min(value for name, value in seconds.items() if not name.endswith(("rest", "other"))) > 0
    assert phases["iteration"]["seconds"] == [lap["seconds"]["iteration"] for lap in report["iterations"]["hybrid_engine"]]
    assert set(phases["iteration"]["faster_than"]) == {"hf_generate"}
    assert report["sequences_per_s"] == pytest.approx(4 / phases["iteration"]["median_seconds"])
    assert summary["metrics"]["bench/iteration/seconds"] == phases["iteration"]["median_seconds"]
    assert not (tmp_path / "run" / "export").exists()
    assert column(tmp_path / "run", "rollout/length") == [6.0] * 6, "every answer has bench.new_tokens tokens"
    assert done.stdout.count("│ iteration") == 1, "rank zero alone prints"


@pytest.mark.launch
def test_running_out_of_memory_is_a_result(tmp_path: Path) -> None:
    full = ("+callbacks.full._target_=bench_mishaps.NoMemory", "+callbacks.full.batch=2")
    done = run("-m", "rlhf", "bench", "step", *TINY, *full, "ppo=grpo", f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        "rlhf: out of memory in the phase 'generate' (iteration 3 with hybrid_engine); bench.json"
    )
    report = json.loads((tmp_path / "run" / "bench.json").read_text())
    assert report["status"] == "out of memory"
    assert report["message"] == "generate: CUDA out of memory. Tried to allocate 2.00 GiB"
    assert len(report["iterations"]["hybrid_engine"]) == 1 and len(report["warmup"]["hybrid_engine"]) == 1
    assert report["phases"]["iteration"]["seconds"] and "train/critic" not in report["phases"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed" and summary["error"].startswith("OutOfMemory: ")
