"""What will be done: providers, options, keys. Pure: refuses impossible pairs before any byte moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from . import __version__
from .errors import MachineError, RequestError, did_you_mean
from .facts import Facts, within
from .keys import key_of
from .refs import label
from .registry import Engine, Entry, Family, Model, Option, Precision, Registry, StageEntry
from .sources import Located
from .space import human_bytes
from .store import PLACES, Slot
from .types import HF_CHECKPOINT, Provider, Ref, StageName, Value

#: Raise when keys must change although no version did: what a stage writes has another meaning.
KEY_FORMAT = 1
STAGES: tuple[StageName, ...] = ("resolve", "stage1", "stage2", "validate")
#: How the options of a stage are written in `--set`.
PREFIXES: Mapping[str, str] = {"resolve": "", "stage1": "", "stage2": "build.", "validate": "gate."}


@dataclass(frozen=True)
class Setting:
    """One option's value and where it came from."""

    value: Value
    origin: str
    help: str = ""


@dataclass(frozen=True)
class Stage:
    """One step of a plan.

    Attributes:
        provider: who runs it. For validate: the engine; family and precision are asked too.
        settings: every option of the stage, without prefix.
        preimage: what the key is the hash of; empty while the source is not on this machine.
        slot: where the result belongs; None for validate and while there is no key.
    """

    name: StageName
    provider: Provider
    settings: Mapping[str, Setting]
    gives: str
    preimage: Mapping[str, Any]
    slot: Slot | None

    @property
    def key(self) -> str:
        """sha256 of the pre-image, or nothing while it cannot be known."""
        return key_of(self.preimage) if self.preimage else ""

    @property
    def options(self) -> dict[str, Value]:
        """Option -> value, as the hook gets them."""
        return {name: setting.value for name, setting in self.settings.items()}


@dataclass(frozen=True)
class Plan:
    """A complete reference and the stages that make its engine.

    Attributes:
        chosen: what the request left open and was chosen, in words.
        blocked: why this machine cannot build it now, and what to do; None if it can.
    """

    ref: Ref
    model: Model
    family: Family
    precision: Precision
    engine: Engine
    target: str
    located: Located | None
    stages: tuple[Stage, ...]
    chosen: tuple[str, ...]
    blocked: MachineError | None

    def stage(self, name: StageName) -> Stage:
        """The stage of that name."""
        return next(stage for stage in self.stages if stage.name == name)


def make(
    ref: Ref,
    registry: Registry,
    facts: Facts,
    model: Model,
    located: Located | None,
    *,
    target: str | None = None,
    settings: Mapping[str, str] | None = None,
) -> Plan:
    """Decide everything.

    Args:
        ref: as written; what it leaves out is chosen and said in `chosen`.
        model: the entry for ref.model; made on the spot for a folder or a Hub id.
        located: the checkpoint on this machine, or None if it has to be fetched.
        target: `cpu`, `sm89` …; None chooses.
        settings: `--set`, key -> text.

    Raises:
        RequestError: unknown name, unknown or bad option, a pair that cannot work.
    """
    family = registry.families[model.family]
    precision = registry.precisions[ref.precision or registry.defaults.precision]
    engine = registry.engines[ref.engine or _default_engine(registry, precision, facts, target)]
    where = target or default_target(engine, facts)
    reason, hint = unsupported(precision, engine, where)
    if reason:
        raise RequestError(f"{model.name}:{precision.name}@{engine.name} cannot be built: {reason}", hint)
    chosen = [
        f"{what} {name}"
        for what, name, given in (
            ("precision", precision.name, ref.precision),
            ("engine", engine.name, ref.engine),
            ("target", where, target),
        )
        if not given
    ]
    stages = _Stages(facts, family, precision, engine, model, where, dict(settings or {}), located)
    return Plan(
        ref=Ref(ref.model, precision.name, engine.name),
        model=model,
        family=family,
        precision=precision,
        engine=engine,
        target=where,
        located=located,
        stages=stages.all(),
        chosen=tuple(chosen),
        blocked=blocked(model, precision, engine, where, facts, located),
    )


def unsupported(precision: Precision, engine: Engine, target: str) -> tuple[str, str]:
    """Why this pair can never work, and what would; two empty strings if it can."""
    if precision.gives not in engine.takes:
        takes = " or ".join(engine.takes)
        return f"{engine.name} takes {takes}, {precision.name} gives {precision.gives}", "choose another engine"
    if HF_CHECKPOINT not in precision.takes:
        return f"{precision.name} takes {' or '.join(precision.takes)}", "choose another precision"
    if not any(fnmatch(target, pattern) for pattern in engine.targets):
        return (
            f"{engine.name} builds for {', '.join(engine.targets)}, not {target}",
            f"give --target {engine.targets[0].replace('*', '89')} or another engine",
        )
    compute = _compute(target)
    if compute and precision.needs.compute and not within(compute, precision.needs.compute):
        return (
            f"{precision.name} needs compute capability {precision.needs.compute}, {target} is {compute}",
            "choose another precision or --target",
        )
    return "", ""


