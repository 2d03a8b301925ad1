from __future__ import annotations

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import lowered
import tiny
from engine_recipes import Artifact, MachineError, RequestError, StageContext, checkpoint, events
from engine_recipes.types import Sampling
from engine_recipes_engines import onnxruntime as engine
from engine_recipes_engines.lowering.graph import DATA, MODEL
from engine_recipes_engines.onnxruntime.runtime import OnnxRuntime
from test_rope import LLAMA3, YARN

IDS = np.random.default_rng(1).integers(0, 250, 40).tolist()
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "three queries a key": ("llama", {"hidden_size": 96, "num_attention_heads": 6}),
    "one key head": ("llama", {"num_key_value_heads": 1}),
    "head size of its own": ("llama", {"head_dim": 32}),
    "llama3 rope": ("llama", {"rope_scaling": LLAMA3}),
    "yarn rope": ("llama", {"rope_scaling": YARN}),
    "linear rope": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "partial rope": ("partial", {}),
    "partial rope that attention cannot do": ("partial", {"partial_rotary_factor": 0.25}),
    "heads that attention cannot turn": ("llama", {"head_dim": 24}),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    arch, changes = MODELS[name]
    hf = lowered.write_lively(tmp_path / "hf", arch, **changes)
    runtime = OnnxRuntime(lowered.build(hf, tmp_path), {})
    expected = lowered.reference(hf, IDS)  # [40, vocabulary]
    assert expected.std() > 1  # so 1e-4 is much less than any mistake
    for found in (runtime.logits(IDS), runtime.stepwise_logits(IDS)):
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert np.sqrt(np.mean((found - expected) ** 2)) < 1e-5 * expected.std()
    greedy = list(runtime.generate(IDS[:8], Sampling(1)))
    assert greedy == [int(expected[7].argmax())]


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma", "partial"])
def test_a_split_checkpoint_gives_the_same_engine(tmp_path: Path, arch: str) -> None:
    hf = tiny.write(tmp_path / "hf", arch)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    one = lowered.build(hf, whole, "bfloat16")
    four = lowered.build(hf, parts, "bfloat16", tp_size=2, pp_size=2)
    for name in (MODEL, DATA, "genai_config.json"):
        assert (one / name).read_bytes() == (four / name).read_bytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_stored_as_it_is_and_computed_in_float32(tmp_path: Path, dtype: str) -> None:
    hf = lowered.write_lively(tmp_path / "hf", "qwen3")  # bfloat16 weights, small ones: float16 holds them exactly
    out = lowered.build(hf, tmp_path, dtype)
    weights = (tmp_path / "checkpoint" / "rank0.safetensors").stat().st_size
    assert (out / DATA).stat().st_size < 1.5 * weights  # pages and rope tables
    np.testing.assert_allclose(OnnxRuntime(out, {}).logits(IDS), lowered.reference(hf, IDS), atol=1e-3)


@pytest.mark.parametrize("arch", ["llama", "gemma", "partial"])
def test_a_gpu_target_computes_in_the_checkpoints_dtype(tmp_path: Path, arch: str) -> None:
    hf = lowered.write_lively(tmp_path / "hf", arch)
    out = lowered.build(hf, tmp_path, "float16", target="sm89")
    config = json.loads((out / "genai_config.json").read_text())
    assert "cuda" in config["model"]["decoder"]["session_options"]["provider_options"][0]
    runtime = OnnxRuntime(out, {})  # here without CUDA: the same graph, by the CPU's kernels
    assert runtime.compute == "float16"
    expected = lowered.reference(hf, IDS)
    np.testing.assert_allclose(runtime.logits(IDS), expected, atol=0.05)  # 11 bits, through 3 layers
    np.testing.assert_allclose(runtime.stepwise_logits(IDS), expected, atol=0.05)


def test_a_gpu_target_refuses_float32(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="sm90 computes in half precision, the checkpoint is float32"):
        lowered.build(tiny.write(tmp_path / "hf"), tmp_path, "float32", target="sm90")


@pytest.mark.parametrize(("tied", "tables"), [(True, 1), (False, 2)])
def test_a_tied_head_shares_the_embedding_table(tmp_path: Path, tied: bool, tables: int) -> None:
    out = lowered.build(tiny.write(tmp_path / "hf", tie_word_embeddings=tied), tmp_path)
    shapes = [tuple(t.dims) for t in onnx.load(out / MODEL, load_external_data=False).graph.initializer]
    assert shapes.count((256, 64)) == tables
    onnx.checker.check_model(str(out / MODEL))


def test_a_padded_head_is_cut_to_the_vocabulary(tmp_path: Path) -> None:
    hf = tiny.write(tmp_path / "hf", "qwen2")  # 301 tokens: on two ranks, one row of padding
    out = lowered.build(hf, tmp_path, "bfloat16", tp_size=2)
    assert OnnxRuntime(out, {}).logits(IDS[:2]).shape == (2, 301)


