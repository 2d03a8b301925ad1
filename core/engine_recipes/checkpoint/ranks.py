"""Writing the rank files of a quantised checkpoint and its `config.json`, whoever makes their contents."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Protocol

from ..space import require_room
from .config import config_json
from .convert import ConvertStats, Dtype, warn_of_overflows
from .formats import Scheme, Stored
from .safetensors import DTYPES_BY_NAME
from .source import SourceCheckpoint
from .streaming import Job, Progress, write_rank


class RankWriter(Protocol):
    """What makes the contents of rank files. `stats` is filled in while they are written."""

    source: SourceCheckpoint
    dtype: Dtype
    workers: int
    stats: ConvertStats

    def jobs(self, tensors: Sequence[Stored]) -> Iterable[Iterable[Job]]:
        """The jobs of each of a rank's tensors, in order."""
        ...


def room_for(ranks: Sequence[Sequence[Stored]], out: Path) -> Progress:
    """Make sure that the disk has room for the rank files, before anything is read."""
    progress = Progress(sum(_bytes(tensor) for rank in ranks for tensor in rank))
    require_room("stage 1", progress.total, out)
    return progress


def write_ranks(
    writer: RankWriter,
    out: Path,
    scheme: Scheme,
    mapping: tuple[int, int],
    ranks: Sequence[Sequence[Stored]],
    progress: Progress,
) -> ConvertStats:
    """Write the rank files and then `config.json`. `mapping` is tp_size and pp_size, `ranks` what each stores."""
    config = config_json(writer.source.decoder, writer.dtype, *mapping, scheme.config())  # may refuse
    for number, tensors in enumerate(ranks):
        infos = {tensor.name: (tensor.dtype, tensor.spec.shape) for tensor in tensors}
        jobs = chain.from_iterable(writer.jobs(tensors))
        write_rank(out / f"rank{number}.safetensors", infos, jobs, progress, writer.workers)
        writer.stats.files += 1
        writer.stats.tensors += len(tensors)
    writer.stats.bytes = progress.done
    warn_of_overflows(writer.stats, writer.dtype)
    (out / "config.json").write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
    return writer.stats


def _bytes(tensor: Stored) -> int:
    return math.prod(tensor.spec.shape) * DTYPES_BY_NAME[tensor.dtype]
