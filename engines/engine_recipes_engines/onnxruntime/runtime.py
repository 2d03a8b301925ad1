"""Runs a lowered decoder: session, KV cache, choosing the next token. Knows token ids, no text."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine_recipes import MachineError, RequestError, StageFailed
from engine_recipes.stepping import CHUNK, Run, Stepper, choose as choose

from ..lowering.graph import MODEL, ROUNDING

if TYPE_CHECKING:
    from engine_recipes.stepping import Floats, Integers

_CODES = {"float32": 1, "float16": 10, "bfloat16": 16}  # of onnx.TensorProto
_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(bfloat16)": "bfloat16"}


class OnnxRuntime(Stepper):
    """A loaded engine (see `engine_recipes.Runtime`). Each generation has a cache of its own.

    Args:
        folder: an engine that this package built.
        options: `threads`: 0 (default) is one for each physical core this process may use.

    Raises:
        RequestError: this is no such engine, or an option is wrong.
        StageFailed: the model is damaged.
        MachineError: onnxruntime cannot load it on this GPU.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        path = folder / "genai_config.json"
        if not path.is_file():
            raise RequestError(
                f"{folder} holds no onnxruntime engine", "build it with `recipes build MODEL@onnxruntime`"
            )
        settings = json.loads(path.read_text(encoding="utf-8"))["model"]
        decoder = settings["decoder"]
        self._layers: int = decoder["num_hidden_layers"]
        wants_cuda = any("cuda" in provider for provider in decoder["session_options"]["provider_options"])
        session: Any = open_session(folder / MODEL, options, wants_cuda)
        super().__init__(session, settings["context_length"], settings["vocab_size"])
        self._device = "cuda" if "CUDAExecutionProvider" in session.get_providers() else "cpu"
        past = {value.name: value for value in session.get_inputs()}["past_key_values.0.key"]
        self.compute: str = _DTYPES[past.type]
        self._heads, self._head_size = past.shape[1], past.shape[3]
        #: types that activations or the cache are rounded to, if the model is quantised so
        self.rounding: list[str] = session.get_modelmeta().custom_metadata_map.get(ROUNDING, "").split()

    def start(self, length: int, batch: int) -> _Run:
        return _Run(self, length, batch)


