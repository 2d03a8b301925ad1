"""What will be done: providers, options, keys. Pure: refuses impossible pairs before any byte moves."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from . import targets
from .availability import (
    default_engine,
    default_target,
    is_target,
    lacking,
    mismatched,
    not_fetched,
    unrunnable,
    untargeted,
    why_not,
)
from .combinations import complete, refused
from .entries import Calibration, Engine, Family, Model, Precision
from .errors import MachineError, RecipesError, RequestError
from .facts import Facts
from .gate import Bound, limits
from .options import SET, Setting
from .registry import Registry
from .sources import Located, texts
from .stages import PREFIXES, STAGES, Builder, Entries, Stage
from .types import Artifact, Ref, StageName, Value

__all__ = ["STAGES", "Plan", "Stage", "make"]


@dataclass(frozen=True)
class Plan:
    """A complete reference and the stages that make its engine.

    Attributes:
        ref: the complete reference.
        model, family, calibration, precision, engine: their entries of the registry; None: no calibration.
        target: what the engine is for: `cpu`, `sm89`, `sm86+sm89`.
        located: where the model's checkpoint lies; None: not on this machine.
        stages: what runs, in order, with its options and keys.
        parameters: of the model; 0 if nobody knows yet.
        chosen: what the request left open and was chosen, in words.
        bounds: where each metric warns and fails.
        not_compared: why validation compares the engine with nothing; empty if it does.
        unwitnessed: why it would not notice that the family describes the model wrongly; empty if it would.
        cannot_run: why this machine cannot run the engine; empty if it can.
        facts: this machine.
        lacking: by stage, why it cannot run: the engine does not compute what the precision stores, or this machine
            has not a package, a program or a GPU. What is to be said first comes first.
        unavailable: data or a checkpoint that is missing; None if all is there.
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
    parameters: int
    chosen: tuple[str, ...]
    bounds: Mapping[str, Bound]
    not_compared: str
    unwitnessed: str
    cannot_run: str
    facts: Facts
    lacking: Mapping[StageName, RecipesError]
    unavailable: MachineError | None

    @property
    def blocked(self) -> RecipesError | None:
        """Why all of it cannot be built here and now, and what to do; None if it can."""
        return next(iter(self.lacking.values()), None) or self.unavailable

    @property
    def arguments(self) -> str:
        """What names this very recipe on a command line: the reference, and what was chosen by options."""
        words = [str(self.ref)]
        for key, value in self.given.items():
            words += ["--set", f"{key}={value}"]
        if not any(choice.startswith("target ") for choice in self.chosen):
            words += ["--target", self.target]
        return shlex.join(words)

    def lacks(self, stages: Iterable[StageName]) -> RecipesError | None:
        """The first reason why one of these stages cannot run; None if all can."""
        names = set(stages)
        return next((error for name, error in self.lacking.items() if name in names), None)

    @property
    def settings(self) -> dict[str, Setting]:
        """Every option of every stage, by its name in `--set`."""
        return {setting.key: setting for stage in self.stages for setting in stage.settings.values()}

    @property
    def given(self) -> dict[str, Value]:
        """Options that `--set` gave, by the name they have there."""
        return {key: setting.value for key, setting in self.settings.items() if setting.origin == SET}

    @property
    def excluded(self) -> tuple[str, ...]:
        """Patterns of the linear layers that stay at 16 bits, where the precision has an option for that."""
        setting = self.settings.get("exclude")
        return tuple(word.strip() for word in str(setting.value).split(",") if word.strip()) if setting else ()

    @property
    def recipe(self) -> dict[str, Value]:
        """Those of them that the engine depends on."""
        return {key: value for key, value in self.given.items() if not key.startswith(PREFIXES["validate"])}

    @property
    def gpus(self) -> str:
        """As CUDA_VISIBLE_DEVICES, the GPUs of this machine that the engine is for; empty if there is no choice."""
        return self.facts.visible(self.target)

    @property
    def ranks(self) -> int:
        """Of how many GPUs' parts the checkpoint is."""
        return ranks({key: setting.value for key, setting in self.settings.items()})

    @property
    def is_of_strangers(self) -> bool:
        """Whether the checkpoint was made elsewhere: its engine is judged, and gets no plain name."""
        return any(stage.name == "stage1" and stage.ready for stage in self.stages) and not self.stage("stage2").ready

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
    ready: Mapping[StageName, Artifact] | None = None,
    identify: Callable[[str], str] = lambda spec: texts.locate(spec).identity,
) -> Plan:
    """Decide everything.

    Args:
        ref: as written; what it leaves out is chosen and said in `chosen`.
        model: the entry for ref.model; made on the spot for a folder or a Hub id.
        located: the checkpoint on this machine, or None if it has to be fetched.
        target: `cpu`, `sm89` …; None chooses.
        settings: `--set`, key -> text.
        ready: what is used as it is, a checkpoint that was made elsewhere or an engine that is only judged; what
            comes before it and is not among them is left out.
        identify: gives the digest of the data that an option names.

    Raises:
        RequestError: unknown name, unknown or bad option, a pair that cannot work, data that is none.
    """
    of, where, chosen = _decide(ref, registry, facts, model, located, target, ready or {})
    builder = Builder(of, facts, where, dict(settings or {}), identify)
    stages = builder.all()
    values = builder.values(stages)
    rule = refused(of.engine.refuses, where, values)
    if rule and not ready:
        raise _impossible(of, rule.why, rule.instead)
    options = next(stage.options for stage in stages if stage.name == "stage2")
    return Plan(
        ref=Ref(ref.model, of.precision.name, of.engine.name),
        model=model,
        family=of.family,
        calibration=of.calibration,
        precision=of.precision,
        engine=of.engine,
        target=where,
        located=located,
        stages=stages,
        parameters=of.parameters,
        chosen=tuple(chosen),
        bounds=limits.bounds(registry, stages[-1].options),
        not_compared=builder.not_compared,
        unwitnessed=builder.unwitnessed,
        cannot_run=builder.cannot_run or _too_few(of.engine, ranks(values), where, facts),
        facts=facts,
        lacking=_lacking(of, where, facts, options),
        unavailable=builder.blocked or (not_fetched(model) if located is None else None),
    )


