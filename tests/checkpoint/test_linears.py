"""Quantised checkpoints from a precision's own arithmetic: of an algorithm that core knows, and of one it does not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import converted
import engine_recipes
import lowered
import modelopt_oracle
import sabotage
import tiny
from conftest import install, package
from engine_recipes import RequestError, StageFailed, testing
from engine_recipes.checkpoint import (
    Linear,
    LinearPart,
    Statistics,
    open_checkpoint,
    open_source,
    quantize_linears,
    verify,
)
from engine_recipes.checkpoint.formats import Scheme
from engine_recipes.checkpoint.safetensors import SafeFile
from engine_recipes.gate.parts import Parts
from engine_recipes.gate.weights import compare, measures
from engine_recipes.runner import How

Array = np.ndarray[Any, Any]
#: Two inputs a byte, a scale for two outputs, another for each input, one number, and one of the model's own dtype.
PARTS = (
    LinearPart("packed", "uint8", columns=2),
    LinearPart("row_scale", "float32", rows=2, columns=0),
    LinearPart("tile_scale", "float16", rows=2, columns=8),
    LinearPart("centre", "float32", 0, 0),
    LinearPart("input_scale", "", 0, 1),
)
LAYERS = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")


def made_up(linear: Linear) -> dict[str, Array]:
    """Arrays that name the place they stand for, so that a wrong split shows."""
    weight = linear.weight.astype(np.float32)
    rows, columns = weight.shape
    bits = weight.view(np.uint32)
    return {
        "packed": (bits[:, ::2] ^ (bits[:, 1::2] >> 7)).astype(np.uint8),
        "row_scale": weight[::2].sum(axis=1),
        "tile_scale": np.arange(rows * columns // 16).reshape(rows // 2, columns // 8).astype(np.float16),
        "centre": weight.mean(dtype=np.float64).astype(np.float32).reshape(1),
        "input_scale": np.abs(weight).max(axis=0).astype(linear.dtype),
    }


def write(folder: Path, arch: str = "llama", **choices: Any) -> Path:
    out = folder / "checkpoint"
    out.mkdir(parents=True)
    given: dict[str, Any] = {"parts": PARTS, "quantise": made_up, "algorithm": "ACME_4", **choices}
    with converted.source(folder / "source", arch) as source:
        quantize_linears(source, out, given.pop("algorithm"), given.pop("quantise"), **given)
    return out


def read(folder: Path) -> dict[str, Array]:
    with open_checkpoint(folder) as opened:
        return {name: np.array(opened.array(name)) for name in opened.names()}


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 1), (1, 2), (2, 2)])
def test_ranks_of_an_unknown_algorithm_join_to_what_is_not_split(
    tmp_path: Path, arch: str, tp_size: int, pp_size: int
) -> None:
    whole = read(write(tmp_path / "one", arch))
    folder = write(tmp_path / "split", arch, tp_size=tp_size, pp_size=pp_size)
    verify(folder)
    joined = read(folder)
    assert joined.keys() == whole.keys()
    for name, array in whole.items():
        assert joined[name].dtype == array.dtype
        np.testing.assert_array_equal(joined[name].astype(np.float64), array.astype(np.float64), err_msg=name)


def test_every_layer_gets_its_whole_weight_and_the_parts_it_gives_are_stored(tmp_path: Path) -> None:
    seen: dict[str, Linear] = {}

    def quantise(linear: Linear) -> Mapping[str, Array]:
        seen[linear.name] = linear
        return made_up(linear)

    stored = read(write(tmp_path, quantise=quantise))
    assert list(seen) == [f"transformer.layers.{layer}.{name}" for layer in range(3) for name in LAYERS]
    with open_source(tmp_path / "source") as source:
        qkv = seen["transformer.layers.1.attention.qkv"]
        assert qkv.sources == tuple(f"model.layers.1.self_attn.{name}_proj" for name in "qkv")
        held = [source.array(f"{name}.weight").astype(np.float32) for name in qkv.sources]
        expected = made_up(Linear(qkv.name, qkv.sources, np.concatenate(held), qkv.dtype))
    for part, array in expected.items():
        found = stored[f"transformer.layers.1.attention.qkv.{part}"]
        np.testing.assert_array_equal(found.astype(np.float64), array.astype(np.float64), err_msg=part)
    assert "transformer.layers.1.attention.qkv.weight" not in stored


def test_the_checkpoint_says_what_it_stores_and_is_verified_by_it(tmp_path: Path) -> None:
    folder = write(tmp_path)
    with open_checkpoint(folder) as opened:
        assert opened.scheme.parts == PARTS
        assert opened.scheme.is_described and not opened.scheme.is_known
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization"]["exclude_modules"] == ["lm_head"]
    config["quantization"]["linear_parts"][1]["rows"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(StageFailed, match=r"row_scale has shape \[64\] instead of \[128\]"):
        verify(folder)
    config["quantization"]["linear_parts"] = [{"name": "../x", "dtype": "uint8"}]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(StageFailed, match="linear_parts"):
        verify(folder)


def test_excluded_layers_stay_as_they_are(tmp_path: Path) -> None:
    plain = read(converted.built(tmp_path / "plain", to="bfloat16"))
    stored = read(write(tmp_path / "acme", exclude=["transformer.layers.1.*"]))
    for name in LAYERS:
        module = f"transformer.layers.1.{name}"
        assert stored[f"{module}.weight"].tobytes() == plain[f"{module}.weight"].tobytes()
        assert f"{module}.packed" not in stored


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"packed": None}, "quantised to row_scale"),
        ({"centre": np.zeros(2, np.float32)}, r"centre is float32 \[2\] instead of float32 \[1\]"),
        ({"row_scale": np.zeros(64)}, r"row_scale is float64 \[64\] instead of float32"),
        ({"centre": np.full(1, np.nan, np.float32)}, "centre holds NaN or inf"),
        ({"centre": np.ones(1, ">f4")}, r"centre is >f4 \[1\] instead of float32 \[1\]"),
        ({"centre": [1.0]}, r"centre is of type list instead of float32 \[1\]"),
        ({"centre": torch.ones(1)}, r"centre is of type Tensor instead of float32 \[1\]"),
    ],
)
def test_what_a_precision_gives_is_checked_and_its_authors_are_named(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    def quantise(linear: Linear) -> Mapping[str, Array]:
        return {name: array for name, array in {**made_up(linear), **changes}.items() if array is not None}

    with pytest.raises(StageFailed, match=f"transformer.layers.0.attention.qkv.*{says}") as caught:
        write(tmp_path, quantise=quantise)
    assert caught.value.hint == "report this to the authors of the precision"


@pytest.mark.parametrize("given", [None, [1, 2], 3])
def test_a_precision_that_gives_no_mapping_is_told_so(tmp_path: Path, given: Any) -> None:
    with pytest.raises(
        StageFailed, match=f"qkv was quantised to a {type(given).__name__} and not to packed, row_scale"
    ):
        write(tmp_path, quantise=lambda linear: given)


def test_only_where_float16_is_too_narrow_another_dtype_is_the_advice(tmp_path: Path) -> None:
    def quantise(linear: Linear) -> Mapping[str, Array]:
        made = made_up(linear)
        return {**made, "tile_scale": made["tile_scale"] + np.float16("inf")}

    with pytest.raises(StageFailed, match="tile_scale holds NaN or inf") as caught:
        write(tmp_path, quantise=quantise)
    assert "dtype=bfloat16" in caught.value.hint


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ({"parts": ()}, "ACME_4 is not known, and no parts are given"),
        ({"algorithm": "FP8"}, "FP8 has its parts already"),
        ({"algorithm": "W8A16", "parts": ()}, "W8A16 has its parts already"),
        (
            {"parts": (LinearPart("packed", "uint8", columns=32),), "tp_size": 2},
            "no whole groups of 32, which are stored together",
        ),
        ({"algorithm": ""}, "'' is no name of an algorithm"),
        ({"algorithm": None}, "None is no name of an algorithm"),
        ({"parts": (LinearPart("plain", "uint8"),)}, "its name means something else"),
        ({"parts": (LinearPart("cache_scale", "uint8"),)}, "its name means something else"),
        ({"parts": (LinearPart("bias", "uint8"),)}, "its name means something else"),
        ({"parts": (LinearPart("../x", "uint8"),)}, "no identifier"),
        ({"parts": (LinearPart("x", "int3"),)}, "no such dtype can be stored"),
        ({"parts": (LinearPart("x", np.dtype("int8")),)}, "no such dtype can be stored"),  # type: ignore[arg-type]
        ({"parts": (LinearPart("x", "int8", -1),)}, "0 or more"),
        ({"parts": ("x",)}, "'x': that is no part"),
        ({"parts": (PARTS[0], PARTS[0])}, "'packed' twice"),
        ({"parts": tuple(LinearPart(f"x{n}", "int8") for n in range(17))}, "17 parts, and 16 are the most"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(
    tmp_path: Path, choices: dict[str, Any], says: str
) -> None:
    with pytest.raises(RequestError, match=says):
        write(tmp_path, **choices)
    assert not list((tmp_path / "checkpoint").iterdir())


def test_what_no_split_could_store_is_not_blamed_on_the_split(tmp_path: Path) -> None:
    parts = (LinearPart("packed", "uint8", columns=48),)
    with pytest.raises(RequestError, match=r"columns of model\.layers\.0\.self_attn\.q_proj.weight 0 to 64") as caught:
        write(tmp_path, parts=parts)
    assert "tp_size" not in caught.value.hint


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([{"name": f"p{n}", "dtype": "int8"} for n in range(200_000)], "200000 parts, and 16 are the most"),
        ([{"name": "x" * 1_000_000 + ".", "dtype": "int8"}], "no identifier"),
        ([{"name": "x", "dtype": "int8", "more": 1}], "no part"),
        ([{"name": "plain", "dtype": "int8"}], "means something else"),
        ("a" * 1_000_000, "no list"),
        ([[[1]] * 100_000], "no part"),
    ],
)
def test_what_no_checkpoint_of_ours_says_is_refused_in_one_short_line(given: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        Scheme.from_config({"quant_algo": "ACME_4", "linear_parts": given})
    assert len(caught.value.message) < 200 and "\n" not in caught.value.message


@pytest.mark.parametrize("tp_size", [1, 2])
def test_smoothquant_is_stored_as_modelopt_exports_it_and_its_export_is_judged(tmp_path: Path, tp_size: int) -> None:
    theirs, ours = smoothed_by_modelopt(tmp_path, tp_size), tmp_path / "ours"
    ours.mkdir()

    def statistic(name: str) -> Array:
        return np.full(64 if "down" not in name else 176, 0.5, np.float32)

    with open_source(tmp_path / "hf") as source:
        names = {piece for piece in source.tensors if "_proj" in piece}
        made = {
            f"{name.removesuffix('.weight')}.{what}": statistic(name)
            for name in names
            for what in ("pre_quant_scale", "channel_amax")
        }
        quantise = sabotage.smoothed(Statistics({"method": "made up"}, made))
        quantize_linears(source, ours, "W8A8_SQ_PER_CHANNEL", quantise, tp_size=tp_size)
        with Parts(theirs, source) as parts:
            found = {measure.name: measure.value for measure in measures(compare(parts.parts, source))}
    for rank in range(tp_size):
        headers = []
        for folder in (ours, theirs):
            with SafeFile(folder / f"rank{rank}.safetensors") as file:
                headers.append({n: (i.dtype, i.shape) for n, i in file.tensors.items() if ".layers." in n})
        assert headers[0] == headers[1]
    assert found["weight_error"] < 0.02
    assert found["weight_rounding"] < 1.8


def smoothed_by_modelopt(folder: Path, tp_size: int) -> Path:
    """ModelOpt's own checkpoint of the tiny model `folder`/hf, its embedding as we split it."""
    tokens = modelopt_oracle.token_rows(256)
    model = modelopt_oracle.load(converted.resolve(tiny.write(folder / "hf")))

    def forward(module: Any) -> None:
        with torch.no_grad():
            module(input_ids=tokens, use_cache=False)

    with modelopt_oracle._quiet():
        import modelopt.torch.quantization as mtq

        mtq.quantize(model, mtq.INT8_SMOOTHQUANT_CFG, forward)
    return modelopt_oracle.legacy_export(model, folder / "theirs", tp_size)


