"""Run with this package installed: `pip install -e '.[test]' && pytest`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from engine_recipes import Sampling, build, from_hf, load, testing

from engine_recipes_acme.precision import rounded

#: Of a tiny Llama. All of its weights are made for the tests.
CONFIG = testing.tiny_config()
#: What engines are compared with: it starts faster than transformers.
QUICK = {"gate.reference": "onnxruntime"}


@testing.conformance(
    "engine-recipes-acme",
    tolerance={"acme": 0.1},  # tiny models are all noise
)
def test_conformance(case: testing.Case) -> None:
    case()


def test_a_tiny_model_builds_and_generates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECIPES_WORKSPACE", str(tmp_path / "workspace"))
    model = testing.write_checkpoint(tmp_path / "tiny", CONFIG, from_hf(CONFIG))
    built = build(f"{model}:acme@onnxruntime", settings=QUICK)
    assert built.status == "built"
    assert built.plan.precision.owner.package == "engine-recipes-acme"
    loaded = load(f"{model}:acme@onnxruntime")
    ids = loaded.tokenizer.encode("Hello", special=True)
    assert len(list(loaded.runtime.generate(ids, Sampling(max_tokens=8)))) == 8
    loaded.runtime.close()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_keep_their_largest_weight_and_few_levels(bits: int) -> None:
    rows = np.random.default_rng(0).normal(size=(3, 1000)).astype(np.float32)
    rows[1] = 0
    result = rounded(rows, bits)
    assert (result.shape, result.dtype) == (rows.shape, rows.dtype)
    np.testing.assert_allclose(np.abs(result).max(axis=1), np.abs(rows).max(axis=1), rtol=1e-6)
    assert len(np.unique(result[0])) <= 2**bits


def test_rows_with_more_bits_are_closer_to_what_they_were() -> None:
    rows = np.random.default_rng(0).normal(size=(3, 1000)).astype(np.float32)
    errors = [np.abs(rounded(rows, bits) - rows).mean() for bits in (2, 3, 4)]
    assert errors[0] > errors[1] > errors[2]
