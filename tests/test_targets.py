from __future__ import annotations

import pytest

from engine_recipes import RequestError
from engine_recipes.targets import compute_of, normal, parts, target_of


@pytest.mark.parametrize("text", ["sm120,SM89,sm86", "sm86+sm89+sm120", " sm89, sm86 ,sm120", "sm89,sm86,sm120,sm89"])
def test_one_set_of_targets_has_one_spelling(text: str) -> None:
    assert normal(text) == "sm86+sm89+sm120"
    assert parts(normal(text)) == ["sm86", "sm89", "sm120"]


@pytest.mark.parametrize(
    "text",
    ["", "sm89,", "+sm89", "sm86,,sm89", "sm/../../x", "sm*", "sm89\nx", "..", "sm", "sm8", "sm90a", "sm8999"],
)
def test_what_can_be_no_name_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="is no target"):
        normal(text)


@pytest.mark.parametrize(("target", "compute"), [("sm89", "8.9"), ("sm120", "12.0"), ("sm103", "10.3")])
def test_targets_and_compute_capabilities_name_each_other(target: str, compute: str) -> None:
    assert compute_of(target) == compute
    assert target_of(compute) == target


@pytest.mark.parametrize("target", ["cpu", "sm", "sm8", "smoke", "89"])
def test_what_is_no_gpu_has_no_compute_capability(target: str) -> None:
    assert compute_of(target) == ""
