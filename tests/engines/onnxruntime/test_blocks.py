from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as arrays

from engine_recipes_engines.lowering.graph import MICROSOFT, MODEL, Graph
from engine_recipes_engines.onnxruntime.blocks import block_count, block_of, pack, quantize_rows, repack_awq

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 9).map(lambda n: 2 * n))


def column(packed: np.ndarray, row: int, k: int) -> int:
    """The signed value that MatMulNBits reads."""
    byte = int(packed[row, k // 2])
    return (byte >> 4 if k % 2 else byte & 15) - 8


@given(arrays.arrays(np.int8, SHAPES))
def test_awq_low_halves_are_even_rows(packed: np.ndarray) -> None:
    found = repack_awq(packed)
    assert (found.dtype, found.shape) == (np.uint8, (2 * packed.shape[0], packed.shape[1] // 2))
    for i in range(packed.shape[0]):
        for k in range(packed.shape[1]):
            low, high = int(packed[i, k]) & 15, int(packed[i, k]) >> 4
            assert column(found, 2 * i, k) == (low - 16 if low > 7 else low)
            assert column(found, 2 * i + 1, k) == high


@given(arrays.arrays(np.int8, SHAPES, elements=st.integers(-8, 7)), st.sampled_from([16, 32]))
def test_packing_keeps_values_and_pads_with_zeros(quantized: np.ndarray, block: int) -> None:
    found = pack(quantized, block)
    rows, width = quantized.shape
    assert found.shape == (rows, block_count(width, block) * block // 2)
    values = [[column(found, row, k) for k in range(2 * found.shape[1])] for row in range(rows)]
    np.testing.assert_array_equal(np.array(values)[:, :width], quantized)
    assert not np.array(values)[:, width:].any()


@given(
    arrays.arrays(np.float16, SHAPES, elements=st.floats(-8, 8, width=16)),
    st.sampled_from([4, 8]),
)
def test_rows_are_quantised_like_trtllm_build(weight: np.ndarray, bits: int) -> None:
    found, scales = quantize_rows(weight, bits)
    half = 2 ** (bits - 1)
    for row, (values, scale) in enumerate(zip(weight.astype(float), scales, strict=True)):
        step = np.float32(max(abs(v) for v in values)) / half
        assert scale == np.float32(np.float16(step))
        for k, value in enumerate(values):
            exact = float(np.float32(value) / np.float32(step)) if step else 0.0
            rounded = math.copysign(math.floor(abs(exact) + 0.5), exact)  # halves away from zero
            assert found[row, k] == min(max(rounded, -half), half - 1)


@pytest.mark.parametrize(("width", "block"), [(4096, 128), (576, 64), (96, 32), (176, 32), (20, 32)])
def test_blocks_divide_rows_where_they_can(width: int, block: int) -> None:
    assert block_of(width) == block


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize(("width", "block"), [(128, 128), (192, 64), (176, 32), (24, 32)])
def test_onnxruntime_multiplies_what_was_packed(tmp_path: Path, rows: int, width: int, block: int) -> None:
    random = np.random.default_rng(0)
    quantized = random.integers(-8, 8, (12, width)).astype(np.int8)
    scale = random.random((12, block_count(width, block)), np.float32)
    x = random.standard_normal((rows, width), np.float32)
    with Graph(tmp_path) as graph:
        graph.input("x", "float32", ["n", width])
        blocks = graph.weight("b", "uint8", (12, scale.shape[1], block // 2), [pack(quantized, block)])
        scales = graph.weight("s", "float32", scale.shape, [scale])
        sizes = {"N": 12, "K": width, "bits": 4, "block_size": block, "accuracy_level": 1}
        graph.node("MatMulNBits", ["x", blocks, scales], "y", MICROSOFT, **sizes)
        graph.output("y", "float32", ["n", 12])
        graph.save()
    onnx.checker.check_model(str(tmp_path / MODEL))
    session = onnxruntime.InferenceSession(tmp_path / MODEL, providers=["CPUExecutionProvider"])
    expected = x @ (quantized * np.repeat(scale, block, axis=1)[:, :width]).T
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, atol=1e-4)
