"""Linear layers and KV caches of quantised checkpoints as QuantizeLinear and DequantizeLinear.

Compilers look for these pairs around a multiplication and replace all three by one that takes the narrow numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from engine_recipes.checkpoint import Checkpoint

from ..lowering.graph import onnx_dtype
from ..lowering.quantization import E4M3, cache_dtype, cache_scale, check_known, scale_of
from ..lowering.weights import pieces, repack

if TYPE_CHECKING:
    import numpy as np

    from .operators import StandardOps

    Array = np.ndarray[Any, np.dtype[Any]]

ALGORITHMS = ("FP8", "W4A16_AWQ")
#: Weights in a group, of W4A16_AWQ.
GROUPS = (64, 128)


class QuantizedOps:
    """The quantised pieces of a decoder.

    Args:
        ops: the others.
    """

    def __init__(self, ops: StandardOps) -> None:
        self._ops = ops
        self._graph = ops.graph
        self._weights = ops.weights
        self._inputs: dict[tuple[str, bytes], str] = {}
        self.cache: str | None = cache_dtype(ops.weights)

    def factors(self, x: str, name: str) -> tuple[str, str]:
        """What a quantised layer multiplies. Returns the input [B, S, in] and the weight [out, in]."""
        return {"FP8": self._fp8, "W4A16_AWQ": self._awq}[self._weights.quantization["quant_algo"]](x, name)

    def rounded_cache(self, x: str, layer: int, name: str) -> str:
        """New keys (after rope) or values, rounded to what the cache of the checkpoint can hold; of the same shape."""
        if self.cache is None:
            return x
        at = f"transformer.layers.{layer}.attention"
        scale = self._graph.constant(f"{at}.kv_cache.scale", cache_scale(self._weights, at))
        return self.widened(self.rounded(x, scale, f"{name}.narrow", self.cache), scale, name)

    def rounded(self, x: str, scale: str, name: str, dtype: str = E4M3) -> str:
        """x / scale to the nearest number of `dtype`; beyond its ends to the end."""
        import ml_dtypes
        import numpy as np

        zero = self._graph.constant(f"zero.{dtype}", np.zeros((), getattr(ml_dtypes, dtype, dtype)))
        return self._graph.node("QuantizeLinear", [x, scale, zero], name, saturate=1)

    def widened(self, x: str, scale: str, name: str, **blocks: Any) -> str:
        """x × scale, in the compute dtype. Scales are float32: half precision would lose 3 digits of small ones."""
        to = onnx_dtype(self._ops.compute)
        return self._graph.node("DequantizeLinear", [x, scale], name, output_dtype=to, **blocks)

    def _fp8(self, x: str, name: str) -> tuple[str, str]:
        """Both factors in E4M3."""
        g, weight = self._graph, f"{name}.weight"
        given = scale_of(self._weights, f"{name}.activation_scaling_factor")
        key = (x, given.tobytes())
        if key not in self._inputs:  # fc and gate mostly share theirs
            scale = g.constant(f"{name}.activation_scaling_factor", given)
            self._inputs[key] = self.widened(self.rounded(x, scale, f"{name}.rounded"), scale, f"{name}.input")
        shape = self._weights.info(weight)[1]
        stored = g.weight(weight, E4M3, shape, pieces(self._weights, weight, shape[0]))
        scale = g.constant(f"{name}.weights_scaling_factor", scale_of(self._weights, f"{name}.weights_scaling_factor"))
        return self._inputs[key], self.widened(stored, scale, f"{name}.wide")

    def _awq(self, x: str, name: str) -> tuple[str, str]:
        """4-bit weights in groups along `in`, whose inputs are multiplied by a vector first."""
        g, weights, factors = self._graph, self._weights, f"{name}.weights_scaling_factor"
        half, width = weights.info(f"{name}.weight")[1]
        rows, count = weights.info(factors)[1]
        packed = (repack(piece.view("uint8")) for piece in pieces(weights, f"{name}.weight", half))
        stored = g.weight(f"{name}.weight", "int4", (rows, width), packed)
        scale = self._table(factors, (rows, count))
        return self._prescaled(x, name), self.widened(stored, scale, f"{name}.wide", axis=1, block_size=width // count)

    def _prescaled(self, x: str, name: str) -> str:
        vector = f"{name}.prequant_scaling_factor"
        if vector not in self._ops.names:
            return x
        factor = self._weights.array(vector)  # [in]
        key = (x, factor.tobytes())
        if key not in self._inputs:  # fc and gate mostly share theirs
            self._inputs[key] = self._graph.node("Mul", [x, self._ops.vector(vector)], f"{name}.input")
        return self._inputs[key]

    def _table(self, name: str, shape: tuple[int, int]) -> str:
        parts: Iterable[Array] = pieces(self._weights, name, shape[0])
        return self._graph.weight(name, self._ops.compute, shape, (self._ops.computed(part) for part in parts))


def check_algorithms(weights: Checkpoint) -> None:
    """Refuse what cannot be lowered, before anything is written. Raises RequestError."""
    check_known(weights, "tensorrt-rtx", ALGORITHMS, GROUPS)
