"""The product's quantised engines against NVIDIA ModelOpt's own quantised model, run by transformers in float32.

Both come from one calibration. A checkpoint cannot hold all that ModelOpt's model does, and its exporter changes the
model first: q, k and v are one matrix and get one scale, gate and up read one rounded input, keys and values are
stored as they are when they are small. `as_exported` does the same to the model, by the exporter's own functions.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from copy import deepcopy
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
from engine_recipes_engines.onnxruntime.graph import MODEL
from engine_recipes_engines.onnxruntime.runtime import OnnxRuntime

Array = np.ndarray[Any, Any]
#: Mean KL divergence a token, to ModelOpt's model; share of positions with the same likeliest token.
MOST_KL, LEAST_TOP1 = 1e-3, 0.99
ALGORITHMS = {"fp8": "FP8", "int4_awq": "W4A16_AWQ"}
ARCHS = ["llama", "qwen2", "qwen3"]


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
    kept, quantised, out = work / "statistics", work / "checkpoint", work / "engine"
    for folder in (kept, quantised, out):
        folder.mkdir(parents=True)
    checkpoint.write_statistics(kept, oracle.statistics(model), {"method": method, "group_size": 64})
    with checkpoint.open_source(hf) as source:
        statistics = checkpoint.read_statistics(kept)
        checkpoint.quantize(source, quantised, statistics, ALGORITHMS[method], kv_cache=kv or "none")  # type: ignore[arg-type]
        dtype = getattr(torch, checkpoint.unquantised_dtype(source.decoder, "auto"))
    inputs = (Artifact("trtllm-checkpoint", quantised, "1" * 64),)
    engine.stage2(StageContext("m:p@onnxruntime", "stage2", {}, inputs, out, "cpu"))
    return Pair(as_exported(model, dtype), out, rows)


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
def test_the_engine_computes_what_modelopts_model_does(
    tmp_path: Path, arch: str, method: str, kv: str | None
) -> None:
    pair = tiny_pair(tmp_path, arch, method, kv)
    assert agree(pair.theirs, pair.ours), divergence(pair.theirs, pair.ours)
    unquantised = logits(oracle.load(tmp_path / "hf"), pair.rows)
    assert not agree(unquantised, pair.ours)
    if method == "int4_awq":  # activations are not rounded, so nothing can tip over
        assert divergence(pair.theirs, pair.ours)[0] < 1e-8


def scale_off(model: Any) -> None:
    """One input's scale is 5 % too large."""
    model.model.layers[1].self_attn.o_proj.input_quantizer.amax *= 1.05


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
