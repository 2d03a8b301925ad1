"""An environment with a stand-in for TensorRT-LLM, checkpoints of every kind, and builds of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from converted import resolve
from engine_recipes import Artifact, StageContext, checkpoint
from engine_recipes.checkpoint import read_statistics, write_statistics
from engine_recipes.combinations import complete
from engine_recipes.registry import load

DATA = Path(__file__).parents[2] / "data" / "trtllm"
Make = Callable[..., Path]
Context = Callable[..., StageContext]


def environment(folder: Path, version: str = "1.2.1") -> Path:
    """An environment whose `trtllm-build` is the stand-in; returns its Python."""
    site, tools = folder / "site", folder / "bin"
    for name, release in (("tensorrt_llm", version), ("tensorrt", "10.14.1.48")):
        info = site / f"{name}-{release}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n")
    tools.mkdir()
    python, build = tools / "python", tools / "trtllm-build"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} "$@"\n')
    build.write_text(f'#!/bin/sh\nexec {sys.executable} {DATA / "trtllm_build.py"} "$@"\n')
    for script in (python, build):
        script.chmod(0o755)
    return python


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The Python of an environment with TensorRT-LLM 1.2.1."""
    return environment(tmp_path / "environment")


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes checkpoints as stage 1 does: `make("FP8", "qwen3", kv_cache="fp8", tp_size=2)`."""

    def made(algorithm: str = "float16", arch: str = "llama", **options: Any) -> Path:
        changes = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 256, **options.pop("config", {})}
        hf = resolve(tiny.write(tmp_path / "source", arch, **changes))
        out = tmp_path / "checkpoint"
        out.mkdir()
        with checkpoint.open_source(hf) as source:
            if algorithm in ("FP8", "W4A16_AWQ"):
                measured = tmp_path / "statistics"
                measured.mkdir()
                write_statistics(measured, statistics(source), {})
                checkpoint.quantize(source, out, read_statistics(measured), algorithm, **options)  # type: ignore[arg-type]
            elif algorithm in ("W8A16", "W4A16"):
                checkpoint.convert(source, out, dtype="bfloat16", algorithm=algorithm, **options)
            else:
                checkpoint.convert(source, out, dtype=algorithm, **options)  # type: ignore[arg-type]
        return out

    return made


def statistics(source: checkpoint.SourceCheckpoint) -> Any:
    """What a calibration would measure, made up: only shapes matter here."""
    import numpy as np

    found = {}
    for name, (_, info) in source.tensors.items():
        if name.endswith("_proj.weight"):
            linear = name.removesuffix(".weight")
            found[f"{linear}.input_amax"] = np.ones(1, np.float32)
            found[f"{linear}.pre_quant_scale"] = np.ones(info.shape[1], np.float32)
            if linear.endswith(("k_proj", "v_proj")):
                found[f"{linear}.cache_amax"] = np.ones(1, np.float32)
    return found


@pytest.fixture
def context(tmp_path: Path, python: Path) -> Context:
    """Makes what stage 2 is called with: every option at its default but for those given."""

    defaults = {name: option.default for name, option in complete(load().engines["tensorrt-llm"]).options.items()}

    def made(folder: Path, target: str = "sm89", ranks: int = 1, **options: Any) -> StageContext:
        out = tmp_path / "workspace" / "engines" / f".part-engine-{os.urandom(2).hex()}"
        out.mkdir(parents=True)
        inputs = (Artifact("trtllm-checkpoint", folder, "1" * 64),)
        cache = tmp_path / "workspace" / "caches" / "tensorrt-llm"
        settled = {**defaults, "python": str(python), **options}
        return StageContext("m:p@tensorrt-llm", "stage2", settled, inputs, out, target, cache, ranks)

    return made
