from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROLOGUE = """
import os, shutil, sys
from pathlib import Path
from engine_recipes.confine import confine, files_of
root = Path(sys.argv[1])
store, mine, source, hub = root / "store", root / "store/mine", root / "source", root / "hub/snapshots/r1"
protected = [store, root / "on-another-disk", *files_of(source), *files_of(hub)]
confine("stage1 of precision acme", "acme-pack", protected, [mine])
"""
TRICKS = {
    "write": "(store / 'other/file').write_text('x')",
    "append": "open(store / 'other/file', 'a')",
    "update": "open(store / 'other/file', 'r+b')",
    "os.open": "os.open(store / 'other/file', os.O_WRONLY)",
    "new file": "(store / 'new').touch()",
    "bytes path": "open(os.fsencode(store / 'other/file'), 'wb')",
    "relative": "os.chdir(mine); open('../other/file', 'w')",
    "by a link": "(mine / 'link').symlink_to(store / 'other/file'); open(mine / 'link', 'w')",
    "into the source": "(source / 'model.safetensors').write_text('x')",
    "into a cache of links": "open(hub / 'model.safetensors', 'r+b')",
    "into what the link leads to": "open(root / 'hub/blobs/b1', 'r+b')",
    "remove the link": "(hub / 'model.safetensors').unlink()",
    "replace the link": "(mine / 'a').touch(); os.replace(mine / 'a', hub / 'model.safetensors')",
    "move the store away": "os.rename(store, root / 'elsewhere')",
    "move what holds the store": "os.rename(root, root.with_name('gone'))",
    "times": "os.utime(store / 'other/file', (0, 0))",
    "a database": "import sqlite3; sqlite3.connect(store / 'other/file')",
    "mkdir": "(store / 'engine').mkdir()",
    "remove": "(store / 'other/file').unlink()",
    "remove a tree": "shutil.rmtree(store / 'other')",
    "move away": "os.rename(store / 'other/file', mine / 'taken')",
    "move onto": "(mine / 'a').touch(); os.replace(mine / 'a', store / 'other/file')",
    "move by shutil": "shutil.move(store / 'other', mine / 'other')",
    "link": "os.link(mine / 'kept', store / 'other/more')",
    "symlink": "(store / 'plain').symlink_to('other')",
    "truncate": "os.truncate(store / 'other/file', 0)",
    "chmod": "(store / 'other/file').chmod(0)",
    "remove the link to it": "(root / 'on-another-disk').unlink()",
    "by descriptor": "fd = os.open(store / 'other', os.O_RDONLY); os.unlink('file', dir_fd=fd)",
}
FREE = {
    "own folder": "(mine / 'deep').mkdir(); (mine / 'deep/file').write_text('x'); shutil.rmtree(mine / 'deep')",
    "own folder again": "mine.mkdir(parents=True, exist_ok=True)",
    "reading": "(store / 'other/file').read_text(); (source / 'model.safetensors').read_bytes()",
    "copying in": "shutil.copy(store / 'other/file', mine / 'copy')",
    "elsewhere": "(root / 'elsewhere').write_text('x')",
    "temporary files": "import tempfile; tempfile.TemporaryDirectory().cleanup()",
    "beside the source": "(source / 'venv').mkdir(); (source / 'venv/cache.pyc').write_text('x')",
    "folders that are there": "os.makedirs(store / 'other', exist_ok=True); source.mkdir(exist_ok=True)",
    "who only tries": "try:\n    (store / 'other/file').write_text('x')\nexcept OSError:\n    pass",
    "an event of somebody else's": "sys.audit('open', 'x'); sys.audit('os.rename')",
    "a similar name": "(root / 'store-of-another').mkdir()",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("store/other", "store/mine", "source", "hub/snapshots/r1", "hub/blobs"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("store/other/file", "source/model.safetensors", "store/mine/kept", "hub/blobs/b1"):
        (tmp_path / file).write_text("precious")
    (tmp_path / "on-another-disk").symlink_to("store")
    (tmp_path / "hub/snapshots/r1/model.safetensors").symlink_to("../../blobs/b1")
    return tmp_path


def python(code: str, root: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-c", PROLOGUE + code, str(root)]
    return subprocess.run(words, capture_output=True, text=True, env=environment, check=False)


def state(root: Path) -> dict[str, object]:
    files = [p for folder in ("store", "source", "hub") for p in (root / folder).rglob("*")]
    found = [p for p in files if root / "store/mine" not in p.parents]
    return {str(p): (p.stat().st_mode, p.read_text() if p.is_file() else "") for p in found}


@pytest.mark.parametrize("trick", TRICKS)
def test_what_is_not_its_own_stays_as_it_is_and_the_culprit_is_named(root: Path, trick: str) -> None:
    before = state(root)
    done = python(TRICKS[trick], root)
    assert "Trespass: stage1 of precision acme would write to" in done.stderr
    assert "acme-pack" in done.stderr
    assert state(root) == before


@pytest.mark.parametrize("deed", FREE)
def test_everything_else_is_free(root: Path, deed: str) -> None:
    done = python(FREE[deed], root)
    assert done.returncode == 0, done.stderr
