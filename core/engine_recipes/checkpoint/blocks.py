"""Rounding blocks of weights to fewer bits. Works on arrays; knows no files.

Formulas and formats: NVIDIA ModelOpt's (`to_quantized_weight`, `pack_int4_in_uint8`), OCP 8-bit E4M3.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .cast import largest_bits, look_up
from .safetensors import numpy_dtype
from .source import not_finite

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]


def largest(array: Array) -> float:
    """The largest magnitude of float32, float16 or bfloat16 values; NaN or inf if there is one. No copy is made."""
    import numpy as np

    bits = np.array([largest_bits(array)], np.dtype(f"u{array.dtype.itemsize}"))
    return float(bits.view(array.dtype).astype(np.float64)[0])


@lru_cache(maxsize=64)
def fp8_rounder(source: str, scale: float) -> Callable[[Array], Array]:
    """A function that rounds contiguous arrays to E4M3: value / scale in float32, to nearest even, saturating.

    Args:
        source: dtype of the arrays. 16-bit formats go by a table of their 65536 values, made once a scale; numpy
            lets other threads run meanwhile, which the cast of ml_dtypes does not.
        scale: rounded to float32, as it is stored.

    Returns:
        Gives uint8 of the same shape, the bits of float8_e4m3fn.
    """
    import numpy as np

    factor = np.float32(scale)
    if source == "float32":
        return lambda array: _to_e4m3(array, factor)
    table = _to_e4m3(np.arange(1 << 16, dtype=np.uint16).view(numpy_dtype(source)).astype(np.float32), factor)
    return lambda array: look_up(table, array)


def _to_e4m3(array: Array, scale: np.float32) -> Array:
    import ml_dtypes
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        scaled = np.clip(array / scale, -448, 448)
    bits: Array = scaled.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return bits


def quantize_groups(rows: Array, prequant: Array, group_size: int, name: str) -> tuple[Array, Array]:
    """Round weights to signed 4 bits, with one scale for `group_size` neighbours in a row.

    Args:
        rows: [n, in], float32, float16 or bfloat16.
        prequant: float32 [in]: the layer's input is multiplied by it, so the weights are divided.
        group_size: divides `in`.
        name: of the layer, for messages.

    Returns:
        Scales float32 [n, in / group_size], the group's largest magnitude / 7 (1 where that is as good as 0), and
        values int8 [n, in] from -7 to 7. Weight = value × scale × prequant.

    Raises:
        RequestError: NaN or inf among the weights.
    """
    import numpy as np

    groups = (rows.astype(np.float32) / prequant).reshape(len(rows), -1, group_size)
    scales = np.maximum(groups.max(axis=2), -groups.min(axis=2))  # [n, in / group_size]
    if not np.isfinite(scales).all():
        raise not_finite(f"{name}.weight")
    scales /= np.float32(7)
    scales[scales < np.finfo(np.float32).tiny] = 1  # nothing there, or so little that float32 cannot divide by it
    groups /= scales[:, :, None]
    np.rint(groups, out=groups)
    values: Array = groups.astype(np.int8).reshape(rows.shape)  # at most 7: the scale saw to that
    return scales, values


def pack_rows(values: Array) -> Array:
    """Two rows to a byte: the low nibble is row 2i, the high one row 2i + 1, two's complement.

    int8 [n, in], n even -> uint8 [n / 2, in].
    """
    import numpy as np

    nibbles = values.view(np.uint8) & np.uint8(15)
    packed: Array = nibbles[0::2] | (nibbles[1::2] << np.uint8(4))
    return packed


def unpack_rows(packed: Array) -> Array:
    """The reverse of `pack_rows`: uint8 or int8 [n / 2, in] -> int8 [n, in]."""
    import numpy as np

    bits = packed.view(np.uint8)
    values: Array = np.empty((2 * len(bits), bits.shape[1]), np.int8)
    values[0::2] = (bits << np.uint8(4)).view(np.int8) >> 4
    values[1::2] = bits.view(np.int8) >> 4
    return values
