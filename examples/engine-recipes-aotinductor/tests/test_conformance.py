"""What every engine promises, checked by the suite of engine-recipes. Minutes: it compiles a dozen tiny models."""

from __future__ import annotations

from engine_recipes import testing


@testing.conformance(
    "engine-recipes-aotinductor",
    skip={"engine aotinductor: two builds *": "what Inductor compiles differs byte for byte from folder to folder"},
)
def test_conformance(case: testing.Case) -> None:
    case()
