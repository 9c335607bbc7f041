"""The loop: order, slots, GPUs, Ctrl-C, a job that is stopped, and that nothing outlives it. Jobs are small shell scripts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from processes_of_tests import alive, all_end, wait_until

from rlhf.sweeping import scheduler as scheduling
from rlhf.sweeping.leases import Leases
from rlhf.sweeping.processes import LocalJob
from rlhf.sweeping.scheduler import Handle, Scheduler, Task

HERE = Path(__file__).parent


class Scripts:
    """A source of shell scripts that keeps a diary: `starts`, and name, exit code, reason and Ctrl-C of each that ended."""

    def __init__(self, folder: Path, *scripts: str, gpus: int = 0) -> None:
        self.folder, self.gpus = folder, gpus
        self.todo = [(f"job{i}", script) for i, script in enumerate(scripts)]
        self.starts: list[tuple[str, list[str]]] = []
        self.ends: list[tuple[str, int, str | None, bool]] = []
        self.most = 0

    def next(self) -> Task | None:
        if not self.todo:
            return None
        name, script = self.todo.pop(0)
        return Task(name, self.gpus, partial(self._start, name, script))

    def _start(self, name: str, script: str, gpus: list[str]) -> Handle:
        self.starts.append((name, gpus))
        self.most = max(self.most, len(self.starts) - len(self.ends))
        environment = {"NAME": name, "OUT": str(self.folder), "GPUS": ",".join(gpus)}
        return LocalJob(["bash", "-c", script], stdin=f"hello {name}\n", log=self.folder / f"{name}.log", environment=environment)

    def watch(self, task: Task) -> str | None:
        return "it is hopeless" if (self.folder / f"stop-{task.name}").exists() else None

    def ended(self, task: Task, code: int, *, stopped: str | None, interrupted: bool) -> None:
        self.ends.append((task.name, code, stopped, interrupted))


def run(source: Scripts, *, slots: int = 1, gpus: int = 0) -> bool:
    return Scheduler(source, slots=slots, leases=Leases([str(i) for i in range(gpus)])).run()


def test_jobs_run_in_order_and_are_told_apart(tmp_path: Path) -> None:
    source = Scripts(tmp_path, "cat; echo to stderr >&2", "exit 3", "kill -9 $$")
    assert run(source)
    assert source.ends == [("job0", 0, None, False), ("job1", 3, None, False), ("job2", -9, None, False)]
    assert (tmp_path / "job0.log").read_text() == "hello job0\nto stderr\n"
    assert source.most == 1


def test_as_many_at_a_time_as_there_are_slots(tmp_path: Path) -> None:
    """Each waits for the other, so that one at a time would never end."""
    meet = 'touch "$OUT/here-$NAME"; for i in $(seq 500); do [ $(ls "$OUT"/here-* | wc -l) -ge 2 ] && exit 0; sleep 0.02; done; exit 1'
    source = Scripts(tmp_path, meet, meet, "true", "true")
    assert run(source, slots=2)
    assert [code for _, code, _, _ in source.ends] == [0, 0, 0, 0]
    assert source.most == 2


def test_gpus_are_lent_and_come_back(tmp_path: Path) -> None:
    source = Scripts(tmp_path, *['echo "$GPUS" > "$OUT/$NAME.gpus"; sleep 0.2'] * 4, gpus=2)
    assert run(source, slots=8, gpus=5)
    assert source.most == 2, "five GPUs serve two jobs of two"
    assert [gpus for _, gpus in source.starts[:2]] == [["0", "1"], ["2", "3"]]
    assert [(tmp_path / f"{name}.gpus").read_text().strip().split(",") for name, _ in source.starts] == [gpus for _, gpus in source.starts]


def test_a_hopeless_job_is_stopped_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "WATCH", 0.1)
    source = Scripts(tmp_path, 'touch "$OUT/stop-$NAME"; exec sleep 300', "true")
    assert run(source)
    assert source.ends == [("job0", -9, "it is hopeless", False), ("job1", 0, None, False)]


def test_an_error_of_the_source_leaves_no_job(tmp_path: Path) -> None:
    class Broken(Scripts):
        def next(self) -> Task | None:
            if not self.todo:
                wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip())
                raise RuntimeError("no more")
            return super().next()

    with pytest.raises(RuntimeError, match="no more"):
        run(Broken(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 300"), slots=2)
    all_end([int((tmp_path / "pid").read_text())])


# --- signals to the command ------------------------------------------------------------------------------------------------------

COMMAND = """
import sys
sys.path.insert(0, {here!r})
from pathlib import Path
from test_scheduler import Scripts, run
source = Scripts(Path(sys.argv[1]), *sys.argv[2:])
whole = run(source, slots=2)
print(whole, source.ends, flush=True)
"""
SAVES = 'trap \'touch "$OUT/saved-$NAME-$RANDOM"; exit 1\' INT; echo $$ > "$OUT/pid-$NAME"; while true; do sleep 0.05; done'
STUBBORN = 'trap "" INT; echo $$ > "$OUT/pid-$NAME"; while true; do sleep 0.05; done'


def command(folder: Path, *scripts: str) -> subprocess.Popen[str]:
    code = COMMAND.format(here=str(HERE))
    hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([sys.executable, "-c", code, str(folder), *scripts], stdout=subprocess.PIPE, text=True, preexec_fn=hear)


def pids(folder: Path, count: int) -> list[int]:
    wait_until(lambda: sum(bool(file.read_text().strip()) for file in folder.glob("pid-*")) == count)
    return [int(file.read_text()) for file in folder.glob("pid-*")]


def test_ctrl_c_is_passed_on_once_and_nothing_more_starts(tmp_path: Path) -> None:
    sweep = command(tmp_path, SAVES, SAVES, "touch $OUT/third")
    running = pids(tmp_path, 2)
    sweep.send_signal(signal.SIGINT)
    out, _ = sweep.communicate(timeout=30)
    ends = ["('job0', 1, None, True)", "('job1', 1, None, True)"]
    assert out in (f"False [{', '.join(order)}]\n" for order in (ends, ends[::-1]))
    assert len(list(tmp_path.glob("saved-*"))) == 2, "each heard it once"
    assert not (tmp_path / "third").exists()
    all_end(running)


def test_a_second_ctrl_c_kills(tmp_path: Path) -> None:
    sweep = command(tmp_path, STUBBORN)
    running = pids(tmp_path, 1)
    sweep.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert alive(running[0]) and sweep.poll() is None, "the first one is a request"
    sweep.send_signal(signal.SIGINT)
    out, _ = sweep.communicate(timeout=30)
    assert out == "False [('job0', -9, None, True)]\n"
    all_end(running)


def test_term_leaves_no_job(tmp_path: Path) -> None:
    sweep = command(tmp_path, STUBBORN, STUBBORN)
    running = pids(tmp_path, 2)
    os.kill(sweep.pid, signal.SIGTERM)
    sweep.communicate(timeout=30)
    assert sweep.returncode == 128 + signal.SIGTERM
    all_end(running)
