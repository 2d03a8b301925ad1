"""Which recipe an entry is tried with: a tiny model, and what else it needs, for this machine if it can."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..entries import Engine, Family, Precision
from ..errors import MachineError, RecipesError, RequestError
from ..hf_config import architecture_of
from ..host import Host
from ..types import StageContext, StageName
from .building import Recipe
from .faults import Fault, Skip
from .lab import Lab

if TYPE_CHECKING:
    from ..planning import Plan


def for_precision(lab: Lab, name: str) -> Recipe:
    """A precision on the first tiny model that it does not refuse, for whichever engine takes its checkpoints.

    Raises:
        Fault: it refuses every model, or no plan can be made with it.
    """
    why = ""
    for what, (folder, family) in models_for(lab, name).items():
        recipe = _planned(lab, Recipe(str(folder), family.name, name, settings=lab.given(name)))
        refusal = _refusal(lab, recipe, "calibrate", "stage1")
        if not refusal:
            return recipe
        why += f"\n{what}: {refusal}"
    raise Fault(
        f"it refuses every tiny model:{why}\n"
        f'Give it others: conformance(…, configs={{"{name}": [CONFIG]}}), of an architecture that a family knows; or'
        f' options that fit: conformance(…, settings={{"{name}": {{OPTION: VALUE}}}})'
    )


def for_calibration(lab: Lab, name: str) -> Recipe:
    """A calibration with the first precision that names it; if none does, one of the suite's stands in."""
    recipe = for_precision(lab, next(p.name for p in lab.registry.precisions.entries.values() if p.calibration == name))
    return replace(recipe, settings={**recipe.settings, **lab.given(name)})


def models_for(lab: Lab, name: str) -> dict[str, tuple[Path, Family]]:
    """The tiny models that a precision or an engine is tried on: what they are -> folder and family."""
    found = {}
    for number, config in enumerate(lab.configs.get(name, ())):
        family = lab.registry.family_of(architecture_of(config))
        found[f"{architecture_of(config)} (config {number})"] = (lab.model(family, config), family)
    return found or lab.models()


def _refusal(lab: Lab, recipe: Recipe, *names: StageName) -> str:
    """Why the `check_decoder` of one of these stages' plugins does not let the model through; empty if all do."""
    plan = lab.plan(recipe)
    decoder = lab.describe(plan.family, lab.config(Path(recipe.model)))
    for stage in plan.stages:
        if stage.name in names:
            context = StageContext(str(plan.ref), stage.name, stage.options, (), lab.place("described"), plan.target)
            try:
                Host([stage.provider]).check_decoder(stage.provider, context, decoder)
            except RequestError as error:
                return error.message
            except MachineError:  # about this machine, whichever model: building says so
                return ""
    return ""


def _planned(lab: Lab, recipe: Recipe) -> Recipe:
    """The recipe for the first engine and target with which a plan can be made."""
    precision = lab.registry.precisions[str(recipe.precision)]
    engines = [e for e in lab.registry.engines.entries.values() if precision.gives in e.takes]
    why = f"no engine takes {precision.gives}"
    for engine in engines:
        for target in ("cpu", *(target for target in engine.targets if "*" not in target), "sm90"):
            tried = replace(recipe, engine=engine.name, target=target)
            try:
                plan = lab.plan(tried)
            except RecipesError as error:
                why = error.message
                continue
            if plan.unavailable:
                raise Skip(plan.unavailable.message)
            lacking = plan.lacks(("resolve", "calibrate", "stage1"))
            if lacking:
                raise Skip(lacking.message)
            return tried
    raise Fault(f"no plan can be made with it: {why}")


def for_engine(lab: Lab, name: str, folder: Path | None = None, family: str = "") -> Recipe:
    """The engine with a precision that it takes, plain if there is one, on a tiny model; for this machine if it can.

    Raises:
        Fault: no plan can be made with it.
    """
    engine = lab.registry.engines[name]
    if folder is None:
        folder, family = _taken(lab, name)
    why = f"no precision that is installed gives {' or '.join(engine.takes)}"
    found: list[tuple[bool, Recipe]] = []
    for precision in _precisions(lab, engine):
        for target in ("cpu", None, *(target for target in engine.targets if "*" not in target)):
            settings = settings_of(lab, name, precision)
            recipe = Recipe(str(folder), family, precision.name, name, target, settings)
            try:
                plan = lab.plan(recipe)
            except RecipesError as error:
                why = error.message
                continue
            if isinstance(problem := plan.lacking.get("stage2"), RequestError):  # this engine does not run it
                why = problem.message
                continue
            found.append((bool(_obstacle(plan)), replace(recipe, target=plan.target)))
        if found:
            return min(found, key=lambda pair: pair[0])[1]
    raise Fault(f"no plan can be made with it: {why}")


def _taken(lab: Lab, engine: str) -> tuple[Path, str]:
    """The first tiny model that the engine's `check_decoder` lets through, else the first, and its family."""
    known: dict[str, tuple[Path, str]] = lab.memory.setdefault("taken", {})
    if engine not in known:
        models = [(folder, family.name) for folder, family in models_for(lab, engine).values()]
        taken = (model for model in models if not _refusal(lab, for_engine(lab, engine, *model), "stage2"))
        known[engine] = next(taken, models[0])
    return known[engine]


def buildable(lab: Lab, name: str) -> Recipe:
    """The same. Raises Skip if this machine cannot build it."""
    recipe = for_engine(lab, name)
    blocked = lab.plan(recipe).blocked
    if blocked:
        raise Skip(f"it cannot be built here: {blocked.message}")
    return recipe


def runs_here(lab: Lab, name: str) -> Recipe:
    """The same. Raises Skip if this machine cannot run it."""
    recipe = buildable(lab, name)
    obstacle = _obstacle(lab.plan(recipe))
    if obstacle:
        raise Skip(f"it cannot run here: {obstacle}")
    return recipe


def _obstacle(plan: Plan) -> str:
    return plan.blocked.message if plan.blocked else plan.cannot_run


def _precisions(lab: Lab, engine: Engine) -> list[Precision]:
    """Those whose checkpoints it takes: the default first, then the plain ones."""
    entries = [p for p in lab.registry.precisions.entries.values() if p.gives in engine.takes]
    default = lab.registry.defaults.precision
    return sorted(entries, key=lambda p: (p.name != default, bool(p.algorithm), bool(p.calibration)))


def settings_of(lab: Lab, name: str, precision: Precision) -> dict[str, str]:
    return {**lab.given(precision.name), **lab.given(name)}
