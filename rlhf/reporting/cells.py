"""Runs as cells: runs that differ in their seed alone are one cell, named after what sets it apart from the others.

Knows resolved configurations; knows no statistics and no files.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.reporting.runs import Run

BOOKKEEPING = ("seed", "run_dir", "resume", "logger", "callbacks", "launcher", "hardware", "plan", "sweep", "report", "experiment")
"""Top-level keys that do not set cells apart. One that a sweep sets does, but for the first two."""
BOOKKEEPING_TRAINER = ("log_every", "checkpoint_every", "keep_checkpoints", "eval_every", "eval_batches", "threads")
OWN = BOOKKEEPING[:2]
ABSENT = "absent"

Settings = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Cell:
    name: str
    runs: tuple[Run, ...]
    settings: Settings
    """The keys that differ between cells, as far as they are known."""
    config: Settings
    """The whole resolved configuration of one of its runs, flat; empty where none has begun."""

    def counts(self) -> str:
        """`5`, or `3 of 5` where not all are done."""
        done = sum(run.done for run in self.runs)
        return str(done) if done == len(self.runs) else f"{done} of {len(self.runs)}"


@dataclass(frozen=True, kw_only=True)
class Grouping:
    cells: tuple[Cell, ...]
    named_by: tuple[str, ...]
    """Keys that the names are made of."""
    with_them: tuple[str, ...]
    """Keys that differ, too, but are in no name."""
    with_seed: tuple[str, ...]
    """Keys that differ because the seed does."""


def group(runs: Sequence[Run]) -> Grouping:
    """The runs as cells, in the order of their first runs."""
    flats = [settings_of(run) for run in runs]
    swept = list(dict.fromkeys(key for run in runs for key in run.overrides if key not in OWN))
    verbs = {run.verb for run in runs if run.done} or {run.verb for run in runs}
    known = [(run, configuration(run)) for run in runs if run.config and run.verb in verbs]  # a pipeline may fail as one of its steps
    varying = _varying([flat for _, flat in known], swept)
    with_seed = tuple(key for key in varying if not _set_by(swept, key) and _follows_seed(known, key))
    apart = [key for key in varying if key not in with_seed]
    groups = _groups(runs, flats, apart)
    everywhere = [key for key in apart if all(key in flat for _, flat in known)]
    others = dict.fromkeys([*(["verb"] if "verb" in apart else []), *everywhere, *apart])
    ordered = [key for key in swept if _tells(key, groups, flats)] + [key for key in others if key not in swept]
    named_by = _enough(ordered, groups, flats)
    named = any(run.cell is not None for run in runs)
    names = _names(groups, runs, flats, named_by)
    cells = tuple(
        Cell(
            name=name, runs=tuple(runs[i] for i in members), config=flats[_speaker(members, runs)],
            settings={key: flats[_speaker(members, runs)].get(key, ABSENT) for key in dict.fromkeys([*named_by, *apart])},
        )
        for name, members in zip(names, groups, strict=True)
    )  # fmt: skip
    rest = tuple(key for key in apart if named or key not in named_by)
    return Grouping(cells=cells, named_by=() if named else tuple(named_by), with_them=rest, with_seed=with_seed)


def settings_of(run: Run) -> Settings:
    """The resolved configuration flat, `a.b: value`, with the run's overrides; options of groups, such as `ppo=dschat`, stand beside it."""
    flat = configuration(run)
    return flat | {key: _hashable(value) for key, value in run.overrides.items() if key not in flat}


def configuration(run: Run) -> Settings:
    """The resolved configuration alone: what decides which runs are the same cell."""
    return dict(_flat(run.config, "", run.seed))


