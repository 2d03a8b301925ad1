"""What a calibration promises: statistics that are whole and repeatable, whoever uses them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .faults import expect
from .folders import contents, expect_the_same, keeps_to_its_folder, survives_a_kill
from .lab import Lab
from .recipes import for_calibration
from .settings import promises_of


def measures_the_same_twice_in_its_folder(lab: Lab, name: str) -> None:
    """A key stands for bytes, and every precision that names it shares them; what lies elsewhere is lost."""
    recipe = for_calibration(lab, name)
    first = keeps_to_its_folder(lab, recipe, "calibrate")
    expect(contents(first), "calibrate leaves nothing in context.out: see checkpoint.write_statistics")
    again = lab.build(recipe, "calibrate", workspace=lab.place(f"again-{name}")).path("calibrate")
    assert again is not None
    why = "time, random numbers without a seed, the order of sets, or paths do that"
    expect_the_same(first, again, "two runs of the same", why)


def a_killed_stage_leaves_nothing_behind(lab: Lab, name: str) -> None:
    """Machines lose power and users press Ctrl-C: the next build must neither trust nor trip over what was left."""
    survives_a_kill(lab, for_calibration(lab, name), "calibrate")


PROMISES: Sequence[Callable[[Lab, str], None]] = (
    measures_the_same_twice_in_its_folder,
    *promises_of("calibrations"),
    a_killed_stage_leaves_nothing_behind,
)
