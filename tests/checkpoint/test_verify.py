from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converted import built
from engine_recipes import StageFailed
from engine_recipes.checkpoint import open_checkpoint, verify
from engine_recipes.checkpoint.formats import stored
from engine_recipes.checkpoint.safetensors import SafeFile, numpy_dtype, write

NORM = "transformer.layers.0.input_layernorm.weight"
FC = "transformer.layers.0.mlp.fc.weight"


def change(folder: Path, **arrays: np.ndarray[Any, Any] | None) -> None:
    """Replace, add or (None) remove tensors of rank 0; `__` stands for a dot."""
    path = folder / "rank0.safetensors"
    with SafeFile(path) as file:
        held = {name: file.array(name).copy() for name in file.tensors}
    for name, array in arrays.items():
        held.pop(name.replace("__", "."), None)
        if array is not None:
            held[name.replace("__", ".")] = array
    path.unlink()
    data = ([array.tobytes()] for array in held.values())
    list(write(path, {name: (array.dtype.name, array.shape) for name, array in held.items()}, data))


def replace_in_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def damage_a_byte(folder: Path) -> None:
    path = folder / "rank0.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "rank missing": (lambda f: (f / "rank1.safetensors").unlink(), r"rank1\.safetensors is missing .*tp_size 2"),
    "stale rank": (
        lambda f: shutil.copy(f / "rank0.safetensors", f / "rank2.safetensors"),
        r"rank2\.safetensors in .* does not belong there",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
    "half a config": (lambda f: (f / "config.json").write_text("{"), r"config\.json in .* cannot be read"),
    "no rope base": (lambda f: replace_in_config(f, rotary_base=None), "lacks rotary_base"),
    "cut off": (damage_a_byte, r"rank0\.safetensors is cut off"),
    "other width": (lambda f: replace_in_config(f, intermediate_size=88), r"mlp.*has shape \[88, 64\] instead of"),
    "other dtype": (lambda f: replace_in_config(f, dtype="bfloat16"), r"is float16, and config\.json says bfloat16"),
    "impossible": (lambda f: replace_in_config(f, num_attention_heads=3, num_key_value_heads=3), "cannot be split"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_named(tmp_path: Path, name: str) -> None:
    out = built(tmp_path, tp_size=2)
    verify(out)
    damage, message = DAMAGE[name]
    damage(out)
    with pytest.raises(StageFailed, match=message) as caught:
        verify(out, contents=False)
    assert caught.value.hint


def test_missing_and_unknown_tensors(tmp_path: Path) -> None:
    out = built(tmp_path)
    change(out, **{NORM: None})
    with pytest.raises(StageFailed, match=r"rank0\.safetensors lacks transformer\.layers\.0\.input_layernorm"):
        verify(out)
    change(out, **{NORM: np.ones(64, np.float16), "x": np.ones(1, np.float16)})
    with pytest.raises(StageFailed, match=r"rank0\.safetensors holds x"):
        verify(out)
    change(out, x=None, rotary_inv_freq=np.ones(8, np.float32))
    verify(out)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_found_in_the_contents(tmp_path: Path, value: float) -> None:
    out = built(tmp_path)
    bad = np.ones((176, 64), np.float16)
    bad[175, 63] = value
    change(out, **{FC: bad})
    verify(out, contents=False)
    with pytest.raises(StageFailed, match=r"rank0\.safetensors: transformer\.layers\.0\.mlp\.fc\.weight holds"):
        verify(out)


QKV = "transformer.layers.1.attention.qkv."
DENSE = "transformer.layers.1.attention.dense."
QUANTISED: dict[str, tuple[str, str | None, dict[str, np.ndarray[Any, Any] | None], str]] = {
    "no input scale": ("FP8", None, {"activation_scaling_factor": None}, "lacks {}activation_scaling_factor"),
    "no group scales": ("W4A16_AWQ", None, {"weights_scaling_factor": None}, "lacks {}weights_scaling_factor"),
    "a scale for each row": (
        "FP8",
        None,
        {"weights_scaling_factor": np.ones(128, np.float32)},
        r"{}weights_scaling_factor has shape \[128\] instead of \[1\]",
    ),
    "scales of other groups": (
        "W4A16_AWQ",
        None,
        {"weights_scaling_factor": np.ones((128, 2), np.float32)},
        r"{}weights_scaling_factor has shape \[128, 2\] instead of \[128, 1\]",
    ),
    "two bytes a weight": (
        "FP8",
        None,
        {"weight": np.ones((128, 64), np.float16)},
        "{}weight is float16, and config.json says float8_e4m3fn",
    ),
    "weights that are not packed": (
        "W4A16_AWQ",
        None,
        {"weight": np.ones((128, 64), np.int8)},
        r"{}weight has shape \[128, 64\] instead of \[64, 64\]",
    ),
    "a tensor too many": ("FP8", None, {"zeros": np.ones(1, np.int8)}, "holds {}zeros, which config.json does not"),
    "another algorithm's tensor": (
        "FP8",
        None,
        {"prequant_scaling_factor": np.ones(64, np.float16)},
        "holds {}prequant_scaling_factor, which config.json does not",
    ),
    "quantised, and said not to be": (
        "W8A16",
        None,
        {"weight": np.ones((128, 64), np.int8)},
        "{}weight is int8, and config.json says float16",
    ),
    "a cache without scales": ("FP8", "FP8", {}, "lacks transformer.layers.0.attention.kv_cache_scaling_factor"),
}


def quantised(folder: Path, algorithm: str, cache: str | None = None) -> Path:
    """A checkpoint with the tensors of an algorithm, each of one value; scales for a cache are not among them."""
    out = built(folder, intermediate_size=128)
    replace_in_config(out, quantization={"quant_algo": algorithm, "kv_cache_quant_algo": None, "group_size": 64})
    with open_checkpoint(out) as opened:
        (specs,) = opened.layout()
        tensors = {t.name: np.ones(t.spec.shape, numpy_dtype(t.dtype)) for t in stored(specs, opened.scheme, "float16")}
    change(out, **tensors)
    verify(out)
    replace_in_config(out, quantization={"quant_algo": algorithm, "kv_cache_quant_algo": cache, "group_size": 64})
    return out


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_checkpoint_holds_what_its_algorithm_says(tmp_path: Path, name: str) -> None:
    algorithm, cache, changes, message = QUANTISED[name]
    out = quantised(tmp_path, algorithm, cache)
    change(out, **{QKV + part: array for part, array in changes.items()})
    with pytest.raises(StageFailed, match=r"rank0\.safetensors:? " + message.format(re.escape(QKV))):
        verify(out)


SCALES = ("weights_scaling_factor", "activation_scaling_factor", "prequant_scaling_factor")
PLAIN = {"weight": np.ones((128, 64), np.float16), **dict.fromkeys(SCALES)}


@pytest.mark.parametrize("algorithm", ["FP8", "W4A16_AWQ"])
@pytest.mark.parametrize("listed", [QKV.strip("."), "*.1.attention.*"])
def test_what_is_listed_as_excluded_is_plain_and_nothing_else_is(tmp_path: Path, algorithm: str, listed: str) -> None:
    out = quantised(tmp_path, algorithm)
    change(out, **{f"{at}{part}": array for at in (QKV, DENSE) for part, array in PLAIN.items()})
    change(out, **{f"{DENSE}weight": np.ones((64, 64), np.float16)})
    settings = {"quant_algo": algorithm, "group_size": 64}
    replace_in_config(out, quantization={**settings, "exclude_modules": ["lm_head", listed, DENSE.strip(".")]})
    verify(out)
    for names in (["lm_head"], None, [f"{DENSE}.*"]):
        replace_in_config(out, quantization={**settings, "exclude_modules": names})
        with pytest.raises(StageFailed, match=r"rank0\.safetensors lacks .*attention\.qkv\.weights_scaling_factor"):
            verify(out)


@pytest.mark.parametrize("algorithm", ["FP8", "W4A16_AWQ"])
def test_what_is_listed_as_excluded_and_quantised_is_refused(tmp_path: Path, algorithm: str) -> None:
    out = quantised(tmp_path, algorithm)
    excluded = ["lm_head", QKV.strip(".")]
    replace_in_config(out, quantization={"quant_algo": algorithm, "group_size": 64, "exclude_modules": excluded})
    with pytest.raises(StageFailed, match=r"holds .*qkv\.\w+_scaling_factor, which config\.json does not imply"):
        verify(out)
    change(out, **{QKV + scale: None for scale in SCALES})
    with pytest.raises(StageFailed, match=r"attention\.qkv\.weight (is float8_e4m3fn|has shape)"):
        verify(out)
    change(out, **{QKV + "weight": np.ones((128, 64), np.float16)})
    verify(out)


@pytest.mark.parametrize("names", ["lm_head", ["lm_head", 3], {"lm_head": True}])
def test_a_list_of_exclusions_that_is_none_is_refused(tmp_path: Path, names: object) -> None:
    out = quantised(tmp_path, "FP8")
    replace_in_config(out, quantization={"quant_algo": "FP8", "exclude_modules": names})
    with pytest.raises(StageFailed, match=r"config\.json gives exclude_modules as"):
        verify(out)


@pytest.mark.parametrize(("algorithm", "cache"), [("W4A8_AWQ", None), ("FP8", "NVFP4")])
def test_of_an_unknown_algorithm_only_what_all_share_is_checked(
    tmp_path: Path, algorithm: str, cache: str | None
) -> None:
    out = built(tmp_path)
    scale = FC.replace("weight", "alpha")
    change(out, **{FC: np.ones((88, 64), np.int8), scale: np.ones(1, np.float32)})
    replace_in_config(out, quantization={"quant_algo": algorithm, "kv_cache_quant_algo": cache})
    verify(out)
    change(out, **{NORM: np.ones(63, np.float16)})
    with pytest.raises(StageFailed, match=r"input_layernorm\.weight has shape \[63\] instead of \[64\]"):
        verify(out)
    change(out, **{NORM: np.ones(64, np.float16), FC: None})
    with pytest.raises(StageFailed, match=r"lacks transformer\.layers\.0\.mlp\.fc\.weight"):
        verify(out)


NONSENSE: dict[str, tuple[dict[str, object], str]] = {
    "a word for the mapping": ({"mapping": "x"}, "gives mapping as 'x'"),
    "more ranks than there are": (
        {"mapping": {"tp_size": 60_000, "pp_size": 60_000}},
        r"rank2\.safetensors is missing",
    ),
    "ranks beyond all bounds": ({"mapping": {"tp_size": 10**9}}, "gives the mapping as"),
    "a word for the quantization": ({"quantization": "x"}, "gives quantization as 'x'"),
    "an algorithm that is a list": ({"quantization": {"quant_algo": ["FP8"]}}, r"names \['FP8'\] as a quantization"),
    "a cache that is a number": ({"quantization": {"kv_cache_quant_algo": 8}}, "names 8 as a quantization"),
    "a billion layers": ({"num_hidden_layers": 10**9}, "says num_hidden_layers 1000000000, and the rank files hold"),
    "a billion heads": ({"num_attention_heads": 10**9}, "num_attention_heads is too large"),
    "layers with a fraction": ({"num_hidden_layers": 3.0}, r"num_hidden_layers is 3\.0"),
    "a width that is true": ({"hidden_size": True}, "hidden_size is True"),
    "a negative vocabulary": ({"vocab_size": -300}, "vocab_size is -300"),
    "a vocabulary of hundreds of digits": ({"vocab_size": 10**400}, "vocab_size is too large"),
    "a vocabulary that no file holds": ({"vocab_size": 10**9}, "has shape"),
    "a rope base that is no number": ({"rotary_base": float("nan")}, "rotary_base is too large, or no number"),
    "a rope base without end": ({"rotary_base": float("inf")}, "rotary_base is too large, or no number"),
    "a word for the rope scaling": ({"rotary_scaling": "x"}, "gives rotary_scaling as 'x'"),
    "a word in the rope scaling": (
        {"rotary_scaling": {"rope_type": "yarn", "factor": 4, "beta_fast": "x"}},
        r"rotary_scaling\.beta_fast is 'x'",
    ),
    "an activation without a name": ({"hidden_act": ["silu"]}, r"hidden_act is \['silu'\]"),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_a_config_of_nonsense_is_refused_at_once(tmp_path: Path, name: str) -> None:
    out = built(tmp_path, tp_size=2)
    changes, message = NONSENSE[name]
    replace_in_config(out, **changes)
    start = time.perf_counter()
    with pytest.raises(StageFailed, match=message) as caught:
        verify(out, contents=False)
    assert caught.value.hint
    assert time.perf_counter() - start < 1


def test_a_tied_head_may_be_left_out_and_no_other(tmp_path: Path) -> None:
    tied, apart = built(tmp_path / "tied", "gemma"), built(tmp_path / "apart", tie_word_embeddings=False)
    for folder in (tied, apart):
        change(folder, lm_head__weight=None)
    verify(tied)
    with pytest.raises(StageFailed, match=r"lacks lm_head\.weight"):
        verify(apart)
    change(tied, transformer__vocab_embedding__weight=None)
    with pytest.raises(StageFailed, match=r"lacks transformer\.vocab_embedding\.weight"):
        verify(tied)