def _decide(
    ref: Ref,
    registry: Registry,
    facts: Facts,
    model: Model,
    located: Located | None,
    target: str | None,
    ready: Mapping[StageName, Artifact],
) -> tuple[Entries, str, list[str]]:
    """Which entries, for which target, and what was chosen, in words. Refuses a pair that cannot work."""
    family = registry.families[model.family]
    precision = registry.precisions[ref.precision or registry.defaults.precision]
    calibration = registry.calibration_of(precision)
    target = targets.normal(target) if target else None
    engine = complete(registry.engines[ref.engine or default_engine(registry, precision, facts, target)])
    where = target or default_target(precision, engine, facts)
    entries = Entries(registry, family, calibration, precision, engine, model, located, ready)
    if not target and not is_target(engine, where):
        raise untargeted(engine, facts)
    reason, hint = why_not(registry, precision, engine, where)
    if reason and mismatched(precision, engine, where)[0]:
        raise _impossible(entries, reason, hint)
    choices = (
        ("precision", precision.name, ref.precision),
        ("engine", engine.name, ref.engine),
        ("target", where, target),
    )
    return entries, where, [f"{what} {name}" for what, name, given in choices if not given]


def _lacking(of: Entries, target: str, facts: Facts, options: Mapping[str, Value]) -> dict[StageName, RecipesError]:
    """Why stages cannot run. That the engine would not compute the checkpoint comes before any package."""
    calibration = None if of.ready else of.calibration
    found: dict[StageName, RecipesError] = {**lacking(calibration, of.precision, of.engine, target, facts, options)}
    if not unrunnable(of.precision, of.engine, target)[0]:
        return found
    found.pop("stage2", None)
    return {"stage2": _impossible(of, *why_not(of.registry, of.precision, of.engine, target)), **found}


def ranks(values: Mapping[str, Value]) -> int:
    """Over how many GPUs these options split a checkpoint."""
    return math.prod(int(values.get(name, 1)) for name in ("tp_size", "pp_size"))


def _too_few(engine: Engine, parts: int, target: str, facts: Facts) -> str:
    """That an engine whose parts run on a GPU each has not so many here; empty if it has."""
    count = sum(gpu.target == target for gpu in facts.gpus)
    if not engine.needs_gpu or parts <= count:
        return ""
    return f"this engine is split over {parts} GPUs, this machine has {count} for {target}"


def _impossible(of: Entries, reason: str, hint: str) -> RequestError:
    return RequestError(f"{of.model.name}:{of.precision.name}@{of.engine.name} cannot be built: {reason}", hint)
