"""Weights in the blocks that onnxruntime's MatMulNBits multiplies: packing and quantizing, in numpy alone.

MatMulNBits (domain com.microsoft) takes a 4-bit weight [out, in] as blocks along `in`, each with a scale of its own:
uint8 [out, blocks, block / 2], unsigned with 8 for zero; of the two values in a byte the low half is the earlier one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..lowering.weights import repack

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

#: Blocks that MatMulNBits has fast kernels for, the cheapest in scales first.
BLOCKS = (128, 64, 32)


def block_of(width: int) -> int:
    """Block for rows of `width` values that share a scale: the largest that divides it, else the smallest."""
    return next((block for block in BLOCKS if width % block == 0), BLOCKS[-1])


def block_count(width: int, block: int) -> int:
    """Blocks of a row; the last may be padded."""
    return -(-width // block)


def repack_awq(packed: Array) -> Array:
    """From TensorRT-LLM's packing, two rows a byte, to MatMulNBits', two columns a byte.

    Args:
        packed: int8 [out / 2, in], `in` even: the low half of a byte is row 2i, the high half row 2i + 1; signed.

    Returns:
        uint8 [out, in / 2].
    """
    import numpy as np

    return repack(packed.view(np.uint8) ^ 0x88)  # flips both sign bits: two's complement -8 … 7 becomes 0 … 15


def quantize_rows(weight: Array, bits: int) -> tuple[Array, Array]:
    """Quantize each row symmetrically, as TensorRT-LLM does for W8A16 and W4A16 when it builds an engine.

    Its rules (`symmetric_quantize` in cutlass_preprocessors.cpp): scale = largest magnitude / 2^(bits - 1), so the
    largest positive value is clipped; halves are rounded away from zero; the scale is stored in the weight's dtype,
    but values are divided by it before that rounding.

    Args:
        weight: [out, in], floating point.
        bits: 4 or 8.

    Returns:
        int8 [out, in] and float32 [out], which multiplies it.
    """
    import numpy as np

    half = 1 << (bits - 1)
    wide = weight.astype(np.float32)
    scale = np.abs(wide).max(axis=1) * np.float32(1 / half)  # [out]
    wide /= np.where(scale > 0, scale, np.float32(1))[:, None]
    rounded = np.trunc(wide + np.copysign(np.float32(0.5), wide))
    return np.clip(rounded, -half, half - 1).astype(np.int8), scale.astype(weight.dtype).astype(np.float32)


def pack(quantized: Array, block: int) -> Array:
    """Pack 4-bit values as MatMulNBits wants them; rows are padded with zeros to whole blocks.

    Args:
        quantized: int8 [out, in], -8 … 7.
        block: values that share a scale.

    Returns:
        uint8 [out, blocks · block / 2].
    """
    import numpy as np

    rows, width = quantized.shape
    shifted = np.full((rows, block_count(width, block) * block), 8, np.uint8)
    shifted[:, :width] = quantized.view(np.uint8) + np.uint8(8)  # wraps: -8 + 8 = 0
    packed: Array = shifted[:, ::2] | (shifted[:, 1::2] << 4)
    return packed
