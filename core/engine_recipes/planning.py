"""What will be done: providers, options, keys. Pure: refuses impossible pairs before any byte moves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import __version__
from .availability import default_engine, default_target, lacking, not_fetched, requirements, unsupported
from .errors import MachineError, RequestError, did_you_mean
from .facts import Facts
from .keys import key_of
from .refs import label
from .registry import Engine, Entry, Family, Model, Option, Precision, Registry, StageEntry
from .sources import Located
from .store import PLACES, Slot
from .types import HF_CHECKPOINT, Provider, Ref, StageName, Value

#: Raise when keys must change although no version did: what a stage writes has another meaning.
KEY_FORMAT = 1
STAGES: tuple[StageName, ...] = ("resolve", "stage1", "stage2", "validate")
#: The origin of a setting that the command line gave.
SET = "--set"
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

    @property
    def arguments(self) -> str:
        """What names this very recipe on a command line: the reference, and what was chosen by options."""
        words = [str(self.ref), *(f"--set {key}={value}" for key, value in self.given.items())]
        if not any(choice.startswith("target ") for choice in self.chosen):
            words.append(f"--target {self.target}")
        return " ".join(words)

    @property
    def given(self) -> dict[str, Value]:
        """Options that `--set` gave, by the name they have there."""
        return {
            PREFIXES[stage.name] + name: setting.value
            for stage in self.stages
            for name, setting in stage.settings.items()
            if setting.origin == SET
        }

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
    engine = registry.engines[ref.engine or default_engine(registry, precision, facts, target)]
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
        blocked=lacking(precision, engine, where, facts) or (not_fetched(model) if located is None else None),
    )


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
                    value = _checked(prefix + name, option, _typed(prefix + name, option, source))
                    owner = source.origins.get("settings", source.owner)
                    setting = Setting(value, f"{source.name} ({owner})", option.help)
            if prefix + name in self.given:
                value = _checked(prefix + name, option, _read(prefix + name, option, self.given[prefix + name]))
                setting = Setting(value, SET, option.help)
            result[name] = setting
        return result


def _provider(kind: Any, entry: Family | Precision | Engine) -> Provider:
    return Provider(kind, entry.name, entry.module, entry.owner.package, entry.owner.version)


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


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
