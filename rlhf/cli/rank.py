"""One rank of a job: `python -m rlhf.cli.rank CONFIG` replays a resolved config.

Started by this project's launcher, torchrun, srun or the deepspeed launcher. Exit codes: 0 done, 1 failed, 2 refused.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rlhf.cli import rundir
from rlhf.cli.errors import Interrupted, report, rows
from rlhf.config import UserError, build
from rlhf.engines.launcher import ended_by_sigterm, prepare_rank
from rlhf.logging import log, quiet_libraries, setup_logging
from rlhf.sweeping.orphans import end_with_parent


def run_rank(config: Mapping[str, Any]) -> None:
    """Does this rank's part of the job; rank zero writes the summary. Raises what went wrong."""
    cfg = build(config)
    prepare_rank(cfg.trainer)
    from rlhf.cli.assemble import Job  # after prepare_rank: it imports deepspeed
    from rlhf.cli.bench.verb import bench
    from rlhf.cli.evaluate.verb import evaluate
    from rlhf.cli.own_verb import own_verb
    from rlhf.cli.train import dpo, ppo, reward, sft

    quiet_libraries()
    verbs = {"sft": sft, "reward": reward, "ppo": ppo, "dpo": dpo, "evaluate": evaluate, "bench": bench}
    start = time.perf_counter()
    result = (verbs.get(cfg.verb) or own_verb(cfg))(Job(config, cfg))
    seconds = {"total": time.perf_counter() - start, **result["seconds"]}
    if os.environ["RANK"] == "0":
        rundir.write_summary(config, "done", metrics=result["metrics"], seconds=seconds, data=result["report"])


def attempt(config: Mapping[str, Any]) -> int:
    """`run_rank` to an exit code: what went wrong is said and recorded."""
    before = rows(config)
    try:
        with ended_by_sigterm():
            run_rank(config)
    except (UserError, Interrupted) as error:
        return report(config, error, before)
    except (KeyboardInterrupt, SystemExit):  # the latter is what Lightning makes of the former
        return report(config, Interrupted("stopped at once by Ctrl-C or SIGTERM; the last checkpoint, if there is one, is kept"), before)
    except Exception as error:
        if os.environ.get("RANK", "0") == "0" or not _is_peer_loss(error):
            log.error("rank %s: %s", os.environ.get("RANK", "0"), traceback.format_exc())
        return report(config, error, before)
    return 0


def main(path: str) -> int:
    setup_logging()
    return attempt(yaml.safe_load(Path(path).read_text()))


def _is_peer_loss(error: Exception) -> bool:
    """Whether a rank failed only because another one went away."""
    return "Connection closed by peer" in str(error) or "Connection reset by peer" in str(error)


if __name__ == "__main__":
    end_with_parent()
    code = main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    # Hard exit: after a failure, process-group and CUDA destructors can wait forever for peers.
    os._exit(code)
