"""How onnxruntime says things: its fused operators (domain com.microsoft). Knows the operators, not the model's order.

Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md. Inputs and outputs carry the
names that onnxruntime-genai expects.
"""

from __future__ import annotations

from engine_recipes.checkpoint import Checkpoint
from engine_recipes.rope import tables

from ..lowering.graph import MICROSOFT, Graph, onnx_dtype
from ..lowering.operators import CommonOps
from .quantized import QuantizedOps

_END = (1 << 63) - 1


class ContribOps(CommonOps):
    """The pieces of a decoder, each as one or a few nodes.

    Shapes: B sequences, S new tokens each, P tokens in the cache before, T after.

    Args:
        graph: where nodes and weights go.
        weights: a TensorRT-LLM checkpoint that `check_algorithms` accepted.
        compute: `float32`, `float16` or `bfloat16`: of every value between the embedding and the logits. Weights
            are stored as the checkpoint has them and converted when the engine is loaded.
        positions: rows of the rope tables, the longest sequence.
        tied: the head is the embedding table, see `is_tied`.
    """

    def __init__(self, graph: Graph, weights: Checkpoint, compute: str, positions: int, tied: bool) -> None:
        super().__init__(graph, weights, compute, tied)
        self.quantized = QuantizedOps(graph, weights)
        self._lengths(positions)
        d = self.decoder
        # GroupQueryAttention turns 16, 32 … elements of heads of such sizes; RotaryEmbedding any even number of them.
        self.turned_before = bool(self.quantized.cache) or d.rotated % 16 > 0 or d.head_size % 16 > 0
        if self.turned_before:
            self._positions()

    def _lengths(self, positions: int) -> None:
        import numpy as np

        g = self.graph
        self.ids = g.input("input_ids", "int64", ["B", "S"])
        mask = g.input("attention_mask", "int64", ["B", "T"])
        one = g.constant("one", np.array([1]))
        # GroupQueryAttention wants: tokens of each sequence less one [B], and T
        tokens = g.node("ReduceSum", [mask, one], "tokens", keepdims=0)
        self.last = g.node("Cast", [g.node("Sub", [tokens, one], "last.int64")], "last", to=onnx_dtype("int32"))
        length = g.node("Gather", [g.node("Shape", [mask], "mask.shape"), g.constant("axis1", np.array(1))], "T.int64")
        self.total = g.node("Cast", [length], "T", to=onnx_dtype("int32"))
        # A caller that only wants the next token sets this to -1, and the head runs once instead of S times.
        self.first = g.optional_input("first_logit", np.array([0]))
        cos, sin = tables(self.decoder, positions)
        self.cos = self._small("rope.cos", cos)
        self.sin = self._small("rope.sin", sin)

    def _positions(self) -> None:
        """The position of each new token, int64 [B, S], for rope outside GroupQueryAttention, which counts alike."""
        import numpy as np

        g = self.graph
        zero, one = g.constant("zero", np.array(0)), g.constant("axis1", np.array(1))
        count = g.node("Gather", [g.node("Shape", [self.ids], "ids.shape"), one], "S.int64")
        # of each sequence, the first new token; a prompt that is padded at its end has fewer tokens than S
        first = g.node("Max", [g.node("Sub", ["tokens", count], "first.unbounded"), zero], "first")  # [B]
        column = g.node("Unsqueeze", [first, g.constant("one", np.array([1]))], "first.column")  # [B, 1]
        self.positions = g.node("Add", [column, g.node("Range", [zero, count, one], "new")], "positions")

    def embed(self) -> str:
        """Rows of the embedding table, scaled. -> [B, S, hidden_size]"""
        return self.rows(self.ids)

    def norm(self, x: str, delta: str | None, name: str) -> tuple[str, str]:
        """Add what the block before computed, if any, and normalise. Returns (normalised, sum), both as `x`."""
        weight = self.vector(f"{name}.weight")
        if delta is None:
            return self.rms(x, weight, name), x
        outputs = [name, "", "", f"{name}.sum"]
        self.graph.nodes(
            "SkipSimplifiedLayerNormalization",
            [x, delta, weight],
            outputs,
            MICROSOFT,
            epsilon=self.decoder.norm_epsilon,
        )
        return outputs[0], outputs[3]

    def linear(self, x: str, name: str) -> str:
        """x · weightᵀ + bias, where there is a bias. [B, S, in] -> [B, S, out]"""
        biased = f"{name}.bias" in self.names
        product = f"{name}.product" if biased else name
        if not self.quantized.linear(x, name, product):
            # weights are [out, in] and stay so: transB reads them as they lie
            self.graph.node("FusedMatMul", [x, self._matrix(name)], product, MICROSOFT, transB=1)
        return self.graph.node("Add", [product, self.vector(f"{name}.bias")], name) if biased else name

    def gated(self, gate: str, up: str, name: str) -> str:
        """activation(gate) × up"""
        if self.decoder.activation == "silu":  # x · sigmoid(1 · x)
            active = self.graph.node("QuickGelu", [gate], f"{name}.silu", MICROSOFT, alpha=1.0)
        else:
            active = self.graph.node("FastGelu", [gate], f"{name}.gelu", MICROSOFT)  # the approximation by tanh
        return self.graph.node("Mul", [active, up], name)

    def attention(self, layer: int, q: str, k: str = "", v: str = "") -> str:
        """Rope, cache and causal attention; `q` alone is q, k and v packed. -> [B, S, heads · head_size]

        A quantised cache holds rounded keys and values, once rounded when they enter it, and attention sees only
        those. (TensorRT-LLM's kernels may take the unrounded ones for the prompt.)
        """
        g, d = self.graph, self.decoder
        name = f"transformer.layers.{layer}.attention"
        rope = {"do_rotary": 1, "rotary_interleaved": 0}
        angles = [self.cos, self.sin]
        if self.turned_before:
            q, k, v = self._turned(layer, *((q, k, v) if k else self.split(q, name)))
            rope, angles = {"do_rotary": 0}, []
        past, present = [], []
        for what in ("key", "value"):
            value = f"past_key_values.{layer}.{what}"
            past.append(g.input(value, self.compute, ["B", d.kv_heads, "P", d.head_size]))
            value = f"present.{layer}.{what}"
            present.append(g.output(value, self.compute, ["B", d.kv_heads, "T", d.head_size]))
        g.nodes(
            "GroupQueryAttention",
            [q, k, v, *past, self.last, self.total, *angles],
            [name, *present],
            MICROSOFT,
            num_heads=d.heads,
            kv_num_heads=d.kv_heads,
            scale=d.head_size**-0.5,
            **rope,
        )
        return name

    def _turned(self, layer: int, q: str, k: str, v: str) -> tuple[str, str, str]:
        """q and k turned by rope; k and v rounded if the cache is, which GroupQueryAttention would cache unrounded."""
        d = self.decoder
        turned = []
        for x, heads in ((q, d.heads), (k, d.kv_heads)):
            part = {"rotary_embedding_dim": d.rotary_size, "num_heads": heads} if d.rotary_size else {}
            inputs = [x, self.positions, self.cos, self.sin]
            turned.append(self.graph.node("RotaryEmbedding", inputs, f"{x}.rope", MICROSOFT, **part))
        k, v = (self.quantized.rounded_cache(x, layer, f"{x}.rounded") for x in (turned[1], v))
        return turned[0], k, v

    def logits(self, x: str) -> str:
        """The head, for positions from `first_logit` on. [B, S, hidden_size] -> float32 [B, L, vocab_size]"""
        import numpy as np

        g = self.graph
        ends, axis = g.constant("end", np.array([_END])), g.constant("one", np.array([1]))
        x = g.node("Slice", [x, self.first, ends, axis], "head.input")
        g.output("logits", "float32", ["B", "L", self.decoder.vocab_size])
        name = "logits" if self.compute == "float32" else "head.output"
        g.node("FusedMatMul", [x, self.head()], name, MICROSOFT, transB=1)
        return name if name == "logits" else g.node("Cast", [name], "logits", to=onnx_dtype("float32"))
