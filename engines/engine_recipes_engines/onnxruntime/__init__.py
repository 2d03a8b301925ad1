"""The embedded default: lowers the TensorRT-LLM checkpoint to ONNX and runs it with onnxruntime, on any CPU.

Quantised checkpoints (FP8, W4A16_AWQ, W8A8_SQ_PER_CHANNEL, W8A16, W4A16; FP8 or INT8 KV cache) are computed in float32
with the rounding that a GPU does, so that a CPU can judge what a GPU will run; for GPU targets of this engine they are
refused.

Options of stage 2: `max_seq_len`, the longest sequence in tokens (0: what the model is meant for); it bounds the rope
tables and the KV cache. Options of the runtime: `threads` (0: one for each physical core).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine_recipes import Check, Decoder, StageContext, hookimpl

if TYPE_CHECKING:
    from .runtime import OnnxRuntime


@hookimpl
def check_decoder(context: StageContext, decoder: Decoder) -> None:
    """Refuse a model that cannot be lowered, before it is calibrated and converted."""
    from .lowering import check_model

    check_model(decoder, _max_seq_len(context))


@hookimpl
def stage2(context: StageContext) -> None:
    """Write `model.onnx`, `model.onnx.data` and `genai_config.json`."""
    from engine_recipes import checkpoint

    from .genai import source_settings, write_config
    from .lowering import lower

    with checkpoint.open_checkpoint(context.input("trtllm-checkpoint").path) as weights:
        longest = lower(weights, context.out, context.target, _max_seq_len(context))
        write_config(context.out, weights.decoder, context.target, longest, source_settings(context))


@hookimpl
def load_engine(folder: Path, options: Mapping[str, Any]) -> OnnxRuntime:
    """Load what `stage2` wrote. Option: `threads`."""
    from .runtime import OnnxRuntime

    return OnnxRuntime(folder, options)


@hookimpl
def load_source(context: StageContext) -> OnnxRuntime:
    """The unquantised source in float32: converted and lowered meanwhile, for machines without torch."""
    from engine_recipes import checkpoint

    from .genai import source_settings, write_config
    from .lowering import lower
    from .runtime import OnnxRuntime

    converted, lowered = context.out / "checkpoint", context.out / "engine"
    for folder in (converted, lowered):
        folder.mkdir()
    with checkpoint.open_source(context.input("hf-checkpoint")) as source:
        checkpoint.convert(source, converted, dtype="float32")
    with checkpoint.open_checkpoint(converted) as weights:
        longest = lower(weights, lowered)
        write_config(lowered, weights.decoder, "cpu", longest, source_settings(context))
    shutil.rmtree(converted)  # twice as large as the source
    return OnnxRuntime(lowered, {})


@hookimpl
def validate(context: StageContext) -> list[Check]:
    """Whether the engine loads, computes numbers, keeps its cache right and fits its tokenizer."""
    from .checks import judge

    return judge(context.inputs[0].path)


def _max_seq_len(context: StageContext) -> int:
    return int(context.options.get("max_seq_len", 0))
