"""What the engine can check about itself, without the source model."""

from __future__ import annotations

import time
from pathlib import Path

from engine_recipes import Check
from engine_recipes.checks import judge_numbers, judge_vocabulary

from .runtime import OnnxRuntime


def judge(folder: Path) -> list[Check]:
    """All checks of one engine folder. An engine that cannot be loaded raises, with what to do about it."""
    start = time.perf_counter()
    runtime = OnnxRuntime(folder, {})
    try:
        took = time.perf_counter() - start
        loads = Check("engine loads", "pass", value=round(took, 3), note="seconds")
        numbers = judge_numbers(runtime, runtime.compute, runtime.rounding)
        return [loads, *numbers, judge_vocabulary(runtime, folder)]
    finally:
        runtime.close()
