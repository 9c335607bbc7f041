"""`rlhf bench calibrate` inside one rank: measures the machine and writes it as a file of the hardware group.

Knows the keys of that group; the measurements are rlhf.engines.bench_calibrate's.
"""

from __future__ import annotations

import os
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from rich.table import Table

from rlhf.cli import rundir
from rlhf.cli.assemble import Job
from rlhf.cli.bench.page import console
from rlhf.cli.bench.results import card, finish, is_rank_zero, versions, write_report
from rlhf.config import UserError
from rlhf.engines.bench_calibrate import MEGA, Calibration, Measurement, Sizes, memory_bytes
from rlhf.engines.launcher import accelerator
from rlhf.settings import CalibrateBenchConfig

FILE = "hardware.yaml"
GIGA, TERA, MICRO = 1e9, 1e12, 1e-6
UNITS = {
    "copy": ("copy in device memory", GIGA, "GB/s"), "matmul": ("16-bit matrix product", TERA, "TFLOP/s"),
    "launch": ("launch of an operation", MICRO, "microseconds"), "host_to_device": ("host to device", GIGA, "GB/s"),
    "device_to_host": ("device to host", GIGA, "GB/s"), "all_reduce": ("all-reduce, a link", GIGA, "GB/s"),
    "all_gather": ("all-gather, a link", GIGA, "GB/s"), "small_all_reduce": ("all-reduce of one number", MICRO, "microseconds"),
}  # fmt: skip


def calibrate(job: Job) -> dict[str, Any]:
    """Measures, prints, writes hardware.yaml and bench.json.

    Raises:
        UserError: an option that this measurement does not read.
    """
    cfg, kind = job.cfg, accelerator(job.cfg.trainer)
    if cfg.resume:
        raise UserError("resume=true: rlhf bench measures from the start each time; give it a run_dir of its own")
    if cfg.trainer.num_nodes > 1:
        raise UserError(f"trainer.num_nodes={cfg.trainer.num_nodes}: rlhf bench calibrate measures one node; set it to 1")
    if kind == "cpu" and cfg.hardware.name != "cpu":
        raise UserError(f"hardware={cfg.hardware.name}, but this measures a CPU: choose trainer=gpu, or hardware=cpu")
    if cfg.trainer.threads is not None:
        torch.set_num_threads(cfg.trainer.threads)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    found = _measure(device, sizes(cfg.bench, kind), job)
    memory, host = memory_bytes(device)
    figures = {name: one.value for name, one in found.items()}
    if is_rank_zero():
        text = hardware_file(cfg.hardware, figures, memory=memory, host=host, on_gpu=kind == "cuda", devices=_devices(cfg, kind))
        rundir.write_atomically(job.run_dir / FILE, text)
        content = {name: vars(one) for name, one in found.items()}
        write_report(job, "calibrate", {"ranks": job.world, "memory_bytes": memory, "host_memory_bytes": host, "measurements": content})
        _show(figures, memory, host, job.run_dir / FILE)
    metrics = {f"bench/{name}": value for name, value in figures.items()}
    return finish(job, metrics | {"bench/memory_bytes": float(memory), "bench/host_memory_bytes": float(host)})


def sizes(bench: CalibrateBenchConfig, kind: str) -> Sizes:
    """Those of the device that is measured, in bytes."""
    chosen = bench.gpu if kind == "cuda" else bench.cpu
    return Sizes(
        warmup=bench.warmup, repeats=bench.repeats, launches=bench.launches, copy=chosen.copy_mb * MEGA, width=chosen.matmul_width,
        transfer=bench.transfer_mb * MEGA, collective=chosen.collective_mb * MEGA,
    )  # fmt: skip


