"""The registry: which names exist, who owns them, which module carries each. Imports no plugin.

Fragments are merged in layers: packages (ours and installed ones, equals) < user < project. Packages that claim
the same name contest it; the user's and the project's files may change any field, and the origin is remembered.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from . import __version__
from .errors import RequestError, did_you_mean
from .refs import NAME
from .structure import quote, structure, suggest
from .types import BASELINE, CALIBRATION, HF_CHECKPOINT, TRTLLM_CHECKPOINT, Ref, Value

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

API = 1
#: Models of fewer parameters lose more when they are quantised, and have limits of their own.
SMALL = 1_000_000_000
GROUP = "engine_recipes"
_OURS = "engine-recipes"


@dataclass(frozen=True)
class Owner:
    """Who a name belongs to: the package (or file) that its fragment lies in."""

    package: str
    version: str = ""
    path: Path = Path()

    def __str__(self) -> str:
        return f"{self.package} {self.version}".strip()


@dataclass(frozen=True)
class Option:
    """One setting of a stage: its default says its type.

    Attributes:
        data: the value names data (`FILE.txt`, `hf:DATASET`): what counts in the key is its content, not its name.
        keyed: False for a setting that says how a thing is done and not what it is; it is in no key.
        unset: what an option that is left empty amounts to: the tool's own default, for `refuses` to look at.
        versions: of the tool that have it, as a version range; compared with the option `version`.
        kind: of an option that may stay empty, what it is otherwise: an engine's own words.
    """

    default: Value
    choices: tuple[Value, ...] = ()
    min: float | None = None
    max: float | None = None
    help: str = ""
    data: bool = False
    keyed: bool = True
    unset: Value = ""
    versions: str = ""
    kind: str = ""

    @classmethod
    def from_value(cls, value: Any) -> Option:
        """`tp_size = 1` is short for `tp_size = { default = 1 }`."""
        return cls(value)


@dataclass(frozen=True)
class Limit:
    """Where a metric warns and fails for one precision; what is left out is the metric's own."""

    warn: float | None = None
    fail: float | None = None


@dataclass(frozen=True)
class Needs:
    """Hardware that a precision pays on, as a version range: `compute = ">=8.9"`. Empty: any."""

    compute: str = ""


@dataclass(frozen=True)
class Costs:
    """What a stage takes at its peak, for a model of so many parameters: the base, and bytes for each of them.

    An engine's are for each parameter of a 16-bit checkpoint; of one with smaller weights it takes as much less.

    Attributes:
        memory_base: bytes of RAM, whatever the model.
        memory: bytes of RAM for each parameter.
        disk: bytes on disk for each parameter.
        gpu_memory: bytes of GPU memory for each parameter, where a GPU is used.
    """

    memory_base: int = 0
    memory: float = 0.0
    disk: float = 0.0
    gpu_memory: float = 0.0


@dataclass(frozen=True)
class Refusal:
    """A combination that cannot work, refused before any work.

    Attributes:
        when: all of these hold. The key is `target`, `compute`, `precision`, `algorithm`, or an option as in `--set`;
            the value a pattern, see `combinations.matches`.
        why: one line, what is wrong.
        instead: one line, what to do about it.
    """

    when: Mapping[str, str]
    why: str
    instead: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """What all kinds of entry share.

    Attributes:
        settings: options that this entry sets for every build it takes part in, as in `--set`.
        origins: field -> owner, for fields that another fragment than the owner's has set.
    """

    settings: Mapping[str, Value] = field(default_factory=dict)
    name: str = field(default="", metadata={"toml": False})
    owner: Owner = field(default=Owner(""), metadata={"toml": False})
    origins: Mapping[str, Owner] = field(default_factory=dict, metadata={"toml": False})


