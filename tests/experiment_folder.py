"""A folder of experiments/ in small, for tests of the report. Plain text, for any test to write."""

from __future__ import annotations

from pathlib import Path

PUBLISHED = """\
hardware,gpus,model,quantity,value,unit,source,note
card-a,1,small,hours,10,hours,a page,"printed as days, about"
card-a,8,small,hours,2,hours,a page,
card-a,8,large,hours,20,hours,a page,
,,,samples,100,samples,another page,
"""
MODELLED = """\
hardware,gpus,model,quantity,unit,dschat,ours,half
card-a,1,small,hours,hours,12,6,fitted
card-a,8,small,hours,hours,1.8,1,held out
card-a,8,large,hours,hours,,9,
card-b,1,small,hours,hours,3,2,
"""
RESULTS = """\
cell,value,unit,card,command,commit
card-a/1/small/hours,7,hours,Some Card,rlhf bench step,abc
card-a/1/small/hours,5,hours,Some Card,rlhf bench step,abc
"""


def folder(path: Path, *, published: str = PUBLISHED, modelled: str = MODELLED, results: str = RESULTS, scale: str | None = None) -> Path:
    path.mkdir(parents=True)
    for name, text in (("published", published), ("modelled", modelled), ("results", results), ("scale", scale)):
        if text is not None:
            (path / f"{name}.csv").write_text(text)
    return path
