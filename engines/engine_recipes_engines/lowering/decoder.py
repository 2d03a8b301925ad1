"""The whole decoder, top to bottom: what is computed, in which order. Each engine says the pieces in its own way."""

from __future__ import annotations

from typing import Protocol

from engine_recipes import Decoder, RequestError
from engine_recipes.rope import inverse_frequencies

#: Those that `Ops.gated` has to know.
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")


class Ops(Protocol):
    """The pieces of a decoder. Values are known by their names in the graph.

    Shapes: B sequences, S new tokens each, L of them with logits.
    """

    decoder: Decoder

    def embed(self) -> str:
        """Rows of the embedding table, scaled. -> [B, S, hidden_size]"""

    def norm(self, x: str, delta: str | None, name: str) -> tuple[str, str]:
        """Add what the block before computed, if any, and normalise. Returns (normalised, sum), both as `x`."""

    def linear(self, x: str, name: str) -> str:
        """x · weightᵀ + bias, where there is a bias. [B, S, in] -> [B, S, out]"""

    def gated(self, gate: str, up: str, name: str) -> str:
        """activation(gate) × up"""

    def normed_heads(self, qkv: str, name: str) -> tuple[str, str, str]:
        """Split into q, k and v, and normalise each head of q and of k."""

    def attention(self, layer: int, q: str, k: str = "", v: str = "") -> str:
        """Rope, cache and causal attention; `q` alone is q, k and v packed. -> [B, S, heads · head_size]"""

    def logits(self, x: str) -> str:
        """The head. [B, S, hidden_size] -> float32 [B, L, vocab_size]"""


def decode(ops: Ops) -> None:
    """Add the decoder. `x` is the residual stream, `delta` what the last block adds to it."""
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


def check_model(engine: str, decoder: Decoder, max_seq_len: int) -> None:
    """Refuse what `decode` cannot say, whatever the precision.

    Args:
        engine: its name, for the message.
        decoder: the model.
        max_seq_len: wanted, in tokens; 0 is for the engine to choose.

    Raises:
        RequestError: an activation, a rope scaling, a length.
    """
    if decoder.activation not in ACTIVATIONS:
        raise RequestError(
            f"the {engine} engine does not know the activation {decoder.activation!r}",
            f"known: {', '.join(ACTIVATIONS)}; choose another engine for this model",
        )
    inverse_frequencies(decoder)
    most = decoder.max_positions
    if not 0 <= max_seq_len <= most:
        raise RequestError(
            f"max_seq_len = {max_seq_len}, but the model is meant for sequences of up to {most:,} tokens",
            f"choose 1 to {most}, or 0 for {most}",
        )


def half_precision(dtype: str, target: str, otherwise: str = "") -> str:
    """The dtype that a GPU computes in: the checkpoint's. Raises RequestError if that is float32.

    `otherwise`: what else can be done, for the hint.
    """
    if dtype not in ("float16", "bfloat16"):
        raise RequestError(
            f"target {target} computes in half precision, the checkpoint is {dtype}",
            f"build it with a float16 or bfloat16 checkpoint{otherwise}",
        )
    return dtype
