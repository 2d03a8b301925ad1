"""The stages of a plan: whose each is, with which options, and its key. Pure: from names and digests to names.

A key is the hash of all that determines a stage's result: provider and version, options, input keys, tools, data.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import __version__, portability, witness
from .availability import requirements
from .combinations import is_version
from .entries import Calibration, Engine, Family, Model, Option, Precision, Reference, StageEntry
from .errors import MachineError, RequestError, did_you_mean
from .facts import Facts, within
from .gate import limits
from .keys import key_of
from .options import Setting, settle
from .refs import label
from .registry import Registry
from .sources import Located
from .sources.folder import digest_of
from .store import PLACES, Slot
from .types import HF_CHECKPOINT, Artifact, Provider, StageName, Value

#: Raise when keys must change although no version did: what a stage writes has another meaning.
#: 2: lowering and conversion changed for the same inputs (decoders that differ from Llama).
KEY_FORMAT = 2
STAGES: tuple[StageName, ...] = ("resolve", "calibrate", "stage1", "stage2", "baseline", "validate")
#: How the options of a stage are written in `--set`.
PREFIXES: Mapping[str, str] = {
    "resolve": "",
    "calibrate": "calib.",
    "stage1": "",
    "stage2": "build.",
    "baseline": "gate.",
    "validate": "gate.",
}
#: Options of the gate that the baseline depends on.
READS = ("texts", "window", "max_tokens")


@dataclass(frozen=True)
class Stage:
    """One step of a plan.

    Attributes:
        provider: who runs it. For validate: the engine; family and precision are asked too.
        settings: every option of the stage, without prefix.
        preimage: what the key is the hash of; empty while the source is not on this machine.
        slot: where the result belongs; None for validate, for what is ready, and while there is no key.
        ready: what is used as it is, wherever it lies; nothing is made.
    """

    name: StageName
    provider: Provider
    settings: Mapping[str, Setting]
    gives: str
    preimage: Mapping[str, Any]
    slot: Slot | None
    ready: Artifact | None = None

    @property
    def key(self) -> str:
        """sha256 of the pre-image, or nothing while it cannot be known."""
        if self.ready:
            return self.ready.key
        return key_of(self.preimage) if self.preimage else ""

    @property
    def options(self) -> dict[str, Value]:
        """Option -> value, as the hook gets them."""
        return {name: setting.value for name, setting in self.settings.items()}


@dataclass(frozen=True)
class Entries:
    """What a reference names, and what the source is run with; `ready` is what need not be made."""

    registry: Registry
    family: Family
    calibration: Calibration | None
    precision: Precision
    engine: Engine
    model: Model
    located: Located | None
    ready: Mapping[StageName, Artifact]

    @property
    def parameters(self) -> int:
        """Of the model, from its entry or the size of its 16-bit weights; 0 if neither is known."""
        if self.model.parameters or not self.located:
            return self.model.parameters
        files = (path for path in self.located.folder.glob("*.safetensors") if path.is_file())
        return sum(path.stat().st_size for path in files) // 2


class Builder:
    """Makes the stages of one plan.

    Attributes:
        blocked: data or a package that some stage needs and this machine has not.
        not_compared: why nothing runs the source; empty if something does.
        unwitnessed: why what runs the source could not notice that the family describes it wrongly; empty if it could.
        cannot_run: why this machine cannot run the engine; empty if it can.
    """

    def __init__(
        self, entries: Entries, facts: Facts, target: str, given: Mapping[str, str], identify: Callable[[str], str]
    ) -> None:
        self.entries, self.facts, self.target = entries, facts, target
        self.given, self.identify = given, identify
        self.blocked: MachineError | None = None
        self.limits = limits.options(entries.registry, entries.precision, entries.parameters)
        self.version = ""
        self.cannot_run = portability.runs_here({"target": target}, facts)
        self.not_compared = self.unwitnessed = ""

    def all(self) -> tuple[Stage, ...]:
        """Every stage, in order."""
        of = self.entries = self.for_version()
        known = self.known()
        unknown = [key for key in self.given if key not in known]
        if unknown:
            if unknown[0] == "build.runtime":
                raise RequestError(f"{of.engine.name} calls no tools of yours: it has no --runtime", "leave it out")
            where = "here" if not self.version else f"of {of.engine.name} {self.version}, or of the other stages"
            raise RequestError(f"no option {unknown[0]!r} {where}", did_you_mean(unknown[0], known))
        made = [self.resolve()]
        if of.calibration:
            shared = {name: option for name, option in of.precision.options.items() if name in of.calibration.shares}
            settings = self.settle("calibrate", of.calibration) | self.settle("stage1", of.precision, shared)
            made.insert(0, self.stage("calibrate", of.calibration, settings, made))
        made.insert(0, self.stage("stage1", of.precision, self.settle("stage1", of.precision), made))
        made.insert(0, self.stage("stage2", of.engine, self.settle("stage2", of.engine), made))
        if "stage2" in of.ready:
            made = [stage for stage in made if stage.ready or stage.name == "resolve"]
        if "stage1" in of.ready:
            made = [stage for stage in made if stage.ready or stage.name != "calibrate"]
        return *reversed(made), *self.judging(made)

    def for_version(self) -> Entries:
        """The entries, the engine's options without those that its chosen `version` has not."""
        engine = self.entries.engine
        if "version" not in engine.options:
            return self.entries
        self.version = str(self.settle("stage2", engine, {"version": engine.options["version"]})["version"].value)
        if not is_version(self.version):
            raise RequestError(f"build.version = {self.version!r} is no version", "for example 1.2.1")
        options = {k: o for k, o in engine.options.items() if not o.versions or within(self.version, o.versions)}
        return replace(self.entries, engine=replace(engine, options=options))

    def values(self, stages: Sequence[Stage]) -> dict[str, Value]:
        """What rules of an engine look at: precision, algorithm, and every option as in `--set`, unset ones too."""
        precision = self.entries.precision
        found: dict[str, Value] = {"precision": precision.name, "algorithm": precision.algorithm}
        for stage in stages:
            for name, setting in stage.settings.items():
                found[setting.key] = setting.value if setting.value != "" else self.option(stage.name, name).unset
        return found

    def known(self) -> list[str]:
        """Every option there is, as in `--set`."""
        of = self.entries
        options = [PREFIXES["calibrate"] + name for name in of.calibration.options] if of.calibration else []
        options += [PREFIXES["stage1"] + name for name in of.precision.options]
        options += [PREFIXES["stage2"] + name for name in of.engine.options]
        return options + [PREFIXES["validate"] + name for name in (*of.registry.gate.options, *self.limits)]

    def settle(
        self, stage: StageName, entry: StageEntry, options: Mapping[str, Option] | None = None
    ) -> dict[str, Setting]:
        """What each option of a stage is. The model knows best, then the family, the engine and the precision."""
        owner = str(entry.origins.get("options", entry.owner))
        return self.settled(PREFIXES[stage], entry.options if options is None else options, owner)

    def settled(self, prefix: str, options: Mapping[str, Option], owner: str) -> dict[str, Setting]:
        """The same for options that are no entry's own."""
        of = self.entries
        sources = (of.precision, of.engine, of.family, of.model)
        return {
            name: settle(prefix + name, option, owner, sources, self.given.get(prefix + name))
            for name, option in options.items()
        }

    def resolve(self) -> Stage:
        """The stage that describes the source."""
        who = provider("family", self.entries.family)
        preimage = {}
        if self.entries.located:
            preimage = _preimage("resolve", who, {}, [], {}) | {"source": self.entries.located.identity}
        slot = _slot("resolve", preimage, label(self.entries.model.name))
        return Stage("resolve", who, {}, HF_CHECKPOINT, preimage, slot)

    def stage(
        self, name: StageName, entry: StageEntry, settings: Mapping[str, Setting], before: Sequence[Stage]
    ) -> Stage:
        """A stage after those that are made already, nearest first."""
        who = provider(type(entry).__name__.lower(), entry)
        if name in self.entries.ready:
            ready = self.entries.ready[name]
            return Stage(name, who, settings, ready.kind, {}, None, ready)
        inputs = [stage.key for stage in before]
        data = self.data(name, settings)
        preimage: dict[str, Any] = {}
        if all(inputs) and not self.blocked:
            folders = self.folders(name, settings)
            options = self.keyed(name, settings, {**data, **folders})
            requires = requirements(entry, self.target) if isinstance(entry, Engine) else entry.requires
            preimage = _preimage(name, who, options, inputs, self.facts.tools(requires))
            if data:
                preimage["data"] = data
            if folders:
                preimage["folders"] = folders
            if isinstance(entry, Engine):
                preimage["hardware"] = self.hardware(entry)
        slot = _slot(name, preimage, self.label(name, entry, settings))
        return Stage(name, who, settings, entry.gives, preimage, slot)

    def keyed(self, stage: StageName, settings: Mapping[str, Setting], data: Container[str]) -> dict[str, Value]:
        """The options that a key depends on by their value."""
        values = {name: setting.value for name, setting in settings.items() if name not in data}
        return {name: value for name, value in values.items() if self.option(stage, name).keyed}

    def option(self, stage: StageName, name: str) -> Option:
        """What an option of a stage allows."""
        of = self.entries
        if stage in ("baseline", "validate"):
            return of.registry.gate.options.get(name) or self.limits[name]
        if stage == "stage2":
            return of.engine.options[name]
        if stage == "calibrate" and of.calibration and name in of.calibration.options:
            return of.calibration.options[name]
        return of.precision.options[name]

    def folders(self, stage: StageName, settings: Mapping[str, Setting]) -> dict[str, list[str]]:
        """Option -> digests, for options that name folders."""
        found = {}
        for name, setting in settings.items():
            if self.option(stage, name).kind == "folders" and setting.value:
                paths = [Path(os.path.expanduser(word.strip())) for word in str(setting.value).split(",")]
                for path in paths:
                    if not path.is_dir():
                        raise RequestError(f"{setting.key}: there is no folder {path}", "check the path")
                found[name] = [digest_of(sorted(f for f in path.rglob("*") if f.is_file())) for path in paths]
        return found

    def data(self, stage: StageName, settings: Mapping[str, Setting]) -> dict[str, str]:
        """Option -> digest, for options that name data."""
        found = {}
        for name, setting in settings.items():
            if self.option(stage, name).data:
                try:
                    found[name] = self.identify(str(setting.value))
                except MachineError as error:
                    self.blocked = self.blocked or MachineError(f"{setting.key}: {error.message}", error.hint)
                except RequestError as error:
                    raise RequestError(f"{setting.key}: {error.message}", error.hint) from None
        return found

    # --- judging ------------------------------------------------------------------------------------------------

    def judging(self, before: Sequence[Stage]) -> list[Stage]:
        """The baseline, if something can run the source, and the validation."""
        of = self.entries
        owner = str(of.registry.owners[0])
        settings = self.settled(PREFIXES["validate"], of.registry.gate.options, owner)
        settings |= self.settled(PREFIXES["validate"], self.limits, owner)
        reference, self.not_compared = self.choose(str(settings["reference"].value if settings else "none"))
        stages = []
        if reference:
            self.unwitnessed = witness.doubt(reference, of.family)
            reads = {name: settings[name] for name in READS}
            stages.append(self.stage("baseline", reference, reads, [before[-1]]))
        return [*stages, self.validate(settings, [stage.key for stage in (*before, *stages)])]

    def choose(self, wanted: str) -> tuple[Reference | None, str]:
        """What runs the source: the one that is wanted, or the first that can. If none does, why."""
        of = self.entries
        if wanted == "none":
            return None, "--set gate.reference=none"
        if of.located and not (of.located.folder / "tokenizer.json").is_file():
            return None, "the source has no tokenizer.json"
        if wanted != "auto":
            reference = of.registry.references[wanted]
            missing = self.facts.missing(reference.requires)
            if missing:
                self.blocked = self.blocked or MachineError(
                    f"{wanted} needs {self.facts.described(missing)}", reference.install
                )
            return reference, ""
        names = of.family.references or of.registry.defaults.references
        entries = [of.registry.references.entries[n] for n in names if n in of.registry.references.entries]
        able = (entry for entry in entries if not self.facts.missing(entry.requires))
        chosen = next((entry for entry in able if witness.loads(entry, of.located)), None)
        if chosen:
            return chosen, ""
        hints = [entry.install for entry in entries if entry.install]
        return None, "nothing here can run the source" + (f" ({hints[0]})" if hints else "")

    def validate(self, settings: Mapping[str, Setting], inputs: Sequence[str]) -> Stage:
        """The stage that judges. Its key is that of what it measures: limits are not part of it."""
        of = self.entries
        who = provider("engine", of.engine)
        preimage: dict[str, Any] = {}
        if all(inputs) and not self.blocked:
            data = self.data("validate", settings)
            preimage = _preimage("validate", who, self.keyed("validate", settings, data), inputs, {})
            judges = [provider("family", of.family), provider("precision", of.precision)]
            preimage |= {"judges": [vars(judge) for judge in judges], "data": data}
            preimage["claims"] = {"algorithm": of.precision.algorithm, "bits": of.precision.bits}
            preimage["not compared"] = self.not_compared
            if self.unwitnessed:
                preimage["unwitnessed"] = self.unwitnessed
            if self.cannot_run:
                preimage["simulated"] = True
        return Stage("validate", who, settings, "", preimage, None)

    # --- names --------------------------------------------------------------------------------------------------

    def hardware(self, engine: Engine) -> dict[str, str]:
        """The facts of the machine that the engine says its result depends on."""
        known = {"target": self.target}
        if self.facts.gpus and self.target == self.facts.target:
            known |= {"gpu": self.facts.gpus[0].name, "driver": self.facts.gpus[0].driver}
        return {fact: known.get(fact, "") for fact in engine.hardware}

    def label(self, name: StageName, entry: StageEntry, settings: Mapping[str, Setting]) -> str:
        """What a stage's folder is called before its key."""
        of = self.entries
        model = label(of.model.name)
        if name in ("calibrate", "baseline"):
            return f"{model}-{entry.name}"
        text = f"{model}-{of.precision.name}"
        if name == "stage2":
            return f"{text}-{of.engine.name}-{self.target}"
        for option, short in (("tp_size", "tp"), ("pp_size", "pp")):
            if option in settings and settings[option].value != 1:
                text += f"-{short}{settings[option].value}"
        return text


def provider(kind: Any, entry: Family | StageEntry) -> Provider:
    """Who runs an entry's hooks."""
    return Provider(kind, entry.name, entry.module, entry.owner.package, entry.owner.version)


def _preimage(
    name: StageName,
    who: Provider,
    options: Mapping[str, Value],
    inputs: Sequence[str],
    tools: Mapping[str, str],
) -> dict[str, Any]:
    return {
        "format": KEY_FORMAT,
        "core": __version__,
        "stage": name,
        "provider": vars(who),
        "options": dict(options),
        "inputs": list(inputs),
        "tools": dict(tools),
    }


def _slot(name: StageName, preimage: Mapping[str, Any], text: str) -> Slot | None:
    return Slot(PLACES[name], text, key_of(preimage)) if preimage else None
