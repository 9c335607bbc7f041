"""Every file of conf/ composes into the verbs that have its group, and the rules accept it or refuse it for a reason stated here.

Runs no job: nothing is trained, read or downloaded.
"""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from jobs import composed

from rlhf import settings
from rlhf.cli.compose import _is_fragment, conf_dir
from rlhf.cli.verbs import VERBS
from rlhf.config import UserError, build
from rlhf.rules import check
from rlhf.settings.ranges import require_in

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
MAX_KEYS = 190
"""Different keys of the composed PPO config: more, and nobody reads what a run is made of."""

PLAIN = (
    "model", "lora", "data", "hardware", "logger", "callbacks", "scheduler", "trainer", "sft", "rm", "dpo", "ppo", "evaluation", "bench", "plan", "efficiency",
)  # fmt: skip
"""Groups whose options go with everything, so that one composition tests one option of each."""
SHORT = ("data.max_prompt_tokens=16", "data.max_answer_tokens=16")
"""Fits the context of every model."""
EXCLUDED = {
    ("data", "base"): "what the other files start from; it names no source",
    ("rollout", "base"): "what the other files start from; it names no engine",
    ("bench", "step"): "starts from bench_step.yaml: tests/cli/test_bench_step.py",
    ("bench", "calibrate"): "starts from bench_calibrate.yaml: tests/cli/test_bench_calibrate.py",
    ("data", "ptx"): "goes with a weight for its loss only: test_plain_text_and_its_weight_go_together",
}
ALL_MODELS_IN = ("sft", "reward", "ppo")
"""Each role in one verb: the other verbs put the same files into the same packages, so the first few are enough there."""


def options(group: str) -> list[str]:
    return [path.stem for path in sorted((CONF / group).glob("*.yaml")) if (group, path.stem) not in EXCLUDED]


