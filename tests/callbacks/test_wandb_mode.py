"""When a run talks to W&B, when it is kept, and when it is refused: never a question."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.callbacks.wandb_mode import chosen_mode
from rlhf.config import UserError

KEY = {"WANDB_API_KEY": "k" * 40}


@pytest.fixture(autouse=True)
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a login."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("offline", "environment", "mode"),
    [
        (None, {}, ("offline", True)),
        (None, KEY, ("online", False)),
        (None, {"WANDB_IDENTITY_TOKEN_FILE": "token"}, ("online", False)),
        (None, {"WANDB_MODE": "offline", **KEY}, ("offline", False)),
        (None, {"WANDB_MODE": "dryrun"}, ("offline", False)),
        (None, {"WANDB_MODE": "disabled"}, ("disabled", False)),
        (None, {"WANDB_MODE": "online", **KEY}, ("online", False)),
        (True, KEY, ("offline", False)),
        (True, {"WANDB_MODE": "disabled"}, ("disabled", False)),
        (False, KEY, ("online", False)),
    ],
)
def test_which_mode(offline: bool | None, environment: dict[str, str], mode: tuple[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert chosen_mode(offline) == mode


@pytest.mark.parametrize(
    ("offline", "environment", "says"),
    [
        (False, {}, "logger.wandb.offline=false, but there is no W&B key: set WANDB_API_KEY or call `wandb login`"),
        (None, {"WANDB_MODE": "online"}, "WANDB_MODE=online, but there is no W&B key"),
        (False, {"WANDB_MODE": "offline", **KEY}, "logger.wandb.offline=false, but WANDB_MODE=offline"),
        (None, {"WANDB_MODE": "ofline"}, "WANDB_MODE=ofline must be one of online, "),
        ("no", {}, "logger.wandb.offline must be true, false or null, got 'no'"),
    ],
)
def test_what_is_refused(offline: bool | None, environment: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        chosen_mode(offline)
    assert says in str(error.value)


@pytest.mark.parametrize(("host", "server", "found"), [("api.wandb.ai", None, True), ("wandb.lab", "https://wandb.lab:8080", True),
                                                       ("api.wandb.ai", "https://wandb.lab", False), ("example.org", None, False)])  # fmt: skip
def test_a_login_counts_for_its_server(host: str, server: str | None, found: bool, nobody: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if server is not None:
        monkeypatch.setenv("WANDB_BASE_URL", server)
    (nobody / ".netrc").write_text(f"machine {host}\n  login user\n  password {'k' * 40}\n")
    assert chosen_mode(None) == (("online", False) if found else ("offline", True))
    (nobody / ".netrc").write_text("machine")
    assert chosen_mode(None) == ("offline", True), "a file that cannot be read holds no key"
