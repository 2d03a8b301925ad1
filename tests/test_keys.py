from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, strategies as st

from engine_recipes.keys import canonical, key_of

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), values, max_size=5))
def test_the_order_of_keys_does_not_matter(preimage: dict[str, object]) -> None:
    assert key_of(preimage) == key_of(dict(reversed(preimage.items())))


@given(st.dictionaries(st.text(), values, max_size=4), st.dictionaries(st.text(), values, max_size=4))
def test_different_values_have_different_keys(a: dict[str, object], b: dict[str, object]) -> None:
    assert (key_of(a) == key_of(b)) == (canonical(a) == canonical(b))


def test_keys_never_change() -> None:
    # Written down on purpose: if this changes, every engine people have built is built again.
    preimage = {"stage": "stage1", "options": {"tp_size": 2, "scale": 1.5, "name": "é"}, "inputs": ["ab"]}
    text = rb'{"inputs":["ab"],"options":{"name":"\u00e9","scale":1.5,"tp_size":2},"stage":"stage1"}'
    assert canonical(preimage) == text
    assert key_of(preimage) == hashlib.sha256(text).hexdigest()


def test_a_number_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        key_of({"x": float("nan")})
