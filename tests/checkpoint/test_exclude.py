"""Linear layers that stay at 16 bits in a quantised checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from converted import resolve
from engine_recipes import Decoder, RequestError
from engine_recipes.checkpoint import (
    Statistics,
    convert,
    excluded_linears,
    linear_sizes,
    open_checkpoint,
    open_source,
    quantize,
    verify,
)
from engine_recipes.checkpoint.safetensors import SafeFile

Array = np.ndarray[Any, Any]
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 250, "num_hidden_layers": 3, "head_dim": 64}
AT = "transformer.layers."
PATTERNS = (f"{AT}1.attention.qkv", "*.0.mlp.proj", f"{AT}2.mlp.gate")
#: What PATTERNS stand for: fc goes with gate.
NAMES = [f"{AT}0.mlp.proj", f"{AT}1.attention.qkv", f"{AT}2.mlp.fc", f"{AT}2.mlp.gate"]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2: q, k and v have biases."""
    return resolve(tiny.write(tmp_path_factory.mktemp("hf"), "qwen2", **SHAPE))


def describe(hf: Path) -> Decoder:
    with open_source(hf) as source:
        return source.decoder


def statistics_of(hf: Path, without: str = "no layer") -> Statistics:
    """Numbers that differ from layer to layer."""
    random, vectors = np.random.default_rng(0), {}
    with open_source(hf) as source:
        for name, (_, info) in source.tensors.items():
            if name.endswith("proj.weight") and without not in name:
                linear = name.removesuffix(".weight")
                vectors[f"{linear}.input_amax"] = random.uniform(1, 9, 1).astype(np.float32)
                vectors[f"{linear}.cache_amax"] = random.uniform(1, 9, 1).astype(np.float32)
                vectors[f"{linear}.pre_quant_scale"] = random.uniform(0.5, 2, info.shape[1]).astype(np.float32)
    return Statistics({"method": "test"}, vectors)


def quantised(hf: Path, out: Path, algorithm: Any, statistics: Statistics | None = None, **choices: Any) -> Path:
    out.mkdir()
    with open_source(hf) as source:
        quantize(source, out, statistics or statistics_of(hf), algorithm, **choices)
    verify(out)
    return out


def tensors(folder: Path, rank: int = 0) -> dict[str, Array]:
    with SafeFile(folder / f"rank{rank}.safetensors") as file:
        return {name: np.array(file.array(name)) for name in file.tensors}


def module(name: str) -> str:
    return name.rpartition(".")[0]


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("algorithm", "cache"), [("FP8", "fp8"), ("W4A16_AWQ", "none"), ("W4A16_AWQ", "int8")])
def test_an_excluded_layer_is_unquantised_and_the_others_are_as_without(
    tmp_path: Path, hf: Path, algorithm: str, cache: str, dtype: Any, tp_size: int
) -> None:
    choices = {"dtype": dtype, "kv_cache": cache, "tp_size": tp_size}
    mixed = quantised(hf, tmp_path / "mixed", algorithm, exclude=PATTERNS, **choices)
    whole = quantised(hf, tmp_path / "whole", algorithm, **choices)
    plain = tmp_path / "plain"
    plain.mkdir()
    with open_source(hf) as source:
        convert(source, plain, dtype, tp_size)
    config = json.loads((mixed / "config.json").read_text())
    assert config["quantization"]["exclude_modules"] == ["lm_head", *NAMES]
    for rank in range(tp_size):
        found, quantized, converted = (tensors(folder, rank) for folder in (mixed, whole, plain))
        expected = {name: array for name, array in quantized.items() if module(name) not in NAMES}
        expected |= {name: array for name, array in converted.items() if module(name) in NAMES}
        assert len(expected) < len(quantized)
        assert {name: (a.dtype, a.shape, a.tobytes()) for name, a in found.items()} == {
            name: (a.dtype, a.shape, a.tobytes()) for name, a in expected.items()
        }


