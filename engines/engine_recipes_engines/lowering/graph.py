"""Writes an ONNX model with its weights beside it, one tensor at a time. Knows the file format, no model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

AnyGraph = TypeVar("AnyGraph", bound="Graph")

MODEL = "model.onnx"
DATA = "model.onnx.data"
#: Note in the model: types that a quantised model rounds activations or its cache to, with spaces between.
ROUNDING = "rounding"
#: Every weight starts on a page of its own, so that onnxruntime can map it instead of reading it.
ALIGNMENT = 4096
#: RMSNormalization came with opset 23; IR 11 belongs to it. onnxruntime 1.23 and later read both.
OPSET = 23
#: Opset -> the format version that belongs to it.
IR_VERSIONS = {23: 11, 24: 12}
MICROSOFT = "com.microsoft"


class Graph:
    """A model under construction: nodes and small constants in memory, weights already on disk.

    Use as a context manager and call `save` at its end. A value is named after the node that makes it.

    Args:
        folder: gets `model.onnx` and `model.onnx.data`.
        written: told the number of bytes on disk after each piece.
        opset: version of ONNX's own operators, 23 or 24.
    """

    def __init__(self, folder: Path, written: Callable[[int], None] = lambda _: None, opset: int = OPSET) -> None:
        self._folder = folder
        self._opset = opset
        self._written = written
        self._path = folder / DATA
        self._data = self._path.open("xb", buffering=0)
        self._nodes: list[Any] = []
        self._initializers: dict[str, Any] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    def __enter__(self: AnyGraph) -> AnyGraph:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._data.close()

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> str:
        """Declare an input; strings in `shape` name dimensions that are known when it runs."""
        self._inputs.append(_value(name, dtype, shape))
        return name

    def optional_input(self, name: str, default: Array) -> str:
        """Declare an input that may be left out when the model runs."""
        self.constant(name, default)
        return self.input(name, default.dtype.name, default.shape)

    def output(self, name: str, dtype: str, shape: Sequence[int | str]) -> str:
        """Declare that the value `name` is an output."""
        self._outputs.append(_value(name, dtype, shape))
        return name

    def node(self, op: str, inputs: Sequence[str], name: str, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output, which is called `name`."""
        return self.nodes(op, inputs, [name], domain, **attributes)[0]

    def nodes(
        self, op: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attributes: Any
    ) -> Sequence[str]:
        """Add a node with these outputs, called after the first. An empty name leaves an input or output out."""
        from onnx import helper

        self._nodes.append(helper.make_node(op, inputs, outputs, name=outputs[0], domain=domain, **attributes))
        return outputs

    def constant(self, name: str, array: Array) -> str:
        """Add a small array, kept inside `model.onnx`. The same name twice is the same constant."""
        from onnx import numpy_helper

        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(array, name)
        return name

    def weight(self, name: str, dtype: str, shape: Sequence[int], pieces: Iterable[Array]) -> str:
        """Add a large array, written to `model.onnx.data` at once.

        Args:
            name: of the value. The same name twice is the same weight; it is not written again.
            dtype: numpy's or ml_dtypes' name, `bfloat16`; or `int4`, whose pieces are uint8: two in a byte, the
                earlier one low.
            shape: of the whole.
            pieces: arrays that follow each other in row-major order. Only one is held at a time.

        Raises:
            ValueError: the pieces do not add up to the shape.
        """
        from onnx import TensorProto

        if name in self._initializers:
            return name
        start = self._data.seek(-self._data.tell() % ALIGNMENT, 1)
        for piece in pieces:
            self._write(piece)
        tensor = TensorProto(name=name, data_type=onnx_dtype(dtype), dims=shape, data_location=TensorProto.EXTERNAL)
        length = self._data.tell() - start
        if length != stored_bytes(dtype, shape):
            raise ValueError(f"{name}: {length} bytes are not {dtype} {list(shape)}")
        for key, value in (("location", DATA), ("offset", start), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self._initializers[name] = tensor
        return name

    def _write(self, piece: Array) -> None:
        import numpy as np

        # uint8, because a buffer of bfloat16 is nothing that memoryview knows
        view = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
        while len(view):  # an unbuffered write may be short, at 2 GiB for instance
            try:
                view = view[self._data.write(view[: 64 << 20]) :]
            except OSError as error:  # which does not say what it was that could not be written
                error.filename = str(self._path)
                raise
            self._written(self._data.tell())

    def save(self, notes: Mapping[str, str] | None = None) -> None:
        """Write `model.onnx`. `notes` are kept in it (ONNX's metadata_props)."""
        import onnx
        from onnx import helper

        graph = helper.make_graph(
            self._nodes, "decoder", self._inputs, self._outputs, list(self._initializers.values())
        )
        opsets = [helper.make_opsetid("", self._opset)]
        if any(node.domain == MICROSOFT for node in self._nodes):
            opsets.append(helper.make_opsetid(MICROSOFT, 1))
        version = IR_VERSIONS[self._opset]
        model = helper.make_model(graph, opset_imports=opsets, producer_name="engine-recipes", ir_version=version)
        helper.set_model_props(model, dict(notes or {}))
        onnx.save(model, self._folder / MODEL)


def _value(name: str, dtype: str, shape: Sequence[int | str]) -> Any:
    from onnx import helper

    return helper.make_tensor_value_info(name, onnx_dtype(dtype), list(shape))


def onnx_dtype(name: str) -> int:
    """ONNX's number for numpy's or ml_dtypes' name of a type."""
    from onnx import TensorProto

    names = {"float32": "FLOAT", "float8_e4m3fn": "FLOAT8E4M3FN", "float8_e5m2": "FLOAT8E5M2"}
    return int(TensorProto.DataType.Value(names.get(name, name.upper())))


def numpy_dtype(name: str) -> np.dtype[Any]:
    """numpy's dtype for its own or ml_dtypes' name of a type."""
    import ml_dtypes
    import numpy as np

    return np.dtype(getattr(ml_dtypes, name, name))


def stored_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a weight on disk; two of int4 share one."""
    count = math.prod(shape)
    return count // 2 if dtype == "int4" else count * itemsize(dtype)


def itemsize(name: str) -> int:
    """Bytes of one element."""
    return numpy_dtype(name).itemsize
