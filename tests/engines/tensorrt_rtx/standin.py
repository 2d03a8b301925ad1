"""A GPU made of ordinary memory, and a TensorRT-RTX that runs the graph an engine file names. For tests of sessions.

Both are strict where the real ones are: memory is dirty when it is taken, work is done when the stream is waited for,
addresses must lie in memory that is held, shapes in the profile, and a cache must be updated in place.
"""

from __future__ import annotations

import ctypes
import enum
import hashlib
import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from engine_recipes import checkpoint
from engine_recipes_engines.tensorrt_rtx import lowering
from engine_recipes_engines.tensorrt_rtx.settings import Settings, Tensor, read_settings


def lower(converted: Path, out: Path, longest: int = 64, batch: int = 4, chunk: int = 48, index: str = "INT64") -> Path:
    """`model.onnx`, `rtx.json`, and an engine file that the stand-in takes. Returns `out`.

    Args:
        index: the type that this engine has for what the graph has as int64.
    """
    out.mkdir()
    with checkpoint.open_checkpoint(converted) as weights:
        lowering.lower(weights, out, "float32", longest)
        d = weights.decoder
    engine = out / "model.engine"
    engine.write_bytes(b"ftrt" + str(out / "model.onnx").encode())
    model = onnx.load(out / "model.onnx", load_external_data=False).graph
    settings = Settings(
        batch, longest, chunk, d.vocab_size, d.layers, d.kv_heads, d.head_size, "float16", None, ["sm89"], "0", {},
        inputs=[_tensor(value, index) for value in model.input],
        outputs=[_tensor(value, index) for value in model.output],
        bytes=engine.stat().st_size,
        sha256=hashlib.sha256(engine.read_bytes()).hexdigest(),
    )  # fmt: skip
    settings.write(out)
    return out


def _tensor(value: Any, index: str) -> Tensor:
    kind = value.type.tensor_type
    shape = [side.dim_value or -1 for side in kind.shape.dim]
    return Tensor(value.name, index if kind.elem_type == onnx.TensorProto.INT64 else "FLOAT", shape)


