"""The command `rlhf <verb> [overrides]`: picks the primary config, lets Hydra compose it, runs the job or the sweep.

Knows Hydra and exit codes: 0 done, 1 failed while running, 2 the input was refused. Imports nothing heavy before a verb needs it.
"""

from __future__ import annotations

import os
import sys

from rlhf.cli.verbs import VERBS


def usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {what}" for verb, what in VERBS.items())
    return (
        "usage: rlhf <verb> [option of the verb's own group] [key=value ...]\n"
        "       rlhf <verb> -m [key=value,value ...] [sweep.jobs=2 ...] for a sweep\n"
        "       rlhf <name> --config-dir DIR [key=value ...] for a verb of your own, DIR/<name>.yaml\n\n"
        f"{verbs}\n\n"
        "rlhf <verb> --help lists the groups of a verb, rlhf <verb> --cfg job prints its configuration.\n"
        "Start with: rlhf pipeline\n"
    )


def main(argv: list[str] | None = None) -> int:
    """Runs one command line and returns its exit code."""
    try:
        return _main(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:  # before a job has begun to listen to it, or after
        print("rlhf: stopped at once by Ctrl-C", file=sys.stderr)
        return 1


def _main(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0
    if words[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(version("rlhf"))
        return 0
    verb, rest = words[0], words[1:]
    if verb not in VERBS and not _names_folder(rest):
        from rlhf.config import nearest

        print(f"rlhf: error: no such verb: {verb}{nearest(verb, VERBS)}; rlhf --help lists them", file=sys.stderr)
        return 2
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # import paths in a configuration may name the user's own modules, as `python -m` finds them
    from rlhf.cli.hydra_app import run
    from rlhf.logging import setup_logging

    setup_logging()
    if verb == "plan":
        rest = ["plan.json=true" if word == "--json" else word for word in rest]
    return run(verb, rest)


def _names_folder(words: list[str]) -> bool:
    """Whether there is a folder to look for a verb of the user's in."""
    from rlhf.cli.own_verb import config_folder

    return config_folder(words) is not None


def entry() -> None:
    """The console script."""
    sys.exit(main())
