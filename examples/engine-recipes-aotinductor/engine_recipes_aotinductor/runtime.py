"""Runs what stage 2 compiled: weights, KV cache, steps. Knows token ids, no text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine_recipes import RequestError, StageFailed
from engine_recipes.stepping import CHUNK, Run, Stepper

from .compiling import MODEL, SETTINGS, WEIGHTS
from .machine import check_cpu

if TYPE_CHECKING:
    from torch import Tensor

    from engine_recipes.stepping import Floats, Integers


class AotRuntime(Stepper):
    """A loaded engine (see `engine_recipes.Runtime`). Each generation has a cache of its own.

    Args:
        folder: an engine that this package built.
        options: `threads`: 0 (default) leaves torch's choice, one for each core. It is the whole process's number.

    Raises:
        RequestError: this is no such engine, or an option is wrong.
        MachineError: this machine's CPU cannot run it.
        StageFailed: a file is damaged.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        path = folder / SETTINGS
        if not path.is_file():
            raise RequestError(
                f"{folder} holds no aotinductor engine", "build it with `recipes build MODEL@aotinductor`"
            )
        from safetensors import SafetensorError

        check_cpu()
        threads = int(options.get("threads", 0))
        if threads < 0:
            raise RequestError(f"threads = {threads}", "give a number of threads, or 0 for one on each core")
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            super().__init__(_Loaded(folder), settings["max_seq_len"], settings["vocab_size"])
            self.layers: int = settings["layers"]
            self.row: tuple[int, int] = (settings["kv_heads"], settings["head_size"])
        except (RuntimeError, OSError, ValueError, KeyError, SafetensorError) as error:
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise StageFailed(f"torch cannot load this engine: {first}", "build the engine again") from error
        if threads:
            import torch

            torch.set_num_threads(threads)

    def start(self, length: int, batch: int) -> _Run:
        return _Run(self, length, batch)


class _Run(Run):
    """Sequences of one length and their cache, whose filled part is handed to the model, which writes into it."""

    def __init__(self, runtime: AotRuntime, length: int, batch: int) -> None:
        import torch

        super().__init__(batch, runtime.vocab_size, max(1, CHUNK // batch))
        self._model = runtime.session
        self._used = 0
        # memory that is not touched yet costs nothing
        self._cache = [torch.empty(length, batch, *runtime.row) for _ in range(2 * runtime.layers)]

    def feed(self, ids: Integers, out: Floats) -> None:
        """Run int64 [B, S] at once; `out`, float32 [B, L, vocabulary], gets the logits of the last L tokens."""
        import torch

        new, before = ids.shape[1], self._used
        self._used += new
        positions, last = torch.arange(before, self._used), torch.arange(new - out.shape[1], new)
        cache = [buffer[: self._used] for buffer in self._cache]
        out[:] = self._model(torch.from_numpy(ids.copy()), positions, last, *cache).numpy()


class _Loaded:
    """The compiled model with its weights, converted to float32 where they are stored otherwise."""

    def __init__(self, folder: Path) -> None:
        import torch
        from safetensors import safe_open

        # `torch._inductor.aoti_load_package` is this and a look at what it would compile for here, which imports all
        # of Inductor and calls the C++ compiler: nothing that a machine needs to run an engine
        self._model = torch._C._aoti.AOTIModelPackageLoader(str(folder / MODEL), "model", False, 1, -1)
        with safe_open(folder / WEIGHTS, framework="pt") as stored:
            # the model keeps addresses, no tensors: one float32 copy is all there is, and as long as this object
            self._weights = {name: stored.get_tensor(name).float() for name in self._model.get_constant_fqns()}
        self._model.load_constants(self._weights, use_inactive=False, check_full_update=True, user_managed=True)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """As `model.Model.forward`, but the cache is flat: keys and values of the first layer, of the second …"""
        (logits,) = self._model.run(list(inputs))
        return logits
