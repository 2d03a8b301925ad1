"""What engines read and are asked: the set in the package, and users' own files."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

import smollm2
from engine_recipes import RequestError, Tokenizer
from engine_recipes.gate.texts import Material, Prompt, load
from engine_recipes.sources.texts import locate

BUILTIN = "package:engine_recipes/gate/texts.jsonl"


def put(*lines: Any, name: str = "mine.jsonl") -> str:
    Path(name).write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return name


def test_the_set_in_the_package_is_the_one_that_its_notes_describe() -> None:
    (path,) = locate(BUILTIN).files
    notes = (path.parent / "texts.md").read_text(encoding="utf-8")
    assert f"`{hashlib.sha256(path.read_bytes()).hexdigest()}`" in notes
    assert "Apache-2.0" in notes and path.stat().st_size < 30_000
    material = load(BUILTIN, BUILTIN)
    tokenizer = Tokenizer.load(smollm2.folder())
    counts = [len(tokenizer.encode(text)) for text in material.texts]
    assert [int(count) for count in re.findall(r"^\| \d+ \|.*\| (\d+) \|$", notes, re.M)] == counts
    assert f"{sum(counts):,} tokens" in notes and max(counts) < 512
    assert sum(bool(prompt.answers) for prompt in material.prompts) == 6 and len(material.prompts) == 11


def test_a_file_of_ones_own_has_texts_and_prompts_in_any_order() -> None:
    spec = put({"prompt": "2 + 2?", "answers": ["4", "four"]}, {"text": "a"}, {"prompt": "Why?"}, '"b"')
    assert load(spec, BUILTIN) == Material(("a", "b"), (Prompt("2 + 2?", ("4", "four")), Prompt("Why?")))


def test_a_prompt_with_an_answer_of_its_own_is_a_text() -> None:
    spec = put({"prompt": "q", "completion": "a"}, {"messages": [{"role": "user", "content": "hi"}]})
    assert load(spec, BUILTIN).texts == ("q\n\na", "hi")


def test_a_file_without_prompts_gets_the_built_in_ones() -> None:
    found = load(put("One.\fTwo.", name="mine.txt"), BUILTIN)
    assert found.texts == ("One.", "Two.") and found.prompts == load(BUILTIN, BUILTIN).prompts


def test_the_first_64_are_taken() -> None:
    lines = [line for i in range(70) for line in ({"text": f"t{i}"}, {"prompt": f"p{i}"})]
    found = load(put(*lines), BUILTIN)
    assert found.texts == tuple(f"t{i}" for i in range(64))
    assert found.prompts == tuple(Prompt(f"p{i}") for i in range(64))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"prompt": "Why?"}], "mine.jsonl holds no text to measure on"),
        ([{"text": " "}], "mine.jsonl holds no text to measure on"),
        ([{"text": "a"}, {"prompt": 3}], "the prompt 3 is no text"),
        ([{"text": "a"}, {"prompt": " "}], "is no text"),
        ([{"text": "a"}, {"prompt": "q", "answers": "x"}], "answers of 'q' are no list of texts"),
        ([{"text": "a"}, {"prompt": "q", "answers": [4]}], "answers of 'q' are no list of texts"),
        ([{"text": "a"}, "{"], "line 2 of mine.jsonl is not JSON"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_two_lines(lines: list[Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        load(put(*lines), BUILTIN)
    assert message in caught.value.message and caught.value.hint
    assert "\n" not in caught.value.message + caught.value.hint


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("The capital is Paris.", True),
        ("PARIS", True),
        ("A parisian answer", False),
        ("comparison", False),
        ("答えは東京です", True),
        ("", False),
    ],
)
def test_an_answer_is_a_whole_word_in_any_case(text: str, right: bool) -> None:
    assert Prompt("q", ("Paris", "東京")).is_answered_by(text) is right


def test_nothing_answers_a_question_without_answers() -> None:
    assert not Prompt("Why?").is_answered_by("Because.")


def test_material_that_differs_has_another_digest() -> None:
    one = Material(("a",), (Prompt("q", ("x",)),))
    others = [Material(("b",), one.prompts), Material(("a",), ()), Material(("a",), (Prompt("q"),))]
    assert len({one.digest, *(other.digest for other in others)}) == 4
    assert one.digest == Material(("a",), (Prompt("q", ("x",)),)).digest
