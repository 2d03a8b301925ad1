"""TOML tables to dataclasses: strict, and all errors at once, each with its path and a suggestion."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

_SHOWN = reprlib.Repr()  # a value may be of any length and depth
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 80
_WORDS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}


def structure(cls: type[T], table: Mapping[str, Any], path: str, errors: list[str]) -> T | None:
    """Build a dataclass from a TOML table.

    Fields with `metadata={"toml": False}` are not read from the table. A lone string is taken as a list of one.
    A dataclass may have a classmethod `from_value(value)` that says which table a plain value stands for, and a method
    `problems()` that says what is wrong with it beyond the types of its fields, each beginning with a field's name.

    Args:
        cls: the dataclass.
        table: what the TOML said.
        path: where the table stands, for messages: `models."qwen2.5-7b"`.
        errors: gets a line for each thing that is wrong.

    Returns:
        The object, or None if anything was wrong.
    """
    known = {f.name: f for f in fields(cls) if f.metadata.get("toml", True)}  # type: ignore[arg-type]
    count = len(errors)
    errors.extend(f"{path}.{key}: unknown{suggest(key, known)}" for key in table if key not in known)
    hints = _hints(cls)
    values: dict[str, Any] = {}
    for name, field in known.items():
        if name in table:
            values[name] = _convert(hints[name], table[name], f"{path}.{name}", errors)
        elif _required(field):
            errors.append(f"{path}.{name}: missing")
    if len(errors) > count:
        return None
    made = cls(**values)
    errors.extend(f"{path}.{problem}" for problem in (made.problems() if hasattr(made, "problems") else ()))
    return made if len(errors) == count else None


def suggest(name: str, known: Any) -> str:
    """`; did you mean X?`, or nothing if no known name is near."""
    from difflib import get_close_matches

    close = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def quote(name: str) -> str:
    """A TOML key as it stands in a path: quoted if it holds dots."""
    return f'"{name}"' if "." in name else name


_HINTS: dict[Any, dict[str, Any]] = {}


def _hints(cls: Any) -> dict[str, Any]:
    if cls not in _HINTS:  # evaluating annotations is the slowest part of reading a registry
        _HINTS[cls] = get_type_hints(cls)
    return _HINTS[cls]


def _required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _convert(hint: Any, value: Any, path: str, errors: list[str]) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _union(args, value, path, errors)
    if origin is Literal:
        if value not in args:
            errors.append(f"{path}: must be {' or '.join(map(str, args))}, not {_SHOWN.repr(value)}")
        return value
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_convert(args[0], item, f"{path}[{i}]", errors) for i, item in enumerate(items))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            errors.append(f"{path}: must be a table")
            return {}
        return {key: _convert(args[1], item, f"{path}.{quote(key)}", errors) for key, item in value.items()}
    if is_dataclass(hint):
        if not isinstance(value, Mapping) and hasattr(hint, "from_value"):
            return structure(hint, hint.from_value(value), path, errors)  # type: ignore[arg-type]
        if not isinstance(value, Mapping):
            errors.append(f"{path}: must be a table")
            return None
        return structure(hint, value, path, errors)  # type: ignore[arg-type]
    return _scalar(hint, value, path, errors)


def _union(args: tuple[Any, ...], value: Any, path: str, errors: list[str]) -> Any:
    kinds = [a for a in args if a is not type(None)]
    for kind in kinds:
        if type(value) is kind or (kind is float and type(value) is int):
            return _scalar(kind, value, path, errors)
    if len(kinds) == 1:
        return _convert(kinds[0], value, path, errors)
    errors.append(f"{path}: must be {' or '.join(_WORDS[k] for k in kinds)}, not {_SHOWN.repr(value)}")
    return None


def _scalar(hint: Any, value: Any, path: str, errors: list[str]) -> Any:
    if hint is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            value = math.inf
    if isinstance(value, float) and not math.isfinite(value):
        errors.append(f"{path}: must be a finite number")
    if type(value) is not hint:  # bool is an int for isinstance
        errors.append(f"{path}: must be {_WORDS.get(hint, hint)}, not {_SHOWN.repr(value)}")
    return value
