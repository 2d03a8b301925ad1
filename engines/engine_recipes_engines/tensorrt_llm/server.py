"""Runs an engine for `runtime.py`: a program for the Python that has TensorRT-LLM, which is never ours.

`python server.py ENGINE_DIR SETTINGS` imports nothing but the standard library and `tensorrt_llm` (1.0 to 1.2.1, and
the TensorRT backend of older ones). One JSON object a line comes in and goes out; `id` is the asker's number.

    in    {"id": 1, "do": "generate", "prompts": [[5, 7], …], "max_tokens": 9, "temperature": 0, "seed": 0, "stop": [2]}
          {"id": 2, "do": "logits", "ids": [5, 7], "vocab_size": 32000}
          {"id": 1, "do": "cancel"}
          {"do": "close"}
    out   {"id": 0, "event": "ready", "version": "1.2.1"}
          {"id": 1, "event": "tokens", "tokens": [11, …]}                  one for each prompt, step by step
          {"id": 2, "event": "logits", "shape": [2, 32000], "bytes": 256000}   that many bytes of float32 follow
          {"id": 1, "event": "end"}
          {"id": 1, "event": "error", "kind": "ValueError", "message": "…"}    id 0: the engine was not loaded

Whatever libraries print goes to stderr. When stdin closes, the program ends, whatever it is doing.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from queue import Queue
from typing import Any

_GRACE = 8.0  # seconds that TensorRT-LLM gets to shut down
Message = dict[str, Any]


class Wire:
    """Both directions of the talk; safe to write to from any thread."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "wb")
        self._in = os.fdopen(os.dup(0), "rb")
        os.dup2(2, 1)  # neither prints of a library nor its children may come between the lines
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        self._lock = threading.Lock()
        self.cancelled: set[int] = set()
        self.requests: Queue[Message] = Queue()

    def send(self, message: Mapping[str, Any], data: bytes | memoryview = b"") -> None:
        """Write one line, and the bytes that it announces."""
        with self._lock:
            self._out.write(json.dumps(message).encode() + b"\n")
            self._out.write(data)
            self._out.flush()

    def listen(self) -> None:
        """Read until the asker closes or dies; this process dies with it."""
        for line in self._in:
            request = json.loads(line)
            if request["do"] == "cancel":
                self.cancelled.add(request["id"])
                continue
            self.requests.put(request)
            if request["do"] == "close":
                time.sleep(_GRACE)
                break
        die()


