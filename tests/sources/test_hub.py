"""The hub: what counts as complete in its cache, and downloads from a hub on this machine."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine_recipes import events
from engine_recipes.errors import Interrupted, MachineError, RecipesError, RequestError
from engine_recipes.sources import Unreachable, download_size, fetch, inspect, layout, locate

from .fake_hub import COMMIT, OLD_COMMIT, FakeHub
from .files import tiny_checkpoint

SPECS = ["hf:org/model"]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def yes(what: str, size: int | None) -> bool:
    return True


def never(what: str, size: int | None) -> bool:
    raise AssertionError(f"asked about {what}")


def snapshot(cache: Path, commit: str = COMMIT, ref: str | None = "main", shards: int = 1) -> Path:
    """A snapshot as huggingface_hub leaves it: links into blobs/."""
    repository = cache / "models--org--model"
    (repository / "snapshots").mkdir(parents=True, exist_ok=True)
    folder = repository / "snapshots" / commit
    tiny_checkpoint(folder, shards)
    (repository / "blobs").mkdir(exist_ok=True)
    for path in list(folder.iterdir()):
        blob = repository / "blobs" / f"{commit[:4]}-{path.name}"
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, folder))
    if ref:
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    return folder


# -- locate


def test_nothing_is_found_in_an_empty_cache(tmp_path: Path) -> None:
    assert locate(SPECS, tmp_path) is None


def test_the_default_branch_is_found(tmp_path: Path, own_hub_cache: Path) -> None:
    folder = snapshot(own_hub_cache)
    found = locate(SPECS, tmp_path)
    assert found is not None
    assert (found.folder, found.revision) == (folder, COMMIT)
    assert found.identity.startswith(f"hf:org/model@{COMMIT}#beside=")


def test_a_tag_and_a_pinned_commit_are_found(tmp_path: Path, own_hub_cache: Path) -> None:
    snapshot(own_hub_cache, OLD_COMMIT, ref="v1")
    by_tag, by_commit = locate(["hf:org/model@v1"], tmp_path), locate([f"hf:org/model@{OLD_COMMIT}"], tmp_path)
    assert by_tag is not None and by_commit is not None
    assert by_tag.identity == by_commit.identity
    assert by_tag.identity.startswith(f"hf:org/model@{OLD_COMMIT}#")
    assert locate(SPECS, tmp_path) is None


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", *SHARDS])
def test_a_snapshot_that_lacks_a_file_does_not_count(tmp_path: Path, own_hub_cache: Path, name: str) -> None:
    folder = snapshot(own_hub_cache, shards=2)
    assert locate(SPECS, tmp_path)
    (folder / name).resolve().unlink()  # the link stays, as after an interrupted clean-up
    assert locate(SPECS, tmp_path) is None


@pytest.mark.parametrize("content", ["", "main\n", "../../../etc", "\xff"])
def test_a_damaged_ref_is_not_followed(tmp_path: Path, own_hub_cache: Path, content: str) -> None:
    snapshot(own_hub_cache)
    (own_hub_cache / "models--org--model" / "refs" / "main").write_bytes(content.encode("latin-1"))
    assert locate(SPECS, tmp_path) is None


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {"a": "../../x"}}', '{"weight_map": {"a": 3}}'])
def test_a_damaged_index_is_not_complete(tmp_path: Path, own_hub_cache: Path, content: str) -> None:
    (snapshot(own_hub_cache) / "model.safetensors.index.json").write_text(content)
    assert locate(SPECS, tmp_path) is None


def test_environment_variables_say_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    snapshot(tmp_path / "xdg" / "huggingface" / "hub")
    assert locate(SPECS, tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert locate(SPECS, tmp_path) is None
    snapshot(tmp_path / "home" / "hub")
    assert locate(SPECS, tmp_path)


def test_looking_for_many_models_takes_milliseconds(tmp_path: Path, own_hub_cache: Path) -> None:
    snapshot(own_hub_cache, shards=4)
    start = time.perf_counter()
    for n in range(22):
        locate([f"hf:org/model{n or ''}"], tmp_path)
    assert time.perf_counter() - start < 0.1


# -- fetch


def test_wanted_files_are_downloaded_and_nothing_else(hub: FakeHub, tmp_path: Path) -> None:
    asked: list[tuple[str, int | None]] = []
    seen: list[events.Event] = []

    def confirm(what: str, size: int | None) -> bool:
        asked.append((what, size))
        return True

    with events.sink(seen.append):
        found = fetch(SPECS, tmp_path, confirm=confirm)
    names = {path.name for path in found.folder.iterdir()}
    beside = {"config.json", "tokenizer.json", "generation_config.json", "model.safetensors.index.json"}
    assert names == {*beside, *SHARDS}
    assert all((found.folder / name).read_bytes() == hub.files[name] for name in names)
    assert found.identity.startswith(f"hf:org/model@{COMMIT}#beside=")
    assert asked == [(f"org/model from {hub.url[7:]}, 6 files", sum(len(hub.files[name]) for name in names))]
    assert seen[-1]["event"] == "progress" and seen[-1]["done"] == seen[-1]["total"] == asked[0][1]


def test_what_is_here_is_found_without_asking_anyone(hub: FakeHub, tmp_path: Path) -> None:
    first = fetch(SPECS, tmp_path, confirm=yes)
    hub.requests.clear()
    assert fetch(SPECS, tmp_path, confirm=never) == first == locate(SPECS, tmp_path)
    assert hub.requests == []
    assert download_size(SPECS, tmp_path) == (first.source, 0)


def test_inspect_accepts_links_into_the_cache(hub: FakeHub, tmp_path: Path) -> None:
    found = fetch(SPECS, tmp_path, confirm=yes)
    assert any(path.is_symlink() for path in found.folder.iterdir())
    assert inspect.inspect(found.folder)["model_type"] == "llama"


def test_a_pinned_commit_needs_no_ref(hub: FakeHub, tmp_path: Path, own_hub_cache: Path) -> None:
    specs = [f"hf:org/model@{OLD_COMMIT}"]
    assert fetch(specs, tmp_path, confirm=yes).revision == OLD_COMMIT
    assert locate(specs, tmp_path)
    assert not (own_hub_cache / "models--org--model" / "refs").exists()


def test_no_means_no(hub: FakeHub, tmp_path: Path, own_hub_cache: Path) -> None:
    with pytest.raises(Interrupted, match="org/model"):
        fetch(SPECS, tmp_path, confirm=lambda what, size: False)
    assert not hub.downloads()
    assert not own_hub_cache.exists()


def test_a_connection_that_drops_goes_on_where_it_stopped(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500)  # what has arrived counts in chunks
    hub.cut[SHARDS[1]] = 1200
    found = fetch(SPECS, tmp_path, confirm=yes)
    assert (found.folder / SHARDS[1]).read_bytes() == hub.files[SHARDS[1]]
    assert hub.ranges == [(SHARDS[1], "bytes=1000-")]
    assert capfd.readouterr() == ("", "")


def test_finished_files_are_kept_when_a_download_breaks_off(hub: FakeHub, tmp_path: Path) -> None:
    hub.broken.add(SHARDS[1])
    with pytest.raises(MachineError, match="broke off") as caught:
        fetch(SPECS, tmp_path, confirm=yes)
    assert len(str(caught.value).splitlines()) == 2
    assert locate(SPECS, tmp_path) is None
    hub.broken.clear()
    hub.requests.clear()
    asked: list[int | None] = []

    def confirm(what: str, size: int | None) -> bool:
        asked.append(size)
        return True

    fetch(SPECS, tmp_path, confirm=confirm)
    assert hub.downloads()[SHARDS[1]] == 1
    assert hub.downloads()[SHARDS[0]] == 0
    assert asked[0] is not None and asked[0] < sum(map(len, hub.files.values()))


def test_a_wrong_size_is_noticed(hub: FakeHub, tmp_path: Path) -> None:
    found = fetch(SPECS, tmp_path, confirm=yes)
    shard = (found.folder / SHARDS[0]).resolve()
    shard.write_bytes(shard.read_bytes()[:-1])
    (found.folder / "tokenizer.json").unlink()  # incomplete again
    with pytest.raises(MachineError, match=r"model-00001-of-00002.safetensors has .* bytes"):
        fetch(SPECS, tmp_path, confirm=yes)


@pytest.mark.parametrize(
    ("fail", "kind", "words"),
    [
        ("404", RequestError, "no model org/model"),
        ("revision", RequestError, "no revision"),
        ("gated", MachineError, "gated"),
        ("401", MachineError, "refuses access"),
    ],
)
def test_refusals_are_two_lines(hub: FakeHub, tmp_path: Path, fail: str, kind: type[RecipesError], words: str) -> None:
    hub.fail = fail
    with pytest.raises(kind, match=words) as caught:
        fetch(["hf:org/model@v9"], tmp_path, confirm=never)
    assert not isinstance(caught.value, Unreachable)
    assert len(str(caught.value).splitlines()) == 2
    if fail == "gated":
        assert f"{hub.url}/org/model" in caught.value.hint and "HF_TOKEN" in caught.value.hint


@pytest.mark.parametrize(
    ("names", "words"),
    [(SHARDS, "no safetensors"), (["config.json"], "no config.json"), (["tokenizer.json"], "no tokenizer.json")],
)
def test_a_repository_without_what_we_need_is_refused_before_the_download(
    hub: FakeHub, tmp_path: Path, names: list[str], words: str
) -> None:
    for name in [*names, "consolidated.safetensors"]:
        hub.files.pop(name)
    with pytest.raises(RequestError, match=words):
        fetch(SPECS, tmp_path, confirm=never)


def test_too_small_a_disk_is_noticed_before_the_download(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(MachineError, match="free"):
        fetch(SPECS, tmp_path, confirm=never)


def test_offline_is_honoured(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(Unreachable, match="HF_HUB_OFFLINE"):
        fetch(SPECS, tmp_path, confirm=never)
    with pytest.raises(MachineError, match="HF_HUB_OFFLINE"):
        download_size(SPECS, tmp_path)
    assert hub.requests == []


def test_a_hub_that_is_down_is_passed_over(hub: FakeHub, tmp_path: Path, checkpoint: Path) -> None:
    hub.fail = "503"
    start = time.monotonic()
    with pytest.raises(Unreachable, match="503"):
        fetch(SPECS, tmp_path, confirm=never)
    assert time.monotonic() - start < 5


def test_an_unreachable_hub_fails_fast_and_the_next_source_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
    seen: list[events.Event] = []
    start = time.monotonic()
    with events.sink(seen.append), pytest.raises(MachineError, match="no source") as caught:
        fetch([*SPECS, "file:/does/not/exist"], tmp_path, confirm=never)
    assert time.monotonic() - start < 5
    warned = [event["text"] for event in seen if event["event"] == "warn"]
    assert len(warned) == 1
    assert "cannot be reached" in warned[0] and warned[0].endswith("trying file:/does/not/exist")
    assert "cannot be reached" in caught.value.message and "/does/not/exist" in caught.value.message


def test_a_hub_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine_recipes.sources import hub

    monkeypatch.setattr(hub, "_ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(Unreachable, match="no answer within"):
            fetch(SPECS, tmp_path, confirm=never)


def test_an_answer_that_is_no_hub_s_is_no_bug_of_ours(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "tests.sources.fake_hub._Handler._api", lambda handler, parts, query: handler._send(200, b"<p>")
    )
    with pytest.raises(Unreachable, match="cannot be reached"):
        fetch(SPECS, tmp_path, confirm=never)


def test_a_missing_library_is_named(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "huggingface_hub" else real(name))
    with pytest.raises(MachineError, match="huggingface_hub") as caught:
        fetch(SPECS, tmp_path, confirm=never)
    assert "engine-recipes[cpu]" in caught.value.hint


def test_the_library_prints_nothing(hub: FakeHub, tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; from engine_recipes.sources import fetch;"
        "fetch(['hf:org/model'], pathlib.Path(sys.argv[1]), confirm=lambda what, size: True)"
    )
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert (done.stdout, done.stderr) == ("", "")
    assert locate(SPECS, tmp_path)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["model.safetensors", "config.json"], ["model.safetensors", "config.json"]),
        (["weights.safetensors"], ["weights.safetensors"]),
        (["model.safetensors", "consolidated.safetensors"], ["model.safetensors"]),
        ([*SHARDS, "model.safetensors", "model.safetensors.index.json"], [*SHARDS, "model.safetensors.index.json"]),
        (["model.safetensors", "model.safetensors.index.json"], ["model.safetensors", "model.safetensors.index.json"]),
        (["original/model.safetensors", "a.bin", "b.pt", "c.pth", "README.md", "run.py", "m.gguf"], []),
        (["chat_template.jinja", "merges.txt", "other.txt"], ["chat_template.jinja", "merges.txt"]),
    ],
)
def test_one_set_of_weights_is_wanted_and_what_describes_it(names: list[str], chosen: list[str]) -> None:
    assert layout.wanted(names) == chosen
