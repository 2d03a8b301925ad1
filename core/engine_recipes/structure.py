"""TOML tables to dataclasses: strict, and all errors at once, each with its path and a suggestion."""

from __future__ import annotations

import errno
import math
import re
import reprlib
import stat
import sys
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import printable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")

_MOST_BYTES = 1_000_000
_MOST_DEEP = 20
_MOST_SHOWN = 80
#: What a terminal may obey: C0 but tabs and ends of lines, DEL, C1.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_SHOWN = reprlib.Repr()  # a value may be of any length and depth
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 80
_WORDS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}


def read_toml(path: Path, is_checked: bool = True) -> dict[str, Any]:
    """The tables of a plugin's file.

    Args:
        is_checked: whether to look for what does harm; needless for our own.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no TOML, or holds what no plugin's file holds.
        RecursionError: its tables are too deep for the parser.
    """
    try:
        kind = path.stat()
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "there is no such file") from None
    if not stat.S_ISREG(kind.st_mode):  # a pipe would be waited for
        raise ValueError("it is no file")
    if kind.st_size > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES} bytes")
    table: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    if is_checked and (problem := next(_oddities(table), "")):
        raise ValueError(problem)
    return table


def _oddities(value: Any, path: str = "", depth: int = 0) -> Iterator[str]:
    """What no plugin's file holds, wherever it stands: reading on, or printing it, would do harm."""
    place = printable(path[:_MOST_SHOWN])
    if depth > _MOST_DEEP:
        yield f"{place}…: more than {_MOST_DEEP} tables in each other"
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _oddities(key, f"{path}.{key}" if path else key, depth)
            yield from _oddities(item, f"{path}.{key}" if path else key, depth + 1)
    elif isinstance(value, list):
        for item in value:
            yield from _oddities(item, path, depth + 1)
    elif isinstance(value, str) and _CONTROL.search(value):
        yield f"{place}: holds a control character"
    elif type(value) is int and abs(value) >= 1 << 63:  # https://toml.io: integers have 64 bits
        yield f"{place}: a number of more than 64 bits"


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
