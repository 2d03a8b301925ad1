from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from engine_recipes.structure import structure


@dataclass(frozen=True)
class Inner:
    size: int = 0


@dataclass(frozen=True)
class Outer:
    name: str
    ratio: float = 1.0
    tags: tuple[str, ...] = ()
    flag: bool = False
    inner: Inner = Inner()
    by_name: Mapping[str, Inner] = field(default_factory=dict)
    hidden: str = field(default="", metadata={"toml": False})


def test_a_table_becomes_a_dataclass() -> None:
    table = {"name": "x", "ratio": 2, "tags": "one", "inner": {"size": 3}, "by_name": {"a.b": {"size": 4}}}
    errors: list[str] = []
    got = structure(Outer, table, "outer", errors)
    assert got == Outer("x", 2.0, ("one",), False, Inner(3), {"a.b": Inner(4)})
    assert errors == []


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "outer.name: missing"),
        ({"name": 3}, "outer.name: must be a string, not 3"),
        ({"name": "x", "flag": 1}, "outer.flag: must be true or false, not 1"),
        ({"name": "x", "ratio": True}, "outer.ratio: must be a number, not True"),
        ({"name": "x", "inner": {"sise": 1}}, "outer.inner.sise: unknown; did you mean size?"),
        ({"name": "x", "inner": 3}, "outer.inner: must be a table"),
        ({"name": "x", "tags": ["a", 3]}, "outer.tags[1]: must be a string, not 3"),
        (
            {"name": "x", "by_name": {"a.b": {"size": "3"}}},
            "outer.by_name.\"a.b\".size: must be a whole number, not '3'",
        ),
        ({"name": "x", "hidden": "y"}, "outer.hidden: unknown"),
    ],
)
def test_each_error_has_its_path(table: dict[str, Any], message: str) -> None:
    errors: list[str] = []
    assert structure(Outer, table, "outer", errors) is None
    assert errors == [message]


def test_all_errors_come_at_once() -> None:
    errors: list[str] = []
    structure(Outer, {"nam": "x", "flag": 0, "inner": {"size": "s"}}, "outer", errors)
    assert len(errors) == 4
