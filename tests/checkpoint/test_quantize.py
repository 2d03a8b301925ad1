"""Quantised checkpoints against ModelOpt's own TensorRT-LLM export of the same calibrated model."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import modelopt_oracle as oracle
import smollm2
import tiny
from converted import resolve
from engine_recipes import RequestError, StageFailed, events
from engine_recipes.checkpoint import (
    Statistics,
    layout,
    open_checkpoint,
    open_source,
    quantize,
    read_statistics,
    verify,
    write_statistics,
)
from engine_recipes.checkpoint.blocks import pack_rows, quantize_groups, unpack_rows
from engine_recipes.checkpoint.safetensors import SafeFile

Array = np.ndarray[Any, Any]
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 250, "num_hidden_layers": 2, "head_dim": 64}
METHODS = {"fp8": "FP8", "int4_awq": "W4A16_AWQ"}


def write(folder: Path, arch: str, **changes: Any) -> Path:
    """A tiny model whose tensors differ in size, so that a scale taken from the wrong one shows."""
    settings = tiny.config(arch, **{**SHAPE, **changes})
    arrays = tiny.tensors(settings)
    for number, (name, array) in enumerate(arrays.items()):
        if array.ndim == 2:
            arrays[name] = (array.astype(np.float32) * (1 + 0.13 * (number % 7))).astype(array.dtype)
    return tiny.write_tensors(folder, settings, arrays)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """(Hugging Face folder, model calibrated by ModelOpt), made once for each set of arguments."""

    @cache
    def make(arch: str, method: Any, kv: Any) -> Any:
        folder = write(tmp_path_factory.mktemp("hf") / arch, arch)
        return resolve(folder), oracle.calibrated(folder, method, kv)

    return make


def ours(hf: Path, model: Any, out: Path, method: str, **choices: Any) -> Path:
    """Our checkpoint from ModelOpt's statistics."""
    out.mkdir(parents=True)
    kept = out.parent / f"{out.name}-statistics"
    kept.mkdir()
    write_statistics(kept, oracle.statistics(model), {"method": method})
    with open_source(hf) as source:
        quantize(source, out, read_statistics(kept), METHODS[method], **choices)  # type: ignore[arg-type]
    verify(out)
    return out


def ranks(folder: Path) -> list[dict[str, Array]]:
    found = []
    for path in sorted(folder.glob("rank*.safetensors")):
        with SafeFile(path) as file:
            found.append({name: np.array(file.array(name)) for name in file.tensors})
    return found


def as_numpy(tensor: Any) -> Array:
    import torch

    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return np.asarray(tensor.numpy())


def compare(mine: dict[str, Array], theirs: dict[str, Array], group_size: int, same_tables: bool) -> None:
    """Every tensor of a rank. FP8 is equal to the byte. Int4 differs by the rounding of the input scale: ours divides
    the weights by the scale as it is stored, ModelOpt by the one before it was rounded to the checkpoint's dtype."""
    assert set(mine) == set(theirs)
    for name, array in mine.items():
        other = theirs[name]
        if name in ("lm_head.weight", "transformer.vocab_embedding.weight"):
            if not same_tables:  # ModelOpt splits the embedding too, and pads both for int4 (to 64)
                continue
            other = other[: len(array)]
        assert (array.dtype, array.shape) == (other.dtype, other.shape), name
        if array.dtype == np.int8:
            module = name.removesuffix(".weight")
            values, others = unpack_rows(array), unpack_rows(other)
            steps = np.abs(values.astype(int) - others)
            assert steps.max() <= 1 and (steps > 0).mean() < 0.02, name
            scales = [side[f"{module}.weights_scaling_factor"] for side in (mine, theirs)]
            weights = [
                (v * np.repeat(s, group_size, 1)) * side[f"{module}.prequant_scaling_factor"].astype(np.float32)
                for v, s, side in zip((values, others), scales, (mine, theirs), strict=True)
            ]
            assert np.linalg.norm(weights[0] - weights[1]) < 0.03 * np.linalg.norm(weights[1]), name
        elif name.endswith(".prequant_scaling_factor"):
            np.testing.assert_allclose(array.astype(float), other.astype(float), rtol=2**-7, err_msg=name)
        elif name.endswith(".weights_scaling_factor") and array.ndim == 2:
            np.testing.assert_allclose(array, other, rtol=2**-8, err_msg=name)
        else:
            assert array.tobytes() == other.tobytes(), name


