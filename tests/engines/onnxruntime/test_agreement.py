"""The product's quantised engines against NVIDIA ModelOpt's own quantised model, run by transformers in float32.

Both come from one calibration. A checkpoint cannot hold all that ModelOpt's model does, and its exporter changes the
model first: q, k and v are one matrix and get one scale, gate and up read one rounded input, keys and values are
stored as they are when they are small. `as_exported` does the same to the model, by the exporter's own functions.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import modelopt_oracle as oracle
import smollm2
import tiny
from checkpoint.test_quantize import cut_layers
from converted import resolve
from engine_recipes import Artifact, StageContext, Tokenizer, checkpoint, read_texts
from engine_recipes_engines import onnxruntime as engine
from engine_recipes_engines.lowering.graph import DATA, MODEL
from engine_recipes_engines.onnxruntime.runtime import OnnxRuntime

Array = np.ndarray[Any, Any]
#: Mean KL divergence a token, to ModelOpt's model; share of positions with the same likeliest token.
MOST_KL, LEAST_TOP1 = 1e-3, 0.99
#: How far one layer of SmolLM2 may be from ModelOpt's, relative to what it adds to a token. Measured: 0.003 at most,
#: and 0.03 if one of its scales is 5 % off.
MOST_APART = 0.01
ALGORITHMS = {"fp8": "FP8", "int4_awq": "W4A16_AWQ"}
ARCHS = ["llama", "qwen2", "qwen3"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices are no faster on several, and much slower while other programs want them too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Pair:
    """One calibrated model: ModelOpt's, and our engine. `rows` are tokens to compare on, int64 [rows, length]."""

    model: Any
    folder: Path
    rows: torch.Tensor

    @cached_property
    def theirs(self) -> Array:
        """float32 [tokens, vocabulary]"""
        return logits(self.model, self.rows)

    @cached_property
    def ours(self) -> Array:
        """float32 [tokens, vocabulary]"""
        runtime = OnnxRuntime(self.folder, {})
        return np.concatenate([runtime.logits(row) for row in self.rows.tolist()])


def logits(model: Any, rows: torch.Tensor) -> Array:
    with torch.no_grad():
        return np.concatenate([model(row[None], use_cache=False).logits[0].float().numpy() for row in rows])


def divergence(base: Array, other: Array) -> tuple[float, float]:
    """Mean KL divergence a token, and the share of tokens with the same likeliest next one."""
    p, q = (torch.log_softmax(torch.from_numpy(array).double(), -1) for array in (base, other))
    same = (p.argmax(-1) == q.argmax(-1)).double().mean()
    return float((p.exp() * (p - q)).sum(-1).mean()), float(same)


def agree(base: Array, other: Array) -> bool:
    kl, top1 = divergence(base, other)
    return kl <= MOST_KL and top1 >= LEAST_TOP1


def make(hf: Path, work: Path, method: Any, kv: Any, calibration: torch.Tensor, rows: torch.Tensor) -> Pair:
    """Calibrate with ModelOpt, quantize by its statistics, lower."""
    model = oracle.calibrated(resolve(hf), method, kv, tokens=calibration)
    folder = lower(hf, work, oracle.statistics(model), method, kv)
    with checkpoint.open_source(hf) as source:
        dtype = getattr(torch, checkpoint.unquantised_dtype(source, "auto"))
    return Pair(as_exported(model, dtype), folder, rows)


def lower(hf: Path, work: Path, found: dict[str, Array], method: str, kv: Any, **mapping: int) -> Path:
    """The engine's folder, from a resolved source and its statistics."""
    kept, quantised, out = work / "statistics", work / "checkpoint", work / "engine"
    for folder in (kept, quantised, out):
        folder.mkdir(parents=True)
    checkpoint.write_statistics(kept, found, {"method": method, "group_size": 64})
    with checkpoint.open_source(hf) as source:
        statistics = checkpoint.read_statistics(kept)
        checkpoint.quantize(
            source,
            quantised,
            statistics,
            ALGORITHMS[method],  # type: ignore[arg-type]
            kv_cache=kv or "none",
            group_size=64 if method == "int4_awq" else 0,  # which divides also half of dense's inputs
            **mapping,
        )
    inputs = (Artifact("trtllm-checkpoint", quantised, "1" * 64),)
    engine.stage2(StageContext("m:p@onnxruntime", "stage2", {}, inputs, out, "cpu"))
    return out


