from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

import lowered
import tiny
from engine_recipes import Artifact, Check, RequestError, StageContext, checkpoint, events
from engine_recipes_engines import onnxruntime as engine
from engine_recipes_engines.lowering.graph import DATA, MODEL
from engine_recipes_engines.onnxruntime.runtime import OnnxRuntime
from engines.onnxruntime import quantise

IDS = np.random.default_rng(1).integers(0, 250, 40).tolist()
BIASES = {"attention_bias": True, "mlp_bias": True}
AWQ = {"intermediate_size": 192}  # in groups of 32
#: What is rounded at run time may fall to the other side of a boundary, and one such step shows in the logits.
ROUNDED = [
    ("llama", {}, "FP8", None),
    ("llama", BIASES, "FP8", None),
    ("qwen2", {}, "FP8", "FP8"),
    ("qwen3", {}, "FP8", "FP8"),
    ("llama", BIASES, quantise.SQ, None),
    ("qwen2", {}, quantise.SQ, "INT8"),
    ("qwen3", {}, quantise.SQ, None),
    ("llama", {}, None, "FP8"),
    ("qwen2", {}, None, "INT8"),
    ("qwen3", {}, "W8A16", "INT8"),
]
EXACT = [
    ("llama", AWQ, "W4A16_AWQ"),
    ("qwen2", AWQ, "W4A16_AWQ"),
    ("qwen3", AWQ, "W4A16_AWQ"),
    ("llama", BIASES, "W4A16"),  # 176 is no multiple of 32
    ("qwen2", {}, "W4A16"),
    ("llama", {}, "W8A16"),
    ("qwen3", {}, "W8A16"),
]


@dataclass
class Made:
    """A tiny model, its quantised checkpoint and what stage 2 is called with."""

    hf: Path
    stage2: StageContext

    @property
    def checkpoint(self) -> Path:
        return self.stage2.inputs[0].path

    def lower(self) -> OnnxRuntime:
        engine.stage2(self.stage2)
        return OnnxRuntime(self.stage2.out, {})

    def reference(self) -> np.ndarray:
        """Logits of transformers with the same weights and rounding, [40, vocabulary]."""
        return np.asarray(quantise.logits(quantise.reference(self.hf, self.checkpoint), IDS))

    def session(self) -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(self.stage2.out / MODEL, providers=["CPUExecutionProvider"])


def make(
    work: Path,
    arch: str,
    changes: dict[str, Any],
    algorithm: str | None,
    cache: str | None = None,
    tightness: float = 1.0,
    target: str = "cpu",
    excluded: Collection[str] = (),
) -> Made:
    """`tightness`: calibrated ranges are divided by it, above 1 values saturate."""
    work.mkdir(exist_ok=True)
    hf = lowered.write_lively(work / "hf", arch, **changes)
    stage2 = lowered.context(hf, work, dtype="float16", tp_size=1, pp_size=1, target=target)
    ranges = quantise.calibrate(quantise.load(hf), IDS)
    tight = {name: value / tightness for name, value in ranges.items()}
    quantise.quantise(stage2.inputs[0].path, tight, algorithm, cache, excluded=excluded)
    return Made(hf, stage2)


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x**2)))


def assert_rounded_alike(found: np.ndarray, made: Made) -> None:
    expected = made.reference()
    effect = rms(expected - lowered.reference(made.hf, IDS))
    assert effect > 0.01  # of logits that spread by 1
    assert rms(found - expected) < 0.1 * effect


@pytest.mark.parametrize(("arch", "changes", "algorithm", "cache"), ROUNDED)
def test_values_are_rounded_as_the_scales_say(
    tmp_path: Path, arch: str, changes: dict[str, Any], algorithm: str | None, cache: str | None
) -> None:
    made = make(tmp_path, arch, changes, algorithm, cache)
    runtime = made.lower()
    assert_rounded_alike(runtime.logits(IDS), made)
    assert_rounded_alike(runtime.stepwise_logits(IDS), made)


@pytest.mark.parametrize(("arch", "changes", "algorithm"), EXACT)
def test_quantised_weights_alone_leave_activations_exact(
    tmp_path: Path, arch: str, changes: dict[str, Any], algorithm: str
) -> None:
    made = make(tmp_path, arch, changes, algorithm)
    runtime, expected = made.lower(), made.reference()
    assert rms(expected - lowered.reference(made.hf, IDS)) > 0.01
    np.testing.assert_allclose(runtime.logits(IDS), expected, atol=1e-4)
    np.testing.assert_allclose(runtime.stepwise_logits(IDS), expected, atol=1e-4)


