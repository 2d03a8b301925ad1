"""Compiles the TensorRT-LLM checkpoint into a TensorRT-RTX engine, on any Linux machine, for NVIDIA RTX GPUs.

The checkpoint is lowered to ONNX's own operators; the library's parser reads that, and `simulate` computes the same
graph on a CPU. Prefill and decode share one engine; its KV cache has a fixed length and is updated in place.

Options of stage 2: `max_batch_size`, most sequences at a time; `max_seq_len`, length of the cache in tokens (0: what
the model is meant for, at most 4096). Targets: `sm89`, or several that one engine serves: `sm86+sm89`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine_recipes import Check, Decoder, StageContext, hookimpl

if TYPE_CHECKING:
    from .runtime import RtxRuntime


@hookimpl
def check_decoder(context: StageContext, decoder: Decoder) -> None:
    """Refuse a model or a target that cannot be compiled, before it is calibrated and converted."""
    from .compiling import check_targets
    from .lowering import check_model

    check_model(decoder, int(context.options.get("max_seq_len", 0)))
    check_targets(context.target)


@hookimpl
def stage2(context: StageContext) -> dict[str, Any]:
    """Write `model.engine` and `rtx.json`."""
    from .building import build

    return build(context)


@hookimpl
def load_engine(folder: Path, options: Mapping[str, Any]) -> RtxRuntime:
    """Load what `stage2` wrote, on a GPU that it was compiled for."""
    from .runtime import RtxRuntime

    return RtxRuntime(folder, options)


@hookimpl
def simulate(context: StageContext) -> RtxRuntime:
    """The graph that the engine was compiled from, by onnxruntime on the CPU, with the engine's rounding to 16 bits."""
    from .building import lower_again
    from .runtime import simulated

    lower_again(context)
    return simulated(context.out, {})


@hookimpl
def validate(context: StageContext) -> list[Check]:
    """What the engine's file shows, and whether it computes numbers, keeps its cache right and fits its tokenizer."""
    from .checks import judge

    return judge(context)
