from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine_recipes import leftovers

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="the system has no /proc")
SLEEP = "import time; time.sleep(600)"
#: A daemon: a child of a child, in a session of its own, whose parents have ended.
DAEMON = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {SLEEP!r}], stdout=subprocess.DEVNULL, start_new_session=True)
print(child.pid, flush=True)
"""


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def start(mark: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", DAEMON], stdout=subprocess.PIPE, env={**os.environ, leftovers.MARK: mark}, check=True
    )
    return int(done.stdout)


def test_a_daemon_is_ended_and_named() -> None:
    pid = start("one")
    assert runs(pid)
    (name,) = leftovers.end("one")
    assert name.startswith("python")
    deadline = time.monotonic() + 10
    while runs(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not runs(pid)


def test_another_stages_processes_and_unmarked_ones_stay() -> None:
    pid = start("other")
    try:
        assert leftovers.end("two") == []
        assert leftovers.end("") == []
        assert leftovers.end("othe") == []
        assert runs(pid)
    finally:
        os.kill(pid, 9)


def test_the_process_that_asks_is_not_ended() -> None:
    code = "from engine_recipes import leftovers; print(leftovers.end('me'))"
    environment = {**os.environ, leftovers.MARK: "me", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
