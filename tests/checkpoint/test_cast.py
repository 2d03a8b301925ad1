from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from engine_recipes.checkpoint.cast import FLOATS, caster, examine, largest_bits

Array = np.ndarray[Any, np.dtype[Any]]


def numpy_dtype(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name, name))


def by_torch(array: Array, target: str) -> Array:
    """Cast with torch; compared as bits."""
    signed = array.view(np.dtype(f"i{array.itemsize}"))
    tensor = torch.from_numpy(signed.copy()).view(getattr(torch, array.dtype.name)).to(getattr(torch, target))
    return np.asarray(tensor.view(torch.int32 if target == "float32" else torch.int16).numpy())


def values(source: str) -> Array:
    """Every finite pattern of a 16-bit format; for float32 every bfloat16 and float16 and what lies around them."""
    if source != "float32":
        every = np.arange(1 << 16, dtype=np.uint16).view(numpy_dtype(source))
        finite: Array = every[np.isfinite(every.astype(np.float32))]
        return finite
    exact = np.concatenate([values("bfloat16").astype(np.float32), values("float16").astype(np.float32)]).view(np.int32)
    halfway = exact + 0x8000, exact + 0x1000  # ties of bfloat16 and float16
    near = [part + step for part in (exact, *halfway) for step in (-1, 0, 1)]
    tricky = np.array([65504, 65519.996, 65520, 65536, 3.3895314e38, 3.4e38, 1e-8, 2**-25, 2**-24, 1e-45], np.float32)
    random = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    every = np.concatenate([*(part.view(np.float32) for part in near), tricky, -tricky, random])
    finite = every[np.isfinite(every)]
    return finite


@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("source", FLOATS)
def test_casts_are_those_of_torch_bit_for_bit(source: str, target: str) -> None:
    array = values(source)
    ours = caster(source, target)(array)
    assert ours.dtype == numpy_dtype(target)
    np.testing.assert_array_equal(ours.view(np.dtype(f"i{ours.itemsize}")), by_torch(array, target))


def test_a_large_block_of_small_values_goes_by_the_table() -> None:
    array = np.zeros((3, 150_000), numpy_dtype("bfloat16"))
    array[1, 5] = -1.0
    cast = caster("bfloat16", "float16")(array)
    assert cast.shape == array.shape
    assert cast[1, 5] == -1.0
    assert np.count_nonzero(cast) == 1


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize(("value", "problem"), [(np.nan, "NaN"), (-np.nan, "NaN"), (np.inf, "inf"), (-np.inf, "inf")])
def test_what_is_not_finite_is_found(source: str, value: float, problem: str) -> None:
    array = np.full(1000, -3.0, numpy_dtype(source))
    assert examine(array, "float16").problem == ""
    array[777] = value
    assert examine(array, "float16").problem == problem


@pytest.mark.parametrize(("source", "target"), [(s, t) for s in FLOATS for t in FLOATS])
def test_overflows_are_counted(source: str, target: str) -> None:
    array = values(source)
    finding = examine(array, target)
    became_inf = ~np.isfinite(caster(source, target)(array).astype(np.float32))
    assert finding.overflows == np.count_nonzero(became_inf)
    largest = np.abs(array[became_inf].astype(np.float64)).max() if became_inf.any() else 0.0
    assert finding.largest == largest


def test_an_empty_block_holds_nothing() -> None:
    assert largest_bits(np.empty(0, np.float32)) == 0
