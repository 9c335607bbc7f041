"""Hydra's side of the command: compose one job, and Hydra's errors in one clear line. A sweep is `rlhf.cli.sweep`'s.

Knows Hydra; knows no training.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

import rlhf
from rlhf.cli import rundir
from rlhf.cli.main import VERBS
from rlhf.cli.own_verb import config_folder, require_file, require_whole
from rlhf.config import UserError, nearest

MULTIRUN = ("-m", "--multirun")
ASKING = ("-h", "--help", "--hydra-help", "-c", "--cfg", "-i", "--info", "-sc", "--shell-completion")
"""Flags that print and run nothing: Hydra answers them, in a sweep as well."""
FLAGS = (
    *MULTIRUN, *ASKING, "--version", "--resolve", "-p", "--package", "-r", "--run", "-cp", "--config-path", "-cn", "--config-name", "-cd",
    "--config-dir", "--experimental-rerun",
)  # fmt: skip
MEANT = {"learning_rate": "lr", "max_epochs": "epochs", "num_epochs": "epochs", "train_batch_size": "batch_size"}
"""Other names of what some keys end with."""


def conf_dir() -> Path:
    """The folder of the config groups: inside the package once installed, beside it in a checkout."""
    package = Path(rlhf.__file__).parent
    return next(folder for folder in (package / "conf", package.parent / "conf") if (folder / "base.yaml").is_file())


def run(verb: str, overrides: list[str]) -> int:
    """Composes and runs a verb, once or as a sweep; returns the exit code."""
    flags = [word.partition("=")[0] for word in overrides]
    folder = config_folder(overrides)
    try:
        if verb not in VERBS:
            assert folder is not None, "rlhf.cli.main looks for the flag"
            require_file(verb, folder, (path.stem for path in conf_dir().iterdir()))
        overrides = with_own_group(verb, overrides)
        if any(flag in MULTIRUN for flag in flags) and not any(flag in ASKING for flag in flags):
            from rlhf.cli.sweep import run_sweep

            return run_sweep(verb, overrides)
        name = primary_config(verb, overrides)
        _check_single(overrides)
        _check_flags(overrides)
    except UserError as error:
        return _refuse(str(error))
    except YAMLError as error:
        return _refuse(_unreadable(error))
    sys.argv = [f"rlhf {verb}", *_with_directory(overrides)]
    # Hydra's own error report ends the process with code 1 and a hint about its internals; the errors come to us instead.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    codes: list[int] = []
    there = _folders_before(overrides, name)

    def job(cfg: DictConfig) -> None:
        try:
            codes.append(_job(cfg, verb))
        finally:
            _take_back(Path(HydraConfig.get().runtime.output_dir), there)

    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=name)(job)()
    except UserError as error:
        return _refuse(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        return _refuse(explain(error, name, folder))
    except YAMLError as error:
        return _refuse(_unreadable(error))
    return max(codes, default=0)


def _folders_before(overrides: list[str], name: str) -> set[Path]:
    """Of the folders that Hydra is about to make a run directory in, and of that itself, those that are there."""
    given = next(
        (word.partition("=")[2] for word in reversed(overrides) if word.startswith(("run_dir=", "hydra.run.dir="))), f"runs/{name}/of-now"
    )
    run_dir = Path(given).absolute()
    return {folder for folder in (run_dir, *run_dir.parents) if folder.is_dir()}


def _take_back(run_dir: Path, there: set[Path]) -> None:
    """Removes the run directory that Hydra made before the job was judged, where the job has put nothing into it."""
    if os.environ.get("RANK", "0") != "0":  # rank zero is the one that writes there
        return
    for folder in (run_dir, *run_dir.parents):
        if folder in there or not folder.is_dir() or any(folder.iterdir()):
            return
        folder.rmdir()


def _check_flags(overrides: list[str]) -> None:
    """argparse would answer a flag it does not know with all those it does."""
    for word, following in zip(overrides, [*overrides, ""][1:], strict=True):
        flag, equals, value = word.partition("=")
        if not flag.startswith("-") or flag in FLAGS:
            continue
        behind = value if equals else following if following and "=" not in following and not following.startswith("-") else "VALUE"
        raise UserError(f"{flag}: overrides are key=value, without dashes: {flag.lstrip('-')}={behind}")


def _check_single(overrides: list[str]) -> None:
    word = next((word for word in overrides if word.lstrip("+~").partition("=")[0].partition(".")[0] == "sweep"), None)
    if word is not None:
        raise UserError(f"{word} says how a sweep is run, and this is none: add -m, or leave it out")


def with_own_group(verb: str, words: list[str]) -> list[str]:
    """A word right after a verb chooses in the verb's own group: `rlhf bench parity` is `rlhf bench bench=parity`, `a,b` sweeps.

    The own group is the folder of conf/ with the verb's name. With one option or none there is nothing to choose, so that words are
    left for Hydra to refuse.

    Raises:
        UserError: the group has no such option, or a second word follows.
    """
    if verb == "report":
        from rlhf.cli.report import with_runs

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


def _with_directory(overrides: list[str]) -> list[str]:
    """`run_dir=PATH` is Hydra's output directory."""
    return [f"hydra.run.dir={word.removeprefix('run_dir=')}" if word.startswith("run_dir=") else word for word in overrides]


