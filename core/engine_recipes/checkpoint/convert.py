"""Stage 1 without quantization: from a Hugging Face source to a TensorRT-LLM checkpoint, streamed.

Memory does not grow with the model: a few blocks of rows are mapped, cast and written, then forgotten. NVIDIA's
converter also stores three rotary tables; they are left out, loaders compute them and warn when they are there.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .. import events
from ..errors import MachineError, RequestError
from ..facts import cpus
from ..space import require_room
from . import safetensors
from .cast import FLOATS, Finding, caster, examine
from .config import config_json
from .layout import Piece, TensorSpec, layout
from .source import SourceCheckpoint

if TYPE_CHECKING:
    from .safetensors import Array

Dtype = Literal["float16", "bfloat16", "float32"]

#: Most source bytes of a block (a single row may be longer). Measured: 1 to 16 MiB are within 20 %, 2 MiB is best.
BLOCK_BYTES = 2 << 20
_MOST_WORKERS = 4  # casting bfloat16 to float16 costs more CPU time than writing it
_WARNED = 5  # tensors with overflows that get a line of their own
_SECONDS_BETWEEN_EVENTS = 0.1


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
    source: SourceCheckpoint, out: Path, dtype: Dtype = "float16", tp_size: int = 1, pp_size: int = 1
) -> ConvertStats:
    """Write `rank<r>.safetensors` for each rank and then `config.json` into `out`.

    Values are rounded to nearest even. Finite values that do not fit `dtype` become inf, are counted and warned of.

    Args:
        source: opened source; its pages are given back as they are used.
        out: an existing folder without rank files.
        dtype: of every tensor written.
        tp_size, pp_size: the mapping.

    Raises:
        RequestError: unknown dtype, a mapping that does not fit the model, or NaN or inf in the source.
        MachineError: not enough free disk.
    """
    if dtype not in FLOATS:
        raise RequestError(f"cannot convert to {dtype!r}", f"known: {', '.join(FLOATS)}")
    ranks = layout(source.decoder, tp_size, pp_size)
    total = sum(checkpoint_bytes(rank, dtype) for rank in ranks)
    require_room("stage 1", total, out)
    stats = ConvertStats()
    for number, specs in enumerate(ranks):
        _write_rank(source, out / f"rank{number}.safetensors", specs, dtype, stats, total)
    _warn_of_overflows(stats, dtype)
    config = config_json(source.decoder, dtype, tp_size, pp_size)
    (out / "config.json").write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
    return stats


def checkpoint_bytes(specs: Sequence[TensorSpec], dtype: str) -> int:
    """Bytes that the tensors of a rank take in an unquantised checkpoint, without the header."""
    width = {"float32": 4, "float16": 2, "bfloat16": 2}[dtype]
    return sum(math.prod(spec.shape) for spec in specs) * width


def _write_rank(
    source: SourceCheckpoint, path: Path, specs: Sequence[TensorSpec], dtype: str, stats: ConvertStats, total: int
) -> None:
    tensors = {spec.name: (dtype, spec.shape) for spec in specs}
    before, told = stats.bytes, 0.0
    workers = max(2, min(_MOST_WORKERS, cpus()))
    with ThreadPoolExecutor(workers, "convert") as pool:
        stream = _cast_ahead(source, specs, dtype, pool, workers + 1, stats)
        data = ((array for _, array in group) for _, group in groupby(stream, lambda item: item[0].name))
        try:
            for position in safetensors.write(path, tensors, data):
                stats.bytes = before + position
                if time.monotonic() - told > _SECONDS_BETWEEN_EVENTS:
                    told = time.monotonic()
                    events.progress(f"writing {path.name}", stats.bytes, total, "B")
        except OSError as error:
            hint = "free some disk space, or choose another place with --workspace"
            raise MachineError(f"writing {path} failed: {error.strerror or error}", hint) from error
    stats.files += 1
    stats.tensors += len(specs)
    events.progress(f"writing {path.name}", min(stats.bytes, total), total, "B")


def _cast_ahead(
    source: SourceCheckpoint,
    specs: Sequence[TensorSpec],
    dtype: str,
    pool: ThreadPoolExecutor,
    ahead: int,
    stats: ConvertStats,
) -> Iterator[tuple[TensorSpec, Array]]:
    """Yield the blocks of a rank in file order as bytes, while threads read and cast the next `ahead`.

    A block's source pages are forgotten when the next is asked for, so the caller has written it by then.
    """
    waiting: deque[tuple[Block, Future[tuple[Array, Finding]]]] = deque()

    def finish() -> Iterator[tuple[TensorSpec, Array]]:
        block, future = waiting.popleft()
        array, finding = future.result()
        if block.piece is not None:
            stats.note(block.piece.name, finding)
        yield block.spec, array
        if block.piece is not None:
            row = _row_bytes(source, block.piece.name)
            source.forget(block.piece.name, block.start * row, block.stop * row)

    for block in blocks(source, specs, dtype):
        waiting.append((block, pool.submit(_cast, source, block, dtype)))
        if len(waiting) > ahead:
            yield from finish()
    while waiting:
        yield from finish()


def blocks(source: SourceCheckpoint, specs: Sequence[TensorSpec], dtype: str) -> Iterator[Block]:
    """Cut the tensors of a rank into blocks of rows, none longer than BLOCK_BYTES unless one row is."""
    for spec in specs:
        for piece in spec.pieces:
            step = max(BLOCK_BYTES // _row_bytes(source, piece.name), 1)
            for start in range(piece.rows[0], piece.rows[1], step):
                yield Block(spec, piece, start, min(start + step, piece.rows[1]))
        if spec.pad_rows:
            yield Block(spec, None, 0, spec.pad_rows)


def _row_bytes(source: SourceCheckpoint, name: str) -> int:
    info = source.tensors[name][1]
    return info.nbytes // info.shape[0]


def _cast(source: SourceCheckpoint, block: Block, dtype: str) -> tuple[Array, Finding]:
    """The block's bytes (uint8, because buffers know no bfloat16) in the checkpoint's dtype."""
    import numpy as np

    if block.piece is None:
        width = math.prod(block.spec.shape[1:]) * safetensors.numpy_dtype(dtype).itemsize
        return np.zeros((block.stop - block.start) * width, np.uint8), Finding()
    rows = source.array(block.piece.name)[block.start : block.stop]
    if block.piece.columns is not None:
        rows = rows[:, slice(*block.piece.columns)]
    rows = np.ascontiguousarray(rows)
    finding = examine(rows, dtype)
    if finding.problem:
        raise RequestError(
            f"{block.piece.name} holds {finding.problem}",
            "the source is damaged, or its training failed: fetch it again, or use another checkpoint",
        )
    return caster(rows.dtype.name, dtype)(rows).reshape(-1).view(np.uint8), finding


def _warn_of_overflows(stats: ConvertStats, dtype: str) -> None:
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
