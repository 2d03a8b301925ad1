"""Run with this package installed: `pip install -e '.[test]' && pytest`."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_recipes import RequestError, Sampling, build, load, testing

from engine_recipes_acme.family import resolve_checkpoint

#: A config.json for each kind of model that the family knows. Small: all of its weights are made for the tests.
CONFIGS = [
    testing.tiny_config("AcmeForCausalLM"),
    testing.tiny_config("AcmeForCausalLM", tie_word_embeddings=True),
]


@testing.conformance(
    "engine-recipes-acme",
    configs={"acme": CONFIGS},
)
def test_conformance(case: testing.Case) -> None:
    case()


def test_a_tiny_model_builds_and_generates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECIPES_WORKSPACE", str(tmp_path / "workspace"))
    model = testing.write_checkpoint(tmp_path / "tiny", CONFIGS[0], resolve_checkpoint(CONFIGS[0]))
    built = build(f"{model}:fp16@onnxruntime")
    assert built.status == "built"
    assert built.plan.family.owner.package == "engine-recipes-acme"
    loaded = load(f"{model}:fp16@onnxruntime")
    ids = loaded.tokenizer.encode("Hello", special=True)
    assert len(list(loaded.runtime.generate(ids, Sampling(max_tokens=8)))) == 8
    loaded.runtime.close()


def test_a_sliding_window_is_refused() -> None:
    with pytest.raises(RequestError, match="sliding_window = 128"):
        resolve_checkpoint({**CONFIGS[0], "sliding_window": 128})