def _job(cfg: DictConfig, verb: str) -> int:
    """One composed job; its exit code."""
    from rlhf.cli.job import JobFailed

    try:
        if HydraConfig.get().sweeper.params:
            raise UserError(f"{HydraConfig.get().job.config_name} is a sweep, as it names values to go through: add -m")
        config = resolved(cfg)
        if config["verb"] != verb:
            raise UserError(f"{HydraConfig.get().job.config_name}.yaml is no config of rlhf {verb}: its verb is {config['verb']}")
        _run(config)
    except UserError as error:
        return _refuse(str(error))
    except OmegaConfBaseException as error:
        return _refuse(" ".join(str(error).split()))
    except JobFailed as error:
        return error.code
    return 0


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


def _run(config: dict[str, Any]) -> dict[str, Any]:
    """The verb's job."""
    if config["verb"] == "plan":
        from rlhf.cli.plan import run_plan

        return run_plan(config)
    if config["verb"] == "report":
        from rlhf.cli.report import run_report

        return run_report(config)
    if config["verb"] == "chat":
        from rlhf.cli.chat import run_chat

        return run_chat(config)
    from rlhf.cli.job import run_job
    from rlhf.cli.pipeline import run_pipeline

    if config["launcher"]["name"] == "external":
        _check_external()
    config = going_on(config, HydraConfig.get().overrides.task)
    return (run_pipeline if config["verb"] == "pipeline" else run_job)(config)


def _check_external() -> None:
    """Several processes compose this command line, so what one of them would make up has to be given."""
    if "RANK" not in os.environ:
        raise UserError("launcher=external, but no RANK is set: start this command with torchrun, or use launcher=local")
    if not any(word.startswith("hydra.run.dir=") for word in HydraConfig.get().overrides.hydra):
        raise UserError("launcher=external needs run_dir=PATH: each rank would make up a directory of its own")


def going_on(config: dict[str, Any], words: Iterable[str]) -> dict[str, Any]:
    """A run that is only resumed goes on with the config it was started with.

    Args:
        words: the overrides, without the run directory.
    """
    if not config.get("resume") or any(not word.startswith("resume=") for word in words):
        return config
    saved = rundir.saved_config(Path(config["run_dir"]))
    return config if saved is None else {**saved, "resume": True, "run_dir": config["run_dir"]}


def _unreadable(error: YAMLError) -> str:
    return f"a configuration file is no YAML: {' '.join(str(error).split())}"


def _refuse(message: str) -> int:
    print(f"rlhf: error: {message}", file=sys.stderr)
    return 2


