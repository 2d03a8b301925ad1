"""The registry: which names exist, who owns them, which module carries each. Imports no plugin.

Fragments are merged in layers: packages < user < project. Our names are nobody else's, other packages that claim the
same name contest it; the user's and the project's files may change any field, and the origin is remembered.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from . import __version__
from .distributions import advertised
from .entries import (
    Calibration,
    Defaults,
    Engine,
    Entry,
    Family,
    Gate,
    Metric,
    Model,
    Owner,
    Precision,
    Reference,
    StageEntry,
)
from .errors import RequestError, did_you_mean, first_line
from .structure import read_toml
from .types import Ref

API = 1
#: Our own distribution.
OURS = "engine-recipes"
_OUR_FILE = Path(__file__).with_name("registry.toml")


@dataclass(frozen=True)
class Fragment:
    """One parsed file."""

    owner: Owner
    table: Mapping[str, Any]
    installed: bool = True  # a package's, not the user's or the project's


@dataclass(frozen=True)
class Problem:
    """Something wrong in an installed package's fragment. It hurts only builds that name the entry."""

    owner: Owner
    text: str


E = TypeVar("E", bound=Entry)
T = TypeVar("T")
#: What one entry of a kind is called.
SINGULAR = {
    "families": "family",
    "models": "model",
    "calibrations": "calibration",
    "precisions": "precision",
    "engines": "engine",
    "references": "reference",
    "metrics": "metric",
    "aliases": "alias",
    "architectures": "architecture",
}


@dataclass(frozen=True)
class Names(Generic[E]):
    """The entries of one kind, and why some names cannot be used."""

    kind: str
    entries: Mapping[str, E]
    unusable: Mapping[str, RequestError]
    is_partial: bool = False  # something was left out: what is missing may be that

    def __getitem__(self, name: str) -> E:
        if name in self.unusable:
            raise self.unusable[name]
        if name not in self.entries:
            hint = did_you_mean(name, self.entries)
            hint += "; `recipes plugins` shows what was left out" if self.is_partial else ""
            raise RequestError(f"no {SINGULAR[self.kind]} named {name!r}", hint)
        return self.entries[name]


@dataclass(frozen=True)
class Registry:
    """All names. Nothing behind them has been imported.

    Attributes:
        contested: aliases that several packages claim, and what is said to whoever uses one.
        prefer: `KIND.NAME` -> the package that the user has chosen for it.
    """

    families: Names[Family]
    models: Names[Model]
    calibrations: Names[Calibration]
    precisions: Names[Precision]
    engines: Names[Engine]
    references: Names[Reference]
    metrics: Names[Metric]
    gate: Gate
    aliases: Mapping[str, str]
    contested: Mapping[str, RequestError]
    prefer: Mapping[str, Any]
    defaults: Defaults
    problems: tuple[Problem, ...]
    owners: tuple[Owner, ...]

    @property
    def kinds(self) -> tuple[Names[Any], ...]:
        """All kinds of entry, in the order in which a build meets them."""
        return (
            self.families,
            self.models,
            self.calibrations,
            self.precisions,
            self.engines,
            self.references,
            self.metrics,
        )

    @property
    def stage_entries(self) -> list[StageEntry]:
        """Everything that a stage can run."""
        kinds: tuple[Names[Any], ...] = (self.calibrations, self.precisions, self.engines, self.references)
        return [entry for names in kinds for entry in names.entries.values()]

    def calibration_of(self, precision: Precision) -> Calibration | None:
        """What a precision wants measured first. Raises RequestError if there is no such calibration."""
        return self.calibrations[precision.calibration] if precision.calibration else None

    def expand(self, ref: Ref) -> Ref:
        """Replace an alias; what the request says itself wins over what the alias says. A model's name is none.

        Raises:
            RequestError: several packages claim the alias.
        """
        from .refs import parse

        if ref.model in self.models.entries or ref.model in self.models.unusable:
            return ref
        if ref.model in self.contested:
            raise self.contested[ref.model]
        if ref.model not in self.aliases:
            return ref
        full = parse(self.aliases[ref.model])
        return Ref(full.model, ref.precision or full.precision, ref.engine or full.engine)

    def family_of(self, architecture: str) -> Family:
        """The first family that knows an architecture: of the package that the user prefers, else ours, else another's.

        Raises:
            RequestError: none does, or those of several packages do.
        """
        found = [f for f in self.families.entries.values() if architecture in f.architectures]
        if not found:
            raise RequestError(
                f"no installed family knows the architecture {architecture}",
                "install a package that adds it, or write one: `recipes new family`",
            )
        chosen = [f for f in found if f.owner.package == self.prefer.get(f"architectures.{architecture}")]
        settled = [f for f in found if f.owner.package in (OURS, self.prefer.get(f"families.{f.name}"))]
        owners = list(dict.fromkeys(f.owner for f in found))
        if owners[1:] and not (chosen or settled):
            raise claimed_by("architectures", architecture, owners)
        return (chosen or settled or found)[0]


