"""Tiny checkpoints for the tensorrt-rtx engine, quantised or not, and what stage 2 is called with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import lowered
from engine_recipes import Artifact, StageContext
from engines.onnxruntime import quantise

IDS = np.random.default_rng(1).integers(0, 250, 40).tolist()


def context(
    work: Path,
    arch: str = "llama",
    algorithm: str | None = None,
    cache: str | None = None,
    dtype: str = "float16",
    target: str = "sm89",
    **changes: Any,
) -> StageContext:
    """A tiny model's checkpoint; matrices are wide enough for groups of 64."""
    work.mkdir(exist_ok=True)
    hf = lowered.write_lively(work / "hf", arch, **{"intermediate_size": 192, **changes})
    found = lowered.context(hf, work, dtype=dtype, tp_size=1, pp_size=1, target=target)
    if algorithm or cache:
        ranges = quantise.calibrate(quantise.load(hf), IDS)
        quantise.quantise(found.inputs[0].path, ranges, algorithm, cache, group=64)
    return found


def validating(stage2: StageContext, out: Path) -> StageContext:
    """What `validate` and `simulate` are called with, for the engine that stage 2 left."""
    out.mkdir(exist_ok=True)
    inputs = (Artifact("tensorrt-rtx-engine", stage2.out, "2" * 64), *stage2.inputs)
    return StageContext(stage2.ref, "validate", stage2.options, inputs, out, stage2.target)
