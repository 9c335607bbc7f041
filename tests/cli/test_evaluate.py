"""`rlhf evaluate` as a user starts it: tiny policies and a reward model, what they leave behind, the same on two ranks, and what is refused.

All jobs of one rank share one process, which pays for one start.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CHAT, save_policy, save_reward
from jobs import composed, run_together
from tiny import write_pairs
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf.cli.compose import conf_dir
from rlhf.cli.evaluate.prompts import read_prompts
from rlhf.cli.main import main
from rlhf.config import UserError
from rlhf.data.chat import format_answer, format_prompt

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SMALL = (
    "evaluate", "model@actor.model=tiny", "model@reward.model=tiny", "actor.model.shape.max_position_embeddings=512",
    "reward.model.shape.max_position_embeddings=512", "data=pairs", "data.max_prompt_tokens=300", "data.max_answer_tokens=100",
    "data.split=[1,1,1]", "data.eval_fraction=0.4", "rollout.max_new_tokens=6", "callbacks=none", "evaluation.batch_size=4",
)  # fmt: skip
OWN = """\
# mine
prompts:
  - What is red?
  - prompt: Name [b]one[/b] fruit with ``` in it.
    good: a plum
    bad: red
"""
CODE = "import json, sys; from rlhf.cli.main import main; print(json.dumps([main(words) for words in json.loads(sys.argv[1])]))"


def sources(root: Path) -> str:
    files = {name: write_pairs(root / f"{name}.jsonl", rows, seed=rows) for name, rows in (("web", 40), ("books", 30))}
    return "data.sources=[" + ",".join(f"{{name: {name}, path: {file}, rejected: '{{rejected}}'}}" for name, file in files.items()) + "]"


def full(root: Path) -> list[str]:
    return [
        *SMALL, sources(root), f"ref.init={root / 'before'}", f"actor.init={root / 'after'}", f"reward.init={root / 'reward'}",
        f"data.cache_dir={root / 'cache'}", "evaluation.prompts=6", "evaluation.pairs=10", "evaluation.texts=6",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two policies, a reward model, and a run directory for each job below; the exit codes are checked here."""
    root = tmp_path_factory.mktemp("evaluate")
    for name, seed in (("before", 0), ("after", 5)):
        save_policy(root / name, seed=seed, positions=512)
    save_reward(root / "reward", positions=512)
    (root / "mine.yaml").write_text(OWN)
    more = ["evaluation.samples=2", "evaluation.gold=mishaps.shorter_is_better", f"evaluation.fixed_prompts={root / 'mine.yaml'}"]
    alone = [*SMALL, sources(root), f"actor.init={root / 'after'}", f"data.cache_dir={root / 'cache'}", "evaluation.prompts=0"]
    jobs = [
        [*full(root), *more, f"evaluation.base={root / 'after'}", f"run_dir={root / 'full'}"],
        [*alone, "evaluation.fixed_prompts=chinese", "evaluation.show=1", f"run_dir={root / 'alone'}"],
        [*full(root), "evaluation.gold=mishaps.refuses", f"run_dir={root / 'bad gold'}"],
    ]
    environment = os.environ | {"PYTHONPATH": str(HERE), "COLUMNS": "120"}
    done = subprocess.run([sys.executable, "-c", CODE, json.dumps(jobs)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1:] == ["[0, 0, 2]"], done.stderr[-4000:] + done.stdout[-2000:]
    (root / "stdout").write_text(done.stdout)
    return root


def metrics(run_dir: Path) -> dict[str, float]:
    return json.loads((run_dir / "summary.json").read_text())["metrics"]


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]


@pytest.mark.launch
def test_scores_and_win_rates_are_those_of_the_answers(root: Path) -> None:
    found, held_out = metrics(root / "full"), [row for row in rows(root / "full") if "fixed" not in row]
    assert len(held_out) == found["evaluated/answers"] == 12, "six prompts and not the eight of two whole batches; two answers each"
    for judge, name in itertools.product(("gold", "reward", "length"), ("before", "after")):
        assert found[f"{judge}/{name}"] == pytest.approx(sum(row[f"{judge}/{name}"] for row in held_out) / 12)
    assert all(row["gold/after"] == -len(row["after"]) for row in held_out)
    for judge in ("gold", "reward"):
        by_prompt = defaultdict(list)
        for row in held_out:
            by_prompt[row["prompt"]].append((row[f"{judge}/after"], row[f"{judge}/before"]))
        shares = {p: sum((a > b) + (a == b) / 2 for a, _ in own for _, b in own) / len(own) for p, own in by_prompt.items()}
        assert found[f"win_rate/{judge}"] == pytest.approx(sum(shares.values()) / 12)
        assert found[f"win_rate/{judge}_low"] <= found[f"win_rate/{judge}"] <= found[f"win_rate/{judge}_high"]
    assert found["difference/reward"] == pytest.approx(found["reward/after"] - found["reward/before"])


@pytest.mark.launch
def test_the_base_is_a_policy_of_its_own(root: Path) -> None:
    found = metrics(root / "full")
    assert found["kl_base/after"] == pytest.approx(0, abs=1e-5), "it is the policy after here"
    assert found["kl_base_k3/before"] > 0.01 and found["kl_k3"] > 0.01
    assert found["kl_low"] < found["kl"] < found["kl_high"]


@pytest.mark.launch
def test_pairs_are_judged_by_source_and_calibrated(root: Path) -> None:
    found = metrics(root / "full")
    counts = {key: value for key, value in found.items() if key.startswith("calibration/") and key.endswith("/count")}
    assert found["evaluated/pairs"] == sum(counts.values()) == 10
    both = [found[f"reward/accuracy/{source}"] for source in ("books", "web")]
    assert min(both) - 1e-9 <= found["reward/accuracy"] <= max(both) + 1e-9
    assert 0 <= found["reward/calibration_error"] <= 1
    assert (root / "full" / "calibration.png").read_bytes().startswith(b"\x89PNG")
    assert not (root / "alone" / "calibration.png").exists()


@pytest.mark.launch
def test_fixed_prompts_stand_side_by_side_with_their_scores(root: Path) -> None:
    page = (root / "full" / "side_by_side.md").read_text()
    fixed = [row for row in rows(root / "full") if "fixed" in row]
    assert [row["prompt"] for row in fixed] == ["What is red?", "Name [b]one[/b] fruit with ``` in it."]
    assert page.count("## ") == 2 and "````text\nName [b]one[/b] fruit with ``` in it.\n````" in page
    for row in fixed:
        assert f"**after** (reward {row['reward/after']:.2f}, {row['length/after']:.0f} tokens" in page and "gold/after" not in row
    margin = pair_margin(root / "reward", "Name [b]one[/b] fruit with ``` in it.", "a plum", "red")
    assert f"the good answer of the file {abs(margin):.2f} {'above' if margin > 0 else 'below'} the bad one" in page
    assert metrics(root / "full")["fixed/accuracy"] == float(margin > 0)


