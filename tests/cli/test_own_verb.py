"""A verb from outside the package, by what goes wrong with it, on two ranks, and in a sweep. docs/own_pipeline.md's is run by
tests/test_own_pipeline.py."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from rlhf.cli.main import main
from rlhf.cli.own_verb import config_folder, own_verb
from rlhf.cli.verbs import VERBS
from rlhf.config import UserError

TINY = ("data.max_prompt_tokens=40", "data.max_answer_tokens=24", "callbacks=none")
DEFAULTS = [
    "base", {"role@actor": "default"}, {"model@actor.model": "tiny"}, {"zero@actor.zero": "z0"}, {"lora@actor.lora": "none"},
    {"optimizer@level.optimizer": "adamw"}, {"scheduler@level.scheduler": "constant"}, "_self_", {"override hydra/job_logging": "none"},
    {"override hydra/hydra_logging": "none"},
]  # fmt: skip
LEVEL = {"verb": "level", "entry": "levelling.Level", "level": {"batch_size": 4, "rate": 0.5}}
MODULE = '''
import lightning as L
from rlhf.modules.base import RoleModule

class Levelled(RoleModule):
    """Logits go to zero."""
    trained = ("actor",)

    def training_step(self, batch, batch_idx):
        rows = self.strategy.sum_over_ranks(batch.mask.sum().double())
        loss = (self.actor(batch.ids, batch.mask)[batch.mask].float() ** 2).mean(dim=1).sum() / rows
        self.strategy.backward("actor", loss)
        self.strategy.step("actor")
        self.iteration += 1
        self.metrics = {"level/loss": float(self.strategy.sum_over_ranks(loss.detach()))}

class Level:
    def __init__(self, batch_size, rate, optimizer, scheduler):
        if rate > 1:
            raise ValueError(f"rate must be at most 1, got {rate}")
        self.batch_size, self.optimizer, self.scheduler = batch_size, optimizer, scheduler

    def run(self, job):
        job.tokenizer("actor")
        data = job.data("sft", self.batch_size, steps=2, eval_batches=0, batch_key="level.batch_size")
        engine = job.trained_engine("actor", self.optimizer, self.scheduler, total_steps=2, batch_size=self.batch_size, micro=None)
        L.seed_everything(job.cfg.seed, verbose=False)
        module = Levelled({"actor": job.blueprint("actor", kind="causal", trained=True)})
        return job.fit(module, job.strategy({"actor": engine}), data, total=2, extra=[])

class Idle:
    """It has no run."""

LIST = [1]

def says(job):
    return {"metrics": {"level/answer": 42}}
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with conf/level.yaml and the module of its entry."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "levelling", raising=False)
    (tmp_path / "levelling.py").write_text(MODULE)
    write(tmp_path, "level", {"defaults": DEFAULTS, **LEVEL})
    return tmp_path


def write(folder: Path, name: str, content: dict[str, Any] | str) -> None:
    file = folder / "conf" / f"{name}.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))


def summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


# --- refused before a directory is claimed -----------------------------------------------------------------------------------------


def without(*keys: str, **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in {"defaults": DEFAULTS, **LEVEL, **changes}.items() if key not in keys}


FILES: dict[str, tuple[str, dict[str, Any] | str, str]] = {
    "no verb": ("level", without("verb"), "verb: a value is missing: a file for a verb of your own says verb: NAME"),
    "another verb": ("level", without(verb="levels"), "level.yaml is no config of rlhf level: its verb is levels"),
    "no entry": ("level", without("entry"), "level.yaml says no entry, the import path of"),
    "no base": ("level", without(defaults=DEFAULTS[5:]), "level.yaml has no section"),
    "a section with a class": (
        "level", without(level={"_target_": "levelling.Level"}), "level._target_ would be read by nobody: entry names the class"
    ),
    "a group that is not there": ("level", without(defaults=["base", {"modl@actor": "x"}, "_self_"]), "modl/x: no such group or option"),
    "no YAML": ("level", "defaults: [base\nverb: level\n", "a configuration file is no YAML: "),
    "a name of the package": ("data", without(verb="data"), "data.yaml: data cannot be the name of a verb"),
    "a name of a section": ("rm", without(verb="rm"), "rm.yaml: rm cannot be the name of a verb"),
    "no name at all": ("my-verb", without(verb="my-verb"), "my-verb cannot be the name of a verb"),
    "a key that nobody reads": ("level", without(leve=3), "leve: no such key (did you mean 'level'?)"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_a_file_is_refused(case: str, folder: Path, refused: Callable[..., str]) -> None:
    name, content, message = FILES[case]
    write(folder, name, content)
    said = refused(name, "--config-dir", "conf", "run_dir=run")
    assert message in said
    assert not [file for name in ("config.yaml", "summary.json") if (file := folder / "run" / name).exists()]


WORDS: dict[str, tuple[tuple[str, ...], str]] = {
    "no folder": (("level",), "no such verb: level; rlhf --help lists them"),
    "a folder that is not there": (("level", "--config-dir", "cnf"), "--config-dir cnf: there is no such folder"),
    "a flag without a folder": (("level", "--config-dir"), "--config-dir needs a value behind it"),
    "no file": (("levle", "--config-dir=conf"), "no such verb: levle (did you mean 'level'?); rlhf --help lists those of the package, and "
                "there is no conf/levle.yaml"),
    "a key": (("level", "--config-dir", "conf", "level.rat=1"), "level.rat: no such key (did you mean 'level.rate'?); rlhf level --config-dir "
              "conf --cfg job shows them all"),
    "an entry for a verb of the package": (("sft", "+entry=levelling.Level"), "entry=levelling.Level is for a verb of your own"),
}  # fmt: skip


@pytest.mark.parametrize("case", WORDS)
def test_a_command_line_is_refused(case: str, folder: Path, refused: Callable[..., str]) -> None:
    words, message = WORDS[case]
    assert message in refused(*words)


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        (["-cd", "a", "x=1"], Path("a")), (["x=1", "--config-dir=b"], Path("b")), (["--config-dir"], Path()), (["x=--config-dir"], None), ([], None),
    ],
)  # fmt: skip
def test_the_folder_of_a_command_line(words: list[str], folder: Path | None) -> None:
    assert config_folder(words) == folder


# --- refused by a rank -------------------------------------------------------------------------------------------------------------

ENTRIES: dict[str, tuple[tuple[str, ...], str]] = {
    "no module": (("entry=nowhere.Level",), "entry: cannot import 'nowhere.Level': No module named 'nowhere'; a module is looked for where"),
    "no such name": (("entry=levelling.Levl",), "entry: cannot import 'levelling.Levl': module 'levelling' has no attribute 'Levl'"),
    "no path": (("entry=levelling",), "entry: cannot import 'levelling': an import path is module.name"),
    "no method": (("entry=levelling.Idle",), "entry=levelling.Idle is a class without a method run(self, job)"),
    "nothing that runs": (("entry=levelling.LIST",), "entry=levelling.LIST is a list, not a function f(job) or a class with run(self, job)"),
    "a key it does not know": (("+level.depth=1",), "level: its keys do not fit levelling.Level: got an unexpected keyword argument 'depth'"),
    "a key it misses": (("~level.rate",), "level: its keys do not fit levelling.Level: missing a required argument: 'rate'"),
    "a value it refuses": (("level.rate=2",), "level.rate must be at most 1, got 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", ENTRIES)
def test_an_entry_is_refused_and_the_directory_stays_free(case: str, folder: Path, refused: Callable[..., str]) -> None:
    words, message = ENTRIES[case]
    line = ("level", "--config-dir", "conf", "run_dir=run", *words)
    assert message in refused(*line)
    assert summary(folder / "run")["status"] == "refused"
    assert message in refused(*line)  # once more, into the same directory


RETURNED: dict[str, tuple[Any, str]] = {
    "nothing": (None, "entry=builtins.str returned a NoneType: return a mapping with metrics"),
    "a stray key": ({"metric": {}}, "returned 'metric', which no summary has (did you mean 'metrics'?)"),
    "a metric that is no number": ({"metrics": {"a": "much"}}, "returned 'much' for metrics['a']: it must be a number"),
}


@pytest.mark.parametrize("case", RETURNED)
def test_a_result_that_no_summary_can_hold_is_refused(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    returned, message = RETURNED[case]
    monkeypatch.setattr("rlhf.cli.own_verb.locate", lambda path: lambda job: returned)
    with pytest.raises(UserError) as refusal:
        own_verb(SimpleNamespace(entry="builtins.str", verb="level"))(None)
    assert message in str(refusal.value)


def test_numbers_that_are_none_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "rlhf.cli.own_verb.locate", lambda path: lambda job: {"metrics": {"a": 1, "b": float("nan")}, "report": {"rows": 2}}
    )
    result = own_verb(SimpleNamespace(entry="some.f", verb="level"))(None)
    assert result == {"metrics": {"a": 1.0}, "seconds": {}, "report": {"rows": 2}}


# --- runs --------------------------------------------------------------------------------------------------------------------------


def test_a_function_is_an_entry_too(folder: Path) -> None:
    assert main(["level", "--config-dir", "conf", "entry=levelling.says", "run_dir=run"]) == 0
    done = summary(folder / "run")
    assert (done["verb"], done["status"], done["metrics"]) == ("level", "done", {"level/answer": 42.0})
    assert done["seconds"]["total"] >= 0


def test_help_names_the_way_to_a_verb_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "--config-dir DIR" in capsys.readouterr().out and "level" not in VERBS


@pytest.mark.launch
def test_two_ranks_and_a_sweep(folder: Path) -> None:
    """One process each: a run on two ranks, and a sweep of a cell that runs, on one rank, beside one that is refused."""

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "rlhf", "level", "--config-dir", "conf", *TINY, *words]
        return subprocess.run(line, capture_output=True, text=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"})

    def losses(run_dir: str) -> list[float]:
        with (folder / run_dir / "metrics.csv").open(newline="") as f:
            return [float(row["level/loss"]) for row in csv.DictReader(f)]

    two = command("trainer.devices=2", "run_dir=two")
    assert two.returncode == 0, two.stderr
    swept = command("-m", "level.rate=0.5,2", "run_dir=sweep")
    assert swept.returncode == 0, swept.stderr
    assert losses("two") == pytest.approx(losses("sweep/0"), rel=1e-5) and len(losses("two")) == 2
    assert [summary(folder / "sweep" / cell)["status"] for cell in "01"] == ["done", "refused"]
    assert summary(folder / "sweep" / "1")["error"] == "UserError: level.rate must be at most 1, got 2"
    assert yaml.safe_load((folder / "sweep" / "sweep.yaml").read_text())["config_dir"] == "conf"
