"""What an engine promises about what it compiles. How it behaves once it is loaded: see `running`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..entries import Family
from ..errors import RequestError
from ..facts import distribution
from ..host import Host
from ..store import read_manifest
from ..types import Runtime, StageContext
from .building import Recipe
from .faults import Fault, Skip, expect
from .folders import expect_the_same, keeps_to_its_folder, survives_a_kill
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
    compared, wrong, refused = 0, [], []
    for what, (folder, family) in lab.models().items():
        recipe = for_engine(lab, name, folder, family.name)
        try:
            off = _disagreement(lab, recipe, f"{what} model", family)
        except RequestError as error:
            refused.append(f"{what}: {error.message}")
            continue
        compared += 1
        wrong += [off] if off else []
    expect(not wrong, "\n".join(wrong))
    expect(compared, f"it refuses every tiny model: {'; '.join(refused)}")


def computes_or_refuses_early_what_few_models_say(lab: Lab, name: str) -> None:
    """A model says more than its architecture: what an engine passes over makes every answer a little wrong."""
    wrong = []
    for what, (folder, family) in lab.odd_models().items():
        try:
            recipe = for_engine(lab, name, folder, family.name)
        except Fault:  # no plan can be made with it
            continue
        if blocked := lab.plan(recipe).blocked:
            raise Skip(f"it cannot be built here: {blocked.message}")
        made = lab.attempt(recipe, lab.setup.workspace)
        if made.error and made.stages[-1].name != "stage2":  # by check_decoder
            continue
        if made.error:
            wrong.append(f"a model {what} passes check_decoder, and stage2 then says: {made.error}")
        elif off := _disagreement(lab, recipe, f"model {what}", family):
            wrong.append(f"{off}: compute it, or refuse it in check_decoder")
    expect(not wrong, "\n".join(wrong))


def two_builds_give_the_same_bytes(lab: Lab, name: str) -> None:
    """A key stands for bytes: if they differ, nobody can tell what was changed from what was built again."""
    recipe = buildable(lab, name)
    folders = [lab.build(recipe, workspace=place).path("stage2") for place in (None, lab.place(f"again-{name}"))]
    first, again = folders
    assert first is not None
    assert again is not None
    why = (
        "time, random numbers, paths or a compiler that measures do that. If that is the compiler's own way, give"
        f' conformance(…, skip={{"engine {name}: two builds *": "WHY"}})'
    )
    expect_the_same(first, again, "two engines from the same checkpoint", why)


def a_killed_build_leaves_nothing_behind(lab: Lab, name: str) -> None:
    """Machines lose power and users press Ctrl-C: the next build must neither trust nor trip over what was left."""
    survives_a_kill(lab, buildable(lab, name), "stage2")


PROMISES: Sequence[Callable[[Lab, str], None]] = (
    keeps_to_its_folder_and_says_what_it_was_built_with,
    *promises_of("engines"),
    two_builds_give_the_same_bytes,
    agrees_with_the_source,
    computes_or_refuses_early_what_few_models_say,
    computes_or_refuses_early_every_algorithm,
    a_killed_build_leaves_nothing_behind,
)


def _disagreement(lab: Lab, recipe: Recipe, what: str, family: Family) -> str:
    """How far its logits are from the source's, if that is too far."""
    limit = tolerance(lab, lab.registry.precisions[str(recipe.precision)])
    off = apart(logits_of(lab, recipe), of_source(lab, Path(recipe.model), family, _VOCABULARY))
    said = f"on a tiny {what} logits are {off:.2g} of their spread away from the source's, {limit:g} is allowed"
    return said if off > limit else ""


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