@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("algorithm", ["FP8", "W4A16_AWQ"])
def test_ranks_join_to_what_one_rank_holds(
    tmp_path: Path, hf: Path, algorithm: str, tp_size: int, pp_size: int
) -> None:
    choices = {"exclude": [f"{AT}*.attention.*"] if pp_size > 1 else PATTERNS, "kv_cache": "int8", "group_size": 64}
    whole = quantised(hf, tmp_path / "whole", algorithm, **choices)
    split = quantised(hf, tmp_path / "split", algorithm, tp_size=tp_size, pp_size=pp_size, **choices)
    with open_checkpoint(whole) as one, open_checkpoint(split) as many:
        assert sorted(one.names()) == sorted(many.names())
        for name in one.names():
            assert one.info(name) == many.info(name), name
            assert one.array(name).tobytes() == many.array(name).tobytes(), name
            assert one.is_quantized(module(name)) == many.is_quantized(module(name)), name
        assert many.is_quantized(f"{AT}1.mlp.proj")
        assert not many.is_quantized(f"{AT}1.attention.qkv")
        assert not many.is_quantized("lm_head")


def test_with_pipeline_ranks_a_list_names_the_layers_of_each_rank(hf: Path) -> None:
    decoder = describe(hf)  # 2 layers on the first rank, 1 on the second
    assert excluded_linears(decoder, ["*.mlp.proj"], 2) == (f"{AT}0.mlp.proj", f"{AT}1.mlp.proj")
    assert excluded_linears(decoder, [f"{AT}1.mlp.proj"], 2) == (f"{AT}1.mlp.proj",)  # the second has no layer 1
    both = [f"{AT}0.mlp.proj", f"{AT}2.mlp.proj"]
    assert excluded_linears(decoder, both, 2) == (f"{AT}0.mlp.proj",)
    assert excluded_linears(decoder, both) == tuple(both)


REFUSED: list[tuple[list[str], int, str, str]] = [
    (["*.mlp.down"], 1, r"exclude: \*\.mlp\.down is no linear layer", "known: transformer.layers.0.attention.dense"),
    ([f"{AT}0.mlp.porj"], 1, "0.mlp.porj is no linear layer", f"did you mean {AT}0.mlp.proj"),
    ([f"{AT}0.*", f"{AT}3.mlp.proj"], 1, "layers.3.mlp.proj is no linear layer", "did you mean transformer"),
    (["model.layers.0.mlp.down_proj"], 1, "down_proj is no linear layer", "transformer.layers.0.mlp.proj"),
    (["lm_head"], 1, "lm_head is no linear layer", "known: "),
    (["*attention*", "*.proj", "*.fc"], 1, "every linear layer is excluded", "fp16 or bf16"),
    ([f"{AT}0.mlp.proj"], 2, f"with pp_size 2 {AT}2.mlp.proj would be excluded as well", f"{AT}*.mlp.proj"),
    ([f"{AT}2.mlp.proj"], 3, f"with pp_size 3 {AT}0.mlp.proj would be excluded as well", "pp_size 1"),
]


@pytest.mark.parametrize(("patterns", "pp_size", "message", "hint"), REFUSED)
def test_what_cannot_be_excluded_is_refused(
    tmp_path: Path, hf: Path, patterns: list[str], pp_size: int, message: str, hint: str
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        excluded_linears(describe(hf), patterns, pp_size)
    assert hint in caught.value.hint
    (tmp_path / "out").mkdir()
    with open_source(hf) as source, pytest.raises(RequestError, match=message):
        quantize(source, tmp_path / "out", statistics_of(hf), "FP8", exclude=patterns, pp_size=pp_size)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("algorithm", ["FP8", "W4A16_AWQ"])
def test_an_excluded_layer_needs_no_statistics(tmp_path: Path, hf: Path, algorithm: str) -> None:
    statistics = statistics_of(hf, without="layers.1.mlp.down_proj")
    quantised(hf, tmp_path / "out", algorithm, statistics, exclude=["*.1.mlp.proj"])
    with pytest.raises(RequestError, match=r"has no model\.layers\.1\.mlp\.down_proj"):
        quantised(hf, tmp_path / "other", algorithm, statistics, exclude=["*.2.mlp.proj"])


def test_linear_layers_are_counted_with_their_weights(hf: Path) -> None:
    sizes = linear_sizes(describe(hf))
    assert len(sizes) == 3 * 5
    assert {name: size for name, size in sizes.items() if ".1." in name} == {
        f"{AT}1.attention.qkv": (256 + 2 * 128) * 256,
        f"{AT}1.attention.dense": 256 * 256,
        f"{AT}1.mlp.fc": 512 * 256,
        f"{AT}1.mlp.gate": 512 * 256,
        f"{AT}1.mlp.proj": 512 * 256,
    }
