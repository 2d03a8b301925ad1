"""The identity of a checkpoint in a local folder: its contents.

Digests are remembered per file, so that a build with nothing to do does not read gigabytes again.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .. import events
from ..errors import RequestError
from . import layout

_CHUNK = 4 << 20
#: A file changed this recently (seconds) may change again without its time stamp moving: not remembered.
_RECENT = 2.0

Memo = dict[str, dict[str, Any]]


def tree_identity(folder: Path, workspace: Path | None = None, remember: bool = True) -> str:
    """sha256, as 64 hex digits, over names and contents of the files that matter; other files may come and go.

    Args:
        folder: in the Hugging Face layout.
        workspace: digests of unchanged files are taken from `digests.json` in it, and new ones stored there. It may
            be missing, damaged or read-only: that costs time, nothing else.
        remember: False stores nothing.

    Raises:
        RequestError: the index is damaged or a weight file is missing.
    """
    names = relevant(folder)
    memo = _read_memo(workspace)
    fresh = _Digests(memo, sum((folder / name).stat().st_size for name in names))
    lines = [f"{name}\0{fresh.digest(folder / name)}\n" for name in names]
    if fresh.added and remember:
        _write_memo(workspace, {**memo, **fresh.added})
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def relevant(folder: Path) -> list[str]:
    """Sorted names of the files whose content decides what is built: weights, configuration, tokenizer, templates."""
    try:
        weights = layout.shards(folder)
    except (OSError, ValueError) as error:
        raise RequestError(f"{layout.INDEX} is damaged: {error}", "copy or download the file again") from None
    for name in weights:
        if not (folder / name).is_file():
            from ..checkpoint.source import no_weights

            if name == layout.SINGLE:
                raise no_weights(folder)
            raise RequestError(f"{name} is missing in {folder}", "copy or download the whole checkpoint")
    return sorted({*weights, *_beside(folder)})


def names_digest(folder: Path) -> str:
    """Eight hex digits over the names of the files beside the weights that are there. Reads none of them."""
    return hashlib.sha256("\0".join(sorted(_beside(folder))).encode()).hexdigest()[:8]


def _beside(folder: Path) -> list[str]:
    return [name for name in (layout.INDEX, *layout.SIDE_FILES) if (folder / name).is_file()]


class _Digests:
    """sha256 of files, with progress once it takes longer than a second. `added` is what was not remembered."""

    def __init__(self, memo: Mapping[str, Mapping[str, Any]], total: int) -> None:
        self.memo = memo
        self.added: Memo = {}
        self.total = total
        self.done = 0
        self.next_report = time.monotonic() + 1

    def digest(self, path: Path) -> str:
        path = path.resolve()
        before = _stamp(path)
        known = self.memo.get(str(path), {})
        if {**before, "sha256": known.get("sha256")} == known:
            self.done += before["size"]
            return str(known["sha256"])
        digest = self._read(path)
        # A file that changes while it is read, or has only just changed, gets no entry: its time stamp proves nothing.
        if _stamp(path) == before and time.time() - before["mtime_ns"] / 1e9 > _RECENT:
            self.added[str(path)] = {**before, "sha256": digest}
        return digest

    def _read(self, path: Path) -> str:
        sha256 = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                sha256.update(chunk)
                self.done += len(chunk)
                if time.monotonic() > self.next_report:
                    self.next_report = time.monotonic() + 0.5
                    events.progress(f"reading {path.name}", self.done, self.total, "B")
        return sha256.hexdigest()


def digest_of(files: Iterable[Path]) -> str:
    """sha256 over names and contents of files in order. Reads all of them."""
    files = list(files)
    digests = _Digests({}, sum(path.stat().st_size for path in files))
    lines = [f"{path.name} {digests.digest(path)}" for path in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _stamp(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}


def _read_memo(workspace: Path | None) -> Memo:
    if workspace is None:
        return {}
    try:
        memo = json.loads((workspace / "digests.json").read_text(encoding="utf-8"))
        return {path: dict(entry) for path, entry in memo["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write_memo(workspace: Path | None, memo: Memo) -> None:
    """Replace the file in one step. Two writers at once: the last one wins, the other hashes again next time."""
    if workspace is None:
        return
    files = {path: entry for path, entry in sorted(memo.items()) if os.path.exists(path)}
    try:
        workspace.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".digests-", dir=workspace)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"schema": 1, "files": files}, file, indent=1)
            os.replace(name, workspace / "digests.json")
        except OSError:
            os.unlink(name)
            raise
    except OSError as error:
        events.log(f"digests.json is not written ({error}): the next build reads the checkpoint again")