def choices(verb: str) -> list[str]:
    """What a command line of the verb can choose: `data`, `model@actor.model`, ..."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return [key for key in compose(verb, return_hydra_config=True).hydra.runtime.choices if not key.startswith("hydra/")]


CHOICES = {verb: choices(verb) for verb in VERBS}


def group_of(key: str) -> str:
    return key.partition("@")[0].removeprefix("/")


def place(verb: str) -> list[str]:
    """`report` has no run directory."""
    return [] if verb == "report" else ["run_dir=runs/x"]


def accepted(verb: str, *overrides: str) -> Any:
    cfg = build(composed(verb, *place(verb), *overrides))
    check(cfg)
    return cfg


def refusal(verb: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        accepted(verb, *overrides)
    return str(caught.value)


# --- groups --------------------------------------------------------------------------------------------------------------------


def test_every_group_is_in_a_verb_and_every_verb_has_a_file() -> None:
    folders = {path.name for path in CONF.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {"sweep", *(group_of(key) for keys in CHOICES.values() for key in keys)}, "sweep goes with -m only"
    own = {f"{verb}_{option.stem}" for verb in VERBS for option in (CONF / verb).glob("*.yaml")}
    files = {path.stem for path in CONF.glob("*.yaml")} - {"base"}
    assert set(VERBS) <= files <= set(VERBS) | own, "an option of a verb's own group may have a file with sections of its own"


def rounds(verb: str) -> Iterator[list[str]]:
    """Overrides that together choose every option of every plain group the verb has."""
    chosen = {key: options(group_of(key)) for key in CHOICES[verb] if group_of(key) in PLAIN}
    lengths = [len(names) for key, names in chosen.items() if verb in ALL_MODELS_IN or group_of(key) != "model"]
    for i in range(max(lengths, default=0)):
        yield [f"{key}={names[i % len(names)]}" for key, names in chosen.items()]


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_of_the_plain_groups_is_accepted(verb: str) -> None:
    for overrides in rounds(verb):
        try:
            accepted(verb, *overrides, *SHORT)
        except Exception as error:
            raise AssertionError(f"rlhf {verb} {' '.join(overrides)}") from error


def test_plain_text_and_its_weight_go_together() -> None:
    assert accepted("ppo", "data=ptx", "ppo.ptx_coef=27.8", *SHORT).data.ptx == ["wikitext"]
    assert "ppo.ptx_coef=0" in refusal("ppo", "data=ptx", *SHORT)
    assert "data.ptx is empty" in refusal("ppo", "ppo.ptx_coef=27.8", *SHORT)


LEARNERS = {
    "sft": ("actor",),
    "reward": ("reward",),
    "ppo": ("actor", "critic"),
    "dpo": ("actor",),
    "pipeline": ("actor", "critic", "reward"),
    "evaluate": (),
    "bench": (),
    "plan": ("actor", "critic", "reward"),
}
NEEDS_LORA = ("mixz", "mixz_hpz")
OFFLOADED = ("z2_offload", "z3_offload", "z3_offload_optimizer")


def optimizers(verb: str, name: str) -> list[str]:
    return [f"{key}={name}" for key in CHOICES[verb] if group_of(key) == "optimizer"]


@pytest.mark.parametrize("verb", [verb for verb in VERBS if any(group_of(key) == "zero" for key in CHOICES[verb])])
@pytest.mark.parametrize("name", options("zero"))
def test_every_zero_option(verb: str, name: str) -> None:
    roles = [key.removeprefix("zero@").removesuffix(".zero") for key in CHOICES[verb] if group_of(key) == "zero"]
    learners = LEARNERS[verb]
    frozen = [role for role in roles if role == "ref"]
    zero = [f"zero@{role}.zero={name}" for role in roles if role not in frozen]
    if name in OFFLOADED:
        zero += optimizers(verb, "cpu_adam")
        if learners:
            assert "offload_optimizer=true does not go with" in refusal(verb, *zero[: len(roles) - len(frozen)])
    if name in NEEDS_LORA:
        assert "needs LoRA" in refusal(verb, *zero)
        zero += [f"lora@{role}.lora=r128" for role in roles if role not in frozen]
        assert "needs a GPU" in refusal(verb, *zero)
        zero.append("trainer=gpu")
        assert "trainer.precision=fp16 only" in refusal(verb, *zero)
        zero.append("trainer.precision=fp16")
    if name == "mixz_hpz":
        holders = [role for role in roles if role not in frozen]
        if len(holders) > 1:
            assert "of one role only" in refusal(verb, *zero)
            zero = [f"zero@{holders[0]}.zero={name}", *(word for word in zero if not word.startswith("zero@"))]
        assert "does not divide trainer.devices=1" in refusal(verb, *zero)
        zero.append(f"{holders[0]}.zero.hpz_partition_size=1")
    accepted(verb, *zero)
    for role in frozen:
        stage = composed(verb, "run_dir=x", f"zero@{role}.zero={name}")[role]["zero"]["stage"]
        if stage in (0, 3):
            accepted(verb, f"zero@{role}.zero={name}")
        else:
            assert "must be 0 or 3" in refusal(verb, f"zero@{role}.zero={name}")


@pytest.mark.parametrize("verb", [verb for verb, learners in LEARNERS.items() if learners])
def test_every_optimizer(verb: str) -> None:
    names = options("optimizer")
    assert names == ["adamw", "cpu_adam", "fused_adam"]
    accepted(verb, *optimizers(verb, "adamw"))
    accepted(verb, *optimizers(verb, "cpu_adam"), *(f"zero@{role}.zero=z2_offload" for role in LEARNERS[verb]))
    assert "choose both or neither" in refusal(verb, *optimizers(verb, "cpu_adam"))
    accepted(verb, *optimizers(verb, "fused_adam"), "trainer=gpu")
    assert "fused_adam needs a GPU" in refusal(verb, *optimizers(verb, "fused_adam"))


@pytest.mark.parametrize("verb", [verb for verb in VERBS if "launcher" in CHOICES[verb]])
def test_every_launcher(verb: str) -> None:
    for name in options("launcher"):
        if verb == "pipeline" and name != "local":  # a script or a torchrun starts one job, a pipeline is several
            assert "one by one" in refusal(verb, f"launcher={name}")
        else:
            accepted(verb, f"launcher={name}")


@pytest.mark.parametrize("verb", [verb for verb in VERBS if "tp" in CHOICES[verb]])
def test_every_way_to_generate(verb: str) -> None:
    assert options("rollout") == ["hf_generate", "hybrid_engine", "recorded"]
    for rollout in (["rollout=hf_generate"], ["rollout=recorded", "rollout.recorded_path=rollouts"], ["rollout=hybrid_engine"]):
        accepted(verb, *rollout)
    for name in options("tp"):
        shared = [f"tp={name}", f"trainer.devices={name.removeprefix('tp')}", "model@actor.model=opt-1.3b"]
        accepted(verb, "rollout=hybrid_engine", *shared)
        if name == "tp1":
            accepted(verb, "rollout=hf_generate", *shared)
        else:  # transformers' generate cannot shard
            assert "rollout=hybrid_engine or tp=tp1" in refusal(verb, "rollout=hf_generate", *shared)


def test_the_groups_above_are_all_there_are() -> None:
    assert {group_of(key) for keys in CHOICES.values() for key in keys} == {
        *PLAIN, "zero", "optimizer", "launcher", "tp", "rollout", "role", "experiment", "debug",
    }  # fmt: skip
    assert options("role") == ["default", "frozen"], "both are in every verb's defaults; no command line chooses them"


@pytest.mark.parametrize("name", options("sweep"))
def test_every_way_to_sweep(name: str) -> None:
    """The section of a sweep is no part of a job: `-m` adds it."""
    needed = ["sweep.metric=gold/ppo"] if name == "optuna" else []
    section = build(composed("sft", *place("sft"), f"+sweep={name}", *needed)["sweep"], "sweep")
    assert isinstance(section, settings.SweepConfig)
    assert "sweep" not in composed("sft", *place("sft"))


# --- whole runs ----------------------------------------------------------------------------------------------------------------

EXPERIMENTS = {"imdb_scorer": ("reward",), "imdb_sentiment": ("pipeline",)}
"""Experiment -> the verbs it is made for."""


@pytest.mark.parametrize("name", options("experiment"))
def test_every_experiment_composes(name: str) -> None:
    for verb in EXPERIMENTS[name]:
        accepted(verb, f"experiment={name}", "data.path=rows.jsonl")


@pytest.mark.parametrize("verb", ["pipeline", "dpo"])
@pytest.mark.parametrize("name", options("debug"))
def test_every_debug_option_composes(name: str, verb: str) -> None:
    """Sections that a verb does not have are left out, as the command does."""
    config = composed(verb, "run_dir=runs/x", f"debug={name}")
    check(build({key: node for key, node in config.items() if not _is_fragment(node)}))


def keys(node: Any) -> int:
    """Leaves without `_target_`, and without a model's shape and a card's data sheet, which are published and nobody's to set."""
    if not isinstance(node, dict) or not node:
        return 1
    return sum(keys(value) for name, value in node.items() if name not in ("_target_", "shape", "hardware"))


