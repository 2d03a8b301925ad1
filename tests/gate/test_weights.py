"""Weight fidelity: what rounding explains passes, whatever the format; what it does not is measured as such."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file

import sabotage
import tiny
from converted import resolve
from engine_recipes.checkpoint import Statistics, convert, open_source, quantize
from engine_recipes.gate.parts import Parts
from engine_recipes.gate.weights import Compared, compare, measures
from sabotage import Made, good, tensors

#: No value that was rounded to nearest is further off than half a step: √3 times what rounding explains.
MOST = 3**0.5 + 1e-3
Goods = Callable[..., Made]


@pytest.fixture(scope="module")
def goods(tmp_path_factory: pytest.TempPathFactory) -> Goods:
    """Good checkpoints, made once for each set of arguments. Copy before changing one."""
    return cache(lambda *args, **named: good(tmp_path_factory.mktemp("good"), *args, **named))


def look(source: Path, folder: Path) -> tuple[dict[str, float], dict[str, Compared]]:
    """Measures by name, and tensors by name; everything must be comparable."""
    with open_source(source) as opened, Parts(folder, opened) as parts:
        assert not parts.problems
        compared = compare(parts.parts, opened)
    return {m.name: m.value for m in measures(compared)}, {t.name: t for t in compared}


#: What formats' rounding costs these weights: (relative error of quantised matrices, of the rest).
ERRORS = {
    "float16": (None, 1e-3),
    "bfloat16": (None, 3e-3),
    "W8A16": (None, 1e-3),
    "fp8": (0.04, 3e-3),
    "int8": (0.03, 3e-3),
    "int4": (0.2, 3e-3),
}


@pytest.mark.parametrize(("source_dtype", "tp_size"), [("bfloat16", 1), ("float32", 2), ("float32", 1)])
@pytest.mark.parametrize("precision", sabotage.PRECISIONS)
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma"])
def test_a_good_checkpoint_is_off_by_its_rounding(
    goods: Goods, arch: str, precision: str, source_dtype: str, tp_size: int
) -> None:
    made = goods(arch, precision, tp_size=tp_size, source_dtype=source_dtype)
    found, compared = look(made.source, made.checkpoint)
    quantised, plain = ERRORS[precision]
    assert found["weight_rounding"] <= MOST
    assert found["plain_error"] < plain
    assert found["weight_cosine"] > (0.98 if quantised else 0.99999)
    assert found.get("weight_error", 0) < (quantised or 1)
    assert found.get("fp8_saturation", 0) == 0
    assert ("weight_error" in found) == (quantised is not None)
    if quantised:
        assert found["weight_rounding"] > 0.5
        assert all(t.error > 0.003 for t in compared.values() if t.linear)


@pytest.mark.parametrize("precision", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_sums_are_those_of_the_dequantised_matrices(goods: Goods, precision: str, seed: int) -> None:

    made = goods("llama", precision, seed=seed)
    _, compared = look(made.source, made.checkpoint)
    stored, source = load_file(made.checkpoint / "rank0.safetensors"), load_file(made.source / "model.safetensors")
    for layer in range(4):
        name = f"transformer.layers.{layer}.mlp.proj"
        mine, scale = stored[f"{name}.weight"], stored[f"{name}.weights_scaling_factor"].double()
        if precision == "int4":
            nibbles = torch.stack([(mine << 4) >> 4, mine >> 4], 1).flatten(0, 1)  # [out, in]
            scale = scale.repeat_interleave(64, 1) * stored[f"{name}.prequant_scaling_factor"].double()
            mine = nibbles
        if precision == "int8":
            scale = scale[:, None] * stored[f"{name}.prequant_scaling_factor"].double()
        mine = mine.double() * scale
        theirs = source[f"model.layers.{layer}.mlp.down_proj.weight"].double()
        found = compared[f"{name}.weight"]
        assert found.error == pytest.approx(float((mine - theirs).norm() / theirs.norm()), rel=1e-4)
        cosine = torch.cosine_similarity(mine.flatten(), theirs.flatten(), 0)
        assert found.cosine == pytest.approx(float(cosine), abs=1e-6)
        assert found.count == mine.numel()


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("seed", range(3))
def test_splitting_changes_no_number(goods: Goods, kind: str, seed: int) -> None:
    one, two = goods("qwen2", kind, seed=seed), goods("qwen2", kind, tp_size=2, pp_size=2, seed=seed)
    (_, whole), (_, split) = look(one.source, one.checkpoint), look(two.source, two.checkpoint)
    assert whole.keys() == split.keys()
    for name, tensor in whole.items():
        assert split[name].error == pytest.approx(tensor.error, rel=1e-5), name
        if tensor.linear:
            assert split[name].count == tensor.count, name


@pytest.mark.parametrize(("seed", "tp_size"), [(1, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize(
    ("spoil", "precision", "arch", "where"),
    [
        (spoil, precision, "llama", where)
        for spoil, where in (
            (sabotage.swap_qk, "layers.1.attention.qkv.weight"),
            (sabotage.permute_layer, "layers.1.mlp.fc.weight"),
            (sabotage.swap_fc_gate, "layers.1.mlp."),
        )
        for precision in ("float16", "fp8", "int8", "int4")
    ]
    + [
        (sabotage.scale_times_8, "fp8", "llama", "layers.1.mlp.proj.weight"),
        (sabotage.scale_times_8, "int8", "llama", "layers.1.mlp.proj.weight"),
        (sabotage.scale_times_8, "int4", "llama", "layers.1.mlp.proj.weight"),
        (sabotage.one_group_times_8, "int4", "llama", "group 0 of row 5 of model.layers.1.mlp.down_proj.weight"),
        (sabotage.swap_nibbles, "int4", "llama", "layers.1.mlp.proj.weight"),
        (sabotage.zero_biases, "float16", "qwen2", "attention.qkv.bias"),
        (sabotage.zero_biases, "fp8", "qwen2", "attention.qkv.bias"),
        (sabotage.norms_one, "bfloat16", "qwen3", "norm.weight"),
        (sabotage.head_4_bits, "int4", "llama", "lm_head.weight"),
        (sabotage.head_4_bits, "bfloat16", "llama", "lm_head.weight"),
    ],
)
def test_what_rounding_does_not_explain_stands_out(
    goods: Goods,
    tmp_path: Path,
    spoil: Callable[[Path], None],
    precision: str,
    arch: str,
    where: str,
    seed: int,
    tp_size: int,
) -> None:
    made = goods(arch, precision, seed=seed, tp_size=tp_size)
    folder = Path(shutil.copytree(made.checkpoint, tmp_path / "bad"))
    spoil(folder)
    with open_source(made.source) as source, Parts(folder, source) as parts:
        found = {m.name: m for m in measures(compare(parts.parts, source))}
    assert found["weight_rounding"].value > 5
    assert where in found["weight_rounding"].note


def test_a_small_group_that_is_wrong_is_found_although_the_matrix_looks_right(goods: Goods, tmp_path: Path) -> None:
    made = goods("llama", "int4")
    folder = Path(shutil.copytree(made.checkpoint, tmp_path / "bad"))
    with tensors(folder) as held:
        held["transformer.layers.2.mlp.fc.weights_scaling_factor"][7, 1] *= 2
    good, bad = look(made.source, made.checkpoint)[0], look(made.source, folder)[0]
    assert bad["weight_error"] < 1.2 * good["weight_error"]
    assert bad["weight_rounding"] > 2.5


def test_clipped_values_are_saturation_and_the_maximum_itself_is_not(goods: Goods, tmp_path: Path) -> None:
    made = goods("llama", "fp8")
    assert look(made.source, made.checkpoint)[0]["fp8_saturation"] == 0
    folder = Path(shutil.copytree(made.checkpoint, tmp_path / "bad"))
    with tensors(folder) as held:
        module = "transformer.layers.1.mlp.fc"
        scale = held[f"{module}.weights_scaling_factor"] / 4  # a scale that is too small, weights rounded by it
        values = held[f"{module}.weight"].float() * 4
        held[f"{module}.weights_scaling_factor"] = scale
        held[f"{module}.weight"] = values.clamp(-448, 448).to(torch.float8_e4m3fn)
        share = float((values.abs() > 464).float().mean())
    found = look(made.source, folder)[0]
    assert found["fp8_saturation"] == pytest.approx(share, rel=0.05)
    assert found["weight_rounding"] > 2.5


def test_a_row_of_zeros_must_stay_zeros(tmp_path: Path) -> None:
    hf = tiny.config(**sabotage.SHAPE)
    arrays = tiny.tensors(hf)
    arrays["model.layers.0.mlp.gate_proj.weight"][3] = 0
    arrays["model.layers.1.mlp.gate_proj.weight"][:] = 0
    source, folder = resolve(tiny.write_tensors(tmp_path / "hf", hf, arrays)), tmp_path / "out"
    folder.mkdir()
    with open_source(source) as opened:
        quantize(opened, folder, statistics(opened), "W4A16_AWQ", group_size=64)
    found, compared = look(source, folder)
    assert found["weight_rounding"] <= MOST
    assert compared["transformer.layers.1.mlp.fc.weight"].error == 0
    with tensors(folder) as held:
        held["transformer.layers.0.mlp.fc.weight"][1, 9] = 0x10  # row 3, one step
    found, compared = look(source, folder)
    assert found["weight_rounding"] == np.inf
    assert compared["transformer.layers.0.mlp.fc.weight"].where.endswith("row 3 of model.layers.0.mlp.gate_proj.weight")


@pytest.mark.parametrize("precision", ["bfloat16", "fp8"])
def test_nan_is_reported_and_counts_as_an_infinite_error(goods: Goods, tmp_path: Path, precision: str) -> None:
    made = goods("llama", precision)
    folder = Path(shutil.copytree(made.checkpoint, tmp_path / "bad"))
    sabotage.nan_in_one(folder)
    found, compared = look(made.source, folder)
    (bad,) = [tensor for tensor in compared.values() if not tensor.finite]
    assert bad.name == "transformer.layers.1.mlp.fc.weight"
    assert found["plain_error" if precision == "bfloat16" else "weight_error"] == np.inf


def test_padding_of_a_split_head_must_be_zeros(goods: Goods, tmp_path: Path) -> None:
    made = good(tmp_path / "made", "llama", "float16", tp_size=2, vocab_size=251)
    assert look(made.source, made.checkpoint)[0]["weight_rounding"] <= MOST
    path = made.checkpoint / "rank1.safetensors"
    path.rename(made.checkpoint / "kept")
    shutil.copy(made.checkpoint / "rank0.safetensors", tmp_path / "rank0")
    shutil.move(made.checkpoint / "kept", made.checkpoint / "rank0.safetensors")
    with tensors(made.checkpoint) as held:
        held["lm_head.weight"][-1, 3] = 0.5
    shutil.move(made.checkpoint / "rank0.safetensors", path)
    shutil.move(tmp_path / "rank0", made.checkpoint / "rank0.safetensors")
    found, compared = look(made.source, made.checkpoint)
    assert found["weight_rounding"] == np.inf
    assert compared["lm_head.weight"].where == "in what pads it"


def statistics(source: Any, scale: float = 1.0) -> Statistics:
    """Made up, the same for every layer."""
    found: dict[str, Any] = {}
    for name, (_, info) in source.tensors.items():
        linear = name.removesuffix(".weight")
        found[f"{linear}.input_amax"] = np.ones(1, np.float32)
        found[f"{linear}.pre_quant_scale"] = np.full(info.shape[-1], scale, np.float32)
    return Statistics({"method": "made up"}, found)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.sampled_from([1e-30, 1e-12, 1e-6, 1e-2, 1.0, 1e3]),
    outliers=st.sampled_from([1.0, 30.0, 1e4]),
    zeros=st.sampled_from([0.0, 0.5, 0.99]),
    source_dtype=st.sampled_from(["float32", "bfloat16"]),
    precision=st.sampled_from(["float16", "bfloat16", "FP8", "W4A16_AWQ"]),
    prequant=st.sampled_from([0.3, 1.0, 2.7]),
)
def test_correct_rounding_is_never_blamed(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    size: float,
    outliers: float,
    zeros: float,
    source_dtype: str,
    precision: str,
    prequant: float,
) -> None:
    work = tmp_path_factory.mktemp("any")
    hf = tiny.config(**{**sabotage.SHAPE, "num_hidden_layers": 1, "torch_dtype": source_dtype})
    arrays, random = tiny.tensors(hf), np.random.default_rng(seed)
    for name, array in arrays.items():
        values = random.normal(0, size, array.shape) * (random.random(array.shape) >= zeros)
        values[random.random(array.shape) < 0.01] *= outliers
        arrays[name] = values.astype(np.float32).clip(-6e4, 6e4).astype(array.dtype)
    source = resolve(tiny.write_tensors(work / "hf", hf, arrays))
    folder = work / "out"
    folder.mkdir()
    with open_source(source) as opened:
        if precision in ("FP8", "W4A16_AWQ"):
            quantize(opened, folder, statistics(opened, prequant), precision, dtype="bfloat16", group_size=64)  # type: ignore[arg-type]
        else:
            convert(opened, folder, precision)  # type: ignore[arg-type]
    found, _ = look(source, folder)
    assert found["weight_rounding"] <= MOST
    assert found.get("fp8_saturation", 0) == 0
