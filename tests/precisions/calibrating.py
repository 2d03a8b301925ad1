"""Tiny sources with a tokenizer, and calibrating them, for the tests of the calibrations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from converted import resolve
from engine_recipes import Artifact, StageContext, checkpoint, testing
from engine_recipes_precisions import amax

#: Enough text for a few rows, with digits so that it does not repeat.
TEXT = " ".join(f"Sentence {number} of the text that we calibrate with." for number in range(60))


def source(folder: Path, arch: str = "llama", vocab_size: int = 103, **changes: Any) -> Path:
    """A resolved source whose tokenizer makes one token of each character."""
    tiny.write(folder, arch, vocab_size=vocab_size, **changes)
    testing.write_tokenizer(folder, vocab_size)
    return resolve(folder)


def calibrate(
    module: Any,
    hf: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    texts: Sequence[str] = (TEXT,),
    **options: Any,
) -> checkpoint.Statistics:
    """Run a calibration plugin and read what it left."""
    monkeypatch.setattr(amax, "read_texts", lambda _: iter(texts))
    out.mkdir()
    settings = {"data": "x", "size": 4, "seq_len": 24, "batch_size": 4, "seed": 1, "device": "cpu", "group_size": 64}
    context = StageContext(
        "tiny:fp8@onnxruntime", "calibrate", {**settings, **options}, (Artifact("hf-checkpoint", hf, "0" * 64),), out
    )
    module.calibrate(context)
    return checkpoint.read_statistics(out)


def change(hf: Path, name: str, value: float) -> None:
    """Put one other value into a weight."""
    settings = json.loads((hf / "config.json").read_text())
    arrays = tiny.tensors(settings)
    arrays[name] = arrays[name].copy()
    arrays[name].reshape(-1)[5] = value
    tiny.write_tensors(hf, settings, arrays)


def same(one: checkpoint.Statistics, other: checkpoint.Statistics, tolerance: float = 0) -> None:
    """Demand the same statistics."""
    assert sorted(one.names()) == sorted(other.names())
    for name in one.names():
        np.testing.assert_allclose(one.vector(name), other.vector(name), rtol=tolerance, err_msg=name)
