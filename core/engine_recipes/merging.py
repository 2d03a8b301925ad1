"""Merging fragments of the registry: who a name belongs to, which fields who has changed, and what is wrong."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from .entries import Calibration, Defaults, Engine, Entry, Family, Gate, Metric, Model, Owner, Precision, Reference
from .errors import RecipesError, RequestError
from .refs import NAME, is_folder, is_hub_id, parse
from .registry import OURS, Fragment, Names, Problem, Registry, claimed_by
from .structure import quote, structure, suggest

E = TypeVar("E", bound=Entry)
T = TypeVar("T")
_KINDS: dict[str, type[Entry]] = {
    "families": Family,
    "models": Model,
    "calibrations": Calibration,
    "precisions": Precision,
    "engines": Engine,
    "references": Reference,
    "metrics": Metric,
}
_MISSING = ": missing"  # how `structure` ends what it says of a key that must be given


def merge(fragments: Iterable[Fragment], problems: Iterable[Problem] = (), *, is_complete: bool = True) -> Registry:
    """Merge fragments into a registry. Errors in installed packages become problems, others are raised together.

    Args:
        is_complete: no package was left out, so that a setting which no option has is an error.
    """
    fragments = list(fragments)
    merger = _Merger(fragments, list(problems))
    for fragment in fragments:
        is_ours = fragment.owner.package == OURS
        known = {*_KINDS, "aliases", *(["gate"] if is_ours else [])}
        known |= {"defaults", "prefer"} if is_ours or not fragment.installed else set()
        for key, value in fragment.table.items():
            if key in ("defaults", "prefer") and key not in known:
                text = f"{key}: counts only in your own or a project's registry.toml"
                more = "; use [models.NAME.settings]" if key == "defaults" else ""
                merger.complain(fragment.owner, text + more)
            elif key not in known:
                merger.complain(fragment.owner, f"{key}: unknown{suggest(key, known)}")
            elif not isinstance(value, Mapping):
                merger.complain(fragment.owner, f"{key}: must be a table")
    defaults = structure(Defaults, merger.joined("defaults"), "defaults", merger.local)
    aliases, contested = merger.aliases()
    registry = Registry(
        families=Names("families", *merger.kind("families", Family)),
        models=Names("models", *merger.kind("models", Model)),
        calibrations=Names("calibrations", *merger.kind("calibrations", Calibration)),
        precisions=Names("precisions", *merger.kind("precisions", Precision)),
        engines=Names("engines", *merger.kind("engines", Engine)),
        references=Names("references", *merger.kind("references", Reference)),
        metrics=Names("metrics", *merger.kind("metrics", Metric)),
        gate=structure(Gate, merger.joined("gate"), "gate", merger.local) or Gate(),
        aliases=aliases,
        contested=contested,
        prefer=merger.prefer,
        defaults=defaults or Defaults(),
        problems=(),
        owners=tuple(f.owner for f in fragments),
    )
    merger.check_settings(registry, is_complete)
    merger.check_names(registry)
    if merger.local:
        lines = "\n  ".join(merger.local)
        count = len(merger.local)
        raise RequestError(
            f"the registry has {count} error{'s' * (count > 1)}:\n  {lines}", "mend the file named in each line"
        )
    if not merger.problems:
        return registry
    partial: dict[str, Any] = {names.kind: replace(names, is_partial=True) for names in registry.kinds}
    return replace(registry, problems=tuple(merger.problems), **partial)


class _Merger:
    """Collects definitions of each name from all fragments and turns them into entries."""

    def __init__(self, fragments: list[Fragment], problems: list[Problem]) -> None:
        self.fragments, self.problems = fragments, problems
        self.local: list[str] = []  # errors in files that the user can mend
        self.prefer = self.joined("prefer")

    def is_foreign(self, owner: Owner) -> bool:
        """Whether it is a package other than ours, and not a file of the user's."""
        return any(f.owner is owner and f.installed and owner.package != OURS for f in self.fragments)

    def complain(self, owner: Owner, text: str) -> None:
        if self.is_foreign(owner):
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
            if not fragment.installed or fragment.owner.package == OURS:
                result.update(table)
        return result

    def aliases(self) -> tuple[dict[str, str], dict[str, RequestError]]:
        """Those that can be used, and why others cannot."""
        found: dict[str, list[tuple[Fragment, str]]] = {}
        for fragment, table in self.tables("aliases"):
            for name, ref in table.items():
                if not isinstance(ref, str) or not NAME.fullmatch(name):
                    self.complain(fragment.owner, f"aliases.{quote(name)}: must be a name and a reference")
                else:
                    found.setdefault(name, []).append((fragment, ref))
        result: dict[str, str] = {}
        contested: dict[str, RequestError] = {}
        for name, claims in found.items():
            is_chosen = not claims[-1][0].installed
            layers = claims[-1:] if is_chosen else self.settle("aliases", name, claims)
            if isinstance(layers, RequestError):
                contested[name] = layers
            else:
                result[name] = layers[-1][1]
        return result, contested

    def settle(self, kind: str, name: str, found: list[tuple[Fragment, T]]) -> list[tuple[Fragment, T]] | RequestError:
        """Whose name it is: that package's definition, if one has it, and then those of the user's files."""
        claims = [c for c in found if c[0].installed]
        chosen = [c for c in claims if c[0].owner.package == self.prefer.get(f"{kind}.{name}")] or claims
        ours = [c for c in chosen if c[0].owner.package == OURS]
        path = f"{kind}.{quote(name)}"
        if ours and chosen[1:]:
            for fragment in (f for f, _ in chosen if f.owner.package != OURS):
                text = f"{path}: {OURS} has one of that name; `[prefer]` in your own registry.toml chooses"
                self.complain(fragment.owner, text)
            chosen = ours
        elif chosen[1:]:
            error = claimed_by(kind, name, [f.owner for f, _ in chosen])
            for fragment, _ in chosen:
                self.complain(fragment.owner, f"{path}: {error.message}")
            return error
        return chosen[:1] + [c for c in found if not c[0].installed]

    def check_settings(self, registry: Registry, is_complete: bool) -> None:
        """Every setting must name an option that some calibration, precision or engine has.

        A user's may be one of a package that is off, missing or broken.
        """
        is_complete &= not self.problems and not any(names.unusable for names in registry.kinds)
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
                    if key not in known and (is_complete or self.is_foreign(owner)):
                        path = f"{names.kind}.{quote(name)}.settings.{quote(key)}"
                        self.complain(owner, f"{path}: unknown{suggest(key, known)}")

    def check_names(self, registry: Registry) -> None:
        """What packages say of families, metrics and models that are not there. A user may name such."""
        families, metrics = ({*names.entries, *names.unusable} for names in (registry.families, registry.metrics))
        for model in registry.models.entries.values():
            if model.family not in families:
                path = f"models.{quote(model.name)}.family"
                self.complain_of_name(
                    model, "family", f"{path}: no family named {model.family!r}", model.family, families
                )
        for precision in registry.precisions.entries.values():
            for field_name in ("limits", "small_limits"):
                for name in getattr(precision, field_name):
                    if name not in metrics:
                        path = f"precisions.{quote(precision.name)}.{field_name}.{quote(name)}"
                        self.complain_of_name(precision, field_name, f"{path}: no metric has that name", name, metrics)
        self.check_aliases(registry)

    def complain_of_name(self, entry: Entry, field_name: str, text: str, name: str, known: set[str]) -> None:
        owner = entry.origins.get(field_name, entry.owner)
        if self.is_foreign(owner):
            self.complain(owner, text + suggest(name, known))

    def check_aliases(self, registry: Registry) -> None:
        """What packages' aliases stand for, as far as they are the ones that count."""
        models = {*registry.models.entries, *registry.models.unusable}
        for fragment, table in self.tables("aliases"):
            for name, text in table.items():
                if not self.is_foreign(fragment.owner) or registry.aliases.get(name) != text:
                    continue
                path = f"aliases.{quote(name)}"
                try:
                    model = parse(text).model
                except RequestError as error:
                    self.complain(fragment.owner, f"{path}: {error.message}")
                    continue
                if not (model in models or is_folder(model) or is_hub_id(model)):
                    self.complain(fragment.owner, f"{path}: no model named {model!r}{suggest(model, models)}")

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
            layers = self.settle(kind, name, found)
            entry = layers if isinstance(layers, RequestError) else self.entry(kind, cls, name, layers)
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
        missing = [error.removesuffix(_MISSING) for error in errors if error.endswith(_MISSING)]
        if errors and not layers[0][0].installed and len(missing) == len(errors):
            lacks = ", ".join(text.removeprefix(f"{path}.") for text in missing)
            return RequestError(
                f"no installed package has {path}, which {owner.path} changes",
                f"install it, remove these lines, or add what a new one needs: {lacks}",
            )
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
