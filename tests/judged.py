"""Tiny engines and all that judging one takes, in this process: for tests of what the gate lets through."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import tiny
from converted import resolve
from engine_recipes import Artifact, Report, StageContext, Tokenizer, checkpoint, gate, testing
from engine_recipes.gate import baseline, limits, measuring
from engine_recipes.host import Host
from engine_recipes.registry import load
from engine_recipes.stages import provider
from engine_recipes.tokenizer import copy_tokenizer
from engine_recipes_engines import onnxruntime as engine
from engine_recipes_precisions import amax, awq
from precisions import calibrating

#: Large enough for groups of 64.
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 128, "head_dim": 32}
SIZES = {"window": 96, "max_tokens": 16}
Spoil = Callable[[Path], None]


@dataclass(frozen=True)
class Made:
    """A tiny source and what was made from it; `precision` is a name of the registry."""

    folder: Path
    precision: str
    kv: str

    def path(self, kind: str) -> Path:
        """One of source, calibration, checkpoint, baseline."""
        return self.folder / kind


def make(folder: Path, monkeypatch: Any, arch: str, precision: str, kv: str = "none", seed: int = 0) -> Made:
    """A tiny lively source, calibrated, converted, and the baseline of it.

    Args:
        folder: a new one.
        arch: a key of tiny.CONFIGS.
        precision: fp16, bf16, fp8 or int4-awq.
        kv: none, fp8 or int8.
        seed: of the weights.
    """
    made = Made(folder, precision, kv)
    settings = tiny.config(arch, **SHAPE)
    arrays = tiny.tensors(settings, seed)
    random = np.random.default_rng(seed)
    for name, array in arrays.items():
        if array.ndim == 2:  # lively enough that logits spread, and every tensor of a size of its own
            arrays[name] = (array.astype(np.float32) * random.uniform(2, 5)).astype(array.dtype)
        elif "bias" in name:
            arrays[name] = (array.astype(np.float32) * 8).astype(array.dtype)
    testing.write_tokenizer(tiny.write_tensors(made.path("source"), settings, arrays), 128)
    resolve(made.path("source"))
    made.path("checkpoint").mkdir()
    with checkpoint.open_source(made.path("source")) as source:
        if precision in ("fp16", "bf16"):
            dtype: Any = {"fp16": "float16", "bf16": "bfloat16"}[precision]
            checkpoint.convert(source, made.path("checkpoint"), dtype)
        else:
            module: Any = {"fp8": amax, "int4-awq": awq}[precision]
            statistics = calibrating.calibrate(module, made.path("source"), made.path("calibration"), monkeypatch)
            algorithm: Any = load().precisions[precision].algorithm
            checkpoint.quantize(source, made.path("checkpoint"), statistics, algorithm, kv_cache=kv)  # type: ignore[arg-type]
    _record(made)
    return made


def _artifacts(made: Made) -> tuple[Artifact, ...]:
    kinds = {"checkpoint": "trtllm-checkpoint", "calibration": "calibration", "source": "hf-checkpoint"}
    return tuple(Artifact(kind, made.path(name), name) for name, kind in kinds.items() if made.path(name).exists())


def _context(made: Made, stage: Any, out: Path, *inputs: Artifact) -> StageContext:
    options: dict[str, Any] = {**SIZES, "texts": measuring.BUILTIN, "max_seq_len": 0}
    return StageContext(f"tiny:{made.precision}@onnxruntime", stage, options, inputs, out)


def _record(made: Made) -> None:
    scratch = made.folder / "scratch"
    for folder in (made.path("baseline"), scratch):
        folder.mkdir()
    context = _context(made, "baseline", scratch, *_artifacts(made))
    runtime = engine.load_source(context)
    tokenizer = Tokenizer.load(made.path("source"))
    baseline.record(
        made.path("baseline"), runtime, tokenizer, measuring.material(context), **SIZES, about={"reference": "test"}
    )
    runtime.close()
    shutil.rmtree(scratch)


def judge(
    made: Made, folder: Path, spoil: Spoil | None = None, spoil_engine: Spoil | None = None, small: bool = True
) -> Report:
    """Copy the checkpoint, spoil it, compile it, spoil the engine, and judge as `recipes validate` does.

    Args:
        folder: a new one.
    """
    copy = Made(folder, made.precision, made.kv)
    shutil.copytree(made.folder, folder)
    if spoil:
        spoil(copy.path("checkpoint"))
    out = folder / "engine"
    out.mkdir()
    stage2 = _context(copy, "stage2", out, *_artifacts(copy))
    engine.stage2(stage2)
    copy_tokenizer(copy.path("source"), out)
    if spoil_engine:
        spoil_engine(out)
    registry = load()
    precision = registry.precisions[made.precision]
    providers = [
        provider("family", registry.families["llama"]),
        provider("precision", precision),
        provider("engine", registry.engines["onnxruntime"]),
    ]
    inputs = (Artifact("onnxruntime-engine", out, "e"), *_artifacts(copy), Artifact("baseline", copy.path("baseline"), "b"))
    claims = {"algorithm": precision.algorithm, "bits": precision.bits, "not_compared": ""}
    findings = measuring.measure(Host(providers), providers, _context(copy, "validate", folder, *inputs), claims)
    chosen = {name: option.default for name, option in limits.options(registry, precision, 1_000_000 if small else 0).items()}
    return gate.judge(findings, limits.bounds(registry, chosen))


def said(report: Report) -> str:
    """What a report found wrong, for a message of a failing test."""
    bad = [c for c in report.checks if c.verdict != "pass"]
    return json.dumps([[c.name, c.verdict, c.value, c.limit, c.note] for c in bad], default=str)