CASES = [("fp8", None), ("fp8", "fp8"), ("fp8", "int8"), ("int4_awq", None), ("int4_awq", "int8")]


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize(("method", "kv"), CASES)
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_every_tensor_is_modelopts(
    tmp_path: Path, calibrated: Callable[..., Any], arch: str, method: str, kv: str | None, tp_size: int
) -> None:
    hf, model = calibrated(arch, method, kv)
    # group 64 was calibrated; the model's shapes would allow 128
    folder = ours(hf, model, tmp_path / "ours", method, kv_cache=kv or "none", tp_size=tp_size, group_size=64)
    config, exported = oracle.read_export(oracle.legacy_export(model, tmp_path / "theirs", tp_size))
    mine = ranks(folder)
    assert len(mine) == len(exported) == tp_size
    for rank, theirs in zip(mine, exported, strict=True):
        compare(rank, {name: as_numpy(tensor) for name, tensor in theirs.items()}, 64, tp_size == 1)
    written = json.loads((folder / "config.json").read_text())
    assert written["quantization"].items() >= config["quantization"].items()
    assert written["vocab_size"] == 250  # ModelOpt's int4 export says 256
    source = json.loads((hf / "config.json").read_text())
    assert written["rotary_base"] == source["rope_theta"]  # which ModelOpt leaves out


@pytest.mark.parametrize("tp_size", [1, 2])
def test_every_tensor_of_a_gemma_is_modelopts(tmp_path: Path, calibrated: Callable[..., Any], tp_size: int) -> None:
    """What its norms lack is added, and its table is split. (ModelOpt's int4 export of such a model fails.)"""
    hf, model = calibrated("gemma", "fp8", None)
    folder = ours(hf, model, tmp_path / "ours", "fp8", tp_size=tp_size)
    config, exported = oracle.read_export(oracle.legacy_export(model, tmp_path / "theirs", tp_size))
    for rank, theirs in zip(ranks(folder), exported, strict=True):
        del rank["lm_head.weight"]  # which NVIDIA's converter writes and ModelOpt leaves to share_embedding_table
        compare(rank, {name: as_numpy(tensor) for name, tensor in theirs.items()}, 64, True)
    written = json.loads((folder / "config.json").read_text())
    for key in ("architecture", "dtype", "hidden_act", "share_embedding_table", "head_size", "rotary_pct"):
        assert written.get(key, 1.0) == config[key], key


@pytest.mark.parametrize("method", METHODS)
def test_every_tensor_is_modelopts_on_a_real_model(tmp_path: Path, method: Any) -> None:
    settings = json.loads((smollm2.folder() / "config.json").read_text())
    hf = tmp_path / "hf"
    cut_layers(smollm2.folder(), hf, settings, layers=3)
    model = oracle.calibrated(resolve(hf), method)
    for tp_size in (1, 3):  # 9 heads
        folder = ours(hf, model, tmp_path / f"ours{tp_size}", method, tp_size=tp_size)
        _, exported = oracle.read_export(
            oracle.legacy_export(model, tmp_path / f"theirs{tp_size}", tp_size, dtype="float16")
        )
        for rank, theirs in zip(ranks(folder), exported, strict=True):
            compare(rank, {name: as_numpy(tensor) for name, tensor in theirs.items()}, 64, tp_size == 1)


def cut_layers(source: Path, out: Path, settings: dict[str, Any], layers: int) -> None:
    """The first layers of a model, with its embedding, final norm and head."""
    with SafeFile(source / "model.safetensors") as file:
        kept = {
            name: np.array(file.array(name))
            for name in file.tensors
            if not name.startswith("model.layers.") or int(name.split(".")[2]) < layers
        }
    tiny.write_tensors(out, {**settings, "num_hidden_layers": layers}, kept)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 1), (1, 2), (2, 2)])
