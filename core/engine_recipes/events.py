"""Progress and log lines from inside a stage. Knows nothing of terminals; a sink decides what to do with them.

In a worker the sink writes JSON lines to the parent; without a sink the calls cost nothing, so plugin code may
report freely, from any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

#: What is sent: plain JSON with the kind under `event`, and from a build the stage's name under `stage`.
Event = dict[str, Any]
#: What gets events. It may be called from any thread.
Sink = Callable[[Event], None]

_sink: Sink | None = None


def progress(label: str, done: float, total: float, unit: str = "") -> None:
    """Say how far the work is.

    Args:
        label: what is being done, a few words (`writing rank0.safetensors`).
        done: how much is finished, in `unit`.
        total: how much there is; 0 means unknown.
        unit: `B` for bytes, else a plural noun (`layers`).
    """
    emit({"event": "progress", "label": label, "done": done, "total": total, "unit": unit})


def log(text: str) -> None:
    """Say one thing that a curious user should be able to read. The terminal shows it with -v only."""
    emit({"event": "log", "text": text})


def output(text: str) -> None:
    """One line that a tool of the user's has printed. The terminal shows it as it comes, unless told to be quiet."""
    emit({"event": "output", "text": text})


def warn(text: str) -> None:
    """Say one thing the user should see now: a value that overflowed, a default that was chosen for them."""
    emit({"event": "warn", "text": text})


def emit(event: Event) -> None:
    """Send one event to the sink, if there is one."""
    if _sink is not None:
        _sink(event)


@contextmanager
def sink(receiver: Sink) -> Iterator[None]:
    """Send this process's events to `receiver` while the block runs."""
    global _sink
    before, _sink = _sink, receiver
    try:
        yield
    finally:
        _sink = before
