"""Which recipe an entry is tried with: a tiny model, and what else it needs, for this machine if it can."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..entries import Engine, Precision
from ..errors import RecipesError, RequestError
from .building import Recipe
from .faults import Fault, Skip
from .lab import Lab

if TYPE_CHECKING:
    from ..planning import Plan


def for_precision(lab: Lab, name: str) -> Recipe:
    """A precision on the first tiny model that it does not refuse, for whichever engine takes its checkpoints."""
    precision = lab.registry.precisions[name]
    folder, family = next(iter(lab.models().values()))
    recipe = Recipe(str(folder), family.name, name, settings=lab.given(name))
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
        folder, entry = next(iter(lab.models().values()))
        family = entry.name
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
