"""Weights as a lowering reads them: in pieces, and the head only if it is not the embedding table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from engine_recipes.checkpoint import Checkpoint

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

EMBEDDING = "transformer.vocab_embedding"
HEAD = "lm_head"
_CHUNK = 4 << 20  # bytes of a weight handled at a time


def pieces(weights: Checkpoint, name: str, rows: int) -> Iterator[Array]:
    """The first `rows` rows of a tensor, some at a time, and its pages given back at the end."""
    array = weights.array(name)
    step = max(1, _CHUNK * len(array) // array.nbytes)
    for start in range(0, rows, step):
        yield array[start : min(start + step, rows)]
    weights.forget(name)


def is_tied(weights: Checkpoint) -> bool:
    """Whether the head is the embedding table: missing, or equal to it bit for bit."""
    if f"{HEAD}.weight" not in weights.names():
        return True
    head, table = (weights.info(f"{name}.weight") for name in (HEAD, EMBEDDING))
    rows = weights.decoder.vocab_size  # the head may be padded
    if head[0] != table[0] or head[1][1:] != table[1][1:] or min(head[1][0], table[1][0]) < rows:
        return False
    pairs = zip(pieces(weights, f"{HEAD}.weight", rows), pieces(weights, f"{EMBEDDING}.weight", rows), strict=True)
    return all((a.view("uint8") == b.view("uint8")).all() for a, b in pairs)


def repack(packed: Array) -> Array:
    """From TensorRT-LLM's packing, two rows a byte, to ONNX's, two columns a byte; the low half is the earlier one.

    Args:
        packed: uint8 [out / 2, in], `in` even.

    Returns:
        uint8 [out, in / 2].
    """
    import numpy as np

    even, odd = packed[:, ::2], packed[:, 1::2]  # columns; each [out / 2, in / 2]
    rows = np.empty((len(packed), 2, even.shape[1]), np.uint8)
    rows[:, 0] = (even & 0x0F) | (odd << 4)
    rows[:, 1] = (even >> 4) | (odd & 0xF0)
    return rows.reshape(2 * len(packed), -1)
