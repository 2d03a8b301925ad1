"""A tiny engine in numpy, fed step by step, right or broken on purpose: for tests of what all such engines share."""

from __future__ import annotations

from typing import Any

import numpy as np

from engine_recipes.stepping import Run, Stepper

VOCABULARY = 40
Floats = np.ndarray[Any, np.dtype[np.float32]]
Integers = np.ndarray[Any, np.dtype[np.int64]]


class Summing(Stepper):
    """Remembers a sum of embeddings in which older tokens fade; `fault` is what is wrong with it.

    Attributes:
        fed: shapes of all that was fed, in order.
        lengths: what `start` was asked for: (length, batch).
        open: runs that were not closed.
    """

    def __init__(self, max_seq_len: int = 64, piece: int = 8, fault: str = "") -> None:
        super().__init__("loaded", max_seq_len, VOCABULARY)
        random = np.random.default_rng(3)
        self.table = random.normal(size=(VOCABULARY, 16)).astype(np.float32)
        self.head = random.normal(size=(16, VOCABULARY)).astype(np.float32)
        self.piece, self.fault = piece, fault
        self.fed: list[tuple[int, ...]] = []
        self.lengths: list[tuple[int, int]] = []
        self.open = 0

    def start(self, length: int, batch: int) -> Run:
        self.lengths.append((length, batch))
        return _Run(self, length, batch)


class _Run(Run):
    def __init__(self, engine: Summing, length: int, batch: int) -> None:
        super().__init__(batch, VOCABULARY, engine.piece)
        self._engine, self._room = engine, length
        self._sum = np.zeros((batch, 16), np.float32)
        engine.open += 1

    def feed(self, ids: Integers, out: Floats) -> None:
        engine = self._engine
        engine.fed.append(ids.shape)
        self._room -= ids.shape[1]
        assert self._room >= 0, "more was fed than the cache was made for"
        if engine.fault == "forgets":
            self._sum[:] = 0
        rows = np.empty((*ids.shape, 16), np.float32)
        for i in range(ids.shape[1]):
            self._sum = 0.7 * self._sum + engine.table[ids[:, i]]
            rows[:, i] = self._sum
        if engine.fault == "drifts":
            self._sum = self._sum * np.float32(1.02)
        out[:] = (rows @ engine.head)[:, -out.shape[1] :]
        if engine.fault == "breaks" and 7 in ids:
            out[:, -1, 5] = np.nan

    def close(self) -> None:
        self._engine.open -= 1
