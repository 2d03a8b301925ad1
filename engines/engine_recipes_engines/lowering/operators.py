"""The pieces of a decoder that every ONNX dialect says alike. Knows the operators, not the model's order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine_recipes import Decoder
from engine_recipes.checkpoint import Checkpoint

from .graph import Graph, numpy_dtype, onnx_dtype
from .weights import EMBEDDING, HEAD, pieces

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]


class CommonOps:
    """The base of every engine's pieces.

    Args:
        graph: where nodes and weights go.
        weights: a TensorRT-LLM checkpoint that the engine accepted.
        compute: `float32`, `float16` or `bfloat16`: of every value between the embedding and the logits. Weights
            are stored as the checkpoint has them and converted when the engine is loaded.
        tied: the head is the embedding table, see `is_tied`.
    """

    def __init__(self, graph: Graph, weights: Checkpoint, compute: str, tied: bool) -> None:
        self.graph = graph
        self.weights = weights
        self.compute = compute
        self.decoder: Decoder = weights.decoder
        self.tied = tied
        self.names = frozenset(weights.names())

    def rows(self, ids: str) -> str:
        """Rows of the embedding table, scaled. [B, S] -> [B, S, hidden_size]"""
        import numpy as np

        # Rows are picked first and converted then: the table itself stays as it is stored, and mapped.
        rows = self.graph.node("Gather", [self._stored(EMBEDDING), ids], "embedding.rows")
        rows = self._converted(rows, "embedding", self.weights.info(f"{EMBEDDING}.weight")[0])
        scale = np.array(self.decoder.embedding_scale, np.float32)
        if scale == 1:
            return rows
        return self.graph.node("Mul", [rows, self.graph.constant("embedding.scale", self.computed(scale))], "scaled")

    def rms(self, x: str, weight: str, name: str) -> str:
        """RMS norm over the last axis."""
        return self.graph.node(
            "RMSNormalization", [x, weight], name, axis=-1, epsilon=self.decoder.norm_epsilon, stash_type=1
        )

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
            normed = self.rms(heads, self.vector(f"{norm}.weight"), norm)
            parts[i] = g.node("Reshape", [normed, flat], f"{norm}.flat")
        return parts[0], parts[1], parts[2]

    def head(self) -> str:
        """The matrix of the head, [vocab_size, hidden_size]."""
        return self._matrix(EMBEDDING if self.tied else HEAD)

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

    def vector(self, name: str) -> str:
        """A norm weight or a bias, in the compute dtype."""
        return self.graph.constant(name, self.computed(self.weights.array(name)))

    def _small(self, name: str, array: Array) -> str:
        """A table, in the compute dtype."""
        return self.graph.weight(name, self.compute, array.shape, [self.computed(array)])

    def computed(self, array: Array) -> Array:
        """A constant as it takes part in the computation: in the compute dtype."""
        return array.astype(numpy_dtype(self.compute))
