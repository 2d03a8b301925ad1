from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import install, package
from engine_recipes import RequestError
from engine_recipes.combinations import complete, matches, refused
from engine_recipes.entries import Refusal
from engine_recipes.registry import Registry, load


@pytest.fixture
def registry(toy: None) -> Registry:
    return load()


@pytest.mark.parametrize(
    ("pattern", "value", "expected"),
    [
        ("fp8", "fp8", True),
        ("fp8", "fp8_x", False),
        ("fp8|int8", "int8", True),
        ("sm8?", "sm89", True),
        ("sm8?", "sm120", False),
        ("!FP8", "W4A16_AWQ", True),
        ("!FP8", "", True),
        ("!FP8", "FP8", False),
        ("<0.20", "0.17.0", True),
        ("<0.20", "1.2.1", False),
        (">=10,<12", "10.3", True),
        (">=10,<12", "12.0", False),
        ("!>=8.9", "8.6", True),
        (">=2", 3, True),
        (">=2", 1, False),
        (">=2", "disable", False),
        (">=2", "", False),
        ("", "", True),
        ("true", True, True),
        ("enable", "Enable", False),
    ],
)
def test_patterns(pattern: str, value: str | int | bool, expected: bool) -> None:
    assert matches(pattern, value) is expected


def test_all_conditions_of_a_rule_must_hold_and_the_first_such_rule_is_told() -> None:
    rules = [
        Refusal({"kv_cache": "fp8", "algorithm": "!FP8"}, "first", ""),
        Refusal({"kv_cache": "fp8"}, "second", ""),
        Refusal({"compute": ">=10"}, "third", ""),
    ]

    def told(target: str, **values: str) -> str:
        rule = refused(rules, target, values)
        return rule.why if rule else ""

    assert told("sm89", kv_cache="fp8", algorithm="W4A16_AWQ") == "first"
    assert told("sm89", kv_cache="fp8", algorithm="FP8") == "second"
    assert told("sm89", kv_cache="none") == ""
    assert told("sm120") == "third"
    assert told("sm86+sm120") == "third", "one of several targets is enough"
    assert told("cpu") == ""


def test_an_engine_is_completed_by_the_file_it_names(registry: Registry) -> None:
    engine = registry.engines["tool"]
    assert "fuse" not in engine.options
    whole = complete(engine)
    assert {"size", "fuse", "old"} <= set(whole.options)
    assert len(whole.refuses) == 2
    assert complete(replace(engine, python="/opt/bin/python")).options["python"].default == "/opt/bin/python"
    assert complete(registry.engines["echo"]).options == registry.engines["echo"].options


@pytest.mark.parametrize(
    "text",
    [
        "options = 3",
        "[options]\nfuse = { defualt = 1 }",
        "not toml",
        "[other]",
        "a = " + "[" * 20000,
        "a = " + "9" * 5000,
        '[options]\n"a\\u009b2J" = {}',  # clears the terminal that prints it
        "#" * 1_000_001,
    ],
)
def test_a_wrong_file_is_an_error_that_names_file_and_owner(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    folder = package(tmp_path / "site", "wrong-pack", "api = 1\n")
    (folder / "wrong_pack" / "wrong.toml").write_text(text)
    install(monkeypatch, folder)
    with pytest.raises(RequestError, match=r"wrong\.toml \(engine-recipes-toy 1\.0\)"):
        complete(replace(registry.engines["tool"], details="package:wrong_pack/wrong.toml"))


def test_a_file_that_is_missing_is_an_error_too(registry: Registry) -> None:
    with pytest.raises(RequestError, match="there is no such file"):
        complete(replace(registry.engines["tool"], details="package:engine_recipes_toy/none.toml"))
    with pytest.raises(RequestError, match="cannot be read"):
        complete(replace(registry.engines["tool"], details="package:engine_recipes_toy/\0"))


def test_a_pipe_is_not_waited_for(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = package(tmp_path / "site", "pipe-pack", "api = 1\n")
    os.mkfifo(folder / "pipe_pack" / "pipe.toml")
    install(monkeypatch, folder)
    with pytest.raises(RequestError, match="cannot be read: it is no file"):
        complete(replace(registry.engines["tool"], details="package:pipe_pack/pipe.toml"))
