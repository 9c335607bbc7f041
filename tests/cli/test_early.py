"""What is settled before anything is trained or written: a run that is done already, an evaluation that cannot be, a directory that a refused
run has no use for, a script for machines that are not this one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import save_policy
from jobs import composed
from refusals import HYBRID, PPO, SFT, Refused, begun, contents, says
from tiny import write_pairs

from rlhf.cli.main import main
from rlhf.cli.pipeline_ahead import require_later_steps
from rlhf.cli.rundir import claim, write_summary
from rlhf.cli.vocabulary import require_one_vocabulary
from rlhf.config import UserError, build

PIPELINE = ("pipeline", *PPO[1:], "sft.batch_size=4", "sft.micro_batch_size=4", "rm.batch_size=4", "rm.micro_batch_size=4")


# --- done already ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [SFT, PIPELINE], ids=["run", "pipeline"])
def test_a_run_that_is_done_is_not_run_again(verb: tuple[str, ...], pairs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    config = composed(*verb, f"run_dir={run_dir}", f"data.path={pairs}")
    claim(run_dir, config)
    write_summary(config, "done")
    before = contents(run_dir)
    assert main([verb[0], "resume=true", f"run_dir={run_dir}"]) == 0
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith(f"run_dir={run_dir} is done already: there is nothing to resume")
    assert contents(run_dir) == before


def test_checkpoints_change_nothing_of_that_and_other_settings_are_refused(refused: Refused, pairs: Path, tmp_path: Path) -> None:
    run_dir = begun(tmp_path / "run", pairs, status="done", file_size=5)  # a damaged one, which nobody reads
    before = contents(run_dir)
    assert main(["sft", "resume=true", f"run_dir={run_dir}"]) == 0
    says(refused(*SFT, f"data.path={pairs}", "resume=true", f"run_dir={run_dir}", "seed=7"), ("resume=true cannot change seed",))
    assert contents(run_dir) == before


# --- a pipeline's evaluation -----------------------------------------------------------------------------------------------------

LONG = "prompts:\n  - red\n  - " + "red " * 13 + "\n"
EVALUATIONS = {
    "no such language": ("evaluation.fixed_prompts=englsh", "'english'"),
    "no such file": ("evaluation.fixed_prompts=none.yaml", "none.yaml: the file does not exist"),
    "a malformed file": ("evaluation.fixed_prompts=odd.yaml", "odd.yaml:1: expected `prompts:`"),
    "a prompt that is too long": ("evaluation.fixed_prompts=long.yaml", "long.yaml:3: the prompt has 13 tokens, more than data.max_prompt_tokens=12"),
    "no such scorer": ("evaluation.gold=json.dump5", "evaluation.gold: cannot import 'json.dump5'"),
    "keywords that do not fit": ("+evaluation.gold_kwargs.width=3", "evaluation.gold_kwargs do not fit rlhf.models.scorer.ScalarScorer"),
    "no such judge": ("+evaluation.gold_kwargs={path:nowhere,threshold:0}", "evaluation.gold_kwargs.path=nowhere holds no model"),
    "no such base": ("evaluation.base=nowhere", "evaluation.base=nowhere holds no model"),
}  # fmt: skip


@pytest.mark.parametrize(("word", "part"), EVALUATIONS.values(), ids=EVALUATIONS)
def test_an_evaluation_that_cannot_be_is_refused_before_the_first_step(
    word: str, part: str, refused: Refused, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.yaml").write_text("- red\n")
    (tmp_path / "long.yaml").write_text(LONG)
    scorer = () if "gold=" in word else ("evaluation.gold=rlhf.models.scorer.ScalarScorer",) if "gold" in word else ()
    words = (*PIPELINE, "data.chat.human='{text}'", "data.chat.assistant=''", *scorer, f"data.path={pairs}", "run_dir=run")
    says(refused(*words, word), (part,))
    assert not (tmp_path / "run").exists()


LATER = {
    "weights of a later step": (("critic.init=nowhere",), "critic.init=nowhere holds no model"),
    "keywords of a reward function": (
        ("ppo.reward_source=both", "ppo.reward_function=rlhf.models.scorer.ScalarScorer", "+ppo.reward_function_kwargs={width:3}"),
        "ppo.reward_function_kwargs do not fit rlhf.models.scorer.ScalarScorer",
    ),
    "recorded answers": (("rollout=recorded", "rollout.recorded_path=nowhere"), "rollout.recorded_path=nowhere is no folder"),
    "plain text": (("ppo.ptx_coef=1", "data.ptx=[{name: t, path: nowhere.jsonl, text: '{text}'}]"), "nowhere.jsonl"),
    "a batch of pairs": (("rm.batch_size=4000",), "rm.batch_size=4000 is more than the 7 pairs (rows with a rejected answer) of the reward step"),
    "prompts": (("data.split=[1,1,0]",), "ppo.batch_size=4 is more than the 0 rows of the ppo step"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "part"), LATER.values(), ids=LATER)
def test_what_a_later_step_lacks_is_said_before_the_first(
    words: tuple[str, ...], part: str, refused: Refused, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    says(refused(*PIPELINE, f"data.path={pairs}", "steps=[sft,reward,ppo]", "run_dir=run", *words), (part,))
    assert not (tmp_path / "run").exists()


def test_what_an_earlier_step_is_to_write_need_not_be_there(tmp_path: Path) -> None:
    made = tmp_path / "run" / "reward" / "export" / "reward"
    words = (
        "ppo.reward_source=both", "ppo.reward_function=rlhf.models.scorer.ScalarScorer",
        f"+ppo.reward_function_kwargs={{path:'{made}',threshold:0}}",
    )  # fmt: skip
    data = f"data.path={write_pairs(tmp_path / 'pairs.jsonl', 32)}"
    step = build(composed(*PPO, data, f"run_dir={tmp_path / 'run' / 'ppo'}", *words))
    require_later_steps([step], tmp_path / "run")
    with pytest.raises(UserError, match=r"ppo\.reward_function_kwargs\.path=.* holds no model"):
        require_later_steps([step], tmp_path / "another")


# --- one vocabulary --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "words", "differ"),
    [
        ("ppo", ("model@actor.model=opt-1.3b", "model@reward.model=opt-350m", "model@critic.model=opt-350m"), False),
        ("ppo", ("model@actor.model=pythia-12b", "model@reward.model=pythia-70m", "model@critic.model=pythia-70m"), False),
        ("ppo", ("model@actor.model=llama2-7b", "model@reward.model=smollm2-135m"), True),
        ("ppo", ("model@actor.model=llama2-7b", "model@reward.model=opt-350m", "reward.init=x"), False),
        ("ppo", ("model@actor.model=llama2-7b", "model@reward.model=opt-350m", "reward.model.pretrained=false"), False),
        ("ppo", ("model@actor.model=llama2-7b", "model@reward.model=opt-350m", "actor.init=x"), False),
        ("pipeline", ("model@actor.model=opt-1.3b", "model@reward.model=opt-350m"), False),
        ("pipeline", ("model@actor.model=opt-1.3b", "model@reward.model=gpt2", "reward.model.pretrained=false"), True),
        ("pipeline", ("model@actor.model=opt-1.3b", "model@reward.model=gpt2", "steps=[sft,reward]"), False),
        ("sft", ("model@actor.model=opt-1.3b",), False),
    ],
)
def test_roles_with_vocabularies_of_their_own(verb: str, words: tuple[str, ...], differ: bool) -> None:
    base = () if verb != "ppo" else ("model@critic.model=tiny",)
    cfg = build(composed(verb, *base, *words, "run_dir=x"))
    if not differ:
        require_one_vocabulary(cfg)
        return
    with pytest.raises(UserError, match="have different tokenizers"):
        require_one_vocabulary(cfg)


# --- a pipeline in place of a step -----------------------------------------------------------------------------------------------


def test_a_pipeline_named_as_a_run_names_its_step(refused: Refused, pairs: Path, tmp_path: Path) -> None:
    root = tmp_path / "pipeline"
    save_policy(root / "sft" / "export" / "actor")
    sft = root / "sft"
    assert refused("chat", f"checkpoint={root}") == f"checkpoint={root} holds no model, but its step sft does: checkpoint={sft}"
    words = (*PPO, *HYBRID, f"data.path={pairs}", f"run_dir={tmp_path / 'run'}", f"actor.init={root}")
    assert refused(*words) == f"actor.init={root} holds no model, but its step sft does: actor.init={sft}"
    save_policy(root / "ppo" / "export" / "actor")
    says(refused("chat", f"checkpoint={root}"), (f"but its step ppo does: checkpoint={root / 'ppo'}",))


# --- directories -----------------------------------------------------------------------------------------------------------------


def test_a_refused_run_leaves_no_empty_directory(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for words in ((), ("run_dir=runs/none",), ("run_dir=mine/a/b",), ("run_dir=mine",)):
        says(refused(*SFT, *words, "sft.micro_batch_size=3"), ("choose a multiple",))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert not list((tmp_path / "mine").iterdir())


# --- scripts for other machines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("launcher", "script"), [("slurm", "job.sbatch"), ("hostfile", "launch.sh")])
def test_a_script_is_written_where_there_is_no_gpu(
    launcher: str, script: str, refused: Refused, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (tmp_path / "hosts").write_text("node-a slots=2\n")
    words = (*SFT, f"data.path={pairs}", "trainer=gpu", "trainer.devices=2", "sft.batch_size=8", f"launcher.hostfile={tmp_path / 'hosts'}")
    assert main([*words, f"launcher={launcher}", f"run_dir={tmp_path / 'run'}"]) == 0
    text = (tmp_path / "run" / script).read_text()
    assert "gpus-per-node=2" in text or launcher == "hostfile"
    says(refused(*words, f"run_dir={tmp_path / 'here'}"), ("trainer.accelerator=cuda, but no CUDA device is visible",))
