"""The hooks: compiles unquantised checkpoints with PyTorch AOTInductor for CPUs, and runs them.

Everything is computed in float32, whatever type the weights are stored in: it is what PyTorch's CPU kernels do best on
every CPU, and the rounding of the stored weights is the only one. Weights are stored once, as the checkpoint has them.

Options of stage 2: `max_seq_len`, the longest sequence in tokens (0: what the model is meant for); it bounds the rope
tables. Options of the runtime: `threads` (0: one for each core).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine_recipes import Check, Decoder, StageContext, checkpoint, hookimpl

from . import machine
from .compiling import build, check_model

if TYPE_CHECKING:
    from .runtime import AotRuntime


@hookimpl
def check_decoder(context: StageContext, decoder: Decoder) -> None:
    """Refuse a model, or a machine, that cannot be compiled for, before the checkpoint is converted."""
    check_model(decoder, _max_seq_len(context))
    machine.check_cpu()


@hookimpl
def stage2(context: StageContext) -> Mapping[str, Any]:
    """Write `model.pt2`, `weights.safetensors` and `engine.json`."""
    machine.check_cpu()
    with checkpoint.open_checkpoint(context.input("trtllm-checkpoint").path) as weights:
        build(weights, context.out, context.cache, _max_seq_len(context))
    return {"cpu": machine.ARCHITECTURE, "compiler": machine.compiler_version(machine.compiler())}


@hookimpl
def load_engine(folder: Path, options: Mapping[str, Any]) -> AotRuntime:
    """Load what `stage2` wrote. Option: `threads`."""
    from .runtime import AotRuntime

    return AotRuntime(folder, options)


@hookimpl
def validate(context: StageContext) -> list[Check]:
    """Whether the engine loads, computes numbers, keeps its cache right and fits its tokenizer."""
    from engine_recipes.checks import judge_numbers, judge_vocabulary

    from .runtime import AotRuntime

    folder = context.inputs[0].path
    start = time.perf_counter()
    runtime = AotRuntime(folder, {})
    try:
        took = time.perf_counter() - start
        loads = Check("engine loads", "pass", value=round(took, 3), note="seconds")
        return [loads, *judge_numbers(runtime, "float32", ()), judge_vocabulary(runtime, folder)]
    finally:
        runtime.close()


def _max_seq_len(context: StageContext) -> int:
    return int(context.options.get("max_seq_len", 0))
