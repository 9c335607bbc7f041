"""The command from Python, by what it refuses; docs/own_pipeline.md's code, which runs, is run by tests/test_own_pipeline.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.cli.api import compose, load, opened, run
from rlhf.config import UserError
from rlhf.inference.arena import mapped_memory

TINY = ("model@actor.model=tiny", "data.max_prompt_tokens=40", "data.max_answer_tokens=24")
REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "a verb": (("pipelin",), "no such verb: pipelin (did you mean 'pipeline'?); a verb of your own needs config_dir"),
    "a key": (("sft", "sft.batchsize=3"), "sft.batchsize: no such key (did you mean 'sft.batch_size'?)"),
    "an option": (("sft", "data=pear"), "data=pear: no such option"),
    "a value": (("sft", "sft.batch_size=many"), "sft.batch_size: expected int, got 'many'"),
    "several values": (("sft", "seed=0,1"), "seed=0,1 names several values: call this once for each"),
    "a word of a sweep": (("sft", "sweep.jobs=2"), "sweep.jobs=2 says how a sweep is run: on the command line, with -m"),
    "a flag": (("sft", "--cfg"), "--cfg: flags are the command line's; here an override is"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_words_are_refused_as_by_the_command(case: str, tmp_path: Path) -> None:
    (verb, *words), message = REFUSED[case]
    with pytest.raises(UserError) as refusal:
        run(verb, *words, f"run_dir={tmp_path / 'run'}")
    assert message in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_what_is_composed_is_what_the_command_shows(tmp_path: Path) -> None:
    config = compose("ppo", "ppo=grpo", f"run_dir={tmp_path}")
    assert (config["verb"], config["ppo"]["advantage"], config["run_dir"]) == ("ppo", "grpo", str(tmp_path))
    assert "hydra" not in config and "sweep" not in config
    assert Path(compose("bench", "parity")["run_dir"]).parts[:2] == ("runs", "bench")


def test_chat_and_verbs_that_are_no_job_say_where_they_are() -> None:
    with pytest.raises(UserError, match="Answerer"):
        run("chat", "checkpoint=x")
    with pytest.raises(UserError, match="rlhf plan is no job of its own"):
        load("plan")


LOOPS: dict[str, tuple[tuple[str, ...], str]] = {
    "callbacks": (("callbacks=default",), "callbacks=throughput,samples,histograms,progress,guard is the trainer's"),
    "checkpoints": (("trainer.checkpoint_every=2",), "trainer.checkpoint_every=2 is the trainer's"),
    "evaluation": (("trainer.eval_every=2",), "trainer.eval_every=2 is the trainer's"),
    "ranks": (("trainer.devices=2",), "several ranks, but this process is one: use launcher=external under torchrun"),
}


@pytest.mark.parametrize("case", LOOPS)
def test_a_loop_refuses_what_only_the_trainer_does(case: str, tmp_path: Path) -> None:
    words, message = LOOPS[case]
    with pytest.raises(UserError) as refusal, opened("sft", *TINY, *words, f"run_dir={tmp_path / 'run'}"):
        raise AssertionError("the block was entered")
    assert message in str(refusal.value)


def test_the_memory_of_rollouts_ends_with_the_job(tmp_path: Path) -> None:
    """Also what is kept between them: the next job of this process, a pipeline's evaluation, would not find it."""
    kept, before = ("rollout.release_inference_cache=false", "rollout.pin_parameters=true"), mapped_memory.now
    small = ("model@actor.model=tiny", "model@critic.model=tiny", "model@reward.model=tiny", "ppo.iterations=1", "data.max_answer_tokens=8")
    sizes = ("ppo.batch_size=4", "ppo.minibatch_size=4", "ppo.micro_batch_size=4", "ppo.score_micro_batch_size=4")
    with opened("ppo", *TINY, *small, *sizes, *kept, f"run_dir={tmp_path / 'run'}") as parts:
        parts.generate(next(iter(parts.batches())))
        assert mapped_memory.now > before
    assert mapped_memory.now == before


def test_a_run_directory_belongs_to_one_run(tmp_path: Path) -> None:
    job = load("sft", *TINY, f"run_dir={tmp_path}")
    assert job.run_dir == tmp_path and (tmp_path / "config.yaml").is_file()
    with pytest.raises(UserError, match="already holds a run"):
        load("sft", *TINY, f"run_dir={tmp_path}")


def test_a_loop_that_fails_says_so_and_a_step_of_sft_is_its_training_step(tmp_path: Path) -> None:
    words = (*TINY, "sft.batch_size=4", "sft.micro_batch_size=4", "sft.max_steps=3", f"run_dir={tmp_path / 'run'}")
    with pytest.raises(ZeroDivisionError), opened("sft", *words) as parts:
        for step, batch in enumerate(parts.batches(), start=1):
            parts.module.training_step(batch, 0)
            parts.record(parts.module.metrics, step)
            if step == 2:
                with pytest.raises(UserError, match="rlhf sft answers no prompts"):
                    parts.generate(batch)
                raise ZeroDivisionError("of the test")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["error"]) == ("failed", "ZeroDivisionError: of the test")
    lines = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in lines] == ["step", "1", "2"]


def test_importing_the_functions_imports_nothing_heavy() -> None:
    """DeepSpeed reads the device from the environment when it is imported, which `run` and `load` set first."""
    code = "import sys, rlhf.cli.api; print(sorted({'deepspeed', 'lightning', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout.strip() == "[]"
