"""What a precision promises, with its calibration: checkpoints that are whole, repeatable and close to the source."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ..checkpoint import open_checkpoint, verify
from ..entries import Family
from ..errors import RequestError
from ..types import TRTLLM_CHECKPOINT
from .building import Recipe
from .faults import Skip, expect
from .folders import expect_the_same, keeps_to_its_folder, survives_a_kill
from .lab import Lab
from .numbers import FEWER_BITS, apart, of_source, sample, tolerance
from .recipes import for_precision, models_for
from .settings import other_options, promises_of

#: An option with fewer choices than these is tried with each of them.
_MANY_CHOICES = 5


def keeps_to_its_folder_and_says_what_it_made(lab: Lab, name: str) -> None:
    """What lies outside its folder is lost or hurts others; a config that says something else, no engine can read."""
    precision = lab.registry.precisions[name]
    folder = keeps_to_its_folder(lab, for_precision(lab, name), "stage1")
    if precision.gives != TRTLLM_CHECKPOINT:
        raise Skip(f"it gives {precision.gives}: only that it keeps to its folder was checked")
    verify(folder)
    with open_checkpoint(folder) as checkpoint:
        said = checkpoint.quantization["quant_algo"] or ""
    expect(
        said == precision.algorithm,
        f"config.json says quant_algo {said or 'null'}, the registry says algorithm = {precision.algorithm!r}",
    )


def two_builds_give_the_same_bytes(lab: Lab, name: str) -> None:
    """A key stands for bytes: if they differ from build to build, no engine can be built again as it was."""
    recipe = for_precision(lab, name)
    first = _checkpoint(lab, recipe)
    again = _checkpoint(lab, recipe, lab.place(f"again-{name}"))
    why = "time, random numbers without a seed, the order of sets, or paths do that"
    expect_the_same(first, again, "two builds of the same", why)


def split_parts_join_to_the_whole(lab: Lab, name: str) -> None:
    """A model split over GPUs must be the model that was judged on one."""
    precision = lab.registry.precisions[name]
    sizes = {"tp_size", "pp_size"} & set(precision.options)
    if not sizes or precision.gives != TRTLLM_CHECKPOINT:
        raise Skip("it has no option tp_size or pp_size" if not sizes else f"it gives {precision.gives}")
    recipe, joined = for_precision(lab, name), 0
    whole = _checkpoint(lab, recipe)
    for split in ({"tp_size": "2"}, {"pp_size": "2"}, {"tp_size": "2", "pp_size": "2"}):
        if set(split) <= sizes:
            try:
                parts = _checkpoint(lab, replace(recipe, settings={**recipe.settings, **split}))
            except RequestError:  # a size that this precision cannot split so
                continue
            joined += 1
            count, ranks = len(list(parts.glob("rank*.safetensors"))), math.prod(map(int, split.values()))
            expect(count == ranks, f"{_said(split)}: there are {count} rank files, not {ranks}")
            _same(whole, parts, _said(split))
    expect(joined, "it has options to split a model, and refuses every split of a tiny one")


def a_killed_stage_leaves_nothing_behind(lab: Lab, name: str) -> None:
    """Machines lose power and users press Ctrl-C: the next build must neither trust nor trip over what was left."""
    survives_a_kill(lab, for_precision(lab, name), "stage1")


def stays_close_to_the_source(lab: Lab, name: str) -> None:
    """Quantising changes numbers a little; a swapped scale or a wrong axis changes them a lot, and still runs."""
    precision = lab.registry.precisions[name]
    limit, compared = tolerance(lab, precision), 0
    for what, (folder, family) in models_for(lab, name).items():
        if precision.calibration and what == "plain":  # measuring takes long
            continue
        recipe = Recipe(str(folder), family.name, name, settings=lab.given(name))
        error = _error(lab, recipe, family)
        compared += error is not None
        _expect_close(name, error, limit, f"a tiny {what} model")
    expect(compared, "it refuses every tiny model")
    recipe = for_precision(lab, name)
    for option, value in other_options(precision, recipe):
        allowed = precision.options[option]
        if allowed.keyed and len(allowed.choices) in range(1, _MANY_CHOICES):
            other = replace(recipe, engine=None, target=None, settings={**recipe.settings, option: value})
            with suppress(Skip):  # nothing here runs that choice
                error = _error(lab, other, lab.registry.families[recipe.family])
                _expect_close(name, error, max(limit, FEWER_BITS), f"a tiny model, with {option} = {value},")


PROMISES: Sequence[Callable[[Lab, str], None]] = (
    keeps_to_its_folder_and_says_what_it_made,
    two_builds_give_the_same_bytes,
    split_parts_join_to_the_whole,
    *promises_of("precisions"),
    a_killed_stage_leaves_nothing_behind,
    stays_close_to_the_source,
)


def _error(lab: Lab, recipe: Recipe, family: Family) -> float | None:
    """How far the recipe's logits are from the source's. None if it refuses the model."""
    folder = Path(recipe.model)
    try:
        runtime = lab.load(lab.runnable(recipe)).runtime
    except RequestError:
        return None
    logits = runtime.logits(sample(lab.vocabulary(folder)))
    runtime.close()
    if logits is None:
        raise Skip("the engine that runs it here gives no logits")
    return apart(logits, of_source(lab, folder, family, lab.vocabulary(folder)))


def _expect_close(name: str, error: float | None, limit: float, what: str) -> None:
    expect(
        error is None or error <= limit,
        f"on {what} its logits are {error:.2g} of their spread away from the source's, {limit:g} is allowed: see"
        ' scales, axes and zero points, or set conformance(…, tolerance={"' + name + '": …})',
    )


def _said(split: Mapping[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in split.items())


def _checkpoint(lab: Lab, recipe: Recipe, workspace: Path | None = None) -> Path:
    folder = lab.build(recipe, "stage1", workspace=workspace).path("stage1")
    assert folder is not None
    return folder


def _same(whole: Path, parts: Path, split: str) -> None:
    import numpy as np

    with open_checkpoint(whole) as one, open_checkpoint(parts) as many:
        expect(set(one.names()) == set(many.names()), f"{split}: there are other tensors than without a split")
        for tensor in one.names():
            try:
                ours, theirs = one.array(tensor), many.array(tensor)
            except RequestError as error:
                raise Skip(f"{split}: {error.message}") from None
            same = ours.shape == theirs.shape and np.ascontiguousarray(ours).tobytes() == theirs.tobytes()
            expect(same, f"{split}: {tensor}, joined from its parts, is not what it is without a split")
