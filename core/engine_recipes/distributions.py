"""Installed distributions: who advertises a registry fragment, and which versions there are. Imports none of them.

`recipes list` asks this each time, and importing `importlib.metadata` alone takes a sixth of it, for archives and mail
headers that are not needed. So folders of the path are read here, by the same rules (PyPA's "Recording installed
projects" and "Entry points"); where the path holds anything else, `importlib.metadata` is asked. Of METADATA only the
fields before the first empty line are read: parsing all of it, with a README inside, takes longer than all the rest.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Protocol

from .errors import first_line, printable
from .requirements import canonical

#: The entry-point group.
GROUP = "engine_recipes"


@dataclass(frozen=True)
class Advertised:
    """A package that says by an entry point where its `registry.toml` lies.

    Attributes:
        package, version: of the distribution.
        path: of the file, which need not exist.
        problem: why the entry point cannot be read; empty if it can.
    """

    package: str
    version: str
    path: Path = Path()
    problem: str = ""


class _Installed(Protocol):
    """What is asked of a distribution, ours or one of `importlib.metadata`."""

    def read_text(self, filename: str) -> str | None:
        """A file of its metadata, None if there is none."""


class _Folder:
    """A distribution that pip has put into a folder of the path."""

    def __init__(self, place: str, name: str) -> None:
        self.place, self.file = place, name

    @property
    def name(self) -> str:
        """Of NAME-VERSION.dist-info, or of NAME.egg-info, which setuptools leaves in a source tree."""
        return canonical(self.file.rpartition(".")[0].partition("-")[0])

    def read_text(self, filename: str) -> str | None:
        """See `_Installed`."""
        try:
            with open(os.path.join(self.place, self.file, filename), encoding="utf-8") as file:
                return file.read()
        except OSError:
            return None


def advertised() -> list[Advertised]:
    """All of them by name. Of a package that is installed twice, the one that Python would import."""
    found: dict[str, list[Advertised]] = {}
    for dist in _folders() if _is_plain() else _distributions():
        # not `entry_points()`: it raises if any file of any distribution is damaged
        try:
            text = dist.read_text("entry_points.txt") or ""
        except (OSError, ValueError):
            continue
        if GROUP in text:
            package, version = identity(dist)
            found.setdefault(canonical(package), _read(text, package, version))
    found.pop("", None)
    return sorted((one for several in found.values() for one in several), key=lambda one: (one.package, one.path))


def _is_plain() -> bool:
    """Whether all that is installed lies in folders of the path."""
    others = any(os.path.isfile(place) or place.endswith(".egg") for place in _places())
    return not others and all(f is PathFinder or not hasattr(f, "find_distributions") for f in sys.meta_path)


def _places() -> list[str]:
    return [place for place in sys.path if isinstance(place, str)]  # others are ignored by Python too


def _folders() -> Iterator[_Folder]:
    for place in _places():
        try:
            names = os.listdir(place or ".")
        except OSError:  # it need not exist
            continue
        yield from (_Folder(place, name) for name in names if name.endswith((".dist-info", ".egg-info")))


def _distributions() -> Iterable[_Installed]:
    from importlib.metadata import distributions

    return distributions()


def _read(text: str, package: str, version: str) -> list[Advertised]:
    try:
        values = set(_values(text))
    except ValueError as error:
        return [Advertised(package, version, problem=f"its entry_points.txt cannot be read: {first_line(error)}")]
    places = {_top(value): _folder(_top(value)) for value in sorted(values)}
    return [
        Advertised(package, version, Path(folder, "registry.toml"))
        if folder
        else Advertised(package, version, problem=f"its package {printable(top)} is not installed")
        for top, folder in places.items()
    ]


def _values(text: str) -> Iterator[str]:
    """What the entry points of our group name."""
    group = ""
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("[") and line.endswith("]"):
            group = line[1:-1]
        elif group == GROUP and not line.startswith("#"):
            _, equals, value = line.partition("=")
            if not equals:
                raise ValueError(f"{printable(line)} is no NAME = PACKAGE")
            yield value.strip()


def versions(names: Iterable[str]) -> dict[str, str]:
    """The versions of the distributions that are installed, by these names."""
    wanted = {canonical(name): name for name in names}
    found: dict[str, str] = {}
    if _is_plain():
        for dist in _folders():
            if dist.name in wanted and wanted[dist.name] not in found:
                found[wanted[dist.name]] = identity(dist)[1]
        return found
    from importlib.metadata import PackageNotFoundError, distribution

    for name in filter(None, wanted.values()):
        try:
            found[name] = identity(distribution(name))[1]
        except PackageNotFoundError:
            continue
    return found


def identity(dist: _Installed) -> tuple[str, str]:
    """Name and version; empty where the metadata does not say, as a broken installation leaves it."""
    try:
        text = dist.read_text("METADATA") or dist.read_text("PKG-INFO") or ""
    except (OSError, ValueError):
        text = ""
    # https://packaging.python.org/specifications/core-metadata: fields, an empty line, the description
    fields = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    header = {key.lower(): value.strip() for key, _, value in fields}
    return printable(header.get("name", "")), printable(header.get("version", ""))


def _top(value: str) -> str:
    """The top-level package that an entry point names."""
    return value.partition(":")[0].partition(".")[0].strip() or repr(value)


def _folder(package: str) -> str:
    """The folder of a top-level package, found without running it; empty if there is none."""
    from importlib.util import find_spec

    try:
        spec = find_spec(package)
        return next(iter(spec.submodule_search_locations or ()), "") if spec else ""
    except Exception:  # foreign finders are asked too: whatever one raises, nobody else may suffer
        return ""