def blocked(
    model: Model, precision: Precision, engine: Engine, target: str, facts: Facts, located: Located | None
) -> MachineError | None:
    """Why this machine cannot build it now; None if it can."""
    return lacking(precision, engine, target, facts) or (not_fetched(model) if located is None else None)


def lacking(precision: Precision, engine: Engine, target: str, facts: Facts) -> MachineError | None:
    """What has to be installed before this pair can be built here; None if nothing has."""
    for entry, requires in ((precision, precision.requires), (engine, requirements(engine, target))):
        missing = facts.missing(requires)
        if missing:
            hint = entry.install if set(missing) <= set(facts.missing(entry.requires)) else ""
            hint = hint or f"pip install {' '.join(repr(m) for m in missing)}"
            return MachineError(f"{entry.name} needs {', '.join(missing)}, not installed here", hint)
    return None


def not_fetched(model: Model) -> MachineError:
    """That the checkpoint has to be fetched first, and how much that is."""
    size = f" (about {human_bytes(model.parameters * 2)})" if model.parameters else ""
    return MachineError(
        f"the checkpoint of {model.name} is not on this machine",
        f"run `recipes fetch {model.name}`{size}, or build with --fetch",
    )


def requirements(engine: Engine, target: str) -> tuple[str, ...]:
    """What an engine needs for a target."""
    more = (r for pattern, rs in engine.target_requires.items() if fnmatch(target, pattern) for r in rs)
    return (*engine.requires, *more)


def default_target(engine: Engine, facts: Facts) -> str:
    """This machine's GPU if the engine builds for it and has what it needs for that, else the CPU, else the GPU."""
    for candidate in (facts.target, "cpu"):
        fits = any(fnmatch(candidate, pattern) for pattern in engine.targets)
        if fits and not facts.missing(requirements(engine, candidate)):
            return candidate
    return "cpu" if "cpu" in engine.targets else facts.target


def _default_engine(registry: Registry, precision: Precision, facts: Facts, target: str | None) -> str:
    names = [n for n in registry.defaults.engines if n in registry.engines.entries]
    possible = []
    for name in names:
        engine = registry.engines[name]
        where = target or default_target(engine, facts)
        if not unsupported(precision, engine, where)[0]:
            possible.append(name)
            if not facts.missing(requirements(engine, where)):
                return name
    if possible or names:
        return (possible or names)[0]
    raise RequestError("no engine is installed", "name one with @ENGINE, or install a package that adds one")


