"""Reading and printing references, `MODEL[:PRECISION][@ENGINE]`. Knows no registry."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .errors import RequestError
from .types import Ref

NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def parse(text: str) -> Ref:
    """Read a reference. MODEL is a registry name, a local folder (`./x`, `/x`, `~/x`) or a Hub id (`org/name`).

    Raises:
        RequestError: empty, or a precision or engine that is no name.
    """
    rest, engine = _split(text, "@")
    model, precision = _split(rest, ":")
    for part, name in (("engine", engine), ("precision", precision)):
        if name is not None and not NAME.fullmatch(name):
            raise RequestError(f"{name!r} in {_short(text)} is no {part}'s name", _hint(text))
    if not (is_folder(model) or is_hub_id(model) or NAME.fullmatch(model)):
        raise RequestError(f"{_short(model)} is no model's name", _hint(text))
    return Ref(model, precision, engine)


def _split(text: str, sign: str) -> tuple[str, str | None]:
    """What stands before the last `sign`, and the name after it. In a path the sign may belong to the path."""
    before, found, name = text.rpartition(sign)
    if not found or (is_folder(text) and not NAME.fullmatch(name)):
        return text, None
    return before, name


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "…")


def _hint(text: str) -> str:
    better = text.strip().lower()
    try:
        return f"did you mean {parse(better)}?" if better != text else _FORM
    except RequestError:
        return _FORM


_FORM = "write MODEL[:PRECISION][@ENGINE], for example qwen2.5-7b:fp16@onnxruntime, ./folder:fp16 or Org/Name:fp16"


def is_folder(model: str) -> bool:
    """Whether MODEL is written as a path: it starts with `.`, `/` or `~`."""
    return model.startswith((".", "/", "~"))


def is_hub_id(model: str) -> bool:
    """Whether MODEL is written as a Hugging Face id, `org/name`."""
    return bool(_HUB_ID.fullmatch(model))


def label(model: str) -> str:
    """A short name for folders: the registry name, the folder's own name, or `org--name`, in lower case."""
    if is_folder(model):
        model = Path(os.path.expanduser(model)).resolve().name
    slug = re.sub(r"[^a-z0-9._-]+", "-", model.replace("/", "--").lower()).strip("-._")
    return slug or "model"
