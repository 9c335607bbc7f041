"""`rlhf plan` as a user meets it, and the check of memory that training verbs run first."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import composed

from rlhf.cli.job import checked
from rlhf.cli.main import main
from rlhf.config import UserError

JOB = ("trainer=gpu", "hardware=a100-40g", "data=rm_static", "model@actor.model=opt-1.3b", "model@critic.model=opt-350m",
       "model@reward.model=opt-350m")  # fmt: skip
TOO_MUCH = ("ppo.batch_size=512", "ppo.minibatch_size=512")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["plan", *words]) == 0
    return capsys.readouterr().out


def test_the_table_has_roles_and_phases_and_a_verdict(capsys: pytest.CaptureFixture[str], elsewhere: Path) -> None:
    out = printed(capsys, *JOB)
    for word in (
        "rlhf ppo on 1 x a100-40g, bf16",
        "generate",
        "score",
        "train actor",
        "train critic",
        "update",
        "inference copy",
        "reserve",
    ):
        assert word in out
    assert "does not fit" in out and "would fit: " in out and "rlhf ppo refuses it" in out
    assert "largest batch that fits: " in out
    assert "say plan.samples=N" in out
    assert list(elsewhere.iterdir()) == [], "a plan leaves nothing behind"


def test_time_and_cost(capsys: pytest.CaptureFixture[str]) -> None:
    fits = ("ppo.micro_batch_size=4", "ppo.score_micro_batch_size=4", "zero@actor.zero=z2", "trainer.devices=8", "plan.samples=264292")
    out = printed(capsys, *JOB, *fits)
    assert "fits: " in out and "does not fit" not in out
    assert "264,292 sequences in" in out and "cost unknown (hardware.price_per_hour=0)" in out
    assert "dollars" in printed(capsys, *JOB, *fits, "hardware.price_per_hour=2")


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    answer = json.loads(printed(capsys, "--json", *JOB, "plan.search=true"))
    assert answer == json.loads(printed(capsys, *JOB, "plan.json=true", "plan.search=true"))
    assert answer["step"] == "ppo" and answer["hardware"] == "a100-40g" and not answer["fits"]
    assert answer["search"]["peak"] <= answer["gpu"]["capacity"]


@pytest.mark.parametrize(("step", "roles"), [("sft", {"actor"}), ("reward", {"reward"}), ("dpo", {"actor", "ref"})])
def test_a_word_after_the_verb_names_the_step(step: str, roles: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    answer = json.loads(printed(capsys, step, "--json", *JOB))
    assert answer["step"] == step
    assert set(answer["memory"]["update"]["roles"]) - {"all"} == roles


def test_a_pipeline_is_planned_step_by_step(capsys: pytest.CaptureFixture[str]) -> None:
    answers = json.loads(printed(capsys, "pipeline", "--json", *JOB))
    assert [answer["step"] for answer in answers] == ["sft", "reward", "ppo"]


def test_the_quickstart_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys)
    assert "fits: " in out and "time: unknown, hardware=cpu has no matrix rate" in out


@pytest.mark.parametrize("recipe", ["ppo_opt-13b_single_node", "ppo_opt-66b_multi_node", "sft_opt-30b_lora_single_node"])
def test_recipes_of_the_original(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    step = recipe.partition("_")[0]
    answer = json.loads(printed(capsys, step, "--json", f"experiment=dschat/{recipe}", "hardware=a100-80g"))
    assert answer["ranks"] in (8, 64) and answer["seconds_per_iteration"] > 0


def test_a_plan_imports_nothing_heavy(elsewhere: Path) -> None:
    heavy = "{'torch', 'lightning', 'transformers', 'deepspeed', 'numpy', 'datasets', 'matplotlib'}"
    code = (
        f"import sys; from rlhf.cli.main import main; code = main(['plan', 'plan.search=true', *{list(JOB)!r}]);"
        f"print('heavy:', sorted({{m.split('.')[0] for m in sys.modules}} & {heavy})); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert "fastest that fits: " in done.stdout and "heavy: []" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("hardware=h100",),
            "hardware=h100: no such option (did you mean 'h100-80g' or 'h100-80g-vm'?); there are a100-40g, a100-80g, a6000, cpu, h100-80g",
        ),
        (("trainer.devices=16",), "trainer.devices=16 is more than a node of a100-40g has (hardware.devices_per_node=8)"),
        (("ppo.batch_size=63",), "ppo.minibatch_size must divide batch_size x samples_per_prompt = 63"),
        (("actor.model.family=xlnet",), "actor.model.family=xlnet has no known shape: planning knows opt, gpt2"),
        (("sf",), "sf: no such option of rlhf plan (did you mean 'sft'?)"),
        (("plan.step=evaluate",), "plan.step: expected one of sft, reward, ppo, dpo, pipeline, got 'evaluate'"),
        (("plan=pipeline", "steps=[evaluate]"), "steps=['evaluate'] must name some of sft, reward, ppo, dpo"),
        (("plan.samples=0",), "plan.samples must be at least 1 or null"),
        (("plan.efficiency.training=1.5",), "plan.efficiency.training must lie in (0, 1]"),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], message: str, refused: Callable[..., str]) -> None:
    first = [word for word in words if "=" not in word]
    assert message in refused("plan", *first, *JOB, *(word for word in words if "=" in word))


# --- before a run -------------------------------------------------------------------------------------------------------------------


def config(*overrides: str, verb: str = "ppo") -> dict[str, Any]:
    return composed(verb, "run_dir=runs/x", *JOB, *overrides)


def test_a_run_that_cannot_fit_is_refused_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.cli.job.accelerator_of_ranks", lambda trainer, launcher: "cuda")
    with pytest.raises(UserError, match=r"a GPU is .* GB short of memory .* hardware=a100-40g; .* and plan.enforce=false goes on"):
        checked(config(*TOO_MUCH))
    assert checked(config(*TOO_MUCH, "plan.enforce=false")).verb == "ppo"
    assert checked(config(*TOO_MUCH, "hardware=cpu")).verb == "ppo", "nothing is known of the card"
    assert checked(config("ppo.micro_batch_size=4", "ppo.score_micro_batch_size=4", "hardware=h100-80g")).verb == "ppo"


def test_a_pipeline_is_refused_before_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.cli.job.accelerator_of_ranks", lambda trainer, launcher: "cuda")
    with pytest.raises(UserError, match=r"^ppo: a GPU is .* GB short of memory"):
        checked(config(*TOO_MUCH, verb="pipeline"))
    assert checked(config(*TOO_MUCH, "steps=[sft]", verb="pipeline")).verb == "pipeline"


def test_nothing_is_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """trainer.accelerator=auto on a machine without a GPU, whatever hardware says."""
    monkeypatch.setattr("rlhf.cli.job.accelerator_of_ranks", lambda trainer, launcher: "cpu")
    assert checked(config(*TOO_MUCH)).verb == "ppo"


def test_a_config_of_before_the_check_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.cli.job.accelerator_of_ranks", lambda trainer, launcher: "cuda")
    old = {key: node for key, node in config(*TOO_MUCH).items() if key != "plan"}
    assert checked(old).verb == "ppo"
