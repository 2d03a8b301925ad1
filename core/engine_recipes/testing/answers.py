"""Loaded engines and what they say, for `running`: greedy answers, in turns, and held against logits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing, suppress
from itertools import islice
from typing import TYPE_CHECKING

from ..errors import RequestError
from ..types import Runtime, Sampling
from .faults import Fault, Skip, expect
from .lab import Lab
from .numbers import EIGHT_BITS, allow, tolerance
from .recipes import for_engine, runs_here

if TYPE_CHECKING:
    from .numbers import Floats

MORE = 8  # tokens past its end that an endless generation is allowed before it is cut off


def loaded(lab: Lab, name: str) -> closing[Runtime]:
    """The engine on a tiny model, closed in the end."""
    return closing(lab.load(runs_here(lab, name)).runtime)


def another(lab: Lab, name: str) -> closing[Runtime]:
    """An engine of another tiny model; of the same, where it takes no other."""
    mine = runs_here(lab, name)
    for folder, family in lab.models().values():
        if str(folder) != mine.model:
            with suppress(Fault, RequestError):  # it does not take this one
                return closing(lab.load(for_engine(lab, name, folder, family.name)).runtime)
    return closing(lab.load(mine).runtime)


def greedy(runtime: Runtime, prompt: Sequence[int], most: int, stop: frozenset[int] = frozenset()) -> list[int]:
    """An answer without chance."""
    given = list(prompt)
    tokens = islice(runtime.generate(given, Sampling(max_tokens=most), stop), most + MORE)
    said = [int(token) for token in tokens]
    expect(given == list(prompt), "generate changes the list that it is given as the prompt: work on a copy")
    return said


def interleaved(*asked: tuple[Runtime, Sequence[int]]) -> tuple[list[int], ...]:
    """Greedy answers of 6 tokens, a token of each in turns."""
    steps = zip(*(runtime.generate(prompt, Sampling(max_tokens=6)) for runtime, prompt in asked), strict=False)
    said = [[int(token) for token in tokens] for tokens in islice(steps, 6 + MORE)]
    return tuple(list(answer) for answer in zip(*said, strict=True))


def logits_of(runtime: Runtime, ids: Sequence[int]) -> Floats:
    """Its logits, float32 [ids, vocabulary]. Raises Skip if it hides them."""
    logits: Floats | None = runtime.logits(ids)
    if logits is None:
        raise Skip("the engine gives no logits")
    kept: Floats = logits.copy()
    return kept  # it may be a buffer of the engine's


def expect_likely(
    lab: Lab, name: str, runtime: Runtime, prompt: Sequence[int], said: Sequence[int], why: str, most: float = 0.0
) -> None:
    """Each token of an answer must be the likeliest by the logits of all at once, but for rounding and `most`.

    An engine that gives no logits is asked for each token anew instead.
    """
    rows, limit = runtime.logits([*prompt, *said]), rounding(lab, name)
    for position, token in enumerate(said):
        before = [*prompt, *said[:position]]
        if rows is None:
            best = next(iter(greedy(runtime, before, 1)), None)
            off = 0.0 if best == token else 1.0
        else:
            row = rows[len(before) - 1]
            best = int(row.argmax())
            off = float((row[best] - row[token] - most) / row.std())
        if off > limit:
            raise Fault(
                f"token {position} of an answer to {len(prompt)} tokens is {token}, all tokens at once say {best}:"
                f" {why}{allowing(lab, name, off)}"
            )


def rounding(lab: Lab, name: str) -> float:
    """How far what an engine computes in two ways may lie apart: as far as it may from the source, if that is near."""
    return min(tolerance(lab, lab.registry.precisions[str(runs_here(lab, name).precision)]), EIGHT_BITS)


def allowing(lab: Lab, name: str, off: float) -> str:
    """What to write where rounding may explain how far numbers are apart; empty where it cannot."""
    return allow(lab, runs_here(lab, name), off)