REGISTRY = """
api = 1
[precisions.acme-4]
module = "acme_quants.precision"
algorithm = "ACME_4"
bits = 8
[precisions.acme-4.options]
tp_size = 1
[engines.acme]
module = "acme_quants.engine"
takes = ["trtllm-checkpoint"]
gives = "acme-engine"
targets = ["cpu"]
algorithms = { cpu = ["ACME_4"] }
"""
PRECISION = """
import numpy as np
from engine_recipes import checkpoint, hookimpl

PARTS = (checkpoint.LinearPart("codes", "int8"), checkpoint.LinearPart("largest", "float32", 0, 0))

def quantise(linear):
    weight = linear.weight.astype(np.float32)
    largest = np.abs(weight).max().reshape(1)
    return {"codes": np.rint(np.cbrt(weight / largest) * 127).astype(np.int8), "largest": largest}

@hookimpl
def stage1(context):
    with checkpoint.open_source(context.input("hf-checkpoint")) as source:
        checkpoint.quantize_linears(
            source, context.out, "ACME_4", quantise, parts=PARTS, tp_size=context.options["tp_size"]
        )
"""
ENGINE = """
import numpy as np
from engine_recipes import checkpoint, hookimpl

@hookimpl
def stage2(context):
    with checkpoint.open_checkpoint(context.input("trtllm-checkpoint").path) as weights:
        name = "transformer.layers.0.mlp.fc"
        codes = weights.array(f"{name}.codes").astype(np.float32) / 127
        np.save(context.out / "weight.npy", codes**3 * weights.array(f"{name}.largest"))
"""


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_package_builds_with_an_algorithm_that_core_never_heard_of(
    tmp_path: Path, own_world: Path, monkeypatch: pytest.MonkeyPatch, tp_size: int
) -> None:
    install(monkeypatch, package(tmp_path / "p", "acme-quants", REGISTRY, precision=PRECISION, engine=ENGINE))
    testing.write_tokenizer(lowered.write_lively(own_world / "here" / "model"))
    settings = {"tp_size": str(tp_size)}
    build = engine_recipes.build("./model:acme-4@acme", settings=settings, how=How(validate=False))
    assert build.status == "built"
    engine = build.path("stage2")
    assert engine is not None
    found = np.load(engine / "weight.npy")
    weights = lowered.write_lively(tmp_path / "again")
    with open_source(converted.resolve(weights)) as source:
        expected = source.array("model.layers.0.mlp.gate_proj.weight").astype(np.float32)
    np.testing.assert_allclose(found, expected, atol=0.03 * float(np.abs(expected).max()))
