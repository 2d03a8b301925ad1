"""Installed distributions: who advertises a registry fragment, and which versions there are. Imports none of them.

`importlib.metadata` finds them. Of their METADATA only the fields before the first empty line are read: parsing all of
it, with a README inside, takes longer than everything else that a listing does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path

from .errors import first_line, printable

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


def advertised() -> list[Advertised]:
    """All of them by name. Of a package that is installed twice, the one that Python would import."""
    found: dict[str, list[Advertised]] = {}
    for dist in distributions():
        # not `entry_points()`: it raises if any file of any distribution is damaged
        try:
            text = dist.read_text("entry_points.txt") or ""
        except (OSError, ValueError):
            continue
        if GROUP in text:
            package, version = identity(dist)
            found.setdefault(re.sub(r"[-_.]+", "-", package).lower(), _read(dist, package, version))
    found.pop("", None)
    return sorted((one for several in found.values() for one in several), key=lambda one: (one.package, one.path))


def _read(dist: Distribution, package: str, version: str) -> list[Advertised]:
    try:
        values = {point.value for point in dist.entry_points if point.group == GROUP}
    except Exception as error:  # what it raises for a damaged file is its own affair
        return [Advertised(package, version, problem=f"its entry_points.txt cannot be read: {first_line(error)}")]
    places = {_top(value): _folder(_top(value)) for value in sorted(values)}
    return [
        Advertised(package, version, Path(folder, "registry.toml"))
        if folder
        else Advertised(package, version, problem=f"its package {printable(top)} is not installed")
        for top, folder in places.items()
    ]


def version(name: str) -> str | None:
    """The version of an installed distribution, None if there is none."""
    try:
        return identity(distribution(name))[1] if name else None
    except PackageNotFoundError:
        return None


def identity(dist: Distribution) -> tuple[str, str]:
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
