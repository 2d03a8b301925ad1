from __future__ import annotations

import subprocess
import sys

import pytest
from packaging.requirements import InvalidRequirement, Requirement as Theirs
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from engine_recipes import requirements
from engine_recipes.facts import Facts

TEXTS = [
    "numpy",
    "numpy>=1.26",
    "a.b_c-d ==1.2, !=1.3",
    "x[y]>=1",
    "x~=1.2",
    "x==1.*",
    "x=>1",
    ">=1",
    "",
    "x>=1 y",
    "-x",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_requirement_is_one_where_packaging_says_so(text: str) -> None:
    try:
        theirs = Theirs(text)
    except InvalidRequirement:
        assert not requirements.is_requirement(text)
    else:
        ours = requirements.parse(text)
        assert (ours.name, SpecifierSet(ours.versions)) == (theirs.name, theirs.specifier)


@pytest.mark.parametrize("text", [">=1", ">= 1.2 , <2", "==1.*", "~=1.2", "~=1", "=>1", "8.9+", ">=1,", "1", ">=1rc1"])
def test_a_range_is_one_where_packaging_says_so(text: str) -> None:
    try:
        expected = bool(SpecifierSet(text))
    except InvalidSpecifier:
        expected = False
    assert requirements.is_range(text) is expected


def test_a_marker_for_other_machines_asks_for_nothing() -> None:
    facts = Facts(versions={"numpy": "1.26", "a-b": "2"})
    assert facts.meets("nosuch>=1; python_version < '3'")
    assert not facts.meets("nosuch>=1; python_version >= '3'")
    assert facts.meets("numpy[extra]>=1.20; python_version >= '3'")
    assert facts.meets("A.b>=2")
    assert not facts.meets("numpy>=2")


def test_a_version_that_is_none_meets_nothing() -> None:
    assert not Facts(versions={"numpy": "\\x1b[31m"}).meets("numpy>=1")


def test_plain_requirements_are_read_without_the_parser() -> None:
    code = (
        "import sys; from engine_recipes import requirements as r\n"
        "assert r.is_requirement('onnxruntime>=1.23 | onnxruntime-gpu>=1.23,<2') and r.is_range('>=8.9')\n"
        "assert 'packaging.specifiers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
