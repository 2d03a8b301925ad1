from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from converted import resolve
from engine_recipes import Artifact, RequestError, events
from engine_recipes.checkpoint import expect_tensors, open_source, source_tensors
from engine_recipes_models import llama

INDEX = "model.safetensors.index.json"


def change_index(folder: Path, **changes: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    index.update(changes)
    (folder / INDEX).write_text(json.dumps(index))


def change_place(folder: Path, file: Any) -> None:
    """Say that the first tensor is in `file`."""
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    change_index(folder, weight_map={**weight_map, "model.embed_tokens.weight": file})


@pytest.mark.parametrize("shards", [1, 3])
def test_finds_every_tensor(tmp_path: Path, shards: int) -> None:
    folder = resolve(tiny.write(tmp_path, shards=shards))
    expected = tiny.tensors(tiny.config())
    for opened in (open_source(folder), open_source(Artifact("hf-checkpoint", folder, "0" * 64))):
        with opened as source:
            assert set(source.tensors) == set(expected)
            assert source.config["model_type"] == "llama"
            for name, array in expected.items():
                np.testing.assert_array_equal(source.array(name), array)
                source.forget(name)


def test_weights_may_lie_elsewhere(tmp_path: Path) -> None:
    weights, resolved = resolve(tiny.write(tmp_path / "weights")), tmp_path / "resolved"
    resolved.mkdir()
    (resolved / "source.json").write_text(json.dumps({"folder": str(weights)}))
    (weights / "decoder.json").rename(resolved / "decoder.json")
    with open_source(resolved) as source:
        assert source.folder == weights


def test_a_folder_that_was_not_resolved(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"has no source\.json"):
        open_source(tiny.write(tmp_path))


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "x.bin", "..\\x", 7])
def test_an_index_that_points_elsewhere(tmp_path: Path, file: Any) -> None:
    change_place(tiny.write(tmp_path, shards=2), file)
    with pytest.raises(RequestError, match=r"embed_tokens\.weight is in .*, which is no safetensors file of this fold"):
        source_tensors(tmp_path)


def test_a_missing_shard(tmp_path: Path) -> None:
    (tiny.write(tmp_path, shards=3) / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(RequestError, match=r"model-00002-of-00003\.safetensors is missing"):
        source_tensors(tmp_path)


def test_a_tensor_in_another_shard_than_the_index_says(tmp_path: Path) -> None:
    change_place(tiny.write(tmp_path, shards=2), "model-00002-of-00002.safetensors")
    with pytest.raises(RequestError, match=r"embed_tokens.weight is in model-00001"):
        source_tensors(tmp_path)


def test_a_tensor_that_is_nowhere(tmp_path: Path) -> None:
    tiny.write(tmp_path, shards=2)
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    change_index(tmp_path, weight_map={**weight_map, "ghost": "model-00001-of-00002.safetensors"})
    with pytest.raises(RequestError, match=r"ghost is in model-00001.*and it is not"):
        source_tensors(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    tiny.write(tmp_path, shards=2)
    last = tmp_path / "model-00002-of-00002.safetensors"
    arrays = {"model.embed_tokens.weight": np.zeros(1, np.float32), **tiny.tensors(tiny.config())}
    named = {name for name, file in json.loads((tmp_path / INDEX).read_text())["weight_map"].items() if "02-" in file}
    tiny.save(last, {name: arrays[name] for name in ["model.embed_tokens.weight", *sorted(named)]})
    with pytest.raises(RequestError, match=r"embed_tokens\.weight is in model-00002.*says it is in model-00001"):
        source_tensors(tmp_path)


def test_a_wrong_total_size_is_said_and_no_more(tmp_path: Path) -> None:
    change_index(tiny.write(tmp_path, shards=2), metadata={"total_size": 1})
    said: list[events.Event] = []
    with events.sink(said.append):
        assert source_tensors(tmp_path)
    assert [event["event"] for event in said] == ["warn"]
    assert said[0]["text"].endswith("says 1")


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": []}', '{"weight_map": {}}', "{}"])
def test_a_damaged_index(tmp_path: Path, content: str) -> None:
    (tiny.write(tmp_path, shards=2) / INDEX).write_text(content)
    with pytest.raises(RequestError, match=INDEX):
        source_tensors(tmp_path)


def test_unreferenced_files_are_not_looked_at(tmp_path: Path) -> None:
    tiny.write(tmp_path, shards=2)
    (tmp_path / "consolidated.safetensors").write_bytes(b"nonsense")
    assert set(source_tensors(tmp_path)) == set(tiny.shapes(tiny.config()))


def test_two_sets_of_weights(tmp_path: Path) -> None:
    tiny.write(tmp_path, shards=2)
    tiny.write(tmp_path)
    with pytest.raises(RequestError, match="are both in"):
        source_tensors(tmp_path)


def test_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(RequestError, match="pickles") as caught:
        source_tensors(tmp_path)
    assert "convert them to safetensors" in caught.value.hint


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"has no model\.safetensors"):
        source_tensors(tmp_path)


def check(folder: Path, settings: dict[str, Any], arrays: dict[str, Any]) -> None:
    tiny.write_tensors(folder, settings, arrays)
    expect_tensors(llama.resolve_checkpoint(settings), source_tensors(folder))


def test_missing_wrong_and_unknown_tensors_are_named(tmp_path: Path) -> None:
    settings = tiny.config()
    arrays = tiny.tensors(settings)
    up = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(RequestError, match=f"lacks 1 tensor that config.json implies: {up}"):
        check(tmp_path / "missing", settings, {k: v for k, v in arrays.items() if k != up})
    with pytest.raises(RequestError, match=r"up_proj\.weight \[64, 176\] instead of \[176, 64\]"):
        check(tmp_path / "shape", settings, {**arrays, up: np.ascontiguousarray(arrays[up].T)})
    with pytest.raises(RequestError, match="2 tensors that this family does not know, for example a"):
        check(tmp_path / "unknown", settings, {**arrays, "a": arrays[up], "b": arrays[up]})


def test_known_leftovers_are_tolerated(tmp_path: Path) -> None:
    arrays = tiny.tensors(tiny.config())
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32)}
    check(tmp_path, tiny.config(), {**arrays, **buffer})


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_model_with_a_head_of_its_own(tmp_path: Path, same: bool) -> None:
    settings = tiny.config(tie_word_embeddings=True)
    arrays = tiny.tensors(settings)
    head = arrays["model.embed_tokens.weight"] if same else arrays["model.embed_tokens.weight"][::-1].copy()
    seen: list[events.Event] = []
    with events.sink(seen.append):
        check(tmp_path, settings, {**arrays, "lm_head.weight": head})
    assert bool(seen) is not same
    assert same or "lm_head.weight differs from model.embed_tokens.weight" in seen[0]["text"]


def test_an_untied_model_without_a_head(tmp_path: Path) -> None:
    arrays = tiny.tensors(tiny.config(tie_word_embeddings=True))
    with pytest.raises(RequestError, match=r"lacks 1 tensor .* lm_head\.weight"):
        check(tmp_path, tiny.config(), arrays)
