"""From a TensorRT-LLM checkpoint to an ONNX decoder with a KV cache: what is computed, in which order."""

from __future__ import annotations

from pathlib import Path

from engine_recipes import Decoder, RequestError, events, require_room
from engine_recipes.checkpoint import Checkpoint

from .contrib import HEAD, ContribOps, is_tied
from .graph import ROUNDING, Graph, itemsize
from .quantized import check_algorithms, stored_bytes
from .rope import inverse_frequencies


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


def decode(ops: ContribOps) -> None:
    """The whole decoder, top to bottom. `x` is the residual stream, `delta` what the last block adds to it."""
    d = ops.decoder
    x = ops.embed()  # [B, S, hidden_size]
    delta = None
    for layer in range(d.layers):
        at = f"transformer.layers.{layer}."
        h, x = ops.norm(x, delta, at + "input_layernorm")
        qkv = ops.linear(h, at + "attention.qkv")  # [B, S, (heads + 2 kv_heads) · head_size]
        heads = ops.normed_heads(qkv, at + "attention") if d.qk_norm else (qkv,)
        context = ops.attention(layer, *heads)  # [B, S, heads · head_size]
        delta = ops.linear(context, at + "attention.dense")

        h, x = ops.norm(x, delta, at + "post_layernorm")
        # TensorRT-LLM's fc is the gated half (gate_proj in Hugging Face's names), its gate the other (up_proj)
        gate, up = ops.linear(h, at + "mlp.fc"), ops.linear(h, at + "mlp.gate")  # [B, S, intermediate_size]
        delta = ops.linear(ops.gated(gate, up, at + "mlp"), at + "mlp.proj")
    h, x = ops.norm(x, delta, "transformer.ln_f")
    ops.logits(h)  # [B, L, vocab_size]


def compute_dtype(weights: Checkpoint, target: str) -> str:
    """float32 on a CPU; on a GPU the checkpoint's dtype, as CUDA's GroupQueryAttention has no float32."""
    if target == "cpu":
        return "float32"
    if weights.dtype not in ("float16", "bfloat16"):
        raise RequestError(
            f"target {target} computes in half precision, the checkpoint is {weights.dtype}",
            "build it with a float16 or bfloat16 checkpoint, or with --target cpu",
        )
    return weights.dtype


def check_model(decoder: Decoder, max_seq_len: int) -> int:
    """Refuse what cannot be lowered whatever the precision, and return the longest sequence in tokens.

    Raises:
        RequestError: an activation, a head size, a rope scaling, a length.
    """
    if decoder.activation != "silu":
        raise RequestError(
            f"the onnxruntime engine does not know the activation {decoder.activation!r}",
            "known: silu; choose another engine for this model",
        )
    if decoder.head_size % 8:
        raise RequestError(
            f"the model has attention heads of {decoder.head_size}, and not of a multiple of 8",
            "onnxruntime's attention cannot do that; choose another engine for this model",
        )
    inverse_frequencies(decoder)
    most = decoder.max_positions
    if not 0 <= max_seq_len <= most:
        raise RequestError(
            f"max_seq_len = {max_seq_len}, but the model is meant for sequences of up to {most:,} tokens",
            f"choose 1 to {most}, or 0 for {most}",
        )
    return max_seq_len or most


def _total_bytes(weights: Checkpoint, compute: str, positions: int, tied: bool) -> int:
    names = [name for name in weights.names() if not (tied and name == f"{HEAD}.weight")]
    stored = sum(stored_bytes(weights, name) for name in names)
    return stored + positions * weights.decoder.head_size * itemsize(compute)  # rope: half a head, twice