def _measure(device: torch.device, chosen: Sizes, job: Job) -> dict[str, Measurement]:
    if job.world == 1:
        return Calibration(device, chosen, 1).run()
    alone = not dist.is_initialized()
    if alone:
        timeout = timedelta(minutes=job.cfg.launcher.timeout_minutes)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    try:
        return Calibration(device, chosen, job.world).run()
    finally:
        if alone:
            dist.destroy_process_group()


def _devices(cfg: Any, kind: str) -> int:
    return torch.cuda.device_count() if kind == "cuda" else cfg.trainer.devices


# --- the file ----------------------------------------------------------------------------------------------------------------


def hardware_file(base: Any, figures: dict[str, float], *, memory: int, host: int, on_gpu: bool, devices: int) -> str:
    """A file for conf/hardware: what was measured, and the rest as `hardware` has it, each line saying which.

    Args:
        base: the HardwareConfig of `hardware=`.
        figures: of `Calibration.run`, in bytes/s, operations/s, seconds.
    """
    kept = f"not measured: as in hardware={base.name}"
    link = figures.get("all_gather")
    lines = [
        ("memory_gb", memory / GIGA, "as PyTorch reports it" if on_gpu else "the host's"),
        ("bandwidth_gbs", figures["copy"] / GIGA, "measured: a copy, read and written bytes"),
        ("tflops_16bit", figures["matmul"] / TERA, "measured: one large product"),
        ("devices_per_node", devices, "devices that are visible" if on_gpu else "ranks (trainer.devices)"),
        (
            "link_gbs",
            base.link_gbs if link is None else link / GIGA,
            kept if link is None else "measured: all-gather, bytes that reach a rank",
        ),
        ("network_gbs", base.network_gbs, kept),
        ("host_memory_gb", host / GIGA, "as the system reports it"),
        (
            "host_link_gbs",
            figures.get("host_to_device", 0.0) / GIGA,
            "measured: from pinned memory" if on_gpu else "no device beside the host",
        ),
        ("price_per_hour", base.price_per_hour, kept if base.price_per_hour else "0: unknown"),
    ]
    others = {name: figures[name] for name in ("device_to_host", "all_reduce", "small_all_reduce", "launch") if name in figures}
    beside = "; ".join(f"{UNITS[name][0]} {value / UNITS[name][1]:.4g} {UNITS[name][2]}" for name, value in others.items())
    made_with = ", ".join(f"{package} {number}" for package, number in versions().items())
    head = [
        f"# {card()}, measured by `rlhf bench calibrate` (commit {rundir.commit()}; {made_with}).",
        f"# No key of its own: {beside}.",
        "# Rates are those of large operations, not a data sheet's: shares in conf/efficiency that were taken of a data sheet count the loss",
        "# twice here. docs/planning.md says which to raise.",
        "_target_: rlhf.settings.HardwareConfig",
        f"name: {slug(card()) if on_gpu else 'cpu'}",
    ]
    return "\n".join([*head, *(f"{key}: {_plain(value)} # {note}" for key, value, note in lines)]) + "\n"


def _plain(value: float) -> str:
    """Four digits, as YAML reads a number."""
    return yaml.safe_dump(value if isinstance(value, int) else float(f"{value:.4g}")).split("\n")[0]


def slug(name: str) -> str:
    """`NVIDIA H100 80GB HBM3` -> `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def _show(figures: dict[str, float], memory: int, host: int, file: Path) -> None:
    table = Table(title=card())
    for name in ("measured", "value", "unit"):
        table.add_column(name, justify="right" if name == "value" else "left")
    for name, value in figures.items():
        what, unit, word = UNITS[name]
        table.add_row(what, f"{value / unit:,.4g}", word)
    table.add_row("device memory", f"{memory / GIGA:,.1f}", "GB")
    table.add_row("host memory", f"{host / GIGA:,.1f}", "GB")
    out = console()
    out.print(table)
    out.print(f"wrote {file}; copied to DIR/hardware/NAME.yaml it is used by hardware=NAME --config-dir DIR", markup=False, soft_wrap=True)
