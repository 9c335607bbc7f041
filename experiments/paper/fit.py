"""Fits the original's efficiencies to half of tables 1 and 2: `python experiments/paper/fit.py`.
Prints values for conf/efficiency/dschat.yaml.

Half: every second row, beginning with the first, of table 1's and then table 2's rows as published.csv orders them. Coordinate search over
factors, on the mean absolute logarithm of modelled over published hours, from the values below. The other half has no say.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
from collections.abc import Sequence

from paper_cells import Cell, halves, order, question

from rlhf.planning.fit import Machine
from rlhf.planning.paper import SAMPLES, Layout, layouts
from rlhf.settings import EfficiencyConfig

START = {"memory": 0.3, "forward": 0.4, "network": 0.2}
"""What is fitted, and from where."""


def ratio(machine: Machine, ways: Sequence[Layout], efficiency: EfficiencyConfig, hours: float) -> float:
    """Modelled over published hours."""
    machine = dataclasses.replace(machine, efficiency=efficiency)
    return SAMPLES / 3600 / max(machine.time(work).sequences_per_second for _, work in ways) / hours


def main(argv: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    ways: dict[Cell, tuple[Machine, list[Layout], float]] = {}
    for cell, hours in order():
        work, machine, how = question(cell.hardware, cell.model, "dschat")
        found = layouts(work, machine, cell.gpus, **how)
        if found:
            ways[cell] = (machine, found, hours)
        else:
            print("nothing fits:", cell)
    used = [cell for cell in ways if halves()[cell] == "fitted"]
    efficiency = next(iter(ways.values()))[0].efficiency
    assert efficiency is not None

    def loss(one: EfficiencyConfig) -> float:
        return statistics.fmean(abs(math.log(ratio(*ways[cell][:2], one, ways[cell][2]))) for cell in used)

    best = dataclasses.replace(efficiency, **START)  # type: ignore[arg-type]
    least, step = loss(best), 0.5
    while step > 0.02:
        before = least
        for name in START:
            for factor in (1 + step, 1 / (1 + step)):
                value = getattr(best, name) * factor
                tried = dataclasses.replace(best, **{name: min(value, 1.0)})  # type: ignore[arg-type]
                if (worth := loss(tried)) < least:
                    least, best = worth, tried
        if before - least < 1e-4:
            step /= 2
    for cell, (machine, found, hours) in ways.items():
        print(f"{'fitted' if cell in used else 'held  '} {cell} {ratio(machine, found, best, hours) - 1:+.0%}")
    for name, of in (("fitted", used), ("held out", [cell for cell in ways if cell not in used])):
        print(name, f"median error {statistics.median(abs(ratio(*ways[c][:2], best, ways[c][2]) - 1) for c in of):.1%}")
    print("mean log error of the fitted half", round(least, 4), {name: round(getattr(best, name), 4) for name in START})


if __name__ == "__main__":
    main()
