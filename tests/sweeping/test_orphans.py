"""A child ends with its parent, SIGKILL included, and so do its children; a process that nobody of ours started is left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from processes_of_tests import all_end, wait_until

from rlhf.sweeping.orphans import PARENT, child_environment, end_with_parent

PYTHONPATH = {"PYTHONPATH": str(Path(__file__).parents[2])}

FAMILY = """
import os, subprocess, sys, time
from pathlib import Path
from rlhf.sweeping.orphans import PARENT, child_environment, end_with_parent
end_with_parent()
assert PARENT not in os.environ
folder, depth = Path(sys.argv[1]), int(sys.argv[2])
child = subprocess.Popen([sys.executable, __file__, str(folder), str(depth - 1)], env=os.environ | child_environment()) if depth else None
(folder / f"pid-{depth}").write_text(str(os.getpid()))
time.sleep(300)
"""


def test_three_generations_end_with_the_first(tmp_path: Path) -> None:
    script = tmp_path / "family.py"
    script.write_text(FAMILY)
    first = subprocess.Popen([sys.executable, str(script), str(tmp_path), "2"], env=os.environ | PYTHONPATH)
    wait_until(lambda: all((tmp_path / f"pid-{depth}").is_file() and (tmp_path / f"pid-{depth}").read_text() for depth in range(3)))
    first.kill()
    first.wait()
    all_end(int((tmp_path / f"pid-{depth}").read_text()) for depth in range(3))


def test_a_parent_that_is_gone_already_takes_its_child_along() -> None:
    code = "from rlhf.sweeping.orphans import end_with_parent; end_with_parent(); print('alive')"
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    child = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **PYTHONPATH, PARENT: str(gone.pid)}, capture_output=True, text=True, check=False
    )
    assert (child.returncode, child.stdout) == (1, "")


def test_what_others_start_is_theirs() -> None:
    before = signal.getsignal(signal.SIGINT)
    assert PARENT not in os.environ
    end_with_parent()
    assert signal.getsignal(signal.SIGINT) is before
    assert child_environment() == {PARENT: str(os.getpid())}