@pytest.mark.parametrize(("algorithm", "cache"), [("FP8", None), (quantise.SQ, None), (None, "FP8"), (None, "INT8")])
def test_values_beyond_the_calibrated_range_saturate(tmp_path: Path, algorithm: str | None, cache: str | None) -> None:
    made = make(tmp_path, "llama", {}, algorithm, cache, tightness=4.0)
    assert_rounded_alike(made.lower().logits(IDS), made)


def test_fc_and_gate_share_one_rounded_input_if_their_scales_are_equal(tmp_path: Path) -> None:
    made = make(tmp_path, "llama", {}, "FP8")
    made.lower()
    nodes = onnx.load(made.stage2.out / MODEL, load_external_data=False).graph.node
    assert Counter(node.op_type for node in nodes)["Div"] == 4 * 3  # for 5 linear layers, 3 times
    onnx.checker.check_model(str(made.stage2.out / MODEL))


@pytest.mark.parametrize(
    ("algorithm", "what"),
    [
        ("FP8", "activation_scaling_factor"),
        ("W4A16_AWQ", "prequant_scaling_factor"),
        (quantise.SQ, "activation_scaling_factor"),
        (quantise.SQ, "prequant_scaling_factor"),
    ],
)
def test_fc_and_gate_may_have_scales_of_their_own(tmp_path: Path, algorithm: str, what: str) -> None:
    made = make(tmp_path, "llama", AWQ, algorithm)
    before = made.reference()
    path = made.checkpoint / "rank0.safetensors"
    tensors = load_file(path)
    for layer in range(3):
        tensors[f"transformer.layers.{layer}.mlp.gate.{what}"] *= 1.5
    save_file(tensors, path)
    assert rms(made.reference() - before) > 0.01
    assert_rounded_alike(made.lower().logits(IDS), made)


@pytest.mark.parametrize("cache", ["FP8", "INT8"])
def test_the_cache_holds_rounded_values_and_rounds_them_once(tmp_path: Path, cache: str) -> None:
    made = make(tmp_path, "llama", {}, None, cache)
    made.lower()
    session, tensors = made.session(), load_file(made.checkpoint / "rank0.safetensors")
    names = [f"{layer}.{what}" for layer in range(3) for what in ("key", "value")]
    past = {f"past_key_values.{name}": np.zeros((1, 2, 0, 16), np.float32) for name in names}
    cached: dict[str, np.ndarray] = {}
    for ids in (IDS[:8], IDS[8:9], IDS[9:12]):
        before, length = cached, len(next(iter(past.values()))[0, 0]) + len(ids)
        feeds = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, length), np.int64), **past}
        found = session.run([f"present.{name}" for name in names], feeds)
        cached = dict(zip(names, found, strict=True))
        for name, array in before.items():
            np.testing.assert_array_equal(cached[name][:, :, : array.shape[2]], array)
        past = {f"past_key_values.{name}": array for name, array in cached.items()}
    for name, array in cached.items():
        scale = tensors[f"transformer.layers.{name[0]}.attention.kv_cache_scaling_factor"]
        steps = torch.tensor(array) / scale
        grid = quantise.e4m3 if cache == "FP8" else quantise.int8
        assert array.shape[2] == 12
        assert len(steps.unique()) > 20
        torch.testing.assert_close(steps, grid(steps), atol=1e-5, rtol=1e-6)


def test_a_cache_takes_the_larger_scale_of_keys_and_values(tmp_path: Path) -> None:
    made = make(tmp_path, "llama", {}, None, "INT8")
    expected = made.lower().logits(IDS)
    path = made.checkpoint / "rank0.safetensors"
    save_file({n: t for n, t in load_file(path).items() if ".kv_cache_" not in n}, path)
    for file in made.stage2.out.iterdir():
        file.unlink()
    np.testing.assert_array_equal(made.lower().logits(IDS), expected)


