"""From an ONNX decoder to a serialised TensorRT-RTX engine. Needs no GPU.

API: https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/_static/python-api/.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from engine_recipes import RequestError, StageFailed, events

from ..lowering.graph import DATA, MODEL

ENGINE = "model.engine"
#: Names of ONNX nodes, see operators.py: what attention is to be fed with.
_QUERY, _KEY = "transformer.layers.{}.attention.scaled", "present.{}.key"
_FORGET_SECONDS = 0.05
_DEPTH = 4


def check_targets(target: str) -> list[str]:
    """The single targets of `sm86+sm89`.

    Raises:
        RequestError: one that the installed library cannot compile for.
    """
    import tensorrt_rtx as trt

    known = [name.lower() for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    targets = target.split("+")
    unknown = [name for name in targets if name not in known]
    if unknown:
        raise RequestError(
            f"TensorRT-RTX {trt.__version__} cannot compile for {', '.join(unknown)}",
            f"known: {', '.join(known)}; choose another --target, or another engine",
        )
    return targets


def compile_model(
    folder: Path, engine: Path, targets: Sequence[str], most: Mapping[str, int]
) -> dict[str, list[dict[str, Any]]]:
    """Compile `model.onnx` in `folder` and write the engine, without holding it whole in Python.

    Args:
        folder: what `lower` wrote.
        engine: the file to write.
        targets: as `check_targets` returned them.
        most: of each dynamic dimension, by its name in the model.

    Returns:
        `inputs` and `outputs` of the network, each with name, dtype and shape (-1 where it is dynamic).

    Raises:
        StageFailed: the library refused; its own words are in the message.
        OSError: the engine cannot be written.
    """
    import tensorrt_rtx as trt

    log = _logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    with _Weights(folder) as weights:
        parser = trt.OnnxParser(network, log)
        if not weights.give(parser):
            raise _refused("read", _complaints(parser) or log.errors)
        _connect(trt, parser, network)
        config = _settings(trt, builder, network, targets, most)
        config.progress_monitor = monitor = _monitor(trt)
        writer = _writer(trt, engine, weights.size)
        try:
            done = builder.build_serialized_network_to_stream(network, config, writer)
        finally:
            writer.file.close()
        del monitor  # the library wants it alive until here
        if writer.failure:
            raise writer.failure
        if not done:
            raise _refused("compile", log.errors)
        return _inputs_and_outputs(network)


def _connect(trt: Any, parser: Any, network: Any) -> None:
    """Feed attention with the cache itself.

    The parser multiplies keys and queries by √scale, even by 1: then the engine copies all keys for every token. (What
    scales queries is a node of our own.)
    """
    number = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # how the bindings cast
            attention = layer.attention
            attention.set_input(0, parser.get_layer_output_tensor(_QUERY.format(number), 0))
            attention.set_input(1, parser.get_layer_output_tensor(_KEY.format(number), 0))
            attention.decomposable = True  # where there is no kernel for all of it
            number += 1


def _settings(trt: Any, builder: Any, network: Any, targets: Sequence[str], most: Mapping[str, int]) -> Any:
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        if -1 in shape:
            least = tuple(1 if size < 0 else size for size in shape)
            largest = tuple(
                most[tensor.get_dimension_name(axis)] if size < 0 else size for axis, size in enumerate(shape)
            )
            profile.set_shape(tensor.name, least, least, largest)  # most steps are of one token
    config.add_optimization_profile(profile)
    return config


def _inputs_and_outputs(network: Any) -> dict[str, list[dict[str, Any]]]:
    def describe(tensor: Any) -> dict[str, Any]:
        return {"name": tensor.name, "dtype": tensor.dtype.name, "shape": list(tensor.shape)}

    inputs = [describe(network.get_input(i)) for i in range(network.num_inputs)]
    return {"inputs": inputs, "outputs": [describe(network.get_output(i)) for i in range(network.num_outputs)]}


def _complaints(parser: Any) -> list[str]:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return [f"{error.node_name()} ({error.node_operator()}): {error.desc()}" for error in errors]


def _refused(what: str, lines: Sequence[str]) -> StageFailed:
    reason = " ".join(lines[0].split()) if lines else "it does not say why"
    return StageFailed(
        f"TensorRT-RTX could not {what} the model: {reason}",
        "try a smaller --set build.max_seq_len, another version of tensorrt-rtx-cu13, or another engine",
        "\n".join(lines),
    )


class _Weights:
    """The weights of an ONNX model, mapped: the library reads them where they lie.

    Pages that were read would stay in memory beside the engine's own copy, so they are given back all the time.
    """

    def __init__(self, folder: Path) -> None:
        self._model = folder / MODEL
        self._stop = threading.Event()
        with (folder / DATA).open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.size = len(self._map)
        self._thread = threading.Thread(target=self._forget, daemon=True)

    def __enter__(self) -> _Weights:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def give(self, parser: Any) -> bool:
        """Let the parser read the model; False if it cannot."""
        import numpy as np
        import onnx

        start = np.frombuffer(self._map, np.uint8).ctypes.data
        if not parser.load_model_proto(self._model.read_bytes(), str(self._model)):
            return False
        for tensor in onnx.load(self._model, load_external_data=False).graph.initializer:
            place = {entry.key: entry.value for entry in tensor.external_data}
            if place and not parser.load_initializer(tensor.name, start + int(place["offset"]), int(place["length"])):
                return False
        return bool(parser.parse_model_proto())

    def _forget(self) -> None:
        while not self._stop.wait(_FORGET_SECONDS):
            self._map.madvise(mmap.MADV_DONTNEED)


def _logger(trt: Any) -> Any:
    """Passes warnings on and remembers errors. They are no failure yet: without a driver one is logged each time."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.ERROR and "CUDA driver" not in text:
                self.errors.append(text)
            if severity <= trt.ILogger.WARNING:
                events.log(f"TensorRT-RTX: {text}")

    return Log()


def _monitor(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Reports the outer phases; inner ones come by the thousand."""

        def __init__(self) -> None:
            super().__init__()
            self.depths: dict[str, int] = {}
            self.steps: dict[str, int] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.depths[name] = 0 if parent is None else self.depths.get(parent, _DEPTH) + 1
            if self.depths[name] < _DEPTH:
                self.steps[name] = steps
                events.progress(f"compiling: {name.lower()}", 0, steps, "steps")

        def step_complete(self, name: str, step: int) -> bool:
            if name in self.steps:
                events.progress(f"compiling: {name.lower()}", step + 1, self.steps[name], "steps")
            return True

        def phase_finish(self, name: str) -> None:
            self.steps.pop(name, None)

    return Monitor()


def _writer(trt: Any, engine: Path, expected: int) -> Any:
    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.failure: OSError | None = None
            self.file = engine.open("xb", buffering=0)

        def write(self, data: Any) -> int:
            try:
                left = memoryview(data)
                while left:
                    left = left[self.file.write(left) :]
            except OSError as error:  # must not pass through the library
                error.filename = str(engine)
                self.failure = error
                return 0
            events.progress("writing the engine", self.file.tell(), max(expected, self.file.tell()), "B")
            return len(data)

    return Writer()
