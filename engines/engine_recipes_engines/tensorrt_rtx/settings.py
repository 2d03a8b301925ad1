"""`rtx.json`: what stage 2 notes beside the engine, for the runtime and for those who judge."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine_recipes import RequestError, StageFailed

from ..lowering.quantization import CACHES

SETTINGS = "rtx.json"
_COUNTS = ("max_batch_size", "max_seq_len", "chunk", "vocab_size", "layers", "kv_heads", "head_size")
_HALF = ("float16", "bfloat16")


@dataclass(frozen=True)
class Tensor:
    """An input or output of the network: its name, the library's name of its dtype, its shape (-1: dynamic)."""

    name: str
    dtype: str
    shape: list[int]


@dataclass(frozen=True)
class Settings:
    """Sizes of the engine, and what its compilation showed.

    Attributes:
        chunk: most tokens of each sequence that are fed at once.
        compute: `float16` or `bfloat16`.
        cache_rounding: what keys and values are rounded to before they are cached, None if they are not.
        weights: bytes of the checkpoint's tensors, by dtype.
        constants: the same of what the engine holds, as far as it tells.
        inputs, outputs: of the network.
        bytes, sha256: of the engine's file.
    """

    max_batch_size: int
    max_seq_len: int
    chunk: int
    vocab_size: int
    layers: int
    kv_heads: int
    head_size: int
    compute: str
    cache_rounding: str | None
    targets: list[str]
    library: str
    weights: dict[str, int]
    constants: dict[str, int] = field(default_factory=dict)
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    bytes: int = 0
    sha256: str = ""

    @property
    def most(self) -> dict[str, int]:
        """The largest size of each dynamic dimension, by its name in the model."""
        return {"B": self.max_batch_size, "S": self.chunk, "L": self.chunk}

    def write(self, folder: Path) -> None:
        """Write `rtx.json`."""
        (folder / SETTINGS).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def read_settings(folder: Path) -> Settings:
    """What stage 2 noted.

    Raises:
        RequestError: this is no such engine.
        StageFailed: the notes are damaged.
    """
    try:
        return _parse(json.loads((folder / SETTINGS).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise RequestError(
            f"{folder} holds no tensorrt-rtx engine", "build it with `recipes build MODEL@tensorrt-rtx`"
        ) from None
    except KeyError as error:
        reason = f"it has no {error.args[0]}"
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
    raise StageFailed(f"{folder / SETTINGS} is damaged: {reason}", "build the engine again")


def _parse(found: Mapping[str, Any]) -> Settings:
    if not isinstance(found, dict):
        raise ValueError("it is no object")
    return Settings(
        **{name: _count(name, found[name], 1) for name in _COUNTS},
        compute=_one_of("compute", found["compute"], _HALF),
        cache_rounding=_one_of("cache_rounding", found["cache_rounding"], (None, *CACHES.values())),
        targets=[_text("targets", target) for target in found["targets"]],
        library=_text("library", found["library"]),
        weights=_sizes("weights", found["weights"]),
        constants=_sizes("constants", found["constants"]),
        inputs=[_tensor("inputs", one) for one in found["inputs"]],
        outputs=[_tensor("outputs", one) for one in found["outputs"]],
        bytes=_count("bytes", found["bytes"], 1),
        sha256=_text("sha256", found["sha256"]),
    )


def _count(name: str, value: Any, least: int) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{name} is {value!r:.40}")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r:.40}")
    return value


def _one_of(name: str, value: Any, known: tuple[Any, ...]) -> Any:
    if value not in known:
        raise ValueError(f"{name} is {value!r:.40}")
    return value


def _sizes(name: str, value: Mapping[str, Any]) -> dict[str, int]:
    return {dtype: _count(name, size, 0) for dtype, size in value.items()}


def _tensor(name: str, value: Mapping[str, Any]) -> Tensor:
    shape = [_count(name, side, -1) for side in value["shape"]]
    return Tensor(_text(name, value["name"]), _text(name, value["dtype"]), shape)
