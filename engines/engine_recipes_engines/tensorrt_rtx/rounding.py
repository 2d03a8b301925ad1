"""A graph in float32 that rounds as one in 16 bits does, for CPUs, which compute in float32 alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..lowering.graph import Graph, onnx_dtype

#: What an engine rounds after it was computed. Products that are quantised on both sides are among them.
_COMPUTING = {"MatMul", "Add", "Mul", "Gelu", "RMSNormalization", "RotaryEmbedding", "Attention"}
#: Float32 in an engine, too.
_EXACT = "logits"


class RoundedGraph(Graph):
    """A `Graph` whose nodes round what they compute, and whose constants are rounded.

    Args:
        folder, written, opset: see `Graph`.
        rounded: `float16` or `bfloat16`: beyond the largest number of it is infinity. None: nothing is rounded.
    """

    def __init__(self, folder: Path, written: Callable[[int], None], opset: int, rounded: str | None) -> None:
        super().__init__(folder, written, opset)
        self.rounded = rounded

    def node(self, op: str, inputs: Sequence[str], name: str, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output, which is called `name`; and round that, where an engine would."""
        if self.rounded is None or op not in _COMPUTING or name == _EXACT:
            return super().node(op, inputs, name, domain, **attributes)
        exact = super().node(op, inputs, f"{name}.exact", domain, **attributes)
        narrow = super().node("Cast", [exact], f"{name}.narrow", to=onnx_dtype(self.rounded))
        return super().node("Cast", [narrow], name, to=onnx_dtype("float32"))
