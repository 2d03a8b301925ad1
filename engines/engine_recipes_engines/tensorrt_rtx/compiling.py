"""From an ONNX decoder to a serialised TensorRT-RTX engine. Needs no GPU.

API: https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/_static/python-api/.
"""

from __future__ import annotations

import hashlib
import mmap
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from engine_recipes import RequestError, StageFailed, events

from ..lowering.graph import DATA, MODEL
from .logging import NOISE, logger, words
from .network import feed_from_cache, inputs_and_outputs, profile

ENGINE = "model.engine"
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
    folder: Path, engine: Path, targets: Sequence[str], most: Mapping[str, int], layers: int
) -> dict[str, Any]:
    """Compile `model.onnx` in `folder` and write the engine, without holding it whole in Python.

    Args:
        folder: what `lower` wrote.
        engine: the file to write.
        targets: as `check_targets` returned them.
        most: of each dynamic dimension, by its name in the model.
        layers: of the model.

    Returns:
        Fields of `Settings`: `inputs` and `outputs` of the network, `bytes` and `sha256` of the engine.

    Raises:
        StageFailed: the library refused; its own words are in the message.
        OSError: the engine cannot be written.
    """
    import tensorrt_rtx as trt

    log = logger(trt, NOISE)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    with _Weights(folder) as weights:
        parser = trt.OnnxParser(network, log)
        if not weights.give(parser):
            raise _refused("read", _complaints(parser) or log.errors)
        feed_from_cache(trt, network, layers)
        config = _config(trt, builder, network, targets, most)
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
        digest = {"bytes": writer.size, "sha256": writer.sha256.hexdigest()}
        return {**inputs_and_outputs(network), **digest}


def _config(trt: Any, builder: Any, network: Any, targets: Sequence[str], most: Mapping[str, int]) -> Any:
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)
    # One for all steps: the library writes the weights once for each profile.
    config.add_optimization_profile(profile(builder, network, most))
    return config


def _complaints(parser: Any) -> list[str]:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return [f"{error.node_name()} ({error.node_operator()}): {error.desc()}" for error in errors]


def _refused(what: str, lines: Sequence[str]) -> StageFailed:
    reason = words(lines)
    if what == "read":
        hint = "the checkpoint may be damaged: build or copy it again"
    elif "HW-specific datatypes" in reason:
        hint = "a target does not know a type of this precision: choose another precision, or another --target"
    else:
        hint = "try a smaller --set build.max_seq_len, another version of tensorrt-rtx-cu13, or another engine"
    return StageFailed(f"TensorRT-RTX could not {what} the model: {reason}", hint, "\n".join(lines))


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
            self.size, self.sha256 = 0, hashlib.sha256()
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
            self.sha256.update(data)
            self.size += len(data)
            events.progress("writing the engine", self.size, max(expected, self.size), "B")
            return len(data)

    return Writer()
