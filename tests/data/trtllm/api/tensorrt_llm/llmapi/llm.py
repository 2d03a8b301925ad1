"""The engine: a class with the methods of `BaseLLM` and the checks of its TensorRT backend."""

import itertools
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import Queue
from typing import Any

from . import KvCacheConfig, SamplingParams

MODE = os.environ.get("STAND_IN", "")


class CompletionOutput:
    def __init__(self) -> None:
        self.token_ids: list[int] = []


class Tensor:
    """Of torch's methods those that move numbers out of a GPU; real only after `.float().cpu().contiguous()`."""

    def __init__(self, array: Any, done: int = 0) -> None:
        self._array, self._done = array, done
        self.shape = array.shape

    def reshape(self, *shape: int) -> "Tensor":
        return Tensor(self._array.reshape(*shape), self._done)

    def __getitem__(self, where: Any) -> "Tensor":
        return Tensor(self._array[where], self._done)

    def float(self) -> "Tensor":
        return Tensor(self._array.astype("float32"), self._done | 1)

    def cpu(self) -> "Tensor":
        return Tensor(self._array, self._done | 2)

    def contiguous(self) -> "Tensor":
        return Tensor(self._array.copy(), self._done | 4)

    def numpy(self) -> Any:
        assert self._done == 7, "TypeError: can't convert cuda:0 device type tensor to numpy"
        return self._array


class RequestOutput:
    """One request; steps come through a queue, as they do outside an event loop."""

    def __init__(self, executor: "_TrtLLM", ids: list, sampling: SamplingParams) -> None:
        self.prompt_token_ids, self.sampling_params = ids, sampling
        self.outputs = [CompletionOutput()]
        self.context_logits: Tensor | None = None
        self._executor, self._done, self._cancelled = executor, False, False
        self.queue: Queue = Queue()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        ids, sampling = list(self.prompt_token_ids), self.sampling_params
        chance = random.Random(sampling.seed)
        if sampling.return_context_logits:
            self.queue.put(("logits", self._executor._context_logits(ids)))
        for number in range(sampling.max_tokens):
            if self._cancelled:
                print(f"cancelled after {number}", file=sys.stderr, flush=True)
                break
            if MODE == "fails" and number == 2:
                self.queue.put(("error", "[TensorRT-LLM][ERROR] CUDA runtime error in cudaMemcpyAsync: out of memory"))
                return
            if MODE == "slow" or (MODE == "stuck" and number == 2):
                time.sleep(0.02 if MODE == "slow" else 3600)
            token = self._executor._next(ids)
            if sampling.temperature is not None and sampling.top_p is not None and sampling.top_k is None:
                token = chance.randrange(self._executor._vocab)
            ids.append(token)
            last = token == sampling.end_id or token in (sampling.stop_token_ids or ())
            last = last or number == sampling.max_tokens - 1
            print(f"step {number}")
            self.queue.put(("last" if last else "step", [token]))
            if last:
                return
        self.queue.put(("last", []))

    def _result_step(self) -> None:
        kind, value = self.queue.get()
        if kind == "error":
            raise RuntimeError(value)
        if kind == "logits":
            self.context_logits = value
            return
        output = self.outputs[0]
        output.token_ids.extend(value)
        self._done = kind == "last"
        if self._done and value and value[0] in (self.sampling_params.stop_token_ids or ()):
            output.token_ids = output.token_ids[:-1]

    @property
    def finished(self) -> bool:
        return self._done

    def abort(self) -> None:
        self._cancelled = True

    def result(self, timeout: float | None = None) -> "RequestOutput":
        while not self._done:
            self._result_step()
        return self

    def __iter__(self) -> "RequestOutput":
        return self

    def __next__(self) -> "RequestOutput":
        if self._done:
            raise StopIteration
        self._result_step()
        return self


class _TrtLLM:
    def __init__(
        self,
        model: str | Path,
        tokenizer: Any = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        for key in kwargs:
            if key not in ("kv_cache_config", "enable_chunked_prefill", "max_batch_size", "max_num_tokens"):
                raise ValueError(f"{type(self).__name__} got invalid argument: {key}")
        cache = kwargs.get("kv_cache_config") or KvCacheConfig()
        single = os.environ.get("TLLM_WORKER_USE_SINGLE_PROCESS", "0")
        print(f"LLM: {vars(cache)}, single process {single}", file=sys.stderr, flush=True)
        config = json.loads((Path(model) / "config.json").read_text())
        self.tokenizer = None if skip_tokenizer_init else object()
        self._build = config["build_config"]
        self._vocab = config["pretrained_config"]["vocab_size"]
        self._chunked = kwargs.get("enable_chunked_prefill", False)
        self._executor: object | None = object()
        self._numbers = itertools.count()
        _fail_to_load()

    def generate_async(
        self,
        inputs: Any,
        sampling_params: SamplingParams | None = None,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        streaming: bool = False,
    ) -> RequestOutput:
        if self._executor is None:
            raise RuntimeError("LLM is shutting down")
        sampling = sampling_params or SamplingParams()
        if sampling.end_id is None and self.tokenizer is None:
            raise ValueError(
                "tokenizer is required to reset end_id if it is None, or you can explicitly specify the end_id for "
                "sampling_params"
            )
        longest = self._build["max_seq_len"]
        if not self._chunked and len(inputs) + (sampling.max_tokens or 0) > longest:
            raise ValueError(
                f"The sum of prompt length ({len(inputs)}) and query length (0) max_tokens ({sampling.max_tokens}) "
                f"should not exceed max_seq_len ({longest})"
            )
        most = longest - 1 if self._chunked else min(longest - 1, self._build["max_num_tokens"])
        if len(inputs) > most:
            raise RuntimeError(f"Prompt length ({len(inputs)}) exceeds maximum input length ({most}).")
        return RequestOutput(self, inputs, sampling)

    def shutdown(self) -> None:
        if MODE == "stuck":
            time.sleep(3600)
        print("shut down", file=sys.stderr, flush=True)
        self._executor = None

    def _next(self, ids: list) -> int:
        return (sum(ids) * 31 + 7) % self._vocab

    def _context_logits(self, ids: list) -> Tensor | None:
        import numpy

        if not self._build["gather_context_logits"]:
            return None
        logits = numpy.zeros((len(ids), self._vocab + 3), "float16")  # rounded up, as for many ranks
        for row in range(len(ids)):
            logits[row, self._next(ids[: row + 1])] = 2.5
        return Tensor(logits)


def _fail_to_load() -> None:
    """As recorded from users."""
    if MODE == "hang":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
        print("child", file=sys.stderr, flush=True)
        time.sleep(3600)
    if MODE == "other gpu":
        print(
            "[TensorRT-LLM][ERROR] IRuntime::deserializeCudaEngine: Error Code 6: API Usage Error (The engine plan "
            "file is generated on an incompatible device, expecting compute 8.9 got compute 9.0, please rebuild.)",
            file=sys.stderr,
        )
        raise RuntimeError("[TensorRT-LLM][ERROR] Assertion failed: Failed to deserialize cuda engine.")
    if MODE == "dies":
        print("[TensorRT-LLM][ERROR] *** Process received signal ***", file=sys.stderr, flush=True)
        os.abort()
