"""Weight fidelity: every stored tensor, dequantised, against the source's, and against what rounding explains.

Swapped, permuted, dropped or wrongly scaled weights stand out here by an order of magnitude where behaviour hides them,
and nothing has to run. Streamed: memory is a few blocks of rows, whatever the model's size.

A value v that was rounded to nearest on a grid with the step s(v) is off by s²/12 in the mean square (Widrow and
Kollár, Quantization Noise, chapter 1) and by s/2 at most. The error of a row in units of that is about 1 where
values spread over many steps, and can never exceed √3 = 1.73.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING

from .. import events
from ..checkpoint.blocks import unpack_rows
from ..checkpoint.cast import examine, look_up
from ..checkpoint.convert import Block, forget, rows_of
from ..checkpoint.layout import Piece
from ..checkpoint.safetensors import DTYPES_BY_NAME, SafeFile, numpy_dtype
from ..checkpoint.source import SourceCheckpoint
from ..facts import cpus
from ..types import Measure
from .parts import Kind, Part

if TYPE_CHECKING:
    from ..checkpoint.safetensors import Array

_BLOCK_VALUES = 1 << 17  # a few float32 copies of a block stay in the cache
_BATCH = 256  # blocks that wait for a thread
_MOST_WORKERS = 16
#: dtype -> (smallest normal number, distance between neighbours around 1)
_GRIDS = {
    "float32": (2.0**-126, 2.0**-23),
    "float16": (2.0**-14, 2.0**-10),
    "bfloat16": (2.0**-126, 2.0**-7),
    "float8_e4m3fn": (2.0**-6, 2.0**-3),
}
#: Beyond this E4M3's next step would begin, if it had one: what is larger was cut and not rounded.
_E4M3_CUT = 464.0


@dataclass(frozen=True)
class Compared:
    """One tensor against the source's. Sums are over its values: w is the source's, d = stored - w.

    Attributes:
        name, kind: as in Part, of the unsplit checkpoint.
        linear: whether it is the weight of a layer that precisions quantise.
        count: values.
        ww, wd, dd: Σw², Σwd, Σd².
        rounding: the largest, over rows (over groups, for int4), of the root mean square of d in units of what
            rounding explains.
        where: that row.
        cut: FP8 values that are at the end of the range and should be beyond it.
        finite: no NaN and no inf is stored.
    """

    name: str
    kind: Kind
    linear: bool
    count: int = 0
    ww: float = 0.0
    wd: float = 0.0
    dd: float = 0.0
    rounding: float = 0.0
    where: str = ""
    cut: int = 0
    finite: bool = True

    def __add__(self, other: Compared) -> Compared:
        worse = other if other.rounding > self.rounding else self
        return replace(
            self,
            count=self.count + other.count,
            ww=self.ww + other.ww,
            wd=self.wd + other.wd,
            dd=self.dd + other.dd,
            rounding=worse.rounding,
            where=worse.where,
            cut=self.cut + other.cut,
            finite=self.finite and other.finite,
        )

    @property
    def error(self) -> float:
        """‖d‖ / ‖w‖ (Frobenius); infinite where the source is zero and the checkpoint is not, or is not finite."""
        if not self.finite or not math.isfinite(self.dd):
            return math.inf
        if self.ww == 0:
            return math.inf if self.dd else 0.0
        return math.sqrt(self.dd / self.ww)

    @property
    def cosine(self) -> float | None:
        """Between stored and source; 0 if only the stored is zero, None if the source is, or if it is not finite."""
        if not self.finite or self.ww == 0 or not math.isfinite(self.dd):
            return None
        stored = self.ww + 2 * self.wd + self.dd  # ‖w + d‖²
        return (self.ww + self.wd) / math.sqrt(self.ww * stored) if stored > 1e-12 * self.ww else 0.0


def compare(parts: Sequence[Part], source: SourceCheckpoint) -> list[Compared]:
    """Compare tensors with the source, each once, all its ranks together."""
    found: dict[str, Compared] = {}
    total = sum(1 for part in parts for _ in _blocks(part))
    jobs = ((part, block) for part in parts for block in _blocks(part))
    with ThreadPoolExecutor(max(2, min(_MOST_WORKERS, cpus())), "compare") as pool:
        done = 0
        while batch := list(islice(jobs, _BATCH)):
            for result in pool.map(lambda job: _compare_block(job[0], job[1], source), batch):
                found[result.name] = found[result.name] + result if result.name in found else result
            done += len(batch)
            events.progress("comparing weights", done, total, "blocks")
    return list(found.values())


def measures(tensors: Sequence[Compared]) -> tuple[Measure, ...]:
    """The worst of each kind, with the tensor's name; what no tensor has is left out."""
    quantised = [t for t in tensors if t.kind != "plain"]
    plain = [t for t in tensors if t.kind == "plain"]
    found = []
    for name, group in (("weight_error", quantised), ("plain_error", plain)):
        if group:
            worst = max(group, key=lambda t: t.error)
            found.append(Measure(name, worst.error, note=worst.name))
    cosines = [(t.cosine, t.name) for t in tensors if t.cosine is not None]
    if cosines:
        found.append(Measure("weight_cosine", min(cosines)[0], note=min(cosines)[1]))
    if tensors:
        worst = max(tensors, key=lambda t: t.rounding)
        where = f", {worst.where}" if worst.where else ""
        found.append(Measure("weight_rounding", worst.rounding, note=worst.name + where))
    eights = [(t.cut / max(t.count, 1), t.name) for t in tensors if t.kind == "fp8"]
    if eights:
        found.append(Measure("fp8_saturation", max(eights)[0], note=max(eights)[1]))
    return tuple(found)


