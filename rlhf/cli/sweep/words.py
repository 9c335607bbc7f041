"""The command line of a sweep: its flags, the sweep section, the cells it spans, and their configs.

Knows Hydra's grammar and its compose API; knows no directory of a sweep and runs nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, QuotedString, RangeSweep
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from rlhf.cli.compose import MULTIRUN, conf_dir, primary_config, require_choices, resolved
from rlhf.cli.grammar import unquoted
from rlhf.cli.rundir import require_path
from rlhf.config import UserError, nearest
from rlhf.sweeping.search import Choice, Dimension, Number

WITH_VALUE = {"-cn": "config_name", "--config-name": "config_name", "-cd": "config_dir", "--config-dir": "config_dir"}
PARENT = ("launcher", "sweeper")
"""Groups of hydra that a sweep of ours stands in for."""


@dataclass(frozen=True)
class Line:
    """The words behind `rlhf VERB -m`, sorted."""

    verb: str
    task: tuple[str, ...]
    """Overrides of the jobs, fixed and swept."""
    sweep: tuple[str, ...] = ()
    """Overrides of the sweep section."""
    run_dir: str | None = None
    config_name: str | None = None
    config_dir: str | None = None

    @property
    def words(self) -> list[str]:
        return [*self.task, *(word for word in self.sweep if key_of(word) != "sweep.resume")]


def key_of(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")


def is_sweep_word(word: str) -> bool:
    key = key_of(word)
    return key == "sweep" or key.startswith("sweep.")


def read_line(verb: str, words: Sequence[str]) -> Line:
    """
    Raises:
        UserError: a flag that a sweep has no use for, an override of Hydra's own launchers and sweepers, or a group without an option.
    """
    found: dict[str, str | None] = {"config_name": None, "config_dir": None, "run_dir": None}
    overrides: list[str] = []
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        if word in MULTIRUN:
            continue
        if flag in WITH_VALUE:
            given = value if equals else next(rest, None)
            if not given:
                raise UserError(f"{flag} needs a value behind it")
            found[WITH_VALUE[flag]] = given
        elif word.startswith("-"):
            raise UserError(f"{flag}: a sweep takes -m, -cn NAME and -cd DIR; everything else is key=value")
        elif key_of(word) == "run_dir":
            found["run_dir"] = unquoted(value)
            require_path(unquoted(value))
        else:
            overrides.append(word)
    for word in overrides:
        if key_of(word).startswith(("hydra/", "hydra.")) and key_of(word) != "hydra.searchpath":
            raise UserError(
                f"{word}: sweeps are run by this project, not by Hydra's launchers and sweepers; see sweep=local, slurm, optuna"
            )
    require_choices(verb, overrides, None if found["config_dir"] is None else Path(found["config_dir"]))
    gone = next((word for word in overrides if is_sweep_word(word) and word.startswith("~")), None)
    if gone is not None:
        raise UserError(f"{gone}: every sweep has this: leave the word out")
    sweep = _last_of_each([word for word in overrides if is_sweep_word(word)])
    return Line(verb, tuple(word for word in overrides if not is_sweep_word(word)), sweep, **found)


def _last_of_each(words: Sequence[str]) -> tuple[str, ...]:
    """The last word of each key: those of a resumed sweep come behind those it began with."""
    return tuple({key_of(word): word for word in words}.values())


@dataclass(frozen=True)
class Words:
    """A cell as overrides: as words for Hydra, and the swept keys with their values."""

    words: tuple[str, ...]
    overrides: Mapping[str, Any]


class Composer:
    """Composes what a line asks for. It has Hydra's global state to itself.

    Raises:
        UserError: the primary config is missing or of another verb, or chooses a launcher or sweeper of Hydra.
        HydraException: it does not compose.
    """

    def __init__(self, line: Line) -> None:
        self.verb = line.verb
        self.primary = line.config_name or primary_config(line.verb, list(line.task))
        self.extra = [word for word in line.task if key_of(word) == "hydra.searchpath"]
        version.setbase("1.3")
        path = create_config_search_path(str(conf_dir()))
        if line.config_dir is not None:
            folder = Path(line.config_dir).absolute()
            if not folder.is_dir():
                raise UserError(f"--config-dir {line.config_dir}: there is no such folder")
            path.prepend("command-line", folder.as_uri(), anchor="schema")
        if line.config_name is not None:
            folders = [conf_dir(), *([Path(line.config_dir)] if line.config_dir is not None else [])]
            names = [file.stem for folder in folders for file in sorted(folder.glob("*.yaml"))]
            if line.config_name not in names:
                raise UserError(f"-cn {line.config_name}: no such config{nearest(line.config_name, names)}; -cd DIR says where it is")
        GlobalHydra.instance().clear()
        Hydra.create_main_hydra2(task_name="rlhf", config_search_path=path)
        self.base = self._compose([])
        self._check_base(line)
        params = self.base.hydra.sweeper.params or {}
        words = [*(f"{key}={value}" for key, value in params.items()), *(word for word in line.task if word not in self.extra)]
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        self.parser = parser
        self.overrides = list({override.get_key_element().lstrip("+"): override for override in parser.parse_overrides(words)}.values())

    def _compose(self, words: Sequence[str]) -> DictConfig:
        return compose(self.primary, [*self.extra, *words], return_hydra_config=True)

    def _check_base(self, line: Line) -> None:
        verb = self.base.get("verb")
        if verb != self.verb:
            raise UserError(f"-cn {line.config_name} is no config of rlhf {self.verb}: its verb is {verb}")
        for group in PARENT:
            chosen = self.base.hydra.runtime.choices[f"hydra/{group}"]
            if chosen != "basic":
                raise UserError(
                    f"-cn {line.config_name} chooses hydra/{group}={chosen}: sweeps are run by this project; choose sweep=local, slurm or optuna"
                )

    def settings(self, words: Sequence[str]) -> dict[str, Any]:
        """The resolved sweep section: conf/sweep/local, what the primary config says, then the words.

        Raises:
            UserError: a value is missing, or there are several.
        """
        several = next(iter(self.swept_in(words)), None)
        if several is not None:
            raise UserError(
                f"{several.input_line}: the sweep section says how the cells are run and is not swept itself: give one value "
                f"(a list is written in brackets, as in sweep.gpus=[0,1])"
            )
        group = "" if "sweep" in self.base.hydra.runtime.choices else "+"
        named = [f"{group}{word.lstrip('+')}" for word in words if key_of(word) == "sweep"] or [f"{group}sweep=local"] * bool(group)
        # Added if need be: sbatch's parameters have any name, and an unknown key is refused with the nearest one when settings are built.
        keys = [f"++{word.lstrip('+')}" for word in words if key_of(word) != "sweep"]
        try:
            return OmegaConf.to_container(self._compose([*named, *keys]).sweep, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
        except OmegaConfBaseException as error:
            raise UserError(f"sweep: {' '.join(str(error).split())}") from error

    def default_directory(self) -> Path:
        return Path(self.base.hydra.sweep.dir)

    # --- cells -----------------------------------------------------------------------------------------------------------------

    @property
    def fixed(self) -> list[str]:
        return [_as_word(override) for override in self.overrides if not override.is_sweep_override()]

    @property
    def swept(self) -> list[Override]:
        return [override for override in self.overrides if override.is_sweep_override()]

    def swept_in(self, words: Sequence[str]) -> list[Override]:
        """Of the words of another line, those that name several values."""
        return [override for override in self.parser.parse_overrides(list(words)) if override.is_sweep_override()]

    def grid(self) -> list[Words]:
        """One cell for each combination of the swept values, the last key the fastest.

        Raises:
            UserError: an interval, which has no list of values.
        """
        lists: list[list[str]] = []
        for override in self.overrides:
            if override.is_sweep_override() and isinstance(override.value(), IntervalSweep):
                raise UserError(f"{override.input_line}: an interval is for a search (sweep=optuna); a grid takes a,b or range(...)")
            lists.append(self._choices(override) if override.is_sweep_override() else [_as_word(override)])
        return [self.cell(words) for words in itertools.product(*lists)]

    def _choices(self, override: Override) -> list[str]:
        words = [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        if not words:
            raise UserError(f"{override.input_line}: this names no value")
        return words

    def cell(self, words: Sequence[str]) -> Words:
        swept = {_name(override) for override in self.swept}
        parsed = self.parser.parse_overrides(list(words))
        return Words(tuple(words), {_name(one): plain(one.value()) for one in parsed if _name(one) in swept})

    def space(self) -> dict[str, Dimension]:
        """What a search may choose, by key as in a word."""
        return {override.get_key_element(): self._dimension(override) for override in self.swept}

    def _dimension(self, override: Override) -> Dimension:
        value = override.value()
        if isinstance(value, IntervalSweep):
            assert value.start is not None and value.end is not None
            whole = isinstance(value.start, int) and isinstance(value.end, int)
            return Number(value.start, value.end, whole=whole, log="log" in value.tags)
        if isinstance(value, RangeSweep) and not value.shuffle:
            values = list(override.sweep_iterator())
            if len(values) > 1:
                whole = all(isinstance(one, int) for one in values)
                return Number(min(values), max(values), whole=whole, step=abs(value.step), log="log" in value.tags)  # type: ignore[type-var,arg-type]
        return Choice(tuple(word.partition("=")[2] for word in self._choices(override)))

    def config(self, words: Sequence[str], folder: Path) -> tuple[dict[str, Any], UserError | None]:
        """The resolved config of the job that these words ask for, with its run directory; where a value is missing or refers to
        what is not there, the config as it is written and what is wrong.

        Raises:
            HydraException: a key or an option does not exist.
        """
        cfg = self._compose(words)
        with open_dict(cfg):
            cfg.hydra.runtime.output_dir = str(folder)
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
            cfg.pop("sweep", None)
        try:
            return resolved(cfg), None
        except OmegaConfBaseException as error:
            return OmegaConf.to_container(cfg), UserError(" ".join(str(error).split()))  # type: ignore[return-value]


def _name(override: Override) -> str:
    return override.get_key_element().lstrip("+")


def _as_word(override: Override) -> str:
    return str(override.input_line)


def plain(value: Any) -> Any:
    """A parsed value as YAML and JSON have it."""
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {str(plain(key)): plain(one) for key, one in value.items()}
    return value
