"""What will be done: providers, options, keys. Pure: refuses impossible pairs before any byte moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import __version__
from .availability import default_engine, default_target, lacking, not_fetched, requirements, unsupported
from .errors import MachineError, RequestError, did_you_mean
from .facts import Facts
from .keys import key_of
from .options import SET, Setting, settle
from .refs import label
from .registry import Calibration, Engine, Family, Model, Option, Precision, Registry, StageEntry
from .sources import Located, texts
from .store import PLACES, Slot
from .types import HF_CHECKPOINT, Provider, Ref, StageName, Value

#: Raise when keys must change although no version did: what a stage writes has another meaning.
KEY_FORMAT = 1
STAGES: tuple[StageName, ...] = ("resolve", "calibrate", "stage1", "stage2", "validate")
#: How the options of a stage are written in `--set`.
PREFIXES: Mapping[str, str] = {
    "resolve": "",
    "calibrate": "calib.",
    "stage1": "",
    "stage2": "build.",
    "validate": "gate.",
}


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
    calibration: Calibration | None
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
    def settings(self) -> dict[str, Setting]:
        """Every option of every stage, by its name in `--set`."""
        return {setting.key: setting for stage in self.stages for setting in stage.settings.values()}

    @property
    def given(self) -> dict[str, Value]:
        """Options that `--set` gave, by the name they have there."""
        return {key: setting.value for key, setting in self.settings.items() if setting.origin == SET}

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
    identify: Callable[[str], str] = lambda spec: texts.locate(spec).identity,
) -> Plan:
    """Decide everything.

    Args:
        ref: as written; what it leaves out is chosen and said in `chosen`.
        model: the entry for ref.model; made on the spot for a folder or a Hub id.
        located: the checkpoint on this machine, or None if it has to be fetched.
        target: `cpu`, `sm89` …; None chooses.
        settings: `--set`, key -> text.
        identify: gives the digest of the data that an option names.

    Raises:
        RequestError: unknown name, unknown or bad option, a pair that cannot work, data that is none.
    """
    family = registry.families[model.family]
    precision = registry.precisions[ref.precision or registry.defaults.precision]
    calibration = registry.calibration_of(precision)
    engine = registry.engines[ref.engine or default_engine(registry, precision, facts, target)]
    where = target or default_target(precision, engine, facts)
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
    entries = _Entries(family, calibration, precision, engine, model)
    stages = _Stages(entries, facts, where, located, dict(settings or {}), identify)
    made = stages.all()
    blocked = lacking(calibration, precision, engine, where, facts) or stages.lacking_data
    return Plan(
        ref=Ref(ref.model, precision.name, engine.name),
        model=model,
        family=family,
        calibration=calibration,
        precision=precision,
        engine=engine,
        target=where,
        located=located,
        stages=made,
        chosen=tuple(chosen),
        blocked=blocked or (not_fetched(model) if located is None else None),
    )


@dataclass(frozen=True)
class _Entries:
    """What a reference names."""

    family: Family
    calibration: Calibration | None
    precision: Precision
    engine: Engine
    model: Model


class _Stages:
    """Makes the stages of one plan."""

    def __init__(
        self,
        entries: _Entries,
        facts: Facts,
        target: str,
        located: Located | None,
        given: Mapping[str, str],
        identify: Callable[[str], str],
    ) -> None:
        self.entries, self.facts, self.target, self.located = entries, facts, target, located
        self.given, self.identify = given, identify
        self.lacking_data: MachineError | None = None

    def all(self) -> tuple[Stage, ...]:
        of = self.entries
        known = self.known()
        unknown = [key for key in self.given if key not in known]
        if unknown:
            raise RequestError(f"no option {unknown[0]!r} here", did_you_mean(unknown[0], known))
        made = [self.resolve()]
        if of.calibration:
            shared = {name: option for name, option in of.precision.options.items() if name in of.calibration.shares}
            settings = self.settle("calibrate", of.calibration) | self.settle("stage1", of.precision, shared)
            made.insert(0, self.stage("calibrate", of.calibration, settings, made))
        made.insert(0, self.stage("stage1", of.precision, self.settle("stage1", of.precision), made))
        made.insert(0, self.stage("stage2", of.engine, self.settle("stage2", of.engine), made))
        return *reversed(made), self.validate(made[0].key)

    def known(self) -> list[str]:
        """Every option there is, as in `--set`."""
        of = self.entries
        options = [PREFIXES["calibrate"] + name for name in of.calibration.options] if of.calibration else []
        options += [PREFIXES["stage1"] + name for name in of.precision.options]
        return options + [PREFIXES["stage2"] + name for name in of.engine.options]

    def settle(
        self, stage: StageName, entry: StageEntry, options: Mapping[str, Option] | None = None
    ) -> dict[str, Setting]:
        """What each option of a stage is. The model knows best, then the family, the engine and the precision."""
        of, prefix = self.entries, PREFIXES[stage]
        owner = entry.origins.get("options", entry.owner)
        sources = (of.precision, of.engine, of.family, of.model)
        return {
            name: settle(prefix + name, option, owner, sources, self.given.get(prefix + name))
            for name, option in (entry.options if options is None else options).items()
        }

    def resolve(self) -> Stage:
        provider = _provider("family", self.entries.family)
        preimage = {}
        if self.located:
            preimage = _preimage("resolve", provider, {}, [], {}) | {"source": self.located.identity}
        slot = _slot("resolve", preimage, label(self.entries.model.name))
        return Stage("resolve", provider, {}, HF_CHECKPOINT, preimage, slot)

    def stage(
        self, name: StageName, entry: StageEntry, settings: Mapping[str, Setting], before: Sequence[Stage]
    ) -> Stage:
        """A stage after those that are made already, nearest first."""
        provider = _provider(_KINDS[name], entry)
        inputs = [stage.key for stage in before]
        data = self.data(name, settings)
        preimage: dict[str, Any] = {}
        if all(inputs) and not self.lacking_data:
            options = {key: setting.value for key, setting in settings.items() if key not in data}
            options = {key: value for key, value in options.items() if self.option(name, key).keyed}
            requires = requirements(entry, self.target) if isinstance(entry, Engine) else entry.requires
            preimage = _preimage(name, provider, options, inputs, self.facts.tools(requires))
            if data:
                preimage["data"] = data
            if isinstance(entry, Engine):
                preimage["hardware"] = self.hardware(entry)
        slot = _slot(name, preimage, self.label(name, settings))
        return Stage(name, provider, settings, entry.gives, preimage, slot)

    def option(self, stage: StageName, name: str) -> Option:
        of = self.entries
        if stage == "stage2":
            return of.engine.options[name]
        if stage == "calibrate" and of.calibration and name in of.calibration.options:
            return of.calibration.options[name]
        return of.precision.options[name]

    def data(self, stage: StageName, settings: Mapping[str, Setting]) -> dict[str, str]:
        """Option -> digest, for options that name data."""
        found = {}
        for name, setting in settings.items():
            if self.option(stage, name).data:
                try:
                    found[name] = self.identify(str(setting.value))
                except MachineError as error:
                    self.lacking_data = MachineError(f"{setting.key}: {error.message}", error.hint)
                except RequestError as error:
                    raise RequestError(f"{setting.key}: {error.message}", error.hint) from None
        return found

    def validate(self, engine_key: str) -> Stage:
        of = self.entries
        provider = _provider("engine", of.engine)
        preimage: dict[str, Any] = {}
        if engine_key:
            judges = [_provider("family", of.family), _provider("precision", of.precision)]
            preimage = _preimage("validate", provider, {}, [engine_key], {})
            preimage["judges"] = [vars(judge) for judge in judges]
        return Stage("validate", provider, {}, "", preimage, None)

    def hardware(self, engine: Engine) -> dict[str, str]:
        known = {"target": self.target}
        if self.facts.gpus and self.target == self.facts.target:
            known |= {"gpu": self.facts.gpus[0].name, "driver": self.facts.gpus[0].driver}
        return {fact: known.get(fact, "") for fact in engine.hardware}

    def label(self, name: StageName, settings: Mapping[str, Setting]) -> str:
        of = self.entries
        model = label(of.model.name)
        if name == "calibrate" and of.calibration:
            return f"{model}-{of.calibration.name}"
        text = f"{model}-{of.precision.name}"
        if name == "stage2":
            return f"{text}-{of.engine.name}-{self.target}"
        for option, short in (("tp_size", "tp"), ("pp_size", "pp")):
            if option in settings and settings[option].value != 1:
                text += f"-{short}{settings[option].value}"
        return text


#: Which kind of entry runs a stage.
_KINDS: Mapping[str, str] = {"calibrate": "calibration", "stage1": "precision", "stage2": "engine"}


def _provider(kind: Any, entry: Family | StageEntry) -> Provider:
    return Provider(kind, entry.name, entry.module, entry.owner.package, entry.owner.version)


def _preimage(
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


def _slot(name: StageName, preimage: Mapping[str, Any], text: str) -> Slot | None:
    return Slot(PLACES[name], text, key_of(preimage)) if preimage else None