def test_ranks_join_to_what_one_rank_holds(
    tmp_path: Path, calibrated: Callable[..., Any], method: str, tp_size: int, pp_size: int
) -> None:
    hf, model = calibrated("qwen2", method, "fp8" if method == "fp8" else None)
    choices = {"kv_cache": "fp8" if method == "fp8" else "none", "group_size": 64}
    whole = ours(hf, model, tmp_path / "whole", method, **choices)
    split = ours(hf, model, tmp_path / "split", method, tp_size=tp_size, pp_size=pp_size, **choices)
    with open_checkpoint(whole) as one, open_checkpoint(split) as many:
        assert sorted(one.names()) == sorted(many.names())
        for name in one.names():
            assert one.info(name) == many.info(name), name
            assert one.array(name).tobytes() == many.array(name).tobytes(), name


def test_nothing_is_quantised_that_should_not_be(tmp_path: Path, calibrated: Callable[..., Any]) -> None:
    hf, model = calibrated("llama", "fp8", None)
    (mine,) = ranks(ours(hf, model, tmp_path / "ours", "fp8"))
    kept = {name for name, array in mine.items() if array.dtype == ml_dtypes.bfloat16}
    assert {"lm_head.weight", "transformer.vocab_embedding.weight", "transformer.ln_f.weight"} <= kept
    assert len(kept) == 3 + 2 * 2


def test_weights_are_within_the_formats_rounding(tmp_path: Path, calibrated: Callable[..., Any]) -> None:
    hf, model = calibrated("llama", "int4_awq", None)
    (mine,) = ranks(ours(hf, model, tmp_path / "ours", "int4_awq", group_size=64))
    with open_source(hf) as source:
        weight = source.array("model.layers.1.mlp.down_proj.weight").astype(np.float32)
    at = "transformer.layers.1.mlp.proj."
    scales = np.repeat(mine[at + "weights_scaling_factor"], 64, 1)
    restored = unpack_rows(mine[at + "weight"]) * scales * mine[at + "prequant_scaling_factor"].astype(np.float32)
    step = scales * mine[at + "prequant_scaling_factor"].astype(np.float32)
    assert (np.abs(restored - weight) <= step * 0.501).all()


def test_a_nibble_is_a_row() -> None:
    values = np.random.default_rng(0).integers(-8, 8, (6, 5)).astype(np.int8)
    packed = pack_rows(values)
    assert packed.shape == (3, 5)
    assert (unpack_rows(packed) == values).all()
    assert packed[1, 2] == (values[2, 2] & 15) | ((values[3, 2] & 15) << 4)


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path, calibrated: Callable[..., Any]) -> None:
    hf, model = calibrated("qwen3", "int4_awq", None)
    one, other = (ours(hf, model, tmp_path / name, "int4_awq", group_size=64) for name in "ab")
    assert (one / "rank0.safetensors").read_bytes() == (other / "rank0.safetensors").read_bytes()


def statistics_of(hf: Path, value: float = 1.0, drop: str = "") -> Statistics:
    with open_source(hf) as source:
        d = source.decoder
    vectors: dict[str, Array] = {}
    for (rank,) in [layout(d)]:
        for spec in rank:
            for piece in spec.pieces:
                if piece.columns and "layers" in piece.name:
                    linear = piece.name.removesuffix(".weight")
                    vectors[f"{linear}.input_amax"] = np.array([value], np.float32)
                    vectors[f"{linear}.cache_amax"] = np.array([value], np.float32)
                    vectors[f"{linear}.pre_quant_scale"] = np.ones(piece.columns[1], np.float32)
    return Statistics({"method": "test"}, {n: v for n, v in vectors.items() if not drop or drop not in n})


def attempt(hf: Path, out: Path, statistics: Statistics | None = None, **choices: Any) -> None:
    out.mkdir(exist_ok=True)
    algorithm = choices.pop("algorithm", "FP8")
    with open_source(hf) as source:
        quantize(source, out, statistics or statistics_of(hf), algorithm, **choices)


def test_a_split_that_cuts_heads_is_refused(tmp_path: Path) -> None:
    hf = resolve(tiny.write(tmp_path / "hf", num_attention_heads=9, num_key_value_heads=3, hidden_size=576))
    with pytest.raises(RequestError, match="num_attention_heads 9 cannot be split over tp_size 2"):
        attempt(hf, tmp_path / "out", tp_size=2)
    assert not list((tmp_path / "out").iterdir())


