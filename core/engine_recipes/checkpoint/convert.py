"""Stage 1 without quantization: from a Hugging Face source to a TensorRT-LLM checkpoint, streamed.

Memory does not grow with the model: a few blocks of rows are mapped, cast and written, then forgotten. NVIDIA's
converter also stores three rotary tables; they are left out, loaders compute them and warn when they are there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .. import events
from ..errors import RequestError, StageFailed
from ..facts import cpus
from ..space import require_room
from . import safetensors
from .cast import FLOATS, Finding, caster, examine
from .config import config_json
from .formats import LINEARS, Scheme
from .layout import Piece, TensorSpec, layout
from .safetensors import Array
from .source import SourceCheckpoint, not_finite
from .streaming import Job, Progress, write_rank

if TYPE_CHECKING:
    import numpy as np

#: Changes a source tensor on its way: its name and its rows, as they come -> rows of the same shape.
Edit = Callable[[str, Array], Array]
#: What a checkpoint stores that is not quantised.
Dtype = Literal["float16", "bfloat16", "float32"]
#: Weights in 8 or 4 bits, activations in 16; TensorRT-LLM's names.
WeightOnly = Literal["W8A16", "W4A16"]

#: Most source bytes of a block (a single row may be longer). Measured: 1 to 16 MiB are within 20 %, 2 MiB is best.
BLOCK_BYTES = 2 << 20
_MOST_WORKERS = 4  # casting bfloat16 to float16 costs more CPU time than writing it
#: What to do about the arrays that a precision's own code gives.
AUTHORS = "report this to the authors of the precision"
_WARNED = 5  # tensors with overflows that get a line of their own


@dataclass(frozen=True)
class Block:
    """Some rows of a piece: `start` to `stop` are rows of the source tensor. `piece` None: that many zero rows."""

    spec: TensorSpec
    piece: Piece | None
    start: int
    stop: int


@dataclass
class ConvertStats:
    """What a conversion did.

    Attributes:
        files: rank files written.
        tensors: tensors written, over all ranks.
        bytes: written, `config.json` not counted.
        overflows: source tensor -> values that were finite there and are inf in the checkpoint.
    """

    files: int = 0
    tensors: int = 0
    bytes: int = 0
    overflows: dict[str, int] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)

    def note(self, name: str, finding: Finding) -> None:
        """Add what was met in one block of a source tensor."""
        if finding.overflows:
            self.overflows[name] = self.overflows.get(name, 0) + finding.overflows
            self.largest[name] = max(self.largest.get(name, 0.0), finding.largest)


def convert(
    source: SourceCheckpoint,
    out: Path,
    dtype: Dtype = "float16",
    tp_size: int = 1,
    pp_size: int = 1,
    algorithm: WeightOnly | None = None,
    edit: Edit | None = None,
) -> ConvertStats:
    """Write `rank<r>.safetensors` for each rank and then `config.json` into `out`.

    Values are rounded to nearest even. Finite values that do not fit `dtype` become inf, are counted and warned of.

    Args:
        source: opened source; its pages are given back as they are used.
        out: an existing folder without rank files.
        dtype: of every tensor written.
        tp_size, pp_size: the mapping.
        algorithm: written into `config.json`: the engine's builder then quantises the linear layers as it loads them.
        edit: changes the weights of linear layers (not embedding and head) on their way. Called in threads with the
            source tensor's name and some of its rows, float32 [n, inputs], which are its own to overwrite; returns the
            same shape. Rows come whole however the model is split, so scales of rows or of groups within them do not
            depend on the mapping.

    Raises:
        RequestError: unknown dtype, a mapping that does not fit the model, or NaN or inf in the source.
        StageFailed: `edit` gave something else than rows of that shape, or NaN or inf.
        MachineError: not enough free disk.
    """
    if dtype not in FLOATS:
        raise RequestError(f"cannot convert to {dtype!r}", f"known: {', '.join(FLOATS)}")
    ranks = layout(source.decoder, tp_size, pp_size)
    config = config_json(source.decoder, dtype, tp_size, pp_size, Scheme(algorithm).config())  # may refuse
    total = sum(checkpoint_bytes(rank, dtype) for rank in ranks)
    require_room("stage 1", total, out)
    stats = ConvertStats()
    for number, specs in enumerate(ranks):
        _write_rank(source, out / f"rank{number}.safetensors", specs, dtype, stats, total, edit)
    warn_of_overflows(stats, dtype)
    (out / "config.json").write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
    return stats


def checkpoint_bytes(specs: Sequence[TensorSpec], dtype: str) -> int:
    """Bytes that the tensors of a rank take in an unquantised checkpoint, without the header."""
    return sum(math.prod(spec.shape) for spec in specs) * safetensors.DTYPES_BY_NAME[dtype]


def _write_rank(
    source: SourceCheckpoint,
    path: Path,
    specs: Sequence[TensorSpec],
    dtype: str,
    stats: ConvertStats,
    total: int,
    edit: Edit | None,
) -> None:
    tensors = {spec.name: (dtype, spec.shape) for spec in specs}
    jobs = (cast_job(source, block, dtype, stats, edit) for block in blocks(source, specs, dtype))
    progress = Progress(total, stats.bytes)
    write_rank(path, tensors, jobs, progress, max(2, min(_MOST_WORKERS, cpus())))
    stats.bytes = progress.done
    stats.files += 1
    stats.tensors += len(specs)


def cast_job(source: SourceCheckpoint, block: Block, dtype: str, stats: ConvertStats, edit: Edit | None = None) -> Job:
    """Cast a block. Its source pages are forgotten once it is written."""
    found = []

    def make() -> Array:
        array, finding = _cast(source, block, dtype, edit)
        found.append(finding)
        return array

    def written() -> None:
        if block.piece is not None:
            stats.note(block.piece.name, found[0])
            forget(source, block)

    return Job(block.spec.name, make, written)


def forget(source: SourceCheckpoint, block: Block) -> None:
    """Give the pages of a block's rows back."""
    if block.piece is not None:
        row = _row_bytes(source, block.piece.name)
        source.forget(block.piece.name, block.start * row, block.stop * row)