def test_max_seq_len_bounds_the_tables(tmp_path: Path) -> None:
    hf = tiny.write(tmp_path / "hf")
    out = lowered.build(hf, tmp_path, max_seq_len=24)
    model = onnx.load(out / MODEL, load_external_data=False)
    assert {t.name: list(t.dims) for t in model.graph.initializer}["rope.cos"] == [24, 8]
    runtime = OnnxRuntime(out, {})
    assert runtime.max_seq_len == 24
    assert len(list(runtime.generate(IDS[:20], Sampling(100)))) == 5  # the last one needs no place


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"max_seq_len": 300}, "max_seq_len = 300, but the model is meant for sequences of up to 256 tokens"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, {}, "cannot do rope scaling 'dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, {}, "rope scaling needs original_max_position"),
        ({"num_attention_heads": 16, "num_key_value_heads": 4}, {}, "heads of 4, and not of a multiple of 8"),
    ],
)
def test_what_it_cannot_do_is_refused(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    hf = tiny.write(tmp_path / "hf", **changes)
    with pytest.raises(RequestError, match=message) as caught:
        lowered.build(hf, tmp_path, **options)
    assert caught.value.hint
    assert not list((tmp_path / "engine").iterdir())
    early = StageContext("m:p@onnxruntime", "stage2", options, (), tmp_path / "nowhere")
    with pytest.raises(RequestError, match=message):
        engine.check_decoder(early, lowered.describe(hf))


def test_an_activation_of_another_family_is_refused_early(tmp_path: Path) -> None:
    decoder = replace(lowered.describe(tiny.write(tmp_path / "hf")), activation="gelu")
    with pytest.raises(RequestError, match="does not know the activation 'gelu'"):
        engine.check_decoder(StageContext("m:p@onnxruntime", "stage2", {}, (), tmp_path), decoder)


@pytest.mark.parametrize("name", MODELS)
def test_what_it_can_do_is_not_refused(tmp_path: Path, name: str) -> None:
    arch, changes = MODELS[name]
    decoder = lowered.describe(tiny.write(tmp_path / "hf", arch, **changes))
    engine.check_decoder(StageContext("m:p@onnxruntime", "stage2", {"max_seq_len": 256}, (), tmp_path), decoder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization": {"quant_algo": "NVFP4"}}, "cannot lower quant_algo NVFP4"),
        ({"hidden_act": "gelu"}, "does not know the activation 'gelu'"),  # made elsewhere: nobody asked before
    ],
)
def test_a_checkpoint_it_cannot_lower_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    context = lowered.context(
        tiny.write(tmp_path / "hf"), tmp_path, dtype="float16", tp_size=1, pp_size=1, target="cpu"
    )
    path = context.inputs[0].path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(RequestError, match=message):
        engine.stage2(context)
    assert not list(context.out.iterdir())


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = lowered.context(
        tiny.write(tmp_path / "hf"), tmp_path, dtype="float16", tp_size=1, pp_size=1, target="cpu"
    )
    usage = namedtuple("usage", "total used free")(1 << 30, 1 << 30, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(MachineError, match=r"the engine needs .*, 1.0 kB are free"):
        engine.stage2(context)
    assert not list(context.out.iterdir())


def test_progress_ends_near_the_announced_total(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    with events.sink(seen.append):
        lowered.build(tiny.write(tmp_path / "hf"), tmp_path)
    done = [event for event in seen if event.get("label") == "lowering"]
    assert [e["done"] for e in done] == sorted(e["done"] for e in done)
    assert done[-1]["unit"] == "B"
    assert abs(done[-1]["done"] / done[-1]["total"] - 1) < 0.25  # pages more, vectors less: tiny tensors


def test_genai_config_names_what_ends_an_answer(tmp_path: Path) -> None:
    hf = tiny.write(tmp_path / "hf", eos_token_id=2)
    (hf / "generation_config.json").write_text('{"eos_token_id": [2, 7], "temperature": 0.6, "top_k": null}')
    config = json.loads((lowered.build(hf, tmp_path) / "genai_config.json").read_text())
    model = config["model"]
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (1, [2, 7], 2)
    assert (config["search"]["temperature"], config["search"]["top_k"]) == (0.6, 50)
    assert model["decoder"]["session_options"]["provider_options"] == []


def test_a_checkpoint_without_its_source_can_be_lowered(tmp_path: Path) -> None:
    with_source = lowered.context(
        tiny.write(tmp_path / "hf"), tmp_path, dtype="float16", tp_size=1, pp_size=1, target="cpu"
    )
    artifact: Artifact = with_source.inputs[0]
    engine.stage2(StageContext("m:p@onnxruntime", "stage2", {}, (artifact,), with_source.out))
    assert OnnxRuntime(with_source.out, {}).logits([1]).shape == (1, 256)
    with checkpoint.open_checkpoint(artifact.path) as opened:
        assert opened.decoder.layers == 3
