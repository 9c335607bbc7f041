"""The architecture of docs/architecture.md, kept by reading the imports: floors, rooms, who may import what, and how long things get.

Knows only syntax: nothing of rlhf is imported.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

FLOORS = {
    "types": 0, "config": 0, "logging": 0, "settings": 0,
    "algorithms": 1, "rules": 1,
    "data": 2, "models": 2, "inference": 2, "planning": 2, "reporting": 2, "sweeping": 2,
    "engines": 3, "serving": 3,
    "modules": 4,
    "callbacks": 5,
    "cli": 6,
    "__main__": 7,
}  # fmt: skip
"""Room -> floor. A room is a package or a file right under rlhf/; `rlhf` itself stands below them all and imports none."""

ALLOWED_IN = {
    "deepspeed": ("rlhf/engines/",),
    "hydra": ("rlhf/cli/",),
    "transformers": ("rlhf/models/", "rlhf/data/tokenizer.py", "rlhf/engines/"),
    "submitit": ("rlhf/sweeping/slurm.py",),
    "optuna": ("rlhf/sweeping/search.py",),
    "lightning": ("rlhf/data/datamodule.py", "rlhf/engines/", "rlhf/modules/", "rlhf/callbacks/", "rlhf/cli/"),
}
"""Library -> the only paths that import it."""

NO_TORCH = ("rlhf/settings/", "rlhf/config.py", "rlhf/rules.py", "rlhf/planning/", "rlhf/reporting/", "rlhf/sweeping/")


def room_of(path: str) -> str:
    return Path(path).parts[1].removesuffix(".py")


def imports(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of everything imported anywhere in the file, inside functions too; relative names resolved.

    `from a import b` gives a.b: where b is a module that is its name, and where it is not, the room and the library are the same.
    """
    package = Path(path).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join((*base, node.module) if node.module else base)
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def floor_findings(path: str, line: int, imported: str) -> Iterator[str]:
    parts = imported.split(".")
    if parts[0] != "rlhf" or len(parts) == 1:
        return
    here, there = room_of(path), parts[1]
    if there not in FLOORS:
        yield f"{path}:{line}: rlhf.{there} is no room of the house"
    elif here == "__init__":
        yield f"{path}:{line}: rlhf/__init__.py imports {there}, but it stands below every room"
    elif here != there and here in FLOORS and FLOORS[there] >= FLOORS[here]:
        yield f"{path}:{line}: {here} (floor {FLOORS[here]}) imports {there} (floor {FLOORS[there]})"


def library_findings(path: str, line: int, imported: str) -> Iterator[str]:
    library = imported.split(".")[0]
    if library in ALLOWED_IN and not path.startswith(ALLOWED_IN[library]):
        yield f"{path}:{line}: {library} is imported outside {', '.join(ALLOWED_IN[library])}"
    if library == "torch" and path.startswith(NO_TORCH):
        yield f"{path}:{line}: torch is imported by what must load at once"
    if room_of(path) == "algorithms" and library not in ("torch", "rlhf") and library not in sys.stdlib_module_names:
        yield f"{path}:{line}: algorithms import torch only, not {library}"


def size_findings(path: str, source: str, tree: ast.AST) -> Iterator[str]:
    lines = len(source.splitlines())
    if lines > MAX_FILE_LINES:
        yield f"{path}: {lines} lines, at most {MAX_FILE_LINES}"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{path}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}"


def findings(path: str, source: str) -> list[str]:
    """Everything wrong with one file; `path` is relative to the root of the repository."""
    tree = ast.parse(source)
    found = list(size_findings(path, source, tree))
    if room_of(path) not in (*FLOORS, "__init__"):
        found.append(f"{path}: {room_of(path)} is no room of the house")
    if any(Path(part).stem == "utils" for part in Path(path).parts):
        found.append(f"{path}: a room called utils knows everything and means nothing")
    for line, imported in imports(path, tree):
        found += [*floor_findings(path, line, imported), *library_findings(path, line, imported)]
    return found


FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "rlhf").rglob("*.py"))


def test_there_is_a_house() -> None:
    assert {"rlhf/types.py", "rlhf/config.py", "rlhf/algorithms/losses.py"} <= set(FILES)