@pytest.mark.launch
def test_the_report_of_an_evaluation_shows_what_it_printed(root: Path, tmp_path: Path) -> None:
    assert main(["report", str(root / "full"), f"report.out={tmp_path}"]) == 0
    page, found = (tmp_path / "report.html").read_text(), metrics(root / "full")
    for key, label in (("win_rate/reward", "wins by reward"), ("win_rate/gold", "wins by gold"), ("reward/accuracy/web", "on web")):
        assert re.search(rf"<th scope=row[^>]*>{label}</th><td></td><td>{found[key]:.3f}</td>", page), label
    assert "Share right against probability" in page and "Name [b]one[/b] fruit with ``` in it." in page


def pair_margin(folder: Path, prompt: str, good: str, bad: str) -> float:
    """Score of the good answer less that of the bad one, by transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = []
    for answer in (good, bad):
        ids = tokenizer(format_prompt(CHAT, prompt), add_special_tokens=False)["input_ids"]
        ids += [*tokenizer(format_answer(CHAT, answer), add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            scores.append(float(model(torch.tensor([ids])).logits))
    return scores[0] - scores[1]


@pytest.mark.launch
def test_one_policy_alone_answers_a_built_in_set(root: Path) -> None:
    found, prompts = metrics(root / "alone"), read_prompts("chinese")
    assert [row["prompt"] for row in rows(root / "alone")] == [entry.prompt for entry in prompts]
    assert found == {}, "no held-out prompt, no reward model, no text: answers to look at and nothing to count"
    assert "before" not in (root / "alone" / "side_by_side.md").read_text()


@pytest.mark.launch
def test_the_terminal_shows_both_policies_and_the_difference(root: Path) -> None:
    out = (root / "stdout").read_text()
    found = metrics(root / "full")
    line = next(line for line in out.splitlines() if "reward  " in line)
    assert re.findall(r"[+-]?\d+\.\d{3}", line)[:3] == [
        f"{found['reward/before']:.3f}", f"{found['reward/after']:.3f}", f"{found['difference/reward']:+.3f}",
    ]  # fmt: skip
    low, high = (found[f"win_rate/gold_{end}"] for end in ("low", "high"))
    assert re.search(rf"wins by gold .* {found['win_rate/gold']:.3f} .* {low:.3f} to {high:.3f}", out)
    assert "Name [b]one[/b] fruit" in out, "brackets are no markup"
    assert "on books" in out and "on web" in out


@pytest.mark.launch
def test_a_scorer_that_fails_is_named_with_a_prompt(root: Path) -> None:
    summary = json.loads((root / "bad gold" / "summary.json").read_text())
    assert summary["status"] == "refused"
    assert re.search(r"evaluation\.gold raised KeyError: 'no answer like that', for prompts such as '.+'", summary["error"])


@pytest.mark.launch
def test_every_metric_is_explained(root: Path) -> None:
    """docs/metrics.md names them with <name>, <source> and <bin> for what varies."""
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    explained = {name for cell in re.findall(r"^\|([^|]+)\|", page, re.MULTILINE) for name in re.findall(r"`([^`]+)`", cell)}
    places = {"before": "<name>", "after": "<name>", "web": "<source>", "books": "<source>"}
    for metric in metrics(root / "full"):
        parts = [
            places.get(part, "<bin>" if re.fullmatch(r"\d+-\d+", part) else part) for part in re.sub("_(low|high)$", "", metric).split("/")
        ]
        assert "/".join(parts) in explained, metric


@pytest.mark.launch
def test_two_ranks_judge_the_same(root: Path) -> None:
    words = [*full(root)[1:], "evaluation.samples=2", f"evaluation.fixed_prompts={root / 'mine.yaml'}", f"run_dir={root / 'two'}"]
    run_together([composed("evaluate", *words, "trainer.devices=2")], world=2)
    one, two = metrics(root / "full"), metrics(root / "two")
    rank_free = [
        name for name in one if name.startswith(("reward/accuracy", "reward/margin", "perplexity", "evaluated", "calibration", "fixed"))
    ]
    assert len(rank_free) > 20
    assert {name: two[name] for name in rank_free} == pytest.approx({name: one[name] for name in rank_free}, rel=1e-4, abs=1e-5)
    assert len([row for row in rows(root / "two") if "fixed" in row]) == 2, "both ranks answer them, and one of them counts"
    assert two["win_rate/reward_low"] <= two["win_rate/reward"] <= two["win_rate/reward_high"]


# --- what is refused -------------------------------------------------------------------------------------------------------------

REFUSED = {
    "win rate without a scorer": (["evaluation.win_rate=[gold]", "ref.init=y"], "by gold, which needs evaluation.gold"),
    "win rate without a reward model": (["evaluation.win_rate=[reward]", "ref.init=y"], "by reward, which needs reward.init"),
    "win rate without a policy before": (["evaluation.win_rate=[reward]", "reward.init=y"], "by reward, which needs ref.init"),
    "win rate without prompts": (
        ["evaluation.win_rate=[reward]", "reward.init=y", "ref.init=z", "evaluation.prompts=0"], "by reward, which needs evaluation.prompts",
    ),
    "win rate by nobody": (["evaluation.win_rate=[taste]"], "evaluation.win_rate must name reward, gold or both, once each, got ['taste']"),
    "base without prompts": (["evaluation.base=y", "evaluation.prompts=0", "evaluation.texts=4"], "evaluation.base=y needs answers"),
    "nothing to do": (["evaluation.prompts=0"], "nothing is asked for"),
    "keywords for no scorer": (["+evaluation.gold_kwargs.a=1"], "evaluation.gold_kwargs are for evaluation.gold, which is null"),
    "a name that is taken": (["evaluation.names=[accuracy,after]"], "evaluation.names must be free of '/'"),
    "misspelt language": (["evaluation.fixed_prompts=chinse"], "there are chinese, english, japanese (did you mean 'chinese'?)"),
    "no such file": (["evaluation.fixed_prompts=none.yaml"], "evaluation.fixed_prompts: none.yaml: the file does not exist"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "part"), REFUSED.values(), ids=REFUSED)
def test_contradictions_are_refused(words: list[str], part: str, refused: Callable[..., str], tmp_path: Path) -> None:
    data = f"data.path={write_pairs(tmp_path / 'pairs.jsonl', 8)}"
    assert part in refused(*SMALL, data, "actor.init=x", *words, f"run_dir={tmp_path / 'run'}")


FILES = {
    "no list": ("a.yaml", "- one\n", ":1: expected `prompts:`"),
    "another key": ("a.yaml", "prompts: [one]\nmore: 1\n", ":1: expected `prompts:`"),
    "empty list": ("a.yaml", "prompts: []\n", ":1: the list of prompts is empty"),
    "not YAML": ("a.yaml", "prompts:\n  - one\n  - @two\n", ":3: not YAML"),
    "a number": ("a.yaml", "prompts:\n  - one\n  - 7\n", ":3: prompt must be a text, got 7"),
    "an empty prompt": ("a.yaml", "prompts:\n  - one\n\n  - ''\n", ":4: the prompt is missing or empty"),
    "a misspelt field": ("a.yaml", "prompts:\n  - prompt: one\n    god: two\n", ":2: a prompt has no field 'god' (did you mean 'good'?)"),
    "half a pair": ("a.yaml", "prompts:\n  - prompt: one\n    good: two\n", ":2: good and bad go together"),
    "rows": ("a.jsonl", '{"prompt": "one"}\n{"prompt": " "}\n', ":2: prompt must be a text, got ' '"),
    "malformed rows": ("a.jsonl", '{"prompt": "one"}\n{"prompt"\n', ":2: not JSON"),
    "another kind of file": ("a.txt", "one\n", "rows are read from .jsonl"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "text", "part"), FILES.values(), ids=FILES)
def test_a_malformed_file_of_prompts_is_refused_with_its_line(name: str, text: str, part: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        read_prompts(str(tmp_path / name))
    assert str(caught.value).startswith(f"evaluation.fixed_prompts: {tmp_path / name}") and part in str(caught.value)


def test_the_built_in_prompts_are_no_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "evaluation/prompts=english"]) == 2
    assert "evaluation/prompts: no such group in rlhf evaluate" in capsys.readouterr().err
    assert not list((conf_dir() / "evaluation").glob("*/*.yaml")), "Hydra takes every folder of conf/ for a group, and --help lists it"


def test_rows_of_ones_own_are_read_as_the_built_in_ones(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,good,bad\none,g,b\ntwo,,\n")
    one, two = read_prompts(str(tmp_path / "a.csv"))
    assert (one.prompt, one.good, one.bad, two.good) == ("one", "g", "b", None) and one.place.endswith("a.csv:2")


def test_the_built_in_sets_ask_the_same_kinds_of_question() -> None:
    sets = {name: read_prompts(name) for name in ("english", "chinese", "japanese")}
    assert {len(entries) for entries in sets.values()} == {7}
    assert len({tuple(entry.good is not None for entry in entries) for entries in sets.values()}) == 1
    assert all(re.search("[一-龥]", entry.prompt) for entry in sets["chinese"])
    assert sum(bool(re.search("[ぁ-ん]", entry.prompt)) for entry in sets["japanese"]) == 7
