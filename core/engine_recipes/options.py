"""Settling one option: its default, what registry entries set, what `--set` says, and whether that can be."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .entries import Entry, Option
from .errors import RequestError
from .types import Value

#: The origin of a setting that the command line gave.
SET = "--set"
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


@dataclass(frozen=True)
class Setting:
    """One option's value and where it came from. `key` is its name in `--set`."""

    key: str
    value: Value
    origin: str
    help: str = ""


def settle(key: str, option: Option, owner: str, entries: Iterable[Entry], given: str | None) -> Setting:
    """The default, then what entries set, the later over the earlier, then `--set`.

    Args:
        key: as in `--set`.
        owner: of the option.
        given: the text of `--set`; None if it says nothing of this option.

    Raises:
        RequestError: a value of the wrong type or outside what the option allows.
    """
    setting = Setting(key, option.default, owner, option.help)
    for entry in entries:
        if key in entry.settings:
            origin = f"{entry.name} ({entry.origins.get('settings', entry.owner)})"
            setting = Setting(key, _checked(key, option, _typed(key, option, entry)), origin, option.help)
    if given is not None:
        setting = Setting(key, _checked(key, option, _read(key, option, given)), SET, option.help)
    return setting


def _typed(key: str, option: Option, source: Entry) -> Value:
    """A setting of the registry, in the type of the option's default."""
    value, kind = source.settings[key], type(option.default)
    if type(value) is not kind and not (kind is float and type(value) is int):
        owner = source.origins.get("settings", source.owner)
        raise RequestError(
            f"{key} = {value!r} in the settings of {source.name} ({owner}): must be {_WORDS[kind]}",
            option.help or f"default: {option.default}",
        )
    return kind(value)


def _read(key: str, option: Option, text: str) -> Value:
    """The text of `--set` in the type of the option's default."""
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    try:
        if isinstance(option.default, bool):
            return words[text.lower()]
        value = type(option.default)(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(text)
        return value
    except (ValueError, KeyError):
        kind = _WORDS[type(option.default)]
        raise RequestError(f"--set {key}={text}: must be {kind}", option.help or f"default: {option.default}") from None


def _checked(key: str, option: Option, value: Value) -> Value:
    if problem := option.unfit(value):
        raise RequestError(f"{key} = {value!r}: {problem}", option.help or f"default: {option.default}")
    return value