@dataclass(frozen=True, kw_only=True, eq=False)
class Family(Entry):
    """Models that share a description.

    Attributes:
        architectures: the class names of `config.json` it knows.
        references: what can run their unquantised source, in order of preference; nothing: the defaults.
    """

    module: str
    architectures: tuple[str, ...]
    references: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Model(Entry):
    """One model. `source` are the places its checkpoint may come from, in order of preference."""

    family: str
    source: tuple[str, ...]
    parameters: int = 0
    license: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class StageEntry(Entry):
    """A calibration, a precision or an engine: what it needs, what it takes and gives, and its options.

    Attributes:
        requires: distributions, `onnx>=1.17`; alternatives are joined by `|`.
        install: what to run when one is missing.
        costs: what the stage takes at its peak.
    """

    module: str
    takes: tuple[str, ...]
    gives: str
    requires: tuple[str, ...] = ()
    install: str = ""
    options: Mapping[str, Option] = field(default_factory=dict)
    costs: Costs = Costs()


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration(StageEntry):
    """What is measured on a model before stage 1. Precisions that name the same one share its result.

    Attributes:
        shares: options of the precision that it gets as well, such as `device`. Its own are `calib.…` in `--set`.
    """

    takes: tuple[str, ...] = (HF_CHECKPOINT,)
    gives: str = CALIBRATION
    shares: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference(StageEntry):
    """What runs the unquantised source, for builds to be compared with."""

    takes: tuple[str, ...] = (HF_CHECKPOINT,)
    gives: str = BASELINE


@dataclass(frozen=True, kw_only=True, eq=False)
class Metric(Entry):
    """A number that validation measures, and where it warns and fails unless a precision says otherwise.

    Attributes:
        worse: which way is worse, `above` or `below` the limits.
    """

    worse: Literal["above", "below"]
    help: str
    warn: float | None = None
    fail: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Precision(StageEntry):
    """What stage 1 does.

    Attributes:
        limits: by metric, where validation warns and fails.
        small_limits: the same for models of fewer than SMALL parameters, which lose more; over `limits`.
        bits: per weight of the linear layers, for size estimates.
        algorithm: the `quant_algo` of its checkpoints; nothing if they are not quantised.
        calibration: the name of what is measured first; nothing if the weights are all it needs.
    """

    takes: tuple[str, ...] = (HF_CHECKPOINT,)
    gives: str = TRTLLM_CHECKPOINT
    bits: float = 16
    needs: Needs = Needs()
    algorithm: str = ""
    calibration: str = ""
    limits: Mapping[str, Limit] = field(default_factory=dict)
    small_limits: Mapping[str, Limit] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Engine(StageEntry):
    """What stage 2 compiles to.

    Attributes:
        takes: checkpoint kinds it compiles.
        targets: hardware it builds for: `cpu`, `sm89`, or `sm*`.
        target_requires: more distributions, by target.
        algorithms: by target, the `quant_algo` values it can run there; a target that is not named runs any.
        hardware: facts that go into the key: `target`, `gpu`, `driver`.
        combines: one engine may be for several targets: `sm86+sm89`.
        needs_gpu: it compiles on the GPU that the engine is for, so this machine must have it.
        details: `package:NAME/FILE.toml`, more of `options` and `refuses`; read when a plan needs them.
        programs: what must be on the PATH, or beside `python`; by the value of the option `runtime`, if it has one.
        python: the interpreter of another environment that holds the engine's library; its option `python`.
        refuses: combinations that cannot work.
        binds: distributions that must have the same version where the engine runs as where it was built.
        min_driver: the oldest NVIDIA driver that runs it.
        runtime: what a loaded engine takes.
    """

    targets: tuple[str, ...]
    target_requires: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    algorithms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    hardware: tuple[str, ...] = ("target",)
    combines: bool = False
    needs_gpu: bool = False
    details: str = ""
    programs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    python: str = ""
    refuses: tuple[Refusal, ...] = ()
    binds: tuple[str, ...] = ()
    min_driver: str = ""
    runtime: Costs = Costs()


