"""The plan as tables in the terminal. Knows rich; knows no formula."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from rlhf.planning.memory import PARTS, Phase
from rlhf.planning.report import Report, batch_words

GB = 1e9


def print_plan(found: Report, *, enforce: bool) -> None:
    """Title, memory, time, then what it means, line by line."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 140)  # a pipe has no width, and a cut table says nothing
    console.print(_title(found))
    console.print(_memory(found))
    if found.time.seconds:
        console.print(_time(found))
    for line in _lines(found, enforce=enforce):
        console.print(line, soft_wrap=True)


def _title(found: Report) -> str:
    work, hardware = found.work, found.machine.hardware
    models = ", ".join(f"{role.name} {'the actor without adapters' if role.shared else role.model}" for role in work.roles.values())
    return f"rlhf {work.step} on {work.ranks} x {hardware.name}, {work.precision}: {models}"


def _memory(found: Report) -> Table:
    table = Table(title="Memory of one device, GB, by role and phase", title_justify="left")
    table.add_column("role")
    table.add_column("part")
    phases = found.memory.phases
    for phase in phases:
        table.add_column(phase.name, justify="right")
    for role in [*found.work.roles, "hf", "all"]:
        for part in PARTS:
            sizes = [phase.of(role=role, part=part) for phase in phases]
            if any(sizes):
                name = {"hf": "actor", "all": ""}.get(role, role)
                table.add_row(name, part, *(f"{size / GB:.2f}" if size else "" for size in sizes))
    table.add_section()
    table.add_row("", "total", *(_total(phase, found) for phase in phases))
    return table


def _total(phase: Phase, found: Report) -> str:
    text = f"{phase.total / GB:.2f}"
    return f"[bold red]{text}[/]" if phase.total > found.capacity else text


def _time(found: Report) -> Table:
    table = Table(title="Seconds of one iteration", title_justify="left")
    for name in found.time.seconds:
        table.add_column(name, justify="right")
    table.add_column("total", justify="right")
    table.add_row(*(f"{value:.2f}" for value in found.time.seconds.values()), f"{found.time.total:.2f}")
    return table


def _lines(found: Report, *, enforce: bool) -> list[str]:
    memory, hardware = found.memory, found.machine.hardware
    worst = f"{memory.peak / GB:.1f} of {found.capacity / GB:.1f} GB in {memory.worst.name!r}"
    host = f"host: {memory.host_peak / GB:.1f}" + (f" of {hardware.host_memory_gb:g}" if hardware.host_memory_gb else "") + " GB a node"
    lines = [f"[bold green]fits[/]: {worst}; {host}"]
    if not found.fits:
        parts = [f"a device by {found.short / GB:.1f} GB"] if found.short > 0 else []
        parts += [f"a node's host by {found.host_short / GB:.1f} GB"] if found.host_short > 0 else []
        lines = [f"[bold red]does not fit[/], short: {', '.join(parts)} ({worst}; {host})"]
        if hardware.name != "cpu":
            then = "refuses it (plan.enforce=false goes on)" if enforce else "would start it all the same"
            lines.append(f"rlhf {found.work.step} {then}")
        lines += [f"would fit: {' '.join(a.words)}  [{a.peak / GB:.1f} GB{_pace(a.seconds)}]".replace("[", "\\[") for a in found.remedies]
        if not found.remedies:
            lines.append("no knob tried makes it fit: more devices or a smaller model would")
    if found.caution is not None:
        lines.append(f"[bold yellow]careful[/]: {found.caution}")
    if found.largest is not None:
        lines.append(f"largest batch that fits: {found.largest.global_batch} ({' '.join(batch_words(found.largest))})")
    if found.proposal is not None:
        advice = found.proposal
        lines.append(f"fastest that fits: {' '.join(advice.words)}  \\[{advice.peak / GB:.1f} GB{_pace(advice.seconds)}]")
    return lines + _cost(found)


def _pace(seconds: float) -> str:
    return f", {seconds:.2f} s an iteration" if seconds else ""


def _cost(found: Report) -> list[str]:
    hardware = found.machine.hardware
    if not found.time.seconds:
        return [f"time: unknown, hardware={hardware.name} has no matrix rate (hardware.tflops_16bit=0)"]
    line = f"time: {found.time.total:.2f} s an iteration, {found.time.sequences_per_second:.2f} sequences/s"
    if found.hours is None:
        return [f"{line}; say plan.samples=N for hours and cost"]
    cost = f"{found.dollars:,.0f} dollars" if found.dollars is not None else "cost unknown (hardware.price_per_hour=0)"
    return [f"{line}; {found.samples:,} sequences in {found.hours:.1f} h, {cost}"]
