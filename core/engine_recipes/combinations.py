"""Combinations that cannot work, as data: the rules of an engine, and whether one of them holds. Pure.

An engine's registry entry may leave most of its options and rules to a file of its own, so that `recipes list` does
not read what only a plan needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from .entries import Engine, Option, Refusal
from .errors import RequestError
from .facts import within
from .structure import read_toml, structure
from .targets import compute_of, parts
from .types import Value

_RANGE = re.compile(r"(<=?|>=?|==)\s*\d")
_VERSION = re.compile(r"\d+(\.\d+)*([a-z]+\d+)?(\.(post|dev)\d+)?")


@dataclass(frozen=True)
class Details:
    """What the file of an engine's `details` holds."""

    options: Mapping[str, Option] = field(default_factory=dict)
    refuses: tuple[Refusal, ...] = ()


def complete(engine: Engine) -> Engine:
    """The engine with what its `details` add. An option `python` gets the entry's `python` as its default.

    Raises:
        RequestError: the file is missing or wrong.
    """
    if not engine.details:
        return engine
    details = _read(engine)
    options = {**details.options, **engine.options}
    if engine.python and "python" in options:
        options["python"] = replace(options["python"], default=engine.python)
    return replace(engine, options=options, refuses=(*engine.refuses, *details.refuses))


def _read(engine: Engine) -> Details:
    from .sources import texts

    try:
        path = texts.package_file(engine.details)
        table = read_toml(path)
    except (OSError, ValueError, RecursionError) as error:  # of the TOML too
        reason = error.strerror if isinstance(error, OSError) else error
        raise RequestError(
            f"{engine.details} ({engine.owner}) cannot be read: {reason}", "install that package again"
        ) from None
    errors: list[str] = []
    details = structure(Details, table, engine.name, errors)
    if details is None:
        raise RequestError(f"{path} ({engine.owner}): {errors[0]}", "report this to the authors of that package")
    return details


def refused(rules: Iterable[Refusal], target: str, values: Mapping[str, Value]) -> Refusal | None:
    """The first rule that holds.

    Args:
        target: one or several; a rule that holds for one of them holds.
        values: `precision`, `algorithm` and options as in `--set`. What is not there is empty.
    """
    for rule in rules:
        for part in parts(target):
            known = {**values, "target": part, "compute": compute_of(part)}
            if all(matches(pattern, known.get(key, "")) for key, pattern in rule.when.items()):
                return rule
    return None


def is_version(text: str) -> bool:
    """Whether it can be compared with others: `1.2.1`, `12.0`, `1.2.0rc3`."""
    return bool(_VERSION.fullmatch(text))


def matches(pattern: str, value: Value) -> bool:
    """Whether a value is what a rule is about.

    The pattern is `a|b`, shell patterns of which one must fit; or a version range such as `>=8.9,<10`, which numbers
    and versions can be in and words cannot; with `!` before it, all that does not fit.
    """
    if pattern.startswith("!"):
        return not matches(pattern[1:], value)
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if _RANGE.match(pattern):
        return is_version(text) and within(text, pattern)
    return any(fnmatchcase(text, alternative.strip()) for alternative in pattern.split("|"))
