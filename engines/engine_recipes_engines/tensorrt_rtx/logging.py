"""What the library says while it works: errors are kept, warnings passed on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine_recipes import events

#: What is said at each compilation and means nothing: no driver is needed there; and ids, positions and lengths are
#: int64 on purpose.
NOISE = ("CUDA driver", "has Int64 binding")


def logger(trt: Any, noise: Sequence[str] = ()) -> Any:
    """A `tensorrt_rtx.ILogger` with `errors`, which are no failure by themselves. Lines with `noise` are dropped."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            severities = trt.ILogger.Severity
            if severity > severities.WARNING or any(part in text for part in noise):
                return
            if severity <= severities.ERROR:
                self.errors.append(text)
            events.log(f"TensorRT-RTX: {text}")

    return Log()


def words(errors: Sequence[str]) -> str:
    """The first error in one line; those after it are its consequences."""
    return " ".join(errors[0].split()) if errors else "it does not say why"