def test_the_composed_ppo_config_is_readable() -> None:
    config = composed("ppo", "run_dir=runs/x")
    assert keys(config["critic"]) == keys(config["reward"]) == keys(config["actor"])
    once = {name: node for name, node in config.items() if name not in ("critic", "reward")}
    assert keys(once) <= MAX_KEYS, "the three trained roles have the same keys, so they count once"


# --- no key is ignored -----------------------------------------------------------------------------------------------------------


def words_read() -> set[str]:
    """Every attribute and every string in rlhf/ outside the settings."""
    words: set[str] = set()
    for file in (ROOT / "rlhf").rglob("*.py"):
        if "settings" not in file.parts:
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute):
                    words.add(node.attr)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    words.add(node.value)
    return words


def test_every_key_is_read_by_somebody() -> None:
    words = words_read()
    classes = [cls for cls in (getattr(settings, name) for name in settings.__all__) if dataclasses.is_dataclass(cls)]
    unread = {f"{cls.__name__}.{f.name}" for cls in classes for f in dataclasses.fields(cls) if f.name not in words}
    assert unread == set(), "a key that nothing reads is an option silently ignored"


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_no_range_holds_what_is_no_number(value: float) -> None:
    for low in (0, -math.inf):
        with pytest.raises(ValueError, match="lr must be finite, got"):
            require_in("lr", value, low)
