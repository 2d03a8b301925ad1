"""A build is not good because two programs follow one description that may be wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import engine_recipes
import tiny
from conftest import install, package
from engine_recipes import testing, witness
from engine_recipes.gate import read
from engine_recipes.registry import load
from engine_recipes.sources import Located
from engine_recipes.sources.spec import parse

REGISTRY = """\
api = 1

[families.acme]
module = "engine_recipes_acme.family"
architectures = ["AcmeForCausalLM"]
"""
#: Leaves out that the embedding is scaled, which config.json says.
FAMILY = """\
from engine_recipes import from_hf, hookimpl

@hookimpl
def resolve_checkpoint(config):
    return from_hf(config, handled=("embedding_multiplier",))
"""


def located(folder: Path, config: object) -> Located:
    folder.mkdir()
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return Located(parse(f"file:{folder}"), folder, "", "")


@pytest.mark.parametrize(
    ("config", "knows"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, True),
        ({"architectures": ["GraniteForCausalLM"]}, True),
        ({"architectures": ["AcmeForCausalLM"]}, False),
        ({"architectures": ["Llama"]}, False),  # not a part of a name
        ({}, True),  # others say what is wrong with it
        ("[[[", True),
        ([], True),
    ],
)
def test_transformers_is_asked_for_what_it_knows(tmp_path: Path, config: object, knows: bool) -> None:
    pytest.importorskip("transformers")
    source = located(tmp_path / "model", config)
    assert witness.loads(load().references["transformers"], source) is knows
    assert witness.loads(load().references["onnxruntime"], source)


def test_our_own_families_may_be_judged_by_their_description() -> None:
    registry = load()
    for family in registry.families.entries.values():
        assert not witness.doubt(registry.references["onnxruntime"], family)
        assert witness.doubt(registry.references["onnxruntime"], replace(family, references=()))
        assert not witness.doubt(registry.references["transformers"], replace(family, references=()))


@pytest.mark.parametrize("vouched", [False, True])
def test_an_engine_that_only_its_familys_description_judged_gets_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vouched: bool
) -> None:
    registry = REGISTRY + 'references = ["onnxruntime"]\n' * vouched
    install(monkeypatch, package(tmp_path / "p", "engine-recipes-acme", registry, family=FAMILY))
    model = tiny.write(
        tmp_path / "m", "llama", architectures=["AcmeForCausalLM"], vocab_size=256, embedding_multiplier=9.0
    )
    built = engine_recipes.build(f"{testing.write_tokenizer(model)}:fp16@onnxruntime")
    report = read(built.path("stage2"))
    assert report is not None
    doubts = [check for check in report.checks if check.name == "model is described rightly"]
    assert [check.verdict for check in doubts] == [] if vouched else ["warn"]
    assert vouched or "as family acme describes it" in doubts[0].note
