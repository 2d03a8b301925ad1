"""From a TensorRT-LLM checkpoint to an ONNX decoder with a KV cache, in onnxruntime's operators."""

from __future__ import annotations

from pathlib import Path

from engine_recipes import Decoder, RequestError, events, require_room
from engine_recipes.checkpoint import Checkpoint

from ..lowering.decoder import check_model as check_decoder, decode, half_precision
from ..lowering.graph import ROUNDING, Graph, itemsize
from ..lowering.shapes import check_shapes
from ..lowering.weights import HEAD, is_tied
from .contrib import ContribOps
from .quantized import check_algorithms, stored_bytes


def lower(weights: Checkpoint, folder: Path, target: str = "cpu", max_seq_len: int = 0) -> int:
    """Write `model.onnx` and `model.onnx.data` into `folder`.

    Args:
        weights: a checkpoint, quantised or not; tensor by tensor, nothing is held twice.
        folder: has neither file yet.
        target: `cpu` computes in float32, `sm89` and the like in the checkpoint's own dtype, unquantised.
        max_seq_len: longest sequence, in tokens; 0 is what the model is meant for.

    Returns:
        The longest sequence.

    Raises:
        RequestError: something this engine cannot do: a quantization, an activation, a rope scaling, a length.
        MachineError: the disk is too small.
    """
    check_algorithms(weights, target)
    check_shapes(weights)
    positions = check_model(weights.decoder, max_seq_len)
    compute = compute_dtype(weights, target)
    tied = is_tied(weights)
    total = _total_bytes(weights, compute, positions, tied)
    require_room("the engine", total, folder)
    with Graph(folder, lambda done: events.progress("lowering", done, total, "B")) as graph:
        ops = ContribOps(graph, weights, compute, positions, tied)
        decode(ops)
        graph.save({ROUNDING: " ".join(ops.quantized.rounding)})
    return positions


def compute_dtype(weights: Checkpoint, target: str) -> str:
    """float32 on a CPU; on a GPU the checkpoint's dtype, as CUDA's GroupQueryAttention has no float32."""
    return "float32" if target == "cpu" else half_precision(weights.dtype, target, ", or with --target cpu")


def check_model(decoder: Decoder, max_seq_len: int) -> int:
    """Refuse what cannot be lowered whatever the precision, and return the longest sequence in tokens.

    Raises:
        RequestError: an activation, a head size, a rope scaling, a length.
    """
    check_decoder("onnxruntime", decoder, max_seq_len)
    if decoder.head_size % 8:
        raise RequestError(
            f"the model has attention heads of {decoder.head_size}, and not of a multiple of 8",
            "onnxruntime's attention cannot do that; choose another engine for this model",
        )
    return max_seq_len or decoder.max_positions


def _total_bytes(weights: Checkpoint, compute: str, positions: int, tied: bool) -> int:
    names = [name for name in weights.names() if not (tied and name == f"{HEAD}.weight")]
    stored = sum(stored_bytes(weights, name) for name in names)
    return stored + positions * weights.decoder.rotated * itemsize(compute)  # rope: half of it, twice
