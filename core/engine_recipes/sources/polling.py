"""Progress of a download that another library or program does: looks at how much has arrived, now and then."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .. import events


@contextmanager
def watch(label: str, total: int, arrived: Callable[[], int], every: float = 0.5) -> Iterator[None]:
    """Report `arrived()` of `total` bytes every so many seconds while the block runs, and once more when it is done.

    `total` 0 means unknown.
    """
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(every):
            done = arrived()
            events.progress(label, min(done, total) if total else done, total, "B")

    thread = threading.Thread(target=look, daemon=True)
    events.progress(label, 0, total, "B")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    events.progress(label, total, total, "B")


def bytes_below(folder: Path) -> int:
    """Bytes of all files in a folder and below. Files that come and go meanwhile do not matter."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except OSError:
                continue
    return total
