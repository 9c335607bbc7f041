"""From words to a config: where conf/ is, which of its files a command line starts from, the values of a composed job.

Knows Hydra; runs nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

import rlhf
from rlhf.cli import rundir
from rlhf.cli.own_verb import require_whole
from rlhf.cli.sections import COMMON
from rlhf.cli.verbs import VERBS
from rlhf.config import TOP_LEVEL, UserError, nearest

MULTIRUN = ("-m", "--multirun")
ASKING = ("-h", "--help", "--hydra-help", "-c", "--cfg", "-i", "--info", "-sc", "--shell-completion")
"""Flags that print and run nothing: Hydra answers them, in a sweep as well."""


def conf_dir() -> Path:
    """The folder of the config groups: inside the package once installed, beside it in a checkout."""
    package = Path(rlhf.__file__).parent
    return next(folder for folder in (package / "conf", package.parent / "conf") if (folder / "base.yaml").is_file())


def with_own_group(verb: str, words: list[str]) -> list[str]:
    """A word right after a verb chooses in the verb's own group: `rlhf bench parity` is `rlhf bench bench=parity`, `a,b` sweeps.

    The own group is the folder of conf/ with the verb's name. With one option or none there is nothing to choose, so that words are
    left for Hydra to refuse.

    Raises:
        UserError: the group has no such option, or a second word follows.
    """
    if verb == "report":
        from rlhf.cli.report.verb import with_runs

        return with_runs(words)
    options = sorted(file.stem for file in (conf_dir() / verb).glob("*.yaml"))
    bare = list(itertools.takewhile(lambda word: word[:1].isalpha() and "=" not in word, words))
    if len(options) < 2 or not bare:
        return words
    for option in bare[0].split(","):
        if option not in options:
            similar = nearest(option, options)
            raise UserError(f"{option}: no such option of rlhf {verb}{similar}; there are {', '.join(options)}, and overrides as key=value")
    if len(bare) > 1:
        raise UserError(f"{bare[1]}: rlhf {verb} takes one option of its own, which is {bare[0]} already; overrides are key=value")
    return [f"{verb}={bare[0]}", *words[1:]]


def primary_config(verb: str, overrides: list[str]) -> str:
    """The file of conf/ that a command line starts from: VERB, or VERB_OPTION where an option of the verb's own group has sections of its own.

    Raises:
        UserError: a sweep over options that start from different files.
    """
    chosen = [word.removeprefix(f"{verb}=") for word in overrides if word.startswith(f"{verb}=")]
    options = chosen[-1].split(",") if chosen else [""]
    names = [f"{verb}_{option}" for option in options]
    files = [name if (conf_dir() / f"{name}.yaml").is_file() else verb for name in names]
    if len(set(files)) > 1:
        raise UserError(
            f"{verb}={chosen[-1]}: these do not have the same sections, so that one sweep cannot hold them: run them one by one"
        )
    return files[0]


# --- words that Hydra would answer with its internals ----------------------------------------------------------------------------


def require_choices(verb: str, words: Iterable[str], folder: Path | None) -> None:
    """
    Args:
        folder: what `--config-dir` names.

    Raises:
        UserError: a word takes away a section that every job of the verb reads, or gives a group what is no option's name.
    """
    parser = OverridesParser.create()
    needed = TOP_LEVEL if verb in VERBS else ("verb", *COMMON)
    for word in words:
        key, _, value = word.lstrip("+").partition("=")
        if key.startswith("~") and key[1:] in needed and key != "~experiment":
            raise UserError(f"{word}: rlhf {verb} needs {key[1:]}: leave the word out")
        group = key.partition("@")[0]
        files = [file for root in (conf_dir(), folder) if root is not None for file in (root / group).glob("*.yaml")]
        if not value or key.startswith("-") or not files:
            continue
        try:
            given = parser.parse_override(f"k={value}").value()
        except HydraException:
            continue  # Hydra says what is wrong with it
        for one in given.list if isinstance(given, ChoiceSweep) else [given]:
            if one is None or isinstance(one, int | float):
                options = ", ".join(sorted({file.stem for file in files}))
                raise UserError(f"{key}={value}: {group} is a group and takes the name of an option; there are {options}")


# --- composing ---------------------------------------------------------------------------------------------------------------------


def search_in(folder: Path | None) -> None:
    """Sets Hydra up to compose from conf/ and, before it, from the folder that `--config-dir` names."""
    path = create_config_search_path(str(conf_dir()))
    if folder is not None:
        path.prepend("command-line", folder.absolute().as_uri(), anchor="schema")
    GlobalHydra.instance().clear()
    Hydra.create_main_hydra2(task_name="rlhf", config_search_path=path)


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """The values of a composed job, once HydraConfig is set.

    Raises:
        OmegaConfBaseException: a value is missing or cannot be resolved.
        UserError: a verb of the user's lacks what every job has.
    """
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    if HydraConfig.get().runtime.choices.get("debug") is not None:
        config = {key: node for key, node in config.items() if not _is_fragment(node)}
    if (experiment := HydraConfig.get().runtime.choices.get("experiment")) is not None:
        config["experiment"] = experiment  # what a tracker tags the run with
    require_whole(config)
    return config


def _is_fragment(node: Any) -> bool:
    """A section that a debug option speaks of and this verb does not have: settings say their `_target_`, fragments do not."""
    return (
        isinstance(node, dict)
        and bool(node)
        and "_target_" not in node
        and not any(isinstance(v, dict) and "_target_" in v for v in node.values())
    )


def going_on(config: dict[str, Any], words: Iterable[str]) -> dict[str, Any]:
    """A run that is only resumed goes on with the config it was started with.

    Args:
        words: the overrides, without the run directory.
    """
    if config.get("resume") is not True:
        return config
    saved = rundir.saved_config(Path(config["run_dir"]))
    if saved is not None and saved.get("verb") != config["verb"]:
        raise UserError(f"resume=true, but run_dir={config['run_dir']} holds a run of rlhf {saved.get('verb')}: resume it with that verb")
    if any(not word.startswith("resume=") for word in words):
        return config
    return config if saved is None else {**saved, "resume": True, "run_dir": config["run_dir"]}
