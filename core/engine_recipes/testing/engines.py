"""What an engine promises about what it compiles. How it behaves once it is loaded: see `running`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from ..entries import Family
from ..errors import RequestError
from ..facts import distribution
from ..host import Host
from ..store import read_manifest
from ..types import Runtime, Sampling, StageContext
from .building import Recipe
from .faults import Fault, Skip, expect
from .folders import expect_the_same, keeps_to_its_folder, survives_a_kill
from .lab import Lab
from .numbers import LONG, allow, apart, in_room, of_source, tolerance
from .recipes import buildable, for_engine, models_for, settings_of
from .settings import promises_of

if TYPE_CHECKING:
    from ..planning import Plan
    from .numbers import Floats

#: Answers of one token that an engine without logits is asked for.
_ANSWERS = 12


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
    engine, compared, refused, models = lab.registry.engines[name], 0, [], lab.models()
    first = next(iter(models.values()))
    plain = for_engine(lab, name).precision  # with which it computes every other case
    for precision in lab.registry.precisions.entries.values():
        if precision.name == plain or precision.gives not in engine.takes or precision.calibration:
            continue
        # others without an algorithm are of another dtype: the source in bfloat16 loses nothing by them
        folder, family = first if precision.algorithm else models.get("tied", first)
        recipe = Recipe(str(folder), family.name, precision.name, name, settings=settings_of(lab, name, precision))
        what = f"{precision.name} ({precision.algorithm or 'no algorithm'})"
        try:
            recipe = lab.runnable(recipe)
        except Skip as reason:  # refused when planned, or nothing here can try
            refused.append(f"{precision.name}: {reason}")
            continue
        made = lab.attempt(recipe, lab.setup.workspace)
        if isinstance(made.error, RequestError) and made.stages[-1].name != "stage2":  # by check_decoder
            refused.append(f"{precision.name}: {made.error.message}")
            continue
        expect(
            not made.error,
            f"{what} can be planned, and stage2 then says: {made.error}\nName in `algorithms` what it can compute",
        )
        off = _disagreement(lab, recipe, f"model in {what}", family)
        expect(not off, f"{off}; if it does not compute {what} at all: name in `algorithms` what it can compute")
        compared += 1
    if not compared and not refused:
        raise Skip("no precision that quantises without a calibration is installed")


def agrees_with_the_source(lab: Lab, name: str) -> None:
    """The engine must compute the model that it was given: biases, norms, tied heads, rope, masks."""
    compared, wrong, refused = 0, [], []
    for what, (folder, family) in models_for(lab, name).items():
        recipe = for_engine(lab, name, folder, family.name)
        try:
            off = _disagreement(lab, recipe, f"{what} model", family)
        except RequestError as error:
            refused.append(f"{what}: {error.message}")
            continue
        compared += 1
        wrong += [off] if off else []
    expect(not wrong, "\n".join(wrong))
    expect(
        compared,
        f"it refuses every tiny model: {'; '.join(refused)}\n"
        f'Give it others: conformance(…, configs={{"{name}": [CONFIG]}}), of an architecture that a family knows',
    )


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
            wrong.append(f"{off}; what it cannot compute it must refuse in check_decoder")
    if off := _split(lab, name):
        wrong.append(f"{off}; a split model that it cannot join it must refuse in stage2 (RequestError)")
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


def _split(lab: Lab, name: str) -> str:
    """How far off it is on a model that lies in two parts, for two GPUs; empty if it refuses it."""
    recipe = for_engine(lab, name)
    if "tp_size" not in lab.registry.precisions[str(recipe.precision)].options:
        return ""
    try:
        family = lab.registry.families[recipe.family]
        recipe = replace(recipe, settings={**recipe.settings, "tp_size": "2"})
        return _disagreement(lab, recipe, "model that is split for tp_size 2", family)
    except (RequestError, Skip):  # or it needs two GPUs
        return ""


def _disagreement(lab: Lab, recipe: Recipe, what: str, family: Family) -> str:
    """How far its logits are from the source's, if that is too far; without logits, which greedy answers are others."""
    limit, folder = tolerance(lab, lab.registry.precisions[str(recipe.precision)]), Path(recipe.model)
    runtime = _running(lab, recipe)
    try:
        base = of_source(lab, folder, family, lab.vocabulary(folder), LONG)
        ids, base = in_room(runtime, lab.vocabulary(folder), base)
        logits = runtime.logits(ids)
        if logits is None:
            return _other_answers(runtime, ids, base, limit, what)
        off = apart(logits, base)
    finally:
        runtime.close()
    said = f"on a tiny {what} logits are {off:.2g} of their spread away from the source's, {limit:g} is allowed"
    return f"{said}{allow(lab, recipe, off)}" if off > limit else ""


def _other_answers(runtime: Runtime, ids: Sequence[int], base: Floats, limit: float, what: str) -> str:
    """Where the source has a clear favourite, a greedy answer must be that, as far as the engine may be off."""
    import numpy as np

    second, first = np.sort(base, axis=-1)[:, -2:].T
    margins = (first - second) / base.std()
    clear = [int(row) for row in np.argsort(-margins)[:_ANSWERS] if margins[row] > 6 * limit]
    if not clear:
        raise Skip("it gives no logits, and may be so far off that its answers tell nothing")
    for row in clear:
        said = list(islice(runtime.generate(ids[: row + 1], Sampling(max_tokens=1)), 1))
        best = int(base[row].argmax())
        if said != [best]:
            return f"on a tiny {what}, after {row + 1} tokens, its greedy answer is {said}, the source's is [{best}]"
    return ""


def _running(lab: Lab, recipe: Recipe) -> Runtime:
    """The loaded engine, or what it says it would compute where it cannot run. Raises Skip where there is neither."""
    plan = lab.plan(recipe)
    if plan.blocked:
        raise Skip(f"it cannot be built here: {plan.blocked.message}")
    return _simulated(lab, recipe, plan) if plan.cannot_run else lab.load(recipe).runtime


def _simulated(lab: Lab, recipe: Recipe, plan: Plan) -> Runtime:
    from ..types import Artifact

    stage = plan.stage("stage2")
    build = lab.build(recipe)
    inputs = tuple(
        Artifact(one.gives, folder, one.key)
        for one in reversed(plan.stages)
        if one.name in ("resolve", "calibrate", "stage1", "stage2") and (folder := build.path(one.name))
    )
    out = Path(tempfile.mkdtemp(dir=lab.folder))  # a fresh one, as every stage gets
    context = StageContext(str(plan.ref), "validate", stage.options, inputs, out, plan.target, lab.folder / "cache")
    runtime = Host([stage.provider]).simulate(stage.provider, context)
    if runtime is None:
        raise Skip(f"it cannot run here: {plan.cannot_run}")
    return runtime
