from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from converted import built
from engine_recipes import RequestError
from engine_recipes.checkpoint import open_checkpoint
from engine_recipes.checkpoint.safetensors import SafeFile, write

QKV = "transformer.layers.1.attention.qkv.weight"


def add(folder: Path, rank: int, changes: Mapping[str, np.ndarray[Any, Any] | None]) -> None:
    """Put more tensors into a rank file, or (None) take them out."""
    path = folder / f"rank{rank}.safetensors"
    with SafeFile(path) as file:
        held = {**{name: file.array(name).copy() for name in file.tensors}, **changes}
    arrays = {name: array for name, array in held.items() if array is not None}
    path.unlink()
    data = ([array.tobytes()] for array in arrays.values())
    list(write(path, {name: (array.dtype.name, array.shape) for name, array in arrays.items()}, data))


def test_one_rank_is_mapped_and_not_copied(tmp_path: Path) -> None:
    with open_checkpoint(built(tmp_path)) as checkpoint:
        array = checkpoint.array(QKV)
        assert array.base is not None
        assert not array.flags.owndata
        assert checkpoint.dtype == "float16"
        assert checkpoint.quantization["quant_algo"] is None
        assert (checkpoint.tp_size, checkpoint.pp_size) == (1, 1)
        assert checkpoint.decoder.rope_theta == 10000.0
        checkpoint.forget(QKV)


@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 1), (4, 1), (1, 3), (2, 2)])
def test_ranks_are_joined(tmp_path: Path, tp_size: int, pp_size: int) -> None:
    one = built(tmp_path / "one", "qwen3")
    many = built(tmp_path / "many", "qwen3", "float16", tp_size, pp_size)
    with open_checkpoint(one) as whole, open_checkpoint(many) as split:
        assert whole.names() == split.names()
        assert whole.decoder == split.decoder
        for name in whole.names():
            assert whole.info(name) == split.info(name)
            np.testing.assert_array_equal(whole.array(name), split.array(name))
            assert not split.array(name).flags.writeable
            split.forget(name)


@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 1), (1, 3), (4, 2)])
def test_a_gemma_is_joined(tmp_path: Path, tp_size: int, pp_size: int) -> None:
    one = built(tmp_path / "one", "gemma", vocab_size=301)
    many = built(tmp_path / "many", "gemma", "float16", tp_size, pp_size, vocab_size=301)
    with open_checkpoint(one) as whole, open_checkpoint(many) as split:
        assert whole.decoder == split.decoder
        assert whole.decoder.embedding_scale == 8
        for name in whole.names():
            np.testing.assert_array_equal(whole.array(name), split.array(name))


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("arch", ["gemma", "llama"])  # the table split over ranks, and whole on each
def test_a_tied_head_that_the_files_leave_out_is_the_embedding(tmp_path: Path, arch: str, tp_size: int) -> None:
    out = built(tmp_path, arch, tp_size=tp_size, vocab_size=301, tie_word_embeddings=True)
    with open_checkpoint(out) as checkpoint:
        names, head = checkpoint.names(), checkpoint.array("lm_head.weight").copy()
    for rank in range(tp_size):
        add(out, rank, {"lm_head.weight": None})
    with open_checkpoint(out) as checkpoint:
        assert set(checkpoint.names()) == set(names)
        np.testing.assert_array_equal(checkpoint.array("lm_head.weight"), head)
        assert checkpoint.info("lm_head.weight") == (head.dtype.name, head.shape)


def test_a_parallel_embedding_is_joined(tmp_path: Path) -> None:
    out = built(tmp_path, tp_size=2, vocab_size=301)
    name = "transformer.vocab_embedding.weight"
    with open_checkpoint(out) as checkpoint:
        table = checkpoint.array(name).copy()
    add(out, 0, {name: table[:151]})
    add(out, 1, {name: np.concatenate([table[151:], np.zeros((1, 64), np.float16)])})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "use_parallel_embedding": True}))
    with open_checkpoint(out) as checkpoint:
        np.testing.assert_array_equal(checkpoint.array(name), table)


