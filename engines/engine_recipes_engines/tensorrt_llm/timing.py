"""TensorRT's timing cache: how long each kernel took on this kind of GPU, kept from one build to the next."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine_recipes import events

_LOCK_SECONDS = 60.0  # copying a few megabytes takes none


class TimingCache:
    """One file in the engine's cache folder, lent to a build as a copy and replaced by what the build makes of it.

    Attributes:
        path: where it is kept; None: nowhere.
        copy: where the build reads and writes it.
    """

    def __init__(self, folder: Path, name: str, copy: Path) -> None:
        self.path = None if folder == Path() else folder / f"{name}.cache"
        self.copy = copy

    def lend(self) -> bool:
        """Make the copy. False if there is nothing to lend."""
        if not self.path or not self.path.is_file():
            return False
        return self._locked(lambda path: shutil.copyfile(path, self.copy))

    def keep(self) -> None:
        """Take back what the build made of it."""
        if self.copy.is_file() and self.copy.stat().st_size:
            self._locked(lambda path: shutil.move(self.copy, path))
        self.copy.unlink(missing_ok=True)

    def forget(self) -> None:
        """Throw it away."""
        self._locked(lambda path: path.unlink(missing_ok=True))
        self.copy.unlink(missing_ok=True)

    def _locked(self, act: Callable[[Path], Any]) -> bool:
        """Do it while no other build does. A cache saves time only: what goes wrong with it stops no build."""
        from filelock import FileLock, Timeout

        if not self.path:
            return False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock", timeout=_LOCK_SECONDS):
                act(self.path)
            return True
        except (OSError, Timeout) as error:
            events.warn(f"the timing cache {self.path} is not used: {error}")
            with suppress(OSError):
                self.copy.unlink(missing_ok=True)
            return False
