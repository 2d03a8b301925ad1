"""Building one recipe with any setup: what labs do, and processes of their own for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .. import planning, runner
from ..api import Setup
from ..entries import Model
from ..events import Event
from ..planning import Plan
from ..runner import Build, How
from ..types import Ref, StageName

if TYPE_CHECKING:
    from ..api import Loaded


@dataclass(frozen=True)
class Recipe:
    """What is built: a model's folder, by whom, and how. As plain data, for other processes too."""

    model: str
    family: str
    precision: str | None = None
    engine: str | None = None
    target: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)


def ignore(event: Event) -> None:
    """Listens to nothing."""


def plan(recipe: Recipe, setup: Setup, known: Setup | None = None) -> Plan:
    """The plan of a recipe. `known`: whose registry and facts are used."""
    known = known or setup
    family = known.registry.families[recipe.family]
    model = Model(name=recipe.model, owner=family.owner, family=family.name, source=(f"file:{recipe.model}",))
    ref = Ref(recipe.model, recipe.precision, recipe.engine)
    return planning.make(
        ref,
        known.registry,
        known.facts,
        model,
        setup.locate(model),
        target=recipe.target,
        settings=recipe.settings,
    )


def build(
    recipe: Recipe,
    setup: Setup,
    until: StageName,
    known: Setup | None = None,
    accept: str = "",
    listen: Callable[[Event], None] = ignore,
) -> Build:
    """Build a recipe. Raises the RecipesError of a build that fails."""
    made = runner.run(plan(recipe, setup, known), setup.store, How(until=until, accept=accept), listen)
    if made.error:
        raise made.error
    return made


def load(of: Plan, folder: Path) -> Loaded:
    """An engine folder, loaded as `recipes run` does."""
    from .. import api

    stage = of.stage("stage2")
    return api.load_folder(folder, stage.provider, stage.options)
