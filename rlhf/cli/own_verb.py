"""A verb from outside this package: NAME.yaml in the folder that `--config-dir` names, and in it `entry`, the import path of what runs.

Knows what such a file must say and what an entry may return; knows no training. It imports nothing heavy: an entry is imported in a rank only,
as it may import DeepSpeed, which wants to be told of the device before.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rlhf.cli.sections import COMMON
from rlhf.cli.verbs import VERBS
from rlhf.config import ENTRY, TARGET, TOP_LEVEL, UserError, locate, nearest
from rlhf.logging import log

FLAGS = ("-cd", "--config-dir")
RETURNED = ("metrics", "seconds", "report")
"""What an entry may return, all optional: final metrics, seconds of its phases, counts of its data."""

# --- the file ------------------------------------------------------------------------------------------------------------------


def config_folder(words: Sequence[str]) -> Path | None:
    """The folder that `--config-dir DIR` or `--config-dir=DIR` names, where the flag is given."""
    for word, following in zip(words, [*words, ""][1:], strict=True):
        flag, equals, value = word.partition("=")
        if flag in FLAGS:
            return Path(value if equals else following)
    return None


def require_file(verb: str, folder: Path, taken: Iterable[str]) -> None:
    """
    Args:
        taken: names that the package's own configuration has.

    Raises:
        UserError: the folder has no file for the verb, or the verb's name means something else already.
    """
    if folder == Path():
        raise UserError("--config-dir needs a value behind it, the folder of your configuration")
    if not folder.is_dir():
        raise UserError(f"--config-dir {folder}: there is no such folder")
    file = folder / f"{verb}.yaml"
    if not file.is_file():
        there = sorted(path.stem for path in folder.glob("*.yaml"))
        raise UserError(
            f"no such verb: {verb}{nearest(verb, [*VERBS, *there])}; rlhf --help lists those of the package, and there is no {file}"
        )
    if not verb.isidentifier() or verb in {ENTRY, *taken, *TOP_LEVEL}:
        raise UserError(
            f"{file}: {verb} cannot be the name of a verb, as a configuration has it already or cannot have it: rename the file"
        )


def require_whole(config: Mapping[str, Any]) -> None:
    """Refuses a composed config that names an entry but not what a job needs, or the other way round.

    Raises:
        UserError: names the key.
    """
    verb = config.get("verb")
    if verb in VERBS:
        if ENTRY in config:
            raise UserError(f"{ENTRY}={config[ENTRY]} is for a verb of your own, but rlhf {verb} runs what this package has: leave it out")
        return
    if verb is None:
        raise UserError("verb: a value is missing: a file for a verb of your own says verb: NAME, the name of the file")
    if not isinstance(config.get(ENTRY), str):
        raise UserError(f"{verb}.yaml says no {ENTRY}, the import path of a function f(job) or of a class with run(self, job)")
    missing = [section for section in COMMON if section not in config]
    if missing:
        raise UserError(f"{verb}.yaml has no section {missing[0]}: let its defaults begin with base")
    if isinstance(config.get(verb), Mapping) and TARGET in config[verb]:
        raise UserError(f"{verb}.{TARGET} would be read by nobody: {ENTRY} names the class that gets the keys of {verb}")


# --- the entry -----------------------------------------------------------------------------------------------------------------


def own_verb(cfg: Any) -> Callable[[Any], dict[str, Any]]:
    """What a rank runs for a verb of the user's, from checked settings: a function from the job to `metrics`, `seconds` and `report`.

    Raises:
        UserError: the entry cannot be imported, or is nothing that runs; the verb's section does not fit its class.
    """
    entry = _load(cfg)

    def run(job: Any) -> dict[str, Any]:
        return _result(cfg.entry, entry(job))

    return run


def _load(cfg: Any) -> Callable[[Any], Any]:
    path = cfg.entry
    try:
        target: Any = locate(path)
    except UserError as error:
        raise UserError(f"{ENTRY}: {error}; a module is looked for where the command is called, and on PYTHONPATH") from error
    if not inspect.isclass(target):
        if not callable(target):
            raise UserError(f"{ENTRY}={path} is a {type(target).__name__}, not a function f(job) or a class with run(self, job)")
        return target
    if not callable(getattr(target, "run", None)):
        raise UserError(f"{ENTRY}={path} is a class without a method run(self, job)")
    keys = vars(getattr(cfg, cfg.verb, SimpleNamespace()))
    try:
        inspect.signature(target).bind(**keys)
    except TypeError as error:
        raise UserError(f"{cfg.verb}: its keys do not fit {path}: {error}") from error
    try:
        built: Any = target(**keys)
        return built.run
    except ValueError as error:
        raise UserError(f"{cfg.verb}.{error}") from error


def _result(path: str, returned: Any) -> dict[str, Any]:
    """
    Raises:
        UserError: it is not what an entry may return.
    """
    asked = "return a mapping with metrics and, if you like, seconds and report, as job.fit does"
    if not isinstance(returned, Mapping):
        raise UserError(f"{ENTRY}={path} returned a {type(returned).__name__}: {asked}")
    strange = next((name for name in returned if name not in RETURNED), None)
    if strange is not None:
        raise UserError(f"{ENTRY}={path} returned {strange!r}, which no summary has{nearest(str(strange), RETURNED)}: {asked}")
    result: dict[str, Any] = {name: dict(returned.get(name, {})) for name in RETURNED}
    for part in ("metrics", "seconds"):
        result[part] = _finite(path, part, result[part])
    return result


def _finite(path: str, part: str, values: Mapping[str, Any]) -> dict[str, float]:
    """What a summary can hold; a number that is none is left out, as it is for the verbs of this package."""
    numbers = {}
    for name, value in values.items():
        try:
            numbers[str(name)] = float(value)
        except (TypeError, ValueError) as error:
            raise UserError(f"{ENTRY}={path} returned {value!r} for {part}[{name!r}]: it must be a number") from error
    for name in [name for name, value in numbers.items() if not math.isfinite(value)]:
        log.warning("%s[%r] is %s and is left out of the summary", part, name, numbers.pop(name))
    return numbers
