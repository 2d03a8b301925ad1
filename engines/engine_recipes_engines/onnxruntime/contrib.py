"""How onnxruntime says things: its fused operators (domain com.microsoft). Knows the operators, not the model's order.

Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md. Inputs and outputs carry the
names that onnxruntime-genai expects.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine_recipes import Decoder
from engine_recipes.checkpoint import Checkpoint

from .blocks import pieces
from .graph import MICROSOFT, Graph, onnx_dtype
from .quantized import QuantizedOps
from .rope import tables

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

EMBEDDING = "transformer.vocab_embedding"
HEAD = "lm_head"
_END = (1 << 63) - 1


class ContribOps:
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
        self.graph = graph
        self.weights = weights
        self._names = frozenset(weights.names())
        self.compute = compute
        self.decoder: Decoder = weights.decoder
        self.tied = tied
        self.quantized = QuantizedOps(graph, weights)
        self._lengths(positions)
        if self.quantized.cache:
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
        """Rows of the embedding table. [B, S] -> [B, S, hidden_size]"""
        # Rows are picked first and converted then: the table itself stays as it is stored, and mapped.
        rows = self.graph.node("Gather", [self._stored(EMBEDDING), self.ids], "embedding.rows")
        return self._converted(rows, "embedding", self.weights.info(f"{EMBEDDING}.weight")[0])

    def norm(self, x: str, delta: str | None, name: str) -> tuple[str, str]:
        """Add what the block before computed, if any, and normalise. Returns (normalised, sum), both as `x`."""
        weight = self._vector(f"{name}.weight")
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

    def rms(self, x: str, weight: str, name: str) -> str:
        """RMS norm over the last axis."""
        return self.graph.node(
            "RMSNormalization", [x, weight], name, axis=-1, epsilon=self.decoder.norm_epsilon, stash_type=1
        )

    def linear(self, x: str, name: str) -> str:
        """x · weightᵀ + bias, where there is a bias. [B, S, in] -> [B, S, out]"""
        biased = f"{name}.bias" in self._names
        product = f"{name}.product" if biased else name
        if not self.quantized.linear(x, name, product):
            # weights are [out, in] and stay so: transB reads them as they lie
            self.graph.node("FusedMatMul", [x, self._matrix(name)], product, MICROSOFT, transB=1)
        return self.graph.node("Add", [product, self._vector(f"{name}.bias")], name) if biased else name

    def gated(self, gate: str, up: str, name: str) -> str:
        """silu(gate) × up"""
        silu = self.graph.node("QuickGelu", [gate], f"{name}.silu", MICROSOFT, alpha=1.0)  # x · sigmoid(1 · x)
        return self.graph.node("Mul", [silu, up], name)

    def split(self, qkv: str, name: str) -> list[str]:
        """Split into q, k and v.

        [B, S, (heads + 2 kv_heads) · head_size] -> [B, S, heads · head_size], twice [B, S, kv_heads · head_size]
        """
        import numpy as np

        d = self.decoder
        widths = [d.heads * d.head_size, d.kv_heads * d.head_size, d.kv_heads * d.head_size]
        parts = [f"{name}.{part}" for part in "qkv"]
        self.graph.nodes("Split", [qkv, self.graph.constant("qkv.widths", np.array(widths))], parts, axis=-1)
        return parts

    def normed_heads(self, qkv: str, name: str) -> tuple[str, str, str]:
        """Split as `split` does, and normalise each head of q and of k, before rope."""
        import numpy as np

        g, d = self.graph, self.decoder
        parts = self.split(qkv, name)
        by_head = g.constant("by_head", np.array([0, 0, -1, d.head_size]))
        flat = g.constant("flat", np.array([0, 0, -1]))
        for i, part in enumerate("qk"):
            heads = g.node("Reshape", [parts[i], by_head], f"{parts[i]}.heads")  # [B, S, heads, head_size]
            norm = f"{name}.{part}_layernorm"
            normed = self.rms(heads, self._vector(f"{norm}.weight"), norm)
            parts[i] = g.node("Reshape", [normed, flat], f"{norm}.flat")
        return parts[0], parts[1], parts[2]

    def attention(self, layer: int, q: str, k: str = "", v: str = "") -> str:
        """Rope, cache and causal attention; `q` alone is q, k and v packed. -> [B, S, heads · head_size]

        A quantised cache holds rounded keys and values, once rounded when they enter it, and attention sees only
        those. (TensorRT-LLM's kernels may take the unrounded ones for the prompt.)
        """
        g, d = self.graph, self.decoder
        name = f"transformer.layers.{layer}.attention"
        rope = {"do_rotary": 1, "rotary_interleaved": 0}
        angles = [self.cos, self.sin]
        if self.quantized.cache:
            q, k, v = self._rounded(layer, *((q, k, v) if k else self.split(q, name)))
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

    def _rounded(self, layer: int, q: str, k: str, v: str) -> tuple[str, str, str]:
        """q and k turned by rope, k and v rounded: what GroupQueryAttention would cache unrounded if it did rope."""
        turned = [
            self.graph.node("RotaryEmbedding", [x, self.positions, self.cos, self.sin], f"{x}.rope", MICROSOFT)
            for x in (q, k)
        ]
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
        g.node("FusedMatMul", [x, self._matrix(EMBEDDING if self.tied else HEAD)], name, MICROSOFT, transB=1)
        return name if name == "logits" else g.node("Cast", [name], "logits", to=onnx_dtype("float32"))

    def _matrix(self, name: str) -> str:
        """A weight [out, in] in the compute dtype."""
        return self._converted(self._stored(name), f"{name}.converted", self.weights.info(f"{name}.weight")[0])

    def _converted(self, value: str, name: str, dtype: str) -> str:
        return value if dtype == self.compute else self.graph.node("Cast", [value], name, to=onnx_dtype(self.compute))

    def _stored(self, name: str) -> str:
        """A weight as the checkpoint has it. Rows of padding at the end of the head are left away."""
        tensor = f"{name}.weight"
        dtype, shape = self.weights.info(tensor)
        # with AWQ vocab_size may count padding that the head has and the embedding has not
        rows = min(self.decoder.vocab_size, shape[0]) if name in (HEAD, EMBEDDING) else shape[0]
        return self.graph.weight(tensor, dtype, (rows, *shape[1:]), pieces(self.weights, tensor, rows))

    def _vector(self, name: str) -> str:
        """A norm weight or a bias, in the compute dtype."""
        return self.graph.constant(name, _as(self.weights.array(name), self.compute))

    def _small(self, name: str, array: Array) -> str:
        return self.graph.weight(name, self.compute, array.shape, [_as(array, self.compute)])


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


def _as(array: Array, dtype: str) -> Array:
    import ml_dtypes

    return array.astype(getattr(ml_dtypes, dtype, dtype))