@pytest.mark.parametrize("path", FILES)
def test_the_house_stands(path: str) -> None:
    assert findings(path, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source", "finding"),
    [
        # floors
        ("rlhf/algorithms/a.py", "from rlhf.data.blend import mix", "algorithms (floor 1) imports data (floor 2)"),
        ("rlhf/data/a.py", "from rlhf.models.causal import load", "data (floor 2) imports models (floor 2)"),
        ("rlhf/data/a.py", "from rlhf import models", "data (floor 2) imports models (floor 2)"),
        ("rlhf/modules/a.py", "import rlhf.callbacks.samples", "modules (floor 4) imports callbacks (floor 5)"),
        ("rlhf/callbacks/a.py", "def f():\n    import rlhf.cli.ppo", "callbacks (floor 5) imports cli (floor 6)"),
        ("rlhf/engines/a.py", "from ..modules.ppo import PPO", "engines (floor 3) imports modules (floor 4)"),
        ("rlhf/engines/a.py", "from .. import modules", "engines (floor 3) imports modules (floor 4)"),
        ("rlhf/config.py", "from rlhf.types import Rollout", "config (floor 0) imports types (floor 0)"),
        ("rlhf/types.py", "from .settings import DataConfig", "types (floor 0) imports settings (floor 0)"),
        ("rlhf/__init__.py", "from rlhf.types import Rollout", "stands below every room"),
        ("rlhf/cli/a.py", "from rlhf.shed import tool", "rlhf.shed is no room"),
        ("rlhf/shed/a.py", "", "shed is no room"),
        ("rlhf/shed.py", "", "shed is no room"),
        # libraries
        ("rlhf/modules/a.py", "import deepspeed.comm as dist", "deepspeed is imported outside"),
        ("rlhf/engines/a.py", "from hydra.utils import instantiate", "hydra is imported outside"),
        ("rlhf/data/blend.py", "from transformers import AutoTokenizer", "transformers is imported outside"),
        ("rlhf/inference/a.py", "import transformers", "transformers is imported outside"),
        ("rlhf/data/collate.py", "from lightning.pytorch import LightningDataModule", "lightning is imported outside"),
        ("rlhf/models/a.py", "import lightning", "lightning is imported outside"),
        ("rlhf/algorithms/a.py", "import numpy as np", "algorithms import torch only, not numpy"),
        ("rlhf/settings/a.py", "def f():\n    from torch import Tensor", "torch is imported by what must load at once"),
        ("rlhf/config.py", "import torch.nn", "torch is imported by what must load at once"),
        ("rlhf/planning/a.py", "import torch", "torch is imported by what must load at once"),
        ("rlhf/sweeping/a.py", "import torch", "torch is imported by what must load at once"),
        ("rlhf/sweeping/a.py", "import optuna", "optuna is imported outside"),
        ("rlhf/sweeping/a.py", "from rlhf.engines import launcher", "sweeping (floor 2) imports engines (floor 3)"),
        # names and sizes
        ("rlhf/models/utils.py", "", "called utils"),
        ("rlhf/models/utils/lora.py", "", "called utils"),
        ("rlhf/cli/a.py", "x = 1\n" * (MAX_FILE_LINES + 1), "401 lines"),
        ("rlhf/cli/a.py", "class C:\n    def f(self):\n" + "        x = 1\n" * MAX_FUNCTION_LINES, "f has 61 lines"),
    ],
)
def test_a_crack_is_found(path: str, source: str, finding: str) -> None:
    found = findings(path, source)
    assert len(found) == 1 and finding in found[0], found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("rlhf/algorithms/a.py", "import math\nimport torch\nfrom rlhf.algorithms.masked import whiten\nfrom .kl import FixedKL"),
        ("rlhf/data/tokenizer.py", "import transformers\nfrom rlhf.types import TextBatch"),
        ("rlhf/data/datamodule.py", "import lightning.pytorch"),
        ("rlhf/engines/zero.py", "import deepspeed, lightning\nfrom transformers.integrations import deepspeed\nimport rlhf.models.lora"),
        ("rlhf/models/a.py", "from rlhf.settings import ModelConfig\nfrom torch.utils import checkpoint"),
        ("rlhf/__main__.py", "from rlhf.cli.main import main"),
        ("rlhf/cli/ppo.py", "import hydra\nfrom rlhf.modules.ppo import PPO\nfrom rlhf.callbacks import rollout"),
        ("rlhf/cli/a.py", "x = 1\n" * MAX_FILE_LINES),
        ("rlhf/cli/a.py", "def f():\n" + "    x = 1\n" * (MAX_FUNCTION_LINES - 1)),
    ],
)
def test_what_is_sound_stays_unreported(path: str, source: str) -> None:
    assert findings(path, source) == []
