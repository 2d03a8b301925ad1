from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest

from engine_recipes_engines.lowering.graph import ALIGNMENT, DATA, MICROSOFT, MODEL, Graph, itemsize, onnx_dtype


def small(folder: Path, dtype: str = "float32") -> np.ndarray:
    """y = x · wᵀ + bias from `first` on, with w on disk; returns w."""
    w = np.arange(12, dtype=np.float32).reshape(3, 4).astype(getattr(ml_dtypes, dtype, dtype))
    with Graph(folder) as graph:
        x = graph.input("x", "float32", ["n", 4])
        first = graph.optional_input("first", np.array([0]))
        stored = graph.weight("w", dtype, w.shape, [w[:1], w[1:]])
        wide = graph.node("Cast", [stored], "wide", to=onnx_dtype("float32"))
        turned = graph.node("Transpose", [wide], "turned", perm=[1, 0])
        product = graph.node("MatMul", [x, turned], "product")
        end, axis = graph.constant("end", np.array([99])), graph.constant("axis", np.array([0]))
        graph.node("Slice", [product, first, end, axis], "y")
        graph.output("y", "float32", ["m", 3])
        graph.save()
    return w


def _tensors(folder: Path) -> list[onnx.TensorProto]:
    return list(onnx.load(folder / MODEL, load_external_data=False).graph.initializer)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_onnxruntime_reads_what_was_streamed(tmp_path: Path, dtype: str) -> None:
    w = small(tmp_path, dtype).astype(np.float32)
    onnx.checker.check_model(str(tmp_path / MODEL), full_check=True)
    session = onnxruntime.InferenceSession(tmp_path / MODEL, providers=["CPUExecutionProvider"])
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    assert [i.name for i in session.get_inputs()] == ["x"]
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], x @ w.T)
    np.testing.assert_array_equal(session.run(None, {"x": x, "first": np.array([-1])})[0], (x @ w.T)[-1:])


def test_weights_lie_on_pages_of_their_own_and_are_written_once(tmp_path: Path) -> None:
    seen: list[int] = []
    with Graph(tmp_path, seen.append) as graph:
        a = np.ones((3, 5), np.float16)
        assert graph.weight("a", "float16", a.shape, [a]) == graph.weight("a", "float16", a.shape, [a]) == "a"
        graph.weight("b", "float16", (5, 3), [np.asfortranarray(np.arange(15).reshape(5, 3)).astype(np.float16)])
        graph.save()
    tensors = {t.name: {e.key: e.value for e in t.external_data} for t in _tensors(tmp_path)}
    external = {name: (t["location"], int(t["offset"]), int(t["length"])) for name, t in tensors.items()}
    assert external == {"a": (DATA, 0, 30), "b": (DATA, ALIGNMENT, 30)}
    assert seen == [30, ALIGNMENT + 30]
    assert np.frombuffer((tmp_path / DATA).read_bytes()[ALIGNMENT:], np.float16).tolist() == list(range(15))


def test_a_weight_of_the_wrong_size_is_a_bug(tmp_path: Path) -> None:
    with Graph(tmp_path) as graph, pytest.raises(ValueError, match=r"a: 8 bytes are not float16 \[5\]"):
        graph.weight("a", "float16", (5,), [np.ones(4, np.float16)])


def test_names_of_types_are_onnx_and_numpy_names() -> None:
    for name in ("float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "float8_e4m3fn"):
        dtype = onnx.helper.tensor_dtype_to_np_dtype(onnx_dtype(name))
        assert (dtype.name, dtype.itemsize) == (name, itemsize(name))


@pytest.mark.parametrize(("opset", "domains"), [(23, ["", MICROSOFT]), (24, [""])])
def test_a_model_imports_what_it_uses(tmp_path: Path, opset: int, domains: list[str]) -> None:
    with Graph(tmp_path, opset=opset) as graph:
        x = graph.input("x", "float32", ["n"])
        graph.node("QuickGelu" if opset == 23 else "Relu", [x], "y", domains[-1])
        graph.output("y", "float32", ["n"])
        graph.save()
    model = onnx.load(tmp_path / MODEL)
    assert [(o.domain, o.version) for o in model.opset_import] == list(zip(domains, [opset, 1], strict=False))
    onnxruntime.InferenceSession(tmp_path / MODEL, providers=["CPUExecutionProvider"])


def test_two_numbers_of_int4_share_a_byte(tmp_path: Path) -> None:
    with Graph(tmp_path, opset=24) as graph:
        w = graph.weight("w", "int4", (2, 2), [np.array([[0x9F]], np.uint8), np.array([[0x70]], np.uint8)])
        scale = graph.constant("scale", np.array([[1.0], [10.0]], np.float32))
        graph.node("DequantizeLinear", [w, scale], "y", axis=1, block_size=2)
        graph.output("y", "float32", [2, 2])
        graph.save()
    session = onnxruntime.InferenceSession(tmp_path / MODEL, providers=["CPUExecutionProvider"])
    assert session.run(None, {})[0].tolist() == [[-1, -7], [0, 70]]
