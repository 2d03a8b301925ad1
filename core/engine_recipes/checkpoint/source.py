"""The source: a Hugging Face checkpoint folder, checked before any byte is used, read by mapping.

Knows the folder layout (`config.json`, safetensors with or without an index); opens no pickles and runs no code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .. import events
from ..decoder import Decoder
from ..errors import RequestError
from ..types import Artifact
from .cast import FLOATS
from .layout import source_shapes
from .safetensors import SafeFile, TensorInfo, read_header

if TYPE_CHECKING:
    from .safetensors import Array

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHOWN = 3
_FETCH_AGAIN = "fetch or copy the model again"


class SourceCheckpoint:
    """An opened source. Use as a context manager; arrays must not outlive it.

    Attributes:
        folder: the folder with the weights.
        config: its parsed `config.json`.
        decoder: what the family says it is.
        tensors: name -> (file, where in it).
    """

    def __init__(self, folder: Path, decoder: Decoder) -> None:
        self.folder = folder
        self.decoder = decoder
        self.config = read_json(folder / "config.json")
        self.tensors: Mapping[str, tuple[Path, TensorInfo]] = source_tensors(folder)
        _check_tensors(decoder, self.tensors)
        self._files: dict[Path, SafeFile] = {}
        try:
            for path in sorted({path for path, _ in self.tensors.values()}):
                self._files[path] = SafeFile(path)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> SourceCheckpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Unmap all files."""
        for file in self._files.values():
            file.close()

    def array(self, name: str) -> Array:
        """The tensor in its own dtype and shape, over the mapped file; nothing is copied."""
        return self._files[self.tensors[name][0]].array(name)

    def forget(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Give the tensor's pages back, or only those of its bytes start to stop."""
        self._files[self.tensors[name][0]].forget(name, start, stop)


def open_source(artifact: Artifact | Path) -> SourceCheckpoint:
    """Open what the resolve stage left: a folder with `source.json` and `decoder.json`.

    Args:
        artifact: the stage's input of kind `hf-checkpoint`, or its folder.

    Raises:
        RequestError: the weights are damaged, or are not what the decoder says.
    """
    folder = artifact.path if isinstance(artifact, Artifact) else artifact
    for name in ("source.json", "decoder.json"):
        if not (folder / name).is_file():
            raise RequestError(f"{folder} has no {name}", "a folder that the resolve stage wrote is needed")
    weights = folder / str(read_json(folder / "source.json").get("folder", "."))
    return SourceCheckpoint(weights, Decoder.read(folder / "decoder.json"))


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON file that holds an object. Raises RequestError if it is missing or no such thing."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequestError(f"{path.name} is missing in {path.parent}", _FETCH_AGAIN) from None
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{path.name} in {path.parent} cannot be read ({error})", _FETCH_AGAIN) from None
    if not isinstance(value, dict):
        raise RequestError(f"{path.name} in {path.parent} is no JSON object", _FETCH_AGAIN)
    return value


def source_tensors(folder: Path) -> dict[str, tuple[Path, TensorInfo]]:
    """Every tensor of a Hugging Face folder: name -> (file, where in it). Reads headers only.

    Follows `model.safetensors.index.json` if there is one, else reads `model.safetensors`; other files, also
    other safetensors files, are not looked at.

    Raises:
        RequestError: no safetensors, a shard that is missing or damaged, or an index that does not fit its shards.
    """
    index, single = folder / INDEX, folder / SINGLE
    if not index.is_file():
        if not single.is_file():
            raise no_weights(folder)
        return {name: (single, info) for name, info in read_header(single).items()}
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise RequestError(f"{INDEX} has no weight_map", _FETCH_AGAIN)
    shards = _read_shards(folder, weight_map)
    if single.is_file() and SINGLE not in shards:
        raise RequestError(
            f"{SINGLE} and {INDEX} are both in {folder} and the index does not name it",
            "remove the one that is not meant",
        )
    tensors = _place(folder, weight_map, shards)
    _check_total(content, sum(info.nbytes for _, info in tensors.values()))
    return tensors


def not_finite(tensor: str, problem: str = "NaN or inf") -> RequestError:
    """That a weight of the source is no number."""
    return RequestError(
        f"{tensor} holds {problem}",
        "the source is damaged, or its training failed: fetch it again, or use another checkpoint",
    )


def no_weights(folder: Path) -> RequestError:
    """That a folder has no safetensors, and whether it has pickles instead."""
    if any(folder.glob("*.bin")) or any(folder.glob("*.bin.index.json")):
        return RequestError(
            f"{folder} has its weights as pickles (.bin), which can run code when they are loaded",
            "convert them to safetensors with a tool you trust; pickles are never opened here",
        )
    return RequestError(f"{folder} has no {SINGLE} and no {INDEX}", _FETCH_AGAIN)


def _read_shards(folder: Path, weight_map: Mapping[str, Any]) -> dict[str, dict[str, TensorInfo]]:
    shards = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or "/" in file or "\\" in file:
            raise RequestError(
                f"{INDEX} says that {tensor} is in {file!r}, which is no safetensors file of this folder",
                "the index must name files beside it; do not use this folder if you do not know who made it",
            )
        if file in shards:
            continue
        if not (folder / file).is_file():
            raise RequestError(f"{file} is missing in {folder}", _FETCH_AGAIN)
        shards[file] = read_header(folder / file)
    return shards


def _place(
    folder: Path, weight_map: Mapping[str, str], shards: Mapping[str, Mapping[str, TensorInfo]]
) -> dict[str, tuple[Path, TensorInfo]]:
    """Demand that every tensor is in the shard that the index names, and in no other."""
    for file, header in shards.items():
        for name in header:
            said = weight_map.get(name)
            if said != file:
                where = f"in {said}" if said else "nowhere"
                raise RequestError(f"{name} is in {file}, and {INDEX} says it is {where}", _FETCH_AGAIN)
    for name, file in weight_map.items():
        if name not in shards[file]:
            raise RequestError(f"{INDEX} says that {name} is in {file}, and it is not", _FETCH_AGAIN)
    return {name: (folder / file, shards[file][name]) for name, file in weight_map.items()}


def _check_total(index: Mapping[str, Any], total: int) -> None:
    metadata = index.get("metadata")
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    if said is not None and said != total:  # every tensor is where the index says, so this alone loses nothing
        events.warn(f"the shards hold {total:,} bytes of tensors and {INDEX} says {said}")


def expect_tensors(decoder: Decoder, tensors: Mapping[str, tuple[Path, TensorInfo]]) -> None:
    """Demand exactly the tensors and shapes that the decoder implies, in a floating-point dtype.

    Two kinds of leftovers are harmless and known: rotary `inv_freq` buffers, and the `lm_head.weight` of a model
    whose head is tied, which is not used (a warning says so if it is not the embedding).

    Raises:
        RequestError: tensors are missing, of another shape or dtype, or unknown; the first few are named.
    """
    _check_tensors(decoder, tensors)
    head, embedding = decoder.names["lm_head"], decoder.names["embedding"]
    if decoder.tied and head in tensors and not _same_samples(tensors[head], tensors[embedding]):
        events.warn(
            f"{head} differs from {embedding}, and config.json says they are tied: {head} is not used. "
            "If the model was trained with a head of its own, set tie_word_embeddings to false in config.json."
        )


def _check_tensors(decoder: Decoder, tensors: Mapping[str, tuple[Path, TensorInfo]]) -> None:
    expected = source_shapes(decoder)
    hint = "config.json and the weights do not belong together, or the model needs another family"
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise RequestError(f"the source lacks {_count(missing)} that config.json implies: {_list(missing)}", hint)
    wrong = [
        f"{name} {list(tensors[name][1].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if tensors[name][1].shape != shape
    ]
    if wrong:
        raise RequestError(f"shapes that config.json does not imply: {_list(wrong)}", hint)
    unknown = [name for name in tensors if name not in expected and not _harmless(decoder, name)]
    if unknown:
        raise RequestError(f"{_count(unknown)} that this family does not know, for example {unknown[0]}", hint)
    odd = [f"{name} ({tensors[name][1].dtype})" for name in expected if tensors[name][1].dtype not in FLOATS]
    if odd:
        raise RequestError(
            f"weights that are not float32, float16 or bfloat16: {_list(odd)}",
            "start from the unquantised original",
        )


def _harmless(decoder: Decoder, name: str) -> bool:
    return name.endswith("rotary_emb.inv_freq") or (decoder.tied and name == decoder.names["lm_head"])


def _count(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"


def _list(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def _same_samples(one: tuple[Path, TensorInfo], other: tuple[Path, TensorInfo]) -> bool:
    """Compare the bytes at a few dozen places: enough for a head that was trained apart from the embedding."""
    if (one[1].dtype, one[1].nbytes) != (other[1].dtype, other[1].nbytes):
        return False
    places, length = 64, 4096
    step = max(one[1].nbytes // places, 1)
    with one[0].open("rb") as first, other[0].open("rb") as second:
        for start in range(0, one[1].nbytes, step):
            first.seek(one[1].offset + start)
            second.seek(other[1].offset + start)
            size = min(length, one[1].nbytes - start)
            if first.read(size) != second.read(size):
                return False
    return True
