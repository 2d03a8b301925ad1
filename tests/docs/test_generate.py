from __future__ import annotations

import inspect
import re
from dataclasses import is_dataclass
from types import ModuleType

import pytest

import engine_recipes
from conftest import ROOT
from engine_recipes import entries, hookspecs

REFERENCE = ROOT / "docs" / "reference"
HOOKS = [name for name, spec in vars(hookspecs).items() if hasattr(spec, f"{hookspecs.NAME}_spec")]


def test_what_the_code_says_is_what_the_pages_say(generate: ModuleType) -> None:
    assert {page.name for page in generate.pages()} == {"api.md", "hooks.md", "options.md", "registry.md"}
    for page in generate.pages():
        text = page.read_text(encoding="utf-8")
        assert generate.filled(text) == text, f"{page} is out of date: run `python docs/generate.py`"


def test_a_page_that_is_out_of_date_is_noticed(generate: ModuleType) -> None:
    text = (REFERENCE / "hooks.md").read_text(encoding="utf-8")
    assert generate.filled(text.replace("Say what the model is.", "Say what it is.")) == text


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_says_all_that_its_author_needs(generate: ModuleType, name: str) -> None:
    spec = generate.hook_specs()[name]
    doc, signature = generate.Doc(spec), inspect.signature(spec)
    assert set(doc.called) == {"whom", "where", "when"}, "Called: On WHOM, in PROCESS, WHEN."
    assert list(doc.items("Args")) == list(signature.parameters)
    assert ("Returns" in doc.sections) is (signature.return_annotation != "None")
    assert all(error in engine_recipes.__all__ for error in doc.items("Raises"))
    assert f"@hookimpl\ndef {name}(" in doc.example
    assert len(doc.summary) < 120


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_has_a_place_in_the_docs(name: str) -> None:
    arguments = ", ".join(inspect.signature(getattr(hookspecs, name)).parameters)
    text = (REFERENCE / "hooks.md").read_text(encoding="utf-8")
    assert f"\n## `{name}({arguments})`\n" in text
    assert f"\n| [`{name}({arguments})`](#" in text


def test_every_key_of_a_fragment_is_explained(generate: ModuleType) -> None:
    shown = {cls for _, cls in (*generate.TABLES, *generate.INNER)} | {entries.Defaults}
    classes = {
        thing for thing in vars(entries).values() if is_dataclass(thing) and thing.__module__ == entries.__name__
    }
    assert classes - shown == {entries.Owner, entries.Entry, entries.StageEntry, entries.Gate}
    rows = [line for cls in shown for line in generate._rows(cls) if line.startswith("| `")]
    assert len(rows) > 80
    assert [row for row in rows if row.endswith("|  |")] == []


def test_every_command_has_its_options_listed() -> None:
    from engine_recipes.cli import COMMANDS

    text = (REFERENCE / "options.md").read_text(encoding="utf-8")
    assert re.findall(r"^## `recipes (\w+)`$", text, flags=re.M) == list(COMMANDS)


def test_every_public_name_is_in_the_api_reference() -> None:
    text = (REFERENCE / "api.md").read_text(encoding="utf-8")
    directives = re.findall(r"^::: engine_recipes\.([\w.]+)$", text, flags=re.M)
    named = set(directives)
    assert set(engine_recipes._HOME) <= named
    assert "checkpoint.convert" in named
    assert {name.partition(".")[0] for name in named if "." in name} == set(engine_recipes._MODULES)
    for name in named:
        owner, _, last = name.rpartition(".")
        assert hasattr(getattr(engine_recipes, owner) if owner else engine_recipes, last), name
