"""`rlhf bench calibrate`: the file it writes composes and says where each number is from; what it refuses; whole commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from bench_parts import CPU, run
from jobs import composed

from rlhf.cli.bench.calibrate import calibrate, hardware_file, sizes, slug
from rlhf.cli.main import main
from rlhf.config import UserError, build
from rlhf.engines.bench_calibrate import Calibration, Sizes
from rlhf.engines.floor import timed
from rlhf.rules import check
from rlhf.settings import HardwareConfig

SMALL = ("bench.cpu.copy_mb=1", "bench.cpu.matmul_width=32", "bench.cpu.collective_mb=1", "bench.repeats=3", "bench.launches=20")
FIGURES = {"copy": 2.95e12, "matmul": 7.1e14, "launch": 4.5e-6, "host_to_device": 5.5e10, "device_to_host": 5.2e10}


def base(*words: str) -> Any:
    return build(composed("bench_calibrate", "run_dir=unused", *words))


def written(figures: dict[str, float], *words: str, on_gpu: bool = True) -> tuple[str, HardwareConfig]:
    text = hardware_file(base(*words).hardware, figures, memory=84_900_000_000, host=128_000_000_000, on_gpu=on_gpu, devices=4)
    return text, build(yaml.safe_load(text), "hardware")


def test_measured_keys_replace_those_of_the_data_sheet() -> None:
    text, hardware = written(FIGURES, "hardware=h100-80g")
    assert (hardware.bandwidth_gbs, hardware.tflops_16bit, hardware.host_link_gbs) == (2950, 710, 55)
    assert (hardware.memory_gb, hardware.host_memory_gb, hardware.devices_per_node) == (84.9, 128, 4)
    assert (hardware.link_gbs, hardware.network_gbs) == (450, 400)
    assert "link_gbs: 450.0 # not measured: as in hardware=h100-80g" in text
    assert "launch of an operation 4.5 microseconds" in text
    together, hardware = written(FIGURES | {"all_gather": 3.6e11, "all_reduce": 3.7e11}, "hardware=h100-80g")
    assert hardware.link_gbs == 360
    assert "# measured: all-gather" in together and "all-reduce, a link 370 GB/s" in together


def test_a_cpu_is_called_cpu_as_the_planner_expects() -> None:
    _, hardware = written({"copy": 2e10, "matmul": 1e11, "launch": 2e-6}, on_gpu=False)
    assert (hardware.name, hardware.host_link_gbs, hardware.tflops_16bit) == ("cpu", 0, 0.1)
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_sizes_are_those_of_the_device() -> None:
    bench = base().bench
    gpu, cpu = sizes(bench, "cuda"), sizes(bench, "cpu")
    assert (gpu.copy, gpu.width, gpu.collective) == (10**9, 8192, 25 * 10**7)
    assert cpu.copy < gpu.copy and cpu.width < gpu.width
    assert gpu.transfer == bench.transfer_mb * 10**6


def test_calls_that_warm_up_are_not_counted() -> None:
    calls: list[int] = []
    assert len(timed(lambda: calls.append(1), CPU, repeats=3, warmup=2)) == 3
    assert len(calls) == 5


def test_a_rate_is_that_of_the_median_call(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = Sizes(warmup=0, repeats=3, copy=1000, width=10, transfer=1, collective=2, launches=4)
    monkeypatch.setattr("rlhf.engines.bench_calibrate.timed", lambda work, device, **options: [4.0, 1.0, 2.0])
    found = Calibration(torch.device("cpu"), chosen, 1).run()
    assert {name: one.value for name, one in found.items()} == {"copy": 2 * 1000 / 2.0, "matmul": 2 * 10**3 / 2.0, "launch": 2.0 / 4}
    assert found["copy"].seconds == [4.0, 1.0, 2.0]


REFUSALS = {
    "no call": (("bench.repeats=0",), ("bench.repeats must be at least 1",)),
    "size": (("bench.cpu.copy_mb=0",), ("bench.cpu.copy_mb must be at least 1",)),
    "card": (("hardware=h100-80g",), ("hardware=h100-80g", "choose trainer=gpu, or hardware=cpu")),
    "model": (("model@actor.model=tiny",), ("model@actor.model: no such group in rlhf bench calibrate",)),
}


@pytest.mark.parametrize(("words", "parts"), REFUSALS.values(), ids=REFUSALS)
def test_what_is_not_read_is_refused(words: tuple[str, ...], parts: tuple[str, ...], refused: Callable[..., str], tmp_path: Path) -> None:
    message = refused("bench", "calibrate", *SMALL, *words, f"run_dir={tmp_path / 'run'}")
    assert not [part for part in parts if part not in message], message


@pytest.mark.parametrize(("word", "part"), [("trainer.num_nodes=2", "trainer.num_nodes=2: "), ("resume=true", "resume=true: ")])
def test_one_node_is_measured_from_the_start(word: str, part: str) -> None:
    job: Any = SimpleNamespace(cfg=base(word), world=1)
    with pytest.raises(UserError, match=part):
        calibrate(job)


@pytest.mark.launch
def test_two_ranks_write_a_file_that_the_planner_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    done = run("-m", "rlhf", "bench", "calibrate", *SMALL, "trainer.devices=2", "trainer.threads=1", f"run_dir={run_dir}")
    assert done.returncode == 0, done.stderr
    report = json.loads((run_dir / "bench.json").read_text())
    assert set(report["measurements"]) == {"copy", "matmul", "launch", "all_reduce", "all_gather", "small_all_reduce"}
    assert all(len(one["seconds"]) == 3 and one["value"] > 0 for one in report["measurements"].values())
    hardware = yaml.safe_load((run_dir / "hardware.yaml").read_text())
    assert hardware["link_gbs"] == pytest.approx(report["measurements"]["all_gather"]["value"] / 1e9, rel=1e-3)
    assert json.loads((run_dir / "summary.json").read_text())["metrics"]["bench/copy"] == report["measurements"]["copy"]["value"]
    assert "16-bit matrix product" in done.stdout
    group = tmp_path / "more" / "hardware"
    group.mkdir(parents=True)
    (group / "mine.yaml").write_text((run_dir / "hardware.yaml").read_text())
    words = ("plan", "ppo", "plan.json=true", "hardware=mine", "hardware.memory_gb=500", "--config-dir", str(tmp_path / "more"))
    assert main(list(words)) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["hardware"] == "cpu" and plan["seconds"]["decode"] > 0
    check(build(composed("bench_calibrate", "run_dir=unused")))