class Error(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorIllegalAddress = 700


class Kind(enum.Enum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class Cuda(ModuleType):
    """`cuda.bindings.runtime`.

    Attributes:
        room: bytes that can be held.
        fail: function -> code that it returns from now on.
        driver: its version; 0: there is none.
    """

    cudaError_t, cudaMemcpyKind = Error, Kind

    def __init__(self) -> None:
        super().__init__("cuda.bindings.runtime")
        self.room, self.driver = 1 << 26, 13000
        self.fail: dict[str, Error] = {}
        self.held: dict[int, Any] = {}
        self.queue: list[Callable[[], None]] = []
        self.streams: set[int] = set()
        self.numbers = itertools.count(0x5EA)

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        code = super().__getattribute__("__dict__").get("fail", {}).get(name)
        return found if code is None else lambda *_: (code, None)

    def inside(self, address: int, size: int) -> bool:
        return any(start <= address and address + size <= start + len(a) for start, a in self.held.items())

    def cudaSetDevice(self, device: int) -> tuple[Any, ...]:
        return (Error.cudaSuccess if self.driver else Error.cudaErrorInsufficientDriver,)

    def cudaDriverGetVersion(self) -> tuple[Any, ...]:
        return Error.cudaSuccess, self.driver

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, ...]:
        return Error.cudaSuccess, SimpleNamespace(name=b"Stand-in 40", major=8, minor=9)

    def cudaGetErrorString(self, code: Error) -> tuple[Any, ...]:
        return Error.cudaSuccess, f"it said {code.name}".encode()

    def cudaGetLastError(self) -> tuple[Any, ...]:
        return (Error.cudaSuccess,)

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        return Error.cudaSuccess, self.room - sum(map(len, self.held.values())), self.room

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        if size > self.cudaMemGetInfo()[1]:
            return Error.cudaErrorMemoryAllocation, None
        array = np.full(size + 256, 0xFF, np.uint8)
        array = array[-array.ctypes.data % 256 :][:size]
        self.held[array.ctypes.data] = array
        return Error.cudaSuccess, array.ctypes.data

    def cudaFree(self, address: int) -> tuple[Any, ...]:
        self.cudaStreamSynchronize(0)
        del self.held[address]
        return (Error.cudaSuccess,)

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: int) -> tuple[Any, ...]:
        assert self.inside(address, size)
        return self._later(stream, lambda: ctypes.memset(address, value, size))

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: Kind, stream: int) -> tuple[Any, ...]:
        if kind is Kind.cudaMemcpyHostToDevice:
            assert self.inside(to, size)
            data = ctypes.string_at(source, size)
            return self._later(stream, lambda: ctypes.memmove(to, data, size))
        assert self.inside(source, size)
        return self._later(stream, lambda: ctypes.memmove(to, source, size))

    def _later(self, stream: int, do: Callable[[], Any]) -> tuple[Any, ...]:
        assert stream in self.streams
        self.queue.append(do)
        return (Error.cudaSuccess,)

    def cudaStreamCreate(self) -> tuple[Any, ...]:
        stream = next(self.numbers)
        self.streams.add(stream)
        return Error.cudaSuccess, stream

    def cudaStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        self.streams.remove(stream)
        return (Error.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        while self.queue:
            self.queue.pop(0)()
        return (Error.cudaSuccess,)


class Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO = range(4)


class Logger:
    Severity = Severity

    def log(self, severity: Severity, message: str) -> None:
        raise NotImplementedError


class DataType(enum.Enum):
    FLOAT, INT64, INT32 = np.float32, np.int64, np.int32

    @property
    def itemsize(self) -> int:
        return np.dtype(self.value).itemsize


class Strategy(enum.Enum):
    LAZY, EAGER, NONE = range(3)


class Trt(ModuleType):
    """`tensorrt_rtx`.

    Attributes:
        described: what a loaded engine says of itself in place of what its notes say.
        aliases: output -> what an engine says that it is updated in place of, where that is not its own cache.
        refusal: what the library says of an engine, and the bits of its diagnostics.
        no_context: what it says when an engine has no room to run.
        no_step: what it says when a step cannot be run.
    """

    ILogger = Logger
    DynamicShapesKernelSpecializationStrategy = Strategy
    nptype = staticmethod(lambda dtype: dtype.value)

    def __init__(self, cuda: Cuda) -> None:
        super().__init__("tensorrt_rtx")
        self.cuda = cuda
        self.described: dict[str, Any] = {}
        self.aliases: dict[str, str | None] = {}
        self.refusal: tuple[str, int] | None = None
        self.no_context = self.no_step = ""

    def Runtime(self, logger: Logger) -> SimpleNamespace:
        def deserialize_cuda_engine(data: Any) -> Engine | None:
            content = bytes(data)
            if self.refusal or content[:4] != b"ftrt":
                logger.log(Severity.INFO, "Loaded engine size: 0 MiB")
                logger.log(Severity.ERROR, self.refusal[0] if self.refusal else "Serialization\n assertion failed")
                logger.log(Severity.ERROR, "and so on")
                return None
            return Engine(self, logger, content[4:].decode())

        return SimpleNamespace(
            deserialize_cuda_engine=deserialize_cuda_engine,
            get_engine_validity=lambda data: (2, self.refusal[1] if self.refusal else 0),
        )


class Engine:
    """An `ICudaEngine`."""

    def __init__(self, trt: Trt, logger: Logger, model: str) -> None:
        import onnxruntime

        self.trt, self.logger = trt, logger
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}
        self.settings = replace(read_settings(Path(model).parent), **trt.described)
        self.tensors = {tensor.name: tensor for tensor in (*self.settings.inputs, *self.settings.outputs)}
        self.names = list(self.tensors)
        self.num_io_tensors = len(self.names)
        self.get_tensor_name = self.names.__getitem__

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self.tensors[name].dtype]

    def get_tensor_shape(self, name: str) -> list[int]:
        return self.tensors[name].shape

    def get_tensor_profile_shape(self, name: str, index: int) -> list[list[int]]:
        shape = self.inputs[name].shape
        assert index == 0
        most = [self.settings.most.get(side, side) for side in shape]
        least = [1 if isinstance(side, str) else side for side in shape]
        return [least, least, most]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.trt.aliases.get(name, name.replace("present", "past_key_values"))

    def create_runtime_config(self) -> SimpleNamespace:
        return SimpleNamespace(dynamic_shapes_kernel_specialization_strategy=Strategy.LAZY)

    def create_execution_context(self, runtime_config: SimpleNamespace) -> Context | None:
        assert runtime_config.dynamic_shapes_kernel_specialization_strategy is not Strategy.LAZY  # numbers would change
        if self.trt.no_context:
            self.logger.log(Severity.ERROR, self.trt.no_context)
            return None
        return Context(self)


class Context:
    """An `IExecutionContext`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self.engine.get_tensor_profile_shape(name, 0)
        self.shapes[name] = shape
        return len(shape) == len(most) and all(a <= s <= b for a, s, b in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.names and address % 256 == 0

    def execute_async_v3(self, stream: int) -> bool:
        trt = self.engine.trt
        if trt.no_step:
            self.engine.logger.log(Severity.ERROR, trt.no_step)
            return False
        assert set(self.shapes) == set(self.engine.inputs)
        assert set(self.addresses) == set(self.engine.names)
        trt.cuda._later(stream, lambda shapes=dict(self.shapes): self._compute(shapes))
        return True

    def _compute(self, shapes: dict[str, tuple[int, ...]]) -> None:
        feeds = {}
        for name, shape in shapes.items():
            array = self._at(name, shape)
            feeds[name] = array.astype(np.int64) if array.dtype.kind == "i" else array
        for name, result in zip(self.engine.outputs, self.engine.session.run(None, feeds), strict=True):
            past = name.replace("present", "past_key_values")
            assert self.addresses[name] == self.addresses.get(past, self.addresses["logits"])
            self._at(name, result.shape)[...] = result

    def _at(self, name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        dtype, address = np.dtype(self.engine.get_tensor_dtype(name).value), self.addresses[name]
        size = int(np.prod(shape)) * dtype.itemsize
        assert self.engine.trt.cuda.inside(address, size), name
        return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


def install(patch: pytest.MonkeyPatch) -> Trt:
    """Put both where they are imported from."""
    trt = Trt(Cuda())
    bindings = ModuleType("cuda.bindings")
    bindings.runtime = trt.cuda  # type: ignore[attr-defined]
    for name, module in {"cuda": ModuleType("cuda"), "cuda.bindings": bindings, "tensorrt_rtx": trt}.items():
        patch.setitem(sys.modules, name, module)
    return trt