def test_sequences_of_a_batch_keep_their_own_positions(tmp_path: Path) -> None:
    made = make(tmp_path, "llama", {}, None, "FP8")
    runtime = made.lower()
    long, short = IDS[:6], IDS[10:14]
    expected = [runtime.logits(long), runtime.logits(short)]
    session = made.session()
    names = [f"{layer}.{what}" for layer in range(3) for what in ("key", "value")]
    feeds: dict[str, np.ndarray] = {f"past_key_values.{n}": np.zeros((2, 2, 0, 16), np.float32) for n in names}
    feeds |= {"input_ids": np.array([long[:5], [*short[:3], 0, 0]])}  # padded at the end, as GroupQueryAttention wants
    feeds |= {"attention_mask": np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])}
    found, *present = session.run(["logits", *(f"present.{name}" for name in names)], feeds)
    np.testing.assert_allclose(found[0], expected[0][:5], atol=1e-4)
    np.testing.assert_allclose(found[1, :3], expected[1][:3], atol=1e-4)
    feeds = {f"past_key_values.{name}": array for name, array in zip(names, present, strict=True)}
    feeds |= {"input_ids": np.array([long[5:], short[3:]])}
    feeds |= {"attention_mask": np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])}
    (found,) = session.run(["logits"], feeds)
    np.testing.assert_allclose(found[:, 0], [expected[0][5], expected[1][3]], atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "algorithm", "each"),
    [
        ({}, "FP8", 1.0),
        ({}, quantise.SQ, 1.0),
        ({}, "W8A16", 1.0),
        (AWQ, "W4A16_AWQ", 0.5 + 4 / 32),
        ({}, "W4A16", 0.5 + 4 / 32),
    ],
)
def test_weights_stay_small_on_disk(tmp_path: Path, changes: dict[str, Any], algorithm: str, each: float) -> None:
    changes = {"hidden_size": 128, "num_attention_heads": 8, "vocab_size": 256, **changes}
    made = make(tmp_path, "llama", changes, algorithm)
    seen: list[dict[str, Any]] = []
    with events.sink(seen.append):
        made.lower()
    with checkpoint.open_checkpoint(made.checkpoint) as opened:
        d = opened.decoder
    inner = d.hidden_size * (2 * d.heads + 2 * d.kv_heads) * d.head_size + 3 * d.hidden_size * d.intermediate_size
    size = 3 * inner * each + 2 * (2 * 256 * 128) + 256 * 16 * 4  # layers, two tables, rope
    assert size <= (made.stage2.out / DATA).stat().st_size < size + 60 * 4096
    total = [event["total"] for event in seen if event.get("label") == "lowering"][-1]
    assert total == pytest.approx(size, rel=0.1)


def test_awq_pads_the_vocabulary_of_the_head_alone(tmp_path: Path) -> None:
    made = make(tmp_path, "qwen2", AWQ, "W4A16_AWQ")  # 301 tokens, which ModelOpt makes 320
    path, config = made.checkpoint / "rank0.safetensors", made.checkpoint / "config.json"
    tensors = load_file(path)
    tensors["lm_head.weight"] = torch.nn.functional.pad(tensors["lm_head.weight"], (0, 0, 0, 19))
    save_file(tensors, path)
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 320}))
    found = made.lower().logits(IDS)
    np.testing.assert_allclose(found[:, :301], made.reference(), atol=1e-4)
    assert not found[:, 301:].any()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"quant_algo": "W4A8_AWQ"}, "cannot lower quant_algo W4A8_AWQ"),
    ({"quant_algo": "NVFP4"}, "cannot lower quant_algo NVFP4"),
    ({"quant_algo": "W8A8_SQ_PER_TENSOR_PLUGIN"}, "cannot lower quant_algo W8A8_SQ_PER_TENSOR_PLUGIN"),
    ({"kv_cache_quant_algo": "NVFP4"}, "cannot lower kv_cache_quant_algo NVFP4"),
    ({"quant_algo": "W4A16_AWQ", "has_zero_point": True}, "W4A16_AWQ with zero points"),
    ({"quant_algo": "W4A16_AWQ", "group_size": 48}, "W4A16_AWQ in groups of 48"),
    ({"quant_algo": "FP8"}, "transformer.layers.0.attention.qkv.activation_scaling_factor"),
]


