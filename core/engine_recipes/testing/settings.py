"""What calibrations, precisions and engines promise about their options and keys."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Literal

from ..combinations import complete
from ..entries import Calibration, Engine, Option, StageEntry
from ..errors import MachineError, RecipesError, RequestError
from ..stages import PREFIXES, STAGES
from ..types import StageName
from .building import Recipe
from .faults import Fault, expect
from .folders import expect_the_same
from .lab import Lab
from .processes import ask
from .recipes import for_calibration, for_engine, for_precision

Kind = Literal["calibrations", "precisions", "engines"]
_FAR = 10**9


def refuses_bad_options_when_planned(lab: Lab, entry: StageEntry, recipe: Recipe) -> None:
    """A value that cannot be is said in a second, and not after an hour of work."""
    prefix = PREFIXES[_stage(entry)]
    for option, allowed in entry.options.items():
        for bad in bad_values(allowed):
            try:
                lab.plan(replace(recipe, settings={**recipe.settings, f"{prefix}{option}": bad}))
            except RequestError as error:
                expect(error.hint, f"{prefix}{option}={bad} is refused without a hint: {error.message}")
                continue
            raise Fault(f"{prefix}{option}={bad} is accepted: say in the registry what it may be (choices, min or max)")


def its_keys_say_what_it_depends_on(lab: Lab, entry: StageEntry, recipe: Recipe) -> None:
    """The same key must always mean the same bytes: another for every other choice, and everywhere the same one."""
    stage, plan = _stage(entry), lab.plan(recipe)
    keys = {one.name: one.key for one in plan.stages}
    for seed in ("0", "1"):
        request = {"recipe": asdict(recipe), "workspace": str(lab.place(f"elsewhere-{seed}"))}
        theirs = ask(lab, "keys", request, PYTHONHASHSEED=seed)
        other = [name for name, key in keys.items() if key != theirs.get(name)]
        expect(not other, f"another process has another key for {', '.join(other)}")
    for option, value in other_options(entry, recipe):
        try:
            changed = lab.plan(replace(recipe, settings={**recipe.settings, f"{PREFIXES[stage]}{option}": value}))
        except RecipesError:  # this model or engine does not allow it
            continue
        same = changed.stage(stage).key == keys[stage]
        if entry.options[option].keyed:
            expect(not same, f"{option} = {value} gives the same key, as if it changed nothing")
        else:
            expect(same, f"{option} = {value} changes the key although it is `keyed = false`")


def options_that_are_in_no_key_change_no_bytes(lab: Lab, entry: StageEntry, recipe: Recipe) -> None:
    """What is `keyed = false` does not make another build: whoever sets it is given what was there before."""
    stage = _stage(entry)
    for option, value in other_options(entry, recipe):
        key = f"{PREFIXES[stage]}{option}"
        other = replace(recipe, settings={**recipe.settings, key: value})
        if entry.options[option].keyed or not _can_be_built(lab, other, stage):
            continue
        place = lab.place(f"unkeyed-{entry.name}-{option}-{value}")
        try:
            again = lab.build(other, stage, workspace=place).path(stage)
        except (MachineError, RequestError):  # `device = cuda` without a GPU
            continue
        before = lab.build(recipe, stage).path(stage)
        assert before is not None
        assert again is not None
        expect_the_same(before, again, f"what it leaves with {key} = {value} and without", "take out `keyed = false`")


def promises_of(kind: Kind) -> Sequence[Callable[[Lab, str], None]]:
    """All of them, for entries of a kind by their name."""
    promises = (
        refuses_bad_options_when_planned,
        its_keys_say_what_it_depends_on,
        options_that_are_in_no_key_change_no_bytes,
    )
    return [_by_name(kind, promise) for promise in promises]


def _by_name(kind: Kind, promise: Callable[[Lab, StageEntry, Recipe], None]) -> Callable[[Lab, str], None]:
    @functools.wraps(promise)
    def check(lab: Lab, name: str) -> None:
        promise(lab, *_entry(lab, kind, name))

    return check


def _entry(lab: Lab, kind: Kind, name: str) -> tuple[StageEntry, Recipe]:
    """The entry, and a recipe that it takes part in."""
    if kind == "engines":
        return complete(lab.registry.engines[name]), for_engine(lab, name)
    if kind == "precisions":
        return lab.registry.precisions[name], for_precision(lab, name)
    return lab.registry.calibrations[name], for_calibration(lab, name)


def _can_be_built(lab: Lab, recipe: Recipe, stage: StageName) -> bool:
    try:
        plan = lab.plan(recipe)
    except RecipesError:  # this model or engine does not allow it
        return False
    return not (plan.unavailable or plan.lacks(STAGES[: STAGES.index(stage) + 1]))


def _stage(entry: StageEntry) -> StageName:
    return "calibrate" if isinstance(entry, Calibration) else "stage2" if isinstance(entry, Engine) else "stage1"


def bad_values(option: Option) -> list[str]:
    """Texts that `--set` must refuse: of another type, no choice, out of any range."""
    if isinstance(option.default, str):
        return ["no such choice"] if option.choices else []
    if isinstance(option.default, bool):
        return ["perhaps"]
    edges = ([] if option.min is None else [option.min - 1]) + ([] if option.max is None else [option.max + 1])
    return ["many", "nan", *[f"{value:.0f}" for value in (-_FAR, *edges)]]


def other_options(entry: StageEntry, recipe: Recipe) -> Iterator[tuple[str, str]]:
    """One more value for each option, where it is known what it may be; all its choices, where it has some."""
    for option, allowed in entry.options.items():
        taken = (str(allowed.default), recipe.settings.get(f"{PREFIXES[_stage(entry)]}{option}"))
        other = [value for value in other_values(allowed) if value not in taken]
        for value in other if allowed.choices else other[:1]:
            yield option, value


def other_values(option: Option) -> list[str]:
    """Texts that `--set` takes; none where nobody can know them."""
    if option.choices:
        return [str(choice) for choice in option.choices]
    if isinstance(option.default, bool):
        return [str(not option.default)]
    if isinstance(option.default, str):
        return []
    low, high = (-_FAR if option.min is None else option.min), (_FAR if option.max is None else option.max)
    near: list[float] = [option.default + 1, option.default - 1, option.default + 2]
    near += [option.default / 2] if isinstance(option.default, float) else []
    return [str(value) for value in near if low <= value <= high]
