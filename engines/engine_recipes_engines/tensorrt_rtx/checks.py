"""All that is judged of an engine: what its file shows, and what it computes, itself or simulated."""

from __future__ import annotations

from engine_recipes import Check, MachineError, RequestError, StageContext
from engine_recipes.checks import judge_numbers, judge_vocabulary

from ..lowering.graph import MODEL
from ..lowering.quantization import E4M3
from .building import lower_again
from .inspection import inspect
from .runtime import RtxRuntime, simulated
from .settings import Settings


def judge(context: StageContext) -> list[Check]:
    """All checks. A folder that is no engine, or whose notes are damaged, raises."""
    folder = context.inputs[0].path
    checks = inspect(folder)
    if any(check.verdict == "fail" for check in checks):
        return checks  # another engine, or a damaged one: nothing that it computes says more
    try:
        runtime = _running(context)
    except RequestError as error:
        return [*checks, Check("logits are finite", "not run", note=error.message)]
    try:
        numbers = judge_numbers(runtime, runtime.settings.compute, _rounding(runtime.settings))
        return [*checks, *numbers, judge_vocabulary(runtime, folder)]
    finally:
        runtime.close()


def _running(context: StageContext) -> RtxRuntime:
    """The engine; where its GPU is not here, its graph. Raises RequestError if the checkpoint is not here either."""
    try:
        return RtxRuntime(context.inputs[0].path, {})
    except MachineError:
        if not (context.out / MODEL).is_file():  # else it was simulated a moment ago
            lower_again(context)
        return simulated(context.out, {})


def _rounding(settings: Settings) -> list[str]:
    activations = [E4M3] if E4M3 in settings.weights else []
    return [*activations, settings.cache_rounding] if settings.cache_rounding else activations
