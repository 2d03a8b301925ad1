"""Checks of a checkpoint folder before any work: is everything here, and is it what it says it is?

Opens no pickle and runs no code of the checkpoint. Knows no family and no engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import RequestError, did_you_mean
from ..hf_config import architecture_of
from . import layout

_LFS = b"version https://git-lfs"
#: Marks the store that huggingface_hub shares between repositories of a cache.
_SHARED_MARKER = ".huggingface-shared-blobs"


def inspect(folder: Path) -> dict[str, Any]:
    """Check a folder in the Hugging Face layout and return its parsed config.json.

    Raises:
        RequestError: something is missing, damaged, a git-LFS pointer, a pickle, needs code from the repository, or
            is a link that leads out of the folder.
    """
    from ..checkpoint.source import source_tensors

    if not folder.is_dir():
        raise RequestError(f"{folder} is no folder", "name a folder with config.json and *.safetensors")
    _check_links(folder)
    config = _json_object(folder, layout.CONFIG, "name a folder with config.json and *.safetensors")
    if config.get("auto_map"):
        raise RequestError(
            f"this {config.get('model_type', 'model')} needs code from the repository, which is never run",
            "use a model that transformers supports by itself; its config.json has no auto_map",
        )
    if (folder / layout.INDEX).is_file():
        _refuse_pointer(folder / layout.INDEX)
    source_tensors(folder)
    _json_object(folder, layout.TOKENIZER, _tokenizer_hint(folder))
    return config


def check_architecture(config: dict[str, Any], family_name: str, architectures: Sequence[str]) -> None:
    """Hold config.json against the family the registry gives this model.

    Raises:
        RequestError: the checkpoint's class is none of `architectures`.
    """
    name = architecture_of(config)
    if name not in architectures:
        raise RequestError(
            f"config.json says {name}; family {family_name} knows {', '.join(architectures)}",
            f"choose the family that knows {name}, or another checkpoint; {did_you_mean(name, architectures)}",
        )


def _check_links(folder: Path) -> None:
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        cache = root.parent.parent.parent  # a hub cache: its snapshots are links into blobs/
        allowed = [root.parent.parent]
        if (cache / "blobs" / _SHARED_MARKER).is_file():
            allowed.append(cache / "blobs")
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in allowed):
            raise RequestError(
                f"{path.name} is a link that leads out of the folder, to {path.resolve()}",
                "name the folder that holds the files, or copy them",
            )


def _json_object(folder: Path, name: str, missing: str) -> dict[str, Any]:
    from ..checkpoint.source import read_json

    if not (folder / name).is_file():
        raise RequestError(f"{name} is missing in {folder}", missing)
    _refuse_pointer(folder / name)
    return read_json(folder / name)


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise RequestError(
                f"{path.name} is a git-LFS pointer of {path.stat().st_size} bytes, not the file",
                "run `git lfs pull` in that folder, or fetch the model again",
            )


def _tokenizer_hint(folder: Path) -> str:
    if (folder / "tokenizer.model").is_file() or (folder / "vocab.json").is_file():
        return (
            "make one where transformers is installed: "
            "AutoTokenizer.from_pretrained(FOLDER, use_fast=True).save_pretrained(FOLDER)"
        )
    return "copy tokenizer.json from the model this one was made from"
