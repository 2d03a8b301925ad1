"""Writing a rank file while threads prepare what comes next. Knows no dtype and no model.

Memory does not grow with the model: a few blocks are mapped, computed and written, then forgotten.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from .. import events
from ..errors import MachineError
from . import safetensors

if TYPE_CHECKING:
    from .safetensors import Array

_SECONDS_BETWEEN_EVENTS = 0.1


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Job:
    """Some bytes of a tensor.

    Attributes:
        tensor: which; the jobs of one follow each other.
        make: gives the bytes, uint8 [n] or anything contiguous. Runs in a thread.
        written: called when the bytes are on disk, in file order and never in two threads at once.
        last: `make` waits until all jobs before it are done, because it needs what they found; it must be quick.
    """

    tensor: str
    make: Callable[[], Array]
    written: Callable[[], None] = _nothing
    last: bool = False


@dataclass
class Progress:
    """How far a checkpoint is: bytes written of all files, and bytes there will be."""

    total: int
    done: int = 0


def write_rank(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    jobs: Iterable[Job],
    progress: Progress,
    workers: int,
) -> None:
    """Write one safetensors file; tells its progress by events.

    Args:
        path: a new file.
        tensors: name -> (numpy dtype name, shape), in the order of the jobs.
        jobs: for each tensor all its bytes, in order.
        progress: of all files together; moved on.
        workers: threads that make blocks.

    Raises:
        MachineError: the disk is full or refuses.
    """
    before, told = progress.done, 0.0
    with ThreadPoolExecutor(workers, "block") as pool:
        data = ((array for _, array in group) for _, group in groupby(_ahead(jobs, pool, workers + 1), lambda i: i[0]))
        try:
            for position in safetensors.write(path, tensors, data):
                progress.done = before + position
                if time.monotonic() - told > _SECONDS_BETWEEN_EVENTS:
                    told = time.monotonic()
                    events.progress(f"writing {path.name}", progress.done, progress.total, "B")
        except OSError as error:
            hint = "free some disk space, or choose another place with --workspace"
            raise MachineError(f"writing {path} failed: {error.strerror or error}", hint) from error
    events.progress(f"writing {path.name}", min(progress.done, progress.total), progress.total, "B")


def _ahead(jobs: Iterable[Job], pool: ThreadPoolExecutor, ahead: int) -> Iterator[tuple[str, Array]]:
    """Yield (tensor, bytes) in order, while threads make the next `ahead`."""
    waiting: deque[tuple[Job, Future[Array] | None]] = deque()

    def finish() -> Iterator[tuple[str, Array]]:
        job, future = waiting.popleft()
        yield job.tensor, future.result() if future else job.make()
        job.written()  # the caller asks for the next when it has written this one

    for job in jobs:
        waiting.append((job, None if job.last else pool.submit(job.make)))
        if len(waiting) > ahead:
            yield from finish()
    while waiting:
        yield from finish()