class _Run(Run):
    """Sequences of one length: their cache, and bindings that are made once.

    Shapes: B sequences, S tokens each, or of some of both. GroupQueryAttention writes new keys and values into the
    buffer it reads the old ones from, because past and present are bound to the same memory; nothing is copied from
    step to step.
    """

    def __init__(self, runtime: OnnxRuntime, length: int, batch: int) -> None:
        import numpy as np

        super().__init__(batch, runtime.vocab_size, CHUNK)
        self._session = runtime.session
        self._binding = self._session.io_binding()
        self._device, self._code = runtime._device, _CODES[runtime.compute]
        self._ones = np.ones(batch * length, np.int64)
        self._row = (runtime._heads, length, runtime._head_size)  # of a cache: one sequence
        self._row_bytes = runtime._heads * length * runtime._head_size * (4 if runtime.compute == "float32" else 2)
        self._cache = {
            f"{layer}.{what}": _buffer((batch, *self._row), runtime.compute, self._device)
            for layer in range(runtime._layers)
            for what in ("key", "value")
        }
        self._take(slice(0, batch), 0)

    def prefill(self, ids: Integers) -> Floats:
        """Feed prompts, int64 [B, S]; logits after the last tokens, float32 [B, vocabulary]. Overwritten by `step`."""
        batch, length = ids.shape
        # a prompt in pieces goes alone: GroupQueryAttention takes several new tokens after old ones for one sequence
        group = max(1, CHUNK // length)
        for row in range(0, batch, group):
            rows = slice(row, min(row + group, batch))
            self._take(rows, 0)
            for start in range(0, length, CHUNK):
                self.feed(ids[rows, start : start + CHUNK], self._last[rows])
        self._take(slice(0, batch), length)
        last: Floats = self._last[:, 0]
        return last

    def feed(self, ids: Integers, out: Floats) -> None:
        """Run int64 [B, S] at once; `out`, float32 [B, L, vocabulary], gets the logits of the last L tokens."""
        if ids.shape != self._ids.shape or out is not self._out:
            self._bind(ids.shape, out)
        self._ids[:] = ids
        self._used += ids.shape[1]
        # all tokens count, so a piece of one array of ones is the mask, whatever its shape
        self._input("attention_mask", self._ones[: len(ids) * self._used].reshape(len(ids), -1))
        self._session.run_with_iobinding(self._binding)

    def _take(self, rows: slice, used: int) -> None:
        """From now on work on these sequences, whose caches hold `used` tokens."""
        import numpy as np

        self._used = used
        self._ids, self._out = np.empty((0, 0), np.int64), self._last
        shape = (rows.stop - rows.start, *self._row)
        for name, buffer in self._cache.items():
            place = (self._device, 0, self._code, shape, buffer.data_ptr() + rows.start * self._row_bytes)
            self._binding.bind_input(f"past_key_values.{name}", *place)
            self._binding.bind_output(f"present.{name}", *place)

    def _bind(self, shape: tuple[int, ...], out: Floats) -> None:
        """Bind what stays the same while steps of one size follow each other."""
        import numpy as np

        self._ids, self._out = np.empty(shape, np.int64), out
        self._first = np.array([-out.shape[1]], np.int64)
        self._input("input_ids", self._ids)
        self._input("first_logit", self._first)
        self._binding.bind_output("logits", "cpu", 0, np.float32, out.shape, out.ctypes.data)

    def _input(self, name: str, array: Integers) -> None:
        # by address: bind_cpu_input copies in some versions, and knows no optional inputs
        self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


def open_session(
    model: Path, options: Mapping[str, Any], wants_cuda: bool = False, entries: Mapping[str, str] | None = None
) -> Any:
    """An `onnxruntime.InferenceSession`, configured with `entries`. Options and errors as OnnxRuntime's."""
    import onnxruntime

    threads = int(options.get("threads", 0))
    if threads < 0:
        raise RequestError(f"threads = {threads}", "give a number of threads, or 0 for one on each core")
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads or cores()
    # Versions of onnxruntime that do not know a key ignore it.
    spin = {"session.intra_op.spin_duration_us": str(spin_microseconds())}
    for key, value in {**spin, **(entries or {})}.items():
        settings.add_session_config_entry(key, value)
    settings.log_severity_level = 4  # errors are raised; printed once more they would only confuse
    cuda = wants_cuda and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"] if cuda else ["CPUExecutionProvider"]
    try:
        return onnxruntime.InferenceSession(str(model), settings, providers=providers)
    except Exception as error:  # onnxruntime's own classes are not public
        hint = "install onnxruntime-gpu, or build with --target cpu" if wants_cuda else "build the engine again"
        first = str(error).strip().splitlines()[0]
        kind = MachineError if wants_cuda else StageFailed  # on a CPU it can only be the file
        raise kind(f"onnxruntime {onnxruntime.__version__} cannot load {model.name}: {first}", hint) from error


def _buffer(shape: tuple[int, ...], dtype: str, device: str) -> Any:
    import numpy as np
    from onnxruntime import OrtValue

    if device == "cpu" and dtype != "bfloat16":  # which numpy does not know
        # np.zeros is lazy: memory is used as far as the cache is filled
        return OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype))
    return OrtValue.ortvalue_from_shape_and_type(shape, _CODES[dtype], device, 0)


def spin_microseconds() -> int:
    """How long a thread without work waits by spinning before it sleeps.

    Where cores are free, long enough for everything between two operators. On a busy machine spinning takes time
    away from the thread that is waited for: measured there, 50 µs decode twice as fast as onnxruntime's default,
    which spins for a second, but 6 % slower on a quiet one.
    """
    busy = hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1)
    return 50 if busy else 1000


def cores() -> int:
    """Physical cores that this process may use; two threads of one core would only wait for each other."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    found = set()
    for cpu in os.sched_getaffinity(0):
        try:
            siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
        except OSError:
            siblings = str(cpu)
        found.add(siblings)
    return len(found)