@dataclass(frozen=True)
class _Stages:
    """Makes the stages of one plan."""

    facts: Facts
    family: Family
    precision: Precision
    engine: Engine
    model: Model
    target: str
    given: dict[str, str]
    located: Located | None

    def all(self) -> tuple[Stage, ...]:
        unknown = [key for key in self.given if key not in self.known()]
        if unknown:
            raise RequestError(f"no option {unknown[0]!r} here", did_you_mean(unknown[0], self.known()))
        resolve = self.resolve()
        stage1 = self.stage("stage1", self.precision, [resolve.key], self.precision.requires)
        stage2 = self.stage("stage2", self.engine, [stage1.key, resolve.key], requirements(self.engine, self.target))
        return resolve, stage1, stage2, self.validate(stage2.key)

    def known(self) -> list[str]:
        options = [PREFIXES["stage1"] + name for name in self.precision.options]
        return options + [PREFIXES["stage2"] + name for name in self.engine.options]

    def resolve(self) -> Stage:
        provider = _provider("family", self.family)
        preimage = {}
        if self.located:
            preimage = self.preimage("resolve", provider, {}, [], {}) | {"source": self.located.identity}
        slot = self.slot("resolve", preimage, label(self.model.name))
        return Stage("resolve", provider, {}, HF_CHECKPOINT, preimage, slot)

    def stage(
        self, name: StageName, entry: Precision | Engine, inputs: Sequence[str], requires: Sequence[str]
    ) -> Stage:
        provider = _provider("engine" if isinstance(entry, Engine) else "precision", entry)
        settings = self.settings(entry, PREFIXES[name])
        preimage: dict[str, Any] = {}
        if all(inputs):
            options = {key: setting.value for key, setting in settings.items()}
            preimage = self.preimage(name, provider, options, inputs, self.facts.tools(requires))
            if isinstance(entry, Engine):
                preimage["hardware"] = self.hardware(entry)
        return Stage(
            name, provider, settings, entry.gives, preimage, self.slot(name, preimage, self.label(name, settings))
        )

    def validate(self, engine_key: str) -> Stage:
        provider = _provider("engine", self.engine)
        preimage: dict[str, Any] = {}
        if engine_key:
            judges = [_provider("family", self.family), _provider("precision", self.precision)]
            preimage = self.preimage("validate", provider, {}, [engine_key], {})
            preimage["judges"] = [vars(judge) for judge in judges]
        return Stage("validate", provider, {}, "", preimage, None)

    def preimage(
        self,
        name: StageName,
        provider: Provider,
        options: Mapping[str, Value],
        inputs: Sequence[str],
        tools: Mapping[str, str],
    ) -> dict[str, Any]:
        return {
            "format": KEY_FORMAT,
            "core": __version__,
            "stage": name,
            "provider": vars(provider),
            "options": dict(options),
            "inputs": list(inputs),
            "tools": dict(tools),
        }

    def hardware(self, engine: Engine) -> dict[str, str]:
        known = {"target": self.target}
        if self.facts.gpus and self.target == self.facts.target:
            known |= {"gpu": self.facts.gpus[0].name, "driver": self.facts.gpus[0].driver}
        return {fact: known.get(fact, "") for fact in engine.hardware}

    def label(self, name: StageName, settings: Mapping[str, Setting]) -> str:
        text = f"{label(self.model.name)}-{self.precision.name}"
        if name == "stage2":
            return f"{text}-{self.engine.name}-{self.target}"
        for option, short in (("tp_size", "tp"), ("pp_size", "pp")):
            if option in settings and settings[option].value != 1:
                text += f"-{short}{settings[option].value}"
        return text

    def slot(self, name: StageName, preimage: Mapping[str, Any], text: str) -> Slot | None:
        return Slot(PLACES[name], text, key_of(preimage)) if preimage else None

    def settings(self, entry: StageEntry, prefix: str) -> dict[str, Setting]:
        """Defaults, then what precision, engine, family and model set, then `--set`."""
        result = {}
        for name, option in entry.options.items():
            setting = Setting(option.default, str(entry.origins.get("options", entry.owner)), option.help)
            for source in (self.precision, self.engine, self.family, self.model):
                if prefix + name in source.settings:
                    value = _checked(prefix + name, option, source.settings[prefix + name])
                    setting = Setting(value, f"{source.name} ({source.owner})", option.help)
            if prefix + name in self.given:
                value = _checked(prefix + name, option, _read(prefix + name, option, self.given[prefix + name]))
                setting = Setting(value, "--set", option.help)
            result[name] = setting
        return result


def _provider(kind: Any, entry: Family | Precision | Engine) -> Provider:
    return Provider(kind, entry.name, entry.module, entry.owner.package, entry.owner.version)


def _read(key: str, option: Option, text: str) -> Value:
    """The text of `--set` in the type of the option's default."""
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    try:
        if isinstance(option.default, bool):
            return words[text.lower()]
        return type(option.default)(text)
    except (ValueError, KeyError):
        kind = {bool: "true or false", int: "a whole number", float: "a number"}[type(option.default)]
        raise RequestError(f"--set {key}={text}: must be {kind}", option.help or f"default: {option.default}") from None


def _checked(key: str, option: Option, value: Value) -> Value:
    hint = option.help or f"default: {option.default}"
    if option.choices and value not in option.choices:
        choices = ", ".join(map(str, option.choices))
        raise RequestError(f"{key} = {value!r}: must be one of {choices}", hint)
    if not isinstance(value, (str, bool)):
        if option.min is not None and value < option.min:
            raise RequestError(f"{key} = {value}: must be at least {option.min:g}", hint)
        if option.max is not None and value > option.max:
            raise RequestError(f"{key} = {value}: must be at most {option.max:g}", hint)
    return value


def _compute(target: str) -> str:
    """`8.9` from `sm89`, `12.0` from `sm120`; nothing for a target that is no GPU."""
    digits = target.removeprefix("sm")
    return f"{digits[:-1]}.{digits[-1]}" if target != digits and len(digits) > 1 and digits.isdigit() else ""


def synthesized(name: str, family: Entry, spec: str) -> Model:
    """An entry for a model that no registry lists: a folder or a Hub id."""
    return Model(name=name, owner=family.owner, family=family.name, source=(spec,))
