"""How ONNX's own operators (opset 24) say a decoder: what TensorRT-RTX's parser reads, and onnxruntime runs alike.

Operators: https://onnx.ai/onnx/operators/. The cache is of a fixed length MAX and written in place; which part of it
counts is told from outside, so that nothing in the graph depends on data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine_recipes.checkpoint import Checkpoint
from engine_recipes.rope import tables

from ..lowering.graph import numpy_dtype, onnx_dtype
from ..lowering.operators import CommonOps
from .quantized import QuantizedOps
from .rounding import RoundedGraph

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]


class StandardOps(CommonOps):
    """The pieces of a decoder.

    Shapes: B sequences, S new tokens each, L of them with logits, MAX tokens in the cache.

    Inputs beside the cache, all int64: `input_ids` and `position_ids` [B, S]; `write_indices` [B], tokens in the
    cache before, after which the new ones are written; `kv_lengths` [B], tokens in it after; `logit_indices` [L],
    which of the S get logits.

    Args:
        graph: of opset 24; where nodes and weights go. If it rounds, constants are rounded alike.
        weights: a TensorRT-LLM checkpoint that `check_algorithms` accepted.
        compute: `float32`, `float16` or `bfloat16`: of every value between the embedding and the logits.
        positions: MAX, and rows of the rope tables.
        tied: the head is the embedding table.
    """

    def __init__(self, graph: RoundedGraph, weights: Checkpoint, compute: str, positions: int, tied: bool) -> None:
        super().__init__(graph, weights, compute, tied)
        self.rounded = graph.rounded
        self.positions = positions
        self.quantized = QuantizedOps(self)
        self.ids = graph.input("input_ids", "int64", ["B", "S"])
        self.position_ids = graph.input("position_ids", "int64", ["B", "S"])
        self.write_indices = graph.input("write_indices", "int64", ["B"])
        self.wanted = graph.input("logit_indices", "int64", ["L"])
        self.mask = self._mask(graph.input("kv_lengths", "int64", ["B"]))
        cos, sin = tables(self.decoder, positions)
        self.cos = self._small("rope.cos", cos)
        self.sin = self._small("rope.sin", sin)

    def _mask(self, lengths: str) -> str:
        """What each new token sees: itself and what came before. bool [B, 1, S, MAX]"""
        import numpy as np

        # Attention could be told lengths instead, but TensorRT's parser drops that input without a word.
        g = self.graph
        places = g.constant("places", np.arange(self.positions))  # [MAX]
        ends = g.node("Unsqueeze", [self.position_ids, g.constant("axes.1.3", np.array([1, 3]))], "ends")
        before = g.node("LessOrEqual", [places, ends], "mask.before")  # [B, 1, S, MAX]
        filled = g.node("Unsqueeze", [lengths, g.constant("axes.1.2.3", np.array([1, 2, 3]))], "filled")
        return g.node("And", [before, g.node("Less", [places, filled], "mask.filled")], "mask")

    def embed(self) -> str:
        """Rows of the embedding table, scaled. -> [B, S, hidden_size]"""
        return self.rows(self.ids)

    def norm(self, x: str, delta: str | None, name: str) -> tuple[str, str]:
        """Add what the block before computed, if any, and normalise. Returns (normalised, sum), both as `x`."""
        if delta is not None:
            x = self.graph.node("Add", [x, delta], f"{name}.sum")
        return self.rms(x, self.vector(f"{name}.weight"), name), x

    def linear(self, x: str, name: str) -> str:
        """x · weightᵀ + bias, where there is a bias. [B, S, in] -> [B, S, out]"""
        if self.weights.is_quantized(name):
            x, weight = self.quantized.factors(x, name)
        else:
            weight = self._matrix(name)
        biased = f"{name}.bias" in self.names
        product = self.product(x, weight, f"{name}.product" if biased else name)
        return self.graph.node("Add", [product, self.vector(f"{name}.bias")], name) if biased else name

    def product(self, x: str, weight: str, name: str) -> str:
        """x · weightᵀ. The transpose costs nothing: compilers read the weight as it lies."""
        turned = self.graph.node("Transpose", [weight], f"{name}.turned", perm=[1, 0])
        return self.graph.node("MatMul", [x, turned], name)

    def gated(self, gate: str, up: str, name: str) -> str:
        """activation(gate) × up"""
        g = self.graph
        if self.decoder.activation == "silu":
            active = g.node("Mul", [gate, g.node("Sigmoid", [gate], f"{name}.sigmoid")], f"{name}.silu")
        else:
            # in float32: its third power does not fit float16, and tanh of it is worth more than 11 bits
            wide = self._cast(gate, "float32", f"{name}.wide")
            gelu = g.node("Gelu", [wide], f"{name}.gelu", approximate="tanh")
            active = self._cast(gelu, self.compute, f"{name}.active")
        return g.node("Mul", [active, up], name)

    def _cast(self, x: str, dtype: str, name: str) -> str:
        return x if self.compute == "float32" else self.graph.node("Cast", [x], name, to=onnx_dtype(dtype))

    def attention(self, layer: int, q: str, k: str = "", v: str = "") -> str:
        """Rope, cache and causal attention; `q` alone is q, k and v packed. -> [B, S, heads · head_size]

        Attention sees keys and values as the cache holds them, the new ones too.
        """
        import numpy as np

        g, d = self.graph, self.decoder
        name = f"transformer.layers.{layer}.attention"
        q, k, v = (self.by_head(x) for x in ((q, k, v) if k else self.split(q, name)))
        part: dict[str, Any] = {"rotary_embedding_dim": d.rotary_size} if d.rotary_size else {}
        angles = [self.cos, self.sin, self.position_ids]
        q, k = (g.node("RotaryEmbedding", [x, *angles], f"{x}.rope", **part) for x in (q, k))
        # Scaled here, because TensorRT's parser would scale keys as well, all of the cache for each token.
        factor = np.array(d.head_size**-0.5, np.float32)
        q = g.node("Mul", [q, g.constant("attention.scale", self.computed(factor))], f"{name}.scaled")
        k, v = self.cached(layer, "key", k), self.cached(layer, "value", v)
        g.node("Attention", [q, k, v, self.mask], f"{name}.by_head", scale=1.0)  # [B, heads, S, head_size]
        turned = g.node("Transpose", [f"{name}.by_head"], f"{name}.turned", perm=[0, 2, 1, 3])
        return g.node("Reshape", [turned, g.constant("flat", np.array([0, 0, -1]))], name)

    def by_head(self, x: str) -> str:
        """[B, S, heads · head_size] -> [B, heads, S, head_size]"""
        import numpy as np

        g = self.graph
        shape = g.constant("by_head", np.array([0, 0, -1, self.decoder.head_size]))
        return g.node("Transpose", [g.node("Reshape", [x, shape], f"{x}.split")], f"{x}.heads", perm=[0, 2, 1, 3])

    def cached(self, layer: int, what: str, new: str) -> str:
        """Write new keys or values behind those of the cache, and return all. -> [B, kv_heads, MAX, head_size]

        A quantised cache holds rounded numbers, in the compute dtype: TensorRT-RTX's cache update knows no narrower.
        """
        g, d = self.graph, self.decoder
        past, present = f"past_key_values.{layer}.{what}", f"present.{layer}.{what}"
        shape: list[int | str] = ["B", d.kv_heads, self.positions, d.head_size]
        g.input(past, self.compute, shape)
        g.output(present, self.compute, shape)
        new = self.quantized.rounded_cache(new, layer, f"{present}.new")
        return g.node("TensorScatter", [past, new, self.write_indices], present, axis=2, mode="linear")

    def logits(self, x: str) -> str:
        """The head, for the wanted positions. [B, S, hidden_size] -> float32 [B, L, vocab_size]"""
        g = self.graph
        x = g.node("Gather", [x, self.wanted], "head.input", axis=1)
        g.output("logits", "float32", ["B", "L", self.decoder.vocab_size])
        if self.compute == "float32":
            return self.product(x, self.head(), "logits")
        return g.node("Cast", [self.product(x, self.head(), "head.output")], "logits", to=onnx_dtype("float32"))

    def computed(self, array: Array) -> Array:
        """A constant in the compute dtype, rounded as the graph rounds."""
        return super().computed(array if self.rounded is None else array.astype(numpy_dtype(self.rounded)))
