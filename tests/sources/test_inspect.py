"""Checks before any work: each thing that can be wrong with a folder, and the two lines it gets."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from engine_recipes.errors import RequestError
from engine_recipes.sources.inspect import check_architecture, inspect

from .files import CONFIG, tiny_checkpoint

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1000\n"


def change_config(folder: Path, **changes: object) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))


def pickles_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def link_outside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere.safetensors")


def slow_tokenizer_only(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")


def test_a_sound_folder_gives_its_config(checkpoint: Path, tmp_path: Path) -> None:
    assert inspect(checkpoint) == CONFIG
    assert inspect(tiny_checkpoint(tmp_path / "sharded", shards=3)) == CONFIG


@pytest.mark.parametrize(
    ("spoil", "message", "hint"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json is missing", "name a folder"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json .*cannot be read", "again"),
        (lambda f: (f / "config.json").write_text("[1]"), "is no JSON object", "again"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), r"config\.json .*cannot be read", "again"),
        (lambda f: (f / "config.json").write_text(POINTER), "config.json is a git-LFS pointer", "git lfs pull"),
        (lambda f: change_config(f, auto_map={"AutoModel": "m.M"}), "needs code from the repository", "auto_map"),
        (lambda f: (f / "model.safetensors").unlink(), r"has no model\.safetensors", "again"),
        (lambda f: (f / "model.safetensors").write_text(POINTER), "model.safetensors is a git-LFS", "git lfs pull"),
        (lambda f: (f / "model.safetensors").write_bytes(b"PK\x03\x04" * 9), "pickle", "safetensors"),
        (pickles_only, "weights as pickles", "never opened"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing", "copy tokenizer.json"),
        (slow_tokenizer_only, "tokenizer.json is missing", "use_fast=True"),
        (lambda f: (f / "tokenizer.json").write_text(POINTER), "tokenizer.json is a git-LFS", "git lfs pull"),
        (lambda f: (f / "tokenizer.json").write_text('{"model":'), r"tokenizer\.json .*cannot be read", "again"),
        (link_outside, "model.safetensors is a link that leads out", "copy them"),
    ],
)
def test_what_is_wrong_is_said_in_two_lines(
    checkpoint: Path, spoil: Callable[[Path], object], message: str, hint: str
) -> None:
    spoil(checkpoint)
    with pytest.raises(RequestError, match=message) as caught:
        inspect(checkpoint)
    assert hint in caught.value.hint
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "model-00002-of-00003.safetensors").unlink(), r"model-00002-of-00003\.safetensors is missing"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "no weight_map"),
        (lambda f: (f / "model.safetensors.index.json").write_text(POINTER), "git-LFS pointer"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}'),
            "no safetensors file of this folder",
        ),
    ],
)
def test_a_spoilt_index_or_shard_is_found(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    folder = tiny_checkpoint(tmp_path / "sharded", shards=3)
    spoil(folder)
    with pytest.raises(RequestError, match=message):
        inspect(folder)


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is no folder"):
        inspect(tmp_path / "nothing")


def test_a_link_to_the_whole_folder_is_fine(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(checkpoint)
    assert inspect(tmp_path / "link") == CONFIG


def test_a_link_within_the_folder_is_fine(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "weights")
    (checkpoint / "model.safetensors").symlink_to("weights")
    assert inspect(checkpoint) == CONFIG


def snapshot_with_link_to(cache: Path, target: Path) -> Path:
    """A hub snapshot whose weights are a link to `target`."""
    (cache / "models--a--b" / "snapshots").mkdir(parents=True)
    folder = tiny_checkpoint(cache / "models--a--b" / "snapshots" / ("0" * 40))
    target.parent.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").rename(target)
    (folder / "model.safetensors").symlink_to(os.path.relpath(target, folder))
    return folder


def test_links_of_a_hub_snapshot_may_lead_into_its_repository_only(tmp_path: Path) -> None:
    cache = tmp_path / "one"
    assert inspect(snapshot_with_link_to(cache, cache / "models--a--b" / "blobs" / "abc")) == CONFIG
    cache = tmp_path / "two"
    with pytest.raises(RequestError, match="leads out"):
        inspect(snapshot_with_link_to(cache, cache / "models--c--d" / "blobs" / "abc"))


def test_the_store_that_the_hub_shares_between_repositories_is_fine(tmp_path: Path) -> None:
    folder = snapshot_with_link_to(tmp_path, tmp_path / "blobs" / "ab" / "abc")
    with pytest.raises(RequestError, match="leads out"):
        inspect(folder)
    (tmp_path / "blobs" / ".huggingface-shared-blobs").write_text("1\n")
    assert inspect(folder) == CONFIG


def test_the_class_must_be_one_the_family_knows() -> None:
    check_architecture({"architectures": ["LlamaForCausalLM"]}, "llama", ["LlamaForCausalLM"])
    with pytest.raises(RequestError) as caught:
        check_architecture({"architectures": ["MistralForCausalLM"]}, "llama", ["LlamaForCausalLM"])
    assert caught.value.message == "config.json says MistralForCausalLM; family llama knows LlamaForCausalLM"
    assert "MistralForCausalLM" in caught.value.hint
    with pytest.raises(RequestError, match="architectures"):
        check_architecture({}, "llama", ["LlamaForCausalLM"])
