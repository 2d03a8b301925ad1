"""Reading and printing references, `MODEL[:PRECISION][@ENGINE]`. Knows no registry."""

from __future__ import annotations

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
    rest, at, engine = text.rpartition("@")
    if not at:
        rest, engine = text, ""
    model, colon, precision = rest.rpartition(":")
    if not colon:
        model, precision = rest, ""
    for part, sign, name in (("engine", at, engine), ("precision", colon, precision)):
        if sign and not NAME.fullmatch(name):
            raise RequestError(f"{text!r} names no {part} after {sign!r}", _FORM)
    if not (is_folder(model) or is_hub_id(model) or NAME.fullmatch(model)):
        raise RequestError(f"{text!r} names no model", _FORM)
    return Ref(model, precision or None, engine or None)


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
        model = Path(model).expanduser().resolve().name
    slug = re.sub(r"[^a-z0-9._-]+", "-", model.replace("/", "--").lower()).strip("-._")
    return slug or "model"
