"""Makes modelled.csv of the paper's tables, then draws them: `python experiments/paper/make.py table1 [table2 ...]`, or `all`.

published.csv is written by hand, with the source of every number, results.csv by measure.py. Table, plot and the page's table are
`rlhf report`'s.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from paper_cells import ENGINES, HERE
from paper_tables import QUANTITIES, SCALED, as_csv, modelled, scale, wanted

from rlhf.cli.report.verb import write_experiment
from rlhf.reporting.tables import RESULTS, read_experiment


def main(names: Sequence[str]) -> None:
    if {"-h", "--help"} & set(names):
        print(__doc__)
        return
    unknown = [name for name in names if name not in (*QUANTITIES, "all")]
    if unknown or not names:
        raise SystemExit(f"{', '.join(unknown) or 'nothing'} to make; tables: {', '.join(QUANTITIES)}, or all")
    for name in list(QUANTITIES) if "all" in names else names:
        folder = HERE / name
        (folder / "modelled.csv").write_text(as_csv([modelled(row) for row in wanted(name)]))
        if name == "figure7":
            (folder / "scale.csv").write_text(as_csv([line for model in SCALED for engine in ENGINES for line in scale(model, engine)]))
        results = folder / "results.csv"
        if not results.exists():
            results.write_text(",".join(RESULTS) + "\n")
        write_experiment(read_experiment(folder))
        print(folder / "README.md")


if __name__ == "__main__":
    main(sys.argv[1:])
