"""Tiny models lowered, and what transformers says about the same weights. For tests of engines that lower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

import different
import tiny
from engine_recipes import Artifact, Decoder, StageContext, checkpoint
from engine_recipes_engines import onnxruntime as engine
from engine_recipes_models import llama, qwen

Array = np.ndarray[Any, Any]


def write_lively(folder: Path, arch: str = "llama", **changes: Any) -> Path:
    """A tiny model with matrices four times as large, so that logits spread by about 1 and errors show."""
    settings = tiny.config(arch, **changes)
    arrays = tiny.tensors(settings)
    for name, array in arrays.items():
        if array.ndim == 2:
            arrays[name] = (array.astype(np.float32) * 4).astype(array.dtype)
    return tiny.write_tensors(folder, settings, arrays)


def describe(hf: Path) -> Decoder:
    """What the model's family says it is."""
    config = json.loads((hf / "config.json").read_text())
    family = {"llama": llama, "gemma": different, "phi3": different}.get(config["model_type"], qwen)
    return family.resolve_checkpoint(config)


def context(
    hf: Path, work: Path, *, dtype: str, tp_size: int, pp_size: int, target: str, **options: Any
) -> StageContext:
    """Run stage 1 for a Hugging Face folder; what stage 2 is then called with."""
    resolved, converted, out = work / "source", work / "checkpoint", work / "engine"
    for folder in (resolved, converted, out):
        folder.mkdir()
    describe(hf).write(resolved / "decoder.json")
    (resolved / "source.json").write_text(json.dumps({"folder": str(hf)}))
    source = Artifact("hf-checkpoint", resolved, "0" * 64)
    with checkpoint.open_source(source) as opened:
        checkpoint.convert(opened, converted, dtype, tp_size, pp_size)  # type: ignore[arg-type]
    inputs = (Artifact("trtllm-checkpoint", converted, "1" * 64), source)
    return StageContext("m:p@onnxruntime", "stage2", options, inputs, out, target)


def build(
    hf: Path,
    work: Path,
    dtype: str = "float32",
    tp_size: int = 1,
    pp_size: int = 1,
    target: str = "cpu",
    **options: Any,
) -> Path:
    """Stage 1 and stage 2 for a Hugging Face folder; returns the engine's folder, without tokenizer."""
    stage2 = context(hf, work, dtype=dtype, tp_size=tp_size, pp_size=pp_size, target=target, **options)
    engine.stage2(stage2)
    return stage2.out


def reference(hf: Path, ids: list[int]) -> Array:
    """transformers' logits in float32, [len(ids), vocabulary]."""
    import torch

    with torch.no_grad():
        return np.asarray(different.model(hf)(torch.tensor([ids])).logits[0].numpy())
