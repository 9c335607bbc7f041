"""GPUs on loan: nobody gets one that is full, everything comes back, and what the machine shows is what may be lent."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config import UserError
from rlhf.sweeping.leases import Leases, chosen_gpus, lent, machine_gpus


@given(
    gpus=st.integers(1, 8), per_gpu=st.integers(1, 3), wishes=st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=40),
)  # fmt: skip
def test_no_gpu_has_too_many_tenants(gpus: int, per_gpu: int, wishes: list[tuple[int, bool]]) -> None:
    leases, held = Leases([str(i) for i in range(gpus)], per_gpu), []
    for count, ends in wishes:
        if ends and held:
            leases.give_back(held.pop(0))
        free = sum(tenants < per_gpu for tenants in leases.tenants.values())
        got = leases.take(count)
        assert (got is None) == (free < count), "refused although there was room, or the other way round"
        if got is not None:
            assert len(set(got)) == count
            held.append(got)
        assert leases.tenants == {gpu: sum(gpu in some for some in held) for gpu in leases.tenants}
        assert max(leases.tenants.values()) <= per_gpu
    for some in held:
        leases.give_back(some)
    assert set(leases.tenants.values()) == {0}


def test_the_emptiest_card_comes_first() -> None:
    leases = Leases(["4", "5"], per_gpu=2)
    assert [leases.take(1), leases.take(1), leases.take(2), leases.take(1)] == [["4"], ["5"], ["4", "5"], None]


@pytest.fixture
def four_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that pretends."""
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\nfor i in 0 1 2 3; do echo "$i, Pretended $i"; done\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_the_machine_s_cards(four_cards: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine_gpus() == {str(i): f"Pretended {i}" for i in range(4)}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    assert machine_gpus() == {"2": "Pretended 2", "0": "Pretended 0"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine_gpus() == {}


def test_a_number_is_the_card_that_was_listed_under_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with different cards CUDA counts otherwise than nvidia-smi."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert lent(["1", "3"]) == {"CUDA_VISIBLE_DEVICES": "1,3", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert lent(["3"]) == {"CUDA_VISIBLE_DEVICES": "3"}


def test_a_machine_without_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError):
        subprocess.run(["nvidia-smi"], check=False)
    assert machine_gpus() == {}


def test_only_cards_that_are_there_can_be_chosen() -> None:
    assert chosen_gpus("auto", ["0", "1"]) == ["0", "1"]
    assert chosen_gpus([1], ["0", "1"]) == ["1"]
    with pytest.raises(UserError, match=r"sweep\.gpus=\[1, 3\], but GPU 3 is not there: 0, 1 can be seen"):
        chosen_gpus([1, 3], ["0", "1"])
