"""Linear layers and KV caches of quantised TensorRT-LLM checkpoints: the rounding that a GPU does, as operators.

Which tensors an algorithm has, and what they mean: docs of TensorRT-LLM, "Precision" and "Checkpoint". With weight-only
algorithms the checkpoint's weights are still 16-bit. Values between operators are float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine_recipes import RequestError
from engine_recipes.checkpoint import Checkpoint

from ..lowering.graph import MICROSOFT, Graph, itemsize, onnx_dtype
from ..lowering.quantization import E4M3, cache_dtype, cache_scale, check_known, scale_of
from ..lowering.weights import pieces
from .blocks import block_count, block_of, pack, quantize_rows, repack_awq

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

#: quant_algo -> bits, of weights that trtllm-build quantises while it loads them.
WEIGHT_ONLY = {"W8A16": 8, "W4A16": 4}
ALGORITHMS = ("FP8", "W4A16_AWQ", "W8A8_SQ_PER_CHANNEL", *WEIGHT_ONLY)
#: quant_algo -> what it rounds the inputs of linear layers to.
ACTIVATIONS = {"FP8": E4M3, "W8A8_SQ_PER_CHANNEL": "int8"}
#: Of MatMulNBits: 1 multiplies in float32, as "A16" has it; 4 would round activations to 8 bits. Measured on SmolLM2
#: with AWQ, 4 decodes 17 % faster and is off by a KL divergence of 0.009, where 1 is exact (below 1e-6).
ACCURACY_LEVEL = 1
#: Values in a group, as MatMulNBits knows them.
GROUPS = (16, 32, 64, 128, 256)


class QuantizedOps:
    """The quantised pieces of a decoder.

    Shapes: B sequences, S new tokens each.

    Args:
        graph: where nodes and weights go.
        weights: a checkpoint that `check_algorithms` accepted.
    """

    def __init__(self, graph: Graph, weights: Checkpoint) -> None:
        self._graph = graph
        self._weights = weights
        self._names = frozenset(weights.names())
        self._inputs: dict[tuple[str, bytes], str] = {}
        self.cache: str | None = cache_dtype(weights)
        activations = ACTIVATIONS.get(weights.quantization["quant_algo"])
        #: types that activations or the cache are rounded to
        self.rounding: list[str] = sorted({dtype for dtype in (activations, self.cache) if dtype})

    def linear(self, x: str, name: str, out: str) -> bool:
        """Add x · weightᵀ, called `out`, if the layer is quantised. [B, S, in] -> [B, S, out]

        Returns:
            False, with nothing added, if the weight is to be multiplied as it is.
        """
        if not self._weights.is_quantized(name):
            return False
        add = {"FP8": self._fp8, "W4A16_AWQ": self._awq, "W8A16": self._int8, "W4A16": self._int4}
        add["W8A8_SQ_PER_CHANNEL"] = self._smoothquant
        add[self._weights.quantization["quant_algo"]](x, name, out)
        return True

    def rounded_cache(self, value: str, layer: int, name: str) -> str:
        """New keys (after rope) or values, rounded to what the cache can hold. [B, S, kv_heads · head_size], both"""
        if self.cache is None:
            return value
        g = self._graph
        attention = f"transformer.layers.{layer}.attention"
        scale = g.constant(f"{attention}.kv_cache.scale", cache_scale(self._weights, attention))
        return g.node("Mul", [self._rounded(value, scale, self.cache, f"{name}.steps"), scale], name)

    def _fp8(self, x: str, name: str, out: str) -> None:
        """Both factors in E4M3. Their products are summed first and scaled then, as on a GPU."""
        g, weight = self._graph, f"{name}.weight"
        given = scale_of(self._weights, f"{name}.activation_scaling_factor")
        if (x, given.tobytes()) not in self._inputs:  # fc and gate mostly share theirs
            scale = g.constant(f"{name}.activation_scaling_factor", given)
            self._inputs[x, given.tobytes()] = self._rounded(x, scale, E4M3, f"{name}.input")
        shape = self._weights.info(weight)[1]
        stored = g.weight(weight, E4M3, shape, pieces(self._weights, weight, shape[0]))
        # This Cast is done once, when the engine is loaded; DequantizeLinear would be repeated for every token.
        wide = g.node("Cast", [stored], f"{name}.wide", to=onnx_dtype("float32"))
        alpha = float(given * scale_of(self._weights, f"{name}.weights_scaling_factor"))
        g.node("FusedMatMul", [self._inputs[x, given.tobytes()], wide], out, MICROSOFT, transB=1, alpha=alpha)

    def _smoothquant(self, x: str, name: str, out: str) -> None:
        """Both factors in 8 bits, inputs multiplied by a vector first. Products are summed in int32 and scaled then."""
        import numpy as np

        # Zero is 128 on both sides: onnxruntime has fast kernels for unsigned inputs only, and without VNNI (AVX2)
        # those for unsigned times signed saturate at 16 bits on the way.
        g = self._graph
        zero = g.constant("uint8.zero", np.array(128, np.uint8))
        given = scale_of(self._weights, f"{name}.activation_scaling_factor")
        scale = g.constant(f"{name}.activation_scaling_factor", given)
        if f"{name}.prequant_scaling_factor" in self._names:
            x = self._prescaled(x, name)
        if (x, given.tobytes()) not in self._inputs:
            rounded = g.node("QuantizeLinear", [x, scale, zero], f"{name}.input.uint8", MICROSOFT)
            self._inputs[x, given.tobytes()] = rounded
        rows, width = self._weights.info(f"{name}.weight")[1]
        stored = g.weight(f"{name}.weight", "uint8", (width, rows), self._transposed(f"{name}.weight"))
        scales = pieces(self._weights, f"{name}.weights_scaling_factor", rows)
        steps = g.weight(f"{name}.weights_scaling_factor", "float32", (rows,), scales)
        factors = [self._inputs[x, given.tobytes()], stored]
        g.node("MatMulIntegerToFloat", [*factors, scale, steps, zero, zero], out, MICROSOFT)

    def _transposed(self, name: str) -> Iterator[Array]:
        """An int8 weight [out, in] as [in, out], some rows at a time, uint8 around 128."""
        array = self._weights.array(name)
        step = max(1, (4 << 20) // len(array))
        for start in range(0, array.shape[1], step):
            yield array[:, start : start + step].T.view("uint8") ^ 0x80
        self._weights.forget(name)

    def _awq(self, x: str, name: str, out: str) -> None:
        """4-bit weights in groups along `in`, whose inputs are multiplied by a vector first."""
        weights, factors = self._weights, f"{name}.weights_scaling_factor"
        half, width = weights.info(f"{name}.weight")[1]
        rows, count = weights.info(factors)[1]
        if f"{name}.prequant_scaling_factor" in self._names:
            x = self._prescaled(x, name)
        packed = (repack_awq(piece) for piece in pieces(weights, f"{name}.weight", half))
        scales = (piece.astype("float32") for piece in pieces(weights, factors, rows))
        self._multiply_blocks(x, _Blocks(name, rows, width, width // count), packed, scales, out)

    def _prescaled(self, x: str, name: str) -> str:
        import numpy as np

        factor = self._weights.array(f"{name}.prequant_scaling_factor").astype(np.float32)  # [in]
        key = (x, factor.tobytes())
        if key not in self._inputs:  # fc and gate mostly share theirs
            vector = self._graph.constant(f"{name}.prequant_scaling_factor", factor)
            self._inputs[key] = self._graph.node("Mul", [x, vector], f"{name}.input")
        return self._inputs[key]

    def _int8(self, x: str, name: str, out: str) -> None:
        """8-bit weights, one scale for each output: multiplied by the whole numbers, and scaled then."""
        # MatMulNBits is fast with 8 bits only if it rounds activations to 8 bits too; measured on SmolLM2, that costs
        # more (KL divergence 0.0054) than the weights' own rounding (0.0037).
        g = self._graph
        shape = self._weights.info(f"{name}.weight")[1]
        scales: list[Array] = []
        stored = g.weight(f"{name}.weight", "int8", shape, self._rows(name, 8, scales))
        wide = g.node("Cast", [stored], f"{name}.wide", to=onnx_dtype("float32"))
        g.node("FusedMatMul", [x, wide], f"{name}.unscaled", MICROSOFT, transB=1)
        scale = g.weight(f"{name}.weights_scaling_factor", "float32", shape[:1], scales)
        g.node("Mul", [f"{name}.unscaled", scale], out)

    def _int4(self, x: str, name: str, out: str) -> None:
        """4-bit weights, one scale for each output, repeated for every block of its row."""
        import numpy as np

        rows, width = self._weights.info(f"{name}.weight")[1]
        blocks = _Blocks(name, rows, width, block_of(width))
        scales: list[Array] = []
        packed = (pack(piece, blocks.block) for piece in self._rows(name, 4, scales))
        # read after `packed`, when `scales` is filled
        repeated = (np.repeat(scale[:, None], blocks.count, axis=1) for scale in scales)
        self._multiply_blocks(x, blocks, packed, repeated, out)

    def _rows(self, name: str, bits: int, scales: list[Array]) -> Iterator[Array]:
        """Quantise a 16-bit weight. Yields int8 rows; their scales, float32, are added to the list."""
        for piece in pieces(self._weights, f"{name}.weight", self._weights.info(f"{name}.weight")[1][0]):
            quantized, scale = quantize_rows(piece, bits)
            scales.append(scale)
            yield quantized

    def _multiply_blocks(
        self, x: str, blocks: _Blocks, packed: Iterable[Array], scales: Iterable[Array], out: str
    ) -> None:
        g, b = self._graph, blocks
        weight = g.weight(f"{b.name}.weight", "uint8", (b.rows, b.count, b.block // 2), packed)
        scale = g.weight(f"{b.name}.weights_scaling_factor", "float32", (b.rows, b.count), scales)
        sizes = {"N": b.rows, "K": b.width, "bits": 4, "block_size": b.block}
        g.node("MatMulNBits", [x, weight, scale], out, MICROSOFT, **sizes, accuracy_level=ACCURACY_LEVEL)

    def _rounded(self, x: str, scale: str, dtype: str, name: str) -> str:
        """x / scale, rounded to the nearest number of `dtype`, halves to even; beyond its ends to the end. float32"""
        import numpy as np

        # QuantizeLinear would do the same, but onnxruntime 1.23 has none in the opset that RMSNormalization needs
        g = self._graph
        ratio = g.node("Div", [x, scale], f"{name}.ratio")
        if dtype == "int8":
            ends = [g.constant(f"int8.{end}", np.array(end, np.float32)) for end in (-128, 127)]
            return g.node("Clip", [g.node("Round", [ratio], f"{name}.whole"), *ends], name)
        small = g.node("Cast", [ratio], f"{name}.{dtype}", to=onnx_dtype(dtype), saturate=1)
        return g.node("Cast", [small], name, to=onnx_dtype("float32"))


@dataclass(frozen=True)
class _Blocks:
    """A 4-bit weight [rows, width] whose rows are cut into blocks of `block` values."""

    name: str
    rows: int
    width: int
    block: int

    @property
    def count(self) -> int:
        """Blocks of a row."""
        return block_count(self.width, self.block)


def check_algorithms(weights: Checkpoint, target: str) -> None:
    """Refuse what cannot be lowered, before anything is written.

    Raises:
        RequestError: an unknown algorithm or variant of one, or a quantised checkpoint for a GPU.
    """
    check_known(weights, "onnxruntime", ALGORITHMS, GROUPS)
    for key in ("quant_algo", "kv_cache_quant_algo"):
        algorithm = weights.quantization.get(key)
        if algorithm and target != "cpu":
            raise RequestError(
                f"the onnxruntime engine cannot lower {key} {algorithm} for {target}",
                "choose --target cpu to judge the checkpoint, or another engine to run it on a GPU",
            )


def stored_bytes(weights: Checkpoint, tensor: str) -> int:
    """Bytes that a tensor of the checkpoint takes in the engine, with the scales that lowering adds."""
    dtype, shape = weights.info(tensor)
    name, _, kind = tensor.rpartition(".")
    quantized = kind == "weight" and weights.is_quantized(name)
    bits = WEIGHT_ONLY.get(weights.quantization["quant_algo"], 0) if quantized else 0
    scale = itemsize("float32")
    if bits == 8:
        return shape[0] * (shape[1] + scale)
    if bits == 4:
        block = block_of(shape[1])
        return shape[0] * block_count(shape[1], block) * (block // 2 + scale)
    return itemsize(dtype) * math.prod(shape)