@pytest.mark.parametrize(("quantization", "message"), REFUSED)
def test_what_it_cannot_lower_is_refused(tmp_path: Path, quantization: dict[str, Any], message: str) -> None:
    hf = tiny.write(tmp_path / "hf")
    context = lowered.context(hf, tmp_path, dtype="float16", tp_size=1, pp_size=1, target="cpu")
    path = context.inputs[0].path / "config.json"
    config = json.loads(path.read_text())
    config["quantization"] |= quantization
    path.write_text(json.dumps(config))
    with pytest.raises(RequestError, match=message) as caught:
        engine.stage2(context)
    assert caught.value.hint


@pytest.mark.parametrize(("algorithm", "cache"), [("FP8", None), ("W4A16_AWQ", None), (None, "INT8")])
def test_a_gpu_target_is_refused(tmp_path: Path, algorithm: str | None, cache: str | None) -> None:
    made = make(tmp_path, "llama", AWQ, algorithm, cache, target="sm90")
    with pytest.raises(RequestError, match=r"cannot lower .* for sm90") as caught:
        made.lower()
    assert "--target cpu" in caught.value.hint
    assert not list(made.stage2.out.iterdir())


def test_excluded_layers_stay_as_they_are(tmp_path: Path) -> None:
    made = make(tmp_path, "llama", {}, "W8A16")
    path = made.checkpoint / "config.json"
    config = json.loads(path.read_text())
    config["quantization"]["exclude_modules"] = ["lm_head", "*.mlp.*", "*attention.dense", "*attention.qkv"]
    path.write_text(json.dumps(config))
    np.testing.assert_allclose(made.lower().logits(IDS), lowered.reference(made.hf, IDS), atol=1e-3)


LAYERS = "transformer.layers."
EXCLUDED = [
    [f"{LAYERS}{layer}.{linear}" for layer, linear in ((0, "attention.qkv"), (1, "mlp.fc"), (1, "mlp.gate"))],
    [f"{LAYERS}0.attention.dense", f"{LAYERS}2.mlp.proj"],
    [f"{LAYERS}1.mlp.gate"],  # half of what reads one input
    [f"{LAYERS}{layer}.mlp.fc" for layer in range(3)],
]


@pytest.mark.parametrize("excluded", EXCLUDED)
@pytest.mark.parametrize(("arch", "algorithm", "cache"), [("qwen2", "FP8", "FP8"), ("llama", "W4A16_AWQ", None)])
def test_some_layers_are_multiplied_as_they_are_among_quantised_ones(
    tmp_path: Path, arch: str, algorithm: str, cache: str | None, excluded: list[str]
) -> None:
    made = make(tmp_path / "some", arch, AWQ, algorithm, cache, excluded=excluded)
    every = make(tmp_path / "every", arch, AWQ, algorithm, cache)
    assert rms(made.reference() - every.reference()) > 0.01
    runtime = made.lower()
    if cache:
        assert_rounded_alike(runtime.logits(IDS), made)
    else:
        np.testing.assert_allclose(runtime.logits(IDS), made.reference(), atol=1e-4)
    check = checks(made.stage2.out)
    assert check["cache agrees with prefill"].verdict == "pass"


def checks(folder: Path) -> dict[str, Check]:
    context = StageContext("m:p@onnxruntime", "validate", {}, (Artifact("onnx-engine", folder, "2" * 64),), folder)
    return {check.name: check for check in engine.validate(context)}


@pytest.mark.parametrize(("algorithm", "cache"), [("FP8", "FP8"), (None, "INT8"), ("W4A16", None)])
def test_a_wrong_cache_is_still_found_among_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str | None, cache: str | None
) -> None:
    made = make(tmp_path, "qwen3", {}, algorithm, cache)
    made.lower()
    name = "cache agrees with prefill"
    found = checks(made.stage2.out)
    assert {n: c.verdict for n, c in found.items() if n != "tokenizer fits the engine"} == {
        "engine loads": "pass",
        "logits are finite": "pass",
        name: "pass",
    }
    stepwise = OnnxRuntime.stepwise_logits

    def forgetful(self: OnnxRuntime, ids: list[int]) -> np.ndarray:
        return np.concatenate([stepwise(self, [token]) for token in ids])  # every step with an empty cache

    monkeypatch.setattr(OnnxRuntime, "stepwise_logits", forgetful)
    assert checks(made.stage2.out)[name].verdict == "fail"
