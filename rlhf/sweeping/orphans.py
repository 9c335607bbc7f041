"""Processes that end when the one that started them does, however it ends.

Linux sends a child the signal it asked for when the thread that started it ends, SIGKILL included. So children are started from the
main thread only, and ask as the first thing they do.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PARENT = "RLHF_PARENT"
"""Environment variable: the process that started this one and takes it along."""
PR_SET_PDEATHSIG = 1


def child_environment() -> dict[str, str]:
    """What a child is told, so that `end_with_parent` binds it to this process."""
    return {PARENT: str(os.getpid())}


def end_with_parent() -> None:
    """Binds this process to the one that started it, where that was this project; what torchrun or srun started is left to them.

    The child also hears Ctrl-C again: a shell starts what it runs in the background deaf to it, and children inherit that.
    """
    parent = os.environ.pop(PARENT, None)
    if parent is None:
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it has ended already
        os._exit(1)