def test_a_group_size_that_cannot_divide_is_refused(tmp_path: Path) -> None:
    hf = resolve(write(tmp_path / "hf", "llama", intermediate_size=192))
    with pytest.raises(RequestError, match=r"group_size 128 does not divide the 192 inputs of mlp\.proj") as caught:
        attempt(hf, tmp_path / "out", algorithm="W4A16_AWQ", group_size=128)
    assert caught.value.hint == "group_size 64 would work"
    with pytest.raises(RequestError, match=r"group_size 64 does not divide the 96 inputs of mlp\.proj") as caught:
        attempt(hf, tmp_path / "out", algorithm="W4A16_AWQ", tp_size=2)
    assert "another tp_size" in caught.value.hint


def test_the_group_size_that_was_taken_is_said(tmp_path: Path) -> None:
    hf = resolve(write(tmp_path / "hf", "llama", intermediate_size=192))
    said: list[dict[str, Any]] = []
    with events.sink(said.append):
        attempt(hf, tmp_path / "out", algorithm="W4A16_AWQ")
    assert any(e["event"] == "warn" and "group_size is 64" in e["text"] for e in said)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]["group_size"] == 64


def test_the_risk_of_an_8_bit_cache_is_said(tmp_path: Path) -> None:
    said: list[dict[str, Any]] = []
    hf = resolve(write(tmp_path / "qwen2", "qwen2"))
    with events.sink(said.append):
        attempt(hf, tmp_path / "out", statistics_of(hf, 300.0), kv_cache="fp8")
    warned = [e["text"] for e in said if e["event"] == "warn"]
    assert any("biases and no norms" in text for text in warned)
    assert any("keys or values above 224 in 2 of 2 layers" in text for text in warned)
    said.clear()
    hf = resolve(write(tmp_path / "qwen3", "qwen3"))
    with events.sink(said.append):
        attempt(hf, tmp_path / "other", kv_cache="fp8")
    assert not [e for e in said if e["event"] == "warn"]


def test_a_statistic_that_is_missing_is_named(tmp_path: Path) -> None:
    hf = resolve(write(tmp_path / "hf", "llama"))
    with pytest.raises(RequestError, match=r"no model\.layers\.1\.mlp\.up_proj\.input_amax"):
        attempt(hf, tmp_path / "out", statistics_of(hf, drop="layers.1.mlp.up_proj.input_amax"))


@pytest.mark.parametrize("algorithm", METHODS.values())
def test_nan_among_the_weights_names_the_tensor(tmp_path: Path, algorithm: str) -> None:
    settings = tiny.config("llama", **SHAPE)
    arrays = tiny.tensors(settings)
    name = "model.layers.1.self_attn.o_proj.weight"
    arrays[name] = arrays[name].copy()
    arrays[name][3, 5] = np.nan
    hf = resolve(tiny.write_tensors(tmp_path / "hf", settings, arrays))
    with pytest.raises(RequestError, match=f"{name} holds NaN"):
        attempt(hf, tmp_path / "out", algorithm=algorithm)


def test_statistics_that_are_no_numbers_name_the_layer(tmp_path: Path) -> None:
    layer = "model.layers.3.mlp.up_proj"
    for what, value, text in (("input_amax", np.nan, "not finite"), ("pre_quant_scale", 0.0, "must be above 0")):
        with pytest.raises(StageFailed, match=rf"{what} of model\.layers\.3\.mlp\.up_proj .*{text}"):
            write_statistics(tmp_path, {f"{layer}.{what}": np.array([value, 1], np.float32)}, {"method": "amax"})


