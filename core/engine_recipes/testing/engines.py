"""What an engine promises about what it compiles. How it behaves once it is loaded: see `running`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import RequestError
from ..facts import distribution
from ..host import Host
from ..store import read_manifest
from ..types import Runtime, StageContext
from .building import Recipe
from .faults import Skip, expect
from .folders import keeps_to_its_folder, survives_a_kill
from .lab import Lab
from .numbers import apart, of_source, sample, tolerance
from .recipes import buildable, for_engine, settings_of
from .settings import promises_of

if TYPE_CHECKING:
    from ..planning import Plan
    from .numbers import Floats

_VOCABULARY = 256  # of the tiny models


def keeps_to_its_folder_and_says_what_it_was_built_with(lab: Lab, name: str) -> None:
    """An engine is carried to other machines: it must be all in one folder, and say which versions can load it."""
    recipe = buildable(lab, name)
    folder = keeps_to_its_folder(lab, recipe, "stage2")
    manifest = read_manifest(folder) or {}
    files = [file for file in manifest.get("files", {}) if not file.startswith(("tokenizer", "generation_config"))]
    expect(files, "stage2 leaves nothing in context.out")
    for file in folder.rglob("*"):
        expect(not file.is_symlink(), f"{file.name} is a link: it leads nowhere on another machine")
    recorded = {**manifest["machine"]["versions"], **manifest["result"].get("versions", {})}
    for bound in lab.registry.engines[name].binds:
        expect(
            distribution(bound) in recorded,
            f"it binds {bound}, and the manifest does not record which version that was: name it in `requires`, or"
            ' return {"versions": {…}} from stage2',
        )


def computes_or_refuses_early_every_algorithm(lab: Lab, name: str) -> None:
    """An engine that takes quantised weights for plain ones talks nonsense; one that refuses them late costs hours."""
    engine, compared, refused = lab.registry.engines[name], 0, []
    folder, family = next(iter(lab.models().values()))
    for precision in lab.registry.precisions.entries.values():
        if not precision.algorithm or precision.gives not in engine.takes or precision.calibration:
            continue
        recipe = Recipe(str(folder), family.name, precision.name, name, settings=settings_of(lab, name, precision))
        what = f"{precision.name} ({precision.algorithm})"
        try:
            recipe = lab.runnable(recipe)
        except Skip as reason:  # refused when planned, or nothing here can try
            refused.append(f"{precision.name}: {reason}")
            continue
        made = lab.attempt(recipe, lab.place(f"algorithms-{name}-{precision.name}"))
        if isinstance(made.error, RequestError) and made.stages[-1].name != "stage2":  # by check_decoder
            refused.append(f"{precision.name}: {made.error.message}")
            continue
        expect(
            not made.error,
            f"{what} can be planned, and stage2 then says: {made.error}\nName in `algorithms` what it can compute",
        )
        error, limit = (
            apart(logits_of(lab, recipe), of_source(lab, folder, family, _VOCABULARY)),
            tolerance(lab, precision),
        )
        expect(
            error <= limit,
            f"it builds {what}, and its logits are {error:.2g} of their spread away from the source's, {limit:g} is"
            " allowed: compute it, or name in `algorithms` what it can compute",
        )
        compared += 1
    if not compared and not refused:
        raise Skip("no precision that quantises without a calibration is installed")


def agrees_with_the_source(lab: Lab, name: str) -> None:
    """The engine must compute the model that it was given: biases, norms, tied heads, rope, masks."""
    compared, refused = 0, []
    for what, (folder, family) in lab.models().items():
        recipe = for_engine(lab, name, folder, family.name)
        precision = lab.registry.precisions[str(recipe.precision)]
        try:
            logits = logits_of(lab, recipe)
        except RequestError as error:
            refused.append(f"{what}: {error.message}")
            continue
        off, limit = apart(logits, of_source(lab, folder, family, _VOCABULARY)), tolerance(lab, precision)
        expect(
            off <= limit,
            f"on a tiny {what} model logits are {off:.2g} of their spread away from the source's, {limit:g} is allowed",
        )
        compared += 1
    expect(compared, f"it refuses every tiny model: {'; '.join(refused)}")


def a_killed_build_leaves_nothing_behind(lab: Lab, name: str) -> None:
    """Machines lose power and users press Ctrl-C: the next build must neither trust nor trip over what was left."""
    survives_a_kill(lab, buildable(lab, name), "stage2")


PROMISES: Sequence[Callable[[Lab, str], None]] = (
    keeps_to_its_folder_and_says_what_it_was_built_with,
    *promises_of("engines"),
    agrees_with_the_source,
    computes_or_refuses_early_every_algorithm,
    a_killed_build_leaves_nothing_behind,
)


def logits_of(lab: Lab, recipe: Recipe) -> Floats:
    """Logits of the engine, or of what it says it would compute where it cannot run. Skip if there are none."""
    plan = lab.plan(recipe)
    if plan.blocked:
        raise Skip(f"it cannot be built here: {plan.blocked.message}")
    runtime = _simulated(lab, recipe, plan) if plan.cannot_run else lab.load(recipe).runtime
    logits = runtime.logits(sample(_VOCABULARY))
    runtime.close()
    if logits is None:
        raise Skip("it gives no logits")
    return logits


def _simulated(lab: Lab, recipe: Recipe, plan: Plan) -> Runtime:
    from ..types import Artifact

    stage = plan.stage("stage2")
    build = lab.build(recipe)
    inputs = tuple(
        Artifact(one.gives, folder, one.key)
        for one in reversed(plan.stages)
        if one.name in ("resolve", "calibrate", "stage1", "stage2") and (folder := build.path(one.name))
    )
    out = lab.place(f"simulated-{Path(recipe.model).name}-{recipe.precision}")
    context = StageContext(str(plan.ref), "validate", stage.options, inputs, out, plan.target, lab.folder / "cache")
    runtime = Host([stage.provider]).simulate(stage.provider, context)
    if runtime is None:
        raise Skip(f"it cannot run here: {plan.cannot_run}")
    return runtime
