"""The registry: which names exist, who owns them, which module carries each. Imports no plugin.

Fragments are merged in layers: packages (ours and installed ones, equals) < user < project. Packages that claim
the same name contest it; the user's and the project's files may change any field, and the origin is remembered.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Mapping
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
from .errors import RecipesError, RequestError, did_you_mean
from .refs import NAME
from .structure import quote, structure, suggest
from .types import Ref

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

API = 1
_OURS = "engine-recipes"
#: What every build is judged by: a second claim to one of our names takes it from nobody.
_OURS_STAYS = ("references", "metrics")
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
_KINDS: dict[str, type[Entry]] = {
    "families": Family,
    "models": Model,
    "calibrations": Calibration,
    "precisions": Precision,
    "engines": Engine,
    "references": Reference,
    "metrics": Metric,
}
_SINGULAR = {
    "families": "family",
    "models": "model",
    "calibrations": "calibration",
    "precisions": "precision",
    "engines": "engine",
    "references": "reference",
    "metrics": "metric",
}


@dataclass(frozen=True)
class Names(Generic[E]):
    """The entries of one kind, and why some names cannot be used."""

    kind: str
    entries: Mapping[str, E]
    unusable: Mapping[str, RequestError]

    def __getitem__(self, name: str) -> E:
        if name in self.unusable:
            raise self.unusable[name]
        if name not in self.entries:
            raise RequestError(f"no {_SINGULAR[self.kind]} named {name!r}", did_you_mean(name, self.entries))
        return self.entries[name]


@dataclass(frozen=True)
class Registry:
    """All names. Nothing behind them has been imported."""

    families: Names[Family]
    models: Names[Model]
    calibrations: Names[Calibration]
    precisions: Names[Precision]
    engines: Names[Engine]
    references: Names[Reference]
    metrics: Names[Metric]
    gate: Gate
    aliases: Mapping[str, str]
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
        """Replace an alias; what the request says itself wins over what the alias says."""
        from .refs import parse

        if ref.model not in self.aliases or ref.model in self.models.entries:
            return ref
        full = parse(self.aliases[ref.model])
        return Ref(full.model, ref.precision or full.precision, ref.engine or full.engine)

    def family_of(self, architecture: str) -> Family:
        """The first family that knows an architecture, ours before installed ones. Raises RequestError if none does."""
        found = [f for f in self.families.entries.values() if architecture in f.architectures]
        if not found:
            known = sorted({a for f in self.families.entries.values() for a in f.architectures})
            raise RequestError(
                f"no installed family knows the architecture {architecture}",
                f"{did_you_mean(architecture, known)} or install a package that adds it (`recipes plugins`)",
            )
        return found[0]


def load(project: Path | None = None) -> Registry:
    """Read and merge every fragment of this machine.

    Args:
        project: the project's file; by default `./registry.toml`, if there is one.

    Raises:
        RequestError: our own, the user's or the project's file is wrong; all errors are listed.
    """
    fragments, problems = [_read(Owner(_OURS, __version__, _OUR_FILE))], []
    if os.environ.get("RECIPES_PLUGINS", "1") != "0":
        for one in advertised():
            owner = Owner(one.package, one.version, one.path)
            if one.problem:
                problems.append(Problem(owner, one.problem))
            elif owner.package != _OURS:
                try:
                    fragments.append(_read(owner))
                except RequestError as error:
                    problems.append(Problem(owner, str(error)))
    fragments += _local_fragments(project)
    return merge(fragments, problems)


def _local_fragments(project: Path | None) -> list[Fragment]:
    config = os.environ.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser()
    user = Path(config, "engine-recipes", "registry.toml")
    if project is not None and not project.is_file():
        raise RequestError(f"there is no file {project}", "give --registry a registry.toml")
    places = [("your registry.toml", user), ("this project's registry.toml", project or Path("registry.toml"))]
    return [
        _read(Owner(name, path=path), is_installed=False)
        for name, path in places
        if path.is_file() and not path.samefile(_OUR_FILE)
    ]


def _read(owner: Owner, is_installed: bool = True) -> Fragment:
    try:
        if not owner.path.is_file():  # a pipe would be waited for
            raise FileNotFoundError(errno.ENOENT, "there is no such file")
        if is_installed and owner.package != _OURS and owner.path.samefile(_OUR_FILE):
            raise ValueError(f"its entry point names {_OURS}'s own package")
        table = tomllib.loads(owner.path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # of the TOML too
        reason = error.strerror if isinstance(error, OSError) else error
        raise RequestError(f"{owner.path} ({owner}) cannot be read: {reason}", "mend or remove that file") from None
    api = table.pop("api", 1)
    if type(api) is not int or not 1 <= api <= API:
        raise RequestError(
            f"{owner.path} ({owner}) asks for plugin API {api}, this is {_OURS} {__version__} with API {API}",
            f"install a newer {_OURS}, or an older {owner.package}",
        )
    return Fragment(owner, table, is_installed)


def merge(fragments: Iterable[Fragment], problems: Iterable[Problem] = ()) -> Registry:
    """Merge fragments into a registry. Errors in installed packages become problems, others are raised together."""
    fragments = list(fragments)
    merger = _Merger(fragments, list(problems))
    for fragment in fragments:
        known = {*_KINDS, "defaults", "aliases", "prefer", *(["gate"] if fragment.owner.package == _OURS else [])}
        for key, value in fragment.table.items():
            if key not in known:
                merger.complain(fragment.owner, f"{key}: unknown{suggest(key, known)}")
            elif not isinstance(value, Mapping):
                merger.complain(fragment.owner, f"{key}: must be a table")
    defaults = structure(Defaults, merger.joined("defaults"), "defaults", merger.local)
    registry = Registry(
        families=Names("families", *merger.kind("families", Family)),
        models=Names("models", *merger.kind("models", Model)),
        calibrations=Names("calibrations", *merger.kind("calibrations", Calibration)),
        precisions=Names("precisions", *merger.kind("precisions", Precision)),
        engines=Names("engines", *merger.kind("engines", Engine)),
        references=Names("references", *merger.kind("references", Reference)),
        metrics=Names("metrics", *merger.kind("metrics", Metric)),
        gate=structure(Gate, merger.joined("gate"), "gate", merger.local) or Gate(),
        aliases=merger.aliases(),
        defaults=defaults or Defaults(),
        problems=tuple(merger.problems),
        owners=tuple(f.owner for f in fragments),
    )
    merger.check_settings(registry)
    if merger.local:
        lines = "\n  ".join(merger.local)
        count = len(merger.local)
        raise RequestError(
            f"the registry has {count} error{'s' * (count > 1)}:\n  {lines}", "mend the file named in each line"
        )
    return registry


class _Merger:
    """Collects definitions of each name from all fragments and turns them into entries."""

    def __init__(self, fragments: list[Fragment], problems: list[Problem]) -> None:
        self.fragments, self.problems = fragments, problems
        self.local: list[str] = []  # errors in files that the user can mend
        self.prefer = self.joined("prefer")

    def complain(self, owner: Owner, text: str) -> None:
        if any(f.owner is owner and f.installed and owner.package != _OURS for f in self.fragments):
            self.problems.append(Problem(owner, text))
        else:
            self.local.append(f"{owner.path}: {text}")

    def tables(self, key: str) -> list[tuple[Fragment, Mapping[str, Any]]]:
        found = [(f, f.table.get(key, {})) for f in self.fragments]
        return [(f, t) for f, t in found if isinstance(t, Mapping)]

    def joined(self, key: str) -> dict[str, Any]:
        """Tables that only the first package, the user and the project may fill: later ones win."""
        result: dict[str, Any] = {}
        for fragment, table in self.tables(key):
            if not fragment.installed or fragment.owner.package == _OURS:
                result.update(table)
        return result

    def aliases(self) -> dict[str, str]:
        result: dict[str, str] = {}
        for fragment, table in self.tables("aliases"):
            for name, ref in table.items():
                if not isinstance(ref, str) or not NAME.fullmatch(name):
                    self.complain(fragment.owner, f"aliases.{quote(name)}: must be a name and a reference")
                elif not fragment.installed or name not in result:
                    result[name] = ref
        return result

    def check_settings(self, registry: Registry) -> None:
        """Every setting must name an option that some calibration, precision or engine has."""
        known = {name for entry in registry.precisions.entries.values() for name in entry.options}
        known |= {f"calib.{name}" for entry in registry.calibrations.entries.values() for name in entry.options}
        engines = registry.engines.entries.values()
        known |= {f"build.{name}" for entry in engines for name in entry.options}
        if any(key.startswith("build.") and key not in known for key in self.set_keys(registry)):
            known |= self.detailed(registry)
        known |= {f"gate.{name}" for name in registry.gate.options}
        known |= {f"gate.{name}.{limit}" for name in registry.metrics.entries for limit in ("warn", "fail")}
        for names in registry.kinds:
            for name, entry in names.entries.items():
                owner = entry.origins.get("settings", entry.owner)
                for key in entry.settings:
                    if key not in known:
                        path = f"{names.kind}.{quote(name)}.settings.{quote(key)}"
                        self.complain(owner, f"{path}: unknown{suggest(key, known)}")

    def detailed(self, registry: Registry) -> set[str]:
        """Options that stand in the files of engines' `details`: read only if it matters.

        If an engine cannot be read, any option may be its own: then nothing of `build.` is unknown.
        """
        from . import combinations

        found: set[str] = set()
        is_complete = not registry.engines.unusable
        for engine in registry.engines.entries.values():
            try:
                found |= {f"build.{name}" for name in combinations.complete(engine).options}
            except RecipesError:
                is_complete = False
        return found if is_complete else {key for key in self.set_keys(registry) if key.startswith("build.")}

    def set_keys(self, registry: Registry) -> set[str]:
        """Every option that some entry sets."""
        return {key for names in registry.kinds for entry in names.entries.values() for key in entry.settings}

    def kind(self, kind: str, cls: type[E]) -> tuple[dict[str, E], dict[str, RequestError]]:
        entries: dict[str, E] = {}
        unusable: dict[str, RequestError] = {}
        tables = self.tables(kind)
        for name in {name: None for _, table in tables for name in table}:
            found = [(f, t[name]) for f, t in tables if name in t]
            claims = [(f, t) for f, t in found if f.installed]
            chosen = [c for c in claims if c[0].owner.package == self.prefer.get(f"{kind}.{name}")] or claims
            if kind in _OURS_STAYS and chosen[1:] and chosen[0][0].owner.package == _OURS:
                for fragment, _ in chosen[1:]:
                    self.complain(fragment.owner, f"{kind}.{quote(name)}: {_OURS} has one of that name")
                chosen = chosen[:1]
            if len(chosen) > 1:
                unusable[name] = _contested(kind, name, [f.owner for f, _ in chosen])
                continue
            layers = chosen[:1] + [c for c in found if not c[0].installed]
            entry = self.entry(kind, cls, name, layers)
            if isinstance(entry, RequestError):
                unusable[name] = entry
            else:
                entries[name] = entry
        return entries, unusable

    def entry(self, kind: str, cls: type[E], name: str, layers: list[tuple[Fragment, Any]]) -> E | RequestError:
        path, owner = f"{kind}.{quote(name)}", layers[0][0].owner
        errors: list[str] = []
        if not NAME.fullmatch(name):
            errors.append(f"{path}: a name is lower-case letters, digits, '.', '_' and '-'")
        table: dict[str, Any] = {}
        origins: dict[str, Owner] = {}
        for fragment, layer in layers:
            if not isinstance(layer, Mapping):
                errors.append(f"{path}: must be a table")
                continue
            _overlay(table, layer)
            if fragment.owner is not owner:
                origins.update({key: fragment.owner for key in layer})
        entry = structure(cls, table, path, errors)
        errors += [f"{path}.{problem}" for problem in (entry.problems() if entry else ())]
        if entry is None or errors:
            for error in errors:
                field_name = error.removeprefix(f"{path}.").partition(":")[0].partition(".")[0]
                self.complain(origins.get(field_name, owner), error)
            return RequestError(f"{path} ({owner}) cannot be used: {errors[0]}", f"mend {owner.path}")
        values = {f: getattr(entry, f) for f in cls.__dataclass_fields__} | {"name": name, "owner": owner}
        return cls(**{**values, "origins": origins})


def _overlay(table: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, Mapping) and isinstance(table.get(key), dict):
            _overlay(table[key], value)
        else:
            table[key] = dict(value) if isinstance(value, Mapping) else value


def _contested(kind: str, name: str, owners: list[Owner]) -> RequestError:
    who = " and ".join(str(owner) for owner in owners)
    return RequestError(
        f"{_SINGULAR[kind]} {name!r} is claimed by {who}",
        f'uninstall one, or choose in your registry.toml: [prefer] "{kind}.{name}" = "{owners[0].package}"',
    )