def _flat(node: Mapping[str, Any], before: str, seed: int | None) -> Iterable[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{before}{name}.", seed)
        elif name != "_target_":
            yield f"{before}{name}", _without_seed(_hashable(value), seed)


def _hashable(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def _without_seed(value: Any, seed: int | None) -> Any:
    """A path that names the seed, as in `base/seed-3/sft`, is the same path for every seed."""
    if not isinstance(value, str) or seed is None or "/" not in value:
        return value
    return re.sub(rf"(seed[-_=]?){seed}(?!\d)", r"\1*", value)


def _varying(flats: Sequence[Settings], swept: Sequence[str]) -> list[str]:
    """Keys that are not the same everywhere, those that do not matter left out."""
    keys = dict.fromkeys(key for flat in flats for key in flat)
    return [key for key in keys if (_set_by(swept, key) or _matters(key)) and len({flat.get(key, ABSENT) for flat in flats}) > 1]


def _set_by(swept: Sequence[str], key: str) -> bool:
    """Whether a sweep sets the key, or chooses the option that it belongs to."""
    return any(key == word or key.startswith(f"{word}.") for word in swept)


def _matters(key: str) -> bool:
    top, _, rest = key.partition(".")
    return top not in BOOKKEEPING and not (top == "trainer" and rest in BOOKKEEPING_TRAINER)


def _follows_seed(known: Sequence[tuple[Run, Settings]], key: str) -> bool:
    """Whether the key is a function of the seed alone. Some seed must have several runs, or else everything would be; paths that end in
    the number of the seed need no such witness."""
    by_seed: dict[int | None, set[Any]] = {}
    for run, flat in known:
        by_seed.setdefault(run.seed, set()).add(flat.get(key, ABSENT))
    if len(by_seed) < 2 or any(len(values) > 1 for values in by_seed.values()):
        return False
    if len(known) > len(by_seed):
        return True
    return len({re.sub(rf"(?<=/){run.seed}(?=/|$)", "*", str(flat.get(key, ABSENT))) for run, flat in known}) == 1


def _groups(runs: Sequence[Run], flats: Sequence[Settings], apart: Sequence[str]) -> list[list[int]]:
    """Indices of the runs of each cell: by its given name, by its settings, or, of a run that has not begun, by what its sweep set."""
    values = [tuple(flat.get(key, ABSENT) for key in apart) for flat in flats]
    begun = [i for i, run in enumerate(runs) if run.config]
    named = {values[i]: runs[i].cell for i in begun if runs[i].cell is not None}
    keys: list[Any] = [run.cell or named.get(values[i], values[i]) if run.config else run.cell for i, run in enumerate(runs)]
    of_words = {_words(runs[i]): keys[i] for i in reversed(begun)}
    groups: dict[Any, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(of_words.get(_words(runs[i]), _words(runs[i])) if key is None else key, []).append(i)
    return list(groups.values())


def _words(run: Run) -> tuple[Any, ...]:
    own = {key: _hashable(value) for key, value in run.overrides.items() if key not in OWN}
    return (str(run.sweep) if run.overrides else str(run.folder), *sorted(own.items()))


def _speaker(members: Sequence[int], runs: Sequence[Run]) -> int:
    """The run whose configuration stands for the cell's."""
    return next((i for i in members if runs[i].config), members[0])


# --- names --------------------------------------------------------------------------------------------------------------------


def _tells(key: str, groups: Sequence[Sequence[int]], flats: Sequence[Settings]) -> bool:
    """Whether every run has the key, all of a cell the same, and some cells differ in it."""
    values = [{flats[i].get(key, ABSENT) for i in members} for members in groups]
    return all(len(one) == 1 for one in values) and len(set().union(*values)) > 1 and ABSENT not in set().union(*values)


def _enough(keys: Sequence[str], groups: Sequence[Sequence[int]], flats: Sequence[Settings]) -> list[str]:
    """The first of the keys that tell all cells apart; a key that tells no more of them apart than those before it is passed over."""
    chosen: list[str] = []
    apart = 1
    for key in keys:
        if apart == len(groups):
            break
        told = len({tuple(flats[members[0]].get(k, ABSENT) for k in (*chosen, key)) for members in groups})
        if told > apart:
            chosen, apart = [*chosen, key], told
    return chosen


def _names(groups: Sequence[Sequence[int]], runs: Sequence[Run], flats: Sequence[Settings], keys: Sequence[str]) -> list[str]:
    short, speakers = short_keys(keys), [_speaker(members, runs) for members in groups]
    values = {key: _shown([flats[i].get(key, ABSENT) for i in speakers]) for key in keys}
    names: list[str] = []
    for place, members in enumerate(groups):
        made = " ".join(f"{short[key]}={values[key][place]}" for key in keys if values[key][place] != ABSENT)
        alone = runs[members[0]].verb if len(groups) == 1 else ""
        given = [name for i in members if (name := runs[i].cell)]
        names.append(given[0] if given else made or alone or runs[members[0]].folder.name)
    again = Counter(names)
    return [name if again[name] == 1 else f"{name} [{runs[i].folder}]" for name, i in zip(names, speakers, strict=True)]


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Each key by its last parts: as few as tell it from the others."""
    short = {}
    for key in keys:
        parts = re.split(r"[.@]", key)
        options = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        others = [".".join(re.split(r"[.@]", other)) for other in keys if other != key]
        short[key] = next((o for o in options if not any(other == o or other.endswith(f".{o}") for other in others)), key)
    return short


def _shown(values: Sequence[Any]) -> list[str]:
    """Values as text; what paths have in common at their beginning says nothing."""
    texts = [text_of(value) for value in values]
    paths = [text for text in texts if "/" in text]
    if len(set(paths)) < 2:
        return texts
    folders = [path.split("/")[:-1] for path in paths]
    common = sum(1 for _ in itertools.takewhile(lambda names: len(set(names)) == 1, zip(*folders, strict=False)))
    return ["/".join(text.split("/")[common:]) if "/" in text else text for text in texts]


def text_of(value: Any) -> str:
    """As one would type it behind `key=`."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
