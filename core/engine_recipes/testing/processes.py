"""Fresh processes for cases: what would hang, crash or import too much must not do it in the tests' own process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from .faults import Fault
from .lab import MARK, Lab

#: -c rather than -m, and the path as it is here: the same packages are found, and nothing of the current folder.
_START = (
    "import sys; answer, sys.path[:] = sys.argv[1], sys.argv[2:];"
    " from engine_recipes.testing.children import main; main(answer)"
)
#: Seconds that a child gets; on a busy machine importing torch alone takes twenty.
LIMIT = 180


def start(
    lab: Lab, action: str, request: Mapping[str, Any], **environment: str
) -> tuple[subprocess.Popen[bytes], Path]:
    """Start `children.ACTIONS[action]` on plain data; also the file that gets its answer."""
    number = len(list(lab.place("answers").iterdir()))
    answer = lab.place("answers") / f"{number}-{action}.json"
    answer.touch()
    child = subprocess.Popen(
        [sys.executable, "-c", _START, str(answer), *[p or os.getcwd() for p in sys.path]],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=(lab.place("logs") / f"{number}-{action}.log").open("wb"),
        env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, MARK: str(lab.folder), **environment},
        start_new_session=True,
    )
    assert child.stdin
    child.stdin.write(json.dumps({"action": action, **request}).encode())
    child.stdin.close()
    return child, answer


def ask(lab: Lab, action: str, request: Mapping[str, Any], limit: float = LIMIT, **environment: str) -> Any:
    """What a child answers.

    Raises:
        Fault: it hangs, dies or breaks; what it was doing is said.
    """
    child, answer = start(lab, action, request, **environment)
    try:
        code = child.wait(limit)
        ending = f"ended with exit code {code}" if code >= 0 else f"was killed by signal {-code}"
    except subprocess.TimeoutExpired:
        ending = f"was not done after {limit:g} s"
    finally:
        end(child)
    said = answered(answer)
    if "value" in said:
        return said["value"]
    log = lab.place("logs") / f"{answer.stem}.log"
    last = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
    raise Fault(f"a process that checks this {ending} while it was at: {said.get('at', action)}\n{last}")


def answered(answer: Path) -> dict[str, Any]:
    """The last complete line that a child wrote: `value`, or what it was `at`."""
    for line in reversed(answer.read_text(encoding="utf-8").splitlines()):
        try:
            return dict(json.loads(line))
        except ValueError:
            continue
    return {}


def end(child: subprocess.Popen[bytes]) -> None:
    """Kill it and its children."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def left_over(lab: Lab, patience: float = 3.0) -> list[str]:
    """Command lines of processes that cases of this lab started and that do not end by themselves.

    They are known by their environment, as Linux shows it; elsewhere none is found.
    """
    deadline = time.monotonic() + patience
    while found := _marked(lab):
        if time.monotonic() > deadline:
            return list(found.values())
        time.sleep(0.05)
    return []


def kill_left_over(lab: Lab) -> None:
    """End them, so that the next case does not find them again."""
    for pid in _marked(lab):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _marked(lab: Lab) -> dict[int, str]:
    mark = f"{MARK}={lab.folder}".encode()
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int(folder.name) != os.getpid() and mark in (folder / "environ").read_bytes().split(b"\0"):
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found[int(folder.name)] = line.strip()[:200]
        except OSError:  # it is another user's, or has ended meanwhile
            continue
    return found