def unfinite(file: SafeFile, name: str) -> str:
    """`NaN` or `inf` if a float32, float16 or bfloat16 tensor holds one. Its pages are given back."""
    flat = file.array(name).reshape(-1)
    found = ""
    for start in range(0, flat.size, _BLOCK_VALUES):
        found = found or examine(flat[start : start + _BLOCK_VALUES], flat.dtype.name).problem
        file.forget(name, start * flat.itemsize, (start + _BLOCK_VALUES) * flat.itemsize)
    return found


@dataclass(frozen=True)
class _Rows(Block):
    """A block of rows, and the row of the stored tensor, unpacked, that it begins at."""

    first: int

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.stop - self.start)


def _blocks(part: Part) -> Iterator[_Rows]:
    first = 0
    for piece in part.spec.pieces:
        width = math.prod(piece.shape[1:])
        step = max(_BLOCK_VALUES // width & ~1, 2)  # even: int4 packs two rows to a byte
        for start in range(piece.rows[0], piece.rows[1], step):
            stop = min(start + step, piece.rows[1])
            yield _Rows(part.spec, piece, start, stop, first)
            first += stop - start
    if part.spec.pad_rows:
        yield _Rows(part.spec, None, 0, part.spec.pad_rows, first)


def _compare_block(part: Part, block: _Rows, source: SourceCheckpoint) -> Compared:
    import numpy as np

    with np.errstate(all="ignore"):
        found = _WAYS[part.kind](part, block, _source_rows(part, block, source))
    forget(source, block)
    packed = 2 if part.kind == "int4" else 1
    row = part.info.nbytes // part.info.shape[0]
    part.file.forget(part.spec.name, block.first // packed * row, (block.rows.stop + 1) // packed * row)
    return found


def _source_rows(part: Part, block: _Rows, source: SourceCheckpoint) -> Array:
    """What was rounded, see `rows_of`, [rows, in], one row for a vector; zeros where the checkpoint is padded."""
    import numpy as np

    if block.piece is None:
        return np.zeros((block.stop, *part.spec.shape[1:]), np.float32)
    return np.atleast_2d(rows_of(source, block))


def _plain(part: Part, block: _Rows, rows: Array) -> Compared:
    import numpy as np

    stored = np.atleast_2d(part.file.array(part.spec.name)[block.rows])
    if examine(stored, stored.dtype.name).problem:
        return _empty(part, finite=False)
    w = _float32(rows)
    if rows.dtype == stored.dtype and np.array_equal(_bits(rows), _bits(stored)):
        return replace(_empty(part), count=w.size, ww=float(_sums(w, w).sum()))
    v = _float32(stored)
    d = v - w
    return _measured(part, block, w, d, d / _steps(v, stored.dtype.name))


def _fp8(part: Part, block: _Rows, rows: Array) -> Compared:
    import numpy as np

    codes = part.file.array(part.spec.name)[block.rows].view(np.uint8)
    scale = part.scale("weights_scaling_factor")
    magnitudes = codes & np.uint8(0x7F)
    most = int(magnitudes.max())
    if most == 0x7F:  # E4M3's only NaN; it has no infinity
        return _empty(part, finite=False)
    w = _float32(rows) / scale
    v = np.take(_e4m3(), codes, mode="clip")
    d = v - w
    cut = int(np.count_nonzero(np.abs(w[magnitudes == 0x7E]) > _E4M3_CUT)) if most == 0x7E else 0
    found = _measured(part, block, w, d, d / _steps(v, "float8_e4m3fn"))
    factor = float(scale[0]) ** 2
    return replace(found, ww=found.ww * factor, wd=found.wd * factor, dd=found.dd * factor, cut=cut)


def _int4(part: Part, block: _Rows, rows: Array) -> Compared:
    packed = part.file.array(part.spec.name)[block.first // 2 : block.rows.stop // 2]
    return _whole_numbers(part, block, rows, unpack_rows(packed))


def _int8(part: Part, block: _Rows, rows: Array) -> Compared:
    return _whole_numbers(part, block, rows, part.file.array(part.spec.name)[block.rows])


def _whole_numbers(part: Part, block: _Rows, rows: Array, stored: Array) -> Compared:
    """Weights stored as int8 [rows, in], with one scale for a row, [rows], or for each group of it, [rows, groups]."""
    import numpy as np

    scales = part.scale("weights_scaling_factor")[block.rows]
    scales = scales.reshape(len(scales), -1)
    q = stored.astype(np.float32).reshape(*scales.shape, -1)  # [rows, groups, group]
    step = np.broadcast_to(scales[:, :, None], q.shape)
    if f"{part.module}.prequant_scaling_factor" in part.file.tensors:
        step = step * part.scale("prequant_scaling_factor").reshape(1, *q.shape[1:])
    w = _float32(rows).reshape(q.shape)
    r = q - w / step
    groups = (-1, q.shape[2])
    return _measured(part, block, w.reshape(groups), (r * step).reshape(groups), r.reshape(groups), scales.shape[1])


_WAYS: dict[Kind, Callable[[Part, _Rows, Array], Compared]] = {
    "plain": _plain,
    "fp8": _fp8,
    "int8": _int8,
    "int4": _int4,
}


def _empty(part: Part, finite: bool = True) -> Compared:
    return Compared(part.name, part.kind, part.is_linear, finite=finite)


def _measured(part: Part, block: _Rows, w: Array, d: Array, r: Array, groups: int = 1) -> Compared:
    """The sums and the worst row.

    Args:
        w, d: source and difference, float32 [rows × groups, values], in units in which they do not overflow.
        r: the difference in steps.
    """
    import numpy as np

    ww, dd, rr = _sums(w, w), _sums(d, d), _sums(r, r)
    rounding = np.sqrt(rr * (12 / w.shape[1]))
    empty = np.flatnonzero((ww == 0) & (rr > 0))
    rounding[empty[~w[empty].any(axis=1)]] = np.inf  # a row of zeros has nothing to round
    rounding[np.isnan(rounding)] = np.inf
    worst = int(rounding.argmax())
    total = float(dd.sum())
    return Compared(
        part.name,
        part.kind,
        part.is_linear,
        w.size,
        float(ww.sum()),
        float(_sums(w, d).sum()),
        total if math.isfinite(total) else math.inf,
        float(rounding[worst]),
        _where(block.piece, block.start + worst // groups, worst % groups if groups > 1 else None),
    )


def _where(piece: Piece | None, row: int, group: int | None) -> str:
    if piece is None:
        return "in what pads it"
    place = f"row {row} of {piece.name}" if piece.columns is not None else piece.name
    return place if group is None else f"group {group} of {place}"


def _sums(a: Array, b: Array) -> Array:
    """Σ a·b of each row, float64 [rows], accumulated in float32 where that neither overflows nor vanishes."""
    import numpy as np

    sums: Array = np.einsum("ij,ij->i", a, b).astype(np.float64)
    odd = np.flatnonzero(~((np.abs(sums) > 1e-30) & (np.abs(sums) < 1e30)))
    if odd.size:
        sums[odd] = np.einsum("ij,ij->i", a[odd].astype(np.float64), b[odd].astype(np.float64))
    return sums


def _steps(values: Array, dtype: str) -> Array:
    """The distance to the neighbours of float32 values that a format holds exactly: 2^floor(log2|v|) · epsilon."""
    import numpy as np

    smallest, epsilon = _GRIDS[dtype]
    steps: Array = (values.view(np.uint32) & np.uint32(0x7F800000)).view(np.float32)  # the mantissa dropped
    np.maximum(steps, np.float32(smallest), out=steps)
    steps *= np.float32(epsilon)
    return steps


def _float32(array: Array) -> Array:
    """Exactly the same values, float32 and contiguous."""
    import numpy as np

    array = np.ascontiguousarray(array)
    if array.dtype == np.float32:
        return array
    if array.dtype == np.float16:
        return look_up(_halves(), array)
    shifted: Array = array.view(np.uint16).astype(np.uint32)
    shifted <<= np.uint32(16)  # bfloat16 is the first half of a float32
    return shifted.view(np.float32)


@lru_cache
def _halves() -> Array:
    import numpy as np

    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


@lru_cache
def _e4m3() -> Array:
    import numpy as np

    with np.errstate(invalid="ignore"):
        return np.arange(256, dtype=np.uint8).view(numpy_dtype("float8_e4m3fn")).astype(np.float32)


def _bits(array: Array) -> Array:
    import numpy as np

    return np.ascontiguousarray(array).view(f"u{DTYPES_BY_NAME[array.dtype.name]}")