@dataclass(frozen=True)
class Defaults:
    """What is chosen when the request leaves it open. `engines` and `references` in order of preference."""

    precision: str = "fp16"
    engines: tuple[str, ...] = ()
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gate:
    """How builds are judged: options of the validation itself, `gate.…` in `--set`."""

    options: Mapping[str, Option] = field(default_factory=dict)


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
    fragments, problems = [_read(Owner(_OURS, __version__, Path(__file__).with_name("registry.toml")))], []
    if os.environ.get("RECIPES_PLUGINS", "1") != "0":
        for owner in installed():
            try:
                fragments.append(_read(owner))
            except RequestError as error:
                problems.append(Problem(owner, str(error)))
    fragments += _local_fragments(project)
    return merge(fragments, problems)


def installed() -> list[Owner]:
    """Other packages that advertise a `registry.toml` by an entry point in group `engine_recipes`. Imports none."""
    from importlib.metadata import entry_points

    owners = {}
    for point in entry_points(group=GROUP):
        if point.dist is not None and point.dist.name != _OURS:
            owners[point.value] = Owner(point.dist.name, point.dist.version, _beside(point.value))
    return sorted(owners.values(), key=lambda owner: owner.package)


def _beside(package: str) -> Path:
    """`registry.toml` in a top-level package's folder, found without running the package."""
    from importlib.util import find_spec

    spec = find_spec(package.partition(".")[0])
    for place in (spec.submodule_search_locations or ()) if spec else ():
        return Path(place, "registry.toml")
    return Path(package, "registry.toml")


def _local_fragments(project: Path | None) -> list[Fragment]:
    config = os.environ.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser()
    user = Path(config, "engine-recipes", "registry.toml")
    if project is not None and not project.is_file():
        raise RequestError(f"there is no file {project}", "give --registry a registry.toml")
    places = [("your registry.toml", user), ("this project's registry.toml", project or Path("registry.toml"))]
    ours = Path(__file__).with_name("registry.toml")
    return [
        _read(Owner(name, path=path), is_installed=False)
        for name, path in places
        if path.is_file() and not path.samefile(ours)
    ]


def _read(owner: Owner, is_installed: bool = True) -> Fragment:
    try:
        table = tomllib.loads(owner.path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RequestError(f"{owner.path} ({owner}) cannot be read: {reason}", "mend or remove that file") from None
    api = table.pop("api", API)
    if not isinstance(api, int) or api > API:
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
            known |= self.detailed(engines)
        known |= {f"gate.{name}" for name in registry.gate.options}
        known |= {f"gate.{name}.{limit}" for name in registry.metrics.entries for limit in ("warn", "fail")}
        for names in registry.kinds:
            for name, entry in names.entries.items():
                owner = entry.origins.get("settings", entry.owner)
                for key in entry.settings:
                    if key not in known:
                        path = f"{names.kind}.{quote(name)}.settings.{quote(key)}"
                        self.complain(owner, f"{path}: unknown{suggest(key, known)}")

    def detailed(self, engines: Iterable[Engine]) -> set[str]:
        """Options that stand in the files of engines' `details`: read only if it matters."""
        from . import combinations

        found: set[str] = set()
        for engine in engines:
            try:
                found |= {f"build.{name}" for name in combinations.complete(engine).options}
            except RequestError as error:
                self.complain(engine.owner, error.message)
        return found

    def set_keys(self, registry: Registry) -> set[str]:
        """Every option that some entry sets."""
        return {key for names in registry.kinds for entry in names.entries.values() for key in entry.settings}

    def kind(self, kind: str, cls: type[E]) -> tuple[dict[str, E], dict[str, RequestError]]:
        entries: dict[str, E] = {}
        unusable: dict[str, RequestError] = {}
        names = {name: None for _, table in self.tables(kind) for name in table}
        for name in names:
            found = [(f, t[name]) for f, t in self.tables(kind) if name in t]
            claims = [(f, t) for f, t in found if f.installed]
            chosen = [c for c in claims if c[0].owner.package == self.prefer.get(f"{kind}.{name}")] or claims
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
