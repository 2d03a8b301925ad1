"""Stage 1 for any quantization: a precision makes the stored parts of one linear layer, core does all the rest.

Core reads the source, joins q, k and v, splits over ranks, streams, and writes what is not quantised and
`config.json`. What an algorithm stores is known here by its name (`formats.py`), or the caller says it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import RequestError, StageFailed
from .blocks import largest
from .convert import AUTHORS, ConvertStats, Dtype, blocks, cast_job, not_as_said
from .exclude import excluded_linears
from .formats import WEIGHT_ONLY, LinearPart, Scheme, Stored, check_parts, short, stored
from .layout import TensorSpec, layout
from .quantize import unquantised_dtype
from .ranks import room_for, write_ranks
from .safetensors import numpy_dtype
from .source import SourceCheckpoint, not_finite
from .streaming import Job

if TYPE_CHECKING:
    import numpy as np

    from .safetensors import Array

_WORKERS = 2  # each holds a linear layer, and numpy computes with one thread


@dataclass(frozen=True)
class Linear:
    """A linear layer to quantise, whole, however many ranks there will be.

    Attributes:
        name: as in a checkpoint that is not split, `transformer.layers.0.attention.qkv`.
        sources: the Hugging Face layers whose weights are stacked in it: q, k and v, or only one.
        weight: [out, in], in the source's dtype, finite. Read-only.
        dtype: numpy's, of what is not quantised: `prequant_scaling_factor` has it, for instance.
    """

    name: str
    sources: tuple[str, ...]
    weight: Array
    dtype: np.dtype[Any]


#: Gives the tensors of a quantised linear layer: the last part of the name, `weight` -> array.
Quantise = Callable[[Linear], Mapping[str, "Array"]]


def quantize_linears(
    source: SourceCheckpoint,
    out: Path,
    algorithm: str,
    quantise: Quantise,
    *,
    parts: Sequence[LinearPart] = (),
    dtype: Dtype | Literal["auto"] = "auto",
    tp_size: int = 1,
    pp_size: int = 1,
    exclude: Sequence[str] = (),
) -> ConvertStats:
    """Write `rank<r>.safetensors` for each rank and then `config.json` into `out`.

    Args:
        source: opened source; its pages are given back as they are used.
        out: an existing folder without rank files.
        algorithm: `quant_algo`.
        quantise: gives the stored parts of a layer by name, whole, in the dtypes and shapes that the parts say. It is
            called in threads, and once for each rank, so the same layer must give the same arrays.
        parts: what is stored for each layer. Needed for an algorithm that core does not know, and only for that; it is
            kept in `config.json`, by which such a checkpoint is verified and its ranks are joined.
        dtype: of what is not quantised; `auto` is the source's, bfloat16 for float32.
        tp_size, pp_size: the mapping.
        exclude: linear layers that stay in `dtype`, see `excluded_linears`.

    Raises:
        RequestError: parts that cannot be stored, a mapping or exclusion that does not fit, NaN or inf in the source.
        StageFailed: `quantise` gave something else than the parts, or NaN or inf.
        MachineError: not enough free disk.
    """
    _check_said(algorithm, parts)
    excluded = excluded_linears(source.decoder, exclude, pp_size)
    scheme = Scheme(algorithm, excluded=excluded, parts=tuple(parts))
    if algorithm in WEIGHT_ONLY or not scheme.linear_parts or (parts and scheme.is_known):
        known = "has its parts already" if scheme.is_known else "is not known, and no parts are given"
        raise RequestError(f"the algorithm {algorithm} {known}", AUTHORS)
    kept = unquantised_dtype(source, dtype)
    try:
        writer = _Writer(source, Scheme(algorithm, parts=tuple(parts)), kept, quantise)
    except RequestError as error:  # it does not fit however it is split
        raise RequestError(error.message, "this precision cannot hold this model: choose another") from None
    ranks = [list(stored(specs, scheme, kept)) for specs in layout(source.decoder, tp_size, pp_size)]
    return write_ranks(writer, out, scheme, (tp_size, pp_size), ranks, room_for(ranks, out))


def _check_said(algorithm: object, parts: Sequence[LinearPart]) -> None:
    if not isinstance(algorithm, str) or not algorithm:
        raise RequestError(f"{short(algorithm)} is no name of an algorithm", AUTHORS)
    try:
        check_parts(parts)
    except ValueError as error:
        raise RequestError(f"the algorithm {algorithm} stores {error}", AUTHORS) from None


class _Writer:
    """Turns the stored tensors of a rank into jobs."""

    def __init__(self, source: SourceCheckpoint, scheme: Scheme, dtype: Dtype, quantise: Quantise) -> None:
        self.source, self.dtype, self.quantise = source, dtype, quantise
        self.workers, self.stats = _WORKERS, ConvertStats()
        (whole,) = layout(source.decoder)
        self._whole: dict[tuple[str, str], list[Stored]] = {}  # layer -> its parts, unsplit
        for tensor in stored(whole, scheme, dtype):
            if tensor.part != "plain":
                self._whole.setdefault(_layer_of(tensor), []).append(tensor)

    def jobs(self, tensors: Sequence[Stored]) -> Iterator[Iterable[Job]]:
        """The jobs of each tensor, in order."""
        made: dict[str, Array] = {}
        for tensor in tensors:
            if tensor.part == "plain":
                found = blocks(self.source, [tensor.base], self.dtype)
                yield [cast_job(self.source, block, self.dtype, self.stats) for block in found]
                continue
            layer = self._whole[_layer_of(tensor)]
            if tensor.part == layer[0].part:
                made = {}
                yield [self._first(tensor, layer, made)]
            else:
                yield [Job(tensor.name, self._taken(tensor, layer, made), last=True)]

    def _first(self, tensor: Stored, layer: Sequence[Stored], made: dict[str, Array]) -> Job:
        """Quantises the layer, and gives its first part."""

        def make() -> Array:
            made.update(self._quantised(layer))
            return self._taken(tensor, layer, made)()

        def written() -> None:
            for piece in layer[0].base.pieces:
                self.source.forget(piece.name)

        return Job(tensor.name, make, written)

    def _taken(self, tensor: Stored, layer: Sequence[Stored], made: dict[str, Array]) -> Callable[[], Array]:
        import numpy as np

        (whole,) = (part for part in layer if part.part == tensor.part)
        return lambda: np.ascontiguousarray(_cut(made.pop(tensor.part), whole.spec, tensor.spec)).view(np.uint8)

    def _quantised(self, layer: Sequence[Stored]) -> Mapping[str, Array]:
        base = layer[0].base
        weight = self._weight(base)
        sources = tuple(piece.name.removesuffix(".weight") for piece in base.pieces)
        name = base.name.removesuffix(".weight")
        given = self.quantise(Linear(name, sources, weight, numpy_dtype(self.dtype)))
        expected = {part.part: part for part in layer}
        if not isinstance(given, Mapping) or given.keys() != expected.keys():
            kind = f"a {type(given).__name__}"
            found = (", ".join(map(str, given)) or "nothing") if isinstance(given, Mapping) else kind
            raise StageFailed(f"{name} was quantised to {found} and not to {', '.join(expected)}", AUTHORS)
        for what, part in expected.items():
            _check(f"{name}.{what}", given[what], part)
        return given

    def _weight(self, base: TensorSpec) -> Array:
        """The whole weight, [out, in]; mapped if it is one tensor of the source."""
        import numpy as np

        arrays = [self.source.array(piece.name)[slice(*piece.rows)] for piece in base.pieces]
        for piece, array in zip(base.pieces, arrays, strict=True):
            if not np.isfinite(largest(array)):
                raise not_finite(piece.name)
        weight: Array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        weight.flags.writeable = False
        return weight


def _layer_of(tensor: Stored) -> tuple[str, str]:
    """Which quantised layer it is of, on whatever rank: its first source tensor, which fc and gate may share."""
    return tensor.base.pieces[0].name, tensor.base.name.split(".")[-2]


def _check(name: str, array: object, part: Stored) -> None:
    import numpy as np

    dtype = numpy_dtype(part.dtype)
    if not isinstance(array, np.ndarray) or (array.dtype, array.shape) != (dtype, part.spec.shape):
        raise not_as_said(name, array, dtype, part.spec.shape)
    if "float" in part.dtype and not np.isfinite(array).all():
        keeps = "values that do not fit float16 become inf: --set dtype=bfloat16 keeps them"
        raise StageFailed(f"{name} holds NaN or inf", keeps if part.dtype == "float16" else AUTHORS)


def _cut(array: Array, whole: TensorSpec, part: TensorSpec) -> Array:
    """What a rank holds of a tensor: the reverse of how the reader joins them."""
    import numpy as np

    starts, pieces = whole.starts, []
    for piece in part.pieces:
        first = starts[piece.name]
        rows = array[first + piece.rows[0] : first + piece.rows[1]]
        pieces.append(rows if piece.columns is None else rows[:, slice(*piece.columns)])
    cut: Array = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    return cut
