"""Running a tool of the user's: line by line, for a limited time, and to the end of all that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, Queue
from typing import IO

_SETTINGS = {"PYTHONUNBUFFERED": "1", "TRTLLM_NO_USAGE_STATS": "1"}
_POLL = 0.2  # seconds
_GRACE = 5.0  # seconds that a tool gets to end by itself, and its pipe to run dry


class TooLate(Exception):
    """The time was over. The tool and what it started are gone."""


def run(argv: Sequence[str], listen: Callable[[str], None], seconds: float = 0, cwd: Path | None = None) -> int:
    """Run a command.

    Args:
        argv: the words; no shell sees them.
        listen: gets each line of stdout and stderr, in the order in which they come.
        seconds: most that it may take; 0: any.

    Returns:
        Its exit code; negative if a signal ended it, or a child of its own that a container or a script ran it as.

    Raises:
        TooLate: it took longer.
        OSError: it cannot be started.
    """
    # the same process group as ours: what ends a worker, by whatever signal, ends its tools as well
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **_SETTINGS},
        cwd=cwd,
        encoding="utf-8",
        errors="replace",
    )
    try:
        for line in _lines(process, time.monotonic() + seconds if seconds else float("inf")):
            listen(line)
    finally:
        end(process)
    code = process.returncode
    return 128 - code if 128 < code < 128 + signal.NSIG else code


def _lines(process: subprocess.Popen[str], deadline: float) -> Iterator[str]:
    """What it says until it has ended. A child that it leaves behind may hold the pipe open for ever."""
    assert process.stdout
    inbox: Queue[str | None] = Queue()
    threading.Thread(target=_receive, args=(process.stdout, inbox), daemon=True).start()
    ended = 0.0
    while True:
        with suppress(Empty):
            line = inbox.get(timeout=_POLL)
            if line is None:
                break
            yield line
        if process.poll() is not None:
            ended = ended or time.monotonic()
            if time.monotonic() - ended > _GRACE:
                return
        elif time.monotonic() > deadline:
            raise TooLate
    while process.poll() is None:  # it has closed its output and works on
        if time.monotonic() > deadline:
            raise TooLate
        time.sleep(_POLL)


def _receive(pipe: IO[str], inbox: Queue[str | None]) -> None:
    with pipe, suppress(ValueError):
        for line in pipe:
            inbox.put(line.rstrip())
    inbox.put(None)


def end(process: subprocess.Popen[str]) -> None:
    """End a process and its descendants, if they have not ended."""
    if process.poll() is not None:
        return
    tree = [process.pid, *descendants(process.pid)]
    _send(tree, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE)
    _send({*tree, *(descendants(process.pid) if process.returncode is None else ())}, signal.SIGKILL)
    process.wait()


def _send(pids: Iterable[int], sign: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, sign)


def descendants(pid: int) -> list[int]:
    """Children, and theirs. Empty where the system has no /proc."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            # the name, in brackets, may hold anything; the parent is the second field after it
            parent = int(stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = children.get(pid, [])
    for child in found:
        found += children.get(child, [])
    return found
