"""One step of a decoder: token ids in, logits out, the KV cache updated where it lies.

Shapes: B sequences, S new tokens each, L of these S positions with logits. What is fed, all integers:
`input_ids` and `position_ids` [B, S]; `write_indices` [B], tokens in the cache before; `kv_lengths` [B], tokens after;
`logit_indices` [L], which of the S positions get logits.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from engine_recipes import MachineError, RecipesError, StageFailed

from .cuda import Device
from .logging import logger, words
from .matching import PAST, PRESENT, check_engine
from .settings import Settings

if TYPE_CHECKING:
    from engine_recipes.stepping import Floats, Integers

SMALLER = "free GPU memory, or build with a smaller --set build.max_seq_len or build.max_batch_size"
#: What a cache may hold in ONNX: type -> code of onnx.TensorProto, bytes.
_TYPES = {"tensor(float)": (1, 4), "tensor(float16)": (10, 2), "tensor(bfloat16)": (16, 2)}


@dataclass(frozen=True)
class Cache:
    """Keys and values of `batch` sequences: name without prefix (`0.key`) -> address. `close` gives them back."""

    batch: int
    addresses: Mapping[str, int]
    close: Callable[[], None]


class Session(Protocol):
    """A decoder that can take steps."""

    def cache(self, batch: int) -> Cache:
        """An empty cache. It is all zeros: what no token has filled is masked, and must be no NaN."""
        ...

    def run(self, feeds: Mapping[str, Integers], cache: Cache, out: Floats) -> None:
        """Feed these, update the cache, and write the logits into `out`, float32 [B, L, vocabulary], contiguous."""
        ...

    def close(self) -> None:
        """Give back memory and devices. Safe to call twice."""
        ...


class GraphSession:
    """The graph that an engine was compiled from, in onnxruntime on a CPU.

    Args:
        model: an ONNX file.
        options: `threads`: 0 (default) is one for each physical core this process may use.

    Raises:
        RequestError: the option is wrong.
        StageFailed: the file is damaged.
    """

    def __init__(self, model: Path, options: Mapping[str, Any]) -> None:
        from ..onnxruntime.runtime import open_session

        # else a multiplication beside an FP8 pair becomes an operator that knows no FP8
        self._session: Any = open_session(model, options, entries={"session.disable_quant_qdq": "1"})
        self._binding = self._session.io_binding()
        self._past = {v.name.removeprefix(PAST): v for v in self._session.get_inputs() if v.name.startswith(PAST)}
        self._bound: Cache | None = None

    def cache(self, batch: int) -> Cache:
        """An empty cache. Memory is used as far as it is filled."""
        import numpy as np

        shapes = {name: (batch, *value.shape[1:], _TYPES[value.type][1]) for name, value in self._past.items()}
        arrays = {name: np.zeros(shape, np.uint8) for name, shape in shapes.items()}
        # the addresses hold as long as the arrays, and those as long as the function that forgets them
        return Cache(batch, {name: array.ctypes.data for name, array in arrays.items()}, arrays.clear)

    def run(self, feeds: Mapping[str, Integers], cache: Cache, out: Floats) -> None:
        """One step, see `Session`."""
        import numpy as np

        if self._session is None:
            raise ValueError("this engine was closed")
        if cache is not self._bound:
            self._bind(cache)
        for name, array in feeds.items():
            self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self._binding.bind_output("logits", "cpu", 0, np.float32, out.shape, out.ctypes.data)
        self._session.run_with_iobinding(self._binding)

    def _bind(self, cache: Cache) -> None:
        # TensorScatter, the only reader of the old cache, then writes the new rows alone and copies nothing
        for name, value in self._past.items():
            place = (_TYPES[value.type][0], (cache.batch, *value.shape[1:]), cache.addresses[name])
            self._binding.bind_input(PAST + name, "cpu", 0, *place)
            self._binding.bind_output(PRESENT + name, "cpu", 0, *place)
        self._bound = cache

    def close(self) -> None:
        """Let go of the graph."""
        self._session = self._binding = self._bound = None


class RtxSession:
    """A serialised engine in TensorRT-RTX, on the first GPU.

    Not run yet on a GPU that the library supports: it was written after the documentation, and tested on a machine
    without a driver and against stand-ins for CUDA and the library that compute with the graph.

    Args:
        engine: a file that `stage2` wrote.
        settings: what it noted of it.

    Raises:
        MachineError: no GPU or driver, another GPU or version than the engine is for, too little GPU memory.
        StageFailed: the file is damaged, or another engine than the notes describe.
    """

    def __init__(self, engine: Path, settings: Settings) -> None:
        self._device: Device | None = Device()
        self._buffers: dict[str, tuple[int, int]] = {}  # address and bytes of what is no cache
        self._bound: Cache | None = None
        try:
            self._load(engine, settings, self._device)
        except BaseException:
            self.close()
            raise

    def _load(self, engine: Path, settings: Settings, device: Device) -> None:
        import tensorrt_rtx as trt

        self._log = logger(trt)
        self._runtime: Any = trt.Runtime(self._log)
        self._engine: Any = deserialise(self._runtime, engine, self._log.errors, device)
        check_engine(self._engine, settings)
        # else a kernel for a shape replaces the general one when it is ready, and the numbers change by a bit
        self._config: Any = self._engine.create_runtime_config()
        self._config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.NONE
        self._context: Any = self._engine.create_execution_context(runtime_config=self._config)
        if self._context is None:
            why = words(self._log.errors)
            raise MachineError(f"{device.name} has no room for the engine's activations: {why}", SMALLER)
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        types = {name: self._engine.get_tensor_dtype(name) for name in names}
        self._dtypes = {name: trt.nptype(types[name]) for name in names if not name.startswith((PAST, PRESENT))}
        self._past = {
            name.removeprefix(PAST): (tuple(self._engine.get_tensor_shape(name))[1:], types[name].itemsize)
            for name in names
            if name.startswith(PAST)
        }

    def cache(self, batch: int) -> Cache:
        """An empty cache, in one piece of GPU memory."""
        device, addresses, end = self._open(), {}, 0
        for name, (shape, itemsize) in self._past.items():
            addresses[name] = end
            end += -(-batch * math.prod(shape) * itemsize // 256) * 256  # TensorRT wants multiples of 256
        start = device.allocate(end, f"the KV cache of {batch} sequence{'s' * (batch > 1)}", SMALLER)
        places = {name: start + offset for name, offset in addresses.items()}
        return Cache(batch, places, lambda: device.free(start))

    def run(self, feeds: Mapping[str, Integers], cache: Cache, out: Floats) -> None:
        """One step, see `Session`."""
        device = self._open()
        self._log.errors.clear()
        if cache is not self._bound:
            self._bind(cache)
        for name, array in feeds.items():
            array = array.astype(self._dtypes[name], order="C", copy=False)
            self._say(name, self._room(name, array.nbytes), array.shape)
            device.upload(self._buffers[name][0], array)
        logits = self._room("logits", out.nbytes)
        self._say("logits", logits)
        if not self._context.execute_async_v3(device.stream):
            self._fail("run a step")
        device.download(out, logits)

    def _bind(self, cache: Cache) -> None:
        self._bound = None  # until all of it is said
        for name, (shape, _) in self._past.items():
            # TensorRT updates a cache in place: both names mean the same memory
            self._say(PAST + name, cache.addresses[name], (cache.batch, *shape))
            self._say(PRESENT + name, cache.addresses[name])
        self._bound = cache

    def _say(self, name: str, address: int, shape: tuple[int, ...] | None = None) -> None:
        """Tell the context where a tensor lies, and for an input its shape."""
        if shape is not None and not self._context.set_input_shape(name, shape):
            self._fail(f"take {name} of shape {list(shape)}")
        if not self._context.set_tensor_address(name, address):
            self._fail(f"use the memory for {name}")

    def _fail(self, what: str) -> None:
        why = words(self._log.errors)
        raise MachineError(f"TensorRT-RTX could not {what}: {why}", "see what nvidia-smi says, or build it again")

    def _room(self, name: str, size: int) -> int:
        """The address of a buffer of at least `size` bytes; nothing is under way in it, as each step is waited for."""
        device = self._open()
        address, held = self._buffers.pop(name, (0, 0))  # forgotten if there is no room for a larger one
        if held < size:
            device.free(address)
            address, held = device.allocate(size, name, SMALLER), size
        self._buffers[name] = address, held
        return address

    def _open(self) -> Device:
        if self._device is None:
            raise ValueError("this engine was closed")
        return self._device

    def close(self) -> None:
        """Give everything back, caches too."""
        device, self._device = self._device, None
        self._context = self._config = self._engine = self._runtime = None  # in this order: each needs those after it
        self._bound = None
        if device is not None:
            device.close()


def deserialise(runtime: Any, path: Path, errors: list[str], device: Device) -> Any:
    """A `tensorrt_rtx.ICudaEngine` from a file.

    Args:
        runtime: a `tensorrt_rtx.Runtime`.
        path: the serialised engine.
        errors: where the runtime's logger leaves what the library says.
        device: that the engine is to run on.

    Raises:
        MachineError: it is for another GPU, driver or version, or too large.
        StageFailed: it is damaged.
    """
    if not path.is_file() or not path.stat().st_size:
        raise StageFailed(f"{path.name} is missing or empty", "build the engine again")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise _refusal(words(errors), int(runtime.get_engine_validity(data)[1]), device, path.name)
    return engine


def _refusal(why: str, reasons: int, device: Device, name: str) -> RecipesError:
    """Why an engine was refused: `reasons` are bits of `tensorrt_rtx.EngineInvalidityDiagnostics`."""
    message = f"TensorRT-RTX refuses {name} on {device.name} ({device.target}): {why}"
    # a file that is cut short may have a good header: then only the words tell
    if reasons & 32 or ("Serialization" in why and "compute capability" not in why and not reasons & 1):
        return StageFailed(f"{name} is damaged: {why}", "build the engine again")
    if reasons & 2 or "compute capability" in why:
        return MachineError(message, f"build it for this GPU with --target {device.target}, if `recipes list` has it")
    if reasons & (4 | 8 | 64):
        return MachineError(message, "update the NVIDIA driver, or see what nvidia-smi says")
    if reasons & 16 or "out of memory" in why.lower():
        return MachineError(message, SMALLER)
    if reasons & 1:
        return MachineError(message, "build it again, or install the version of tensorrt-rtx-cu13 that built it")
    return MachineError(message, "see what nvidia-smi says, or build it again")
