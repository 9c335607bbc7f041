"""PPO runs as a user starts them: the original's greedy rollouts, the metrics that are written, and runs that go wrong.

All jobs share one process, which pays for one start.
"""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import write_pairs
from transformers import AutoModelForCausalLM

from rlhf.callbacks.rollout import load_rollout

ROOT = Path(__file__).parents[2]
SMALL = (
    "ppo", "model@actor.model=tiny", "model@critic.model=tiny", "model@reward.model=tiny", "data=pairs", "data.max_prompt_tokens=12",
    "data.max_answer_tokens=8", "data.split=[1,1,2]", "ppo.iterations=2", "ppo.batch_size=8", "ppo.minibatch_size=4", "ppo.micro_batch_size=2",
    "~callbacks.samples", "~callbacks.progress", "ppo.actor_scheduler.warmup=0",
)  # fmt: skip
JOBS: dict[str, tuple[str, ...]] = {
    "greedy": ("ppo=dschat", "ppo.actor_optimizer.lr=0"),
    "everything": (
        "ppo=n_details", "ppo.kl_target=null", "ppo.kl_in=loss", "ppo.kl_estimator=k3", "ppo.importance_cap=2", "ppo.dual_clip=3",
        "ppo.ptx_coef=1", "data.ptx=[pairs]", "trainer.checkpoint_every=1",
    ),
    "no critic": (
        "ppo=grpo", "ppo.samples_per_prompt=2", "ppo.batch_size=4", "ppo.reward_source=function",
        "ppo.reward_function=mishaps.shorter_is_better", "actor.lora.rank=2",
    ),
    "no reward": ("ppo.reward_source=function", "ppo.critic_init=actor", "ppo.reward_function=mishaps.refuses"),
    "late": ("ppo.reward_source=function", "ppo.critic_init=actor", "ppo.reward_function=mishaps.refuses_later"),
    "out of range": ("trainer.checkpoint_every=1", "+callbacks.guard.ranges={actor/lr: [5.0e-6, 1]}"),
    "nan": ("trainer.checkpoint_every=1", "+callbacks.poison._target_=mishaps.Poison"),
}  # fmt: skip
CODE = "import json, sys; from rlhf.cli.main import main; print(json.dumps([main(words) for words in json.loads(sys.argv[1])]))"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run directory for each of JOBS; the exit codes are checked here."""
    root = tmp_path_factory.mktemp("ppo")
    data = (f"data.path={write_pairs(root / 'pairs.jsonl', 64)}", f"data.cache_dir={root / 'cache'}")
    jobs = [[*SMALL, *data, *words, f"run_dir={root / name}", f"rollout.save_to={root / name / 'answers'}"] for name, words in JOBS.items()]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", CODE, json.dumps(jobs)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1:] == ["[0, 0, 0, 2, 1, 1, 1]"], done.stderr[-4000:]
    (root / "stderr").write_text(done.stderr)
    return root


def rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open(newline="") as f:
        return list(csv.DictReader(f))


def error(run_dir: Path) -> str:
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] in ("failed", "refused")
    return summary["error"]


@pytest.mark.launch
def test_greedy_rollouts_are_the_likeliest_tokens(runs: Path) -> None:
    assert "ppo.greedy_rollouts=true: every prompt gets its likeliest answer" in (runs / "stderr").read_text()
    answers = load_rollout(runs / "greedy" / "answers", 0)
    ids, mask, action_mask = answers.ids, answers.mask, answers.action_mask
    # Learning rate 0: the export is the actor that answered.
    model = AutoModelForCausalLM.from_pretrained(runs / "greedy" / "export" / "actor").eval()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask.long(), position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    width = action_mask.shape[1]
    likeliest = logits[:, -width - 1 : -1].argmax(-1)
    assert torch.equal(likeliest[action_mask], ids[:, -width:][action_mask])


@pytest.mark.launch
@pytest.mark.parametrize("name", ["greedy", "everything", "no critic"])
def test_every_metric_is_explained(name: str, runs: Path) -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"^\| `([\w/]+)` \|", page, re.MULTILINE))
    written = rows(runs / name)
    assert len(written) == 2 and written[0].keys() - {"step"} - explained == set()
    if name == "everything":
        gpu = {name for name in explained if name.startswith("memory/")}
        assert explained - written[0].keys() == gpu, "metrics of a GPU"


@pytest.mark.launch
def test_a_run_without_critic_and_reward_model_has_neither(runs: Path) -> None:
    run_dir = runs / "no critic"
    assert [path.name for path in (run_dir / "export").iterdir()] == ["actor"]
    first, *_ = rows(run_dir)
    assert not [name for name in first if name.startswith("critic/")]
    assert float(first["rollout/reward"]) < -1, "the function's score, which is minus the length"
    errors = (runs / "stderr").read_text()
    assert errors.count("PPO starts from a reward model with random weights") == len(JOBS) - 3


@pytest.mark.launch
def test_a_reward_function_that_fails_is_named_with_the_prompt(runs: Path) -> None:
    assert re.search(
        r"ppo\.reward_function=mishaps\.refuses raised KeyError: 'no answer like that', for the prompt '.+' and the answer '",
        error(runs / "no reward"),
    )


@pytest.mark.launch
def test_what_a_user_gets_wrong_after_some_learning_is_a_failure(runs: Path) -> None:
    """Not a refusal, which would leave the directory free for another run."""
    summary = json.loads((runs / "late" / "summary.json").read_text())
    assert summary["status"] == "failed" and "mishaps.refuses_later returned nan for the prompt" in summary["error"]


@pytest.mark.launch
def test_a_metric_out_of_its_range_ends_the_run(runs: Path) -> None:
    run_dir = runs / "out of range"
    rate = float(rows(run_dir)[-1]["actor/lr"])
    assert error(run_dir) == (
        f"Collapsed: iteration 2: actor/lr = {rate:.6g} left its range [5e-06, 1] (callbacks.guard.ranges); "
        f"the last good checkpoint is {run_dir / 'checkpoints' / 'step-000001'}"
    )
    assert len(rows(run_dir)) == 2, "the row that shows it is written"
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-000001"]


@pytest.mark.launch
def test_a_run_that_goes_nan_says_where_and_what_is_left(runs: Path) -> None:
    checkpoint = runs / "nan" / "checkpoints" / "step-000001"
    assert error(runs / "nan") == (
        "FloatingPointError: iteration 2: actor: the gradients are not finite, so nothing can be learned; see the last rows of metrics.csv; "
        f"rollout/reward is nan; the last good checkpoint is {checkpoint}"
    )