def test_tensors_of_quantized_checkpoints_pass_through(tmp_path: Path) -> None:
    out = built(tmp_path, pp_size=2)
    extra: dict[str, np.ndarray[Any, Any]] = {
        "transformer.layers.0.attention.qkv.weights_scaling_factor": np.array([0.5], np.float32),
        "transformer.layers.0.mlp.fc.prequant_scaling_factor": np.ones(64, np.float16),
        "transformer.layers.0.mlp.proj.weight_packed": np.ones((32, 176), np.int8),
        "transformer.layers.0.mlp.gate.other": np.ones((4, 4), ml_dtypes.float8_e4m3fn),
    }
    add(out, 1, extra)
    with open_checkpoint(out) as checkpoint:
        for name, array in extra.items():
            name = name.replace("layers.0", "layers.2")  # 3 layers over 2 stages: the second stage starts with 2
            assert checkpoint.info(name) == (array.dtype.name, array.shape)
            np.testing.assert_array_equal(checkpoint.array(name), array)


def test_scales_that_all_ranks_share_are_read_and_others_refused(tmp_path: Path) -> None:
    out = built(tmp_path, tp_size=2)
    same, other = (f"transformer.layers.0.mlp.{name}.weights_scaling_factor" for name in ("fc", "gate"))
    for rank in range(2):
        add(out, rank, {same: np.array([0.5], np.float32), other: np.array([rank], np.float32)})
    with open_checkpoint(out) as checkpoint:
        assert checkpoint.array(same).tolist() == [0.5]
        assert checkpoint.info(same) == ("float32", (1,))
        with pytest.raises(RequestError, match="is split over 2 ranks in a way that is not known"):
            checkpoint.array(other)


def test_nvidias_rope_tables_are_left_out(tmp_path: Path) -> None:
    out = built(tmp_path)
    add(out, 0, {"rotary_inv_freq": np.ones(8, np.float32), "embed_positions": np.ones((1, 2, 3), np.float32)})
    with open_checkpoint(out) as checkpoint:
        assert not [name for name in checkpoint.names() if "rotary" in name or "positions" in name]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    out = built(tmp_path, tp_size=2)
    (out / "rank1.safetensors").unlink()
    with pytest.raises(RequestError, match=r"rank1\.safetensors is missing"):
        open_checkpoint(out)
    with pytest.raises(RequestError, match=r"config\.json is missing"):
        open_checkpoint(tmp_path)


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with open_checkpoint(built(tmp_path)) as checkpoint, pytest.raises(RequestError, match="has no tensor x"):
        checkpoint.array("x")


def test_ranks_that_do_not_belong_together(tmp_path: Path) -> None:
    out = built(tmp_path, tp_size=2)
    add(out, 1, {"x": np.ones(1, np.float32)})
    with pytest.raises(RequestError, match=r"rank1\.safetensors and its neighbour differ in x"):
        open_checkpoint(out)


def test_more_layers_than_the_stage_has(tmp_path: Path) -> None:
    out = built(tmp_path)
    add(out, 0, {"transformer.layers.3.input_layernorm.weight": np.ones(64, np.float16)})
    with pytest.raises(RequestError, match="this pipeline stage has 3 layers"):
        open_checkpoint(out)


@pytest.mark.parametrize(
    "mapping",
    [
        {"tp_size": 0},
        {"tp_size": "2"},
        {"tp_size": 10**9},
        {"world_size": 4, "tp_size": 2},
        {"cp_size": 2, "world_size": 2},
        "x",
        [1],
        5,
    ],
)
def test_a_mapping_that_makes_no_sense(tmp_path: Path, mapping: object) -> None:
    out = built(tmp_path)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "mapping": mapping}))
    with pytest.raises(RequestError, match=r"config\.json (gives|says)"):
        open_checkpoint(out)


def test_a_minimal_mapping_is_enough(tmp_path: Path) -> None:
    out = built(tmp_path)
    config = json.loads((out / "config.json").read_text())
    del config["mapping"], config["quantization"]
    (out / "config.json").write_text(json.dumps(config))
    with open_checkpoint(out) as checkpoint:
        assert set(checkpoint.names()) and checkpoint.quantization == {"quant_algo": None}


def test_a_layer_of_a_thousand_digits_is_a_tensor_like_any_other(tmp_path: Path) -> None:
    out, name = built(tmp_path), f"transformer.layers.{'9' * 5000}.x"
    add(out, 0, {name: np.ones(1, np.float32)})
    with open_checkpoint(out) as checkpoint:
        assert checkpoint.array(name).tolist() == [1.0]