def blocks(source: SourceCheckpoint, specs: Sequence[TensorSpec], dtype: str) -> Iterator[Block]:
    """Cut the tensors of a rank into blocks of rows, none longer than BLOCK_BYTES unless two rows are."""
    for spec in specs:
        for piece in spec.pieces:
            step = max(BLOCK_BYTES // _row_bytes(source, piece.name) & ~1, 2)  # even: int4 packs two rows to a byte
            for start in range(piece.rows[0], piece.rows[1], step):
                yield Block(spec, piece, start, min(start + step, piece.rows[1]))
        if spec.pad_rows:
            yield Block(spec, None, 0, spec.pad_rows)


def _row_bytes(source: SourceCheckpoint, name: str) -> int:
    info = source.tensors[name][1]
    return info.nbytes // info.shape[0]


def _cast(source: SourceCheckpoint, block: Block, dtype: str, edit: Edit | None = None) -> tuple[Array, Finding]:
    """The block's bytes (uint8, because buffers know no bfloat16) in the checkpoint's dtype."""
    import numpy as np

    if block.piece is None:
        width = math.prod(block.spec.shape[1:]) * safetensors.numpy_dtype(dtype).itemsize
        return np.zeros((block.stop - block.start) * width, np.uint8), Finding()
    rows = rows_of(source, block)
    finding = examine(rows, dtype)
    if finding.problem:
        raise not_finite(block.piece.name, finding.problem)
    if edit and block.spec.name.removesuffix(".weight").endswith(LINEARS):
        rows = _edited(source, block, edit)
        finding = examine(rows, dtype)
        if finding.problem:
            raise StageFailed(f"{block.piece.name} was changed and holds {finding.problem}", AUTHORS)
    return caster(rows.dtype.name, dtype)(rows).reshape(-1).view(np.uint8), finding


def _edited(source: SourceCheckpoint, block: Block, edit: Edit) -> Array:
    """The block's values after `edit`, float32, contiguous."""
    import numpy as np

    assert block.piece is not None
    rows = source.array(block.piece.name)[block.start : block.stop].astype(np.float32)
    shape = rows.shape
    edited = edit(block.piece.name, rows)
    if not isinstance(edited, np.ndarray) or edited.shape != shape or not np.can_cast(edited, np.float32, "same_kind"):
        raise not_as_said(f"{block.piece.name} was changed and", edited, np.dtype(np.float32), shape)
    with np.errstate(over="ignore"):  # what becomes inf is refused
        edited = edited.astype(np.float32, copy=False)
    if block.piece.columns is not None:
        edited = edited[:, slice(*block.piece.columns)]
    return np.ascontiguousarray(edited)


def not_as_said(what: str, given: object, dtype: np.dtype[Any], shape: Sequence[int]) -> StageFailed:
    """That a precision's code gave something else than an array of this dtype and shape. `what` begins the message."""
    import numpy as np

    found = f"of type {type(given).__name__}"
    if isinstance(given, np.ndarray):
        name = given.dtype.name if given.dtype.name != dtype.name or given.dtype == dtype else given.dtype.str
        found = f"{name} {list(given.shape)}"
    return StageFailed(f"{what} is {found} instead of {dtype.name} {list(shape)}", AUTHORS)


def rows_of(source: SourceCheckpoint, block: Block) -> Array:
    """What the block's values are before they are rounded: the source's, contiguous, in the source's dtype.

    With the tensor's offset, where it has one, and then float32.
    """
    import numpy as np

    assert block.piece is not None
    rows = source.array(block.piece.name)[block.start : block.stop]
    if block.piece.columns is not None:
        rows = rows[:, slice(*block.piece.columns)]
    if block.spec.offset:
        rows = rows.astype(np.float32) + np.float32(block.spec.offset)
    return np.ascontiguousarray(rows)


def warn_of_overflows(stats: ConvertStats, dtype: str) -> None:
    """Warn of finite values that became inf."""
    for name in list(stats.overflows)[:_WARNED]:
        count = stats.overflows[name]
        values = "1 value" if count == 1 else f"{count} values"
        keeps = "bfloat16" if dtype == "float16" else "float32"
        events.warn(
            f"{values} of {name} did not fit {dtype} and became inf (largest {stats.largest[name]:.3g}); "
            f"{keeps} keeps them"
        )
    more = len(stats.overflows) - _WARNED
    if more > 0:
        events.warn(f"so did values of {more} more tensors")
