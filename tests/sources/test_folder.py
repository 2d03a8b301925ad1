"""Local folders: found where they are; their identity is their contents, remembered between calls."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from engine_recipes import events
from engine_recipes.errors import MachineError, RequestError
from engine_recipes.sources import download_size, fetch, folder, locate
from engine_recipes.sources.folder import tree_identity

from .files import tiny_checkpoint


def never(what: str, size: int | None) -> bool:
    raise AssertionError(f"asked about {what}")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose contents are read."""
    names: list[str] = []
    real = folder._Digests._read

    def read(self: Any, path: Path) -> str:
        names.append(path.name)
        return real(self, path)

    monkeypatch.setattr(folder._Digests, "_read", read)
    return names


def settle(path: Path) -> None:
    """Make all files look as if they had been written a while ago."""
    for file in path.iterdir():
        os.utime(file, (1_000_000_000, 1_000_000_000))


def test_a_folder_is_located_and_not_copied(checkpoint: Path, tmp_path: Path) -> None:
    found = locate([f"file:{checkpoint}"], tmp_path)
    assert found is not None
    assert (found.folder, found.revision) == (checkpoint, None)
    assert found.identity == f"file:sha256:{tree_identity(checkpoint)}"
    assert fetch([str(checkpoint)], tmp_path, confirm=never).folder == checkpoint
    assert download_size([str(checkpoint)], tmp_path) == (found.source, 0)


def test_a_relative_path_becomes_absolute(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint.parent)
    found = locate([f"./{checkpoint.name}"], tmp_path)
    assert found is not None and found.folder == checkpoint


def test_the_first_folder_that_exists_wins(checkpoint: Path, tmp_path: Path) -> None:
    found = locate(["file:/does/not/exist", f"file:{checkpoint}"], tmp_path)
    assert found is not None and found.folder == checkpoint


def test_a_folder_that_does_not_exist_cannot_be_fetched(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="/does/not/exist") as caught:
        fetch(["file:/does/not/exist"], tmp_path, confirm=never)
    assert len(str(caught.value).splitlines()) == 2
    with pytest.raises(MachineError, match="/does/not/exist"):
        download_size(["file:/does/not/exist"], tmp_path)
    with pytest.raises(RequestError, match="names no source"):
        fetch([], tmp_path, confirm=never)


def test_identity_is_the_contents_and_not_the_place(tmp_path: Path) -> None:
    one, two = tiny_checkpoint(tmp_path / "one"), tiny_checkpoint(tmp_path / "two")
    assert tree_identity(one) == tree_identity(two)
    (two / "README.md").write_text("no matter")
    (two / "optimizer.pt").write_text("no matter")
    assert tree_identity(one) == tree_identity(two)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "model.safetensors"])
def test_every_file_that_matters_changes_the_identity(checkpoint: Path, name: str) -> None:
    before = tree_identity(checkpoint)
    data = bytearray((checkpoint / name).read_bytes())
    data[-1] ^= 1
    (checkpoint / name).write_bytes(data)
    assert tree_identity(checkpoint) != before


def test_a_new_chat_template_changes_the_identity(checkpoint: Path) -> None:
    before = tree_identity(checkpoint)
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    assert tree_identity(checkpoint) != before


def test_only_shards_that_the_index_names_matter(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "sharded", shards=2)
    before = tree_identity(path)
    (path / "consolidated.safetensors").write_bytes(b"no matter")
    assert tree_identity(path) == before
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(RequestError, match=r"model-00002-of-00002\.safetensors is missing"):
        tree_identity(path)


def test_unchanged_files_are_not_read_again(checkpoint: Path, tmp_path: Path, reads: list[str]) -> None:
    settle(checkpoint)
    first = tree_identity(checkpoint, tmp_path / "ws")
    assert "model.safetensors" in reads
    reads.clear()
    assert tree_identity(checkpoint, tmp_path / "ws") == first
    assert reads == []


def test_a_changed_file_is_read_again_and_alone(checkpoint: Path, tmp_path: Path, reads: list[str]) -> None:
    settle(checkpoint)
    first = tree_identity(checkpoint, tmp_path)
    reads.clear()
    (checkpoint / "config.json").write_text((checkpoint / "config.json").read_text().replace("64", "65"))
    assert tree_identity(checkpoint, tmp_path) != first
    assert reads == ["config.json"]


def test_a_file_that_was_replaced_with_the_same_size_and_time_is_read_again(
    checkpoint: Path, tmp_path: Path, reads: list[str]
) -> None:
    settle(checkpoint)
    tree_identity(checkpoint, tmp_path)
    reads.clear()
    copy = checkpoint / "copy"
    copy.write_bytes((checkpoint / "config.json").read_bytes())
    copy.replace(checkpoint / "config.json")
    settle(checkpoint)
    tree_identity(checkpoint, tmp_path)
    assert reads == ["config.json"]


def test_a_file_that_has_just_changed_is_not_remembered(checkpoint: Path, tmp_path: Path, reads: list[str]) -> None:
    tree_identity(checkpoint, tmp_path)
    reads.clear()
    tree_identity(checkpoint, tmp_path)
    assert "model.safetensors" in reads


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": 3}', '{"files": {"a": 3}}', "\x00"])
def test_a_damaged_memo_costs_time_only(checkpoint: Path, tmp_path: Path, content: str) -> None:
    settle(checkpoint)
    expected = tree_identity(checkpoint)
    (tmp_path / "digests.json").write_text(content)
    assert tree_identity(checkpoint, tmp_path) == expected
    assert json.loads((tmp_path / "digests.json").read_text())["schema"] == 1


def test_a_workspace_that_cannot_be_written_costs_time_only(checkpoint: Path, tmp_path: Path) -> None:
    settle(checkpoint)
    (tmp_path / "file").write_text("in the way")
    seen: list[events.Event] = []
    with events.sink(seen.append):
        assert tree_identity(checkpoint, tmp_path / "file" / "ws") == tree_identity(checkpoint)
    assert "digests.json" in seen[0]["text"]


def test_the_memo_forgets_files_that_are_gone(checkpoint: Path, tmp_path: Path) -> None:
    settle(checkpoint)
    tree_identity(checkpoint, tmp_path)
    other = tiny_checkpoint(tmp_path / "other")
    settle(other)
    for file in checkpoint.iterdir():
        file.unlink()
    tree_identity(other, tmp_path)
    paths = json.loads((tmp_path / "digests.json").read_text())["files"]
    assert {Path(path).parent for path in paths} == {other}
    assert not list(tmp_path.glob(".digests-*"))


def test_long_reads_report_progress(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 2))
    monkeypatch.setattr(folder.time, "monotonic", lambda: next(clock))
    seen: list[events.Event] = []
    with events.sink(seen.append):
        tree_identity(checkpoint)
    assert seen and seen[-1]["total"] == sum((checkpoint / name).stat().st_size for name in folder.relevant(checkpoint))


def test_a_part_of_a_repository_is_not_the_whole_of_it(checkpoint: Path) -> None:
    before = folder.names_digest(checkpoint)
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    assert folder.names_digest(checkpoint) != before
    (checkpoint / "notes.txt").write_text("")
    (checkpoint / "chat_template.jinja").unlink()
    assert folder.names_digest(checkpoint) == before
