"""The safetensors file format: strict headers, mapped reads, sequential writes.

Format: 8 bytes little-endian header length, JSON header, tensor bytes without holes
(https://huggingface.co/docs/safetensors). We read it ourselves because every byte that goes into an engine is
checked before any work, and because bfloat16 and float8 have to come out as numpy arrays without torch.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..errors import RequestError

if TYPE_CHECKING:
    import numpy as np

    #: A numpy array of any shape and dtype; of bfloat16 and float8 with ml-dtypes.
    Array = np.ndarray[Any, np.dtype[Any]]
else:  # numpy is not loaded for names of types
    Array = Any

#: safetensors name -> (numpy or ml_dtypes name, bytes an element)
DTYPES: Mapping[str, tuple[str, int]] = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
#: numpy or ml_dtypes name -> bytes an element
DTYPES_BY_NAME: Mapping[str, int] = dict(DTYPES.values())
_CODES = {name: code for code, (name, _) in DTYPES.items()}
_MAX_HEADER = 100 << 20
_FAULT_AROUND = 1 << 16


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. `dtype` is numpy's name (`bfloat16`); `offset` counts from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and check the header alone: every tensor lies inside the file, sizes fit shapes, no holes or overlaps.

    Raises:
        RequestError: not a safetensors file (the message says what it is, if that can be told), or damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(size - 8, _MAX_HEADER):
            raise _not_safetensors(path, head + file.read(192), size)
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"))
        header.pop("__metadata__", None)
        tensors = {name: _info(entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RequestError(f"{path.name} has a damaged safetensors header ({error})", _AGAIN) from None
    _check_extent(path, tensors, 8 + length, size)
    return tensors


_AGAIN = "download or copy the file again"


def _info(entry: Mapping[str, Any], base: int) -> TensorInfo:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype {entry['dtype']!r} is not known")
    dtype, width = DTYPES[entry["dtype"]]
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if any(type(number) is not int or number < 0 for number in (start, end, *shape)):
        raise ValueError("shapes and offsets are whole numbers")
    if end - start != math.prod(shape) * width:
        raise ValueError(f"{entry['dtype']} {list(shape)} does not take {end - start} bytes")
    return TensorInfo(dtype, shape, base + start, end - start)


def _check_extent(path: Path, tensors: Mapping[str, TensorInfo], base: int, size: int) -> None:
    position = base
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != position:
            raise RequestError(f"{path.name}: tensor {name} leaves a hole or overlaps another", _AGAIN)
        position += info.nbytes
    if position != size:
        what = "is cut off" if size < position else "has bytes after its last tensor"
        raise RequestError(f"{path.name} {what}: {size:,} bytes, its header says {position:,}", _AGAIN)


def _not_safetensors(path: Path, start: bytes, size: int) -> RequestError:
    if start.startswith(b"version https://git-lfs"):
        return RequestError(
            f"{path.name} is a git-LFS pointer of {size} bytes, not the weights",
            "run `git lfs pull` in that folder, or fetch the model again",
        )
    if start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return RequestError(
            f"{path.name} is a pickle, which can run code when it is loaded",
            "convert it to safetensors with a tool you trust; pickles are never opened here",
        )
    return RequestError(f"{path.name} is no safetensors file ({size:,} bytes)", _AGAIN)


class SafeFile:
    """A safetensors file, mapped: `array(name)` copies nothing, pages are read when touched.

    Use as a context manager; arrays must not outlive it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = read_header(path)
        self._file = path.open("rb")
        empty = path.stat().st_size == 0
        self._map = None if empty else mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)

    def __enter__(self) -> SafeFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Unmap, unless arrays still point into the map: then the last of them does it."""
        try:
            if self._map is not None:
                self._map.close()
        except BufferError:
            pass
        self._file.close()

    def array(self, name: str) -> Array:
        """The tensor as a read-only array over the mapped file, in its own dtype and shape."""
        import numpy as np

        info = self.tensors[name]
        dtype = numpy_dtype(info.dtype)
        flat: Array = np.frombuffer(self._map or b"", dtype, math.prod(info.shape), info.offset)
        return flat.reshape(info.shape)

    def forget(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Tell the kernel that this tensor's pages are not needed any more, so that they leave our memory.

        They stay in the page cache, and come back if they are touched again.

        Args:
            name: the tensor.
            start, stop: only these bytes of it.
        """
        if self._map is None or not hasattr(self._map, "madvise"):
            return
        info = self.tensors[name]
        stop = info.nbytes if stop is None else stop
        # A fault maps up to 16 pages around the one that was touched: give those back too.
        first = max(info.offset + start - _FAULT_AROUND, 0) // mmap.PAGESIZE * mmap.PAGESIZE
        last = min(info.offset + stop + _FAULT_AROUND, len(self._map))
        self._map.madvise(mmap.MADV_DONTNEED, first, last - first)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """numpy dtype for a name such as `bfloat16` or `float8_e4m3fn`, which live in ml_dtypes."""
    import ml_dtypes
    import numpy as np

    return np.dtype(getattr(ml_dtypes, name, name))


def write(
    path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], data: Iterable[Iterable[Any]]
) -> Iterator[int]:
    """Write a file sequentially; yields the number of bytes after each piece, so that callers can report progress.

    Args:
        path: a new file.
        tensors: name -> (numpy dtype name, shape), in the order of the data.
        data: for each tensor, its bytes as pieces (any contiguous buffers). Only one piece is held at a time.

    Raises:
        ValueError: a tensor's pieces do not add up to its size.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        code = _CODES[dtype]
        nbytes = math.prod(shape) * DTYPES[code][1]
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("xb", buffering=0) as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, pieces in zip(tensors, data, strict=True):
            start, end = header[name]["data_offsets"]
            for piece in pieces:
                view = memoryview(piece).cast("B")
                while len(view):  # an unbuffered write may be short, at 2 GiB for instance
                    count = file.write(view)
                    view = view[count:]
                    start += count
                yield 8 + len(raw) + start
            if start != end:
                raise ValueError(f"{name}: {end - start} bytes missing")
