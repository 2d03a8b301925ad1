"""From a TensorRT-LLM checkpoint to the ONNX decoder that TensorRT-RTX compiles."""

from __future__ import annotations

from pathlib import Path

from engine_recipes import Decoder, events
from engine_recipes.checkpoint import Checkpoint

from ..lowering.decoder import check_model as check_decoder, decode
from ..lowering.graph import stored_bytes
from ..lowering.weights import HEAD, is_tied
from .operators import StandardOps
from .rounding import RoundedGraph

OPSET = 24
#: The cache is of a fixed length, and its memory is taken when the engine is loaded: at most so many tokens unless
#: the user asks for more.
LONGEST = 4096


def lower(weights: Checkpoint, folder: Path, compute: str, max_seq_len: int, rounded: str | None = None) -> None:
    """Write `model.onnx` and `model.onnx.data` into `folder`.

    Args:
        weights: a checkpoint that `check_algorithms` accepted; tensor by tensor, nothing is held twice.
        folder: has neither file yet.
        compute: `float16` or `bfloat16`; `float32` for a CPU to compute the same.
        max_seq_len: length of the cache, in tokens.
        rounded: with `float32`, what every value is rounded to after it was computed, so that the CPU computes what
            an engine of this dtype does: `float16` or `bfloat16`.
    """
    tied = is_tied(weights)
    total = sum(weight_bytes(weights, tied).values())
    with RoundedGraph(folder, lambda done: events.progress("lowering", done, total, "B"), OPSET, rounded) as graph:
        decode(StandardOps(graph, weights, compute, max_seq_len, tied))
        graph.save()


def weight_bytes(weights: Checkpoint, tied: bool) -> dict[str, int]:
    """Bytes of tensors by dtype, a tied head counted once. 4-bit weights, packed into int8, are called int4."""
    sizes: dict[str, int] = {}
    for name in weights.names():
        dtype, shape = weights.info(name)
        module, _, kind = name.rpartition(".")
        if tied and module == HEAD:
            continue
        packed = kind == "weight" and dtype in ("int8", "uint8") and weights.is_quantized(module)
        key = "int4" if packed else dtype
        sizes[key] = sizes.get(key, 0) + stored_bytes(dtype, shape)
    return sizes


def check_model(decoder: Decoder, max_seq_len: int) -> int:
    """Refuse what cannot be lowered whatever the precision, and return the longest sequence in tokens.

    Raises:
        RequestError: an activation, a rope scaling, a length.
    """
    check_decoder("tensorrt-rtx", decoder, max_seq_len)
    return max_seq_len or min(decoder.max_positions, LONGEST)
