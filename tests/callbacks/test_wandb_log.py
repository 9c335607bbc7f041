"""A W&B run on its own: a server that is away, records without a word, models that were moved, arguments out of range."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf.callbacks.run_log import Ending
from rlhf.callbacks.wandb_log import Place, WandbLog
from rlhf.config import UserError

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))
from wandb_records import Offline, offline

NODE: dict[str, Any] = {
    "project": "rlhf", "entity": None, "name": None, "group": None, "tags": [], "offline": True, "artifacts": "reference", "bins": 8, "upload_minutes": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A home without a login; what wandb keeps outside a run directory goes there."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    yield
    flush()


def flush() -> None:
    """Ends wandb's service, which writes what it still holds and forgets the environment it was started in."""
    wandb = sys.modules.get("wandb")
    if wandb is not None:
        wandb.teardown()


def written(folder: Path) -> list[Offline]:
    flush()
    return offline(folder)


def logger(folder: Path, *, resumes: bool = False, **changes: Any) -> WandbLog:
    place = Place(verb="sft", group=None, name="sft here", tags=("imdb",))
    return WandbLog(folder=folder, place=place, resumes=resumes, **{**NODE, **changes})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"artifacts": "copy"}, "logger.wandb.artifacts must be one of reference, upload, none, got 'copy'"),
        ({"tags": "one"}, "logger.wandb.tags must be a list of words, got 'one'"),
        ({"bins": 0}, r"logger.wandb.bins must lie in \[1, 512\], got 0"),
        ({"upload_minutes": 0}, "logger.wandb.upload_minutes must be above 0, got 0"),
        ({"offline": False}, "logger.wandb.offline=false, but there is no W&B key"),
    ],
)
def test_arguments_out_of_range(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        logger(tmp_path, **changes)


def test_a_run_has_the_name_and_tags_that_are_asked_for(tmp_path: Path) -> None:
    log = logger(tmp_path, name="mine", group="ours", tags=["imdb", "long"], bins=4)
    log.log_metrics({"a": 1.0}, 3)
    log.log_histograms({"h": [0.0, 1.0, float("nan"), float("inf")], "none": [float("nan")]}, 3)
    log.finish(Ending(status="refused", error="UserError: no"))
    log.finish(Ending())  # the first word counts
    (record,) = written(tmp_path)
    assert (record.run.display_name, record.run.run_group, list(record.run.tags)) == ("mine", "ours", ["imdb", "long"])
    (row,) = record.history
    assert (row["a"], row["iteration"], row["_step"], row["h.values"]) == (1.0, 3, 3, [1, 0, 0, 1])
    assert not any(name.startswith("none") for name in row)
    assert (record.summary["status"], record.summary["error"], record.exit_code) == ("refused", "UserError: no", 2)


def test_a_new_run_in_the_same_directory_has_an_id_of_its_own_and_a_resumed_one_has_not(tmp_path: Path) -> None:
    empty = tmp_path / "wandb" / "offline-run-20200101_000000-none" / "run-none.wandb"
    empty.parent.mkdir(parents=True)
    empty.write_bytes(b":W&B\xde\xad\x00")  # of a run that was killed before its first words were written
    for number, resumes in enumerate((False, True, False)):
        if number:
            time.sleep(1.1)  # a record is named by its second
        log = logger(tmp_path, resumes=resumes)
        log.log_metrics({"a": 1.0}, 1)
        log.finish(Ending())
    first, second, third = (record.run.run_id for record in written(tmp_path))
    assert first == second != third
    assert json.loads((tmp_path / "wandb" / "run.json").read_text())["id"] == third


def test_a_server_that_is_away_is_no_reason_to_wait_or_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    monkeypatch.setattr(logging.getLogger("rlhf"), "propagate", True)
    with pytest.raises(UserError, match=r"logger\.wandb: W&B does not take this run \(.+\): try later, or logger\.wandb\.offline=true"):
        logger(tmp_path / "strict", offline=False).log_metrics({"a": 1.0}, 1)
    log = logger(tmp_path / "mild", offline=None)
    assert log.mode == "online"
    with caplog.at_level(logging.INFO, logger="rlhf"):
        log.log_metrics({"a": 1.0}, 1)
    log.finish(Ending())
    said = [record.getMessage() for record in caplog.records if record.name == "rlhf"]
    assert said[0].startswith("logger.wandb: W&B does not take this run (")
    assert said[1].startswith("W&B: this run is kept offline; send it later with: wandb sync ")
    assert [row["a"] for row in written(tmp_path / "mild")[-1].history] == [1.0]


def test_a_disabled_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    log = logger(tmp_path)
    log.log_hyperparams({"ppo": {"kl_coef": 0.1}})
    log.log_metrics({"a": 1.0}, 1)
    log.use_models({"actor": tmp_path})
    log.log_models(tmp_path, {})
    log.finish(Ending())
    assert written(tmp_path) == []


@pytest.mark.parametrize("how", ["reference", "upload", "none"])
def test_a_model_that_starts_two_roles_is_used_once(how: str, tmp_path: Path) -> None:
    export = tmp_path / "made" / "export" / "actor"
    export.mkdir(parents=True)
    (export / "model.safetensors").write_bytes(b"weights")
    maker = logger(tmp_path / "made", artifacts=how)
    maker.log_models(export.parent, {"seed": 1})
    maker.log_metrics({"a": 1.0}, 1)
    maker.finish(Ending())
    user = logger(tmp_path / "user")
    user.use_models({"actor": export, "ref": export})
    user.log_metrics({"a": 1.0}, 1)
    user.finish(Ending())
    (made,), (used,) = written(tmp_path / "made"), written(tmp_path / "user")
    assert used.models(used=True) == made.models(used=False)
    assert sorted(made.models(used=False)) == ([] if how == "none" else ["sft-actor"])
    run = made.run.run_id
    assert used.config.get("lineage") == (
        None if how == "none" else {role: {"artifact": "sft-actor", "run": run} for role in ("actor", "ref")}
    )
    if how != "none":
        (weights,) = [entry for entry in made.artifacts[0].manifest.contents if entry.path == "actor/model.safetensors"]
        assert bool(weights.ref) == (how == "reference") and bool(weights.local_path) == (how == "upload")
        assert json.loads(made.artifacts[0].metadata) == {"seed": 1}


def test_a_model_that_was_moved_is_still_named(tmp_path: Path) -> None:
    export = tmp_path / "made" / "export" / "actor"
    export.mkdir(parents=True)
    maker = logger(tmp_path / "made")
    maker.log_models(export.parent, {})
    maker.finish(Ending())
    (tmp_path / "made").rename(tmp_path / "elsewhere")
    user = logger(tmp_path / "user")
    user.use_models({"actor": tmp_path / "elsewhere" / "export" / "actor"})
    user.log_metrics({"a": 1.0}, 1)
    user.finish(Ending())
    (record,) = written(tmp_path / "user")
    assert record.models(used=True) == {}
    assert record.config["lineage"]["actor"]["artifact"] == "sft-actor"
