"""Reading a finished checkpoint back: is it complete, and is it what its config.json says?

Every tensor must have the name, shape and dtype that the layout and the algorithm say; of an algorithm that is not
known here only what every one shares is checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .. import events
from ..errors import RequestError, StageFailed
from .cast import FLOATS, examine
from .formats import LINEARS, Scheme, Stored, stored
from .reader import EMBEDDING, HEAD, ROPE_TABLES, Checkpoint, mapping_of, open_checkpoint
from .safetensors import SafeFile, TensorInfo
from .source import read_json

if TYPE_CHECKING:
    from .safetensors import Array

_BLOCK_BYTES = 4 << 20
_AGAIN = "build the checkpoint again"


def verify(folder: Path, *, contents: bool = True) -> None:
    """Check a checkpoint folder.

    Args:
        folder: with `config.json` and the rank files.
        contents: also read every weight and refuse NaN and inf; streamed, memory does not grow with the model.

    Raises:
        StageFailed: something is missing, left over, damaged, of another shape or dtype, or not finite; the
            message names the file and the tensor.
    """
    try:
        _check_files(folder)
        with open_checkpoint(folder) as checkpoint:
            _check_headers(checkpoint)
    except RequestError as error:
        raise StageFailed(error.message, error.hint or _AGAIN) from None
    if contents:
        _check_contents(folder)


def _check_files(folder: Path) -> None:
    tp_size, pp_size = mapping_of(read_json(folder / "config.json"))
    found = {path.name for path in folder.glob("*.safetensors")}
    count = min(tp_size * pp_size, len(found) + 1)  # if there are to be more, one of these is missing
    expected = {f"rank{rank}.safetensors" for rank in range(count)}
    missing, stale = sorted(expected - found), sorted(found - expected)
    if missing:
        raise RequestError(f"{missing[0]} is missing in {folder}: tp_size {tp_size}, pp_size {pp_size}", _AGAIN)
    if stale:
        raise RequestError(
            f"{stale[0]} in {folder} does not belong there: tp_size {tp_size}, pp_size {pp_size}",
            "remove it, or build the checkpoint again",
        )


def _check_headers(checkpoint: Checkpoint) -> None:
    scheme = checkpoint.scheme if checkpoint.scheme.is_described else Scheme()
    for number, (specs, header) in enumerate(zip(checkpoint.layout(), checkpoint.ranks, strict=True)):
        file = f"rank{number}.safetensors"
        expected = {tensor.name: tensor for tensor in stored(specs, scheme, checkpoint.dtype)}
        if checkpoint.decoder.tied and EMBEDDING in header and HEAD not in header:
            expected.pop(HEAD, None)  # the table stands for it
        _check_names(file, expected, header, checkpoint.scheme.is_described)
        for name, tensor in expected.items():
            if checkpoint.scheme.is_described or not _is_linear(name):
                _check_info(f"{file}: {name}", header[name], tensor.spec.shape, tensor.dtype)


def _check_names(file: str, expected: Mapping[str, Stored], header: Mapping[str, TensorInfo], all_known: bool) -> None:
    missing = [name for name in expected if name not in header]
    if missing:
        raise RequestError(f"{file} lacks {missing[0]} ({len(missing)} missing)", _AGAIN)
    unknown = [name for name in header if name not in expected and name.split(".")[-1] not in ROPE_TABLES]
    if unknown and all_known:
        raise RequestError(f"{file} holds {unknown[0]}, which config.json does not imply", _AGAIN)


def _is_linear(name: str) -> bool:
    """True for weights that a quantization may replace by another dtype and shape."""
    module, _, kind = name.rpartition(".")
    return kind == "weight" and (module.endswith(LINEARS) or module == "lm_head")


def _check_info(what: str, info: TensorInfo, shape: tuple[int, ...], dtype: str) -> None:
    if info.shape != shape:
        raise RequestError(f"{what} has shape {list(info.shape)} instead of {list(shape)}", _AGAIN)
    if info.dtype != dtype:
        raise RequestError(f"{what} is {info.dtype}, and config.json says {dtype}", _AGAIN)


def _check_contents(folder: Path) -> None:
    for path in sorted(folder.glob("rank*.safetensors")):
        with SafeFile(path) as file:
            for number, (name, info) in enumerate(file.tensors.items()):
                events.progress(f"checking {path.name}", number, len(file.tensors), "tensors")
                if info.dtype in FLOATS:
                    _check_finite(file, name)


def _check_finite(file: SafeFile, name: str) -> None:
    flat: Array = file.array(name).reshape(-1)
    step = _BLOCK_BYTES // flat.itemsize
    for start in range(0, flat.size, step):
        finding = examine(flat[start : start + step], flat.dtype.name)
        if finding.problem:
            raise StageFailed(
                f"{file.path.name}: {name} holds {finding.problem}",
                "values that do not fit float16 become inf: bfloat16 keeps them",
            )
        file.forget(name, start * flat.itemsize, (start + step) * flat.itemsize)
