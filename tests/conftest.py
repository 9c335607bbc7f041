"""Shared by all tests: the CPU accelerator of DeepSpeed, few threads, no network; how many files run side by side, and in which order."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hypothesis
import pytest

os.environ |= {
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "offline",
}
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

hypothesis.settings.register_profile("suite", deadline=None)  # beside other workers a clock tells nothing of an example
hypothesis.settings.load_profile("suite")

MOST_WORKERS = 8
"""Only two were tried. Keeps a large machine from one for each core, each with the ranks that its tests start."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A worker for each core that may be used. One file, or one test, runs in this process: a worker would only cost its start.

    So does tests/gpu alone: its files measure the memory of one card, and would disturb each other.
    """
    asked = {Path(word.partition("::")[0]).resolve() for word in config.args}
    gpu = Path(__file__).parent / "gpu"
    if (len(asked) == 1 and min(asked).is_file()) or all(path.is_relative_to(gpu) for path in asked):
        return 0
    return min(MOST_WORKERS, len(os.sched_getaffinity(0)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start processes come first, so that none of them is left for the end, when the other workers have nothing to do."""
    slow = {item.path for item in items if item.get_closest_marker("launch")}
    items.sort(key=lambda item: item.path not in slow)
