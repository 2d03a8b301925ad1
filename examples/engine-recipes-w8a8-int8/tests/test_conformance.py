"""Run with this package installed: `pip install '.[test]' && pytest`."""

from __future__ import annotations

import pytest

from engine_recipes import testing

pytest.importorskip("modelopt")
SETTINGS = {"calib.size": 4, "calib.seq_len": 64}


@testing.conformance("engine-recipes-w8a8-int8", settings={"w8a8-int8": SETTINGS}, tolerance={"w8a8-int8": 0.1})
def test_conformance(case: testing.Case) -> None:
    case()
