"""Whether a run talks to W&B or keeps its record for later. Knows keys and WANDB_MODE; imports neither wandb nor a trainer.

A command never asks for a key, so that no job of a cluster waits for an answer that nobody gives.
"""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from typing import Literal
from urllib.parse import urlparse

from rlhf.config import UserError

Mode = Literal["online", "offline", "disabled"]
MODES: dict[str, Mode] = {
    "online": "online", "run": "online", "shared": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled",
}  # fmt: skip
"""Values of WANDB_MODE."""


def chosen_mode(offline: bool | None) -> tuple[Mode, bool]:
    """The mode, and whether it was chosen for want of a key.

    Args:
        offline: `logger.wandb.offline`. None: WANDB_MODE where it is set, otherwise online where there is a key and offline where not.

    Raises:
        UserError: online is asked for without a key, or WANDB_MODE says something else.
    """
    if offline is not None and not isinstance(offline, bool):
        raise UserError(f"logger.wandb.offline must be true, false or null, got {offline!r}")
    word = os.environ.get("WANDB_MODE")
    if word is not None and word not in MODES:
        raise UserError(f"WANDB_MODE={word} must be one of {', '.join(MODES)}")
    if offline is True:
        return ("disabled" if word == "disabled" else "offline"), False
    said = None if word is None else MODES[word]
    if offline is False and said not in (None, "online"):
        raise UserError(f"logger.wandb.offline=false, but WANDB_MODE={word}: unset one of the two")
    if said in ("offline", "disabled"):
        return said, False  # type: ignore[return-value]
    if has_key():
        return "online", False
    if offline is False or said == "online":
        key = "logger.wandb.offline=false" if offline is False else f"WANDB_MODE={word}"
        raise UserError(f"{key}, but there is no W&B key: set WANDB_API_KEY or call `wandb login`, or choose logger.wandb.offline=true")
    return "offline", True


def has_key() -> bool:
    """Whether W&B would find a key where it looks: in the environment, or in the netrc file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    files = [Path(os.environ["NETRC"])] if "NETRC" in os.environ else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for file in files:
        try:
            if file.is_file() and host in netrc.netrc(str(file)).hosts:
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
