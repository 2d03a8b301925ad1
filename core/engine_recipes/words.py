"""Numbers of a comparison in words, the same in the terminal and on the page."""

from __future__ import annotations

import math
from collections.abc import Callable

from .compare import Built, Source
from .space import human_bytes

#: What `in_words` says of an engine, in short.
COLUMNS = ("VERDICT", "SIZE", "×SRC", "BUILD", "LOAD", "FIRST", "TOK/S", "KL", "PPL×", "TOP-1")


def in_words(engine: Built, source: Source) -> tuple[str, ...]:
    """One engine's row of the table, under `COLUMNS`; `-` where nothing was measured."""
    return (
        engine.verdict,
        human_bytes(engine.bytes),
        f"{engine.bytes / source.bytes:.2f}" if source.bytes else "-",
        seconds(engine.seconds),
        seconds(engine.speed("load_seconds")),
        seconds(engine.speed("first_token_seconds")),
        rate(engine.speed("decode_tokens_per_second")),
        small(engine.metric("mean_kl")),
        _said(engine.metric("perplexity_ratio"), lambda x: f"{x:.3f}" if x < 100 else f"{x:.3g}"),
        _said(engine.metric("top1_agreement"), lambda x: f"{x:.1%}"),
    )


def source_in_words(source: Source) -> tuple[str, ...]:
    """The source's row: what engines are compared with."""
    size = human_bytes(source.bytes) if source.bytes else "-"
    return ("-", size, "1.00" if source.bytes else "-", "-", "-", "-", "-", "0", "1.000", "100.0%")


def seconds(value: float | None) -> str:
    """`25 ms`, `0.53 s`, `5.3 s`, `48 s`, `12 min`, `3.1 h`."""
    units = ((0.1, 1e-3, "ms", 0), (1, 1, "s", 2), (10, 1, "s", 1), (120, 1, "s", 0), (7200, 60, "min", 0))
    limits = (*units, (math.inf, 3600, "h", 1))
    _, unit, name, digits = next((u for u in limits if (value or 0) < u[0]), limits[-1])
    return _said(value, lambda x: f"{x / unit:.{digits}f} {name}")


def rate(value: float | None) -> str:
    """A number a second: `58.1`, `134`."""
    return _said(value, lambda x: f"{x:.1f}" if x < 100 else f"{x:.0f}")


def small(value: float | None) -> str:
    """A number that is 0 at best: `0`, `< 0.0001`, `0.0243`, `14.02`."""
    return _said(value, lambda x: "0" if x == 0 else "<0.0001" if 0 < x < 1e-4 else f"{x:.4f}" if x < 1 else f"{x:.2f}")


def _said(value: float | None, how: Callable[[float], str]) -> str:
    return "-" if value is None else how(value) if math.isfinite(value) else str(value)
