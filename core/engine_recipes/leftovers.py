"""Processes that outlive the worker that started them: found by a mark in their environment, and ended.

A worker's process group is ended with it; a child that made a session of its own would stay and hold memory, a GPU or a
port for ever. Children inherit the environment, daemons too, so the mark finds them. A process that must outlive its
stage, as one that stops a container does, is started without `RECIPES_STAGE` in its environment.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

#: The variable that marks a worker and all that it starts.
MARK = "RECIPES_STAGE"
_ROUNDS = 20  # that a process gets which starts others faster than they are found
_PAUSE = 0.01  # seconds


def end(mark: str, patience: float = 0.0) -> list[str]:
    """End all processes but this one that carry the mark, by SIGKILL.

    Args:
        patience: seconds that they get to end by themselves, as those do that have been told to, or see that nobody
            needs them any more.

    Returns:
        Names of those that were ended. Empty where the system has no /proc.
    """
    late = time.monotonic() + patience
    while time.monotonic() < late and any(True for _ in _marked(mark)):
        time.sleep(_PAUSE)
    names: dict[int, str] = {}
    for _ in range(_ROUNDS):
        found = dict(_marked(mark))
        if not found:
            break
        names |= found
        for pid in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_PAUSE)
    return list(names.values())


def _marked(mark: str) -> Iterator[tuple[int, str]]:
    wanted = f"{MARK}={mark}".encode()
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # somebody else's, or it has just ended
            if wanted in environ.read_bytes().split(b"\0"):
                pid = int(environ.parent.name)
                if pid != os.getpid():
                    yield pid, (environ.parent / "comm").read_text(encoding="utf-8", errors="replace").strip()
