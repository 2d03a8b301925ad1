"""Bytes in words, and room on disks: asked before work, not found out in the middle of it."""

from __future__ import annotations

from pathlib import Path

from .errors import MachineError


def human_bytes(count: float) -> str:
    """`1.5 GB`, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk that holds a folder, or will hold it once it is made."""
    import shutil

    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free


def require_room(
    what: str, need: int, folder: Path, hint: str = "free some disk space, or choose another place with --workspace"
) -> None:
    """Raise MachineError unless `need` bytes are free where `folder` is. `what` begins the message: `stage 1`."""
    free = free_bytes(folder)
    if free < need:
        raise MachineError(f"{what} needs {human_bytes(need)} in {folder}, {human_bytes(free)} are free", hint)
