"""Runs a compiled decoder: which tokens are fed when, with which positions and lengths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine_recipes import RequestError, Sampling
from engine_recipes.stepping import Run, Stepper

from ..lowering.graph import MODEL
from .compiling import ENGINE
from .session import GraphSession, RtxSession, Session
from .settings import read_settings

if TYPE_CHECKING:
    from engine_recipes.stepping import Floats, Integers


class RtxRuntime(Stepper):
    """A loaded engine (see `engine_recipes.Runtime`). Each generation has a cache of its own.

    Args:
        folder: an engine that this package built.
        options: none is needed.
        session: what computes; left out, the engine itself on a GPU. That was not run yet on a GPU that TensorRT-RTX
            supports: see `RtxSession`.

    Raises:
        RequestError: this is no such engine.
        MachineError: this machine cannot run it.
        StageFailed: it is damaged.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any], session: Session | None = None) -> None:
        settings = read_settings(folder)
        self.settings = settings
        self.max_batch_size = settings.max_batch_size
        session = session or RtxSession(folder / ENGINE, settings)
        super().__init__(session, settings.max_seq_len, settings.vocab_size)

    def generate_batch(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[list[int]]:
        """As for every engine.

        Raises:
            RequestError: as for every engine, or there are more prompts than the engine was built for.
        """
        if len(prompts) > self.max_batch_size:
            raise RequestError(
                f"{len(prompts)} sequences at a time, this engine takes {self.max_batch_size}",
                "give fewer, or build with a larger --set build.max_batch_size",
            )
        return super().generate_batch(prompts, sampling)

    def close(self) -> None:
        """Give back memory and devices. Safe to call twice."""
        if self.session is not None:
            self.session.close()
        super().close()

    def start(self, length: int, batch: int) -> _Run:
        return _Run(self, batch)


def simulated(folder: Path, options: Mapping[str, Any]) -> RtxRuntime:
    """The graph of an engine on a CPU: what the engine would compute, its 16 bits too, as far as arithmetic allows.

    Args:
        folder: holds `model.onnx` and `rtx.json`.
        options: `threads`: 0 (default) is one for each physical core this process may use.

    Raises:
        RequestError, StageFailed: as RtxRuntime.
    """
    read_settings(folder)  # what is no engine is said before the graph is missed
    return RtxRuntime(folder, options, GraphSession(folder / MODEL, options))


class _Run(Run):
    """Sequences of one length and the part of the cache that is theirs."""

    def __init__(self, runtime: RtxRuntime, batch: int) -> None:
        super().__init__(batch, runtime.vocab_size, runtime.settings.chunk)
        self._session: Session = runtime.session
        self._cache = self._session.cache(batch)
        self._used = 0

    def feed(self, ids: Integers, out: Floats) -> None:
        """Run int64 [B, S] at once; `out`, float32 [B, L, vocabulary], gets the logits of the last L tokens."""
        import numpy as np

        batch, count = ids.shape
        before, self._used = self._used, self._used + count
        feeds = {
            "input_ids": np.ascontiguousarray(ids),
            "position_ids": np.tile(np.arange(before, self._used), (batch, 1)),
            "write_indices": np.full(batch, before),
            "kv_lengths": np.full(batch, self._used),
            "logit_indices": np.arange(count - out.shape[1], count),
        }
        self._session.run(feeds, self._cache, out)

    def close(self) -> None:
        """Give back the cache."""
        self._cache.close()