def as_exported(model: Any, dtype: torch.dtype) -> Any:
    """Change ModelOpt's model in place to what its TensorRT-LLM export stores.

    FP8 weights are rounded here, as the exporter does: it divides by the scale, and the quantizer inside the model
    multiplies by its inverse. The two differ where a weight lies halfway between two FP8 numbers. Elsewhere that is
    rare, but SmolLM2's weights are those of an 8-bit file: 0.3 % of one matrix, a KL divergence of 0.0002 a layer.

    Args:
        model: from `oracle.calibrated`.
        dtype: of the checkpoint, to which AWQ's input scales are rounded.
    """
    from modelopt.torch.export.quant_utils import _update_pre_quant_scale, preprocess_linear_fusion
    from modelopt.torch.quantization.qtensor import FP8QTensor

    for layer in model.model.layers:
        at, mlp = layer.self_attn, layer.mlp
        preprocess_linear_fusion([at.q_proj, at.k_proj, at.v_proj])
        if at.q_proj.input_quantizer.pre_quant_scale is None:
            preprocess_linear_fusion([mlp.gate_proj, mlp.up_proj])
        for cache in (at.k_bmm_quantizer, at.v_bmm_quantizer):
            if cache.is_enabled:
                cache.amax = cache.amax.clamp(min=448.0)  # a scale of 1
        for linear in (at.q_proj, at.k_proj, at.v_proj, at.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            factors = linear.input_quantizer.pre_quant_scale
            if factors is not None:
                _update_pre_quant_scale(linear, factors.to(dtype).float())
                continue
            scale = linear.weight_quantizer.amax / 448
            linear.weight.data = FP8QTensor.quantize(linear.weight.data, scales=scale)[0].dequantize(scale=scale)
            linear.weight_quantizer.disable()
    return model


def write(folder: Path, arch: str) -> Path:
    """A tiny model whose matrices differ in size, so that a scale taken from the wrong one shows. Its weights are no
    multiples of anything: none lies halfway between two numbers of a format, where rounding is anybody's guess."""
    settings = tiny.config(arch, hidden_size=128, intermediate_size=256, num_hidden_layers=2, head_dim=32)
    arrays = tiny.tensors(settings)
    for number, (name, array) in enumerate(arrays.items()):
        arrays[name] = array.astype(np.float32)
        if ".layers." in name and array.ndim == 2:
            random = np.random.RandomState(zlib.crc32(name.encode()))
            arrays[name] = random.normal(0, 0.07 * (1 + 0.13 * (number % 7)), array.shape).astype(np.float32)
        elif array.ndim == 2:
            arrays[name] *= 2
    return tiny.write_tensors(folder, {**settings, "torch_dtype": "float32"}, arrays)


def tiny_pair(work: Path, arch: str, method: str, kv: str | None = None) -> Pair:
    hf = write(work / "hf", arch)
    rows = oracle.token_rows(json.loads((hf / "config.json").read_text())["vocab_size"], 8, 64)
    return make(hf, work, method, kv, rows, rows)


@pytest.mark.parametrize(("method", "kv"), [("fp8", None), ("fp8", "fp8"), ("int4_awq", None)])
@pytest.mark.parametrize("arch", ARCHS)
def test_the_engine_computes_what_modelopts_model_does(tmp_path: Path, arch: str, method: str, kv: str | None) -> None:
    pair = tiny_pair(tmp_path, arch, method, kv)
    assert agree(pair.theirs, pair.ours), divergence(pair.theirs, pair.ours)
    unquantised = logits(oracle.load(tmp_path / "hf"), pair.rows)
    assert not agree(unquantised, pair.ours)
    if method == "int4_awq":  # activations are not rounded, so nothing can tip over
        assert divergence(pair.theirs, pair.ours)[0] < 1e-8


def scale_off(model: Any, factor: float = 1.05) -> None:
    """One input's scale is 5 % too large."""
    model.model.layers[1].self_attn.o_proj.input_quantizer.amax *= factor


def scales_of_q_alone(model: Any) -> None:
    """k and v are rounded by q's scale; q is the smaller one here."""
    for layer in model.model.layers:
        at = layer.self_attn
        step = at.q_proj.weight.abs().max() / 448
        for linear in (at.k_proj, at.v_proj):
            linear.weight.data = (linear.weight / step).clamp(-448, 448).to(torch.float8_e4m3fn).float() * step


@pytest.mark.parametrize("mistake", [scale_off, scales_of_q_alone])
def test_a_small_mistake_in_a_scale_would_show(tmp_path: Path, mistake: Callable[[Any], None]) -> None:
    pair = tiny_pair(tmp_path, "llama", "fp8")
    mistake(pair.model)
    assert not agree(pair.theirs, pair.ours), divergence(pair.theirs, pair.ours)


def smollm2_pair(work: Path, method: str, layers: int = 0, tokens: int = 256) -> Pair:
    """SmolLM2, or its first layers, calibrated with and compared on English text."""
    hf = smollm2.folder()
    text = next(read_texts("package:engine_recipes_precisions/calibration.txt.xz"))
    ids = torch.tensor(Tokenizer.load(hf).encode(text[:8000]))
    settings = json.loads((hf / "config.json").read_text())
    cut_layers(hf, work / "hf", settings, layers or settings["num_hidden_layers"])
    calibration, rows = ids[:512].view(4, 128), ids[512 : 512 + tokens].view(-1, 128)
    return make(work / "hf", work, method, None, calibration, rows)


@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 1), (2, 2)])
@pytest.mark.parametrize(("method", "kv"), [("fp8", "fp8"), ("int4_awq", "int8")])
def test_a_split_checkpoint_gives_the_same_engine(
    tmp_path: Path, method: Any, kv: Any, tp_size: int, pp_size: int
) -> None:
    hf = resolve(write(tmp_path / "hf", "qwen2"))
    found = oracle.statistics(oracle.calibrated(hf, "fp8", "fp8"))
    for name in [name for name in found if name.endswith("input_amax")]:  # any scales will do
        width = 256 if "down_proj" in name else 128
        found[name.replace("input_amax", "pre_quant_scale")] = np.linspace(0.5, 1.5, width, dtype=np.float32)
    whole = lower(hf, tmp_path / "whole", found, method, kv)
    parts = lower(hf, tmp_path / "parts", found, method, kv, tp_size=tp_size, pp_size=pp_size)
    assert len(list((tmp_path / "parts" / "checkpoint").glob("rank*"))) == tp_size * pp_size
    for name in (MODEL, DATA, "genai_config.json"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()


@pytest.mark.parametrize("method", ["fp8", "int4_awq"])
def test_the_first_layers_of_a_real_model_agree(tmp_path: Path, method: str) -> None:
    pair = smollm2_pair(tmp_path, method, layers=2)
    assert agree(pair.theirs, pair.ours), divergence(pair.theirs, pair.ours)


def test_a_real_model_agrees_in_each_layer_and_as_a_whole_as_far_as_rounding_lets_it(tmp_path: Path) -> None:
    """Through 30 layers no two programs agree: what differs by 1e-7 beside the boundary of two FP8 numbers becomes a
    step of 6 %, and moves others over theirs. ModelOpt's own model differs from itself by a KL divergence of 0.021 to
    0.025 when float64 takes the place of float32. So: each layer alone, on the values that went into ours; and all
    of it against what float64 changes.
    """
    pair = smollm2_pair(tmp_path, "fp8", tokens=128)
    ours = residuals(pair)
    errors, last = forced(pair.model, pair.rows, ours)
    assert len(errors) == 30
    assert max(errors) < MOST_APART, errors
    assert divergence(last, pair.ours)[0] < 1e-8  # final norm and head
    kl, _ = divergence(pair.theirs, pair.ours)
    scale_off(pair.model)
    errors, _ = forced(pair.model, pair.rows, ours)
    assert [layer for layer, error in enumerate(errors) if error > MOST_APART] == [1]
    scale_off(pair.model, 1 / 1.05)
    inherent, _ = divergence(pair.theirs, logits(pair.model.double(), pair.rows))
    assert kl < 1.5 * inherent


def residuals(pair: Pair) -> list[Array]:
    """What goes into each layer of our engine but the first, and what comes out of the last: [1, tokens, hidden]."""
    model = onnx.load(pair.folder / MODEL, load_external_data=False)
    count = len(pair.model.model.layers)
    names = [f"transformer.layers.{layer}.input_layernorm.sum" for layer in range(1, count)] + ["transformer.ln_f.sum"]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    onnx.save(model, pair.folder / "traced.onnx")
    session = onnxruntime.InferenceSession(pair.folder / "traced.onnx", providers=["CPUExecutionProvider"])
    length = pair.rows.shape[1]
    feeds = {"input_ids": pair.rows.numpy(), "attention_mask": np.ones((1, length), np.int64)}
    for info in session.get_inputs():
        if info.name.startswith("past"):
            feeds[info.name] = np.zeros((1, info.shape[1], 0, info.shape[3]), np.float32)
    found: list[Array] = session.run(names, feeds)
    return found


def forced(model: Any, rows: torch.Tensor, ours: list[Array]) -> tuple[list[float], Array]:
    """Run ModelOpt's model with the output of each layer replaced by ours.

    Returns:
        how far the two were apart in each layer, relative to what the layer adds to a token; and the logits.
    """
    errors: list[float] = []

    def compare(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        mine = torch.from_numpy(ours[len(errors)])
        apart, added = (mine - output).norm(dim=-1), (output - inputs[0]).norm(dim=-1)  # [1, tokens]
        errors.append(float((apart / added).mean()))
        return mine

    hooks = [layer.register_forward_hook(compare) for layer in model.model.layers]
    try:
        return errors, logits(model, rows)
    finally:
        for hook in hooks:
            hook.remove()
