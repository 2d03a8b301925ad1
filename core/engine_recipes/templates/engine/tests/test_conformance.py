"""Run with this package installed: `pip install -e '.[test]' && pytest`."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_recipes import RecipesError, Sampling, build, from_hf, load, testing

#: Of a tiny Llama. All of its weights are made for the tests.
CONFIG = testing.tiny_config()
#: A short look at what was built: few tokens, compared with what starts faster than transformers.
QUICK = {"gate.reference": "onnxruntime", "gate.window": "64", "gate.max_tokens": "8"}


@testing.conformance("engine-recipes-acme")
def test_conformance(case: testing.Case) -> None:
    case()


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RECIPES_WORKSPACE", str(tmp_path / "workspace"))
    return testing.write_checkpoint(tmp_path / "tiny", CONFIG, from_hf(CONFIG))


def test_a_tiny_model_builds_and_generates(model: Path) -> None:
    built = build(f"{model}:fp16@acme", settings=QUICK)
    assert built.status == "built"
    assert built.plan.engine.owner.package == "engine-recipes-acme"
    loaded = load(f"{model}:fp16@acme")
    ids = loaded.tokenizer.encode("Hello", special=True)
    assert len(list(loaded.runtime.generate(ids, Sampling(max_tokens=8)))) == 8
    loaded.runtime.close()


def test_a_sequence_longer_than_the_models_is_refused(model: Path) -> None:
    with pytest.raises(RecipesError, match="more than the 256 tokens"):
        build(f"{model}:fp16@acme", settings={"build.max_seq_len": "257"})