def die() -> None:
    """End at once, with all that was started."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)  # the first process of a container survives its own SIGKILL


def load(folder: str, settings: Mapping[str, Any]) -> tuple[Any, Any, str]:
    """The loaded engine, the class of sampling parameters, and the version of TensorRT-LLM."""
    # one process a GPU: a worker of MPI's would outlive a kill, and logits would travel through it
    os.environ.setdefault("TLLM_WORKER_USE_SINGLE_PROCESS", "1")
    os.environ.setdefault("TRTLLM_NO_USAGE_STATS", "1")
    package = import_module("tensorrt_llm")
    version = str(package.__version__)
    if find_spec("tensorrt_llm._tensorrt_engine"):
        engine_class = import_module("tensorrt_llm._tensorrt_engine").LLM
    elif int(version.split(".")[0]) < 1:
        engine_class = package.LLM
    else:  # its LLM would take the folder for a Hugging Face checkpoint
        raise RuntimeError(f"TensorRT-LLM {version} runs no TensorRT engines; 1.2.1 is the last that does")
    api = import_module("tensorrt_llm.llmapi")
    cache = api.KvCacheConfig(
        free_gpu_memory_fraction=settings["free_gpu_memory_fraction"],
        enable_block_reuse=False,  # a reused prefix has no logits, and may change the answer
    )
    more = {"enable_chunked_prefill": True} if settings["chunked_prefill"] else {}
    return (
        engine_class(model=folder, skip_tokenizer_init=True, kv_cache_config=cache, **more),
        api.SamplingParams,
        version,
    )


class Engine:
    """Does what is asked, each request in a thread of its own; the engine runs them together."""

    def __init__(self, wire: Wire, llm: Any, sampling_class: Callable[..., Any]) -> None:
        self._wire = wire
        self._llm = llm
        self._sampling = sampling_class
        self._lock = threading.Lock()

    def serve(self) -> None:
        """Until the asker closes."""
        while (request := self._wire.requests.get())["do"] != "close":
            threading.Thread(target=self._answer, args=(request,), daemon=True).start()
        self._llm.shutdown()

    def _answer(self, request: Message) -> None:
        number = request["id"]
        try:
            if request["do"] == "logits":
                self._logits(request)
            else:
                self._generate(request)
            self._wire.send({"id": number, "event": "end"})
        except Exception as error:  # TensorRT-LLM's, or of libraries under it: it is the asker's to judge
            traceback.print_exc()
            self._wire.send(failure(number, error))
        self._wire.cancelled.discard(number)

    def _submit(self, prompts: Sequence[list[int]], streaming: bool, **sampling: Any) -> list[Any]:
        with self._lock:  # request numbers are counted without one
            return [
                self._llm.generate_async(ids, sampling_params=self._sampling(**sampling), streaming=streaming)
                for ids in prompts
            ]

    def _generate(self, request: Message) -> None:
        stop = request["stop"]
        # without a tokenizer end_id is obligatory; -1 ends nothing
        ending = {"end_id": stop[0] if stop else -1, "stop_token_ids": stop[1:] or None}
        if request["temperature"] > 0:
            # top_p says that it is sampling: without it and top_k the likeliest token is taken
            choice = {"temperature": request["temperature"], "top_p": 1.0, "seed": request["seed"]}
        else:
            choice = {"top_k": 1}
        results = self._submit(request["prompts"], True, max_tokens=request["max_tokens"], **ending, **choice)
        try:
            for row in zip(*map(new_tokens, results), strict=False):
                if request["id"] in self._wire.cancelled or (len(row) == 1 and row[0] in stop):
                    break
                self._wire.send({"id": request["id"], "event": "tokens", "tokens": row})
        finally:
            for result in results:
                if not result.finished:
                    result.abort()

    def _logits(self, request: Message) -> None:
        (result,) = self._submit([request["ids"]], False, max_tokens=1, end_id=-1, top_k=1, return_context_logits=True)
        logits = result.result().context_logits
        if logits is None:
            raise RuntimeError("the engine gave no context logits")
        rows = as_float32(logits, request["vocab_size"])
        shape = [len(request["ids"]), request["vocab_size"]]
        if rows.nbytes != 4 * shape[0] * shape[1]:
            raise RuntimeError(f"the engine gave {rows.nbytes} bytes of context logits instead of {shape} in float32")
        self._wire.send({"id": request["id"], "event": "logits", "shape": shape, "bytes": rows.nbytes}, rows)


def new_tokens(result: Any) -> Iterator[int]:
    """Token ids of one request, as they come. A step may bring none, or several."""
    seen = 0
    for step in result:
        ids = step.outputs[0].token_ids
        yield from ids[seen:]
        seen = max(seen, len(ids))  # a stop id is taken away again at the end


def as_float32(logits: Any, vocab_size: int) -> memoryview:
    """The bytes of a tensor [tokens, vocab_size, or rounded up for the ranks] on any device, of any float type."""
    rows = logits.reshape(-1, logits.shape[-1])[:, :vocab_size]
    return memoryview(rows.float().cpu().contiguous().numpy()).cast("B")


def failure(number: int, error: BaseException) -> Message:
    """An error as it travels."""
    return {"id": number, "event": "error", "kind": type(error).__name__, "message": str(error)}


def main(arguments: Sequence[str]) -> None:
    """Load the engine, say so, serve it."""
    folder, settings = arguments
    wire = Wire()
    threading.Thread(target=wire.listen, daemon=True).start()
    try:
        llm, sampling_class, version = load(folder, json.loads(settings))
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        wire.send(failure(0, error))
        os._exit(1)  # threads of a half-loaded engine must not keep it
    wire.send({"id": 0, "event": "ready", "version": version})
    Engine(wire, llm, sampling_class).serve()
    os._exit(0)


if __name__ == "__main__":  # TensorRT-LLM's processes of many GPUs read this file again
    # without this folder: our modules must not be found where others look for theirs
    sys.path[:] = [
        place for place in sys.path if os.path.realpath(place) != os.path.dirname(os.path.realpath(__file__))
    ]
    main(sys.argv[1:])
