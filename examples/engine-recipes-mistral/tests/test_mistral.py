"""Run with engine-recipes[cpu] and this package installed: `pip install '.[test]' && pytest`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_recipes_mistral.family import resolve_checkpoint

import engine_recipes
from engine_recipes import RequestError, Sampling, testing

CONFIG: dict[str, Any] = testing.tiny_config("MistralForCausalLM", sliding_window=None, rope_theta=1e6)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RECIPES_WORKSPACE", str(tmp_path / "workspace"))
    return testing.write_checkpoint(tmp_path / "tiny-mistral", CONFIG, resolve_checkpoint(CONFIG))


@testing.conformance("engine-recipes-mistral", configs={"mistral": [CONFIG]})
def test_conformance(case: testing.Case) -> None:
    case()


def test_a_tiny_mistral_builds_and_generates(model: Path) -> None:
    build = engine_recipes.build(f"{model}:fp16@onnxruntime")
    assert build.status == "built"
    assert build.plan.family.owner.package == "engine-recipes-mistral"
    loaded = engine_recipes.load(f"{model}:fp16@onnxruntime")
    ids = loaded.tokenizer.encode("Hello", special=True)
    assert len(list(loaded.runtime.generate(ids, Sampling(max_tokens=8)))) == 8
    loaded.runtime.close()


def test_a_sliding_window_is_refused() -> None:
    with pytest.raises(RequestError, match="sliding_window = 128"):
        resolve_checkpoint({**CONFIG, "sliding_window": 128})


def test_what_no_mistral_has_is_refused() -> None:
    with pytest.raises(RequestError, match="rope on 16 of each head's 32 elements"):
        resolve_checkpoint({**CONFIG, "partial_rotary_factor": 0.5})
