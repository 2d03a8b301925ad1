from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROLOGUE = """
import os, shutil, sys
from pathlib import Path
from engine_recipes.confine import confine
root = Path(sys.argv[1])
confine("stage1 of precision acme", "acme-pack", [root / "store", root / "source"], [root / "store/mine"])
store, mine, source = root / "store", root / "store/mine", root / "source"
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
    "by descriptor": "fd = os.open(store / 'other', os.O_RDONLY); os.unlink('file', dir_fd=fd)",
}
FREE = {
    "own folder": "(mine / 'deep').mkdir(); (mine / 'deep/file').write_text('x'); shutil.rmtree(mine / 'deep')",
    "own folder again": "mine.mkdir(parents=True, exist_ok=True)",
    "reading": "(store / 'other/file').read_text(); (source / 'model.safetensors').read_bytes()",
    "copying in": "shutil.copy(store / 'other/file', mine / 'copy')",
    "elsewhere": "(root / 'elsewhere').write_text('x')",
    "temporary files": "import tempfile; tempfile.TemporaryDirectory().cleanup()",
    "a similar name": "(root / 'store-of-another').mkdir()",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("store/other", "store/mine", "source"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("store/other/file", "source/model.safetensors", "store/mine/kept"):
        (tmp_path / file).write_text("precious")
    return tmp_path


def python(code: str, root: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-c", PROLOGUE + code, str(root)]
    return subprocess.run(words, capture_output=True, text=True, env=environment, check=False)


def state(root: Path) -> dict[str, object]:
    found = [
        p for folder in ("store", "source") for p in (root / folder).rglob("*") if root / "store/mine" not in p.parents
    ]
    return {str(p): (p.stat().st_mode, p.read_text() if p.is_file() else "") for p in found}


@pytest.mark.parametrize("trick", TRICKS)
def test_what_is_not_its_own_stays_as_it_is_and_the_culprit_is_named(root: Path, trick: str) -> None:
    before = state(root)
    done = python(TRICKS[trick], root)
    assert "StageFailed: stage1 of precision acme would write to" in done.stderr
    assert "acme-pack" in done.stderr
    assert state(root) == before


@pytest.mark.parametrize("deed", FREE)
def test_everything_else_is_free(root: Path, deed: str) -> None:
    done = python(FREE[deed], root)
    assert done.returncode == 0, done.stderr
