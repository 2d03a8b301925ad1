"""What a precision promises, with its calibration: checkpoints that are whole, repeatable and close to the source."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..checkpoint import open_checkpoint, verify
from ..errors import RequestError
from ..types import TRTLLM_CHECKPOINT
from .building import Recipe
from .faults import Skip, expect
from .folders import expect_the_same, keeps_to_its_folder, survives_a_kill
from .lab import Lab
from .numbers import apart, of_source, sample, tolerance
from .recipes import for_precision
from .settings import other_options, promises_of

_VOCABULARY = 256  # of the tiny models


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


def options_that_are_in_no_key_change_no_bytes(lab: Lab, name: str) -> None:
    """What is `keyed = false` does not make another build: whoever sets it is given what was there before."""
    options = lab.registry.precisions[name].options
    recipe = for_precision(lab, name)
    for option, value in other_options(lab.registry.precisions[name], recipe):
        if not options[option].keyed:
            other = replace(recipe, settings={**recipe.settings, option: value})
            again = _checkpoint(lab, other, lab.place(f"unkeyed-{name}-{option}"))
            what = f"checkpoints with {option} = {value} and without"
            expect_the_same(_checkpoint(lab, recipe), again, what, "take out `keyed = false`")


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
    for what, (folder, family) in lab.models().items():
        if precision.calibration and what not in ("biased", "normed"):  # measuring takes long
            continue
        recipe = Recipe(str(folder), family.name, name, settings=lab.given(name))
        try:
            runtime = lab.load(lab.runnable(recipe)).runtime
        except RequestError:  # it refuses such models
            continue
        logits = runtime.logits(sample(_VOCABULARY))
        runtime.close()
        if logits is None:
            raise Skip("the engine that runs it here gives no logits")
        error = apart(logits, of_source(lab, folder, family, _VOCABULARY))
        expect(
            error <= limit,
            f"on a tiny {what} model its logits are {error:.2g} of their spread away from the source's, {limit:g} is"
            ' allowed: see scales, axes and zero points, or set conformance(…, tolerance={"' + name + '": …})',
        )
        compared += 1
    expect(compared, "it refuses every tiny model")


PROMISES: Sequence[Callable[[Lab, str], None]] = (
    keeps_to_its_folder_and_says_what_it_made,
    two_builds_give_the_same_bytes,
    options_that_are_in_no_key_change_no_bytes,
    split_parts_join_to_the_whole,
    *promises_of("precisions"),
    a_killed_stage_leaves_nothing_behind,
    stays_close_to_the_source,
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
