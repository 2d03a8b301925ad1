"""What a worker may not write to: what other stages made, and the source. Anything else is the system's business.

A guard against mistakes, not against malice: it sees what Python code opens, renames and removes (PEP 578), not what a
C library does by itself. For that the runner looks afterwards whether the inputs are as they were.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .errors import StageFailed

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
#: Audit event (https://docs.python.org/3/library/audit_events.html) -> places of (path, directory) in its arguments.
_EVENTS: Mapping[str, tuple[tuple[int, int | None], ...]] = {
    "open": ((0, None),),
    "os.chmod": ((0, 2),),
    "os.link": ((1, 3),),
    "os.mkdir": ((0, 2),),
    "os.remove": ((0, 1),),
    "os.rename": ((0, 2), (1, 3)),
    "os.rmdir": ((0, 1),),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
}
#: Of these, what happens to a link happens to what it leads to.
_FOLLOW = ("open", "os.chmod", "os.truncate")


def confine(who: str, package: str, protected: Iterable[Path], allowed: Iterable[Path]) -> None:
    """From now on, and until this process ends, refuse to write below `protected`, except below `allowed`.

    Args:
        who: the provider, for the message.
        package: whose it is.

    Raises:
        StageFailed: from whatever call would write there.
    """
    walls = tuple(_prefix(path) for path in protected)
    doors = tuple(_prefix(path) for path in allowed)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        places = _EVENTS.get(event)
        if places is None or (event == "open" and not (arguments[2] or 0) & _WRITES):
            return
        for place, directory in places:
            path = _real(event, arguments[place], None if directory is None else arguments[directory])
            if path.startswith(walls) and not path.startswith(doors):
                raise StageFailed(
                    f"{who} would write to {path.rstrip(os.sep)}, which is not its own",
                    f"nothing was changed there; report this to the authors of {package}: a stage writes into "
                    "`context.out` alone",
                )

    sys.addaudithook(watch)


def _prefix(path: Path) -> str:
    return os.path.join(os.path.realpath(path), "")


def _real(event: str, path: Any, directory: Any) -> str:
    """What an event is about, with a separator at its end; empty for a file that is open already."""
    if isinstance(path, int):
        return ""
    text = os.fsdecode(path)
    if isinstance(directory, int) and directory >= 0:
        text = os.path.join(os.path.realpath(f"/proc/self/fd/{directory}"), text)
    if event in _FOLLOW:
        return os.path.join(os.path.realpath(text), "")
    folder, name = os.path.split(os.path.abspath(text))
    return os.path.join(os.path.realpath(folder), name, "")
