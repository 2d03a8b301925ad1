"""Run with this package installed: `pip install -e '.[test]' && pytest`."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_recipes import Sampling, build, from_hf, load, testing

#: Of a tiny Llama. All of its weights are made for the tests.
CONFIG = testing.tiny_config()
#: What engines are compared with: it starts faster than transformers.
QUICK = {"gate.reference": "onnxruntime"}


@testing.conformance("engine-recipes-acme")
def test_conformance(case: testing.Case) -> None:
    case()


def test_a_tiny_model_builds_with_the_settings_of_its_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECIPES_WORKSPACE", str(tmp_path / "workspace"))
    monkeypatch.chdir(tmp_path)
    testing.write_checkpoint(Path("tiny-acme"), CONFIG, from_hf(CONFIG))
    built = build("acme", settings=QUICK)
    assert built.status == "built"
    assert built.plan.model.owner.package == "engine-recipes-acme"
    assert built.plan.settings["build.max_seq_len"].value == 128
    loaded = load("acme")
    ids = loaded.tokenizer.encode("Hello", special=True)
    assert len(list(loaded.runtime.generate(ids, Sampling(max_tokens=8)))) == 8
    loaded.runtime.close()