@pytest.mark.parametrize("algorithm", METHODS.values())
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("said", ["float32", "float16", "bfloat16"])
def test_weights_are_read_in_the_dtype_they_have(tmp_path: Path, algorithm: str, said: str, stored: str) -> None:
    settings = tiny.config("llama", **SHAPE)
    arrays = tiny.tensors({**settings, "torch_dtype": stored})
    odd = "model.layers.0.mlp.up_proj.weight"  # and one tensor of another dtype than the rest
    arrays[odd] = arrays[odd].astype(np.float32)
    hf = resolve(tiny.write_tensors(tmp_path / "hf", {**settings, "torch_dtype": said}, arrays))
    attempt(hf, tmp_path / "out", algorithm=algorithm)
    kept = json.loads((tmp_path / "out" / "config.json").read_text())["dtype"]
    assert kept == ("float16" if stored == "float16" else "bfloat16")
    (mine,) = ranks(tmp_path / "out")
    for name, source in (("mlp.gate", odd), ("mlp.proj", "model.layers.0.mlp.down_proj.weight")):
        at = f"transformer.layers.0.{name}."
        weight = arrays[source].astype(np.float32)
        if algorithm == "FP8":
            restored = mine[at + "weight"].astype(np.float32) * mine[at + "weights_scaling_factor"]
        else:
            restored = unpack_rows(mine[at + "weight"]) * np.repeat(mine[at + "weights_scaling_factor"], 128, 1)
        limit = 0.04 if algorithm == "FP8" else 0.15
        assert np.linalg.norm(restored - weight) < limit * np.linalg.norm(weight)


@pytest.mark.parametrize("algorithm", METHODS.values())
def test_a_layer_of_zeros_stays_zeros(tmp_path: Path, algorithm: str) -> None:
    settings = tiny.config("llama", **SHAPE)
    arrays = tiny.tensors(settings)
    name = "model.layers.1.self_attn.o_proj.weight"  # as blocks that were added to a trained model have it
    arrays[name] = np.zeros_like(arrays[name])
    hf = resolve(tiny.write_tensors(tmp_path / "hf", settings, arrays))
    said: list[dict[str, Any]] = []
    with events.sink(said.append):
        attempt(hf, tmp_path / "out", algorithm=algorithm)
    verify(tmp_path / "out")
    (mine,) = ranks(tmp_path / "out")
    at = "transformer.layers.1.attention.dense."
    assert not mine[at + "weight"].view(np.uint8).any()
    assert (mine[at + "weights_scaling_factor"] == 1).all()
    warned = any(e["event"] == "warn" and "zero throughout, first model.layers.1" in e["text"] for e in said)
    assert warned == (algorithm == "FP8")


def test_a_group_too_small_for_float32_becomes_zeros() -> None:
    rows = np.full((2, 128), 1e-44, np.float32)
    rows[1] = -rows[1]
    scales, values = quantize_groups(rows, np.ones(128, np.float32), 64, "x")
    assert (scales == 1).all() and not values.any()


def test_what_a_calibration_lacks_is_said_before_anything_is_read(tmp_path: Path) -> None:
    settings = tiny.config("llama", **SHAPE)
    arrays = tiny.tensors(settings)
    first = "model.layers.0.self_attn.q_proj.weight"
    arrays[first] = np.full_like(arrays[first], np.nan)
    hf = resolve(tiny.write_tensors(tmp_path / "hf", settings, arrays))
    last = "layers.1.mlp.down_proj"
    with pytest.raises(RequestError, match=rf"no model\.{last}\.input_amax") as caught:
        attempt(hf, tmp_path / "out", statistics_of(hf, drop=f"{last}.input_amax"))
    assert "another calibration" in caught.value.hint
    with pytest.raises(RequestError, match=r"no .*layers\.1\.self_attn\.v_proj\.cache_amax"):
        statistics = statistics_of(hf, drop="layers.1.self_attn.v_proj.cache_amax")
        attempt(hf, tmp_path / "out", statistics, algorithm="W4A16_AWQ", kv_cache="int8")


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (np.ones(7, np.float32), r"pre_quant_scale of .*down_proj has shape \[7\] and the layer 512 inputs"),
        (np.full(512, 1e5, np.float32), r"pre_quant_scale of .*down_proj does not fit float16"),
        (np.full(512, 1e-9, np.float32), r"pre_quant_scale of .*down_proj does not fit float16"),
    ],
)
def test_scales_that_cannot_be_stored_are_refused(tmp_path: Path, vector: Array, message: str) -> None:
    hf = resolve(write(tmp_path / "hf", "llama"))
    statistics = statistics_of(hf)
    statistics._tensors["model.layers.0.mlp.down_proj.pre_quant_scale"] = vector  # type: ignore[index]
    with pytest.raises(RequestError, match=message):
        attempt(hf, tmp_path / "out", statistics, algorithm="W4A16_AWQ", dtype="float16")
