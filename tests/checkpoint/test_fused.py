"""Linear layers that share a tensor of the source, as Phi-3 stores them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from engine_recipes import RequestError, from_hf
from engine_recipes.calibration import SAME_INPUT
from engine_recipes.checkpoint import (
    Linear,
    LinearPart,
    Statistics,
    convert,
    open_source,
    quantize,
    quantize_linears,
    source_shapes,
    verify,
)
from engine_recipes.gate.artifact import examine

LAYER = "model.layers.{}."
FUSED = dict.fromkeys("qkv", f"{LAYER}self_attn.qkv_proj") | dict.fromkeys(("gate", "up"), f"{LAYER}mlp.gate_up_proj")
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
CONFIG = tiny.config("llama", attention_bias=True, mlp_bias=True, **SIZES)


@pytest.fixture
def sources(tmp_path: Path) -> tuple[Path, Path]:
    """One model twice, as the resolve stage leaves it: as Llama stores it, and fused."""
    plain, fused = tiny.write(tmp_path / "plain", **CONFIG), tmp_path / "fused"
    held = tiny.tensors(CONFIG)
    for layer in range(CONFIG["num_hidden_layers"]):
        for kind in (".weight", ".bias"):
            for roles in ("qkv", ("gate", "up")):
                names = [from_hf(CONFIG).names[role].format(layer) + kind for role in roles]
                held[FUSED[roles[0]].format(layer) + kind] = np.concatenate([held.pop(name) for name in names])
    fused.mkdir()
    tiny.save(fused / "model.safetensors", held)
    (fused / "config.json").write_bytes((plain / "config.json").read_bytes())
    for folder, names in ((plain, {}), (fused, FUSED)):
        from_hf(CONFIG, names=names).write(folder / "decoder.json")
        (folder / "source.json").write_text("{}")
    return plain, fused


def test_the_shapes_are_those_of_whole_tensors() -> None:
    shapes = source_shapes(from_hf(CONFIG, names=FUSED))
    assert shapes["model.layers.1.self_attn.qkv_proj.weight"] == (128 + 2 * 64, 128)
    assert shapes["model.layers.1.self_attn.qkv_proj.bias"] == (128 + 2 * 64,)
    assert shapes["model.layers.1.mlp.gate_up_proj.weight"] == (2 * 256, 128)
    assert not any("q_proj" in name or "up_proj.weight" in name for name in shapes if "gate_up" not in name)


def statistics(folder: Path) -> Statistics:
    """Different for each layer, but for those that read the same input."""
    with open_source(folder) as source:
        d = source.decoder
    found: dict[str, Any] = {}
    for layer in range(d.layers):
        for number, roles in enumerate(SAME_INPUT):
            width = CONFIG["intermediate_size"] if roles == ("down",) else CONFIG["hidden_size"]
            random = np.random.RandomState(10 * layer + number)
            scale, amax = random.uniform(0.5, 2, width).astype(np.float32), np.float32(random.uniform(1, 9))
            for role in roles:
                name = d.names[role].format(layer)
                found |= {f"{name}.pre_quant_scale": scale, f"{name}.input_amax": amax.reshape(1)}
                found |= {f"{name}.cache_amax": amax.reshape(1)} if role in "kv" else {}
    return Statistics({"method": "test"}, found)


def made_up(linear: Linear) -> dict[str, Any]:
    """Arrays that name the place they stand for, so that a wrong split shows."""
    weight = linear.weight.astype(np.float32)
    return {"weight": np.rint(weight * 1e4).astype(np.int8), "scale": weight.sum(axis=1)}


PARTS = (LinearPart("weight", "int8"), LinearPart("scale", "float32", columns=0))
WAYS: dict[str, Any] = {
    "plain": lambda source, out, tp, pp, _: convert(source, out, "bfloat16", tp, pp),
    "fp8": lambda source, out, tp, pp, kept: quantize(source, out, kept, "FP8", kv_cache="fp8", tp_size=tp, pp_size=pp),
    "int4": lambda source, out, tp, pp, kept: quantize(source, out, kept, "W4A16_AWQ", tp_size=tp, pp_size=pp),
    "own": lambda source, out, tp, pp, _: quantize_linears(
        source, out, "ACME_8", made_up, parts=PARTS, tp_size=tp, pp_size=pp
    ),
}


@pytest.mark.parametrize(("way", "split"), [(way, split) for way in WAYS for split in ((1, 1), (2, 1), (2, 3))])
def test_it_becomes_the_checkpoint_of_the_same_model_that_is_not_fused(
    sources: tuple[Path, Path], way: str, split: tuple[int, int], tmp_path: Path
) -> None:
    outs = [tmp_path / name for name in "ab"]
    for out, folder in zip(outs, sources, strict=True):
        out.mkdir()
        with open_source(folder) as source:
            WAYS[way](source, out, *split, statistics(folder))
        verify(out)
    assert {file.name: file.read_bytes() for file in outs[0].iterdir()} == {
        file.name: file.read_bytes() for file in outs[1].iterdir()
    }


def worst(checkpoint: Path, folder: Path) -> float:
    """The gate's measure of how far the weights are from the source's, relative."""
    with open_source(folder) as source:
        measures = examine(checkpoint, source, algorithm="", bits=16).measures
    return next(measure.value for measure in measures if measure.name == "plain_error")


def test_the_gate_compares_its_weights(sources: tuple[Path, Path], tmp_path: Path) -> None:
    plain, fused = sources
    outs = [tmp_path / name for name in ("right", "swapped")]
    usual = from_hf(CONFIG).names
    from_hf(CONFIG, names={"gate": usual["up"], "up": usual["gate"]}).write(plain / "decoder.json")
    for out, folder in zip(outs, (fused, plain), strict=True):
        out.mkdir()
        with open_source(folder) as source:
            convert(source, out, "bfloat16", 2)
    assert worst(outs[0], fused) == 0
    assert worst(outs[1], fused) > 1


def test_only_what_reads_the_same_input_may_share_a_tensor() -> None:
    with pytest.raises(RequestError, match="dense and down are both"):
        from_hf(CONFIG, names=dict.fromkeys(("dense", "down"), f"{LAYER}out"))
