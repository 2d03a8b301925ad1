"""What a stage must leave: a folder that is whole wherever it is moved, with no file under a name of ours."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import StageFailed

#: What core writes beside a stage's files: what was built, and the verdict on it.
_OURS = ("manifest.json", "validation.json")


def check(out: Path, who: str) -> None:
    """That a stage's folder can be published.

    Args:
        who: whose stage it is, for the message: `engine acme (acme-pack 1.0)`.

    Raises:
        StageFailed: it is no folder any more, has a link that will not lead to a file of its own once it is moved, or
            a file under a name of ours.
    """
    if out.is_symlink() or not out.is_dir():
        raise _failed(
            who, f"{out} is no folder any more", "a stage writes into `context.out` and leaves it in its place"
        )
    for name in _OURS:
        if os.path.lexists(out / name):
            raise _failed(who, f"{name} is not for a stage to write", "another name must be chosen for it")
    for path in out.rglob("*"):
        if path.is_symlink() and not _stays(path, out):
            what = f"{path.name} is a link that leads out of the stage's folder, to {os.readlink(path)}"
            raise _failed(who, what, "files are copied, or linked by a path that stays inside the folder")


def _stays(link: Path, out: Path) -> bool:
    """Whether a link leads to what is in the folder, by a path without the folder's name: it will have another."""
    way = os.path.normpath(os.path.join(link.parent.relative_to(out), os.readlink(link)))
    inside = os.path.realpath(link).startswith(os.path.join(os.path.realpath(out), ""))
    return inside and not os.path.isabs(way) and way.split(os.sep)[0] != os.pardir


def _failed(who: str, what: str, how: str) -> StageFailed:
    return StageFailed(f"{who}: {what}", f"report this to its authors: {how}")
