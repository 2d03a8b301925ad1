"""Stage 2: lower, compile, and note what the runtime and the checks need to know."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

from engine_recipes import StageContext, checkpoint, events, require_room
from engine_recipes.checkpoint import Checkpoint
from engine_recipes.stepping import CHUNK

from ..lowering.decoder import half_precision
from ..lowering.quantization import cache_dtype
from ..lowering.shapes import check_shapes
from ..lowering.weights import is_tied
from .compiling import ENGINE, check_targets, compile_model
from .inspection import constants
from .lowering import check_model, lower, weight_bytes
from .quantized import check_algorithms
from .settings import Settings, read_settings

#: What a compilation writes beside the weights, at most: kernels, and the program that calls them.
_PROGRAM = 100_000_000


def build(context: StageContext) -> dict[str, Any]:
    """Write `model.engine` and `rtx.json`. Returns what the manifest tells as `result`.

    Raises:
        RequestError: something this engine cannot do: a target, a quantization, an activation, a length.
        MachineError: the disk is too small.
        StageFailed: the library cannot compile it.
    """
    targets = check_targets(context.target)
    with checkpoint.open_checkpoint(context.input("trtllm-checkpoint").path) as weights:
        settings = _settings(context, weights, targets)
        work, engine = context.out / "onnx", context.out / ENGINE
        need = 2 * sum(settings.weights.values()) + _PROGRAM  # both hold all weights
        require_room("the engine and the ONNX model that it is compiled from", need, context.out)
        work.mkdir()
        lower(weights, work, settings.compute, settings.max_seq_len)
    if settings.cache_rounding:
        events.warn("TensorRT-RTX keeps keys and values in 16 bits: they are rounded as asked, and take no less memory")
    made = compile_model(work, engine, targets, settings.most, settings.layers)
    shutil.rmtree(work)
    replace(settings, **made, constants=constants(engine)).write(context.out)
    return {"versions": {"tensorrt-rtx-cu13": settings.library}}


def lower_again(context: StageContext) -> None:
    """Write the graph that the engine was compiled from, and its `rtx.json`, into `context.out`.

    It computes in float32, because onnxruntime's CPU kernels know no bfloat16, and rounds what it computes to the
    engine's 16 bits: what is too large for them is as infinite as in the engine. What is rounded to 8 or 4 bits is
    rounded alike.
    """
    settings = read_settings(context.inputs[0].path)
    with checkpoint.open_checkpoint(context.input("trtllm-checkpoint").path) as weights:
        check_algorithms(weights)
        require_room("the simulated engine", sum(settings.weights.values()), context.out)
        lower(weights, context.out, "float32", settings.max_seq_len, rounded=settings.compute)
    settings.write(context.out)


def _settings(context: StageContext, weights: Checkpoint, targets: list[str]) -> Settings:
    import tensorrt_rtx as trt

    check_algorithms(weights)
    check_shapes(weights)
    decoder = weights.decoder
    batch = int(context.options.get("max_batch_size", 1))
    length = check_model(decoder, int(context.options.get("max_seq_len", 0)))
    return Settings(
        max_batch_size=batch,
        max_seq_len=length,
        chunk=min(max(1, CHUNK // batch), length),
        vocab_size=decoder.vocab_size,
        layers=decoder.layers,
        kv_heads=decoder.kv_heads,
        head_size=decoder.head_size,
        compute=half_precision(weights.dtype, context.target),
        cache_rounding=cache_dtype(weights),
        targets=targets,
        library=trt.__version__,
        weights=weight_bytes(weights, is_tied(weights)),
    )