def load(project: Path | None = None) -> Registry:
    """Read and merge every fragment of this machine.

    Args:
        project: the project's file; by default `./registry.toml`, if there is one.

    Raises:
        RequestError: our own, the user's or the project's file is wrong; all errors are listed.
    """
    fragments, problems = [_read(Owner(OURS, __version__, _OUR_FILE))], []
    are_plugins_on = os.environ.get("RECIPES_PLUGINS", "1") != "0"
    if are_plugins_on:
        for one in advertised():
            owner = Owner(one.package, one.version, one.path)
            if one.problem:
                problems.append(Problem(owner, one.problem))
            elif owner.package != OURS:
                try:
                    fragments.append(_read(owner))
                except RequestError as error:
                    problems.append(Problem(owner, str(error)))
    fragments += _local_fragments(project)
    return _merged(fragments, problems, are_plugins_on)


def _merged(fragments: list[Fragment], problems: list[Problem], is_complete: bool) -> Registry:
    """What all say together; a package whose fragment stops the merging is left out, and that is its problem."""
    from .merging import merge

    try:
        return merge(fragments, problems, is_complete=is_complete)
    except RequestError:
        raise
    except Exception:
        ours, *others = fragments
        for one in (f for f in others if f.installed):
            try:
                merge([ours, one])
            except Exception as error:
                problems.append(Problem(one.owner, f"{one.owner.path} cannot be merged: {first_line(error)}"))
                fragments = [f for f in fragments if f is not one]
        return merge(fragments, problems, is_complete=is_complete)


def _local_fragments(project: Path | None) -> list[Fragment]:
    config = os.environ.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser()
    user = Path(config, "engine-recipes", "registry.toml")
    if project is not None and not project.is_file():
        raise RequestError(f"there is no file {project}", "give --registry a registry.toml")
    here = Path("registry.toml")
    places = [("your registry.toml", user)] if _is_there(user) else []
    if project or (_is_there(here) and not _is_of_a_package(here)):
        places.append(("this project's registry.toml", project or here))
    return [_read(Owner(name, path=path), is_installed=False) for name, path in places if not _is_ours(path)]


def _is_ours(path: Path) -> bool:
    return path.exists() and path.samefile(_OUR_FILE)


def _is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a folder that nobody may look into
        return False


def _is_of_a_package(path: Path) -> bool:
    """Whether a file is what a package advertises: in a checkout of one it is no project's."""
    folder = path.resolve().parent
    return any((folder / name).is_file() for name in ("__init__.py", "hookspecs.py"))


def _read(owner: Owner, is_installed: bool = True) -> Fragment:
    try:
        if is_installed and owner.package != OURS and owner.path.samefile(_OUR_FILE):
            raise ValueError(f"its entry point names {OURS}'s own package")
        table = read_toml(owner.path, is_checked=owner.path != _OUR_FILE)
    except (OSError, ValueError, RecursionError) as error:  # of the TOML too
        reason = error.strerror if isinstance(error, OSError) else error
        raise RequestError(f"{owner.path} ({owner}) cannot be read: {reason}", "mend or remove that file") from None
    api = table.pop("api", 1)
    if type(api) is not int or api < 1:
        raise RequestError(
            f"{owner.path} ({owner}): api = {api!r} is no version of the plugin API", f"write api = {API}"
        )
    if api > API:
        raise RequestError(
            f"{owner.path} ({owner}) asks for plugin API {api}, this is {OURS} {__version__} with API {API}",
            f"install a newer {OURS}" + (f", or an older {owner.package}" if is_installed else ""),
        )
    return Fragment(owner, table, is_installed)


def claimed_by(kind: str, name: str, owners: list[Owner]) -> RequestError:
    """That more than one package claims a name, and what to do."""
    if len({owner.package for owner in owners}) == 1:
        return RequestError(
            f"{SINGULAR[kind]} {name!r} stands in {len(owners)} files of {owners[0]}",
            "uninstall that package, or report this to its authors",
        )
    who = " and ".join(str(owner) for owner in owners)
    return RequestError(
        f"{SINGULAR[kind]} {name!r} is claimed by {who}",
        f'uninstall one, or choose in your registry.toml: [prefer] "{kind}.{name}" = "{owners[0].package}"',
    )
