"""Casting weights between float32, float16 and bfloat16, to nearest even, and finding what is not finite.

Works on one block at a time; knows no files. Values are judged by their bits, which costs a tenth of a cast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .safetensors import numpy_dtype

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

#: The dtypes that weights can have in a source or an unquantised checkpoint.
FLOATS = ("float32", "float16", "bfloat16")

#: dtype -> bits of infinity without sign; anything above is NaN
_INFINITY = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}

#: (from, to) -> bits of the smallest finite value that becomes inf
_OVERFLOW = {
    ("float32", "float16"): 0x477FF000,  # 65520, halfway between the largest float16 and 65536
    ("float32", "bfloat16"): 0x7F7F8000,
    ("bfloat16", "float16"): 0x4780,  # 65536
}
_TABLE_BLOCK = 1 << 17


def largest_bits(array: Array) -> int:
    """Bits, without sign, of the value that is largest in magnitude; NaN is larger than inf. 0 for an empty array.

    Two reductions and no copy: read as signed integers the largest is the largest positive value, read as
    unsigned ones it is the largest negative value, if there is one.
    """
    import numpy as np

    if not array.size:
        return 0
    width = array.dtype.itemsize
    positive = int(array.view(np.dtype(f"i{width}")).max())
    negative = int(array.view(np.dtype(f"u{width}")).max()) & ((1 << (8 * width - 1)) - 1)
    return max(positive, negative)


@dataclass(frozen=True)
class Finding:
    """What casting a block would meet.

    Attributes:
        problem: `NaN` or `inf` if the block holds one, else empty.
        overflows: how many finite values become inf.
        largest: the largest magnitude among those, else 0.
    """

    problem: str = ""
    overflows: int = 0
    largest: float = 0.0


def examine(array: Array, target: str) -> Finding:
    """Look at a block of float32, float16 or bfloat16 before it is cast to `target`."""
    largest = largest_bits(array)
    source = array.dtype.name
    if largest >= _INFINITY[source]:
        return Finding("NaN" if largest > _INFINITY[source] else "inf")
    limit = _OVERFLOW.get((source, target))
    if limit is None or largest < limit:
        return Finding()
    import numpy as np

    bits = array.view(np.dtype(f"u{array.dtype.itemsize}"))
    sign = bits.dtype.type(1 << (8 * array.dtype.itemsize - 1))
    count = np.count_nonzero((bits & ~sign) >= limit)
    value = np.array([largest], bits.dtype).view(array.dtype).astype(np.float64)[0]
    return Finding(overflows=int(count), largest=float(value))


def caster(source: str, target: str) -> Callable[[Array], Array]:
    """A function that casts contiguous arrays of dtype `source` to `target`, rounding to nearest even.

    The same bits as `torch.Tensor.to`. Values too large become inf without a warning: `examine` first.
    """
    if source == target:
        return lambda array: array
    if "float32" in (source, target):
        return lambda array: _astype(array, target)
    if (source, target) == ("bfloat16", "float16"):
        return _bfloat16_to_float16
    return lambda array: _look_up(array, source, target)


def _astype(array: Array, target: str) -> Array:
    import numpy as np

    with np.errstate(over="ignore", under="ignore"):
        cast: Array = array.astype(numpy_dtype(target))
    return cast


@lru_cache
def _table(source: str, target: str) -> Array:
    """The 65536 results of casting one 16-bit format to the other, as bits."""
    import numpy as np

    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        values = np.arange(1 << 16, dtype=np.uint16).view(numpy_dtype(source)).astype(np.float32)
        bits: Array = values.astype(numpy_dtype(target)).view(np.uint16)
    return bits


def look_up(table: Array, array: Array) -> Array:
    """The entries of a table of 65536 for the bits of a contiguous 16-bit array, in its shape.

    Unlike the casts of ml_dtypes it lets other threads run.
    """
    import numpy as np

    bits = array.view(np.uint16).reshape(-1)
    out = np.empty(bits.size, table.dtype)
    for start in range(0, bits.size, _TABLE_BLOCK):  # take makes 8-byte indices: keep them in the cache
        part = slice(start, start + _TABLE_BLOCK)
        np.take(table, bits[part], out=out[part], mode="clip")
    result: Array = out.reshape(array.shape)
    return result


def _look_up(array: Array, source: str, target: str) -> Array:
    """Cast one 16-bit format to another by table."""
    result: Array = look_up(_table(source, target), array).view(numpy_dtype(target))
    return result


def _bfloat16_to_float16(array: Array) -> Array:
    """The common cast. By table it takes a quarter more CPU time, measured over a whole conversion.

    Magnitudes from 2**-14 to 65280 need no rounding: 7 bits of mantissa become 10 (times 8), the exponent's bias
    15 instead of 127 (minus 112 << 10), in 16-bit arithmetic that wraps. The rest, 1 weight in 400, is looked up.
    """
    import numpy as np

    word = np.uint16
    table = _table("bfloat16", "float16")
    bits = array.view(word).reshape(-1)
    out = np.empty(bits.size, word)
    scratch, odd = np.empty(_TABLE_BLOCK, word), np.empty(_TABLE_BLOCK, bool)
    for start in range(0, bits.size, _TABLE_BLOCK):
        x, y = bits[start : start + _TABLE_BLOCK], out[start : start + _TABLE_BLOCK]
        t, rest = scratch[: x.size], odd[: x.size]
        np.multiply(x, word(8), out=y)
        np.add(y, word(0x4000), out=y)  # -(112 << 10), modulo 65536
        np.bitwise_and(x, word(0x8000), out=t)
        np.bitwise_or(y, t, out=y)
        np.add(x, x, out=t)  # drops the sign
        np.subtract(t, word(2 * 0x3880), out=t)
        np.greater_equal(t, word(2 * (0x4780 - 0x3880)), out=rest)
        where = np.flatnonzero(rest)
        if where.size > x.size // 8:  # a block of zeros, for instance
            np.take(table, x, out=y, mode="clip")
        else:
            y[where] = table[x[where]]
    result: Array = out.view(np.float16).reshape(array.shape)
    return result
