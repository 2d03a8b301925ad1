"""Requirements and version ranges, as Python packages write them (PEP 440, PEP 508).

Nearly all are a name and plain bounds: these are read here, since `recipes list` reads every one of them and importing
the parser would take longer than that. The others are left to `packaging`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

_PLAIN_RANGE = re.compile(r"\s*(==|!=|<=?|>=?)\s*\d+(\.\d+)*\s*(,\s*(==|!=|<=?|>=?)\s*\d+(\.\d+)*\s*)*", re.ASCII)
_PLAIN_NAME = re.compile(r"\s*([A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)\s*", re.ASCII)


@dataclass(frozen=True)
class Requirement:
    """One alternative of a requirement.

    Attributes:
        name: of the distribution, as written.
        versions: as a range; empty: any.
        applies: False if its marker says that it is for other machines than this.
    """

    name: str
    versions: str = ""
    applies: bool = True


def is_range(text: str) -> bool:
    """Whether it is a version range such as `>=1.23,<2`."""
    if _PLAIN_RANGE.fullmatch(text):
        return True
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        return bool(SpecifierSet(text))
    except InvalidSpecifier:
        return False


def is_requirement(text: str) -> bool:
    """Whether each alternative of `onnxruntime>=1.23 | onnxruntime-gpu>=1.23` can be read."""
    try:
        return all(map(parse, text.split("|")))
    except ValueError:
        return False


def is_name(text: str) -> bool:
    """Whether it can be the name of a distribution."""
    return bool(_PLAIN_NAME.fullmatch(text))


def canonical(name: str) -> str:
    """The one spelling of a distribution's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def parse(text: str) -> Requirement:
    """Read one alternative: `numpy>=1.26`, `numpy[extra]>=1; python_version < "3.12"`. Extras change nothing.

    Raises:
        ValueError: it is none, or it names a place to download from.
    """
    name = _PLAIN_NAME.match(text)
    rest = text[name.end() :] if name else ""
    if name and (not rest or _PLAIN_RANGE.fullmatch(rest)):
        return Requirement(name[1], rest)
    from packaging import requirements

    found = requirements.Requirement(text.strip())  # its InvalidRequirement is a ValueError
    if found.url:
        raise ValueError(f"{text!r} names a place and no versions")
    return Requirement(found.name, str(found.specifier), found.marker is None or found.marker.evaluate())
