"""What a worker may not write to: what others keep in the workspace, and the source. The rest is the system's business.

A guard against mistakes, not against malice: it sees what Python code opens, renames and removes (PEP 578), not what a
C library does by itself. For that the runner looks afterwards whether the inputs are as they were.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from . import events
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
    "os.utime": ((0, 3),),
    "sqlite3.connect": ((0, None),),
}
#: Of these, what happens to a link happens to what it leads to.
_FOLLOW = ("open", "os.chmod", "os.truncate", "os.utime", "sqlite3.connect")
#: These take along what lies below.
_MOVE = ("os.rename", "os.rmdir")


class Trespass(StageFailed, PermissionError):
    """A stage would write to what is not its own. A PermissionError, so that libraries which only try to write, to keep
    something for later, go on without."""


def confine(who: str, package: str, protected: Iterable[Path], allowed: Iterable[Path]) -> None:
    """From now on, and until this process ends, refuse to write to or below `protected`, except below `allowed`.

    Args:
        who: the provider, for the message.
        package: whose it is.

    Raises:
        Trespass: from whatever call would write there.
    """
    walls = tuple(wall for path in protected for wall in (_prefix(path), _prefix(path, follow=False)))
    doors = tuple(_prefix(path) for path in allowed)
    told = False

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal told
        places = _EVENTS.get(event)
        if places is None or (event == "open" and not (len(arguments) > 2 and (arguments[2] or 0) & _WRITES)):
            return
        for place, directory in places:
            if place >= len(arguments):  # raised by somebody else, under the same name
                return
            of = None if directory is None or directory >= len(arguments) else arguments[directory]
            for path in _real(event, arguments[place], of):
                inside = path.startswith(walls) or (event in _MOVE and any(wall.startswith(path) for wall in walls))
                if inside and not path.startswith(doors) and not (event == "os.mkdir" and os.path.isdir(path)):
                    what = f"{who} would write to {path.rstrip(os.sep)}, which is not its own"
                    if not told:  # once: who ignores errors may try a thousand files
                        told = True
                        events.log(f"{what}: this was refused")
                    raise Trespass(
                        what,
                        f"this was refused; report it to the authors of {package}: a stage writes into `context.out` "
                        "alone",
                    )

    sys.addaudithook(watch)


def files_of(folder: Path) -> list[Path]:
    """The files at the top of a folder, and what they lead to: those of a Hugging Face cache are links."""
    found = [path for path in sorted(folder.iterdir()) if path.is_file()] if folder.is_dir() else []
    return [*found, *(path.resolve() for path in found if path.is_symlink())]


def _prefix(path: Path, follow: bool = True) -> str:
    """Of a folder's own path the links are resolved, of a file's, and of a link's own, those on the way to it."""
    if follow and path.is_dir():
        return os.path.join(os.path.realpath(path), "")
    return os.path.join(os.path.realpath(path.parent), path.name, "")


def _real(event: str, path: Any, directory: Any) -> list[str]:
    """What an event is about, each with a separator at its end; nothing for a file that is open already."""
    if not isinstance(path, (str, bytes, os.PathLike)):
        return []
    text = os.fsdecode(path)
    if isinstance(directory, int) and directory >= 0:
        text = os.path.join(os.path.realpath(f"/proc/self/fd/{directory}"), text)
    folder, name = os.path.split(os.path.abspath(text))
    found = [os.path.join(os.path.realpath(folder), name, "")]
    return [*found, os.path.join(os.path.realpath(text), "")] if event in _FOLLOW else found
