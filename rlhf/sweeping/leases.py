"""Which GPUs there are, and which cell has them. Knows CUDA_VISIBLE_DEVICES and nvidia-smi; knows no cell."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

from rlhf.config import UserError

VISIBLE = "CUDA_VISIBLE_DEVICES"
ORDER = "CUDA_DEVICE_ORDER"


def machine_gpus() -> dict[str, str]:
    """Name by number of the GPUs a program started here would see; empty without any."""
    query = ["nvidia-smi", "--query-gpu=index,name", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return {}
    found = {index.strip(): name.strip() for index, _, name in (line.partition(",") for line in lines)}
    if VISIBLE not in os.environ:
        return found
    visible = [word.strip() for word in os.environ[VISIBLE].split(",")]
    return {word: found.get(word, "GPU") for word in visible if word not in ("", "-1")}


def chosen_gpus(asked: str | Sequence[int], there: Sequence[str]) -> list[str]:
    """The GPUs of a sweep.

    Args:
        asked: `sweep.gpus`: auto, or numbers as nvidia-smi and CUDA_VISIBLE_DEVICES have them.

    Raises:
        UserError: one is not there.
    """
    if isinstance(asked, str):
        return list(there)
    missing = [number for number in asked if str(number) not in there]
    if missing:
        raise UserError(f"sweep.gpus={list(asked)}, but GPU {missing[0]} is not there: {', '.join(there) or 'none'} can be seen")
    return [str(number) for number in asked]


def lent(gpus: Sequence[str]) -> dict[str, str]:
    """The environment in which a process sees these GPUs and no others."""
    numbers = {VISIBLE: ",".join(gpus)}
    # nvidia-smi counts along the bus; CUDA by itself begins with the fastest card. Numbers that the user gave are counted as the user's.
    return numbers if VISIBLE in os.environ else numbers | {ORDER: "PCI_BUS_ID"}


class Leases:
    """GPUs on loan. A cell gets different ones, those with the fewest tenants first.

    Args:
        per_gpu: cells that may share one.
    """

    def __init__(self, gpus: Sequence[str], per_gpu: int = 1) -> None:
        self.tenants = dict.fromkeys(gpus, 0)
        self.per_gpu = per_gpu

    def take(self, count: int) -> list[str] | None:
        """That many GPUs, in the machine's order; None where too few are free."""
        free = [gpu for gpu, tenants in self.tenants.items() if tenants < self.per_gpu]
        if len(free) < count:
            return None
        emptiest = sorted(free, key=self.tenants.__getitem__)[:count]
        for gpu in emptiest:
            self.tenants[gpu] += 1
        return [gpu for gpu in self.tenants if gpu in emptiest]

    def give_back(self, gpus: Sequence[str]) -> None:
        for gpu in gpus:
            self.tenants[gpu] -= 1