def explain(error: Exception, primary: str, folder: Path | None = None) -> str:
    """Hydra's and OmegaConf's errors as one sentence that names the key and the nearest right one. `primary` is the file composed,
    `folder` what `--config-dir` names."""
    text = str(error)
    cause = str(error.__cause__ or "")
    if isinstance(error, OverrideParseException):
        return f"cannot read {getattr(error, 'override', '')!r} as key=value: {_first_line(text)}"
    if isinstance(error, MissingConfigException) and "Available options" in text:
        missing = re.search(r"Could not find '([^']*)'", text)
        name = missing.group(1) if missing else ""
        listed = text.split("Available options", 1)[1].partition("Config search path")[0]
        options = [line.strip() for line in listed.splitlines()[1:] if line.strip()]
        group, _, option = name.rpartition("/")
        return f"{group}={option}: no such option{nearest(option, options)}; there are {', '.join(options)}"
    several = re.match(r"(?:Ambiguous value for argument|Sweep parameters) '(\S+?)=(.*?)'(?: requires --multirun|\n|$)", text)
    if several:
        values = several.group(2)
        whole = "" if "(" in values or "@" in several.group(1) else f", or write {several.group(1)}=[{values}] for one value that is a list"
        return f"{several.group(1)}={values} names several values: add -m for a run with each{whole}"
    key = re.search(r"Could not override '([^']*)'|^Override (\S+?)=.* looks like a config group override", text)
    if key:
        return _unknown_key(key.group(1) or key.group(2), primary, folder)
    group = re.search(r"In '[^']*': Could not find '([^']*)'|Could not override '([^']*)'\. No match in the defaults list", text)
    if group:
        return f"{group.group(1) or group.group(2)}: no such group or option; rlhf {_as_typed(primary, folder)} --help lists them"
    if isinstance(error, ConfigCompositionException) and cause:
        return _first_line(cause)
    return " ".join(text.split())


def search_in(folder: Path | None) -> None:
    """Sets Hydra up to compose from conf/ and, before it, from the folder that `--config-dir` names."""
    path = create_config_search_path(str(conf_dir()))
    if folder is not None:
        path.prepend("command-line", folder.absolute().as_uri(), anchor="schema")
    GlobalHydra.instance().clear()
    Hydra.create_main_hydra2(task_name="rlhf", config_search_path=path)


def _as_typed(primary: str, folder: Path | None) -> str:
    """The words behind `rlhf` that start from a file: those of `bench_step` are `bench step`, those of a user's file name its folder."""
    return primary.replace("_", " ") if (conf_dir() / f"{primary}.yaml").is_file() else f"{primary} --config-dir {folder}"


def _unknown_key(key: str, primary: str, folder: Path | None) -> str:
    """Names the nearest key of the composed config, or the nearest group."""
    key = key.lstrip("+~")
    search_in(folder)
    cfg = hydra.compose(config_name=primary, return_hydra_config=True)
    GlobalHydra.instance().clear()
    verb = _as_typed(primary, folder)
    groups = [name for name in cfg.hydra.runtime.choices if not name.startswith("hydra/")]
    in_package = [name for name in groups if name.startswith(f"{key}@")]  # `model` where `model@actor.model` is meant
    if "@" in key or "/" in key or in_package:
        similar = nearest(in_package[0] if in_package else key, groups)
        return f"{key}: no such group in rlhf {verb}{similar}; rlhf {verb} --help lists them"
    known = list(_keys(OmegaConf.to_container(cfg, resolve=False), ""))
    parent = key.rpartition(".")[0]
    siblings = [name for name in known if name.rpartition(".")[0] == parent]
    similar = _same_end(key, known) or nearest(key, siblings) or nearest(key, known)
    return f"{key}: no such key{similar}; rlhf {verb} --cfg job shows them all"


def _same_end(key: str, known: Iterable[str]) -> str:
    """The key of the same section that ends as this one is meant to."""
    section, _, end = key.split(".")[0], *key.rpartition(".")[1:]
    same = [name for name in known if name.startswith(f"{section}.") and name.rpartition(".")[2] == MEANT.get(end, end)]
    return f" (did you mean {same[0]!r}?)" if same else ""


def _keys(node: Any, prefix: str) -> Iterable[str]:
    for name, value in node.items() if isinstance(node, dict) else ():
        key = f"{prefix}.{name}" if prefix else str(name)
        yield key
        yield from _keys(value, key)


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "the configuration cannot be composed"
