"""The workspace on disk: content-addressed folders, written beside and published by one rename.

A folder with `manifest.json` is complete and was verified; anything else is garbage.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import history, staged
from .errors import MachineError
from .types import Provider

MANIFEST = "manifest.json"
#: Which folder of the workspace holds what a stage leaves.
PLACES: Mapping[str, str] = {
    "resolve": "sources",
    "calibrate": "calibrations",
    "stage1": "checkpoints",
    "stage2": "engines",
    "baseline": "baselines",
}
_STAGING = ".tmp-"


@dataclass(frozen=True)
class Slot:
    """Where the artifact with this key belongs: `PLACE/LABEL-<key8>`."""

    place: str
    label: str
    key: str


def default_workspace() -> Path:
    """`RECIPES_WORKSPACE`, or `engine-recipes` in the user data directory."""
    if os.environ.get("RECIPES_WORKSPACE"):
        return Path(os.environ["RECIPES_WORKSPACE"]).expanduser()
    from platformdirs import user_data_path

    return user_data_path("engine-recipes", appauthor=False)


class Store:
    """Everything that was built. Cheap to make; creates nothing until something is written."""

    def __init__(self, workspace: Path) -> None:
        self.workspace = workspace.expanduser().absolute()

    def path(self, slot: Slot) -> Path:
        """The folder of a slot. Eight digits of the key, more only if another key already has those eight."""
        for digits in (8, 16, 64):
            folder = self.workspace / slot.place / f"{slot.label}-{slot.key[:digits]}"
            manifest = read_manifest(folder)
            if manifest is None or manifest.get("key") == slot.key:
                break
        return folder

    def get(self, slot: Slot) -> Path | None:
        """The folder, if it is complete and every file still has its size."""
        folder = self.path(slot)
        manifest = read_manifest(folder)
        return folder if manifest is not None and is_whole(folder, manifest) else None

    @contextmanager
    def lock(self, slot: Slot, on_wait: Callable[[], None]) -> Iterator[None]:
        """Hold the slot. If another process has it, call `on_wait` once and wait. The kernel frees a dead holder's."""
        with self.lock_folder(self.path(slot), on_wait, slot.place):
            yield

    @contextmanager
    def lock_folder(self, folder: Path, on_wait: Callable[[], None], place: str = "engines") -> Iterator[None]:
        """Hold a folder by its name."""
        from filelock import FileLock, Timeout

        lock = FileLock(self._lock_path(place, folder.name))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            on_wait()
            lock.acquire(poll_interval=0.2)
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def staging(self, slot: Slot) -> Iterator[Path]:
        """A fresh folder beside the final one. It is removed at the end unless `commit` has moved it away."""
        with self.scratch(self.path(slot)) as folder:
            yield folder

    @contextmanager
    def scratch(self, final: Path) -> Iterator[Path]:
        """A fresh folder for work on `final`, whose lock is held; what a killed process left of the same is swept."""
        import shutil

        # an engine that came from elsewhere is judged here, not where it lies
        place = final.parent if final.parent.parent == self.workspace else self.workspace / "engines"
        self._make(place)
        for old in place.glob(f"{_STAGING}{glob.escape(final.name)}-*"):
            shutil.rmtree(old, ignore_errors=True)
        folder = place / f"{_STAGING}{final.name}-{_unique()}"
        folder.mkdir()
        try:
            yield folder
        finally:
            if folder.is_symlink() or folder.is_file():
                folder.unlink()
            shutil.rmtree(folder, ignore_errors=True)

    def commit(self, slot: Slot, staging: Path, manifest: Mapping[str, Any]) -> Path:
        """Write the manifest last, then publish by one rename. Replaces what stood there under the same key."""
        import shutil

        final = self.path(slot)
        staged.check(staging, str(Provider(**manifest["provider"])) if "provider" in manifest else slot.label)
        files = {str(f.relative_to(staging)): f.stat().st_size for f in sorted(staging.rglob("*")) if f.is_file()}
        for name in files:
            sync(staging / name)  # or a power cut could leave a folder that only looks whole
        write_json(staging / MANIFEST, {**manifest, "key": slot.key, "files": files})
        if final.exists():
            old = final.with_name(f"{_STAGING}{final.name}-{_unique()}")
            final.rename(old)
            staging.rename(final)
            shutil.rmtree(old, ignore_errors=True)
        else:
            staging.rename(final)
        sync(final.parent)
        return final

    def log_path(self, folder: Path, place: str = "engines") -> Path:
        """Where the output of the tools that make or judge a folder is kept, also of failed runs."""
        return self._make(self.workspace / "logs") / f"{place}-{folder.name}.log"

    def cache(self, engine: str) -> Path:
        """What an engine keeps from one build to the next; not made here."""
        return self.workspace / "caches" / engine

    @property
    def kept(self) -> list[Path]:
        """All that is kept here, also what is not there yet. Not the workspace itself: it may be somebody's home."""
        others = ("locks", "logs", "caches", history.NAME, "digests.json")
        return [*self.places, *(self.workspace / name for name in others)]

    @property
    def places(self) -> list[Path]:
        """The folders that hold artifacts."""
        return [self.workspace / place for place in dict.fromkeys(PLACES.values())]

    def owns(self, folder: Path) -> bool:
        """Whether an artifact's folder is one of this workspace's."""
        return folder.parent in self.places

    def holds(self, engine: Path) -> bool:
        """Whether an engine's folder is one of this workspace's."""
        return engine.parent == self.workspace / "engines"

    def link(self, engine: Path) -> Path:
        """Point the plain name (the folder's name without its key) at this engine. Atomic."""
        plain = self.plain(engine)
        fresh = plain.with_name(f"{_STAGING}{plain.name}-{_unique()}")
        fresh.symlink_to(engine.name, target_is_directory=True)
        os.replace(fresh, plain)
        return plain

    def unlink(self, engine: Path) -> None:
        """Take the plain name away from this engine, if it has it."""
        if self.is_published(engine):
            self.plain(engine).unlink()

    def is_published(self, engine: Path) -> bool:
        """Whether the plain name points to this engine."""
        plain = self.plain(engine)
        return plain.is_symlink() and plain.resolve() == engine.resolve()

    def plain(self, engine: Path) -> Path:
        """The plain name of an engine folder."""
        return engine.with_name(engine.name.rpartition("-")[0])

    def artifacts(self, place: str) -> list[tuple[Path, dict[str, Any]]]:
        """Complete folders of `sources`, `checkpoints` or `engines` with their manifests, oldest first."""
        found = []
        for folder in self._folders(place):
            manifest = read_manifest(folder)
            if manifest is not None and not folder.is_symlink() and not folder.name.startswith(_STAGING):
                found.append((folder, manifest))
        return sorted(found, key=lambda pair: str(pair[1].get("created", "")))

    def garbage(self) -> list[Path]:
        """Folders that are not complete and that nobody is writing, and links that lead nowhere."""
        found = []
        for place in PLACES.values():
            for folder in self._folders(place):
                if folder.is_symlink():
                    wanted = folder.exists() and not folder.name.startswith(_STAGING)
                elif folder.name.startswith(_STAGING):
                    wanted = self.is_locked(place, folder.name.removeprefix(_STAGING).rpartition("-")[0])
                else:
                    wanted = read_manifest(folder) is not None
                if not wanted:
                    found.append(folder)
        return found

    def is_busy(self) -> bool:
        """Whether some process is building anything here."""
        from filelock import FileLock, Timeout

        for path in (self.workspace / "locks").glob("*.lock"):
            try:
                with FileLock(path, timeout=0):
                    pass
            except Timeout:
                return True
        return False

    def is_locked(self, place: str, name: str) -> bool:
        """Whether some process is writing or judging this folder."""
        from filelock import FileLock, Timeout

        lock = FileLock(self._lock_path(place, name))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return True
        lock.release()
        return False

    def _lock_path(self, place: str, name: str) -> Path:
        return self._make(self.workspace / "locks") / f"{place}-{name}.lock"

    def _folders(self, place: str) -> list[Path]:
        folder = self.workspace / place
        if not folder.is_dir():
            return []
        return sorted(entry for entry in folder.iterdir() if entry.is_dir() or entry.is_symlink())

    def _make(self, folder: Path) -> Path:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(13, "no write permission")
        except OSError as error:
            raise MachineError(
                f"the workspace {self.workspace} cannot be written: {error.strerror}",
                "choose another with --workspace DIR or RECIPES_WORKSPACE",
            ) from None
        return folder


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, or None if there is none that can be read."""
    manifest = read_json(folder / MANIFEST)
    return manifest if manifest and _is_manifest(manifest) else None


#: What may be asked of the fields of a manifest that lies in a folder from elsewhere.
_FIELDS: Mapping[str, tuple[type, ...]] = {
    "key": (str,),
    "ref": (str,),
    "stage": (str,),
    "kind": (str,),
    "created": (str,),
    "target": (str, type(None)),
    "source": (dict, str, type(None)),
    "files": (dict,),
    "set": (dict,),
    "machine": (dict,),
    "preimage": (dict,),
    "inputs": (list,),
    "seconds": (int, float),
    "peak_rss_bytes": (int,),
}


def _is_manifest(manifest: Mapping[str, Any]) -> bool:
    inputs = manifest.get("inputs", [])
    return all(isinstance(manifest[name], types) for name, types in _FIELDS.items() if name in manifest) and all(
        isinstance(given, dict) and all(isinstance(given.get(part), str) for part in ("kind", "path", "key"))
        for given in inputs
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; an empty one if there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def note(folder: Path, **more: Any) -> None:
    """Add to the manifest of a folder, if it has one; None takes away."""
    manifest = read_manifest(folder)
    if manifest:
        changed = {key: value for key, value in {**manifest, **more}.items() if value is not None}
        write_json(folder / MANIFEST, changed)


def is_whole(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether every file of the manifest is there with its size."""
    try:
        return all((folder / name).stat().st_size == size for name, size in manifest.get("files", {}).items())
    except (OSError, ValueError, TypeError, AttributeError):  # a manifest that came from elsewhere may say anything
        return False


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder; links are not followed."""
    return sum(f.lstat().st_size for f in folder.rglob("*") if not f.is_dir()) if folder.is_dir() else 0


def write_json(path: Path, value: Any) -> None:
    """Write JSON beside, flush to disk, rename."""
    fresh = path.with_name(f"{_STAGING}{path.name}-{_unique()}")
    with fresh.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def _unique() -> str:
    return os.urandom(4).hex()


def sync(path: Path) -> None:
    """Flush a file's contents, or a folder's entries, to disk, where the system can."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
